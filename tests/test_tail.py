"""Pooling and linear layers in the arithmetic of programs: against float64, gradients, changed weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dsp_kernels import available_backends, tail

pytestmark = pytest.mark.skipif(
    available_backends()["native"] is not None, reason=f"native: {available_backends()['native']}"
)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 5), (2, 64, 10), (0, 4, 3)])
@pytest.mark.parametrize("biased", [True, False])
def test_linear(shape: tuple[int, int, int], biased: bool) -> None:
    count, inner, outer = shape
    x, weight = torch.randn(count, inner), torch.randn(outer, inner)
    bias = torch.randn(outer) if biased else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    scale = x.abs().double() @ weight.abs().double().t() + 1
    assert bool(((tail.linear(x, weight, bias) - exact).abs() <= 4e-7 * inner**0.5 * scale).all())


@pytest.mark.parametrize("size", [(1, 1), (2, 3)])
def test_pool(size: tuple[int, int]) -> None:
    x = torch.randn(2, 5, 7, 6)
    exact = F.adaptive_avg_pool2d(x.double(), size)
    assert float((tail.adaptive_avg_pool(x, size) - exact).abs().max()) < 1e-6


def test_a_changed_weight_is_seen() -> None:
    x, weight, bias = torch.randn(2, 6), torch.randn(3, 6), torch.randn(3)
    before = tail.linear(x, weight, bias)
    assert torch.equal(before, tail.linear(x, weight, bias))
    weight.add_(1)
    assert float((tail.linear(x, weight, bias) - F.linear(x, weight, bias)).abs().max()) < 1e-5
    bias.add_(1)
    assert float((tail.linear(x, weight, bias) - F.linear(x, weight, bias)).abs().max()) < 1e-5
    assert float((tail.linear(x, weight, None) - F.linear(x, weight)).abs().max()) < 1e-5


def test_gradients_and_registration() -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((4, 6), (3, 6), (3,)))
    image = torch.randn(2, 3, 4, 4, requires_grad=True)
    for given, wanted, of in (
        (tail.linear(x, weight, bias), F.linear(x, weight, bias), (x, weight, bias)),
        (tail.adaptive_avg_pool(image, (2, 1)), F.adaptive_avg_pool2d(image, (2, 1)), (image,)),
    ):
        grad = torch.randn_like(wanted)
        pairs = zip(torch.autograd.grad(given, of, grad), torch.autograd.grad(wanted, of, grad), strict=True)
        assert all(float((a - b).abs().max()) < 1e-5 for a, b in pairs)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, args in (
        (tail.linear, (x, weight, bias)),
        (tail.linear, (x, weight, None)),
        (tail.adaptive_avg_pool, (image, [1, 1])),
    ):
        torch.library.opcheck(operator, args, test_utils=checks)
    with FlopCounterMode(display=False) as counter:
        tail.linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 4 * 6 * 3


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="x must be float32 of 2 dimensions"):
        tail.linear(torch.randn(2, 3, 4), torch.randn(4, 4), None)
    with pytest.raises(ValueError, match="x must be float32 of 4 dimensions"):
        tail.adaptive_avg_pool(torch.randn(1, 2, 3, 4).double(), [1, 1])
    with pytest.raises(ValueError, match="x must be"):
        tail.linear(torch.randn(2, 3), torch.randn(4, 5), None)
