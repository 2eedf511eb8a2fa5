"""Group assignment's CUDA kernels: their launcher, with the host emulation in the place of a device."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_assignment import hard_logs, layers, leaves, relative
from torch import Tensor

from dsp_kernels import available_backends, group_lasso, sample_groups
from dsp_kernels.assignment import LassoTable, choice, cuda, reference
from dsp_kernels.assignment.op import standard_gumbel
from dsp_kernels.backends import choose

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "native" / "emulation"
SOURCES = [
    *(ROOT / "csrc" / name for name in ("core/status.cpp", "assignment/cuda_table.cpp")),
    ROOT / "csrc" / "assignment" / "lasso.cu",
    EMULATION / "emulation.cpp",
]
SHAPES = [(5, 3, 2, 2), (4, 6), (6, 2, 3, 1), (1, 4, 3, 3), (9, 140, 1, 1)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Call(ctypes.Structure):
    _fields_ = [
        ("device", ctypes.c_int32),
        *((f"v{i}", ctypes.c_int64) for i in range(19)),
    ]


class Samples(ctypes.Structure):
    _fields_ = [
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_int64),
        ("element", ctypes.c_int32),
        ("divide", ctypes.c_int32),
        ("groups", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        *((f"v{i}", ctypes.c_int64) for i in range(5)),
    ]


class Layout(ctypes.Structure):
    _fields_ = [(f"v{i}", ctypes.c_int64) for i in range(4)]


class Counts(ctypes.Structure):
    _fields_ = [(f"v{i}", ctypes.c_int64) for i in range(6)]


def wide(*values: int) -> list[ctypes.c_int64]:
    """Addresses and sizes, each in 64 bits."""
    return [ctypes.c_int64(v) for v in values]


class Emulated:
    """The module's CUDA calls, answered by the emulation."""

    def __init__(self, library: Path) -> None:
        self.core = ctypes.CDLL(str(library))
        self.core.dsp_last_error.restype = ctypes.c_char_p
        self._counts = self.core._ZN9emulation6countsEv
        self._counts.restype = ctypes.POINTER(Counts)

    @property
    def launches(self) -> int:
        return int(self._counts().contents.v5)

    def last_error(self) -> str:
        return str(self.core.dsp_last_error().decode())

    def cuda_lasso_table(self, element: int, *rest: int) -> tuple[int, int]:
        needed = ctypes.c_int64()
        status = self.core.dsp_cuda_lasso_table(element, *wide(*rest), ctypes.byref(needed))
        return status, needed.value

    def cuda_lasso_sizes(self, table: int, numel: int, operation: int, directed: int) -> tuple[int, ...]:
        sizes = Layout()
        arguments = (int(operation), int(directed), ctypes.byref(sizes))
        status = self.core.dsp_cuda_lasso_sizes(*wide(table, numel), *arguments)
        return status, *(getattr(sizes, f"v{i}") for i in range(4))

    def cuda_lasso_run(self, operation: int, *a: int) -> int:
        return int(self.core.dsp_cuda_lasso_run(int(operation), ctypes.byref(Call(*a))))

    def cuda_sample_groups(self, *a: Any) -> int:
        return int(self.core.dsp_cuda_sample_groups(ctypes.byref(Samples(*a))))

    def cuda_sample_groups_backward(self, *a: Any) -> int:
        return int(self.core.dsp_cuda_sample_groups_backward(ctypes.byref(Samples(*a))))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    """The room, taking CPU tensors for those of device 0."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    library = tmp_path_factory.mktemp("emulation") / "libemulated.so"
    done = subprocess.run(
        [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-DDSP_EMULATE", f"-I{ROOT / 'csrc'}",
         f"-I{EMULATION}", "-x", "c++", *map(str, SOURCES), "-o", str(library)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    core = Emulated(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "native_module", lambda: core)
        patch.setattr(cuda, "_stream", lambda device: (0, 0))
        patch.setattr(choice, "choose", lambda wish, *rest: "cuda" if wish == "cuda" else choose(wish, *rest))
        cuda.forget()
        yield core
        cuda.forget()


def first_order(
    function: Callable[..., Tensor],
    weights: Sequence[Tensor],
    logs: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """Penalties and gradients."""
    weights, logs = leaves(weights, logs)
    penalties = function(weights, logs, scales)
    cotangent = torch.linspace(0.5, 2, len(scales), dtype=torch.float64).to(penalties.dtype)
    return [penalties.detach(), *torch.autograd.grad(penalties, [*weights, *logs], cotangent)]


def on_cuda(weights: Sequence[Tensor], logs: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    return group_lasso(weights, logs, scales, backend="cuda")


def exact(weights: Sequence[Tensor], logs: Sequence[Tensor], scales: Sequence[float]) -> list[Tensor]:
    wide_weights, wide_logs = [w.double() for w in weights], [x.double() for x in logs]
    return first_order(reference.group_lasso_definition, wide_weights, wide_logs, scales)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 10])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_penalties_and_gradients_are_those_of_the_definition(
    emulated: Emulated, dtype: torch.dtype, groups: int, last: bool
) -> None:
    weights, logs, scales = layers(groups, dtype, shapes=SHAPES)
    if last:
        weights = [w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
    before = emulated.launches
    got = first_order(on_cuda, weights, logs, scales)
    assert emulated.launches - before == 3 + 4
    for a, b in zip(got, exact(weights, logs, scales), strict=True):
        tolerance = ROUNDING[dtype] if a.dtype == dtype else ROUNDING[a.dtype]
        assert relative(a.double(), b) < tolerance
    for a, b in zip(first_order(on_cuda, weights, logs, scales), got, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=25)
@given(
    filters=st.integers(1, 20),
    channels=st.integers(1, 20),
    taps=st.sampled_from([(), (1, 1), (2, 2), (3, 3), (1, 5), (21, 21)]),
    groups=st.integers(1, 5),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    emulated: Emulated, filters: int, channels: int, taps: tuple[int, ...], groups: int, last: bool, seed: int
) -> None:
    if len(taps) > 1 and taps[0] > 9:
        filters, channels = min(filters, 3), min(channels, 3)
    weights, logs, scales = layers(groups, shapes=[(filters, channels, *taps)], seed=seed)
    if last and taps:
        weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]
    got = first_order(on_cuda, weights, logs, scales)
    for a, b in zip(got, exact(weights, logs, scales), strict=True):
        assert (a - b).abs().max() < 1e-11 * (1 + b.abs().max())


def test_layers_of_other_groups_and_dtypes_in_one_call(emulated: Emulated) -> None:
    weights, logs, _ = layers(2, torch.float32, shapes=[(4, 3, 3, 3), (6, 4)])
    more, more_logs, _ = layers(3, torch.float16, shapes=[(5, 2, 1, 1)])
    weights, logs, scales = [weights[0], *more, weights[1]], [logs[0], *more_logs, logs[1]], [1.0, 2, 3]
    got = first_order(on_cuda, weights, logs, scales)
    for a, b in zip(got, exact(weights, logs, scales), strict=True):
        assert relative(a.double(), b) < ROUNDING[a.dtype]


def test_the_second_order_goes_to_another_backend(emulated: Emulated) -> None:
    weights, logs, scales = layers(2, shapes=[(3, 2, 2, 1), (2, 3)])
    weights, logs = leaves(weights, logs)

    def penalties(*tensors: Tensor) -> Tensor:
        return on_cuda(tensors[:2], tensors[2:], scales)

    assert torch.autograd.gradcheck(penalties, (*weights, *logs))
    assert torch.autograd.gradgradcheck(penalties, (*weights, *logs), fast_mode=True)


@pytest.mark.parametrize("kind", ["zero", "zero filter and channel", "hard", "tiny"])
def test_derivatives_are_finite_at_zero(emulated: Emulated, kind: str) -> None:
    weights, logs, scales = layers(3, torch.float32, shapes=[(5, 3, 2, 2), (4, 6)])
    for weight in weights:
        if kind == "zero":
            weight.zero_()
        elif kind == "tiny":
            weight.mul_(1e-18)
        else:
            weight[:, 0] = 0
            weight[0] = 0
    if kind == "hard":
        logs = [hard_logs([o % 2 for o in range(w.shape[0])], 3, torch.float32) for w in weights]
    got = first_order(on_cuda, weights, logs, scales)
    assert all(bool(t.isfinite().all()) for t in got)
    if kind == "zero":
        assert torch.equal(got[0], torch.zeros(2))
    if kind == "hard":
        closed = partial(group_lasso, backend="reference")
        for a, b in zip(got, first_order(closed, weights, logs, scales), strict=True):
            assert relative(a, b) < 1e-5


def test_nan_weights_are_not_hidden(emulated: Emulated) -> None:
    weights, logs, scales = layers(shapes=[(5, 3, 2, 2), (4, 6)])
    weights[0][0, 0] = torch.nan
    penalties = on_cuda(weights, logs, scales)
    assert penalties[0].isnan() and penalties[1].isfinite()


# ---- samples ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["paper", "gumbel"])
def test_samples_and_their_gradients(emulated: Emulated, form: str, dtype: torch.dtype) -> None:
    logits, noise = torch.randn(3, 150, dtype=dtype), standard_gumbel((3, 150), dtype=dtype)
    cotangent = torch.randn(3, 150, dtype=dtype)
    results = []
    for backend in ("cuda", "reference"):
        leaf, free = logits.clone().requires_grad_(), noise.clone().requires_grad_()
        logs = sample_groups(leaf, 0.3, noise=free, form=form, backend=backend)
        results.append((logs.detach(), *torch.autograd.grad(logs, (leaf, free), cotangent)))
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_samples_of_views_and_extreme_logits(emulated: Emulated) -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0, torch.nan], [-1e30, 1e30, 0.0, 0.0]])
    noise = torch.zeros(4, 2).t()
    got = sample_groups(logits, 0.5, noise=noise, backend="cuda")
    want = sample_groups(logits, 0.5, noise=noise, backend="reference")
    assert torch.allclose(got, want, equal_nan=True)


# ---- all layers in place ----


def table_pair(
    groups: int = 3,
    dtype: torch.dtype = torch.float64,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    last: bool = False,
) -> tuple[LassoTable, LassoTable, Tensor]:
    weights, logs, scales = layers(groups, dtype, shapes=shapes)
    if last:
        weights = [w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
    ours, theirs = (
        LassoTable([w.clone() for w in weights], groups, scales, backend=backend)
        for backend in ("cuda", "reference")
    )
    assert ours.backend == "cuda"
    return ours, theirs, torch.cat(logs, 1)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("proximal", [False, True])
def test_table_shrink(emulated: Emulated, proximal: bool, last: bool) -> None:
    ours, theirs, matrix = table_pair(last=last)
    if proximal:
        matrix = reference.harden(matrix)
    before = [w.clone() for w in ours.weights]
    keep = [torch.empty_like(w) for w in before]
    rates = [1e-2 * (index + 1) for index in range(len(before))]
    versions = [w._version for w in ours.weights]
    launches = emulated.launches
    ours.shrink(matrix, rates, proximal=proximal, keep=keep)
    assert emulated.launches - launches == 3
    theirs.shrink(matrix, rates, proximal=proximal)
    for got, want, old, kept, version in zip(
        ours.weights, theirs.weights, before, keep, versions, strict=True
    ):
        assert relative(got, want) < 1e-14
        assert torch.equal(kept, old)
        assert got._version > version
    ours.copy_from(keep)
    assert all(torch.equal(a, b) for a, b in zip(ours.weights, before, strict=True))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_table_log_gradient(emulated: Emulated, mixed: bool, last: bool) -> None:
    ours, theirs, matrix = table_pair(last=last)
    moves = [torch.randn_like(w) for w in ours.weights] if mixed else None
    rates = [1e-2 * (index + 1) for index in range(len(ours.weights))]
    launches = emulated.launches
    got = ours.log_gradient(matrix, rates, moves)
    assert emulated.launches - launches == (8 if mixed else 6)
    assert relative(got, theirs.log_gradient(matrix, rates, moves)) < 1e-9
    assert torch.equal(ours.log_gradient(matrix, torch.tensor(rates, dtype=torch.float64), moves), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_table_in_narrow_types_with_several_tiles_each_way(emulated: Emulated, dtype: torch.dtype) -> None:
    ours, _, matrix = table_pair(2, dtype, [(21, 40, 3, 3), (70, 136, 1, 1)])
    wide_table = LassoTable([w.double() for w in ours.weights], 2, ours.scales, backend="reference")
    moves = [torch.randn_like(w) for w in ours.weights]
    got = ours.log_gradient(matrix, [1e-3, 2e-3], moves)
    want = wide_table.log_gradient(matrix.double(), [1e-3, 2e-3], [m.double() for m in moves])
    assert relative(got.double(), want) < 1e-5
    assert relative(ours.penalties(matrix).double(), wide_table.penalties(matrix.double())) < 1e-6


def test_launches_do_not_depend_on_the_number_of_layers(emulated: Emulated) -> None:
    """A learning step's: the look-ahead's penalty step, the gradient, the penalty step, a sample."""
    counts = []
    for depth in (5, 60):
        ours, _, matrix = table_pair(2, torch.float32, [(4, 4, 3, 3)] * depth)
        launches = emulated.launches
        soft = sample_groups(matrix, 0.5, backend="cuda")
        ours.shrink(soft, [1e-3] * depth)
        ours.log_gradient(soft, [1e-3] * depth, [torch.randn_like(w) for w in ours.weights])
        ours.shrink(reference.harden(soft), [1e-3] * depth)
        counts.append(emulated.launches - launches)
    assert counts == [15, 15]


def test_a_table_takes_new_moves_and_reordered_weights(emulated: Emulated) -> None:
    ours, theirs, matrix = table_pair(shapes=SHAPES[:2])
    for _ in range(2):
        moves = [torch.randn_like(w) for w in ours.weights]
        got, want = (table.log_gradient(matrix, [0.1, 0.2], moves) for table in (ours, theirs))
        assert relative(got, want) < 1e-9
    ours.weights[0].data = ours.weights[0].contiguous(memory_format=torch.channels_last)
    assert relative(ours.penalties(matrix), theirs.penalties(matrix)) < 1e-14
    ours.weights[0].data = torch.stack([ours.weights[0]] * 2, -1)[..., 0]  # neither order: the reference
    assert relative(ours.penalties(matrix), theirs.penalties(matrix)) < 1e-14
    ours.weights[1].data = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weights\[1\]: expected"):
        ours.penalties(matrix)


def test_bad_arguments_are_refused_by_name(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, matrix = table_pair(shapes=SHAPES[:2])
    for rates in (torch.zeros(3, dtype=torch.float64), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"rates: expected torch\.float64 of shape"):
            ours.shrink(matrix, rates)
    weights, logs, _ = layers(2, shapes=[(1, 1, 50, 50)])
    with pytest.raises(ValueError, match="2500 taps are too many for the CUDA kernels: at most 2048"):
        on_cuda(weights, logs, [1.0])
    monkeypatch.setattr(cuda, "_stream", lambda device: (1, 0))
    with pytest.raises(RuntimeError, match="no CUDA device 1"):
        ours.penalties(matrix)


def test_the_backend_is_refused_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if available_backends()["cuda"] is None:
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(choice, "choose", choose)
    with pytest.raises(ValueError, match="backend 'cuda' cannot run here"):
        choice.backend_for("cuda", "cpu", torch.float64)
    assert choice.backend_for(None, "cpu", torch.float32) != "cuda"
