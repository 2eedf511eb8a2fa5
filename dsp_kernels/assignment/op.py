"""The operators of group assignment: schemas, fakes, autograd to second order, FLOP formulas, and the
public functions.

``group_lasso``'s backward is an operator whose backward is the Hessian product operator, so that a double
backward costs one pass over the weights, as the forward does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._library import define, library, register_derivatives
from . import reference
from .choice import backend_for, room

__all__ = ["FORMS", "group_lasso", "sample_groups"]

FORMS = ("paper", "gumbel")
_WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LOGIT_DTYPES = (torch.float32, torch.float64)

define(
    "sample_groups(Tensor logits, Tensor noise, float temperature, bool divide_noise, str backend) -> Tensor"
)
define(
    "sample_groups_backward(Tensor grad, Tensor log_probabilities, float temperature, str backend) -> Tensor"
)
define("harden_groups(Tensor log_probabilities) -> Tensor")
define("group_lasso(Tensor[] weights, Tensor[] log_probabilities, float[] scales, str backend) -> Tensor")
define(
    "group_lasso_backward(Tensor grad, Tensor[] weights, Tensor[] log_probabilities, float[] scales,"
    " str backend) -> Tensor[]"
)
define(
    "group_lasso_hessian(Tensor grad, Tensor[] weight_directions, Tensor[] log_directions, Tensor[] weights,"
    " Tensor[] log_probabilities, float[] scales, str backend) -> Tensor[]"
)
_ops = torch.ops.dsp_kernels


# ---- implementations


def _sample_groups(
    logits: Tensor, noise: Tensor, temperature: float, divide_noise: bool, backend: str
) -> Tensor:
    # The native core has no kernel of its own for the samples.
    samples = room(backend) if backend in ("triton", "cuda") else reference
    out: Tensor = samples.sample_groups(logits, noise, temperature, divide_noise)
    return out


def _sample_groups_backward(
    grad: Tensor, log_probabilities: Tensor, temperature: float, backend: str
) -> Tensor:
    samples = room(backend) if backend in ("triton", "cuda") else reference
    out: Tensor = samples.sample_groups_backward(grad, log_probabilities, temperature)
    return out


def _group_lasso(
    weights: list[Tensor], log_probabilities: list[Tensor], scales: list[float], backend: str
) -> Tensor:
    out: Tensor = room(backend).group_lasso(weights, log_probabilities, scales)
    return out


def _group_lasso_backward(
    grad: Tensor, weights: list[Tensor], log_probabilities: list[Tensor], scales: list[float], backend: str
) -> list[Tensor]:
    out: list[Tensor] = room(backend).group_lasso_backward(grad, weights, log_probabilities, scales)
    return out


def _group_lasso_hessian(
    grad: Tensor,
    weight_directions: list[Tensor],
    log_directions: list[Tensor],
    weights: list[Tensor],
    log_probabilities: list[Tensor],
    scales: list[float],
    backend: str,
) -> list[Tensor]:
    out: list[Tensor] = room(backend).group_lasso_hessian(
        grad, weight_directions, log_directions, weights, log_probabilities, scales
    )
    return out


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "sample_groups": _sample_groups,
    "sample_groups_backward": _sample_groups_backward,
    "harden_groups": reference.harden,
    "group_lasso": _group_lasso,
    "group_lasso_backward": _group_lasso_backward,
    "group_lasso_hessian": _group_lasso_hessian,
}
for _name, _function in _IMPLEMENTATIONS.items():
    for _key in ("CPU", "CUDA"):
        library.impl(_name, _function, _key)


# ---- fakes


@torch.library.register_fake("dsp_kernels::sample_groups", lib=library)
def _(logits: Tensor, noise: Tensor, temperature: float, divide_noise: bool, backend: str) -> Tensor:
    return torch.empty_like(logits)


@torch.library.register_fake("dsp_kernels::sample_groups_backward", lib=library)
def _(grad: Tensor, log_probabilities: Tensor, temperature: float, backend: str) -> Tensor:
    return torch.empty_like(log_probabilities)


@torch.library.register_fake("dsp_kernels::harden_groups", lib=library)
def _(log_probabilities: Tensor) -> Tensor:
    return torch.empty_like(log_probabilities)


@torch.library.register_fake("dsp_kernels::group_lasso", lib=library)
def _(weights: list[Tensor], log_probabilities: list[Tensor], scales: list[float], backend: str) -> Tensor:
    return log_probabilities[0].new_empty(len(weights))


@torch.library.register_fake("dsp_kernels::group_lasso_backward", lib=library)
def _(
    grad: Tensor, weights: list[Tensor], log_probabilities: list[Tensor], scales: list[float], backend: str
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (*weights, *log_probabilities)]


@torch.library.register_fake("dsp_kernels::group_lasso_hessian", lib=library)
def _(
    grad: Tensor,
    weight_directions: list[Tensor],
    log_directions: list[Tensor],
    weights: list[Tensor],
    log_probabilities: list[Tensor],
    scales: list[float],
    backend: str,
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (grad, *weights, *log_probabilities)]


# ---- autograd


def _filled(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, like, strict=True)]


def _sample_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, ctx.temperature, ctx.divide_noise, ctx.backend = inputs
    ctx.save_for_backward(output)


def _sample_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (logs,) = ctx.saved_tensors
    for_logits = _ops.sample_groups_backward(grad, logs, ctx.temperature, ctx.backend)
    for_noise = for_logits if ctx.divide_noise else for_logits * ctx.temperature
    return for_logits, for_noise, None, None, None


def _sample_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, logs, ctx.temperature, _ = inputs
    ctx.save_for_backward(grad, logs)


def _sample_double_backward(ctx: Any, towards: Tensor) -> tuple[Any, ...]:
    grad, logs = ctx.saved_tensors
    weighted = logs.exp() * towards
    for_grad = (towards - weighted.sum(0, keepdim=True)) / ctx.temperature
    for_logs = -weighted * grad.sum(0, keepdim=True) / ctx.temperature
    return for_grad, for_logs, None, None


def _harden_backward(ctx: Any, grad: Tensor) -> Tensor:
    return grad


def _lasso_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, logs, ctx.scales, ctx.backend = inputs
    ctx.save_for_backward(*weights, *logs)


def _lasso_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    count = len(ctx.scales)
    saved = list(ctx.saved_tensors)
    grads = _ops.group_lasso_backward(grad, saved[:count], saved[count:], ctx.scales, ctx.backend)
    return list(grads[:count]), list(grads[count:]), None, None


def _lasso_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, weights, logs, ctx.scales, ctx.backend = inputs
    ctx.save_for_backward(grad, *weights, *logs)


def _lasso_double_backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    count = len(ctx.scales)
    grad, *saved = ctx.saved_tensors
    towards = _filled(grads, saved)
    out = _ops.group_lasso_hessian(
        grad, towards[:count], towards[count:], saved[:count], saved[count:], ctx.scales, ctx.backend
    )
    return out[0], list(out[1 : 1 + count]), list(out[1 + count :]), None, None


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_third_order(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError("group_lasso is differentiable twice: its Hessian product has no derivative")


def _plain(definition: Callable[..., Any]) -> Callable[..., Any]:
    """``definition`` with the operators' last argument, the backend, which it has no use for."""

    def run(*args: Any) -> Any:
        return definition(*args[:-1])

    return run


