"""The phases of the device run that need torch: ``python -m bench.device_steps NAME --out DIR``, each a
process.

What one leaves for the next stands in the folder that DSP_DEVICE_SCRATCH names, what it has found in the
run's results (:func:`bench.device_run.emit`). ``--quick`` takes the same path with a tiny network on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dsprune
from bench import gpu as bench
from bench.device import ceilings
from bench.device_run import SCRATCH, emit
from dsp_kernels import GroupLayout, cost, permuted_grouped_conv2d
from dsprune import gpu
from dsprune.io import write_atomically
from dsprune.nn import PermutedGroupedConv2d

WORKERS = 6  # that compile Triton's kernels beside one another


class Step:
    """What a phase has at hand: the folders, the device, the cell that is measured."""

    def __init__(self, out: Path, quick: bool) -> None:
        self.out, self.quick = out, quick
        self.cell = bench.Cell("tiny", 40, 2, torch.float32) if quick else bench.cells()[0]
        self.size = bench.NETWORKS[self.cell.network][1]
        self.scratch = Path(os.environ.get(SCRATCH) or out)

    @property
    def device(self) -> torch.device:
        if self.quick:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise SystemExit("device_steps: no CUDA device")
        return torch.device("cuda", torch.cuda.current_device())

    def keep(self, name: str, value: Any) -> None:
        write_atomically(self.scratch / name, json.dumps(value).encode())

    def kept(self, name: str, default: Any) -> Any:
        path = self.scratch / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default

    def model(self) -> nn.Module:
        """The pruned dense network, in float32 on the CPU."""
        path = self.scratch / "state.pt"
        if not path.exists():
            raise SystemExit("device_steps: the phase 'structure' left no network")
        model = bench.NETWORKS[self.cell.network][0]()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()

    def where(self) -> tuple[cost.Device, dict[str, Any]]:
        """The device with its ceilings; the published ones where the phase 'ceilings' left none."""
        found = self.kept("ceilings.json", {})
        known = cost.device("H200") if self.quick else cost.device(self.device)
        if not found:
            return known, {}
        return bench.with_ceilings(known, found), found

    def bench(self, seconds: float) -> bench.Bench:
        where, found = self.where()
        results = self.kept("results.json", None) or {
            "environment": bench.environment(self.device),
            "ceilings": found,
            "networks": [],
            "layers": [],
            "left_out": [],
        }
        table = self.out / "forms.json"
        made = bench.Bench(
            self.device,
            where,
            bench.Deadline(seconds),
            0.01 if self.quick else 1.0,
            self.quick,
            results,
            cost.FormTable.load(table) if table.exists() else cost.FormTable(),
        )
        counts = self.kept("counts.json", None)
        if counts is not None:
            made.counts[self.cell.network, self.cell.cut] = (counts[0], counts[1])
        return made

    def show(self, made: bench.Bench, kind: str, row: dict[str, Any]) -> None:
        """A row as a line, and all rows so far as the page networks.md."""
        emit(kind, row=row)
        self.keep("results.json", made.results)
        write_atomically(self.out / "networks.md", bench.markdown(made.results).encode())


def measure_ceilings(step: Step) -> None:
    found = ceilings(step.device, *((1 << 18, 128) if step.quick else (1 << 28, 8192)))
    step.keep("ceilings.json", found)
    emit("ceilings", found=found)


def make_structure(step: Step) -> None:
    """The pruned network and its counts; then its Triton kernels, compiled beside one another."""
    cell = step.cell
    state = bench.pruned_state(cell.network, cell.cut, step.size)
    torch.save(state, step.scratch / "state.tmp")
    (step.scratch / "state.tmp").replace(step.scratch / "state.pt")
    emit("structure", network=cell.network, cut=cell.cut)
    example = torch.randn(1, 3, step.size, step.size)
    packed = dsprune.pack(step.model(), example)
    step.keep("counts.json", bench.counted(packed, example))
    torch.save(_layers(packed, step), step.scratch / "layers.pt")
    if step.device.type == "cpu":
        emit("compiled", layers=_compile(step.out, True, 0, 1), seconds=0.0)
        return
    start = time.monotonic()
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        shares = [pool.submit(_compile, step.out, False, i, WORKERS) for i in range(WORKERS)]
        for done in as_completed(shares):
            emit("compiled", layers=done.result(), seconds=round(time.monotonic() - start, 1))


def _layers(packed: nn.Module, step: Step) -> list[tuple[Any, ...]]:
    """Of each kind of packed layer one: what makes it, and the size of its input."""
    network = gpu.pad_channels(packed.network)  # type: ignore[arg-type]
    shape = (step.cell.batch, 3, step.size, step.size)
    kinds: dict[str, tuple[Any, ...]] = {}
    for found in gpu.trace_steps(network, shape, step.cell.dtype):
        if found.conv is None:
            continue
        layer = network.get_submodule(str(found.node.target))
        assert isinstance(layer, PermutedGroupedConv2d)
        layout = layer.layout
        groups = [(list(channels), list(filters)) for channels, filters in layout.groups]
        kinds.setdefault(
            found.conv.key(step.cell.dtype),
            (
                (layout.in_channels, layout.out_channels, groups),
                (found.conv.batch, layout.in_channels, *found.conv.size),
                (layer.kernel_size, layer.stride, layer._inner_padding, layer.dilation),
                (found.conv.residual, layer.activation, found.conv.out_size),
            ),
        )
    return list(kinds.values())


def _compile(out: Path, quick: bool, share: int, shares: int) -> int:
    """Runs every ``shares``-th kind of layer once, so that its kernel is in Triton's cache."""
    step = Step(out, quick)
    backend = "reference" if quick else "triton"
    kinds = torch.load(step.scratch / "layers.pt", weights_only=True)[share::shares]
    for made, shape, (kernel, stride, padding, dilation), (residual, activation, out_size) in kinds:
        layout, dtype = GroupLayout(*made), step.cell.dtype

        def some(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*size, device=step.device, dtype=dtype)

        with torch.no_grad():
            x = some(*shape).contiguous(memory_format=torch.channels_last)
            added = some(shape[0], layout.out_channels, *out_size) if residual else None
            if added is not None:
                added = added.contiguous(memory_format=torch.channels_last)
            permuted_grouped_conv2d(
                x, some(layout.weight_numel(kernel)), layout, some(layout.out_channels), kernel_size=kernel,
                stride=stride, padding=padding, dilation=dilation, residual=added, activation=activation,
                backend=backend,
            )  # fmt: skip
    return len(kinds)


