"""The penalty on all layers of a network at once, for training loops: in place, without autograd.

One (G, N) matrix of log-probabilities serves the whole network, N being the filters of all layers in order:
layer i owns the columns ``offsets[i]:offsets[i + 1]``. What a step needs of the weights is S = sum over
taps of W^2, T = sum over taps of W D, and the multiplication of each (filter, channel) by one factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import native
from .choice import backend_for, room
from .native import Operation
from .op import check_scales
from .reference import accumulation_dtype, lasso_terms, spread, square_sum, tap_product

__all__ = ["LassoTable"]


class LassoTable:
    """A fixed list of weights with their scales.

    ``weights``: tensors (O, C, ...taps) on one device and of one accumulation dtype, which the methods
    change in place. ``groups``: G. ``scales``: one finite number a layer, 1 if None. ``backend``:
    "reference", "native", "triton", "cuda" or None for the best that runs ("cuda" only where asked for);
    weights that are neither contiguous nor channels last, or of several dtypes, always take the reference.

    ``rates`` are one number a layer: the step length that multiplies the scaled gradient dR/dW. They may be a
    tensor (L,) of the accumulation dtype on the weights' device, which "triton" and "cuda" read there.
    Everything runs under ``torch.no_grad``. Methods of these two launch a fixed number of kernels, whatever
    the number of layers, do not wait for the device, and can be captured in a CUDA graph once they have run.

    Methods raise ValueError, before anything is changed, where a weight's shape, dtype or device is no longer
    that of the table, or an argument does not fit it.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        groups: int,
        scales: Sequence[float] | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        if not weights:
            raise ValueError("weights: expected at least one layer, got none")
        if isinstance(groups, bool) or not isinstance(groups, int):
            raise TypeError(f"groups: expected an integer, got {type(groups).__name__}")
        if groups < 1:
            raise ValueError(f"groups: expected at least 1, got {groups}")
        self.weights = list(weights)
        self.groups = groups
        self.scales = check_scales(scales, len(self.weights))
        self.dtype = accumulation_dtype(self.weights[0].dtype)
        self.device = self.weights[0].device
        for index, weight in enumerate(self.weights):
            if not weight.is_floating_point() or weight.ndim < 2 or weight.numel() == 0:
                raise ValueError(
                    f"weights[{index}]: expected a non-empty floating-point (filters, channels, ...) tensor, "
                    f"got {weight.dtype} of shape {tuple(weight.shape)}"
                )
            if accumulation_dtype(weight.dtype) != self.dtype:
                raise TypeError(
                    f"weights[{index}]: dtype {weight.dtype} cannot stand beside {self.weights[0].dtype}"
                )
            if weight.device != self.device:
                raise ValueError(f"weights[{index}]: expected device {self.device}, got {weight.device}")
        names = {backend_for(backend, self.device.type, weight.dtype) for weight in self.weights}
        self.backend = names.pop() if len(names) == 1 else "reference"
        if len({weight.dtype for weight in self.weights}) > 1:
            self.backend = "reference"
        self._network: Any = None
        self._strides: list[tuple[int, ...]] = []
        self.offsets = [0, *accumulate(weight.shape[0] for weight in self.weights)]
        self._shapes = [(weight.shape, weight.dtype) for weight in self.weights]

    @property
    def filters(self) -> int:
        """N, the filters of all layers."""
        return self.offsets[-1]

    def stale(self) -> int | None:
        """The index of a weight whose shape, dtype or device is no longer that of the table, else None."""
        for index, (weight, (shape, dtype)) in enumerate(zip(self.weights, self._shapes, strict=True)):
            if weight.shape != shape or weight.dtype != dtype or weight.device != self.device:
                return index
        return None

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The columns of a (G, N) matrix by layer, as views.

        Raises ValueError for a matrix of another shape, dtype or device.
        """
        shape = (self.groups, self.filters)
        if matrix.shape != shape or matrix.dtype != self.dtype or matrix.device != self.device:
            raise ValueError(
                f"log_probabilities: expected {self.dtype} of shape {shape} on {self.device}, "
                f"got {matrix.dtype} of shape {tuple(matrix.shape)} on {matrix.device}"
            )
        return [matrix[:, a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def _check_weights(self) -> None:
        index = self.stale()
        if index is not None:
            shape, dtype = self._shapes[index]
            weight = self.weights[index]
            raise ValueError(
                f"weights[{index}]: expected {dtype} of shape {tuple(shape)} on {self.device} as when "
                f"the table was made, got {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
            )

    def _runs_native(self) -> bool:
        return self.backend == "native" and all(map(native.is_plain, self.weights))

    def _runs_on_device(self) -> bool:
        """Whether the kernels run; what they know of the weights is made again where their order changed."""
        if self.backend not in ("triton", "cuda"):
            return False
        strides = [weight.stride() for weight in self.weights]
        if strides != self._strides:
            module = room(self.backend)
            plain = all(map(module.is_plain, self.weights))
            self._network = module.Network(self.weights, self.groups, self.scales) if plain else None
            self._strides = strides
        return self._network is not None

    def _logs(self, matrix: Tensor) -> Tensor:
        """The (G, N) matrix with the rows contiguous, after checking it."""
        self.split(matrix)
        return matrix if matrix.stride(1) == 1 else matrix.contiguous()

    def _check_rates(self, rates: Sequence[float] | Tensor) -> None:
        count = len(self.weights)
        if isinstance(rates, Tensor) and rates.shape != (count,):
            raise ValueError(
                f"rates: expected {self.dtype} of shape ({count},), "
                f"got {rates.dtype} of shape {tuple(rates.shape)}"
            )
        if len(rates) != count:
            raise ValueError(f"rates: expected {count} numbers, one a layer, got {len(rates)}")

    @staticmethod
    def _numbers(rates: Sequence[float] | Tensor) -> Sequence[float]:
        return rates.tolist() if isinstance(rates, Tensor) else rates

    def _check_like(self, name: str, tensors: Sequence[Tensor], *, any_dtype: bool = False) -> None:
        """ValueError unless ``tensors`` are one a layer, of their weight's shape, device and dtype."""
        if len(tensors) != len(self.weights):
            raise ValueError(f"{name}: expected {len(self.weights)} tensors, one a layer, got {len(tensors)}")
        for index, (tensor, weight) in enumerate(zip(tensors, self.weights, strict=True)):
            if (
                tensor.shape != weight.shape
                or tensor.device != weight.device
                or not (any_dtype or tensor.dtype == weight.dtype)
            ):
                raise ValueError(
                    f"{name}[{index}]: expected {weight.dtype} of shape {tuple(weight.shape)} on "
                    f"{weight.device}, got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
                )

    def _ordered(self, tensors: Sequence[Tensor]) -> bool:
        """Whether checked tensors have the memory order of the weights."""
        return all(
            tensor.stride() == weight.stride() for tensor, weight in zip(tensors, self.weights, strict=True)
        )

    @torch.no_grad()
    def copy_to(self, targets: Sequence[Tensor]) -> None:
        """targets <- weights, bit for bit."""
        self._check_weights()
        self._check_like("targets", targets)
        self._copy(list(targets), self.weights)

    @torch.no_grad()
    def copy_from(self, sources: Sequence[Tensor]) -> None:
        """weights <- sources, bit for bit."""
        self._check_weights()
        self._check_like("sources", sources)
        self._copy(self.weights, list(sources))

    def _copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        if self._runs_on_device() and self._ordered(targets) and self._ordered(sources):
            self._network.copy(targets, sources)
            torch.autograd.graph.increment_version(targets)
        else:
            torch._foreach_copy_(targets, sources)

    @torch.no_grad()
    def penalties(self, log_probabilities: Tensor) -> Tensor:
        """The scaled penalty of each layer, (L,)."""
        self._check_weights()
        if self._runs_on_device():
            out: Tensor = self._network.penalties(self.weights, self._logs(log_probabilities))
            return out
        if self._runs_native():
            logs = self.split(log_probabilities)
            return native.group_lasso(self.weights, logs, self.scales)
        layers = zip(self.weights, self.split(log_probabilities), self.scales, strict=True)
        return torch.stack([lasso_terms(square_sum(w), logs).penalty() * scale for w, logs, scale in layers])

    @torch.no_grad()
    def shrink(
        self,
        log_probabilities: Tensor,
        rates: Sequence[float] | Tensor,
        *,
        proximal: bool = False,
        keep: Sequence[Tensor] | None = None,
    ) -> None:
        """One penalty step on all weights, in place: W <- W - rate dR/dW.

        ``proximal``: instead the exact minimiser of |X - W|^2 / 2 + rate R(X) for a hard assignment
        (log-probabilities 0 and -inf), which shrinks each (group, channel) block by rate * s in norm and
        gives exact zeros. ``keep``: tensors of the weights' shapes, dtype and device that receive the
        weights as they were.
        """
        self._check_weights()
        self._check_rates(rates)
        if keep is not None:
            self._check_like("keep", keep)
        self.split(log_probabilities)
        if self._runs_on_device():
            fused = keep is not None and self._ordered(keep)
            if keep is not None and not fused:
                torch._foreach_copy_(list(keep), self.weights)
            self._network.shrink(
                self.weights,
                self._logs(log_probabilities),
                rates,
                proximal=proximal,
                keeps=keep if fused else None,
            )
            torch.autograd.graph.increment_version([*self.weights, *(keep or ())])
            return
        rates = self._numbers(rates)
        if self._runs_native():
            self._shrink_native(self.split(log_probabilities), rates, proximal, keep)
            return
        layers = zip(self.weights, self.split(log_probabilities), self.scales, rates, strict=True)
        for index, (weight, logs, scale, rate) in enumerate(layers):
            if keep is not None:
                keep[index].copy_(weight)
            terms = lasso_terms(square_sum(weight), logs)
            amount = rate * scale
            if proximal:
                left = (1 - amount * terms.size[:, None] * terms.inverse).clamp_(min=0)
                factor = logs.exp().t() @ left.masked_fill(terms.norm == 0, 0.0)
            else:
                factor = 1 - amount * terms.multiplier()
            weight.mul_(spread(factor, weight))

    def _shrink_native(
        self, logs: Sequence[Tensor], rates: Sequence[float], proximal: bool, keep: Sequence[Tensor] | None
    ) -> None:
        fused = keep is not None and self._ordered(keep)
        if keep is not None and not fused:
            for kept, weight in zip(keep, self.weights, strict=True):
                kept.copy_(weight)
        native.run(
            Operation.PROXIMAL if proximal else Operation.SHRINK,
            self.weights,
            logs,
            scales=self.scales,
            amounts=self._amounts(rates),
            weight_outs=self.weights,
            keeps=keep if fused else None,
        )
        # Autograd and caches go by the version of a tensor, which the core cannot raise.
        torch.autograd.graph.increment_version([*self.weights, *(keep or ())])

    def _amounts(self, rates: Sequence[float]) -> list[float]:
        return [rate * scale for rate, scale in zip(rates, self.scales, strict=True)]

    @torch.no_grad()
    def log_gradient(
        self,
        log_probabilities: Tensor,
        rates: Sequence[float] | Tensor,
        displacements: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The gradient (G, N) for the log-probabilities after one penalty step, the weights being still
        those before it.

        With W' = W - rate dR/dW(W), this is dR/dl at W', plus, where ``displacements`` D are given (one a
        layer, shaped as the weights), the mixed product d<dR/dW(W), D - rate dR/dW(W')>/dl. D is the move
        that the optimizer would make at W'; the penalty's own move at W' is added here. They may have any
        real dtype.
        """
        self._check_weights()
        self._check_rates(rates)
        if displacements is not None:
            self._check_like("displacements", displacements, any_dtype=True)
        if self._runs_on_device():
            logs = self._logs(log_probabilities)
            found: Tensor = self._network.log_gradient(self.weights, logs, rates, displacements)
            return found
        rates = self._numbers(rates)
        out = torch.empty(log_probabilities.shape, dtype=self.dtype, device=self.device)
        if self._runs_native():
            native.run(
                Operation.STEP_GRADIENT,
                self.weights,
                self.split(log_probabilities),
                scales=self.scales,
                amounts=self._amounts(rates),
                directions=displacements,
                log_outs=self.split(out),
            )
            return out
        layers = zip(
            self.weights, self.split(log_probabilities), self.scales, rates, self.split(out), strict=True
        )
        for index, (weight, logs, scale, rate, target) in enumerate(layers):
            terms = lasso_terms(square_sum(weight), logs)
            factor = 1 - rate * scale * terms.multiplier()
            moved = lasso_terms(terms.square * factor.square(), logs)
            gradient = moved.log_gradient()
            if displacements is not None:
                own_move = terms.square * factor * moved.multiplier()
                product = tap_product(weight, displacements[index]) - rate * scale * own_move
                gradient += terms.hessian(product)[1]
            torch.mul(gradient, scale, out=target)
        return out
