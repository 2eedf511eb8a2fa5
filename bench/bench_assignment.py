"""Group assignment, timed: penalty, gradients and mixed product of whole networks; a learning step; its
memory.

    python -m bench.bench_assignment [--networks resnet20 resnet56] [--groups 2 4] [--threads 1 2]
    python -m bench.bench_assignment --steps [--authors FOLDER] [--batch 128]
    python -m bench.bench_assignment --memory
    python -m bench.bench_assignment --bytes
    (each with --out FOLDER, to whose assignment.json and assignment.md it adds its part; --device cuda)

What is compared runs in one process, in turn, for ``--seconds`` a cell; medians. "copy" is one ``copy_`` of
all prunable weights (read once, written once), the floor of a penalty with its gradient for the weights;
"loop" is the definition layer by layer and group by group under autograd. ``--authors`` names a folder with
the authors' ``dsp_module.py``, whose ``GroupWrapper`` is then timed beside ours. ``--bytes`` times nothing:
it counts what the GPU kernels move, from their tables, against the least that an operation can (weights
read once, written once where it writes them). ``--device cuda`` times a GPU instead, waiting for it after
each run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dsp_kernels
from bench.environment import environment, keep_freed_memory
from dsp_kernels.assignment import LassoTable, group_lasso, reference
from dsp_kernels.assignment.plan import Layer, make_plan, tiling, vector_width
from dsprune import GroupLearner, prunable_convs
from dsprune.clock import medians
from dsprune.io import write_atomically
from dsprune.models import cifar_resnet, resnet18, resnet50

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (lambda: cifar_resnet(20), (3, 32, 32)),
    "resnet56": (lambda: cifar_resnet(56), (3, 32, 32)),
    "resnet18": (resnet18, (3, 224, 224)),
    "resnet50": (resnet50, (3, 224, 224)),
}


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(cells: dict[str, Callable[[], Any]], seconds: float, device: str = "cpu") -> dict[str, float]:
    """Median in milliseconds of each cell, the cells taking turns."""

    def whole(run: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            with torch.enable_grad():
                run()
            wait(device)

        return call

    return medians({name: whole(run) for name, run in cells.items()}, seconds=seconds)


def prunable_weights(name: str, device: str = "cpu") -> list[Tensor]:
    """The weights that group learning touches."""
    build, shape = NETWORKS[name]
    model = build()
    infos = prunable_convs(model, torch.zeros(1, *shape))
    return [model.get_submodule(info.name).get_parameter("weight").detach().to(device) for info in infos]


def kernels(name: str, groups: int, threads: int, seconds: float, device: str = "cpu") -> dict[str, Any]:
    """Whole-network times of each backend beside the loop and a copy."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    weights = prunable_weights(name, device)
    count = sum(w.numel() for w in weights)
    logs = [torch.log_softmax(2 * torch.randn(groups, w.shape[0], device=device), 0) for w in weights]
    matrix = torch.cat(logs, 1)
    moves = [torch.randn_like(w) * 1e-3 for w in weights]
    rates = [1e-6] * len(weights)
    flat = torch.cat([w.flatten() for w in weights])
    target = torch.empty_like(flat)
    leaves = [w.clone().requires_grad_() for w in weights]
    log_leaves = [log.clone().requires_grad_() for log in logs]

    def loop() -> None:
        torch.autograd.grad(reference.group_lasso_definition(leaves, log_leaves).sum(), leaves + log_leaves)

    cells: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(flat), "loop": loop}
    for backend in ("reference", *(("native",) if device == "cpu" else ("triton", "cuda"))):
        if dsp_kernels.available_backends()[backend] is not None:
            continue
        table = LassoTable(weights, groups, backend=backend)

        def penalty_and_gradients(backend: str = backend) -> None:
            penalties = group_lasso(leaves, log_leaves, backend=backend)
            torch.autograd.grad(penalties.sum(), leaves + log_leaves)

        cells[f"{backend} penalty"] = partial(table.penalties, matrix)
        cells[f"{backend} penalty + gradients"] = penalty_and_gradients
        backward = torch.ops.dsp_kernels.group_lasso_backward
        ones = torch.ones(len(weights), device=device)
        cells[f"{backend} gradients"] = partial(backward, ones, weights, logs, [1.0] * len(weights), backend)
        cells[f"{backend} penalty step"] = partial(table.shrink, matrix, rates)
        cells[f"{backend} mixed product"] = partial(table.log_gradient, matrix, rates, moves)
    times = interleaved(cells, seconds, device)
    floors = {cell: FLOOR.get(cell.partition(" ")[2], 2.0) for cell in cells}
    return {
        "network": name, "groups": groups, "threads": threads, "device": device, "weights": count,
        "floor_bytes": {cell: int(4 * floor * count) for cell, floor in floors.items()}, "ms": times,
    }  # fmt: skip