def time_networks(step: Step) -> None:
    """Packed, eager and channel-pruned networks under CUDA graphs."""
    made = step.bench(60)
    forms = ("eager, graph", *bench.PACKED, "channel-pruned, graph")
    row = bench.network_row(made, step.cell, step.model(), step.size, forms=forms)
    made.results["networks"].append(row)
    step.show(made, "network", row)


def time_compiled(step: Step) -> None:
    """The dense network as Inductor compiles it, into the row that stands already."""
    made = step.bench(120)
    alone = bench.network_row(made, step.cell, step.model(), step.size, forms=("max-autotune",))
    rows = made.results["networks"]
    row = rows.pop(0) if rows else alone
    # The better one of two ways to compile; the other's time is in the line of its own.
    emit("compiled dense", times_ms=alone["times_ms"], failed=alone["failed"], loop_reindexing=_reindexing())
    found = alone["times_ms"].get("max-autotune")
    before = row["times_ms"].get("max-autotune")
    if found is not None and (before is None or found < before):
        row["times_ms"]["max-autotune"] = found
        row["differences"].update(alone["differences"])
        row["failed"].pop("max-autotune", None)
    elif found is None and before is None:
        row["failed"].update(alone["failed"])
    row = bench.judged(row)
    rows.insert(0, row)
    step.show(made, "network", row)
    if alone["failed"]:
        raise SystemExit("; ".join(f"{name}: {why}" for name, why in alone["failed"].items()))


def _reindexing() -> str:
    return os.environ.get("TORCHINDUCTOR_LOOP_REINDEXING_AFTER_FUSION", "as torch has it")


def time_layers(step: Step) -> None:
    """The costliest layers in every form, then chains: the table that packing goes by."""
    made = step.bench(110)
    for row in bench.layer_rows(made, step.cell, step.model(), step.size):
        made.results["layers"].append(row)
        write_atomically(step.out / "forms.json", made.table.to_json().encode())
        step.show(made, "layer", row)


