"""Measures configurations of the Triton convolution on the device at hand and writes the table of launches.

    python -m bench.tune [--minutes 8] [--table FILE] [--only PREFIX]    on a CUDA device
    python -m bench.tune --list                                          what would be measured, in order
    TRITON_INTERPRET=1 python -m bench.tune --dry-run --table FILE       the whole path, tiny, on the CPU

For each bucket of the table (operation, precision, width of tile, number of pixels, taps) a few layers of its
kind are run. The search starts from the configuration in use and tries other values one field at a time,
keeping the best. A candidate counts only if its outputs, in memory poisoned before, are within the error
bound of the definition in float64 (float32 where that would take too long), and the same bits twice; one that
is wrong, does not compile or does not fit is dropped with the reason.

Every result goes at once into a journal beside the table, so that a run that was cut short goes on where it
was; a bucket's row is written when its search is done. Both files are replaced whole. The table's other rows
stay.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu import difference, environment
from dsp_kernels import GroupLayout, backends, cost
from dsp_kernels.conv import chain, launches, reference
from dsp_kernels.conv import triton as room
from dsp_kernels.conv.launches import ChainLaunch, Launch
from dsp_kernels.conv.shapes import output_size
from dsprune.compare import TOLERANCE
from dsprune.io import write_atomically

Config = Launch | ChainLaunch
BOUND = 4.0  # of the error, in units of sqrt(K) u |x| * |w|: the tests' constant
WORTH = 1.02  # a row is written for what is so much faster than the configuration in use
HOPELESS = 1.5  # times the best so far: the bucket's other layers are not run
_EXACT = 2e10  # multiply-adds up to which the definition is computed in float64


# ---- what is run ----


@dataclass(frozen=True)
class Workload:
    """One layer (or three, for "chain") at one size. ``op``: "conv", "grad_input", "grad_weight", "chain"."""

    name: str
    op: str
    dtype: torch.dtype
    precision: str
    layouts: tuple[GroupLayout, ...]
    batch: int
    size: int
    kernel: int
    stride: int = 1

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        """kernel, stride, padding, dilation."""
        pad = self.kernel // 2
        return (self.kernel, self.kernel), (self.stride, self.stride), (pad, pad), (1, 1)

    @property
    def out_size(self) -> tuple[int, int]:
        shape = (self.batch, self.layouts[0].in_channels, self.size, self.size)
        return output_size(shape, *self.geometry)

    @property
    def pixels(self) -> int:
        """As the launcher counts them: of the output, or of one phase of the input for its gradient."""
        if self.op == "grad_input":
            return self.batch * math.ceil(self.size / self.stride) ** 2
        return self.batch * self.out_size[0] * self.out_size[1]

    def bucket(self, arch: str) -> str:
        """The key of the table's row that this layer is for."""
        if self.op == "chain":
            return chain.launch_key(chain.config_of(self.layouts, self.dtype), self.precision)
        rows = (launches.rows_of(arch), launches.rows_of("default"))
        return room.bucket(self.op, self.precision, self.layouts[0], self.geometry[0], self.pixels, rows)


def ordered(channels: int, filters: int) -> GroupLayout:
    """Two groups over a private activation as packing orders it: a run each, a third of it shared, with ends
    inside of chunks.
    """
    a, b = 2 * channels // 3 + 1, channels // 3
    half = filters // 2
    groups = [(range(a), range(half)), (range(b, channels), range(half, filters))]
    return GroupLayout(channels, filters, groups)


