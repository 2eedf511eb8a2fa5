"""Latency as a target: curves, their cache, the search, and a target met on the digits network."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import nn

import dsprune
from dsp_kernels import available_backends
from dsprune import clock, latency
from dsprune.latency import Candidate, Curve, CurveCache, LayerShape, Search
from dsprune.models import cifar_resnet
from dsprune.recipes.timing import dense_forms
from dsprune.structure import Structure

pytestmark = pytest.mark.alone

CPU = torch.device("cpu")
SHAPE = LayerShape(8, 6, (2, 10, 9), (3, 3), (1, 1), (1, 1), (1, 1), (2, 4))


def test_a_curve_is_straight_between_its_points() -> None:
    curve = Curve(((0.25, 1.0), (0.5, 1.0), (1.0, 3.0)))
    assert [curve(k) for k in (0, 0.125, 0.25, 0.4, 0.75, 1.0)] == [0.0, 0.5, 1.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_layers_are_timed_at_their_own_shape(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[Any] = []

    def timed(calls: Sequence[Callable[[], Any]], device: torch.device, **_: Any) -> list[float]:
        outputs.extend(call() for call in calls)
        return [2.0, 1.0, 4.0, 3.0, 5.0]

    monkeypatch.setattr(latency, "interleaved", timed)
    with torch.no_grad():
        curve = latency.measure_curve(SHAPE, CPU, torch.float32, backend=backend)
    assert [tuple(o.shape) for o in outputs] == [(2, 6, 10, 9)] * 5
    assert curve.points == ((0.125, 2.0), (0.25, 2.0), (0.5, 4.0), (0.75, 4.0), (1.0, 5.0))
    layout = latency._layout(SHAPE, 3)
    assert [(len(c), len(f)) for c, f in layout.groups] == [(3, 2), (3, 4)]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_clock_takes_turns(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls of 4 and 12 ms on a clock of our own; most are held up by something."""
    torch.set_num_threads(threads)
    now, order = [0.0], []
    monkeypatch.setattr(clock.time, "thread_time" if threads == 1 else "perf_counter", lambda: now[0])

    def call(name: str, ms: float) -> None:
        order.append(name)
        now[0] += 1e-3 * ms * (1 if len(order) % 5 < 2 else 3)

    times = latency.interleaved([lambda: call("a", 4), lambda: call("b", 12)], CPU, seconds=1e-6, least=20)
    assert order == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 20
    assert times == pytest.approx([4.0, 12.0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a matter of glibc")
def test_memory_is_kept_while_times_are_taken() -> None:
    """Blocks freed at the end of the heap are there again without a page fault, wherever they were before."""
    resource = pytest.importorskip("resource")

    def call() -> None:
        kept = [bytearray(b"x") * (1 << 18) for _ in range(24)]
        del kept

    counts: list[int] = []

    def counted() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    latency.interleaved([counted], CPU, seconds=0.01)
    assert sorted(counts)[len(counts) // 2] < 24, counts


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"calls": []}, TypeError, "calls: expected functions"),
        ({"calls": [3]}, TypeError, "calls: expected functions"),
        ({"device": "cpu"}, TypeError, "device: expected a torch.device, got 'cpu'"),
        ({"seconds": 0.0}, ValueError, "seconds: expected more than 0"),
        ({"seconds": math.nan}, ValueError, "seconds: expected more than 0"),
        ({"least": 0}, ValueError, "least: expected an integer of at least 1"),
    ],
)
def test_bad_arguments_of_the_clock(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"calls": [lambda: None], "device": CPU, **change}
    with pytest.raises(error, match=f"^{text}"):
        latency.interleaved(arguments.pop("calls"), arguments.pop("device"), **arguments)


# ---- the cache ----


def counting(monkeypatch: pytest.MonkeyPatch) -> list[LayerShape]:
    seen: list[LayerShape] = []

    def measure(shape: LayerShape, *args: Any, **kwargs: Any) -> Curve:
        seen.append(shape)
        return Curve(((1.0, float(len(seen))),))

    monkeypatch.setattr(latency, "measure_curve", measure)
    return seen


def test_curves_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counting(monkeypatch)
    file = tmp_path / "sub" / "latency.json"
    first = CurveCache(file)
    assert first.curve(SHAPE, CPU, torch.float32)(1.0) == 1.0
    assert first.curve(SHAPE, CPU, torch.float32)(1.0) == 1.0
    first.write()
    other = CurveCache(file)  # both read before either writes: none is lost
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)
    second = CurveCache(file)
    assert second.curve(SHAPE, CPU, torch.float32)(1.0) == 2.0, "another number of threads"
    second.write()
    assert other.curve(SHAPE, CPU, torch.float64)(1.0) == 3.0, "another dtype"
    other.write()
    assert len(json.loads(file.read_text())["curves"]) == 3 and len(seen) == 3
    assert not [f for f in file.parent.iterdir() if f != file]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 0, "curves": {}}', '{"version": 1}'])
