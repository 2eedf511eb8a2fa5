"""The command line: every stage on a run folder, interruption and resumption to the same bits, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dsprune
from dsprune import checkpoint, cli
from dsprune.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from dsprune.recipes import runs, stages, training
from dsprune.recipes.data import ImageData, Split, batch_count, batches, digits, shifted
from dsprune.recipes.datasets import load_data
from dsprune.recipes.oneshot import read_data

ROOT = Path(__file__).resolve().parent.parent
LEARN = ["--size", "8", "--batch", "64", "--pretrain-epochs", "2", "--epochs", "2", "--groups", "2"]


def few(size: int | None = 8) -> ImageData:
    """Digits with few training images, for speed."""
    data = digits(size or 8)
    small = Split(data.train.images[:160], data.train.labels[:160])
    return dataclasses.replace(data, train=small)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The networks are too small to share."""
    torch.set_num_threads(1)


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "load_data", lambda name, size: few(size))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after `learn`, not to be written to."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "load_data", lambda name, size: few(size))
        torch.set_num_threads(1)
        assert cli.main(["learn", "--run", str(folder), *LEARN]) == 0
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, to))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """Ctrl-C once, when `stage` has done `step` steps."""
    original = cli._Bars.step
    fired: list[int] = []

    def stepping(self: object, name: str, done: int, total: int, note: str) -> None:
        original(self, name, done, total, note)  # type: ignore[arg-type]
        if name == stage and done == step and not fired:
            fired.append(done)
            raise KeyboardInterrupt

    monkeypatch.setattr(cli._Bars, "step", stepping)


# ---- help and bad input ----


def test_help_lists_the_commands() -> None:
    from typer.testing import CliRunner

    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "learn", "prune", "finetune", "oneshot", "pack", "show", "bench"):
        assert command in result.output
        assert CliRunner().invoke(cli.app, [command, "--help"]).exit_code == 0


