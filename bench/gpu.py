"""Packed networks and their layers on a GPU, against dense, compiled, multi-branch and channel-pruned forms:
the rows that the device run (``bench/device_run.py``) measures.

    python -m bench.gpu [--json FILE]    the cost model's table of ResNet-50, without a device

Every form is warmed up, the forms take turns, medians are kept, outputs are compared in the same run, and
each row has the floor of the fusion in use, from the ceilings measured at the start.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dsprune
from bench.cases import random_structure
from bench.device import driver
from bench.environment import commit
from dsp_kernels import backends, cost
from dsprune import gpu
from dsprune.compare import TOLERANCE
from dsprune.io import write_atomically
from dsprune.models import cifar_resnet, resnet18, resnet50
from dsprune.models.resnet import BasicBlock, Bottleneck
from dsprune.nn import PermutedGroupedConv2d

# Forms of a network: dense ones that packed networks are measured against, and the others.
DENSE = ("eager", "eager, graph", "max-autotune")
PACKED = ("packed", "packed without chains")
COMPILED = ("max-autotune", "channel-pruned, max-autotune")
FORMS = (*DENSE[:2], *PACKED, "multi-branch, graph", "channel-pruned, graph", *COMPILED)


def tiny() -> nn.Module:
    """Three narrow bottlenecks, for trying the whole path."""
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    return nn.Sequential(stem, *(Bottleneck(32, 8, 1) for _ in range(3)), head)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (resnet50, 224),
    "resnet18": (resnet18, 224),
    "resnet20": (lambda: cifar_resnet(20), 32),
    "resnet56": (lambda: cifar_resnet(56), 32),
    "tiny": (tiny, 8),
}


@dataclass(frozen=True)
class Cell:
    """One row of the networks' table."""

    network: str
    cut: int  # per cent of the FLOPs
    batch: int
    dtype: torch.dtype


def cells() -> list[Cell]:
    """All rows, the most important first."""
    out = [Cell("resnet50", 72, 256, torch.bfloat16)]
    for network, cut in (("resnet50", 72), ("resnet18", 70), ("resnet50", 90), ("resnet50", 50)):
        out += [Cell(network, cut, batch, torch.bfloat16) for batch in (256, 32, 1)]
    out += [
        Cell(network, 70, batch, torch.bfloat16) for network in ("resnet20", "resnet56") for batch in (1, 256)
    ]
    for network in ("resnet50", "resnet18"):
        for cut in (50, 70, 72, 90):
            out += [Cell(network, cut, batch, torch.bfloat16) for batch in (256, 32, 1)]
    out += [
        Cell(n, c, b, torch.bfloat16)
        for n in ("resnet20", "resnet56")
        for c in (50, 70, 90)
        for b in (1, 32, 256)
    ]
    out += [Cell(c.network, c.cut, c.batch, torch.float16) for c in list(out)]
    return list(dict.fromkeys(out))


# ---- forms ----


