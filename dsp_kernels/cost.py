"""What a convolution should cost on a GPU, worked out on the host: the model behind the choice of a form.

A convolution of M output pixels is, for group g, a matrix product M x K_g by K_g x N_g, with K_g its channels
times taps and N_g its filters. Its time is taken as

    t = max(2 M sum_g K_pad N_pad / F, bytes / B, cached / C) + launch

with F the matrix rate, B the bandwidth and C the second-level cache's rate that a device reaches, K_pad and
N_pad the extents that a kernel works on (chunks of 8 channels that hold a channel of the group, rounded to
the K step; filters rounded to the tile of the launch that would run), the bytes of input, output, residual
and weights, each moved once (a roofline with padding: Williams et al., "Roofline", CACM 2009), and what
passes through the cache: output, residual, and what tiles copy, each its pixels and its weights again, at
every tap (:meth:`dsp_kernels.conv.launches.Launch.read`). Four forms are weighed:

``grouped``  one launch of the grouped Triton kernel, each group with its own channels
``cuda``     the compiled CUDA kernels: filters in eights, channels by aligned runs or by a gather
``merged``   the Triton kernel with one group: all live filters over all channels that somebody reads
``torch``    torch's dense convolution, by tiles of TORCH_TILE, and residual and activation in passes of their
             own

For ``cuda`` the compute term is that of its own table (:mod:`dsp_kernels.conv.cuda_work`): whole blocks of
128 pixels, halos copied once for all taps that share them, and the rate of ``mma.sync``. It is weighed for
the report alone: :func:`choose_form` takes it by measurement only, as nothing of it was seen on a device, and
what it copies from the cache is not counted.

The *floor* is what the structure needs on that device whoever computes it: true multiply-adds, the bytes of
the memory sectors that hold what is read, no padding, no launch. No figure here is a measurement.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from .conv.cuda_work import CudaWork, cuda_work
from .conv.launches import Launch
from .conv.shapes import output_size
from .conv.tiles import CHUNK, aligned_runs, cover
from .conv.triton import choose_launch
from .layout import GroupLayout

__all__ = [
    "FORMS",
    "MEASURED_ONLY",
    "Choice",
    "Conv",
    "Device",
    "Estimate",
    "FormTable",
    "Padding",
    "chain_estimate",
    "choose_form",
    "device",
    "devices",
    "estimate",
    "floor",
    "launch_of",
    "merged_layout",
    "moved",
    "padding",
]

FORMS = ("grouped", "cuda", "merged", "torch")
MEASURED_ONLY = ("cuda",)  # never chosen by prediction

_DATA = Path(__file__).with_name("devices.json")
_SHIPPED = Path(__file__).with_name("forms.json")
SECTOR = 32  # bytes of DRAM that come together
PIXELS = 128  # of a tile, where no launch is known
# Pixels and filters of a tile of cuDNN's, from sm_90 on and before: assumed, the largest usual ones.
TORCH_TILE = ((256, 128), (128, 128))
NARROW = 4  # bytes that an asynchronous copy has at least
# What mma.sync reaches of the matrix rate where that is wgmma's or tcgen05's: Luo et al., "Benchmarking and
# Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499, for sm_90; taken for newer ones too.
MMA_SYNC = 0.63
CUDA_BLOCKS = 3  # blocks of threads a multiprocessor that the CUDA kernels split sums for


# ---- devices ----


@dataclass(frozen=True)
class Device:
    """A GPU as the model sees it: ``bandwidth`` (bytes/s) and ``matrix`` (FLOP/s by "float16", "bfloat16",
    "tf32", "float32") as published, ``share_bandwidth`` and ``share_matrix`` the parts of them that kernels
    are taken to reach; ``l2_bandwidth`` bytes/s from the second-level cache, assumed or measured;
    ``shared_memory`` bytes a block may use; ``launch`` and ``launch_eager`` seconds from
    one kernel to the next in a CUDA graph and from Python.
    """

    name: str
    arch: str
    sms: int
    bandwidth: float
    l2_bandwidth: float
    matrix: Mapping[str, float] = field(hash=False)
    shared_memory: int
    l2: int
    source: str
    match: tuple[str, ...]
    share_bandwidth: float
    share_matrix: float
    launch: float
    launch_eager: float

    def bytes_per_second(self) -> float:
        return self.bandwidth * self.share_bandwidth

    def flops_per_second(self, dtype: torch.dtype, *, tf32: bool = False) -> float:
        """The matrix rate counted on for ``dtype``. Raises ValueError for one without matrix instructions."""
        if dtype == torch.float32:
            # IEEE float32 has no matrix instructions: the published rate is the ordinary units'.
            return self.matrix["tf32" if tf32 else "float32"] * self.share_matrix
        name = str(dtype).removeprefix("torch.")
        if name not in self.matrix:
            raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
        return self.matrix[name] * self.share_matrix

    def measured(
        self, bandwidth: float, matrix: Mapping[str, float], l2_bandwidth: float | None = None
    ) -> Device:
        """The same device with measured ceilings (bytes/s, FLOP/s) in place of assumed ones.

        Rates that ``matrix`` does not name stay the published ones times the assumed share; without
        ``l2_bandwidth`` (bytes/s) that one stays assumed.
        """
        rates = {k: matrix.get(k, v * self.share_matrix) for k, v in self.matrix.items()}
        cache = self.l2_bandwidth if l2_bandwidth is None else l2_bandwidth
        return replace(
            self,
            bandwidth=bandwidth,
            l2_bandwidth=cache,
            matrix=rates,
            share_bandwidth=1.0,
            share_matrix=1.0,
        )


@cache
def devices() -> dict[str, Device]:
    """The devices of the shipped table (``dsp_kernels/devices.json``, with sources), by name."""
    data = json.loads(_DATA.read_text(encoding="utf-8"))
    return {
        row["name"]: Device(
            name=row["name"],
            arch=row["arch"],
            sms=row["sms"],
            bandwidth=row["bandwidth"],
            l2_bandwidth=row["l2_bandwidth"],
            matrix=dict(row["matrix"]),
            shared_memory=row["shared_memory"],
            l2=row["l2"],
            source=row["source"],
            match=tuple(row["match"]),
            share_bandwidth=data["share_bandwidth"],
            share_matrix=data["share_matrix"],
            launch=1e-6 * data["launch_us"],
            launch_eager=1e-6 * data["launch_eager_us"],
        )
        for row in data["devices"]
    }


def device(which: str | torch.device) -> Device:
    """A device of the table, by name ("H200"), by architecture ("sm_90": the first of it), or the CUDA device
    at hand. An unknown CUDA device gets the figures of the nearest architecture not above its own.

    Raises ValueError, with what is accepted, for another name; for a torch device that is no CUDA device.
    """
    table = devices()
    if isinstance(which, torch.device):
        if which.type != "cuda":
            raise ValueError(f"device must be a CUDA device, got {which}")
        major, minor = torch.cuda.get_device_capability(which)
        return match_device(torch.cuda.get_device_name(which), f"sm_{major}{minor}")
    if which in table:
        return table[which]
    for entry in table.values():
        if entry.arch == which:
            return entry
    raise ValueError(
        f"device must be one of {', '.join(table)}, or an architecture "
        f"({', '.join(dict.fromkeys(d.arch for d in table.values()))}), got {which!r}"
    )


def match_device(name: str, arch: str) -> Device:
    """The table's entry for the name that a driver gives and an architecture like "sm_90"."""
    table = list(devices().values())
    for entry in table:
        if entry.arch == arch and any(re.search(rf"\b{re.escape(part)}\b", name) for part in entry.match):
            return entry

    below = [d for d in table if _number(d.arch) <= _number(arch)]
    nearest = (
        max(below, key=lambda d: _number(d.arch)) if below else min(table, key=lambda d: _number(d.arch))
    )
    nearest = next(d for d in table if d.arch == nearest.arch)
    return replace(nearest, name=f"{name} (figures of {nearest.name})", arch=arch)