def test_a_broken_cache_is_replaced(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting(monkeypatch)
    file = tmp_path / "latency.json"
    file.write_text(text)
    cache = CurveCache(file)
    cache.curve(SHAPE, CPU, torch.float32)
    cache.write()
    assert len(CurveCache(file).entries) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting(monkeypatch)
    (tmp_path / "file").write_text("")
    cache = CurveCache(tmp_path / "file" / "latency.json")
    cache.curve(SHAPE, CPU, torch.float32)
    with pytest.warns(UserWarning, match="layer times are not kept"):
        cache.write()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert latency.as_cache(True).path == tmp_path / "dsprune" / "latency.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert latency.cache_file() == tmp_path / ".cache" / "dsprune" / "latency.json"
    assert latency.as_cache(False).path is None
    assert latency.as_cache(str(tmp_path / "a.json")).path == tmp_path / "a.json"


# ---- the search ----


def options(times: Sequence[float], kept: Sequence[float]) -> list[Candidate]:
    return [
        Candidate(i / 10, torch.tensor([True]), math.log(k), t)
        for i, (t, k) in enumerate(zip(times, kept, strict=True))
    ]


LAYERS = {
    "slow": options([10, 6, 3, 1], [1, 0.9, 0.7, 0.3]),
    "fast": options([2, 1.5, 1, 0.5], [1, 0.9, 0.7, 0.3]),
}


@pytest.mark.parametrize("goal", [12, 11, 9, 7.5, 5, 3, 1.6])
def test_the_choice_is_the_best_there_is(goal: float) -> None:
    """Against all combinations: as much importance within the goal as any, up to the price's own steps."""
    search = Search(LAYERS, lambda m: 0.0, lambda m: nn.Identity(), nn.Identity(), (), "eager", CPU)
    chosen, within = search._within(goal)
    spent = sum(c.time for c in chosen.values())
    assert within and spent <= goal
    best = max(a.kept + b.kept for a in LAYERS["slow"] for b in LAYERS["fast"] if a.time + b.time <= goal)
    assert sum(c.kept for c in chosen.values()) >= best - 0.2
    assert not search._within(1.0)[1]


class Clock:
    """A machine whose networks take the time that they say, seen through a search's eyes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, real: Callable[[float], float], noise: float) -> None:
        generator = torch.Generator().manual_seed(0)

        def time(_: Search, packed: nn.Module, factor: int = 1) -> tuple[float, float]:
            off = 1 + noise * float(torch.randn((), generator=generator)) / factor**0.5
            return 20.0, real(packed.layers) / 20.0 * off  # type: ignore[arg-type]

        monkeypatch.setattr(Search, "_time", time)

    def search(self, against: str = "eager") -> Search:
        layers = {f"{name}{i}": options_ for i in range(4) for name, options_ in FINE.items()}

        def build(masks: Any) -> nn.Module:
            made = nn.Module()
            made.layers = sum(float(m) for m in masks.values())  # type: ignore[assignment]
            return made

        return Search(layers, lambda m: sum(float(v) for v in m.values()), build, nn.Identity(),
                      (torch.zeros(5, 1),), against, CPU)  # fmt: skip


# Masks stand for times here.
FINE = {
    name: [Candidate(i / 40, torch.tensor(w * (1 - i / 40)), math.log(1 - (i / 41) ** 2), w * (1 - i / 40))
           for i in range(40)]
    for name, w in (("a", 2.0), ("b", 0.5))
}  # fmt: skip


@pytest.mark.parametrize("target", [0.6, 0.4, 0.3])
@pytest.mark.parametrize("noise", [0.0, 0.04])
def test_predictions_are_corrected(target: float, noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers' own times say 10 ms in all; the network takes half as much again, and 3 ms besides."""
    clock = Clock(monkeypatch, lambda t: 3 + 1.5 * t, noise)
    chosen, found = clock.search().run(target)
    assert found.met and abs(found.measured / target - 1) <= 0.1
    assert abs((3 + 1.5 * sum(c.time for c in chosen.values())) / 20 / target - 1) <= 0.1
    assert (found.dense_ms, found.batch, found.against) == (20.0, 5, "eager")
    assert found.packed_ms == pytest.approx(found.measured * 20)
    assert 2 <= found.rounds <= 9 and f"measured {found.measured:.3f}" in str(found)


def test_what_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, lambda t: 8 + t, 0.0)
    with pytest.raises(ValueError, match=r"latency: expected at least 0\.4\d+, what this assignment can"):
        clock.search().run(0.2)
    with pytest.warns(UserWarning, match="packing alone takes"):
        _, found = clock.search().run(0.95)
    assert found.rounds == 1 and found.measured == 0.9
    unsteady = iter([1.0, 0.82, 0.58, 0.82, 0.58, 0.82, 0.58, 0.82, 0.58])
    monkeypatch.setattr(Search, "_time", lambda self, packed, factor=1: (20.0, next(unsteady)))
    with pytest.warns(UserWarning, match=r"where 0\.7 is asked for, after 9 rounds"):
        clock.search().run(0.7)