class Branches(nn.Module):
    """A packed layer as frameworks would have it: index_select, a convolution and a concatenation."""

    def __init__(self, layer: PermutedGroupedConv2d) -> None:
        super().__init__()
        layout = layer.layout
        dense = layer.dense_weight().detach()
        self.stride, self.padding, self.dilation = layer.stride, layer._inner_padding, layer.dilation
        self.activation, self.out_channels = layer.activation, layer.out_channels
        self.names: list[tuple[str, str]] = []
        order: list[int] = []
        for i, (channels, filters) in enumerate(layout.groups):
            if not filters:
                continue
            rows, columns = torch.tensor(filters), torch.tensor(channels)
            weight = dense[rows.to(dense.device)][:, columns.to(dense.device)]
            self.register_buffer(f"channels{i}", columns.to(dense.device))
            self.register_buffer(f"weight{i}", weight.contiguous(memory_format=torch.channels_last))
            self.names.append((f"channels{i}", f"weight{i}"))
            order += filters
        dead = list(layout.dead_filters)
        self.dead = len(dead)
        place = torch.empty(layer.out_channels, dtype=torch.long)
        place[torch.tensor([*order, *dead], dtype=torch.long)] = torch.arange(layer.out_channels)
        self.register_buffer("place", place.to(dense.device))
        self.register_buffer(
            "bias", None if layer.bias is None else layer.bias.detach()[:, None, None].clone()
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        parts = [
            F.conv2d(
                x.index_select(1, self.get_buffer(channels)),
                self.get_buffer(weight),
                None,
                self.stride,
                self.padding,
                self.dilation,
            )
            for channels, weight in self.names
        ]
        if not parts:
            raise NotImplementedError("a layer without live filters has no multi-branch form")
        if self.dead:
            first = parts[0]
            parts.append(first.new_zeros(first.shape[0], self.dead, *first.shape[2:]))
        y = torch.cat(parts, 1).index_select(1, cast(Tensor, self.place))
        if self.bias is not None:
            y = y + self.bias
        if residual is not None:
            y = y + residual
        if self.activation == "relu":
            return y.relu_()
        return y.clamp_(0.0, 6.0) if self.activation == "relu6" else y


def branches(network: fx.GraphModule) -> fx.GraphModule:
    """A packed graph with every packed layer in multi-branch form."""
    network = gpu._shallow(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, PermutedGroupedConv2d):
            gpu._set(network, name, Branches(layer))
    return network.eval()


def narrowed(make: Callable[[], nn.Module], scale: float) -> nn.Module:
    """The dense network with the inner channels of each block cut to ``scale``, to multiples of eight."""
    model = make()
    for block in model.modules():
        pairs: list[tuple[str, str, str]] = []
        if isinstance(block, Bottleneck):
            pairs = [("conv1", "bn1", "conv2"), ("conv2", "bn2", "conv3")]
        elif isinstance(block, BasicBlock):
            pairs = [("conv1", "bn1", "conv2")]
        elif hasattr(block, "conv_a") and hasattr(block, "conv_b"):
            pairs = [("conv_a", "bn_a", "conv_b")]
        for writer, norm, reader in pairs:
            a, b = cast(nn.Conv2d, getattr(block, writer)), cast(nn.Conv2d, getattr(block, reader))
            width = max(8, 8 * round(scale * a.out_channels / 8))
            width = min(width, a.out_channels)
            setattr(block, writer, _conv(a, a.in_channels, width))
            setattr(block, norm, nn.BatchNorm2d(width))
            setattr(block, reader, _conv(b, width, b.out_channels))
    return model.eval()


def _conv(like: nn.Conv2d, inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(
        inputs,
        outputs,
        cast(Any, like.kernel_size),
        cast(Any, like.stride),
        cast(Any, like.padding),
        bias=False,
    )


def _macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        copy.deepcopy(model).to("meta").eval()(torch.empty(shape))
    return counter.get_total_flops() // 2


def channel_pruned(make: Callable[[], nn.Module], size: int, macs: int) -> nn.Module:
    """A narrowed dense network of as many multiply-adds an image as ``macs``, or the next more.

    Its weights are random: it stands for what channel pruning to the same cost would run at, not for its
    outputs.
    """
    scales = [i / 16 for i in range(1, 17)]
    for scale in scales:
        torch.manual_seed(0)
        model = narrowed(make, scale)
        if _macs(model, (1, 3, size, size)) >= macs:
            return model
    return make().eval()


# ---- timing ----


class HostCapturer:
    """Where there is no device: calls in place of replays."""

    takes: tuple[str, ...] = ("native", "reference", "triton")

    def refuses(self, x: Tensor) -> str | None:
        return None

    def device(self, x: Tensor) -> cost.Device:
        return cost.device("H200")

    def capture(self, call: Callable[[Tensor], Any], x: Tensor) -> gpu.Replay:
        return _HostReplay(call, x)


class _HostReplay:
    def __init__(self, call: Callable[[Tensor], Any], x: Tensor) -> None:
        self.call, self.input = call, x.clone(memory_format=torch.channels_last)
        self.outputs = call(self.input)

    def __call__(self) -> None:
        self.outputs = self.call(self.input)

    def enter(self) -> None: ...

    def leave(self) -> None: ...


def capturer(device: torch.device) -> gpu.Capturer:
    return gpu.CudaCapturer() if device.type == "cuda" else HostCapturer()


def interleaved(
    calls: dict[str, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[str, float]:
    """Median milliseconds of each call; they take turns in bursts of about 10 ms, ``seconds`` for each."""

    def drain() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def burst(call: Callable[[], Any], count: int) -> float:
        drain()
        start = time.perf_counter()
        for _ in range(count):
            call()
        drain()
        return (time.perf_counter() - start) / count

    counts: dict[str, int] = {}
    with torch.no_grad():
        for name, call in calls.items():
            burst(call, 3)
            counts[name] = max(1, min(200, int(0.01 / max(1e-6, burst(call, 2)))))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + seconds * len(calls)
        while len(next(iter(samples.values()))) < 5 or time.perf_counter() < end:
            for name, call in calls.items():
                samples[name].append(burst(call, counts[name]))
    return {name: 1e3 * statistics.median(values) for name, values in samples.items()}


class Deadline:
    """Seconds that are left of a time box."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


# ---- networks ----


def pruned_state(network: str, cut: int, size: int) -> dict[str, Tensor]:
    """The state of a network with random structure; run in a process of its own, as it takes a while."""
    torch.set_num_threads(2)
    return random_structure(NETWORKS[network][0], (3, size, size), cut / 100, 2).state_dict()


def difference(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact.float()).abs().max() / max(1.0, float(exact.abs().max())))


def counted(packed: dsprune.PackedNetwork, example: Tensor) -> tuple[int, int]:
    """Multiply-adds of a packed network, and of the dense one that it was made from."""
    summary = dsprune.summary(packed, example)
    return summary.macs, summary.dense_macs


@dataclass
class Bench:
    """What all rows share. ``counts``: multiply-adds of networks, by name and cut, where they are known."""

    device: torch.device
    where: cost.Device
    deadline: Deadline
    seconds: float
    quick: bool
    results: dict[str, Any]
    table: cost.FormTable
    compile_seconds: float = 60.0
    counts: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    packed: dict[Any, tuple[dsprune.PackedNetwork, int, int]] = field(default_factory=dict)

    def packed_of(self, cell: Cell, model: nn.Module, size: int) -> tuple[dsprune.PackedNetwork, int, int]:
        """The packed network on the device in the cell's dtype, with its and the dense multiply-adds."""
        key = (cell.network, cell.cut, cell.dtype)
        if key not in self.packed:
            example = torch.randn(1, 3, size, size)
            packed = dsprune.pack(model, example)
            counts = self.counts.get(key[:2]) or counted(packed, example)
            self.packed[key] = (packed.to(device=self.device, dtype=cell.dtype), *counts)
        return self.packed[key]


def _graphed(bench: Bench, network: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A call of a network on ``x`` under a CUDA graph."""
    with torch.no_grad():
        replay = capturer(bench.device).capture(network, x)

    def call() -> Any:
        replay()
        return replay.outputs

    return call


def network_row(
    bench: Bench, cell: Cell, model: nn.Module, size: int, *, forms: Collection[str] = FORMS
) -> dict[str, Any]:
    """One network at one batch: ``forms`` (of FORMS) compared and timed in turns. ``model`` is the pruned
    dense network in float32 on the CPU.
    """
    device, dtype, last = bench.device, cell.dtype, torch.channels_last
    make = NETWORKS[cell.network][0]
    on_device, macs, dense_macs = bench.packed_of(cell, model, size)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(cell.batch, 3, size, size, generator=generator).to(device)
    x = images.to(dtype).contiguous(memory_format=last)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = copy.deepcopy(model).to(device)(images[:8])
    failed: dict[str, str] = {}
    calls: dict[str, Callable[[], Any]] = {}

    def add(name: str, prepare: Callable[[], Callable[[], Any]]) -> None:
        """A form that cannot be made, or that is wrong, is told and not timed."""
        if name not in forms:
            return
        compare = not name.startswith("channel-pruned")  # its weights are random
        try:
            with torch.no_grad():
                call = prepare()
                got = call()[:8]
            off = difference(got, exact) if compare else 0.0
            if compare:
                differences[name] = off
            if not off <= TOLERANCE[dtype]:
                failed[name] = f"outputs differ by {off:.3g}"
                return
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return
        calls[name] = call

    differences: dict[str, float] = {}

    def dense(of: nn.Module) -> nn.Module:
        return copy.deepcopy(of).to(device=device, dtype=dtype).to(memory_format=last)  # type: ignore[call-overload]

    def eager() -> Callable[[], Any]:
        mine = dense(model)
        return lambda: mine(x)

    def graph() -> Callable[[], Any]:
        return _graphed(bench, dense(model), x)

    def inductor(of: nn.Module) -> Callable[[], Any]:
        start = time.monotonic()
        torch._dynamo.reset()
        mine = (
            torch.compile(dense(of), backend="eager")
            if bench.quick
            else torch.compile(dense(of), mode="max-autotune")
        )
        for _ in range(3):
            mine(x)
        bench.compile_seconds = time.monotonic() - start
        return lambda: mine(x)

    def ours(chain: str) -> Callable[[], Any]:
        network = cast(fx.GraphModule, on_device.network)
        cache = gpu.GraphCache(network, None, capturer=capturer(device), chain=chain)
        found = cache.find((x,))
        if found is None:
            raise RuntimeError(cache.reason or "no graph")
        plans[chain] = found.prediction
        return lambda: cache.run(found, (x,))

    plans: dict[str, gpu.Prediction] = {}
    add("eager", eager)
    add("eager, graph", graph)
    add("packed", lambda: ours("auto"))
    add("packed without chains", lambda: ours("off"))
    add("multi-branch, graph", lambda: _graphed(bench, branches(cast(fx.GraphModule, on_device.network)), x))
    add("channel-pruned, graph", lambda: _graphed(bench, dense(channel_pruned(make, size, macs)), x))
    add("max-autotune", lambda: inductor(model))
    add("channel-pruned, max-autotune", lambda: inductor(channel_pruned(make, size, macs)))
    times = interleaved(calls, device, bench.seconds) if calls else {}
    plan = plans.get("auto")
    floor = None
    if plan is not None:
        floor = gpu.predict(
            on_device.network, tuple(x.shape), device=bench.where, dtype=dtype, table=gpu.form_table()
        )
    row: dict[str, Any] = {
        "network": cell.network,
        "cut": cell.cut,
        "batch": cell.batch,
        "dtype": str(dtype).removeprefix("torch."),
        "macs": macs,
        "dense_macs": dense_macs,
        "times_ms": times,
        "differences": differences,
        "failed": failed,
        "floor_ms": None if floor is None else 1e3 * floor.floor,
        "predicted_ms": None if plan is None else 1e3 * plan.seconds,
        "forms": {} if plan is None else _count([r.form for r in plan.rows]),
        "measured_forms": plan is not None and any("measured" in r.reason for r in plan.rows),
    }
    return judged(row)


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what follows from its times: the best dense form, the speed-up, the share of the floor."""
    times = row["times_ms"]
    packed = times.get("packed")
    best = min((name for name in DENSE if name in times), key=times.__getitem__, default=None)
    return row | {
        "best_dense": best,
        "speed_up": times[best] / packed if best and packed else None,
        "share_of_floor": row["floor_ms"] / packed if row["floor_ms"] and packed else None,
    }


def _count(values: list[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


# ---- layers ----


def repeated(bench: Bench, make: Callable[[Tensor], Any], inputs: list[Tensor]) -> Callable[[], Any]:
    """One call for all ``inputs``, under a graph on a device: so many that they do not stay in its cache."""
    if bench.device.type != "cuda":
        return lambda: [make(x) for x in inputs]
    side = torch.cuda.Stream(bench.device)
    side.wait_stream(torch.cuda.current_stream(bench.device))
    with torch.cuda.stream(side):
        for x in inputs:
            make(x)
    torch.cuda.current_stream(bench.device).wait_stream(side)
    torch.cuda.synchronize(bench.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [make(x) for x in inputs]

    def call() -> Any:
        graph.replay()
        return kept

    return call


def layer_rows(bench: Bench, cell: Cell, model: nn.Module, size: int) -> Iterator[dict[str, Any]]:
    """The packed layers of a network, one of each kind, the costliest by prediction first, and its chains:
    every form timed and compared.
    """
    dtype = cell.dtype
    packed, _, _ = bench.packed_of(cell, model, size)
    network = gpu.pad_channels(cast(fx.GraphModule, packed.network))
    shape = (cell.batch, 3, size, size)
    steps = gpu.trace_steps(network, shape, dtype)
    choices = gpu.predict(packed, shape, device=bench.where, dtype=dtype, chain="off")
    reasons = {name: row for row in choices.rows for name in row.names}
    by_cost = sorted(steps, key=lambda s: -reasons[s.name].seconds if s.name in reasons else 0.0)
    seen: dict[str, dict[str, float]] = {}
    for step in by_cost:
        if step.conv is None or bench.deadline.left() < 5:
            continue
        key = step.conv.key(dtype)
        if key in seen:
            continue
        layer = cast(PermutedGroupedConv2d, network.get_submodule(str(step.node.target)))
        seen[key] = times = {}
        yield _layer_row(bench, cell, step, layer, times, reasons.get(step.name))
        for form in cost.FORMS:
            if form in times:
                bench.table.add(bench.where.arch, key, form, 1e3 * times[form])
    for triple in gpu._triples(steps):
        convs = [cast(cost.Conv, step.conv) for step in triple]
        if bench.deadline.left() < 5 or any(conv.key(dtype) not in seen for conv in convs):
            continue
        key = " + ".join(conv.key(dtype) for conv in convs)
        if key in seen or gpu.chains.refuses(convs, dtype, bench.where.shared_memory) is not None:
            continue
        seen[key] = {}
        yield _chain_row(bench, cell, network, triple, [seen[conv.key(dtype)] for conv in convs], key)


def _inputs(bench: Bench, conv: cost.Conv, dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
    last, generator = torch.channels_last, torch.Generator(bench.device).manual_seed(0)
    layout = conv.layout
    size = torch.empty(0, dtype=dtype).element_size()
    bytes_each = size * (conv.batch * layout.in_channels * conv.size[0] * conv.size[1])
    count = 1 if bench.quick else max(1, min(8, -(-2 * bench.where.l2 // max(1, bytes_each))))

    def image(channels: int, height: int, width: int) -> Tensor:
        return torch.randn(
            conv.batch, channels, height, width, device=bench.device, dtype=dtype, generator=generator
        ).contiguous(memory_format=last)

    return [
        (
            image(layout.in_channels, *conv.size),
            image(layout.out_channels, *conv.out_size) if conv.residual else None,
        )
        for _ in range(count)
    ]


def _time_forms(
    bench: Bench,
    forms: dict[str, Callable[..., Any]],
    pairs: list[tuple[Tensor, Tensor | None]],
    dtype: torch.dtype,
    reference: str,
    times: dict[str, float],
    failed: dict[str, str],
) -> None:
    """Fills ``times`` (ms a call) with the forms that agree with ``reference``."""
    calls: dict[str, Callable[[], Any]] = {}
    with torch.no_grad():
        exact = forms[reference](*pairs[0])
        leaves = torch.utils._pytree.tree_leaves(exact)
        for name, form in forms.items():
            try:
                given = torch.utils._pytree.tree_leaves(form(*pairs[0]))
                off = max(difference(a, b) for a, b in zip(given, leaves, strict=True))
                if not off <= TOLERANCE[dtype]:
                    failed[name] = f"outputs differ by {off:.3g}"
                    continue
                by_input = {id(x): (x, r) for x, r in pairs}
                calls[name] = repeated(
                    bench, lambda x, form=form, by=by_input: form(*by[id(x)]), [x for x, _ in pairs]
                )
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if calls:
        for name, value in interleaved(calls, bench.device, bench.seconds / 4).items():
            times[name] = value / len(pairs)


def _layer_row(
    bench: Bench,
    cell: Cell,
    step: gpu.Step,
    layer: PermutedGroupedConv2d,
    times: dict[str, float],
    predicted: gpu.Row | None,
) -> dict[str, Any]:
    conv = cast(cost.Conv, step.conv)
    pairs = _inputs(bench, conv, cell.dtype)
    if layer._outer_padding is not None:
        raise NotImplementedError("padding outside of a layer is not timed")
    layout = cost.merged_layout(layer.layout)
    merged = gpu._relayered(layer, layout, layout.pack(layer.dense_weight()))
    raw: dict[str, Callable[..., Any]] = {
        "grouped": layer,
        "merged": merged,
        "torch": gpu.DenseConv2d(layer),
        "multi-branch": Branches(layer),
    }
    failed: dict[str, str] = {}
    refused = backends.can_run("cuda", bench.device.type, cell.dtype)
    if refused is None:
        raw["cuda"] = gpu._relayered(layer, layer.layout, layer.weight, "cuda")
    else:
        failed["cuda"] = refused
    forms = {
        name: (lambda x, r, form=form: form(x) if r is None else form(x, r)) for name, form in raw.items()
    }
    _time_forms(bench, forms, pairs, cell.dtype, "torch", times, failed)
    floor = 1e3 * cost.floor(conv, bench.where, cell.dtype)
    ours = [times[name] for name in ("grouped", "cuda", "merged") if name in times]
    dense = times.get("torch")
    return {
        "network": cell.network,
        "cut": cell.cut,
        "layer": step.name,
        "convolution": conv.key(cell.dtype),
        "times_ms": dict(times),
        "failed": failed,
        "predicted_form": None if predicted is None else predicted.form,
        "predicted_ms": {} if predicted is None else {f: 1e3 * v for f, v in predicted.predicted.items()},
        "floor_ms": floor,
        "speed_up": dense / min(ours) if dense and ours else None,
        "share_of_floor": floor / min(times.values()) if times else None,
    }


def _chain_row(
    bench: Bench,
    cell: Cell,
    network: fx.GraphModule,
    triple: tuple[gpu.Step, gpu.Step, gpu.Step],
    alone: list[dict[str, float]],
    key: str,
) -> dict[str, Any]:
    convs = [cast(cost.Conv, step.conv) for step in triple]
    modules = [cast(PermutedGroupedConv2d, network.get_submodule(str(s.node.target))) for s in triple]
    chain = gpu.ChainLayer(modules, bench.where.shared_memory)

    def layers(x: Tensor, residual: Tensor | None) -> Any:
        stream = modules[1](modules[0](x), residual)
        return stream, modules[2](stream)

    pairs = [
        (x, r)
        for (x, _), (_, r) in zip(
            _inputs(bench, convs[0], cell.dtype), _inputs(bench, convs[1], cell.dtype), strict=False
        )
    ]
    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    _time_forms(bench, {"layers": layers, "chain": chain}, pairs, cell.dtype, "layers", times, failed)
    best = [min((t[f] for f in cost.FORMS if f in t), default=0.0) for t in alone]
    if "chain" in times and all(best):
        # Against the best form of each layer, not against the grouped ones alone.
        bench.table.add(bench.where.arch, key, "chain", 1e3 * times["chain"])
        bench.table.add(bench.where.arch, key, "layers", 1e3 * min(times.get("layers", sum(best)), sum(best)))
    estimate = cost.chain_estimate(convs, (False, True, True), bench.where, cell.dtype, exact=True)
    floor = 1e3 * estimate.seconds
    return {
        "network": cell.network,
        "cut": cell.cut,
        "layer": " + ".join(step.name for step in triple),
        "convolution": key,
        "times_ms": times | {"best of each layer": sum(best)},
        "failed": failed,
        "floor_ms": floor,
        "speed_up": sum(best) / times["chain"] if "chain" in times and all(best) else None,
        "share_of_floor": floor / times["chain"] if "chain" in times else None,
    }


# ---- the whole ----


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    cuda = device.type == "cuda"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "driver": driver() if cuda else None,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version,
        "commit": commit(),
    }


def with_ceilings(known: cost.Device, found: dict[str, Any]) -> cost.Device:
    """A device with measured ceilings (:func:`bench.device.ceilings`) in place of published ones."""
    rate = 1e12 * found["matmul_tflop_s_bfloat16"]
    matrix = {"bfloat16": rate, "float16": rate, "float32": 1e12 * found["matmul_tflop_s_float32"]}
    return known.measured(1e9 * found["copy_gb_s"], matrix)


def markdown(results: dict[str, Any]) -> str:
    """The results as tables; losses are rows like any other."""
    e = results["environment"]
    facts = [f"{e['device']}", *(f"{k} {e[k]}" for k in ("driver", "torch", "triton", "commit"))]
    lines = [
        ", ".join(facts),
        "",
        "| network, cut | batch | dtype | best dense | ms | max-autotune ms | multi-branch ms "
        "| channel-pruned ms | packed ms | speed-up | floor ms | share |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def ms(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    for row in results["networks"]:
        times = row["times_ms"]
        name = f"{row['network']}, {row['cut']}%" + (", forms measured" if row["measured_forms"] else "")
        speed = "" if row["speed_up"] is None else f"{row['speed_up']:.2f}x"
        cells_of = [
            name, row["batch"], row["dtype"], row["best_dense"] or "", ms(times.get(row["best_dense"])),
            ms(times.get("max-autotune")), ms(times.get("multi-branch, graph")),
            ms(times.get("channel-pruned, max-autotune")), ms(times.get("packed")), speed,
            ms(row["floor_ms"]), _per_cent(row.get("share_of_floor")),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells_of)) + " |")
    lines += [
        "",
        "| layer | grouped us | cuda us | merged us | torch us | multi-branch us | chain us "
        "| best of layers us | speed-up | floor us | share |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["layers"]:
        us = {name: f"{1e3 * value:.1f}" for name, value in row["times_ms"].items()}
        names = (*cost.FORMS, "multi-branch", "chain", "best of each layer")
        speed = "" if row["speed_up"] is None else f"{row['speed_up']:.2f}x"
        lines.append(
            f"| {row['network']} {row['cut']}% {row['layer']} | "
            + " | ".join(us.get(name, "") for name in names)
            + f" | {speed} | {1e3 * row['floor_ms']:.1f} | {_per_cent(row['share_of_floor'])} |"
        )
    failed = [
        (row.get("layer") or f"{row['network']}, {row['cut']}%, batch {row['batch']}", name, why)
        for row in [*results["networks"], *results["layers"]]
        for name, why in row["failed"].items()
    ]
    if failed:
        lines += ["", "Not timed:", ""]
        lines += [f"- {what}, {name}: {why}" for what, name, why in failed]
    if results["left_out"]:
        lines += ["", "Left out:", ""]
        lines += [f"- {entry['what']}: {entry['why']}" for entry in results["left_out"]]
    return "\n".join(lines) + "\n"


def _per_cent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}%"


def name_of(cell: Cell) -> str:
    return f"{cell.network}, {cell.cut}%, batch {cell.batch}, {str(cell.dtype).removeprefix('torch.')}"


# ---- prediction ----


def predictions(shape: tuple[int, ...] = (256, 3, 224, 224), cut: float = 0.72) -> list[dict[str, Any]]:
    """The cost model's figures of ResNet-50, dense and pruned, without chains, with them in some stages, and
    as packing would choose on an H200. In microseconds; nothing is measured.
    """
    example = torch.randn(1, *shape[1:])
    torch.manual_seed(0)
    networks = {
        "dense": dsprune.pack(resnet50().eval(), example),
        "pruned": dsprune.pack(random_structure(resnet50, cast(Any, shape[1:]), cut, 2), example),
    }
    rows = []
    plans = [
        ("one kernel a convolution", "off", ""),
        ("chains in stage 1", "unlimited", "layer1"),
        ("chains in stages 1 and 2", "unlimited", "layer1,layer2"),
        ("chains everywhere", "unlimited", ""),
        ("as chosen for an H200", "auto", ""),
    ]
    for name, packed in networks.items():
        for title, chain, within in plans:
            found = gpu.predict(packed, shape, chain=chain, within=within)
            rows.append(
                {
                    "network": name,
                    "plan": title,
                    "floor_us": 1e6 * found.floor,
                    "predicted_us": 1e6 * found.seconds,
                    "launches": len(found.rows),
                    "table": str(found),
                }
            )
        rows.append(
            {
                "network": name,
                "plan": "whole blocks",
                "floor_us": 1e6 * whole_blocks(packed, shape),
                "predicted_us": None,
                "launches": None,
                "table": None,
            }
        )
    return rows


def whole_blocks(packed: dsprune.PackedNetwork, shape: tuple[int, ...]) -> float:
    """The floor in seconds if each residual block were one kernel that reads the stream once and writes it
    once. The shortcut's convolution stays apart.
    """
    where, dtype = cost.device("H200"), torch.bfloat16
    network = gpu.pad_channels(cast(fx.GraphModule, packed.network))
    steps = gpu.trace_steps(network, shape, dtype)
    alone = gpu.predict(packed, shape, chain="off", dtype=dtype)
    total = alone.floor
    floors = {row.names[0]: row.floor for row in alone.rows}
    by_name = {step.name: step for step in steps}
    for step in steps:
        if not step.name.endswith(".conv3"):
            continue
        block = [by_name[step.name.replace("conv3", c)] for c in ("conv1", "conv2", "conv3")]
        convs = [cast(cost.Conv, s.conv) for s in block]
        together = cost.chain_estimate(convs, (False, False, True), where, dtype, exact=True)
        moved = together.bytes
        if block[2].node.args[1] is block[0].node.args[0]:  # the residual is the input: read once, and whole
            moved -= cost.moved(replace(convs[0], residual=False), 2)
            moved += convs[0].layout.pairs * 2 + convs[0].pixels * convs[0].layout.out_channels * 2
        total += max(moved / where.bytes_per_second(), together.compute) - sum(floors[s.name] for s in block)
    return total


def prediction_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| ResNet-50, batch 256, bfloat16 | plan | floor, us | predicted, us | launches |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        predicted = "" if row["predicted_us"] is None else f"{row['predicted_us']:.0f}"
        name, launches = f"{row['network']} | {row['plan']}", row["launches"] or ""
        lines.append(f"| {name} | {row['floor_us']:.0f} | {predicted} | {launches} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args(arguments)
    rows = predictions()
    if options.json is not None:
        write_atomically(options.json, (json.dumps(rows, indent=1) + "\n").encode())
    print(prediction_table(rows))
    print(rows[-2]["table"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
