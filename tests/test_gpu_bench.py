"""The steps of the device run that need torch, on the CPU with tiny networks; no time is judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dsprune
from bench import device_run, device_steps
from bench import gpu as bench
from dsp_kernels import GroupLayout, backends, cost
from dsprune.models import cifar_resnet, resnet18
from dsprune.models.resnet import Bottleneck
from dsprune.nn import PermutedGroupedConv2d

TIMED = {"eager, graph", *bench.PACKED, "channel-pruned, graph"}
STEPS = ("ceilings", "structure", "networks", "autotune", "layers", "again")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict]]:
    """The steps in their order, each as its own phase would run it; what they found."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out, scratch = tmp_path_factory.mktemp("bench"), tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(device_run.SCRATCH, str(scratch))
        patch.setenv(device_run.RESULTS, str(out / "results.jsonl"))
        patch.setenv(dsprune.gpu.FORMS_ENVIRONMENT, "")  # step "again" sets it, for its own process
        for name in STEPS:
            assert device_steps.main([name, "--out", str(out), "--quick"]) == 0
    torch.set_num_threads(threads)
    yield out, json.loads((scratch / "results.json").read_text())


def test_networks(results: tuple[Path, dict]) -> None:
    out, found = results
    first, again = found["networks"]
    # The compiled network came later, into the row that stood; the other rows of lines are as they were.
    assert set(first["times_ms"]) == TIMED | {"max-autotune"} and not first["failed"]
    assert set(again["times_ms"]) == {"eager, graph", *bench.PACKED, "max-autotune"}
    assert again["times_ms"]["max-autotune"] == first["times_ms"]["max-autotune"]
    assert set(first["differences"]) == {"eager, graph", *bench.PACKED, "max-autotune"}
    assert all(value < 1e-4 for value in first["differences"].values())
    assert first["forms"]["chain"] == 2 and first["predicted_ms"] > 0
    assert first["speed_up"] == first["times_ms"][first["best_dense"]] / first["times_ms"]["packed"]
    assert first["share_of_floor"] == first["floor_ms"] / first["times_ms"]["packed"]
    assert not first["measured_forms"] and again["measured_forms"]
    rows = [line["row"] for line in device_run.lines(out / "results.jsonl") if line["kind"] == "network"]
    assert set(rows[0]["times_ms"]) == TIMED and rows[1:] == [first, again]
    layers = [line["row"] for line in device_run.lines(out / "results.jsonl") if line["kind"] == "layer"]
    assert layers == found["layers"]


def test_layers_and_the_table_that_packing_reads(results: tuple[Path, dict]) -> None:
    out, found = results
    table = cost.FormTable.load(out / "forms.json")
    chains = [row for row in found["layers"] if " + " in row["layer"]]
    single = [row for row in found["layers"] if " + " not in row["layer"]]
    assert len(chains) == 2 and len(single) == 10
    assert found["layers"][:10] == single, "chains need the times of their layers"
    for row in single:
        assert set(row["times_ms"]) == {"grouped", "merged", "torch", "multi-branch"}
        # On the CPU the CUDA kernels are told not to run, and packing does not take them.
        assert row["failed"] == {"cuda": backends.can_run("cuda", "cpu", torch.float32)}
        kept = table.find("sm_90", row["convolution"])
        assert kept == pytest.approx({f: 1e3 * row["times_ms"][f] for f in ("grouped", "merged", "torch")})
        assert set(row["predicted_ms"]) == set(cost.FORMS) and min(row["predicted_ms"].values()) > 0
        assert row["floor_ms"] > 0
    for row in chains:
        assert set(table.find("sm_90", row["convolution"])) == {"chain", "layers"}
        assert row["speed_up"] == row["times_ms"]["best of each layer"] / row["times_ms"]["chain"]


