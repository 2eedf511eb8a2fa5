"""The launcher of the CUDA kernels, with their host emulation in the place of a device."""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_cases import CORNERS, Case, cases, check_forward, check_gradients
from hypothesis import given, settings

from dsp_kernels import GroupLayout, available_backends, permuted_grouped_conv2d
from dsp_kernels.conv import conv2d_from_plan, cuda, op, prepared, triton

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EMULATION = ROOT / "tests" / "native" / "emulation"
SOURCES = [
    *(ROOT / "csrc" / name for name in ("core/status.cpp", "core/scratch.cpp", "conv/plan.cpp")),
    *(ROOT / "csrc" / name for name in ("conv/cuda_check.cpp", "conv/cuda_table.cpp", "conv/conv2d.cu")),
    EMULATION / "emulation.cpp",
]


class Shape(ctypes.Structure):
    _fields_ = [(f"v{i}", ctypes.c_int64) for i in range(11)]


class Sizes(ctypes.Structure):
    _fields_ = [(f"v{i}", ctypes.c_int64) for i in range(6)]


class Call(ctypes.Structure):
    _fields_ = [
        ("device", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("table_numel", ctypes.c_int64),
        ("device_table", ctypes.c_void_p),
    ]


def wide(*values: int) -> list[ctypes.c_int64]:
    """Addresses and sizes, each in 64 bits."""
    return [ctypes.c_int64(v) for v in values]


class Emulated:
    """The module's CUDA calls, answered by the emulation."""

    def __init__(self, library: Path) -> None:
        self.core = ctypes.CDLL(str(library))
        self.core.dsp_last_error.restype = ctypes.c_char_p
        self.calls: list[str] = []

    def last_error(self) -> str:
        return self.core.dsp_last_error().decode()

    def cuda_conv2d_table(self, operation: int, precision: int, *rest: int) -> tuple[int, int]:
        shape, (plan, numel, fill, blocks, words, words_numel) = Shape(*rest[:11]), rest[11:]
        needed = ctypes.c_int64()
        status = self.core.dsp_cuda_conv2d_table(
            operation, precision, ctypes.byref(shape), *wide(plan, numel), fill, blocks,
            *wide(words, words_numel), ctypes.byref(needed),
        )  # fmt: skip
        self.calls.append("table")
        return status, needed.value

    def cuda_conv2d_sizes(self, table: int, numel: int) -> tuple[int, ...]:
        sizes = Sizes()
        status = self.core.dsp_cuda_conv2d_sizes(*wide(table, numel), ctypes.byref(sizes))
        return status, *(getattr(sizes, f"v{i}") for i in range(6))

    def cuda_conv2d_prepare(self, *a: int) -> int:
        self.calls.append("prepare")
        return self.core.dsp_cuda_conv2d_prepare(ctypes.byref(Call(*a[:5])), *wide(*a[5:]))

    def cuda_conv2d_run(self, *a: int) -> int:
        self.calls.append("run")
        return self.core.dsp_cuda_conv2d_run(ctypes.byref(Call(*a[:5])), *wide(*a[5:-1]), a[-1])

    def cuda_conv2d_grad_weight(self, *a: int) -> int:
        self.calls.append("grad_weight")
        return self.core.dsp_cuda_conv2d_grad_weight(ctypes.byref(Call(*a[:5])), *wide(*a[5:]))


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
        patch.setattr(cuda, "_processors", lambda index: 4)
        patch.setattr(op, "choose", lambda backend, device, dtype: backend or "reference")
        cuda.forget()
        yield core
        cuda.forget()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CORNERS)
def test_corners(emulated: Emulated, name: str, dtype: torch.dtype) -> None:
    check_forward(CORNERS[name], dtype, "cuda")
    check_gradients(CORNERS[name], dtype, "cuda")


@settings(max_examples=30)
@given(case=cases())
def test_random_cases(emulated: Emulated, case: Case) -> None:
    dtype = DTYPES[case.seed % 3]
    out = check_forward(case, dtype, "cuda")
    grads = check_gradients(case, dtype, "cuda")
    assert out.equal(check_forward(case, dtype, "cuda"))
    for first, again in zip(grads, check_gradients(case, dtype, "cuda"), strict=True):
        assert first.equal(again)


def test_the_memory_format_is_that_of_x(emulated: Emulated) -> None:
    case = CORNERS["3x3"]
    x, weight, _, _ = case.tensors(torch.float32)
    packed = case.layout.pack(weight)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        out = permuted_grouped_conv2d(
            x.contiguous(memory_format=memory_format), packed, case.layout, backend="cuda", **case.geometry
        )
        assert out.is_contiguous(memory_format=memory_format)


def test_tensors_off_16_bytes_are_copied(emulated: Emulated) -> None:
    layout = GroupLayout(8, 8, [(range(8), range(8))])
    storage = torch.randn(1 + 4 * 8 * 5 * 5)
    x = storage[1:].view(4, 5, 5, 8).permute(0, 3, 1, 2)
    weight = torch.randn(64)
    out = permuted_grouped_conv2d(x, weight, layout, kernel_size=1, backend="cuda")
    expected = permuted_grouped_conv2d(x, weight, layout, kernel_size=1, backend="reference")
    torch.testing.assert_close(out, expected)