def _harden_definition(logs: Tensor) -> Tensor:
    finite = torch.where(logs.isfinite(), logs, 0.0)
    return reference.harden(logs.detach()) + (finite - finite.detach())


_Setup = Callable[[Any, tuple[Any, ...], Any], None]
# In torch's own operators, the arguments' backend left out; backward; context.
_DERIVATIVES: dict[str, tuple[Callable[..., Any], Callable[..., Any], _Setup]] = {
    "sample_groups": (_plain(reference.sample_groups), _sample_backward, _sample_setup),
    "sample_groups_backward": (
        _plain(reference.sample_groups_backward),
        _sample_double_backward,
        _sample_backward_setup,
    ),
    "harden_groups": (_harden_definition, _harden_backward, _no_setup),
    "group_lasso": (_plain(reference.group_lasso), _lasso_backward, _lasso_setup),
    "group_lasso_backward": (
        _plain(reference.group_lasso_backward),
        _lasso_double_backward,
        _lasso_backward_setup,
    ),
    "group_lasso_hessian": (_plain(reference.group_lasso_hessian), _no_third_order, _no_setup),
}
for _name, (_definition, _backward, _setup) in _DERIVATIVES.items():
    register_derivatives(_name, _definition, _backward, _setup)


# ---- FLOP formulas


