"""The definition of group assignment and of the group penalty, and its derivatives in closed form, in plain
PyTorch.

With W a layer's weights (O filters, C input channels, K taps), S = sum over taps of W^2 (O, C), and p the
(G, O) probabilities that filter o belongs to group g:

    L[g, c] = sqrt(sum_o p[g, o]^2 S[o, c])
    s[g]    = (sum_o sqrt(p[g, o]))^2
    R       = scale sum_g s[g] sum_c L[g, c]

(Park et al., "Dynamic Structure Pruning for Compressing CNNs", AAAI 2023, arXiv 2303.09736). Everything is
a function of l = log p, in which every derivative stays finite at p = 0 (l = -inf); 1/L is 0 where L is 0.
A norm below ``NORM_FLOOR`` counts as 0: its reciprocals would overflow in the second order.

The closed forms see the weights only through S, through T = sum over taps of W D for a direction D of the
weights, and through one factor for each (filter, channel) that multiplies all taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "NORM_FLOOR",
    "LassoTerms",
    "accumulation_dtype",
    "group_lasso",
    "group_lasso_backward",
    "group_lasso_definition",
    "group_lasso_hessian",
    "harden",
    "lasso_terms",
    "sample_groups",
    "sample_groups_backward",
    "square_sum",
    "tap_product",
]

NORM_FLOOR = {torch.float32: 1e-15, torch.float64: 1e-100}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over weights of ``dtype`` are taken: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_lasso_definition(
    weights: Sequence[Tensor], log_probabilities: Sequence[Tensor], scales: Sequence[float] | None = None
) -> Tensor:
    """The penalties (L,) written as in the paper, for autograd to differentiate. Slow; it is what the rest
    is held to."""
    penalties = []
    for index, (weight, logs) in enumerate(zip(weights, log_probabilities, strict=True)):
        w = (
            weight.to(accumulation_dtype(weight.dtype))
            .flatten(1)
            .reshape(weight.shape[0], weight.shape[1], -1)
        )
        penalty = w.new_zeros(())
        for row in logs:
            grouped = row.exp()[:, None, None] * w
            squares = grouped.square().sum(dim=(0, 2))
            live = squares > NORM_FLOOR[w.dtype] ** 2
            norms = torch.where(live, torch.where(live, squares, 1.0).sqrt(), 0.0)
            penalty = penalty + (row / 2).exp().sum().square() * norms.sum()
        penalties.append(penalty * (1.0 if scales is None else scales[index]))
    return torch.stack(penalties)


def square_sum(weight: Tensor) -> Tensor:
    """S (O, C): the sum of squares over the taps, in the accumulation dtype."""
    return tap_product(weight, weight)


def tap_product(weight: Tensor, direction: Tensor) -> Tensor:
    """T (O, C): the sum over the taps of ``weight * direction``, in the accumulation dtype."""
    dtype = accumulation_dtype(weight.dtype)
    product = weight.to(dtype) * direction.to(dtype)
    return product if product.ndim == 2 else product.flatten(2).sum(-1)


def spread(factor: Tensor, weight: Tensor) -> Tensor:
    """A factor (O, C) with the trailing dimensions that multiply it onto ``weight``."""
    return factor.reshape(factor.shape + (1,) * (weight.ndim - 2))


@dataclass(frozen=True)
class LassoTerms:
    """What one layer's derivatives share, of S (O, C) and l (G, O); scale 1. Methods return new tensors.

    ``square_probabilities`` p^2 and ``root_probabilities`` sqrt(p) are (G, O); ``root_sum`` q and ``size``
    s are (G,); ``norm`` L and ``inverse`` 1/L are (G, C).
    """

    square: Tensor
    square_probabilities: Tensor
    root_probabilities: Tensor
    root_sum: Tensor
    size: Tensor
    norm: Tensor
    inverse: Tensor

    def penalty(self) -> Tensor:
        """R, a scalar."""
        return torch.dot(self.size, self.norm.sum(1))

    def multiplier(self) -> Tensor:
        """M (O, C), with dR/dW = M W: p^2 transposed times s/L."""
        return self.square_probabilities.t() @ (self.size[:, None] * self.inverse)

    def log_gradient(self) -> Tensor:
        """dR/dl (G, O) = p^2 (s/L S') + (sum_c L) q sqrt(p)."""
        ratio = (self.size[:, None] * self.inverse) @ self.square.t()
        return (
            self.square_probabilities * ratio
            + (self.norm.sum(1) * self.root_sum)[:, None] * self.root_probabilities
        )

    def norm_direction(self, product: Tensor, log_direction: Tensor | None = None) -> Tensor:
        """dL (G, C) along a direction of the weights with tap product T and a direction E of l."""
        change = self.square_probabilities @ product
        if log_direction is not None:
            change = change + (self.square_probabilities * log_direction) @ self.square
        return change * self.inverse

    def weight_pair(self, product: Tensor) -> Tensor:
        """<dR/dW, D>, a scalar: sum_g s[g] sum_c (p^2 T)/L."""
        return torch.dot(self.size, self.norm_direction(product).sum(1))

    def hessian(self, product: Tensor, log_direction: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The second order along (D, E): the multiplier's change dM (O, C) and the change of dR/dl (G, O).

        The Hessian product is then (M D + dM W) for the weights. With E None the second result is the mixed
        product d<dR/dW, D>/dl.
        """
        p2, root = self.square_probabilities, self.root_probabilities
        ratio = self.size[:, None] * self.inverse
        change = self.norm_direction(product, log_direction)
        ratio_change = -ratio * (change * self.inverse)
        if log_direction is not None:
            half = root * log_direction / 2
            root_change = half.sum(1)
            ratio_change = ratio_change + (2 * self.root_sum * root_change)[:, None] * self.inverse
        multiplier_change = p2.t() @ ratio_change
        out = p2 * (ratio_change @ self.square.t() + 2 * (ratio @ product.t()))
        out = out + (change.sum(1) * self.root_sum)[:, None] * root
        if log_direction is not None:
            doubled = 2 * p2 * log_direction
            multiplier_change = multiplier_change + doubled.t() @ ratio
            out = out + doubled * (ratio @ self.square.t())
            norms = self.norm.sum(1)[:, None]
            out = out + norms * (root_change[:, None] * root + self.root_sum[:, None] * half)
        return multiplier_change, out


def lasso_terms(square: Tensor, log_probabilities: Tensor) -> LassoTerms:
    """The shared terms of one layer from S (O, C) and l (G, O), both of the accumulation dtype."""
    square_probabilities = (2 * log_probabilities).exp()
    root = (log_probabilities / 2).exp()
    root_sum = root.sum(1)
    squares = square_probabilities @ square
    # Written so that a NaN counts as live and comes through.
    dead = squares <= NORM_FLOOR[square.dtype] ** 2
    root_of = squares.masked_fill(dead, 1.0).sqrt()  # so that its own derivatives stay finite
    norm = root_of.masked_fill(dead, 0.0)
    inverse = root_of.reciprocal().masked_fill(dead, 0.0)
    return LassoTerms(square, square_probabilities, root, root_sum, root_sum.square(), norm, inverse)


def group_lasso(
    weights: Sequence[Tensor], log_probabilities: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    """The penalties (L,), one a layer."""
    return torch.stack(
        [
            lasso_terms(square_sum(weight), logs).penalty() * scale
            for weight, logs, scale in zip(weights, log_probabilities, scales, strict=True)
        ]
    )


def group_lasso_backward(
    grad: Tensor, weights: Sequence[Tensor], log_probabilities: Sequence[Tensor], scales: Sequence[float]
) -> list[Tensor]:
    """The gradients of ``sum(grad * penalties)``: those of all weights, then those of all
    log-probabilities."""
    for_weights, for_logs = [], []
    layers = zip(grad.unbind(), weights, log_probabilities, scales, strict=True)
    for factor, weight, logs, scale in layers:
        terms = lasso_terms(square_sum(weight), logs)
        amount = factor * scale
        for_weights.append((weight * spread(amount * terms.multiplier(), weight)).to(weight.dtype))
        for_logs.append(amount * terms.log_gradient())
    return for_weights + for_logs


def group_lasso_hessian(
    grad: Tensor,
    weight_directions: Sequence[Tensor],
    log_directions: Sequence[Tensor],
    weights: Sequence[Tensor],
    log_probabilities: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """The gradients of ``sum of <gradient, direction>`` over the results of :func:`group_lasso_backward`.

    One for ``grad`` (L,), then those of all weights, then those of all log-probabilities.
    """
    for_grad, for_weights, for_logs = [], [], []
    layers = zip(
        grad.unbind(), weight_directions, log_directions, weights, log_probabilities, scales, strict=True
    )
    for factor, towards, log_direction, weight, logs, scale in layers:
        terms = lasso_terms(square_sum(weight), logs)
        product = tap_product(weight, towards)
        change, for_log = terms.hessian(product, log_direction)
        amount = factor * scale
        pair = terms.weight_pair(product) + (terms.log_gradient() * log_direction).sum()
        for_grad.append(pair * scale)
        out = towards * spread(amount * terms.multiplier(), weight) + weight * spread(amount * change, weight)
        for_weights.append(out.to(weight.dtype))
        for_logs.append(amount * for_log)
    return [torch.stack(for_grad), *for_weights, *for_logs]


def sample_groups(logits: Tensor, noise: Tensor, temperature: float, divide_noise: bool) -> Tensor:
    """log softmax over the groups of ``logits / temperature + noise`` or of ``(logits + noise) /
    temperature``."""
    scores = (logits + noise) / temperature if divide_noise else logits / temperature + noise
    return torch.log_softmax(scores, dim=0)


def sample_groups_backward(grad: Tensor, log_probabilities: Tensor, temperature: float) -> Tensor:
    """The gradient for the logits, (grad - p sum_g grad) / temperature, given the soft log-probabilities."""
    return (grad - log_probabilities.exp() * grad.sum(0, keepdim=True)) / temperature


def harden(log_probabilities: Tensor) -> Tensor:
    """0 at the first largest entry of each column and -inf elsewhere."""
    best = log_probabilities.argmax(dim=0, keepdim=True)
    return torch.full_like(log_probabilities, -torch.inf).scatter(0, best, 0.0)
