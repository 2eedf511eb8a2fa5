"""Latency as a target: what to remove so that the packed network takes a given share of the dense one's time.

Every prunable layer is timed on the device at hand at a few numbers of kept channels per group. These curves
and the importance of channels say what each layer may lose: the search maximises the importance kept, summed
over layers as logarithms so that no layer is emptied, for a predicted time. Then the network itself is packed
and timed against the dense one, the prediction corrected, and the search repeated until they agree.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsp_kernels import GroupLayout
from dsp_kernels.backends import choose, native_module
from dsp_kernels.program import Program

from .clock import interleaved
from .graph import evaluating
from .io import write_atomically
from .nn import PermutedGroupedConv2d

__all__ = ["Curve", "CurveCache", "Latency", "LayerShape", "cache_file", "interleaved", "measure_curve"]

AGAINST = ("eager", "packed")
TOLERANCE = 0.1  # what "met" means, of the target
NEAR = 0.1  # where a quick measurement is checked by a second one, at leisure,
SETTLED = 0.05  # and where the search then stops: half of the tolerance is left to whoever measures again
LEISURE = 4  # how much longer that one takes
ROUNDS = 8
KEPT = (0.125, 0.25, 0.5, 0.75, 1.0)  # fractions of each group's channels at which layers are timed
THRESHOLDS = tuple(i / 48 for i in range(47))
CACHE_VERSION = 1


@dataclass(frozen=True)
class Latency:
    """What a latency target came to. Times in milliseconds, of calls that took turns.

    ``target``, ``predicted`` and ``measured`` are fractions of ``dense_ms``, the time of the dense network:
    as it is (``against="eager"``) or packed without pruning (``"packed"``). ``rounds`` is how often a network
    was packed and timed.
    """

    target: float
    predicted: float
    measured: float
    dense_ms: float
    packed_ms: float
    against: str
    batch: int
    threads: int
    device: str
    rounds: int

    @property
    def met(self) -> bool:
        """Whether the measured time is the target's within a tenth, or below it."""
        return self.measured <= self.target * (1 + TOLERANCE)

    def __str__(self) -> str:
        return (
            f"latency, batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}, "
            f"{self.device}: target {self.target:.3f} of the dense network ({self.against}), "
            f"predicted {self.predicted:.3f}, measured {self.measured:.3f} "
            f"({self.dense_ms:.3f} ms to {self.packed_ms:.3f} ms, {self.rounds} rounds)"
        )

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Latency:
        """Raises KeyError, TypeError or ValueError where ``data`` is something else."""
        kinds = {name: field.type for name, field in cls.__dataclass_fields__.items()}
        convert: dict[Any, Callable[[Any], Any]] = {"float": float, "int": int, "str": str}
        return cls(**{name: convert[kind](data[name]) for name, kind in kinds.items()})


# ---- curves of layers ----


