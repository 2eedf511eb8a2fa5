"""The benchmarks run, compare outputs and say what they measured; no time is judged here."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import baselines, bench_assignment, cases, device, environment, exports, networks
from dsprune import summary
from dsprune.clock import in_turns, medians
from dsprune.models import cifar_resnet
from dsprune.recipes import runtimes

ROOT = Path(__file__).resolve().parent.parent


@cache
def tiny_model() -> nn.Module:
    return cases.random_structure(lambda: cifar_resnet(20), (3, 8, 8), 0.6, 3)


def tiny_case() -> cases.Case:
    return cases.Case(
        "random-tiny",
        lambda: copy.deepcopy(tiny_model()),
        (3, 8, 8),
        (2,),
        4,
    )


@cache
def tiny_rows() -> list[dict[str, Any]]:
    return networks.run_case(tiny_case(), (1,), 0.01, False, None, lambda text: None, rounds=2)


def test_random_structure_meets_its_cut() -> None:
    model = tiny_case().make()
    assert 0.6 <= summary(model, torch.randn(1, 3, 8, 8)).flops_cut("prunable") < 0.63
    assert not any(name.endswith("_mask") for name in model.state_dict())


def test_a_network_is_compared_before_it_is_timed() -> None:
    (row,) = tiny_rows()
    assert row["outputs_agree"] and row["difference"] < 1e-4
    forms = {"eager", "channels_last", "TorchScript", "ONNX Runtime", "narrow ONNX Runtime", "packed"}
    assert set(row["times_ms"]) - {"OpenVINO", "narrow OpenVINO"} == forms
    first, second = row["rounds_ms"]
    assert row["clock"] == "cpu_median"
    for name, value in row["times_ms"].items():
        assert value == pytest.approx((first[name]["cpu_median"] + second[name]["cpu_median"]) / 2)
        assert first[name]["cpu_least"] <= first[name]["cpu_median"]
    assert "narrow" not in row["best_dense"] and row["best_narrow"].startswith("narrow ")
    assert row["over_narrow"] == row["times_ms"][row["best_narrow"]] / row["times_ms"]["packed"]
    assert row["speed_up"] == row["times_ms"][row["best_dense"]] / row["times_ms"]["packed"]


def test_a_narrow_network_has_the_multiply_adds_asked_for() -> None:
    x = torch.randn(1, 3, 16, 16)
    dense = cifar_resnet(20).eval()
    network, macs = baselines.narrow(dense, x, 1_000_000, 4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = network(x)
    assert y.shape == (1, 10) and bool(y.isfinite().all())
    assert counter.get_total_flops() // 2 == macs and abs(macs - 1_000_000) < 100_000
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.out_channels % 4 == 0 for m in convs) and convs[0].in_channels == 3
    with pytest.raises(ValueError, match="grouped"):
        baselines.narrow(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), torch.randn(1, 4, 8, 8), 10, 4)


def test_without_zeros_leaves_its_argument_alone() -> None:
    model = tiny_case().make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = baselines.without_zeros(model)
    assert all(bool((m.weight != 0).all()) for m in dense.modules() if isinstance(m, nn.Conv2d))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_times_are_taken_in_turns_on_both_clocks() -> None:
    order: list[str] = []
    calls = {"idle": lambda: (order.append("i"), time.sleep(0.002)), "busy": lambda: sum(range(20000))}
    times = in_turns(calls, seconds=0.01, least=3)
    idle = times["idle"]
    assert len(idle.wall) >= 3 and min(idle.wall) >= 2 and max(idle.thread) < min(idle.wall)
    busy = times["busy"].to_json()
    assert 0 < busy["cpu_least"] <= busy["cpu_median"] and busy["bursts"] >= 3
    for wrong in ({"seconds": 0}, {"least": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            in_turns(calls, **wrong)
    with pytest.raises(ValueError, match="calls"):
        in_turns({})


def test_a_runtime_that_computes_something_else_is_an_error() -> None:
    model, images = cifar_resnet(20).eval(), torch.randn(2, 3, 8, 8)
    file = runtimes.onnx_file(model, images[:1])
    calls, missing = runtimes.runtime_forms(model, images, threads=1, file=file)
    assert "ONNX Runtime" in calls and set(calls) | set(missing) == {"OpenVINO", "ONNX Runtime"}
    with pytest.raises(RuntimeError, match="differs from the eager network"):
        runtimes.runtime_forms(cifar_resnet(20).eval(), images, threads=1, file=file)


def test_training_step() -> None:
    (row,) = networks.run_training(tiny_case(), (1,), 0.01)
    assert set(row["times_ms"]) == {"masked", "masked channels_last", "packed"}


def test_table_and_plot(tmp_path: Path) -> None:
    rows = tiny_rows()
    results = {"inference": rows, "training": []}
    text = networks.table(results)
    assert f"{rows[0]['speed_up']:.2f}x" in text and "geometric mean" in text
    networks.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_geometric_mean() -> None:
    assert networks.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_ceilings_on_the_cpu() -> None:
    found = device.ceilings(torch.device("cpu"), 1 << 18, 64)
    cache = found.pop("cache_copy_gb_s")
    assert cache is None or cache > 0
    assert set(found) == {"copy_gb_s", "matmul_tflop_s_float32", "matmul_tflop_s_bfloat16"}
    assert all(value > 0 for value in found.values())


def test_cache_bandwidth_leaves_launches_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of 3 us, and 5 TB/s: the difference of two sizes tells the second alone."""
    monkeypatch.setattr(device, "_copies", lambda count, n, _: (count, n))
    monkeypatch.setattr(device, "seconds_of", lambda call, _: call[0] * (3e-6 + 8 * call[1] / 5e12))
    assert device.cache_bandwidth(torch.device("cpu"), 1 << 20) == pytest.approx(5000)
    monkeypatch.setattr(device, "seconds_of", lambda call, _: call[0] * 3e-6)
    assert device.cache_bandwidth(torch.device("cpu"), 1 << 20) is None


