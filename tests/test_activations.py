"""Activations: the rows of Python and of the core, definitions, derivatives, names with parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dsp_kernels import GroupLayout, activations, backends, permuted_grouped_conv2d
from dsp_kernels.program import Program

needs_native = pytest.mark.skipif(
    backends.available_backends()["native"] is not None, reason="no compiled module"
)


@needs_native
def test_the_core_has_the_same_rows() -> None:
    core = backends.native_module().activations()
    assert activations.differences(core) is None
    assert [row.code for row in activations.ROWS] == list(range(len(activations.ROWS)))
    for other in (core[:-1], [*core, ("more", len(core), 0)], [(*core[0][:2], 1), *core[1:]]):
        assert "this package" in str(activations.differences(other))


@needs_native
def test_a_module_with_other_rows_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.forget()
    monkeypatch.setattr(activations, "ROWS", activations.ROWS[:-1])
    assert "built from other sources" in str(backends.available_backends()["native"])
    monkeypatch.undo()
    backends.forget()
    assert backends.available_backends()["native"] is None


PARAMETERS = {"clamp": (-1.5, 2.0), "leaky_relu": (0.1,), "elu": (1.3, 1.1)}
# The rows, with parameters where they have some.
EVERY = [dataclasses.replace(row, values=PARAMETERS.get(row.name, ())) for row in activations.ROWS]


@needs_native
@pytest.mark.parametrize("row", EVERY, ids=str)
def test_the_core_computes_the_definition(row: activations.Activation) -> None:
    x = torch.linspace(-9, 9, 7 * 13).reshape(1, 7, 13, 1)
    x[0, 0, :3, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    program = Program((7, 13, 1))
    out = program.build(program.activation(program.input, str(row)))(x)
    torch.testing.assert_close(out, row.apply(x.double()).float(), equal_nan=True)


@pytest.mark.parametrize("row", EVERY, ids=str)
def test_derivatives_are_torchs(row: activations.Activation) -> None:
    x = torch.cat([torch.randn(400, dtype=torch.float64) * 4, torch.tensor([0.0, 6.0])]).requires_grad_()
    grad = torch.randn(402, dtype=torch.float64)
    y = row.apply(x)
    (expected,) = torch.autograd.grad(y, x, grad)
    kept = {"nothing": None, "output": y.detach(), "input": x.detach()}[row.keeps]
    torch.testing.assert_close(row.gradient(grad, kept), expected)


def test_names() -> None:
    assert activations.find(None) is activations.find("none") is activations.ROWS[0]
    for wrong in ("softsign", "", "relu(1)", "relu()", "RELU", 1, ("relu",)):
        with pytest.raises(ValueError, match=r"activation must be None, 'relu', 'relu6', .* or 'mish', got"):
            activations.find(wrong)  # type: ignore[arg-type]


def test_names_with_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(activations.ROWS[1], name="between", parameters=("least", "most"))
    monkeypatch.setattr(activations, "ROWS", (*activations.ROWS, row))
    found = activations.find("between(-1, 2.5)")
    assert found.values == found.floats(2) == (-1.0, 2.5)
    assert activations.find(str(found)) == found
    for wrong in (
        "between",
        "between()",
        "between(1)",
        "between(1, 2, 3)",
        "between(1, x)",
        "between(1, nan)",
    ):
        with pytest.raises(ValueError, match=r"'mish' or 'between\(least, most\)', got"):
            activations.find(wrong)


@needs_native
def test_an_activation_that_a_backend_lacks_stands_behind_its_convolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.extend(arg for arg in args if isinstance(arg, str) and arg != "native")
            return func(*args, **(kwargs or {}))

    layout = GroupLayout(3, 4, [((0, 1), (0, 1, 2, 3))])
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(8)
    monkeypatch.setattr(backends.BACKENDS[0], "activations", ("none", "relu"))
    for name in ("relu", "silu"):
        with torch.no_grad(), Watch():
            out = permuted_grouped_conv2d(x, weight, layout, kernel_size=1, activation=name, backend="native")
        expected = activations.find(name).apply(F.conv2d(x, layout.unpack(weight, (1, 1))))
        torch.testing.assert_close(out, expected)
    assert seen == ["relu", "none"]