FLOOR = {
    "penalty": 1.0,
    "penalty + gradients": 2.0,
    "gradients": 2.0,
    "penalty step": 2.0,
    "mixed product": 2.0,
}
"""The least that an operation moves, in copies of the weights: read once, and written once where it writes
them; for the mixed product, weights and directions read once."""


def moved_bytes(name: str, groups: int) -> dict[str, Any]:
    """What the Triton kernels move for float32 weights, each operation's passes and partial sums counted from
    their tables, beside the least. Caches may save some of it."""
    build, shape = NETWORKS[name]
    infos = prunable_convs(build(), torch.zeros(1, *shape))
    layers = tuple(Layer(i.out_channels, i.in_channels, math.prod(i.kernel_size), False) for i in infos)
    vector = vector_width(layers, 4, ())
    plan = make_plan(layers, groups, vector, tiling(4), torch.device("cpu"))
    weights = sum(layer.filters * layer.width for layer in layers)
    pairs = sum(layer.filters * layer.channels for layer in layers)
    single = sum(layer.filters * layer.channels for layer in layers if layer.taps == 1)
    stored = pairs - single
    columns = 2 * plan.columns_size // 3  # written and read; a third of the place, the rest is the Hessian's
    rows = 2 * sum(-(-layer.width // plan.tiles.lanes) * groups * layer.filters for layer in layers)
    moved_rows = 2 * sum(
        -(-layer.channels // plan.tiles.moved_lanes) * groups * layer.filters for layer in layers
    )
    elements = {
        "penalty": weights + columns,
        "gradients": 3 * weights + columns + rows,
        "penalty step": 3 * weights + columns,
        # S and T are written once, read three times and twice; of one tap the weights themselves are read.
        "mixed product": 2 * weights + 7 * stored + 5 * single + 3 * columns + moved_rows,
    }
    result: dict[str, Any] = {}
    for operation, count in elements.items():
        floor = FLOOR[operation] * weights
        result[operation] = {"bytes": 4 * count, "floor_bytes": int(4 * floor)}
    return {"network": name, "groups": groups, "weights": weights, "moved": result}


def _fixture(name: str, batch: int, device: str = "cpu") -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    x, y = torch.randn(batch, *shape), torch.randint(0, 10, (batch,))
    return build().to(device), x.to(device), y.to(device)


def _authors(folder: str, model: nn.Module, groups: int, criterion: Callable[..., Tensor]) -> Any:
    """The authors' wrapper around ``model``, and its optimizer. Their code says what it finds; that is not
    shown."""
    if not (Path(folder) / "dsp_module.py").is_file():
        raise FileNotFoundError(f"--authors: no dsp_module.py in {folder}")
    sys.path.insert(0, folder)
    try:
        from dsp_module import GroupWrapper  # type: ignore[import-not-found]
    finally:
        sys.path.remove(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    with contextlib.redirect_stdout(io.StringIO()):
        wrapped = GroupWrapper(model, optimizer, criterion, 1e-4, 10_000, groups, 0.5)
    return wrapped, optimizer


def steps(
    name: str,
    groups: int,
    threads: int,
    batch: int,
    seconds: float,
    authors: str | None,
    device: str = "cpu",
) -> dict[str, Any]:
    """A whole learning step of each order beside an ordinary training step, and the fused part alone."""
    torch.set_num_threads(threads)
    model, x, y = _fixture(name, batch, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    def ordinary() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    cells: dict[str, Callable[[], Any]] = {"ordinary": ordinary}
    for order in ("exact", "first", "released"):
        learner = GroupLearner(model, x[:1], groups=groups, strength=1e-4, total_steps=10_000, order=order)
        cells[f"learning, {order}"] = partial(learner.step, loss, optimizer)
    table = LassoTable(prunable_weights(name, device), groups)
    matrix = torch.log_softmax(torch.randn(groups, table.filters, device=device), 0)
    moves = [1e-3 * torch.randn_like(w) for w in table.weights]
    rates = [1e-6] * len(moves)

    def fused() -> None:
        table.shrink(matrix, rates)
        table.log_gradient(matrix, rates, moves)
        table.shrink(matrix, rates)

    cells["the fused part"] = fused
    if authors is not None:
        wrapped, own = _authors(authors, copy.deepcopy(model), groups, F.cross_entropy)

        def theirs() -> None:
            wrapped.zero_grad()
            wrapped.initialize()
            F.cross_entropy(wrapped(x), y).backward()
            own.step()
            wrapped.after_step(x, y)

        cells["the authors' step"] = theirs
    times = interleaved(cells, seconds, device)
    return {
        "network": name, "groups": groups, "threads": threads, "device": device, "batch": batch, "ms": times,
    }  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)
        }
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in given or storage._cdata in self._seen:
                continue
            self._seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out


def memory(name: str, groups: int, batch: int) -> dict[str, Any]:
    """What learning holds and adds at its peak, in copies of the prunable weights."""
    model, x, y = _fixture(name, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    def ordinary() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def peak(run: Callable[[], Any]) -> int:
        run()
        with LiveBytes() as live:
            run()
        return live.most

    plain = peak(ordinary)
    learner = GroupLearner(model, x[:1], groups=groups, strength=1e-4, total_steps=10_000)
    held = sum(t.numel() * t.element_size() for t in (*learner._kept, *learner._tensors().values()))
    learning = peak(lambda: learner.step(loss, optimizer))
    weights = sum(t.numel() * t.element_size() for t in learner._weights)
    return {
        "network": name,
        "groups": groups,
        "weights": weights,
        "held": held,
        "batch": batch,
        "peak": learning - plain,
    }


def table(results: dict[str, Any]) -> str:
    """The parts that were measured, as Markdown."""
    lines: list[str] = []

    def head(*titles: str) -> None:
        lines.extend([""] * bool(lines) + ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"])

    def line(*cells: Any) -> None:
        lines.append("| " + " | ".join(map(str, cells)) + " |")

    if "kernels" in results:
        head("network", "groups", "threads", "weights, MB", "operation", "ms", "times faster than the loop",
             "share of copy bandwidth")  # fmt: skip
        for row in results["kernels"]:
            copied = row["ms"]["copy"] / row["floor_bytes"]["copy"]
            for cell, median in row["ms"].items():
                share = copied * row["floor_bytes"][cell] / median
                line(row["network"], row["groups"], row["threads"], f"{4e-6 * row['weights']:.1f}", cell,
                     f"{median:.3f}", f"{row['ms']['loop'] / median:.1f}", f"{100 * share:.0f}%")  # fmt: skip
    if "steps" in results:
        head("network", "groups", "batch", "threads", "step", "ms", "ordinary steps")
        for row in results["steps"]:
            for cell, median in row["ms"].items():
                line(row["network"], row["groups"], row["batch"], row["threads"], cell, f"{median:.2f}",
                     f"{median / row['ms']['ordinary']:.3f}")  # fmt: skip
    if "memory" in results:
        head("network", "groups", "batch", "prunable weights, MB", "held, copies", "peak of a step, copies",
             "together, copies")  # fmt: skip
        for row in results["memory"]:
            held, peak = row["held"] / row["weights"], row["peak"] / row["weights"]
            line(row["network"], row["groups"], row["batch"], f"{1e-6 * row['weights']:.2f}", f"{held:.3f}",
                 f"{peak:+.3f}", f"{held + max(0.0, peak):.3f}")  # fmt: skip
    if "bytes" in results:
        head("network", "groups", "operation", "moved, MB", "times the least")
        for row in results["bytes"]:
            for operation, moved in row["moved"].items():
                line(row["network"], row["groups"], operation, f"{1e-6 * moved['bytes']:.2f}",
                     f"{moved['bytes'] / moved['floor_bytes']:.2f}")  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--groups", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on a cell")
    parser.add_argument("--batch", type=int, default=128)
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--steps", action="store_const", const="steps", dest="part", help="whole learning steps"
    )
    part.add_argument(
        "--memory", action="store_const", const="memory", dest="part", help="memory of learning"
    )
    part.add_argument(
        "--bytes", action="store_const", const="bytes", dest="part", help="what GPU kernels move"
    )
    parser.add_argument("--authors", metavar="FOLDER", help="a folder with the authors' dsp_module.py")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="folder for assignment.json and assignment.md")
    options = parser.parse_args(arguments)
    part_name = options.part or "kernels"
    seconds, device = options.seconds, options.device
    if part_name not in ("memory", "bytes"):
        keep_freed_memory()
    rows = []
    for name in options.networks:
        for groups in options.groups:
            print(f"{part_name}: {name}, {groups} groups", file=sys.stderr)
            if part_name == "memory":
                rows.append(memory(name, groups, options.batch))
            elif part_name == "bytes":
                rows.append(moved_bytes(name, groups))
            for threads in options.threads if part_name in ("kernels", "steps") else ():
                if part_name == "steps":
                    rows.append(steps(name, groups, threads, options.batch, seconds, options.authors, device))
                else:
                    rows.append(kernels(name, groups, threads, seconds, device))
    results: dict[str, Any] = {"environment": {}}
    if options.out is not None and (options.out / "assignment.json").exists():
        results = json.loads((options.out / "assignment.json").read_text())
    results["environment"][part_name] = environment() | {"seconds_a_cell": seconds, "device": device}
    results[part_name] = rows
    print(table({part_name: rows}))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out / "assignment.json", (json.dumps(results, indent=1) + "\n").encode())
        write_atomically(options.out / "assignment.md", table(results).encode())


if __name__ == "__main__":
    main()