def _lasso_flops(
    weights: Sequence[Sequence[int]], logs: Sequence[Sequence[int]], passes: int, products: int
) -> int:
    """``passes`` multiply-adds for each weight and ``products`` (G, O) x (O, C) matrix products for each
    layer."""
    total = 0
    for weight, log in zip(weights, logs, strict=True):
        total += 2 * passes * math.prod(weight) + 2 * products * log[0] * weight[0] * weight[1]
    return total


@register_flop_formula(_ops.group_lasso)
def _(weights: Any, log_probabilities: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _lasso_flops(weights, log_probabilities, 1, 1)


@register_flop_formula(_ops.group_lasso_backward)
def _(
    grad: Any, weights: Any, log_probabilities: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return _lasso_flops(weights, log_probabilities, 2, 3)


@register_flop_formula(_ops.group_lasso_hessian)
def _(
    grad: Any,
    weight_directions: Any,
    log_directions: Any,
    weights: Any,
    log_probabilities: Any,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return _lasso_flops(weights, log_probabilities, 4, 9)


# ---- public functions


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def check_temperature(temperature: object) -> float:
    """``temperature`` as a float; TypeError or ValueError where it is not a finite number above 0."""
    value = _number("temperature", temperature)
    if not math.isfinite(value) or value <= 0.0:
        raise ValueError(f"temperature: expected a finite number above 0, got {value}")
    return value


def check_form(form: str) -> str:
    """``form`` if it is one of :data:`FORMS`, else ValueError."""
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    return form


def _check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        accepted = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: dtype {value.dtype} is not supported, accepted: {accepted}")
    return value


def standard_gumbel(
    size: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard Gumbel noise, -log of a standard exponential, always finite."""
    tiny = torch.finfo(dtype).tiny
    noise = torch.empty(tuple(size), dtype=dtype, device=device).exponential_(generator=generator)
    return noise.clamp_min_(tiny).log_().neg_()


def sample_groups(
    logits: Tensor,
    temperature: float,
    *,
    noise: Tensor | None = None,
    hard: bool = False,
    form: str = "paper",
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """One Gumbel-softmax sample of the group of every filter, as log-probabilities (G, O) over the groups.

    ``logits``: (G, O), float32 or float64; O may run over the filters of all layers. ``temperature``:
    finite, above 0.
    ``noise``: standard Gumbel noise (G, O) of the logits' dtype and device, drawn (from ``generator`` if
    given) when None. ``form``: "paper", log_softmax(logits / temperature + noise), as the authors of
    Dynamic Structure Pruning release it, or "gumbel", log_softmax((logits + noise) / temperature), as
    ``torch.nn.functional.gumbel_softmax``. At temperature 1 the two are the same.

    ``hard=True`` gives 0 for the group with the largest probability (the first one on a tie) and -inf for
    the others; its gradient is, straight through, that of the soft log-probabilities, and finite.
    ``.exp()`` of either is what
    ``gumbel_softmax(..., dim=0)`` returns. Differentiable any number of times in ``logits`` and ``noise``.

    Raises TypeError for a wrong type or dtype and ValueError for a wrong shape, device or value.
    """
    _check_tensor("logits", logits, _LOGIT_DTYPES)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(
            f"logits: expected a non-empty (groups, filters) matrix, got shape {tuple(logits.shape)}"
        )
    value = check_temperature(temperature)
    divide = check_form(form) == "gumbel"
    if not isinstance(hard, bool):
        raise TypeError(f"hard: expected True or False, got {type(hard).__name__}")
    if noise is None:
        noise = standard_gumbel(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
    else:
        _check_tensor("noise", noise, _LOGIT_DTYPES)
        if generator is not None:
            raise ValueError("generator: accepted only where noise is None, got both")
        if noise.shape != logits.shape:
            raise ValueError(
                f"noise: expected the logits' shape {tuple(logits.shape)}, got {tuple(noise.shape)}"
            )
        if noise.dtype != logits.dtype:
            raise TypeError(f"noise: expected the logits' dtype {logits.dtype}, got {noise.dtype}")
        if noise.device != logits.device:
            raise ValueError(f"noise: expected the logits' device {logits.device}, got {noise.device}")
    soft = _ops.sample_groups(
        logits, noise, value, divide, backend_for(backend, logits.device.type, logits.dtype)
    )
    return cast(Tensor, _ops.harden_groups(soft) if hard else soft)


def _check_list(name: str, value: object) -> list[Any]:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a list, one entry a layer, got {type(value).__name__}")
    return list(value)


def check_scales(scales: object, count: int) -> list[float]:
    """``scales`` as ``count`` finite floats (all 1 for None), else TypeError or ValueError."""
    if scales is None:
        return [1.0] * count
    if isinstance(scales, Tensor):
        scales = scales.detach().tolist()
    if not isinstance(scales, Sequence) or isinstance(scales, str):
        raise TypeError(f"scales: expected a list of numbers, one a layer, got {type(scales).__name__}")
    if len(scales) != count:
        raise ValueError(f"scales: expected {count} numbers, one a layer, got {len(scales)}")
    values = [_number(f"scales[{index}]", scale) for index, scale in enumerate(scales)]
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"scales[{index}]: expected a finite number, got {value}")
    return values


def _shared_backend(backend: str | None, weights: Sequence[Tensor]) -> str:
    """The backend for a list of weights, which must run all of them."""
    names = {backend_for(backend, weight.device.type, weight.dtype) for weight in weights}
    return names.pop() if len(names) == 1 else "reference"


def group_lasso(
    weights: Sequence[Tensor],
    log_probabilities: Sequence[Tensor],
    scales: Sequence[float] | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The group penalty of every layer, a vector (L,) in float32 (float64 for float64 weights).

    ``weights``: one tensor a layer, (O, C) or (O, C, ...taps), float32, float64, bfloat16 or float16 (the
    halves are accumulated in float32). ``log_probabilities``: one (G, O) matrix a layer, float64 for
    float64 weights and float32 otherwise, -inf where a probability is 0. ``scales``: one finite number a
    layer, 1 if None. All tensors live on one device and have one accumulation dtype.

    With p = exp(log_probabilities), R = scale * sum_g (sum_o sqrt(p[g, o]))^2 sum_c sqrt(sum_o p[g, o]^2
    sum_taps W^2) (arXiv 2303.09736). Differentiable twice in weights and log-probabilities, in closed form;
    1/0 of a norm counts as 0, so that zero weights and zero probabilities give finite gradients.

    Raises TypeError for a wrong type or dtype and ValueError for a wrong length, shape, device or scale.
    """
    layers = _check_list("weights", weights)
    logs = _check_list("log_probabilities", log_probabilities)
    if not layers:
        raise ValueError("weights: expected at least one layer, got none")
    if len(logs) != len(layers):
        raise ValueError(f"log_probabilities: expected {len(layers)} matrices, one a layer, got {len(logs)}")
    numbers = check_scales(scales, len(layers))
    first = _check_tensor("weights[0]", layers[0], _WEIGHT_DTYPES)
    dtype = reference.accumulation_dtype(first.dtype)
    for index, (weight, log) in enumerate(zip(layers, logs, strict=True)):
        _check_tensor(f"weights[{index}]", weight, _WEIGHT_DTYPES)
        _check_tensor(f"log_probabilities[{index}]", log, _LOGIT_DTYPES)
        if weight.ndim < 2 or weight.numel() == 0:
            raise ValueError(
                f"weights[{index}]: expected a non-empty (filters, channels, ...) tensor, "
                f"got shape {tuple(weight.shape)}"
            )
        if reference.accumulation_dtype(weight.dtype) != dtype:
            raise TypeError(
                f"weights[{index}]: dtype {weight.dtype} cannot stand beside {first.dtype} in one call"
            )
        if log.ndim != 2 or log.shape[0] == 0 or log.shape[1] != weight.shape[0]:
            raise ValueError(
                f"log_probabilities[{index}]: expected (groups, {weight.shape[0]}), "
                f"got shape {tuple(log.shape)}"
            )
        if log.dtype != dtype:
            raise TypeError(
                f"log_probabilities[{index}]: expected {dtype} beside {weight.dtype} weights, got {log.dtype}"
            )
        for name, tensor in (("weights", weight), ("log_probabilities", log)):
            if tensor.device != first.device:
                raise ValueError(
                    f"{name}[{index}]: expected device {first.device} as weights[0], got {tensor.device}"
                )
    return cast(Tensor, _ops.group_lasso(layers, logs, numbers, _shared_backend(backend, layers)))
