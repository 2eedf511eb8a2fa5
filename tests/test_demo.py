"""The demonstration end to end, in a small form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import dsprune
from dsprune import cli
from dsprune.checkpoint import CheckpointError
from dsprune.recipes import demo, runs, stages, training

TINY = ["--size", "8", "--batch", "256", "--pretrain-epochs", "1", "--learn-epochs", "1", "--groups", "2"]
TINY += ["--finetune-epochs", "1", "--cycles", "1", "--flops", "0.6", "--seconds", "0.01", "--threads", "1"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a small demonstration, and what it printed."""
    import contextlib
    import io

    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("demo") / "run"
    said = io.StringIO()
    torch.set_num_threads(1)  # for the latencies, too
    with contextlib.redirect_stdout(said):
        assert cli.main(["demo", "--out", str(folder), *TINY]) == 0
    torch.set_num_threads(threads)
    return folder, said.getvalue()


def test_what_is_printed(ran: tuple[Path, str]) -> None:
    folder, said = ran
    for text in (
        "test accuracy",
        "multiply-adds",
        "parameters",
        "dense",
        "packed",
        "TorchScript",
        "speed-up",
    ):
        assert text in said
    assert "reloaded in a new process: the same bits" in said
    for name in ("report.png", "packed.safetensors", "report.json"):
        assert str(folder / name) in said
        assert (folder / name).stat().st_size > 1000


def test_the_report_is_true(ran: tuple[Path, str]) -> None:
    folder, _ = ran
    report = json.loads((folder / "report.json").read_text())
    run = runs.Run.open(folder)
    data = run.data()
    torch.set_num_threads(1)
    packed = run.packed(data)
    dense, _, _ = run.read("dense", data)
    masked, _, _ = run.read("finetuned", data)
    accuracy = report["test_accuracy"]
    assert accuracy["dense"] == training.evaluate(dense, data.test).accuracy
    assert accuracy["packed"] == training.evaluate(packed, data.test).accuracy
    assert accuracy["finetuned"] == training.evaluate(masked, data.test).accuracy
    counted = dsprune.summary(packed, data.example)
    cost = report["cost"]
    assert cost["macs_left"] == counted.macs and cost["params_left"] == counted.params
    assert cost["macs_dense"] == sum(stages.layer_macs(dense, data.example).values()) + 640
    assert cost["params_dense"] == sum(p.numel() for p in dense.parameters())
    assert cost["macs_cut_percent"] >= 60
    assert cost["macs_cut_percent"] == pytest.approx(100 * (1 - cost["macs_left"] / cost["macs_dense"]))
    assert cost["prunable_macs_cut_percent"] > cost["macs_cut_percent"]
    assert report["packed_minus_masked"] <= demo.TOLERANCE == 1e-4
    assert set(report["latency_ms"]) == {"1", "128"}
    for row in report["latency_ms"].values():
        assert set(row) - {"OpenVINO", "ONNX Runtime"} == {"eager", "channels_last", "TorchScript", "packed"}
        assert all(value > 0 for value in row.values())
    assert report["reloaded_same_bits"] is True
    assert runs.Config.from_json(report["settings"], folder) == run.config


def test_a_changed_packed_file_is_noticed(ran: tuple[Path, str], tmp_path: Path) -> None:
    """The comparison with a new process compares what that process computed."""
    run = runs.Run.open(Path(shutil.copytree(ran[0], tmp_path / "run")))
    data = run.data()
    torch.set_num_threads(1)
    model, _, _ = run.read("pruned", data)
    packed = dsprune.pack(model, data.example).eval()
    dsprune.save(packed, run.file("packed"))
    # That process has no need of the data set, which may be large.
    run.reconfigure(data="cifar10", folder="/nowhere")
    images = data.test.images
    found = stages.logits_in_new_process(run, data, images)
    assert torch.equal(found, training.evaluate(packed, data.test).logits)
    finetuned, _, _ = run.read("finetuned", data)
    assert not torch.allclose(found, training.evaluate(finetuned, data.test).logits, atol=1e-3)
    run.file("packed").write_bytes(b"broken")
    with pytest.raises(OSError, match=r"in a new process failed: .*packed\.safetensors"):
        stages.logits_in_new_process(run, data, images)
    with pytest.raises(OSError, match=r"packed\.safetensors in a new process .* longer than 0\.01 s"):
        stages.logits_in_new_process(run, data, images, timeout=0.01)


def test_resume_needs_the_same_settings(ran: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = ran
    before = (folder / "dense.safetensors").stat().st_mtime_ns
    assert cli.main(["demo", "--out", str(folder), *TINY, "--seed", "1", "--resume"]) == 1
    assert "was begun with other settings (seed)" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="learn"):
        demo.open_or_create(folder, runs.Config(size=8, learn=training.Learn(groups=7)), resume=True)
    assert (folder / "dense.safetensors").stat().st_mtime_ns == before


def test_mean_of_seeds() -> None:
    def report(seed: int, accuracy: float) -> dict[str, object]:
        return {
            "network": "N",
            "data": {},
            "seed": seed,
            "test_accuracy": {"dense": accuracy, "packed": accuracy - 1},
            "cost": {"macs_left": 10 * seed},
            "latency_ms": {"1": {"eager": 2.0 * seed, "packed": 1.0}},
            "packed_minus_masked": 1e-6 * seed,
            "reloaded_same_bits": True,
            "seconds": {"prune": seed},
            "machine": {},
        }

    mean = demo.mean_report([report(0, 98.0), report(1, 99.0), report(2, 97.0)])
    assert mean["seeds"] == [0, 1, 2]
    assert mean["test_accuracy"] == {"dense": 98.0, "packed": 97.0}
    assert mean["latency_ms"] == {"1": {"eager": 2.0, "packed": 1.0}}
    assert mean["packed_minus_masked"] == 2e-6
    assert mean["cost"] == {"macs_left": 10}


def test_a_difference_is_an_error(
    ran: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(ran[0], tmp_path / "run"))
    monkeypatch.setattr(stages, "make_packed", lambda run, data: 0.0)
    monkeypatch.setattr(stages, "logits_in_new_process", lambda *args: torch.zeros(359, 10))
    assert cli.main(["demo", "--out", str(folder), *TINY, "--resume"]) == 1
    assert "does not give the same bits" in capsys.readouterr().err
    monkeypatch.setattr(demo, "TOLERANCE", -1.0)
    assert cli.main(["demo", "--out", str(folder), *TINY, "--resume"]) == 1
    assert "packed and masked logits differ" in capsys.readouterr().err