def test_the_cuda_form_is_timed_where_it_runs_and_compared_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the device: the form is in the table of measurements, unless it is wrong."""
    torch.manual_seed(0)
    packed = dsprune.pack(bench.tiny().eval(), torch.randn(1, 3, 8, 8))
    lines: dict = {"networks": [], "layers": [], "left_out": []}
    table = cost.FormTable()
    mine = bench.Bench(torch.device("cpu"), cost.device("H200"), bench.Deadline(60), 0.01, True, lines, table)
    cell = bench.Cell("tiny", 0, 1, torch.float32)
    mine.packed[("tiny", 0, torch.float32)] = (packed, 1, 1)
    monkeypatch.setattr(backends, "can_run", lambda *_: None)
    real = bench.gpu._relayered

    def stand_in(layer: Any, layout: Any, weight: Any, backend: str | None = None) -> Any:
        out = real(layer, layout, weight, "reference" if backend == "cuda" else backend)
        if backend == "cuda" and layer.kernel_size == (3, 3):
            out.weight.data = out.weight.data + 1.0
        return out

    monkeypatch.setattr(bench.gpu, "_relayered", stand_in)
    rows = [r for r in bench.layer_rows(mine, cell, packed, 8) if " + " not in r["layer"]]
    assert {"cuda" in row["times_ms"] for row in rows} == {True, False}
    for row in rows:
        measured = table.find("sm_90", row["convolution"])
        wrong = " k3x3 " in row["convolution"]
        assert ("cuda" in measured) != wrong and {"grouped", "merged", "torch"} <= set(measured)
        assert ("outputs differ" in row["failed"].get("cuda", "")) == wrong


def test_the_page(results: tuple[Path, dict]) -> None:
    out, found = results
    text = (out / "networks.md").read_text()
    row = found["networks"][0]
    assert f"| {row['speed_up']:.2f}x |" in text and "tiny, 40%, forms measured" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {13, 12}
    assert found["environment"]["torch"] == torch.__version__


def test_what_fails_and_what_is_left_out_is_told(
    tmp_path: Path, results: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = bench.Cell("tiny", 40, 1, torch.float32)
    model = bench.tiny().eval()
    lines: dict = {"environment": results[1]["environment"], "networks": [], "layers": [], "left_out": []}
    mine = bench.Bench(
        torch.device("cpu"), cost.device("H200"), bench.Deadline(60), 0.01, True, lines, cost.FormTable()
    )
    simple = ("eager", "eager, graph", *bench.PACKED, "multi-branch, graph")

    def wrong(network: object) -> object:
        return lambda x: model(x) + 1

    def broken(self: object, call: object, x: object) -> object:
        raise RuntimeError("out of memory\nin a graph")

    monkeypatch.setattr(bench, "branches", wrong)
    row = bench.network_row(mine, cell, model, 8, forms=simple)
    assert row["failed"] == {"multi-branch, graph": "outputs differ by 1"}
    assert "multi-branch, graph" not in row["times_ms"]
    monkeypatch.setattr(bench.HostCapturer, "capture", broken)
    row = bench.network_row(mine, cell, model, 8, forms=simple)
    assert row["failed"]["eager, graph"] == "RuntimeError: out of memory"
    assert "no graph could be made: out of memory" in row["failed"]["packed"] and row["speed_up"] is None
    lines["networks"].append(row)
    lines["left_out"].append({"what": "resnet50", "why": "no time left"})
    text = bench.markdown(lines)
    assert "- tiny, 40%, batch 1, eager, graph: RuntimeError: out of memory" in text
    assert "- resnet50: no time left" in text


def test_multi_branch_form() -> None:
    torch.manual_seed(0)
    layout = GroupLayout(6, 8, [([0, 2, 3], [5, 0, 1]), ([1, 2, 4, 5], [7, 2])])
    for activation in (None, "relu", "relu6"):
        layer = PermutedGroupedConv2d(layout, 3, stride=2, padding=1, activation=activation)
        torch.nn.init.normal_(layer.bias)
        layer.requires_grad_(False)
        x, residual = torch.randn(2, 6, 9, 7), torch.randn(2, 8, 5, 4)
        apart = bench.Branches(layer)
        torch.testing.assert_close(apart(x), layer(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(apart(x, residual), layer(x, residual), rtol=1e-5, atol=1e-5)


def test_channel_pruned_network_has_the_cost() -> None:
    for make in (resnet18, lambda: cifar_resnet(20)):
        full = bench._macs(make(), (1, 3, 32, 32))
        narrow = bench.channel_pruned(make, 32, full // 2)
        assert full // 2 <= bench._macs(narrow, (1, 3, 32, 32)) < 0.75 * full
    # Bottlenecks: both inner convolutions.
    block = bench.narrowed(bench.tiny, 0.25)
    assert bench._macs(block, (1, 3, 8, 8)) == bench._macs(bench.tiny(), (1, 3, 8, 8)), "eight is the least"
    wide = bench.narrowed(lambda: torch.nn.Sequential(Bottleneck(64, 64, 1)), 0.5)
    assert wide[0].conv1.out_channels == wide[0].conv2.out_channels == wide[0].conv3.in_channels == 32  # type: ignore
    assert wide(torch.randn(1, 64, 4, 4)).shape == (1, 256, 4, 4)


def test_rows_come_in_order_of_importance() -> None:
    wanted = bench.cells()
    assert wanted[0] == bench.Cell("resnet50", 72, 256, torch.bfloat16)
    assert len(wanted) == len(set(wanted))
    for network in ("resnet18", "resnet50"):
        for cut in (50, 70, 72, 90):
            for batch in (1, 32, 256):
                for dtype in (torch.bfloat16, torch.float16):
                    assert bench.Cell(network, cut, batch, dtype) in wanted


def test_measured_ceilings_take_the_place_of_published_ones() -> None:
    found = {"copy_gb_s": 4000.0, "matmul_tflop_s_bfloat16": 700.0, "matmul_tflop_s_float32": 50.0}
    where = bench.with_ceilings(cost.device("H200"), found)
    assert where.bytes_per_second() == 4e12
    assert where.flops_per_second(torch.bfloat16) == 7e14 and where.flops_per_second(torch.float32) == 5e13


def test_steps_say_what_they_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device_run.SCRATCH, str(tmp_path))
    with pytest.raises(SystemExit, match="the phase 'structure' left no network"):
        device_steps.main(["networks", "--out", str(tmp_path), "--quick"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no CUDA device"):
            device_steps.main(["ceilings", "--out", str(tmp_path)])


def test_corners_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert device_steps.main(["corners", "--out", str(tmp_path), "--quick"]) == 0
    assert capsys.readouterr().out.count('"kind": "corner"') == 6
    real = device_steps.permuted_grouped_conv2d

    def wrong(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return real(x, *args, **kwargs) * (1.1 if x.dtype == torch.float32 else 1.0)

    monkeypatch.setattr(device_steps, "permuted_grouped_conv2d", wrong)
    with pytest.raises(SystemExit, match=r"float32, 3x3, stride 1: off by 0\.1"):
        device_steps.main(["corners", "--out", str(tmp_path), "--quick"])


def test_prediction_of_whole_blocks() -> None:
    """One kernel a block reads the stream once: by hand for a block with an identity shortcut."""
    torch.manual_seed(0)
    packed = dsprune.pack(bench.tiny().eval(), torch.randn(1, 3, 8, 8))
    shape = (64, 3, 8, 8)
    blocks = bench.whole_blocks(packed, shape)
    apart = dsprune.gpu.predict(packed, shape, chain="off")
    bandwidth, pixels = cost.device("H200").bytes_per_second(), 64 * 64
    rest = sum(row.floor for row in apart.rows if ".conv" not in row.names[0])
    weights = 32 * 8 + 9 * 8 * 8 + 8 * 32
    assert blocks == pytest.approx(rest + 3 * 2 * (pixels * 64 + weights) / bandwidth, rel=1e-6)