BAD = {
    "depth": (["learn", "--run", "{new}", "--depth", "21"], "depth: expected one of [20, 32, 44, 56, 110]"),
    "data": (
        ["learn", "--run", "{new}", "--data", "mnist"],
        "data: expected one of ['digits', 'cifar10', 'fashion-mnist', 'imagenet']",
    ),
    "size": (["learn", "--run", "{new}", "--size", "4"], "size: expected 8 to 512"),
    "seed": (["learn", "--run", "{new}", "--seed", "-1"], "seed: expected 0"),
    "groups": (["learn", "--run", "{new}", "--groups", "0"], "groups: expected at least 1"),
    "epochs": (["learn", "--run", "{new}", "--epochs", "0"], "epochs: expected at least 1"),
    "strength": (["learn", "--run", "{new}", "--strength", "nan"], "strength: expected at least 0"),
    "lr": (["learn", "--run", "{new}", "--lr", "0"], "lr: expected more than 0"),
    "batch": (["learn", "--run", "{new}", "--batch", "1"], "batch: expected at least 2"),
    "threads": (["learn", "--run", "{new}", "--threads", "0"], "threads: expected 1 to 1024"),
    "weights": (["learn", "--run", "{new}", "--weights", "{new}.safetensors"], "no such file"),
    "resume": (["learn", "--run", "{new}", "--resume"], "nothing to resume"),
    "a file": (["learn", "--run", "{file}"], "is not a folder"),
    "prune": (["prune", "--run", "{new}"], "no such run folder"),
    "finetune": (["finetune", "--run", "{new}"], "no such run folder"),
    "pack": (["pack", "--run", "{new}"], "no such run folder"),
    "show": (["show", "--run", "{new}"], "no such run folder"),
    "show nothing": (["show"], "expected either --run FOLDER or a FILE"),
    "show both": (["show", "{file}", "--run", "{new}"], "expected either --run FOLDER or a FILE"),
    "show text": (["show", "{file}"], "not a readable safetensors file"),
    "bench": (["bench", "--run", "{new}"], "no such run folder"),
    "bench seconds": (["bench", "--run", "{new}", "--seconds", "0"], "seconds: expected more than 0"),
    "oneshot": (["oneshot", "{new}", "--flops", "0.5"], "data: expected --data for a file of weights"),
    "oneshot no target": (["oneshot", "{file}", "--data", "digits"], "expected exactly one of --flops"),
    "oneshot file": (
        ["oneshot", "{file}", "--data", "digits", "--flops", "0.5"],
        "not a readable safetensors",
    ),
    "oneshot data": (
        ["oneshot", "{file}", "--data", "mnist", "--flops", "0.5"],
        "data: expected digits, SET:DIR",
    ),
    "oneshot set": (["oneshot", "{file}", "--data", "mnist:x", "--flops", "0.5"], "data: expected one of"),
    "oneshot npy": (["oneshot", "{file}", "--data", "{file}.npy", "--flops", "0.5"], "no such file"),
    "oneshot images": (
        ["oneshot", "{file}", "--data", "digits", "--flops", "0.5", "--images", "0"],
        "images: expected at least 1",
    ),
    "demo seeds": (["demo", "--out", "{new}", "--seeds", "0"], "seeds: expected 1 to 1000"),
    "demo flops": (["demo", "--out", "{new}", "--flops", "1.5"], "flops: expected the fraction"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, text = BAD[case]
    (tmp_path / "file").write_text("not what you want")
    names = {"new": str(tmp_path / "new"), "file": str(tmp_path / "file")}
    assert cli.main([argument.format(**names) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dsprune: ") and error.count("\n") == 1
    assert text in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["learn"],
        ["frobnicate"],
        ["learn", "--run", "x", "--depth", "many"],
        ["learn", "--run", "x", "--arch", "vgg"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsprune: ") and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["recipe"]])
def test_nothing_asked_for_shows_the_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert cli.main([*arguments, "--help"]) == 0
    assert shown.strip() == capsys.readouterr().out.strip() and shown.count("\n") > 8
    assert shown.startswith(" ".join(["Usage: dsprune", *arguments, "[OPTIONS]"]))


def test_stages_ask_for_the_one_before(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(learned, tmp_path / "run")
    for command in ("finetune", "pack"):
        assert cli.main([command, "--run", str(run)]) == 1
        assert "has no pruned network yet; run 'dsprune prune' first" in capsys.readouterr().err
    (run / "learned.safetensors").unlink()
    assert cli.main(["prune", "--run", str(run)]) == 1
    assert "run 'dsprune learn' first" in capsys.readouterr().err


def test_a_run_is_not_overwritten_by_accident(learned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in learned.iterdir() if path.is_file()}
    assert cli.main(["learn", "--run", str(learned), *LEARN]) == 1
    assert "--resume to go on with it or --force" in capsys.readouterr().err
    assert cli.main(["learn", "--run", str(learned), "--resume", "--strength", "9", "--seed", "4"]) == 1
    assert "was begun with another seed, learn.strength" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in learned.iterdir() if path.is_file()} == before


def test_damaged_files_are_named(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of(learned, tmp_path / "run")
    path = run / "learned.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert cli.main(["prune", "--run", str(run)]) == 1
    assert "learned.safetensors: not a readable safetensors file" in capsys.readouterr().err
    save_file({"a": torch.zeros(1)}, path)
    assert cli.main(["prune", "--run", str(run)]) == 1
    assert "not a dsprune checkpoint" in capsys.readouterr().err
    config = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**config, "format": 99}))
    assert cli.main(["prune", "--run", str(run)]) == 1
    assert "run format 99, expected 1" in capsys.readouterr().err
    (run / "run.json").write_text("{")
    assert cli.main(["prune", "--run", str(run)]) == 1
    assert "not readable as JSON" in capsys.readouterr().err
    assert not (run / "pruned.safetensors").exists()


def test_target_out_of_reach(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of(learned, tmp_path / "run")
    assert cli.main(["prune", "--run", str(run), "--flops", "0.9999"]) == 1
    assert capsys.readouterr().err.startswith("dsprune: flops")
    assert cli.main(["prune", "--run", str(run), "--flops", "0.5", "--params", "0.5"]) == 1
    assert "exactly one target" in capsys.readouterr().err


# ---- the stages ----


def test_from_learning_to_a_packed_network(
    learned: Path, tmp_path: Path, small_data: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(learned, tmp_path / "run")
    folder = ["--run", str(run)]
    assert cli.main(["prune", *folder, "--flops", "0.5"]) == 0
    assert "whole network" in capsys.readouterr().out
    assert cli.main(["finetune", *folder, "--cycles", "2", "--epochs", "1", "--batch", "64"]) == 0
    assert "validation accuracy" in capsys.readouterr().out
    assert cli.main(["pack", *folder]) == 0
    difference = float(capsys.readouterr().out.rsplit(" ", 1)[1])
    assert difference < 1e-4

    here = runs.Run.open(run)
    data = few()
    masked, _, meta = here.read("finetuned", data)
    packed = here.packed(data)
    logits = [training.evaluate(model, data.test).logits for model in (masked, packed)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4
    assert dsprune.summary(packed, data.example).flops_cut() >= 0.5
    # Finetuning has held the masks, and moved what they leave.
    pruned, _, _ = here.read("pruned", data)
    for name, module in pruned.named_modules():
        if hasattr(module, "weight_mask"):
            tuned = masked.get_submodule(name)
            assert torch.equal(tuned.weight_mask, module.weight_mask)
            assert not torch.equal(tuned.weight, module.weight)
    cycles = [entry for entry in meta["history"] if "cycle" in entry]
    assert [entry["cycle"] for entry in cycles] == [1, 2]
    best = [entry for entry in cycles if entry.get("best")]
    assert len(best) == 1
    assert best[0]["validation_accuracy"] == max(entry["validation_accuracy"] for entry in cycles)
    assert training.evaluate(masked, data.validation).accuracy == best[0]["validation_accuracy"]

    for stage in ("learned", "pruned", "packed"):
        assert cli.main(["show", *folder, "--stage", stage, "--picture", str(tmp_path / f"{stage}.png")]) == 0
        said = capsys.readouterr().out
        assert "prunable convolutions" in said
        assert ("no picture" in said) == (stage == "learned")
        assert (tmp_path / f"{stage}.png").exists() == (stage != "learned")
    shown = [
        "show", str(run / "packed.safetensors"), "--size", "8", "--picture", str(tmp_path / "file.png")
    ]  # fmt: skip
    assert cli.main(shown) == 0
    assert (tmp_path / "file.png").read_bytes() != b""
    assert cli.main(["bench", *folder, "--batch", "1", "--batch", "4", "--seconds", "0.02"]) == 0
    said = capsys.readouterr().out
    assert "eager" in said and "packed" in said
    assert cli.main(["show", *folder, "--picture", str(tmp_path / "a.doc")]) == 1
    assert "picture: expected a name ending in" in capsys.readouterr().err

    # Pruning again drops what followed from the old structure.
    assert cli.main(["prune", *folder, "--params", "0.4", "--count", "prunable"]) == 0
    assert here.latest() == "pruned"
    assert runs.Run.open(run).config.prune == training.Prune(flops=None, params=0.4, count="prunable")


def test_learning_from_given_weights(
    learned: Path, tmp_path: Path, small_data: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = few()
    dense = runs.Run.open(learned).read("dense", data)[0].state_dict()
    plain = tmp_path / "plain.safetensors"
    save_file(dense, plain)
    folder = tmp_path / "run"
    assert cli.main(["learn", "--run", str(folder), *LEARN, "--weights", str(plain)]) == 0
    run = runs.Run.open(folder)
    assert all(torch.equal(v, dense[n]) for n, v in run.read("dense", data)[0].state_dict().items())
    # The same weights, settings and seed: the same learning as after training them here.
    assert load_bits(run.file("learned")) == load_bits(learned / "learned.safetensors")
    # One of our own files is as good.
    own = stages.read_weights(learned / "dense.safetensors")
    assert own.keys() == dense.keys() and all(torch.equal(v, dense[n]) for n, v in own.items())
    capsys.readouterr()
    wrong = ["learn", "--run", str(tmp_path / "b"), *LEARN, "--depth", "32", "--weights", str(plain)]
    assert cli.main(wrong) == 1
    assert "plain.safetensors: does not fit the network: lacks" in capsys.readouterr().err


def test_one_shot_from_a_run_and_from_a_file(
    learned: Path, small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(learned, tmp_path / "run")
    common = ["--flops", "0.3", "--images", "100", "--groups", "2"]
    assert cli.main(["oneshot", str(run), *common]) == 0
    said = capsys.readouterr().out
    scores = [line for line in said.splitlines() if "validation accuracy" in line]
    assert [line.split(":")[0] for line in scores] == ["dense", "cut", "reconstructed", "packed"]
    assert scores[2].split()[-1] == scores[3].split()[-1] and "100 images, took" in said
    # The same from a file of weights and an array of the same images: the same bits.
    dense = runs.Run.open(run).file("dense")
    data = few()
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:100].sort().values
    np.save(tmp_path / "x.npy", data.train.images[order].numpy())  # type: ignore
    out = tmp_path / "more" / "small.safetensors"
    arguments = ["oneshot", str(dense), "--data", str(tmp_path / "x.npy"), *common, "--out", str(out)]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "dense: same answer as dense 100.00%, relative error 0.000" in said
    assert load_bits(out) == load_bits(run / "oneshot.safetensors")
    capsys.readouterr()
    assert cli.main([*arguments[:1], str(out), *arguments[2:]]) == 1
    assert "is packed already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (np.zeros((2, 3)), "expected images \\(N, C, H, W\\), got shape \\(2, 3\\)"),
        (np.zeros((0, 1, 4, 4)), "expected images"),
        (np.full((1, 1, 4, 4), np.nan), "expected finite numbers"),
        (np.zeros((1, 1, 4, 4), np.complex64), "expected numbers, got complex64"),
        (np.array([[[[{}]]]], object), "not a readable .npy file"),
    ],
)
def test_arrays_that_are_no_inputs(content: np.ndarray, text: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=text) as error:
        read_data(str(tmp_path / "x.npy"))
    assert str(tmp_path / "x.npy") in str(error.value)


def test_an_array_that_is_cut_off(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 1, 8, 8), np.float32))
    whole = (tmp_path / "x.npy").read_bytes()
    for size in (0, 5, 60, len(whole) - 1):
        (tmp_path / "x.npy").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a readable"):
            read_data(str(tmp_path / "x.npy"))


def test_show_the_authors_networks(
    authors_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = authors_data / "resnet20_g4.safetensors"
    assert cli.main(["show", str(path), "--picture", str(tmp_path / "a.png")]) == 0
    assert "63.57" in capsys.readouterr().out
    assert (tmp_path / "a.png").exists()
    assert cli.main(["show", str(path), "--arch", "resnet18", "--picture", str(tmp_path / "b.png")]) == 1
    assert "not the weights of a resnet18" in capsys.readouterr().err
    assert cli.main(["show", str(path), "--depth", "56", "--picture", str(tmp_path / "b.png")]) == 1
    assert "does not fit the network" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


# ---- interruption ----


def load_bits(path: Path) -> dict[str, bytes]:
    return {name: value.contiguous().numpy().tobytes() for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in [("pretrain", 4), ("learn", 2)]),
        ("learn", 5),
    ],
)
def test_interrupted_learning_resumes_to_the_same_bits(
    learned: Path, tmp_path: Path, small_data: None, monkeypatch: pytest.MonkeyPatch, stage: str, step: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    interrupt_at(monkeypatch, stage, step)
    assert cli.main(["learn", "--run", str(run), *LEARN]) == cli.INTERRUPTED
    assert "--resume goes on" in capsys.readouterr().err
    assert (run / "checkpoints" / f"{stage}.safetensors").exists()
    assert not (run / "learned.safetensors").exists()
    torch.rand(7)  # whatever else the process draws does not matter
    assert cli.main(["learn", "--run", str(run), "--resume"]) == 0
    for name in ("dense", "learned"):
        assert load_bits(run / f"{name}.safetensors") == load_bits(learned / f"{name}.safetensors")
    assert not list(run.glob("checkpoints/*"))


def test_interrupted_finetuning_resumes_to_the_same_bits(
    learned: Path, tmp_path: Path, small_data: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = copy_of(learned, tmp_path / "a")
    assert cli.main(["prune", "--run", str(first), "--flops", "0.4"]) == 0
    second = copy_of(first, tmp_path / "b")
    settings = ["--cycles", "2", "--epochs", "2", "--batch", "64"]
    assert cli.main(["finetune", "--run", str(first), *settings]) == 0
    interrupt_at(monkeypatch, "finetune", 8)  # in the second cycle, which the first cycle's best outlives
    assert cli.main(["finetune", "--run", str(second), *settings]) == cli.INTERRUPTED
    assert cli.main(["finetune", "--run", str(second), "--resume", "--lr", "0.3"]) == 1
    assert cli.main(["finetune", "--run", str(second), "--resume"]) == 0
    assert load_bits(first / "finetuned.safetensors") == load_bits(second / "finetuned.safetensors")
    # Without --resume it starts over, to the same end.
    assert cli.main(["finetune", "--run", str(second)]) == 0
    assert load_bits(first / "finetuned.safetensors") == load_bits(second / "finetuned.safetensors")


@pytest.mark.parametrize("where", ["before its settings are stored", "before its first checkpoint"])
def test_finetuning_cut_off_early_goes_on_with_what_was_asked(
    learned: Path, tmp_path: Path, small_data: None, monkeypatch: pytest.MonkeyPatch, where: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    run = copy_of(learned, tmp_path / "run")
    assert cli.main(["prune", "--run", str(run), "--flops", "0.4"]) == 0
    old, new = (["--cycles", "1", "--epochs", n, "--batch", "64"] for n in "12")
    command = ["finetune", "--run", str(run)]
    assert cli.main([*command, *old]) == 0
    with monkeypatch.context() as patched:
        if where == "before its settings are stored":
            patched.setattr(runs.Run, "reconfigure", stop)
        else:
            patched.setattr(training, "finetune", stop)
        assert cli.main([*command, *new]) == cli.INTERRUPTED
    assert not (run / "finetuned.safetensors").exists()  # of the old settings
    capsys.readouterr()
    assert cli.main([*command, "--resume"]) == 1
    assert "has no finetune to resume" in capsys.readouterr().err
    assert cli.main([*command, "--resume", *new]) == 0
    assert len(read_checkpoint(run / "finetuned.safetensors")[1]["history"]) == 2
    assert cli.main([*command, "--resume", *old]) == 1


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_ctrl_c_of_a_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    base = ["learn", "--size", "8", "--batch", "512", "--threads", "1"]
    base += ["--pretrain-epochs", "3", "--epochs", "1", "--groups", "2"]

    command = [sys.executable, "-m", "dsprune.cli", *base, "--run", str(tmp_path / "stopped")]
    # A child inherits an ignored Ctrl-C, as in the background of a shell, but not a handled one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stopped = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    saved = tmp_path / "stopped" / "checkpoints" / "pretrain.safetensors"
    end = time.monotonic() + 1200
    while not (saved.exists() and read_checkpoint(saved)[1]["epoch"] >= 1) and time.monotonic() < end:
        assert stopped.poll() is None
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    _, error = stopped.communicate(timeout=1200)
    assert stopped.returncode == cli.INTERRUPTED
    assert "--resume goes on" in error and "Traceback" not in error
    assert not (tmp_path / "stopped" / "learned.safetensors").exists()
    assert not list((tmp_path / "stopped").rglob("*.tmp"))

    assert cli.main([*base, "--run", str(tmp_path / "stopped"), "--resume"]) == 0
    assert cli.main([*base, "--run", str(tmp_path / "whole")]) == 0
    for name in ("dense", "learned"):
        file = f"{name}.safetensors"
        assert load_bits(tmp_path / "stopped" / file) == load_bits(tmp_path / "whole" / file)


# ---- checkpoints and data ----


def test_nothing_is_pickled(learned: Path) -> None:
    for path in learned.rglob("*"):
        if path.is_file():
            assert path.suffix in (".safetensors", ".json", ".png")
    with safe_open(learned / "learned.safetensors", "pt") as file:
        assert json.loads(file.metadata()["dsprune"])["stage"] == "learned"


@pytest.mark.parametrize("fail", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str
) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, {"x": torch.ones(2)}, {"n": 1})

    def broken(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, fail, broken)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(path, {"x": torch.zeros(2)}, {"n": 2})
    monkeypatch.undo()
    tensors, meta = read_checkpoint(path)
    assert meta["n"] == 1 and torch.equal(tensors["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_checkpoint_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1)}, path, metadata={"dsprune": json.dumps({"format": 7})})
    with pytest.raises(CheckpointError, match="format 7; this package reads format 2"):
        read_checkpoint(path)
    save_file({"x": torch.ones(1)}, path, metadata={"dsprune": "{"})
    with pytest.raises(CheckpointError, match="broken header"):
        read_checkpoint(path)


def test_shared_memory_is_written_out(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    write_checkpoint(tmp_path / "a", {"all": tensor, "same": tensor, "row": tensor.view(2, 3)[0]}, {})
    tensors, _ = read_checkpoint(tmp_path / "a")
    assert torch.equal(tensors["all"], tensor) and torch.equal(tensors["same"], tensor)
    assert torch.equal(tensors["row"], tensor[:3])


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_optimizers_come_back(tmp_path: Path, kind: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.LazyLinear(2))
        model(torch.zeros(1, 1, 5, 5))
        parameters = list(model.parameters())
        groups = [{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.02}]
        if kind == "sgd":
            return model, torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        return model, (torch.optim.Adam if kind == "adam" else torch.optim.AdamW)(groups, betas=(0.8, 0.95))

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.ones(2, 1, 5, 5)).square().sum().backward()
            optimizer.step()

    model, optimizer = make()
    steps(model, optimizer, 2)
    tensors, meta = checkpoint.flatten_optimizer(optimizer, "o.")
    write_checkpoint(
        tmp_path / "a", {**tensors, **{f"m.{k}": v for k, v in model.state_dict().items()}}, meta
    )
    again, other = make()
    tensors, meta = read_checkpoint(tmp_path / "a")
    again.load_state_dict(training.part_of(tensors, "m."))
    state = checkpoint.join_optimizer(training.part_of(tensors, "o."), meta)
    checkpoint.restore(tmp_path / "a", [(other, state)], [])
    # Two optimizers share nothing.
    steps(model, optimizer, 2)
    steps(again, other, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert other.param_groups[1]["lr"] == 0.02
    if kind != "sgd":
        assert other.param_groups[0]["betas"] == (0.8, 0.95)


def test_optimizer_of_another_model() -> None:
    first = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0, momentum=0.9)
    tensors, meta = checkpoint.flatten_optimizer(first, "o.")
    second = torch.optim.SGD(nn.Linear(2, 2, bias=False).parameters(), lr=1.0, momentum=0.9)
    with pytest.raises(CheckpointError, match="does not fit"):
        state = checkpoint.join_optimizer(training.part_of(tensors, "o."), meta)
        checkpoint.restore(Path("a"), [(second, state)], [])


def test_splits_are_disjoint_stratified_and_fixed() -> None:
    data = digits(8)
    parts = (data.train, data.validation, data.test)
    assert sum(map(len, parts)) == 1797
    rows = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert not rows[0] & rows[2] and not rows[1] & rows[2] and not rows[0] & rows[1]
    total = sum(part.labels.bincount(minlength=10) for part in parts)
    for part, share in ((data.test, 0.2), (data.validation, 0.1)):
        assert (part.labels.bincount(minlength=10) - share * total).abs().max() <= 0.5
    again = digits(8)
    assert torch.equal(again.test.images, data.test.images)
    assert not torch.equal(digits(8, split_seed=1).test.labels, data.test.labels)
    assert abs(data.train.images.mean()) < 1e-5 and abs(data.train.images.std() - 1) < 1e-3
    assert digits(16).test.images.shape == (len(data.test), 1, 16, 16)
    assert torch.equal(digits(16).test.labels, data.test.labels)


@pytest.mark.parametrize(("size", "error"), [(7, ValueError), (16.0, TypeError), (True, TypeError)])
def test_bad_sizes(size: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="size"):
        digits(size)  # type: ignore[arg-type]


def test_unknown_data() -> None:
    with pytest.raises(ValueError, match="data: expected one of"):
        load_data("cifar")


def test_shifts_are_translations() -> None:
    images = torch.randn(40, 2, 6, 6)
    moved = shifted(images, 2, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    seen = set()
    for before, after in zip(padded, moved, strict=True):
        matches = [
            (y, x) for y in range(5) for x in range(5) if torch.equal(before[:, y : y + 6, x : x + 6], after)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 10
    assert shifted(images, 0, torch.Generator()) is images


@pytest.mark.parametrize(("images", "batch"), [(10, 4), (9, 4), (8, 4), (3, 64), (1, 4)])
def test_batches(images: int, batch: int) -> None:
    split = Split(torch.arange(float(images)).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.arange(images))
    found = list(batches(split, batch, 1, torch.Generator().manual_seed(0)))
    assert len(found) == batch_count(images, batch)
    assert all(2 <= len(labels) <= batch for _, labels in found)
    for x, y in found:
        assert torch.equal(x[:, 0, 4, 4], y.float())  # images and labels stay together
    seen = torch.cat([torch.zeros(0, dtype=torch.int64), *(labels for _, labels in found)])
    assert len(seen.unique()) == len(seen) >= images - 1


def test_cosine() -> None:
    values = [training.cosine(t, 10, 0.2) for t in range(10)]
    assert max(values) == values[2] == 1.0
    assert values[0] < values[1] < 1 and values[3:] == sorted(values[3:], reverse=True)
    assert 0 < values[-1] < 0.1
    assert [training.cosine(t, 4) for t in (0, 2, 4)] == pytest.approx([1, 0.5, 0])


def test_a_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    settings = training.Pretrain(epochs=3, lr=1e30, weight_decay=1.0)
    with pytest.raises(training.TrainingError, match=r"pretrain: the loss is .* after epoch"):
        training.pretrain(model, few(), settings)


def test_evaluation_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = few()
    score = training.evaluate(model, data.test, batch=100)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        right = (model(data.test.images).argmax(1) == data.test.labels).float().mean().item()
    assert score.accuracy == pytest.approx(100 * right) and score.logits.shape == (len(data.test), 10)


def test_layer_macs() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, groups=2))
    assert stages.layer_macs(model, torch.zeros(1, 2, 8, 8)) == {"0": 64 * 4 * 2 * 9, "1": 9 * 4 * 2 * 9}