def scattered(channels: int, filters: int) -> GroupLayout:
    """Two groups over the residual stream, whose order suits nobody."""
    rng = random.Random(channels)
    half = filters // 2
    groups = [
        (sorted(rng.sample(range(channels), channels // 2)), range(half)),
        (sorted(rng.sample(range(channels), channels // 3)), range(half, filters)),
    ]
    return GroupLayout(channels, filters, groups)


def whole(channels: int, filters: int) -> GroupLayout:
    return GroupLayout(channels, filters, [(range(channels), range(filters))])


PRECISIONS = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
# Filters of a layer of two groups, and the sizes of the maps on which networks have such layers.
SIZES = {32: 32, 64: 56, 128: 28, 256: 14}


def workloads() -> list[Workload]:
    """All layers, the most important first: inference in half precision, then training, then float32."""
    out: list[Workload] = []

    def layers(op: str, precision: str, batch: int) -> None:
        for filters, size in SIZES.items():
            common = (op, PRECISIONS[precision], precision)
            for kind, layout, kernel in (
                ("3x3", ordered(filters, filters), 3),
                ("1x1 over the stream", scattered(4 * filters, filters), 1),
            ):
                name = f"{op}, {precision}, {kind}, {filters} filters, {size}x{size}, batch {batch}"
                out.append(Workload(name, *common, (layout,), batch, size, kernel))

    layers("conv", "half", 256)
    for inner, stream, size in ((40, 256, 56), (80, 512, 28)):
        of = (ordered(inner, inner), whole(inner, stream), whole(stream, inner))
        name = f"chain, half, {inner} and {stream} channels, batch 256"
        out.append(Workload(name, "chain", torch.bfloat16, "half", of, 256, size, 3))
    layers("conv", "half", 1)
    layers("grad_input", "half", 128)
    layers("grad_weight", "half", 128)
    for precision in ("tf32", "ieee"):
        layers("conv", precision, 64)
        layers("grad_input", precision, 64)
        layers("grad_weight", precision, 64)
        layers("conv", precision, 1)
    return out


def tiny() -> list[Workload]:
    """One layer of each kind for the dry run."""
    half = torch.float16
    out = [
        Workload(f"{op}, tiny", op, half, "half", (ordered(16, 16),), 1, 4, 3, stride)
        for op, stride in (("conv", 1), ("grad_input", 2), ("grad_weight", 1))
    ]
    of = (ordered(16, 16), whole(16, 32), whole(32, 16))
    return [*out, Workload("chain, tiny", "chain", half, "half", of, 1, 4, 3)]


def candidates(best: Config, key: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The fields to vary, the weightiest first, with the values to try."""
    if isinstance(best, ChainLaunch):
        yield from (("resident", (0, 1)), ("BLOCK_S", (32, 64, 128)), ("BLOCK_M", (32, 64, 128)))
        yield "copy", (8, 16)
    else:
        small = "ieee" in key
        yield "BLOCK_M", (16, 32, 64) if key.startswith("grad_weight") else (64, 128, 256)
        if key.startswith("grad_weight"):
            yield "BLOCK_N", (32, 64, 128)
        yield "BLOCK_K", (16, 32) if small else (32, 64, 128)
    yield "stages", (2, 3, 4, 5)
    yield "warps", (4, 8)
    if key.endswith("/taps") and "/half/" in key:
        yield "copy", (8, 16)
    if isinstance(best, Launch) and "/large" not in key:
        yield "split", (0, 1)


def too_large(config: Config, key: str, shared_memory: int) -> str | None:
    """Why a configuration is not worth compiling; None where it may be."""
    if isinstance(config, ChainLaunch):
        return None  # the kernel's own shapes decide: the compiler says
    size = 2 if "/half" in key else 4
    a, b, c = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    rows = a * c + a * b if key.startswith("grad_weight") else a * c + c * b
    if (need := size * config.stages * rows) > shared_memory:
        return f"takes {need} bytes of shared memory, a block has {shared_memory}"
    sums = (c * b if key.startswith("grad_weight") else a * b) // (32 * config.warps)
    return f"{sums} sums a thread" if sums > 128 else None


# ---- correctness ----


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN: what is not written is not taken for right because
    an earlier candidate left it there.
    """
    empty, new_empty = torch.empty, Tensor.new_empty

    def fill(out: Tensor) -> Tensor:
        return out.fill_(float("nan")) if out.is_floating_point() else out

    torch.empty = lambda *a, **k: fill(empty(*a, **k))  # type: ignore[assignment]
    Tensor.new_empty = lambda *a, **k: fill(new_empty(*a, **k))  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty, Tensor.new_empty = empty, new_empty  # type: ignore[method-assign]


@dataclass
class Prepared:
    """A workload's inputs on the device: ``call`` runs a configuration; ``wrong`` judges what it returned."""

    call: Callable[[Config], tuple[Tensor, ...]]
    wrong: Callable[[tuple[Tensor, ...]], str | None]


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.randn(shape, device=device, generator=generator).to(dtype)
    return out.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else out


def prepare(work: Workload, device: torch.device) -> Prepared:
    """Inputs of a workload and the definition's answer."""
    if work.op == "chain":
        return _prepare_chain(work, device)
    layout, (kernel, stride, padding, dilation) = work.layouts[0], work.geometry
    plan, geometry = layout.plan(), (kernel, stride, padding, dilation)
    x = _random((work.batch, layout.in_channels, work.size, work.size), work.dtype, device, 0)
    y = _random((work.batch, layout.out_channels, *work.out_size), work.dtype, device, 1)
    weight = _random((layout.weight_numel(kernel),), work.dtype, device, 2)
    bias = _random((layout.out_channels,), work.dtype, device, 3)
    macs = layout.pairs * work.kernel**2 * work.pixels
    wide = torch.float64 if macs <= _EXACT else torch.float32

    def run(backend: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if work.op == "conv":
            return backend.forward(x, weight, plan, bias, y, layout.out_channels, *geometry, "none")
        if work.op == "grad_input":
            return backend.grad_input(y, weight, plan, x.shape, *geometry)
        return backend.grad_weight(y, x, plan, weight.numel(), *geometry)

    inputs = (x, y, weight, bias)
    exact = run(reference, *(t.to(wide) for t in inputs)).to(torch.float64)
    magnitude = run(reference, *(t.to(wide).abs() for t in inputs)).to(torch.float64)
    widest = max(len(channels) for channels, _ in layout.groups)
    terms = {
        "conv": widest * work.kernel**2 + 2,
        "grad_input": layout.out_channels * work.kernel**2,
        "grad_weight": work.batch * work.out_size[0] * work.out_size[1],
    }[work.op]
    info = torch.finfo(work.dtype)
    if work.precision == "tf32":
        unit = 2.0**-9  # both factors are cut to 11 bits, and all of that may point one way
    else:
        unit = BOUND * math.sqrt(terms) * 2.0**-24 * (1 if wide == torch.float64 else 2)
    bound = unit * magnitude
    bound = bound + info.eps / 2 * (exact.abs() + bound) + info.smallest_normal * info.eps

    def call(config: Config) -> tuple[Tensor, ...]:
        assert isinstance(config, Launch)
        with room.launching(config):
            return (run(room, *inputs),)

    def wrong(outs: tuple[Tensor, ...]) -> str | None:
        if not bool(outs[0].isfinite().all()):
            return "elements were not written, or are not finite"
        worst = float(((outs[0].double() - exact).abs() / bound).max())
        return None if worst <= 1 else f"the error is {worst:.3g} times the bound"

    return Prepared(call, wrong)


def _prepare_chain(work: Workload, device: torch.device) -> Prepared:
    kernel, stride, padding, dilation = work.geometry
    first, second, _ = work.layouts
    weights, biases = [], []
    for i, (layout, taps) in enumerate(zip(work.layouts, (kernel, (1, 1), (1, 1)), strict=True)):
        fan_in = max(len(channels) for channels, _ in layout.groups) * taps[0] * taps[1]
        weight = _random((layout.weight_numel(taps),), torch.float32, device, i) / math.sqrt(fan_in)
        weights.append(weight.to(work.dtype))
        biases.append(_random((layout.out_channels,), work.dtype, device, 3 + i))
    x = _random((work.batch, first.in_channels, work.size, work.size), work.dtype, device, 6)
    residual = _random((work.batch, second.out_channels, *work.out_size), work.dtype, device, 7)
    made = partial(
        chain.Chain, work.layouts, weights, biases, kernel=kernel, stride=stride, padding=padding,
        dilation=dilation,
    )  # fmt: skip
    exact = made().layers(x, residual)
    kept: dict[Config, chain.Chain] = {}

    def call(config: Config) -> tuple[Tensor, ...]:
        assert isinstance(config, ChainLaunch)
        if config not in kept:
            kept.clear()
            kept[config] = made(launch=config)
        return kept[config](x, residual)

    def wrong(outs: tuple[Tensor, ...]) -> str | None:
        # Inner values are rounded in both: a difference of one rounding is carried on.
        off = max(difference(a, b) for a, b in zip(outs, exact, strict=True))
        return None if off <= TOLERANCE[work.dtype] else f"outputs differ by {off:.3g}"

    return Prepared(call, wrong)


# ---- time ----

Timer = Callable[[Callable[[], Any], Config, Workload], float]


def seconds_of(call: Callable[[], Any], config: Config, work: Workload) -> float:
    """Seconds a call: under a CUDA graph of ten calls, the median of rounds that take 30 ms in all; on the
    CPU, of one call.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    count = 10
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(count)]
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < 5 or (time.perf_counter() - start < 0.03 and len(samples) < 50):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        samples.append(1e-3 * a.elapsed_time(b) / count)
    del kept
    return sorted(samples)[len(samples) // 2]


class DeviceLost(RuntimeError):
    """The device answers nothing any more; another process has to go on."""


# ---- the search ----


class Tuner:
    """Searches bucket after bucket until ``minutes`` are over.

    ``table``: the file of launches to write rows into, made where there is none. ``journal``: what was
    measured, resumed from where device, torch and Triton are the same. ``timer``: seconds a call.
    """

    def __init__(
        self,
        device: torch.device,
        table: Path,
        journal: Path,
        *,
        minutes: float,
        timer: Timer | None = None,
        shared_memory: int | None = None,
    ) -> None:
        self.device, self.table, self.journal, self.timer = device, table, journal, timer or seconds_of
        self.arch = room.machine(device)[0]
        self.shared_memory = shared_memory or (
            cost.device(device).shared_memory if device.type == "cuda" else 227 * 1024
        )
        self.end = time.monotonic() + 60 * minutes
        found = environment(device)
        self.environment = {k: found[k] for k in ("device", "driver", "torch", "triton")}
        self.rows: dict[str, dict[str, Any]] = {}
        self.resumed = False
        if journal.exists():
            try:
                before = json.loads(journal.read_text(encoding="utf-8"))
                if before["environment"] == self.environment:
                    self.rows, self.resumed = before["buckets"], True
            except (ValueError, KeyError, TypeError):
                print(f"bench.tune: {journal} is no journal: starting anew", file=sys.stderr)
        table.parent.mkdir(parents=True, exist_ok=True)
        if not table.exists():
            write_atomically(table, launches.to_json({}).encode())

    def left(self) -> float:
        return self.end - time.monotonic()

    def _save(self) -> None:
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"environment": self.environment, "buckets": self.rows}, indent=1)
        write_atomically(self.journal, (text + "\n").encode())

    def _measure(self, config: Config, key: str, works: list[tuple[Workload, Prepared]], best: float) -> Any:
        """{"us": {layer: time}} or {"dropped": why}. ``best``: of the first layer, so far."""
        why = too_large(config, key, self.shared_memory)
        if why is not None:
            return {"dropped": why}
        times: dict[str, float] = {}
        for work, prepared in works:
            try:
                with _rounding(work), torch.no_grad():
                    with poisoned():
                        first = prepared.call(config)
                        why = prepared.wrong(first)
                        if why is None:
                            again = prepared.call(config)
                            same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
                            why = None if same else "not the same bits twice"
                    if why is not None:
                        return {"dropped": f"{work.name}: {why}"}
                    seconds = self.timer(partial(prepared.call, config), config, work)
            except Exception as error:
                text = str(error).splitlines()[0] if str(error) else ""
                self._check_device(f"{type(error).__name__}: {text}")
                return {"dropped": f"{work.name}: {type(error).__name__}: {text}"}
            times[work.name] = 1e6 * seconds
            if len(times) == 1 and 1e6 * seconds > HOPELESS * best and len(works) > 1:
                return {"dropped": f"{work.name}: {1e6 * seconds:.1f} us, the best takes {best:.1f}"}
        return {"us": times}

    def _check_device(self, why: str) -> None:
        """Raises DeviceLost after an error that leaves the device useless."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise DeviceLost(why) from error

    def search(self, key: str, works: list[Workload]) -> bool:
        """One bucket; False where the time ran out before its end."""
        row = self.rows.setdefault(key, {"candidates": {}})
        tried: dict[str, Any] = row["candidates"]
        if row.get("done"):
            return True
        start = self._present(key, works[0])
        prepared: list[tuple[Workload, Prepared]] = []

        def result(config: Config) -> Any:
            name = json.dumps(config.to_json())
            if name not in tried:
                if not prepared:
                    for work in works:
                        with _rounding(work), torch.no_grad():
                            prepared.append((work, prepare(work, self.device)))
                base = tried.get(json.dumps(best.to_json()), {}).get("us", {})
                # Written before it runs: a candidate that takes the device along is not tried again.
                tried[name] = {"dropped": "the process ended while it ran"}
                self._save()
                try:
                    tried[name] = self._measure(config, key, prepared, base.get(works[0].name, math.inf))
                except DeviceLost as error:
                    tried[name] = {"dropped": f"the device was lost: {error}"}
                    self._save()
                    raise
                self._save()
            return tried[name]

        def score(config: Config) -> float:
            times = tried.get(json.dumps(config.to_json()), {}).get("us")
            return math.exp(sum(map(math.log, times.values())) / len(times)) if times else math.inf

        best = start
        if result(start) is None or self.left() <= 0:
            return False
        for name, values in candidates(start, key):
            for value in values:
                if self.left() <= 0:
                    return False
                other = replace(best, **{name: value})
                if other != best:
                    result(other)
                    best = min((best, other), key=score)
        row |= {"done": True, "start": start.to_json(), "best": best.to_json()}
        gain = score(start) / score(best) if score(best) < math.inf else 0.0
        row["gain"] = gain if math.isfinite(gain) else None  # the configuration in use was dropped
        if best != start and score(best) < math.inf and gain >= WORTH:
            self._write(key, best)
        self._save()
        return True

    def _present(self, key: str, work: Workload) -> Config:
        """The configuration that a call would get now, this table's own rows included."""
        row = launches.read(self.table).get(self.arch, {}).get(key)
        if row is not None:
            return row
        if work.op == "chain":
            config = chain.config_of(
                work.layouts, work.dtype, shared_memory=self.shared_memory, arch=self.arch
            )
            return chain.launch_of(config)
        kernel = work.geometry[0]
        return room.choose_launch(work.op, work.precision, work.layouts[0], kernel, work.pixels, self.arch)

    def _write(self, key: str, config: Config) -> None:
        table = launches.read(self.table)
        table.setdefault(self.arch, {})[key] = config
        write_atomically(self.table, launches.to_json(table).encode())

    def run(self, works: list[Workload]) -> list[str]:
        """All buckets of ``works``, in order; returns those that the time did not suffice for."""
        buckets: dict[str, list[Workload]] = {}
        for work in works:
            with _rounding(work):
                buckets.setdefault(work.bucket(self.arch), []).append(work)
        missing: list[str] = []
        for key, members in buckets.items():
            if self.left() <= 0 or not self.search(key, members):
                missing.append(key)
        return missing


@contextmanager
def _rounding(work: Workload) -> Iterator[None]:
    """float32 is multiplied as the workload says."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if work.precision == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def report(tuner: Tuner, missing: list[str]) -> str:
    """What was found, bucket by bucket."""
    lines = []
    for key, row in tuner.rows.items():
        if not row.get("done"):
            continue
        dropped = sum("dropped" in r for r in row["candidates"].values())
        gain = "its start was dropped" if row["gain"] is None else f"{row['gain']:.2f}x"
        what = ", ".join(f"{name} {value}" for name, value in row["best"].items())
        lines.append(f"{key}: {what} ({gain}; {len(row['candidates'])} tried, {dropped} dropped)")
    lines += [f"{key}: no time left" for key in missing]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="the time box")
    parser.add_argument("--table", type=Path, help="the file of launches to write (default: the shipped one)")
    parser.add_argument("--journal", type=Path, help="what was measured (default: beside the table)")
    parser.add_argument("--only", default="", help="buckets whose key starts with this")
    parser.add_argument("--list", action="store_true", help="print what would be measured, and end")
    parser.add_argument("--dry-run", action="store_true", help="tiny layers on the CPU, interpreted")
    options = parser.parse_args(arguments)
    works = tiny() if options.dry_run else workloads()
    cuda = torch.cuda.is_available() and not options.dry_run
    arch = room.machine(torch.device("cuda"))[0] if cuda else "interpreter"
    works = [work for work in works if work.bucket(arch).startswith(options.only)]
    if options.list:
        for work in works:
            print(f"{work.bucket(arch)}: {work.name}")
        return 0
    if options.dry_run:
        if not backends.interpreted():
            parser.error("--dry-run: the kernels must be interpreted: TRITON_INTERPRET=1")
        if options.table is None:
            parser.error("--dry-run: --table must name a file: the shipped one is not for this")
    elif not cuda:
        print("bench.tune: no CUDA device", file=sys.stderr)
        return 2
    table = options.table or launches.SHIPPED
    journal = options.journal or table.with_suffix(".journal.json")
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    with torch.cuda.device(device) if cuda else nullcontext():
        tuner = Tuner(device, table, journal, minutes=options.minutes)
        try:
            missing = tuner.run(works)
        except DeviceLost as error:
            print(f"bench.tune: the device was lost ({error}); run this again to go on", file=sys.stderr)
            return 3
    print(report(tuner, missing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