def test_a_table_and_a_weight_are_made_once(emulated: Emulated) -> None:
    layout = GroupLayout(3, 4, [([0, 2], [0, 1, 3])])
    plan = layout.plan()
    arguments: dict[str, Any] = {"out_channels": 4, "kernel_size": 3, "padding": 1, "backend": "cuda"}
    cuda.forget()
    emulated.calls.clear()
    weight = torch.randn(54)
    for _ in range(3):
        conv2d_from_plan(torch.randn(2, 3, 6, 6), weight, plan, **arguments)
    made = ["table", "table", "prepare", "run"]  # its length, its words
    assert emulated.calls == [*made, "run", "run"]
    conv2d_from_plan(torch.randn(1, 3, 6, 6), weight, plan, **arguments)
    assert emulated.calls[-4:] == made
    x = torch.randn(2, 3, 6, 6)
    before = conv2d_from_plan(x, weight, plan, **arguments)
    weight.neg_()
    assert conv2d_from_plan(x, weight, plan, **arguments).equal(-before)
    assert emulated.calls[-3:] == ["run", "prepare", "run"]


def test_what_is_kept_of_a_weight_has_a_limit(emulated: Emulated) -> None:
    """Each batch size has a table: the last few laid out weights stay, and no table for their sake."""
    layout = GroupLayout(3, 4, [([0, 2], [0, 1, 3])])
    weight = torch.randn(6)

    def run(batch: int) -> list[str]:
        emulated.calls.clear()
        permuted_grouped_conv2d(torch.randn(batch, 3, 4, 4), weight, layout, kernel_size=1, backend="cuda")
        return [name for name in emulated.calls if name != "table"]

    triton.forget()
    cuda.forget()
    for batch in range(1, 2 * prepared.FORMS):
        assert run(batch) == ["prepare", "run"] and run(batch) == ["run"]
    (kept,) = prepared._weights._values.values()
    assert len(kept) == prepared.FORMS
    assert run(prepared.FORMS) == ["run"]  # the oldest that is kept, and the newest from now on
    assert run(99) == ["prepare", "run"] and run(prepared.FORMS) == ["run"]
    tables = [weakref.ref(table.device) for table in cuda._tables._values.values()]
    assert len(tables) == 2 * prepared.FORMS
    cuda.forget()
    gc.collect()
    assert [table() for table in tables] == [None] * len(tables)
    assert run(1) == ["prepare", "run"]
    (kept,) = prepared._weights._values.values()
    assert len(kept) == 1  # those laid out for tables that are gone went too


def test_what_a_call_reads_is_recorded(emulated: Emulated) -> None:
    layout = GroupLayout(3, 4, [([0, 2], [0, 1, 3])])
    x, weight, other = torch.randn(1, 3, 4, 4), torch.randn(6), torch.randn(6)

    def run(weight: torch.Tensor, batch: int = 1) -> None:
        permuted_grouped_conv2d(x.expand(batch, -1, -1, -1), weight, layout, kernel_size=1, backend="cuda")

    triton.forget()
    cuda.forget()
    run(weight)
    run(other, 2)
    with prepared.recording() as held:
        run(weight)
    run(other)
    table, kept = list(cuda._tables._values.values())[-1], list(prepared._weights._values.values())
    assert [id(tensor) for tensor in held] == [id(table.device), id(kept[0][0].laid_out)]


def test_bad_arguments_are_refused_by_name(emulated: Emulated) -> None:
    layout = GroupLayout(3, 4, [([0, 2], [0, 1, 3])])
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(6)
    with pytest.raises(ValueError, match=r"weight has 5 values, expected 6"):
        conv2d_from_plan(x, weight[:5], layout.plan(), out_channels=4, kernel_size=1, backend="cuda")
    with pytest.raises(ValueError, match=r"x has 288 values, expected 216"):
        conv2d_from_plan(
            torch.randn(2, 4, 6, 6), weight, layout.plan(), out_channels=4, kernel_size=1, backend="cuda"
        )
    with pytest.raises(ValueError, match=r"x must be float16, bfloat16 or float32 .* got torch.float64"):
        permuted_grouped_conv2d(x.double(), weight.double(), layout, kernel_size=1, backend="cuda")
    with pytest.raises(ValueError, match="too large for the CUDA kernels"):
        permuted_grouped_conv2d(x, weight, layout, kernel_size=1, padding=2**30, stride=2**30, backend="cuda")


def test_a_failure_of_the_device_is_a_runtime_error(
    emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_stream", lambda device: (1, 0))
    layout = GroupLayout(3, 4, [([0, 2], [0, 1, 3])])
    with pytest.raises(RuntimeError, match="no CUDA device 1"):
        permuted_grouped_conv2d(
            torch.randn(1, 3, 2, 2), torch.randn(6), layout, kernel_size=1, backend="cuda"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_pixels_or_weights(emulated: Emulated, dtype: torch.dtype) -> None:
    dead = GroupLayout(3, 4, [([1], [])])
    x = torch.randn(2, 3, 5, 5).to(dtype).requires_grad_()
    weight = torch.empty(0, dtype=dtype, requires_grad=True)
    bias = torch.tensor([-1.0, 0.0, 2.0, 9.0]).to(dtype)
    out = permuted_grouped_conv2d(x, weight, dead, bias, kernel_size=3, activation="relu6", backend="cuda")
    assert out.equal(bias.clamp(0, 6)[:, None, None].expand(2, 4, 3, 3))
    of_x, of_weight = torch.autograd.grad(out.sum(), (x, weight))
    assert of_x.equal(torch.zeros_like(x))
    assert of_weight.shape == (0,)
    layout = GroupLayout(3, 4, [([1], [2])])
    weight = torch.ones(9, dtype=dtype, requires_grad=True)
    none = torch.empty(0, 3, 5, 5, dtype=dtype)
    out = permuted_grouped_conv2d(none, weight, layout, kernel_size=3, backend="cuda")
    assert out.shape == (0, 4, 3, 3)
    (of_weight,) = torch.autograd.grad(out.sum(), weight)
    assert of_weight.equal(torch.zeros_like(weight))


def test_the_backend_says_why_it_cannot_run() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "cuda" in available_backends()
    assert available_backends()["cuda"] is not None