# ---- the whole ----


@pytest.fixture(scope="module")
def digits_network(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[nn.Module, torch.Tensor, dict[str, torch.Tensor], Path]:
    """ResNet-20, a batch of digits, groups, and a file for curves, which both forms of a target share."""
    from dsprune.recipes.data import digits

    torch.manual_seed(0)
    model = nets.random_norms(cifar_resnet(20, in_channels=1)).eval()
    x = digits(16).train.images[:32]
    assignment = {i.name: torch.arange(i.out_channels) % 4 for i in dsprune.prunable_convs(model, x)}
    return model, x, assignment, tmp_path_factory.mktemp("latency") / "latency.json"


@pytest.mark.skipif(
    available_backends()["native"] is not None,
    reason=f"the reference backend takes no less time for fewer channels; "
    f"native: {available_backends()['native']}",
)
@pytest.mark.parametrize(("against", "target"), [("packed", 0.6), ("eager", 0.25)])
def test_a_target_is_met_on_the_digits_network(
    against: str, target: float, digits_network: tuple[nn.Module, torch.Tensor, dict[str, torch.Tensor], Path]
) -> None:
    """As measured by the search, and as measured afterwards, in the same run: dense and packed in turns."""
    torch.set_num_threads(1)
    dense, x, assignment, file = digits_network
    model = copy.deepcopy(dense)
    dense = dense if against == "eager" else dsprune.pack(dense, x)
    structure = dsprune.find_structure(model, x, assignment, latency=target, against=against, cache=file)
    found = structure.latency
    assert found is not None and found.met and abs(found.measured / target - 1) <= 0.1, found
    assert abs(found.predicted / target - 1) <= 0.1 and found.batch == 32 and found.threads == 1
    assert structure.thresholds is not None and set(structure.thresholds) == set(assignment)
    assert structure.threshold == max(structure.thresholds.values())
    assert 0.1 < structure.flops_cut < 0.9
    again = Structure.from_json(json.loads(json.dumps(structure.to_json())))
    assert again == structure
    assert 5 <= len(json.loads(file.read_text())["curves"]) <= 8, "one curve a shape"
    # What it was timed as is what the user gets.
    dsprune.apply_structure(model, structure)
    packed = dsprune.pack(model, x)
    shares = []
    while len(shares) < 3 and not (shares and abs(shares[-1] / target - 1) <= 0.1):
        dense_ms, packed_ms = latency.interleaved([lambda: dense(x), lambda: packed(x)], CPU, seconds=0.5)
        shares.append(packed_ms / dense_ms)
    assert abs(shares[-1] / target - 1) <= 0.1, (str(found), shares)
    with torch.no_grad():
        assert float((packed(x) - model(x)).abs().max()) < 1e-4
    if against == "packed":
        counted = dsprune.summary(packed, x, structure=structure)
        assert str(counted).splitlines()[-1] == str(found)
        assert 1 - counted.macs / counted.dense_macs == pytest.approx(structure.flops_cut, abs=0.02)


def test_where_export_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.Untraceable()
    monkeypatch.setattr(Search, "_time", lambda self, packed, factor=1: (1.0, 0.5))
    counting(monkeypatch)
    with pytest.warns(UserWarning) as warned:
        structure = dsprune.find_structure(
            model, torch.randn(2, 4, 8, 8), {"b": torch.arange(8) % 2}, latency=0.6, cache=False
        )
    assert any("packing alone" in str(w.message) for w in warned)
    assert structure.latency is not None and structure.flops_cut == 0.0


def test_where_inductor_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    model, x = nets.Plain().eval(), torch.randn(1, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"Inductor is not timed: no compiler here$"):
        forms = dense_forms(model, x, inductor=True)
    assert set(forms) - {"OpenVINO", "ONNX Runtime"} == {"eager", "channels_last", "TorchScript"}