def time_again(step: Step) -> None:
    """The packed network with its forms by measurement, beside the dense one."""
    os.environ[gpu.FORMS_ENVIRONMENT] = str(step.out / "forms.json")
    made = step.bench(30)
    if not (step.out / "forms.json").exists():
        raise SystemExit("device_steps: the phase 'layers' left no table")
    row = bench.network_row(made, step.cell, step.model(), step.size, forms=("eager, graph", *bench.PACKED))
    if made.results["networks"]:
        dense = made.results["networks"][0]["times_ms"].get("max-autotune")
        row["times_ms"] |= {} if dense is None else {"max-autotune": dense}
    row = bench.judged(row)
    made.results["networks"].append(row)
    step.show(made, "network", row)


def time_others(step: Step) -> None:
    """The other networks, cuts and batches, for as long as there is time: the third call."""
    made = step.bench(460)
    wanted = [bench.Cell("tiny", 40, 1, torch.float32)] if step.quick else bench.cells()[1:]
    sizes = {cell.network: bench.NETWORKS[cell.network][1] for cell in wanted}
    kinds = list(dict.fromkeys((cell.network, cell.cut) for cell in wanted))
    models: dict[tuple[str, int], nn.Module] = {}
    with ProcessPoolExecutor(1 if step.quick else 4, mp_context=get_context("spawn")) as pool:
        states = {kind: pool.submit(bench.pruned_state, *kind, sizes[kind[0]]) for kind in kinds}
        try:
            for cell in wanted:
                if made.deadline.left() < 25:
                    made.results["left_out"].append({"what": bench.name_of(cell), "why": "no time left"})
                    continue
                kind = (cell.network, cell.cut)
                if kind not in models:
                    model = bench.NETWORKS[cell.network][0]()
                    model.load_state_dict(states[kind].result(timeout=made.deadline.left()))
                    models[kind] = model.eval()
                compiled = made.deadline.left() > 2 * made.compile_seconds + 60
                forms = bench.FORMS if compiled else [f for f in bench.FORMS if f not in bench.COMPILED]
                try:
                    row = bench.network_row(made, cell, models[kind], sizes[cell.network], forms=forms)
                except Exception as error:
                    why = f"{type(error).__name__}: {error}"
                    made.results["left_out"].append({"what": bench.name_of(cell), "why": why})
                    emit("left out", what=bench.name_of(cell), why=why)
                    continue
                made.results["networks"].append(row)
                step.show(made, "network", row)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run_corners(step: Step) -> None:
    """Small convolutions on the compiled kernels, for compute-sanitizer, compared with the definition."""
    layout = GroupLayout(24, 20, [(range(0, 13), range(0, 11)), ([3, 7, 8, 9, 20], range(11, 20))])
    for dtype in (torch.float16, torch.float32):
        for kernel, stride in ((3, 1), (3, 2), (1, 1)):
            x = torch.randn(2, 24, 9, 7, dtype=dtype)
            weight = torch.randn(layout.weight_numel((kernel, kernel)), dtype=dtype)

            def run(device: torch.device, backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
                leaves = [t.to(device, dtype).requires_grad_() for t in (x, weight)]  # noqa: B023
                y = permuted_grouped_conv2d(
                    leaves[0].contiguous(memory_format=torch.channels_last), leaves[1], layout,
                    kernel_size=kernel, stride=stride, padding=kernel // 2, backend=backend,  # noqa: B023
                )  # fmt: skip
                return [
                    y.detach().double().cpu(),
                    *(g.double().cpu() for g in torch.autograd.grad(y.sum(), leaves)),
                ]

            exact = run(torch.device("cpu"), "reference", torch.float64)
            found = run(step.device, "reference" if step.quick else "cuda", dtype)
            off = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
            emit("corner", dtype=str(dtype), kernel=kernel, stride=stride, difference=off)
            if not off <= (1e-2 if dtype == torch.float16 else 1e-5):
                raise SystemExit(
                    f"device_steps: {dtype}, {kernel}x{kernel}, stride {stride}: off by {off:.3g}"
                )


STEPS: dict[str, Callable[[Step], None]] = {
    "ceilings": measure_ceilings,
    "structure": make_structure,
    "networks": time_networks,
    "autotune": time_compiled,
    "layers": time_layers,
    "again": time_again,
    "others": time_others,
    "corners": run_corners,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.device_steps", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("step", choices=sorted(STEPS))
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the run's results")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny network on the CPU: tries the whole path"
    )
    options = parser.parse_args(arguments)
    step = Step(options.out, options.quick)
    if options.step != "structure":  # which can make its network without one
        _ = step.device
    STEPS[options.step](step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