def test_command_refuses_a_missing_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--out", str(tmp_path)]
    bad = subprocess.run([*command, "--checkpoints", "/nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and "--checkpoints" in bad.stderr


def test_calls_take_turns_in_bursts() -> None:
    order: list[str] = []
    times = medians(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},  # type: ignore[dict-item, return-value]
        seconds=0.01,
    )
    assert set(times) == {"a", "b"} and all(t > 0 for t in times.values())
    assert "ab" in "".join(order) and "ba" in "".join(order)
    with pytest.raises(ValueError, match="seconds: expected more than 0"):
        medians({}, seconds=0)


@pytest.mark.parametrize(
    "suite", ["test_layers.py", pytest.param("test_networks.py", marks=pytest.mark.nightly)]
)
def test_benchmark_suites_run(suite: str) -> None:
    """Each form of one layer and one network, called once: outputs are compared, nothing is timed."""
    chosen = (
        "strided and not 32" if suite == "test_layers.py" else "70 and not 32 and not 128 and not training"
    )
    options = ["--benchmark-disable", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"bench/{suite}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_assignment_results_are_added_to(tmp_path: Path) -> None:
    for part in (["--bytes", "--groups", "2"], ["--memory", "--groups", "3", "--batch", "2"]):
        bench_assignment.main(["--networks", "resnet20", "--out", str(tmp_path), *part])
    found = json.loads((tmp_path / "assignment.json").read_text())
    assert set(found["environment"]) == {"bytes", "memory"}
    (moved,), (memory,) = found["bytes"], found["memory"]
    assert all(1 <= m["bytes"] / m["floor_bytes"] < 2 for m in moved["moved"].values())
    assert 1 <= (memory["held"] + max(0, memory["peak"])) / memory["weights"] <= 1.25
    assert (tmp_path / "assignment.md").read_text().count("| resnet20 |") == 1 + len(moved["moved"])


@pytest.mark.nightly
def test_exports_are_compared_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    torch.manual_seed(0)
    case = cases.Case("tiny", lambda: nets.structured_zeros(nets.Plain(), 0).eval(), (3, 8, 8), (1, 3))
    monkeypatch.setattr(exports, "cases", lambda checkpoints, suite: [case])
    results = exports.run(tmp_path, checkpoints=None, suite="authors", only="", seconds=0.01, threads=[1])
    assert json.loads((tmp_path / "exports.json").read_text())["rows"] == results["rows"]
    forms = {"packed", "onnx dense", "onnx packed, dense", "onnx packed, groups"}
    for row, batch in zip(results["rows"], (1, 3), strict=True):
        assert (row["batch"], row["threads"], set(row["times_ms"])) == (batch, 1, forms)
        assert set(row["differences"]) == set(row["bytes"]) == forms - {"packed"}
        assert row["speed_up_onnx"] == row["times_ms"]["onnx dense"] / row["times_ms"][row["best_form"]]
    text = (tmp_path / "exports.md").read_text()
    assert text.count("| tiny |") == 2 and "ONNX Runtime" in text
    monkeypatch.setattr(exports, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="tiny: onnx dense differs by"):
        exports.run_case(case, [1], 0.01)


def test_the_environment_names_the_commit() -> None:
    found = environment.environment()
    assert (found["commit"] is None) == (not (ROOT / ".git").exists())
    assert found["date"].endswith("+00:00")