@dataclass(frozen=True)
class LayerShape:
    """A packed layer but for its channels: what its time depends on besides.

    ``input_size`` (batch, height, width); ``filters`` the sizes of its groups of filters.
    """

    in_channels: int
    out_channels: int
    input_size: tuple[int, int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    filters: tuple[int, ...]


@dataclass(frozen=True)
class Curve:
    """Milliseconds of a layer by the fraction of (filter, channel) pairs kept, straight between points."""

    points: tuple[tuple[float, float], ...]

    def __call__(self, kept: float) -> float:
        if kept <= 0:
            return 0.0
        before = (0.0, 0.0)
        for point in self.points:
            if kept <= point[0]:
                part = (kept - before[0]) / (point[0] - before[0])
                return before[1] + part * (point[1] - before[1])
            before = point
        return before[1] * kept / before[0]


def _layout(shape: LayerShape, kept: int) -> GroupLayout:
    """Every group reads ``kept`` channels, as evenly spread as a random choice would be, each its own."""
    generator = torch.Generator().manual_seed(0)
    groups, first = [], 0
    for size in shape.filters:
        channels = torch.randperm(shape.in_channels, generator=generator)[:kept].sort().values.tolist()
        groups.append((channels, range(first, first + size)))
        first += size
    return GroupLayout(shape.in_channels, shape.out_channels, groups)


def _layer_call(
    shape: LayerShape, kept: int, device: torch.device, dtype: torch.dtype, backend: str | None
) -> Callable[[], Any]:
    layout = _layout(shape, kept)
    batch, height, width = shape.input_size
    x = torch.randn(batch, shape.in_channels, height, width, device=device, dtype=dtype)
    layer = PermutedGroupedConv2d(
        layout,
        shape.kernel_size,
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        activation="relu",
        backend=backend,
        device=device,
        dtype=dtype,
    ).eval()
    if device.type == "cpu" and dtype == torch.float32 and choose(backend, "cpu", dtype) == "native":
        program = Program((shape.in_channels, height, width))
        y = program.conv(
            program.input,
            layer.weight,
            layout,
            layer.bias,
            kernel_size=shape.kernel_size,
            stride=shape.stride,
            padding=shape.padding,
            dilation=shape.dilation,
            activation="relu",
        )
        program.build(y)
        return lambda: program(x)
    return lambda: layer(x)


def measure_curve(
    shape: LayerShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    backend: str | None = None,
    seconds: float = 0.02,
) -> Curve:
    """Times a packed layer with ReLU at several numbers of kept channels per group: an eighth, a quarter, a
    half, three quarters and all of its input channels.

    Args:
        shape: the layer. Random weights and images; each group of filters reads channels of its own, drawn at
            random and the same each time.
        device, dtype: where it runs, and in which precision. float32 on the native backend of a CPU is timed
            as a program, which is how packed networks run there.
        backend: as for ``dsp_kernels.permuted_grouped_conv2d``; None: the one that is chosen here.
        seconds: spent on each number of channels, more than 0.

    Returns:
        A curve in milliseconds of a whole batch. Times that fall with more channels, which is noise, are
        taken for equal.

    Raises:
        TypeError, ValueError: a ``backend`` that cannot run here, ``seconds`` that are not above 0, or a
        shape that is none of a convolution.
    """
    counts = sorted({max(1, round(fraction * shape.in_channels)) for fraction in KEPT})
    calls = [_layer_call(shape, count, device, dtype, backend) for count in counts]
    times = interleaved(calls, device, seconds=seconds)
    points, least = [], 0.0
    for count, value in zip(counts, times, strict=True):
        least = max(least, value)
        points.append((count / shape.in_channels, least))
    return Curve(tuple(points))


# ---- the cache ----


def cache_file() -> Path:
    """Where curves are kept unless told otherwise: ``dsprune/latency.json`` in the user's cache folder
    (``XDG_CACHE_HOME``, else ``~/.cache``).
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "dsprune" / "latency.json"


def device_name(device: torch.device) -> str:
    """The processor or graphics device as it names itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class CurveCache:
    """Curves in a JSON file, by device, dtype, threads, backend, version and shape; times in milliseconds.

    The file is read once, when this is made, and written whole or not at all by ``write``, which first takes
    in what other processes wrote meanwhile. A file that is broken or of another version is not used, and is
    replaced; one that cannot be written gives a warning. Nothing here raises because of the file.

    Args:
        path: the file; its folder is made where it is missing. None keeps curves in memory alone.

    Attributes:
        entries: the points of each curve known, (fraction of pairs kept, milliseconds), by key.
        measured: those of them that ``write`` has not stored yet.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.entries = self._read()
        self.measured: dict[str, list[list[float]]] = {}

    def _read(self) -> dict[str, list[list[float]]]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["version"] != CACHE_VERSION:
                return {}
            return {
                str(key): [[float(x), float(y)] for x, y in points] for key, points in data["curves"].items()
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}

    @staticmethod
    def key(shape: LayerShape, device: torch.device, dtype: torch.dtype, backend: str | None) -> str:
        """What a curve depends on, as text. Raises ValueError where ``backend`` cannot run here."""
        chosen = choose(backend, device.type, dtype)
        version = native_module().build_info() if chosen == "native" else torch.__version__
        parts = {
            "device": device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads() if device.type == "cpu" else 0,
            "backend": chosen,
            "build": version,
            "shape": asdict(shape),
        }
        return json.dumps(parts, sort_keys=True, default=str)

    def curve(
        self, shape: LayerShape, device: torch.device, dtype: torch.dtype, backend: str | None = None
    ) -> Curve:
        """The curve kept for this shape, or one measured now.

        Arguments and errors as for ``measure_curve``.
        """
        key = self.key(shape, device, dtype, backend)
        if key not in self.entries:
            curve = measure_curve(shape, device, dtype, backend=backend)
            self.entries[key] = self.measured[key] = [list(point) for point in curve.points]
        return Curve(tuple((x, y) for x, y in self.entries[key]))

    def write(self) -> None:
        """Adds what was measured to the file; a warning where it cannot be written."""
        if self.path is None or not self.measured:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = {"version": CACHE_VERSION, "curves": {**self._read(), **self.measured}}
            write_atomically(self.path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())
            self.measured = {}
        except OSError as error:
            warnings.warn(f"layer times are not kept: {error}", stacklevel=3)


def as_cache(cache: Any) -> CurveCache:
    """The cache that the argument of ``find_structure`` stands for."""
    if isinstance(cache, CurveCache):
        return cache
    if cache is True:
        return CurveCache(cache_file())
    if cache is False or cache is None:
        return CurveCache(None)
    if isinstance(cache, (str, os.PathLike)):
        return CurveCache(Path(cache))
    raise TypeError(f"cache: expected a path, True or False, got {cache!r}")


# ---- the search ----


@dataclass
class Candidate:
    """What a layer keeps at one threshold: its mask, the logarithm of the importance kept, its time."""

    threshold: float
    mask: torch.Tensor
    kept: float
    time: float


def choose_candidates(layers: Mapping[str, Sequence[Candidate]], price: float) -> dict[str, Candidate]:
    """Per layer what keeps the most importance less ``price`` (logarithms per ms) times its time."""
    return {
        name: max(options, key=lambda c: (c.kept - price * c.time, -c.threshold))
        for name, options in layers.items()
    }


@dataclass
class Search:
    """The search of ``find_structure(latency=...)``; ``structure.py`` gives it the rule and the counting.

    ``layers`` holds each layer's candidates; ``time_of(masks)`` predicts the milliseconds of the prunable
    layers with liveness counted in; ``build(masks)`` packs the network.
    """

    layers: Mapping[str, Sequence[Candidate]]
    time_of: Callable[[Mapping[str, torch.Tensor]], float]
    build: Callable[[Mapping[str, torch.Tensor]], nn.Module]
    dense: nn.Module
    inputs: tuple[Any, ...]
    against: str
    device: torch.device
    seconds: float = 0.25

    def run(self, target: float) -> tuple[dict[str, Candidate], Latency]:
        """What to keep for ``target``, and what it was measured to take."""
        everything = choose_candidates(self.layers, 0.0)
        packed = self.build(_masks(everything))
        with evaluating(self.dense), evaluating(packed):
            return self._run(target, everything, packed)

    def _time(self, packed: nn.Module, factor: int = 1) -> tuple[float, float]:
        """Milliseconds of the dense network, and the share of them that ``packed`` takes, in turns."""
        dense, given = interleaved(
            [lambda: self.reference(*self.inputs), lambda: packed(*self.inputs)],
            self.device,
            seconds=self.seconds * factor,
        )
        return dense, given / dense

    def _run(
        self, target: float, everything: dict[str, Candidate], packed: nn.Module
    ) -> tuple[dict[str, Candidate], Latency]:
        self.reference = self.dense if self.against == "eager" else packed
        rounds = 1
        dense_ms, whole = (self._time(packed)) if self.against == "eager" else (self._time(packed)[0], 1.0)
        if whole <= target:
            warnings.warn(
                f"latency: packing alone takes {whole:.3f} of the dense network's time, where {target} is "
                "asked for; nothing is removed",
                stacklevel=5,
            )
            return everything, self._latency(target, whole, whole, dense_ms, rounds)
        # All in shares of the dense time. What the curves do not cover (stem, shortcuts, pooling) is fixed.
        prunable = self.time_of(_masks(everything)) / dense_ms
        fixed = max(0.0, whole - prunable)
        scales = [(whole - fixed) / prunable if prunable > 0 else 1.0]
        best: tuple[tuple[bool, float], dict[str, Candidate], Latency] | None = None
        for _ in range(ROUNDS):
            scale = statistics.fmean(scales[-3:])
            chosen, layer_ms, possible = self._cheapest(max(0.0, target - fixed) / scale * dense_ms)
            predicted = fixed + scale * layer_ms / dense_ms
            packed = self.build(_masks(chosen))
            rounds += 1
            now_ms, share = self._time(packed)
            # Stopping at a quick measurement would choose the one that noise brought nearest.
            checked = abs(share - target) <= NEAR * target
            if checked:
                now_ms, share = self._time(packed, LEISURE)
            found = self._latency(target, predicted, share, now_ms, rounds)
            error = abs(share - target) / target
            if best is None or (error > TOLERANCE, error) < best[0]:
                best = ((error > TOLERANCE, error), chosen, found)
            if checked and error <= SETTLED:
                break
            if not possible and share > target * (1 + TOLERANCE):
                raise ValueError(
                    f"latency: expected at least {share:.3f}, what this assignment can reach here, "
                    f"got {target!r}"
                )
            if layer_ms > 0 and share > fixed:  # the first guess goes once there is a measurement
                scales = [*scales[int(rounds == 2) :], (share - fixed) * dense_ms / layer_ms]
            else:
                fixed = 0.9 * share
        assert best is not None
        (_, error), chosen, found = best
        if error > TOLERANCE:
            warnings.warn(
                f"latency: measured {found.measured:.3f} where {target} is asked for, after {rounds} rounds; "
                "the machine may be busy",
                stacklevel=5,
            )
        return chosen, found

    def _latency(self, target: float, predicted: float, share: float, dense: float, rounds: int) -> Latency:
        return Latency(
            target=target,
            predicted=predicted,
            measured=share,
            dense_ms=dense,
            packed_ms=share * dense,
            against=self.against,
            batch=next(int(v.shape[0]) for v in self.inputs if isinstance(v, torch.Tensor)),
            threads=torch.get_num_threads(),
            device=device_name(self.device),
            rounds=rounds,
        )

    def _cheapest(self, goal: float) -> tuple[dict[str, Candidate], float, bool]:
        """The choice that keeps most within ``goal`` ms, its predicted ms, and whether it is within.

        The price is bisected on the layers' own times; what liveness saves besides (dead filters and
        channels) is asked of the graph a few times and makes room.
        """
        room = goal
        for _ in range(4):
            chosen, within = self._within(room)
            spent = self.time_of(_masks(chosen))
            alone = sum(candidate.time for candidate in chosen.values())
            if not within or spent <= 0 or abs(spent - goal) <= 0.01 * goal:
                break
            room = min(goal * alone / spent, sum(options[0].time for options in self.layers.values()))
        return chosen, spent, within

    def _within(self, goal: float) -> tuple[dict[str, Candidate], bool]:
        def total(chosen: Mapping[str, Candidate]) -> float:
            return sum(candidate.time for candidate in chosen.values())

        chosen = choose_candidates(self.layers, 0.0)
        if total(chosen) <= goal:
            return chosen, True
        low, high = 0.0, 1.0
        chosen = choose_candidates(self.layers, high)
        while total(chosen) > goal:
            if high > 1e12:
                return chosen, False
            low, high = high, high * 4
            chosen = choose_candidates(self.layers, high)
        while high - low > 1e-4 * high:
            middle = (low + high) / 2
            tried = choose_candidates(self.layers, middle)
            if total(tried) <= goal:
                chosen, high = tried, middle
            else:
                low = middle
        # Between two prices whole steps are left over: layers get back what there is room for.
        for name in sorted(chosen, key=lambda n: chosen[n].kept):
            options = list(self.layers[name])
            at = next(i for i, option in enumerate(options) if option is chosen[name])
            while at > 0 and total({**chosen, name: options[at - 1]}) <= goal:
                at -= 1
                chosen[name] = options[at]
        return chosen, True


def _masks(chosen: Mapping[str, Candidate]) -> dict[str, torch.Tensor]:
    return {name: candidate.mask for name, candidate in chosen.items()}


def log_kept(importance: torch.Tensor, keep: torch.Tensor) -> float:
    """The logarithm of the share of importance that is kept; 0 where there is none to lose."""
    total = float(importance.sum())
    if not total > 0:
        return 0.0
    return math.log(max(float(importance[keep].sum()) / total, 1e-30))
