"""The poison of conftest.py reaches the memory that operators fill: an element left unwritten is seen."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import POISONED_FUNCTIONS, POISONED_METHODS

import dsp_kernels
from dsp_kernels import GroupLayout, permuted_grouped_conv2d
from dsp_kernels.conv import native

ROOT = Path(__file__).resolve().parent.parent
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_fresh_floating_memory_is_nan(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 4, dtype=dtype)
    fresh = [
        torch.empty(3, 4, dtype=dtype),
        torch.empty_like(x),
        torch.empty_strided((3, 4), (1, 3), dtype=dtype),
        torch.empty_permuted((3, 4), (1, 0), dtype=dtype),
        x.new_empty((3, 4)),
        x.new_empty_strided((3, 4), (1, 3)),
    ]
    assert len(fresh) == len(POISONED_FUNCTIONS) + len(POISONED_METHODS)
    for tensor in fresh:
        assert tensor.shape == (3, 4) and tensor.dtype == dtype
        assert tensor.isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_fresh_integers_are_no_index(dtype: torch.dtype) -> None:
    assert (torch.empty(5, dtype=dtype) == torch.iinfo(dtype).max).all()


def test_poison_keeps_what_was_asked_for() -> None:
    leaf = torch.empty(3, requires_grad=True)
    assert leaf.requires_grad and leaf.is_leaf and leaf.isnan().all()
    assert torch.empty(2, device="meta").is_meta
    with torch.device("meta"):
        assert torch.empty(2).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert torch.empty((1, 2, 3, 4), memory_format=torch.channels_last).is_contiguous(
        memory_format=torch.channels_last
    )
    assert (
        torch.compile(lambda x: torch.empty_like(x).fill_(1.0) + x, backend="eager")(torch.ones(2)).sum() == 4
    )


@pytest.mark.parametrize("missing", ["conv2d_forward", "conv2d_grad_input", "conv2d_grad_weight"])
def test_an_operator_that_writes_nothing_gives_nan(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A core that reports success and fills nothing must not pass for one that computed zeros."""
    if dsp_kernels.available_backends()["native"] is not None:
        pytest.skip(f"native backend: {dsp_kernels.available_backends()['native']}")
    real = native.native_module()
    names = ("conv2d_forward", "conv2d_grad_input", "conv2d_grad_weight", "last_error")
    lazy = SimpleNamespace(**{name: getattr(real, name) for name in names})
    setattr(lazy, missing, lambda *_: 0)
    monkeypatch.setattr(native, "native_module", lambda: lazy)

    layout = GroupLayout(4, 4, [([0, 1], [0, 2]), ([1, 2, 3], [1, 3])])
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    weight = layout.pack(torch.randn(4, 4, 3, 3)).detach().requires_grad_()
    out = permuted_grouped_conv2d(x, weight, layout, kernel_size=3, padding=1, backend="native")
    out.sum().backward()
    results = {"conv2d_forward": out, "conv2d_grad_input": x.grad, "conv2d_grad_weight": weight.grad}
    for name, result in results.items():
        assert result is not None
        if name == missing:
            assert result.isnan().all()
        else:
            assert result.isfinite().all()


def test_our_code_allocates_only_where_the_poison_reaches() -> None:
    """No other way to uninitialised memory: names imported out of torch, raw aten calls, resize_."""
    found = []
    for path in [*(ROOT / "dsp_kernels").rglob("*.py"), *(ROOT / "python" / "dsprune").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                found += [f"{path.name}: {a.name}" for a in node.names if a.name in POISONED_FUNCTIONS]
            elif isinstance(node, ast.Attribute) and node.attr == "resize_":
                found.append(f"{path.name}: resize_")
            elif isinstance(node, ast.Attribute) and node.attr in (*POISONED_FUNCTIONS, *POISONED_METHODS):
                owner = ast.unparse(node.value)
                if owner.startswith(("torch.ops", "aten", "torch._C")):
                    found.append(f"{path.name}: {owner}.{node.attr}")
    assert found == []