# ---- convolutions ----


def _two(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


@dataclass(frozen=True)
class Conv:
    """One convolution at one image size: ``batch`` images of ``size`` (height, width) pixels; the rest as in
    :func:`~dsp_kernels.permuted_grouped_conv2d`, each of the geometry's numbers as (vertical, horizontal).
    """

    layout: GroupLayout
    batch: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    residual: bool = False
    activation: str | None = None

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def out_size(self) -> tuple[int, int]:
        shape = (self.batch, self.layout.in_channels, *self.size)
        return output_size(shape, self.kernel, self.stride, self.padding, self.dilation)

    @property
    def pixels(self) -> int:
        """Output pixels, M."""
        height, width = self.out_size
        return self.batch * height * width

    @property
    def pixels_read(self) -> int:
        """Input pixels that some output pixel reads: a 1x1 with stride 2 reads a quarter."""
        total = self.batch
        for extent, out, k, s, p, d in zip(
            self.size, self.out_size, self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            read = {i * s - p + t * d for i in range(out) for t in range(k)}
            total *= sum(0 <= position < extent for position in read)
        return total

    @property
    def flops(self) -> int:
        """What the structure needs: 2 for each packed weight at each output pixel."""
        return 2 * self.layout.pairs * self.taps * self.pixels

    def key(self, dtype: torch.dtype) -> str:
        """The convolution as a text that names it in a table of measured forms."""
        layout = self.layout
        crc = zlib.crc32(layout.plan().numpy().tobytes())
        parts = [
            str(dtype).removeprefix("torch."),
            f"{self.batch}x{self.size[0]}x{self.size[1]}",
            f"{layout.in_channels}>{layout.out_channels}",
            "k{}x{}".format(*self.kernel),
            "s{}x{}".format(*self.stride),
            "p{}x{}".format(*self.padding),
            "d{}x{}".format(*self.dilation),
            f"g{len(layout.groups)}",
            f"{crc:08x}",
        ]
        if self.residual:
            parts.append("residual")
        if self.activation:
            parts.append(self.activation)
        return " ".join(parts)


def merged_layout(layout: GroupLayout) -> GroupLayout:
    """One group of all live filters over all channels that one of them reads."""
    if not layout.live_filters:
        return layout
    return GroupLayout(layout.in_channels, layout.out_channels, [(layout.used_channels, layout.live_filters)])


@dataclass(frozen=True)
class Padding:
    """The extents that a kernel works on: per group with filters (K = channels x taps, filters, K padded,
    filters padded to tiles of ``block_n``), and the stretches of whole chunks that all groups read.
    """

    groups: tuple[tuple[int, int, int, int], ...]
    runs: int
    block_n: int

    @property
    def macs(self) -> int:
        """Multiply-adds of an output pixel with the padding."""
        return sum(k * n for _, _, k, n in self.groups)

    @property
    def waste(self) -> float:
        """The fraction of the padded products that nobody asked for."""
        true = sum(k * n for k, n, _, _ in self.groups)
        return 1 - true / self.macs if self.macs else 0.0


@lru_cache(maxsize=4096)
def padding(layout: GroupLayout, taps: int, launch: Launch) -> Padding:
    """The extents of a layout as :mod:`dsp_kernels.conv.tiles` cuts it for a launch: chunks of 8 channels at
    each tap packed into steps of ``BLOCK_K``; tiles of ``BLOCK_N`` filters.
    """
    align = math.gcd(CHUNK, layout.in_channels)
    groups, stretches = [], 0
    for channels, filters in layout.groups:
        if not filters:
            continue
        chunks = cover(sorted(channels), layout.in_channels, align)
        steps = math.ceil(CHUNK * len(chunks) * taps / launch.BLOCK_K)
        stretches += len(aligned_runs(channels, layout.in_channels, align))
        width = launch.BLOCK_N * math.ceil(len(filters) / launch.BLOCK_N)
        groups.append((len(channels) * taps, len(filters), steps * launch.BLOCK_K, width))
    return Padding(tuple(groups), stretches, launch.BLOCK_N)


@lru_cache(maxsize=4096)
def launch_of(layout: GroupLayout, kernel: tuple[int, int], pixels: int, precision: str, arch: str) -> Launch:
    """The launch of the Triton kernel for a convolution; ``precision``: "half", "tf32" or "ieee"."""
    return choose_launch("conv", precision, layout, kernel, pixels, arch)


def _launch_of(conv: Conv, where: Device, dtype: torch.dtype, tf32: bool) -> Launch:
    precision = "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"
    return launch_of(conv.layout, conv.kernel, conv.pixels, precision, where.arch)


# ---- estimates ----


@dataclass(frozen=True)
class Estimate:
    """A predicted time and what it is made of: ``seconds`` with ``launches`` kernels' overhead inside,
    ``flops`` padded, ``bytes`` moved.
    """

    form: str
    seconds: float
    flops: float
    bytes: float
    compute: float
    memory: float
    launches: int
    waste: float
    cache: float = 0.0

    @property
    def bound(self) -> str:
        """What the time is made of: "compute", "memory", "cache" (the second-level one) or "launch"."""
        work = max(self.compute, self.memory, self.cache)
        if self.seconds - work > work:
            return "launch"
        return "compute" if self.compute == work else "memory" if self.memory == work else "cache"


def _sectors(channels: Sequence[int], total: int, size: int) -> int:
    """Bytes of one pixel, in NHWC, that come from memory when these channels of it are read."""
    if (total * size) % SECTOR:
        return total * size  # pixels share sectors: nothing can be left out
    return SECTOR * len({c * size // SECTOR for c in channels})


def moved(conv: Conv, size: int, *, whole: bool = False) -> float:
    """Bytes of a convolution, ``size`` an element: input, output, residual and weights, each once.

    Of the input, the pixels that some output pixel reads and the sectors that hold a channel that somebody
    reads; ``whole``: all channels, as a dense convolution reads them.
    """
    layout = conv.layout
    read = range(layout.in_channels) if whole else layout.used_channels
    out = conv.pixels * layout.out_channels * size
    pixel = _sectors(read, layout.in_channels, size)
    weights = layout.pairs * conv.taps * size
    return float(conv.pixels_read * pixel + out * (2 if conv.residual else 1) + weights)


def _share(conv: Conv, tiles_of_filters: int, where: Device, rows: int = PIXELS) -> float:
    """The part of the machine that the tiles of a launch occupy, of ``rows`` pixels each. Work smaller than
    that is split over K by the kernel; at most in four.
    """
    tiles = math.ceil(conv.pixels / rows) * max(1, tiles_of_filters)
    return min(1.0, 4 * tiles / where.sms)


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def _cuda_work(conv: Conv, size: int) -> CudaWork:
    return cuda_work(
        conv.layout, size, conv.batch, conv.size, conv.kernel, conv.stride, conv.padding, conv.dilation
    )


def estimate(
    conv: Conv, where: Device, dtype: torch.dtype, form: str, *, tf32: bool = False, eager: bool = False
) -> Estimate:
    """The predicted time of one form of a convolution on a device.

    ``eager``: kernels are launched from Python, not by a graph. Raises ValueError for an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    size = torch.empty(0, dtype=dtype, device="meta").element_size()
    rate = where.flops_per_second(dtype, tf32=tf32)
    layout, launches = conv.layout, 1
    if form == "cuda":
        made = _cuda_work(conv, size)
        blocks = made.blocks * made.splits(CUDA_BLOCKS * where.sms)
        if dtype != torch.float32 or tf32:
            rate *= MMA_SYNC if _number(where.arch) >= 90 else 1.0
        flops = 2.0 * made.multiply_adds
        compute = 2.0 * made.effort / rate / min(1.0, max(1, blocks) / where.sms)
        bytes_moved = moved(conv, size) + max(0, made.weights - layout.pairs * conv.taps) * size
        return _estimate(form, conv, where, flops, bytes_moved, compute, launches, eager)
    if form == "torch":
        pairs = layout.in_channels * layout.out_channels
        bytes_moved = moved(replace(conv, residual=False), size, whole=True)
        bytes_moved += (pairs - layout.pairs) * conv.taps * size
        out = conv.pixels * layout.out_channels * size
        if conv.residual:
            bytes_moved, launches = bytes_moved + 3 * out, launches + 1
        if conv.activation:
            bytes_moved, launches = bytes_moved + 2 * out, launches + 1
        macs, n_tiles = pairs * conv.taps, math.ceil(layout.out_channels / 64)
        rows, columns = TORCH_TILE[0 if _number(where.arch) >= 90 else 1]
        columns = min(columns, max(32, 1 << (layout.out_channels - 1).bit_length()))
        reads = layout.in_channels * conv.taps * math.ceil(layout.out_channels / columns)
        copied = conv.pixels * reads * (1 + columns / rows) * size
        rows = PIXELS
    else:
        if form == "merged":
            layout = merged_layout(layout)
        launch = _launch_of(replace(conv, layout=layout), where, dtype, tf32)
        used = padding(layout, conv.taps, launch)
        rows, macs, n_tiles = launch.BLOCK_M, used.macs, sum(n // used.block_n for *_, n in used.groups)
        bytes_moved = moved(conv, size) + (macs - conv.layout.pairs * conv.taps) * size
        reads = sum(k * (n // used.block_n) for *_, k, n in used.groups)
        # Input pixels of an output pixel, and the rows beside a tile's that other taps reach.
        halo = conv.pixels_read / conv.pixels if conv.pixels else 1.0
        halo += (conv.kernel[0] - 1) * conv.dilation[0] * conv.size[1] / rows
        copied = rows * math.ceil(conv.pixels / rows) * reads * launch.read(conv.taps, halo) * size
    flops = 2.0 * macs * conv.pixels
    compute = flops / rate / _share(conv, n_tiles, where, rows)
    passed = bytes_moved - moved(replace(conv, residual=False), size, whole=form == "torch")
    passed += conv.pixels * layout.out_channels * size
    return _estimate(form, conv, where, flops, bytes_moved, compute, launches, eager, copied + passed)


def _estimate(
    form: str,
    conv: Conv,
    where: Device,
    flops: float,
    bytes_moved: float,
    compute: float,
    launches: int,
    eager: bool,
    cached: float = 0.0,
) -> Estimate:
    memory, cache = bytes_moved / where.bytes_per_second(), cached / where.l2_bandwidth
    overhead = launches * (where.launch_eager if eager else where.launch)
    waste = 1 - conv.flops / flops if flops else 0.0
    return Estimate(
        form,
        max(compute, memory, cache) + overhead,
        flops,
        bytes_moved,
        compute,
        memory,
        launches,
        waste,
        cache,
    )


def floor(conv: Conv, where: Device, dtype: torch.dtype, *, tf32: bool = False) -> float:
    """Seconds that the structure needs on a device: true multiply-adds, whole sectors, no padding."""
    size = torch.empty(0, dtype=dtype, device="meta").element_size()
    return max(
        conv.flops / where.flops_per_second(dtype, tf32=tf32),
        moved(conv, size) / where.bytes_per_second(),
    )


def chain_estimate(
    convs: Sequence[Conv],
    kept: Sequence[bool],
    where: Device,
    dtype: torch.dtype,
    *,
    exact: bool = False,
    macs: int | None = None,
    copied: float = 0.0,
    tf32: bool = False,
) -> Estimate:
    """One kernel for several convolutions in a row, each reading what the one before it gives.

    ``kept``: for each whether its output is written to memory (the last one's always is). Multiply-adds add
    up; an intermediate value costs its writing where it is kept, and no reading. ``exact``: the floor: no
    padding, no launch. ``macs``: multiply-adds of an output pixel as a kernel does them, padding and all
    (each convolution's own padding, if None). ``copied``: elements that tiles copy from the second-level
    cache for each output pixel, weights and taps again and again; what is read and written once passes
    through it besides. The halo of a 3x3 is not counted among the bytes from memory.

    Raises ValueError where ``kept`` is of another length than ``convs``, or both are empty.
    """
    if not convs or len(kept) != len(convs):
        raise ValueError(f"kept must say of each of {len(convs)} convolutions whether it is written")
    size = torch.empty(0, dtype=dtype, device="meta").element_size()
    flops = bytes_moved = 0.0
    true = sum(conv.flops for conv in convs)
    for i, conv in enumerate(convs):
        layout = conv.layout
        work = layout.pairs * conv.taps
        if not exact and macs is None:
            work = padding(layout, conv.taps, _launch_of(conv, where, dtype, tf32)).macs
        flops += 2.0 * work * conv.pixels
        out = conv.pixels * layout.out_channels * size
        part = moved(conv, size) + (work - layout.pairs * conv.taps) * size
        if i > 0:
            part -= moved(replace(conv, residual=False), size)
            part += out + layout.pairs * conv.taps * size
        if not (kept[i] or i == len(convs) - 1):
            part -= out
        bytes_moved += part
    if macs is not None and not exact:
        flops = 2.0 * macs * convs[0].pixels
    compute, memory = flops / where.flops_per_second(dtype, tf32=tf32), bytes_moved / where.bytes_per_second()
    launch = 0.0 if exact else where.launch
    cache = 0.0
    if not exact:
        once = bytes_moved - moved(replace(convs[0], residual=False), size)
        cache = (convs[0].pixels * copied * size + once) / where.l2_bandwidth
    return Estimate(
        "chain",
        max(compute, memory, cache) + launch,
        flops,
        bytes_moved,
        compute,
        memory,
        1,
        1 - true / flops if flops else 0.0,
        cache,
    )


# ---- choice ----


class FormTable:
    """Measured times of forms: architecture -> convolution (:meth:`Conv.key`) -> form -> microseconds.

    Written by the device run (``make gpu``); the package ships ``forms.json`` where there are measurements.
    """

    def __init__(self, times: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None) -> None:
        self.times: dict[str, dict[str, dict[str, float]]] = {
            arch: {key: dict(forms) for key, forms in rows.items()} for arch, rows in (times or {}).items()
        }

    @classmethod
    def load(cls, path: str | Path) -> FormTable:
        """Reads a table. Raises ValueError, naming the file, for anything that is none."""
        try:
            data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            for rows in data.values():
                for forms in rows.values():
                    for form, value in forms.items():
                        if not isinstance(value, (int, float)) or not value > 0 or not math.isfinite(value):
                            raise ValueError(f"{form}: {value!r} is no time")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not a table of measured forms: {error}") from None
        return cls(data)

    @classmethod
    def shipped(cls) -> FormTable:
        """The package's own measurements; empty where there are none."""
        return cls.load(_SHIPPED) if _SHIPPED.exists() else cls()

    def add(self, arch: str, key: str, form: str, microseconds: float) -> None:
        self.times.setdefault(arch, {}).setdefault(key, {})[form] = microseconds

    def find(self, arch: str, key: str) -> Mapping[str, float]:
        return self.times.get(arch, {}).get(key, {})

    def to_json(self) -> str:
        return json.dumps(self.times, indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Choice:
    """The form chosen for a layer, why, what all forms were taken to need, and the microseconds of those that
    were measured, where the choice goes by them.
    """

    form: str
    reason: str
    measured: bool
    estimates: Mapping[str, Estimate] = field(hash=False)
    floor: float
    padding: Padding
    times: Mapping[str, float] = field(hash=False, default_factory=dict)

    @property
    def seconds(self) -> float:
        return 1e-6 * self.times[self.form] if self.measured else self.estimates[self.form].seconds


def choose_form(
    conv: Conv,
    where: Device,
    dtype: torch.dtype,
    *,
    table: FormTable | None = None,
    forms: Sequence[str] = FORMS,
    refused: Mapping[str, str] | None = None,
    tf32: bool = False,
    eager: bool = False,
) -> Choice:
    """The form to run: the fastest that was measured, where ``table`` has at least two of ``forms`` for this
    very convolution on this architecture; otherwise the fastest by the model, ``cuda`` left out, and
    ``torch`` where the channels of a pixel are so few that copies of them cannot be asynchronous.

    ``refused``: forms that cannot run here, each with its reason; they are weighed and not chosen. Raises
    ValueError where ``forms`` names none that could be chosen.
    """
    estimates = {f: estimate(conv, where, dtype, f, tf32=tf32, eager=eager) for f in forms}
    if not estimates:
        raise ValueError("forms must name at least one form")
    refused = refused or {}
    used = padding(conv.layout, conv.taps, _launch_of(conv, where, dtype, tf32))
    bottom = floor(conv, where, dtype, tf32=tf32)
    found = table.find(where.arch, conv.key(dtype)) if table is not None else {}
    times = {f: found[f] for f in forms if f in found}
    can = [f for f in times if f not in refused]
    if len(times) >= 2 and can:
        best = min(can, key=times.__getitem__)
        others = ", ".join(f"{f} {t:.1f} us" for f, t in times.items() if f != best)
        reason = f"measured: {best} {times[best]:.1f} us, {others}"
        for f in times:
            if f in refused and times[f] < times[best]:
                reason += f"; {f} cannot run here: {refused[f]}"
        return Choice(best, reason, True, estimates, bottom, used, times)
    left = {f: e for f, e in estimates.items() if f not in MEASURED_ONLY and f not in refused}
    if not left:
        why = [f"{f}: {refused.get(f, 'runs only where it was measured to be fastest')}" for f in estimates]
        raise ValueError(f"none of the forms can be chosen for this convolution ({'; '.join(why)})")
    size = torch.empty(0, dtype=dtype, device="meta").element_size()
    width = math.gcd(CHUNK, conv.layout.in_channels) * size
    if width < NARROW and "torch" in left:
        reason = (
            f"pixels of {conv.layout.in_channels} channels: the kernel would load {width} bytes at a time"
        )
        return Choice("torch", reason, False, estimates, bottom, used)
    best = min(left, key=lambda f: left[f].seconds)
    if best == "grouped" and len(used.groups) <= 1:
        reason = "one group"
    else:
        mine = left.pop(best)
        reason = f"predicted, {mine.bound}-bound"
        if left:
            next_best = min(left, key=lambda f: left[f].seconds)
            gain = left[next_best].seconds / mine.seconds
            reason += f"; {gain:.2f}x against {next_best}"
    return Choice(best, reason, False, estimates, bottom, used)
