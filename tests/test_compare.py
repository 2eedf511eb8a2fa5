"""When a packed network's outputs count as the dense network's."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsprune
from dsprune.compare import differs, no_worse
from dsprune.nn import PermutedGroupedConv2d

packing = sys.modules["dsprune.pack"]  # `dsprune.pack` is the function
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("scale", [1e-30, 5e-3, 1.0, 1e6])
def test_the_bound_follows_the_output(scale: float) -> None:
    y = scale * torch.linspace(-1, 1, 101)
    assert differs(y, y) is None and differs(y, y + 5e-5 * scale) is None
    assert "differ by" in (differs(y, y * 1.02) or "") and "differ by" in (differs(y, y + 3e-4 * scale) or "")


@pytest.mark.parametrize(
    ("expected", "given", "same"),
    [
        (torch.zeros(3), torch.zeros(3), True),
        (torch.zeros(3), torch.tensor([0.0, 1e-9, 0.0]), False),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), True),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), False),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, NAN]), False),
        (torch.tensor([INF, 1.0]), torch.tensor([INF, 1.0]), True),
        (torch.tensor([INF, 1.0]), torch.tensor([-INF, 1.0]), False),
        (torch.tensor([INF, NAN]), torch.tensor([INF, NAN]), True),
        (torch.tensor([INF, NAN]), torch.tensor([NAN, INF]), False),
        (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]]), False),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64), False),
        (torch.arange(5), torch.arange(5), True),
        (torch.arange(5), torch.tensor([0, 1, 2, 3, 5]), False),
        (torch.tensor([True, False]), torch.tensor([True, True]), False),
        (torch.zeros(0), torch.zeros(0), True),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), True),
        (torch.tensor([1 + 2j]), torch.tensor([1 - 2j]), False),
    ],
)
def test_special_outputs(expected: Tensor, given: Tensor, same: bool) -> None:
    assert (differs(expected, given) is None) == same


def test_what_may_differ() -> None:
    """Two nearly equal scores, infinities of half precision, and what comes of inputs that are not finite."""
    many = torch.zeros(5000, dtype=torch.long)
    assert differs(many, many.index_fill(0, torch.arange(5), 1)) is None
    assert differs(many, many.index_fill(0, torch.arange(6), 1)) is not None
    assert differs(torch.tensor([INF, 1.0]).half(), torch.tensor([6e4, 1.0]).half()) is None
    assert differs(torch.tensor([NAN, 1.0]), torch.tensor([3.0, 1.0]), finite_inputs=False) is None
    assert differs(torch.tensor([1.0]), torch.tensor([NAN]), finite_inputs=False) is not None


class Ends(nn.Module):
    """A convolution with zeros, and an end of one's choice."""

    def __init__(self, end: Callable[[Tensor], object], scale: float = 1.0) -> None:
        super().__init__()
        self.a, self.b, self.end = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), end
        with torch.no_grad():
            self.b.weight[:4, [1, 2]] = 0
            self.b.weight.mul_(scale)
            self.b.bias.mul_(scale)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> object:
        return self.end(self.b(F.relu(self.a(x))))


ENDS: dict[str, tuple[Callable[[Tensor], object], float]] = {
    "small": (lambda y: y, 5e-3),
    "a small one beside a large one": (lambda y: (100 * y, 1e-3 * y), 1.0),
    "integers": (lambda y: (y.mean(), (1000 * y).round().long()), 1.0),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_packed_layer_that_is_off_is_found(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Ends(*ENDS[end]).eval(), torch.randn(2, 3, 9, 9)
    dsprune.pack(model, x)
    lower = packing.lower

    def spoil(graph: object, backend: str | None = None) -> nn.Module:
        network = lower(graph, backend)  # type: ignore[arg-type]
        layer = next(
            m for n, m in network.named_modules() if isinstance(m, PermutedGroupedConv2d) and n == "b"
        )
        layer.weight.data.mul_(1.02)
        return network

    monkeypatch.setattr(packing, "lower", spoil)
    with pytest.raises(dsprune.PackError, match="differ"):
        dsprune.pack(model, x)


def cancelled(y: Tensor) -> Tensor:
    return (y + 1e4) - 1e4


@pytest.mark.parametrize("end", [cancelled, lambda y: y - y, lambda y: y / 0.0, lambda y: (y * 1e25).exp()])
def test_outputs_of_cancelled_and_infinite_values(end: Callable[[Tensor], Tensor]) -> None:
    """Right networks pack, however small or large their outputs."""
    torch.manual_seed(0)
    model, x = Ends(end, 1e-2).eval(), torch.randn(2, 3, 9, 9)
    packed = dsprune.pack(model, x)
    assert packed.fused


def test_the_arbiter() -> None:
    torch.manual_seed(0)
    model, x = Ends(cancelled).eval(), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        own = model(x)
        assert isinstance(own, Tensor)
        exact = model.double()(x.double())
        model.float()
        assert isinstance(exact, Tensor)
        assert no_worse(model, (x,), [own], [exact.float()])
        assert not no_worse(model, (x,), [own], [own * 1.1])
        assert all(p.dtype == torch.float32 for p in model.parameters())
