"""Activations: the rows of Python and of the core, definitions, derivatives, names with parameters."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsp_kernels import activations, backends
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


@needs_native
@pytest.mark.parametrize("row", activations.ROWS, ids=str)
def test_the_core_computes_the_definition(row: activations.Activation) -> None:
    x = torch.linspace(-9, 9, 7 * 13).reshape(1, 7, 13, 1)
    x[0, 0, :3, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    program = Program((7, 13, 1))
    out = program.build(program.activation(program.input, row.name))(x)
    torch.testing.assert_close(out, row.apply(x.double()).float(), equal_nan=True)


@pytest.mark.parametrize("row", activations.ROWS, ids=str)
def test_derivatives_are_torchs(row: activations.Activation) -> None:
    x = torch.cat([torch.randn(400, dtype=torch.float64) * 4, torch.tensor([0.0, 6.0])]).requires_grad_()
    grad = torch.randn(402, dtype=torch.float64)
    y = row.apply(x)
    (expected,) = torch.autograd.grad(y, x, grad)
    kept = {"nothing": None, "output": y.detach(), "input": x.detach()}[row.keeps]
    torch.testing.assert_close(row.gradient(grad, kept), expected)


def test_names() -> None:
    assert activations.find(None) is activations.find("none") is activations.ROWS[0]
    for wrong in ("gelu", "", "relu(1)", "relu()", "RELU", 1, ("relu",)):
        with pytest.raises(ValueError, match="activation must be None, 'relu' or 'relu6', got"):
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
        with pytest.raises(ValueError, match=r"'relu6' or 'between\(least, most\)', got"):
            activations.find(wrong)
