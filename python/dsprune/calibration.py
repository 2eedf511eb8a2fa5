"""What a few inputs tell of a trained network: second moments of channels, and importances of products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .graph import as_inputs, evaluating

KINDS = ("magnitude", "activation", "taylor")

Closure = Callable[[Any], Tensor]


def each_batch(batches: Any) -> Iterator[Any]:
    """The batches of the argument ``batches``, of which there must be one at least."""
    if isinstance(batches, (Tensor, str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of batches, got {type(batches).__name__}")
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise ValueError("batches: expected one batch at least, got none")


def input_batches(batches: Any) -> Iterator[tuple[Any, ...]]:
    """Each batch of inputs as positional arguments of the model."""
    for index, batch in enumerate(each_batch(batches)):
        try:
            inputs = as_inputs(batch)
        except TypeError:
            raise TypeError(
                f"batches[{index}]: expected a tensor, or a tuple of positional arguments with at least one "
                f"tensor, got {type(batch).__name__}"
            ) from None
        for value in inputs:
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"batches[{index}]: expected finite values")
        yield inputs


def second_moments(model: nn.Module, names: Sequence[str], batches: Any) -> dict[str, Tensor]:
    """Convolution name -> (I,) mean of x² over images and positions of its input, float64.

    The model runs in evaluation mode and is left as it was. A module that runs more than once has the mean
    over all its inputs. ValueError for one that does not run.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(names, 0)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = (args[0] if args else named["input"]).detach()
            x = x if x.dim() == 4 else x[None]
            squares = x.double().square().sum((0, 2, 3)).cpu()
            sums[name] = sums[name] + squares if name in sums else squares
            counts[name] += x.shape[0] * x.shape[2] * x.shape[3]

        return record

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in names
    ]
    try:
        with evaluating(model), torch.no_grad():
            for inputs in input_batches(batches):
                model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if not counts[name]:
            raise ValueError(f"batches: no input reaches {name!r}")
        if not bool(sums[name].isfinite().all()):
            raise ValueError(f"batches: the input of {name!r} is not finite")
    return {name: sums[name] / counts[name] for name in names}


def squared_sums(weight: Tensor) -> Tensor:
    """(O, I) sums of W² over the taps of a weight (O, I, kh, kw), float64, on the CPU."""
    return weight.detach().double().square().flatten(2).sum(-1).cpu()


def taylor(model: nn.Module, names: Sequence[str], batches: Any, closure: Closure) -> dict[str, Tensor]:
    """Convolution name -> (O, I) mean over the batches of (Σ_taps W ∂loss/∂W)², float64.

    That is the square of the first-order estimate of what the loss gains where the product goes (Molchanov et
    al., "Importance Estimation for Neural Network Pruning", CVPR 2019, equation 7). The model runs in
    evaluation mode; gradients that are stored in it stay as they are.
    """
    owners = [model.get_submodule(name) for name in names]
    weights = [owner._parameters.get("weight", owner._parameters.get("weight_orig")) for owner in owners]
    sums: dict[str, Tensor] = {}
    count = 0
    required = [w.requires_grad for w in weights if w is not None]
    if len(required) < len(weights):
        raise ValueError("model: a convolution's weight is no parameter; remove its parametrization")
    found = [w for w in weights if w is not None]
    try:
        for weight in found:
            weight.requires_grad_(True)
        with evaluating(model), torch.enable_grad():
            for batch in each_batch(batches):
                loss = closure(batch)
                if not isinstance(loss, Tensor):
                    raise TypeError(
                        f"closure: expected it to return the loss, a tensor, got {type(loss).__name__}"
                    )
                if loss.numel() != 1 or not loss.requires_grad:
                    raise ValueError("closure: expected a loss with one element that requires a gradient")
                gradients = torch.autograd.grad(loss, found, allow_unused=True)
                count += 1
                for name, weight, gradient in zip(names, found, gradients, strict=True):
                    if gradient is None:
                        raise ValueError(f"closure: the loss does not depend on the weight of {name!r}")
                    part = (weight.detach().double() * gradient.double()).flatten(2).sum(-1).square().cpu()
                    sums[name] = sums[name] + part if name in sums else part
    finally:
        for weight, before in zip(found, required, strict=True):
            weight.requires_grad_(before)
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise ValueError(f"closure: the gradient for the weight of {name!r} is not finite")
    return {name: total / count for name, total in sums.items()}


def importances(
    kind: str,
    model: nn.Module,
    clean: nn.Module,
    names: Sequence[str],
    batches: Any,
    closure: Closure | None,
) -> dict[str, Tensor]:
    """Convolution name -> (O, I) importance, for the kinds that need batches; nothing for "magnitude".

    ``model``: the user's, which ``closure`` runs; ``clean``: its copy without masks.
    """
    if kind not in KINDS:
        raise ValueError(f"importance: expected one of {list(KINDS)} or a mapping of names, got {kind!r}")
    if kind != "taylor" and closure is not None:
        raise ValueError(f"closure: goes with importance='taylor', got importance={kind!r}")
    if kind == "magnitude":
        if batches is not None:
            raise ValueError("batches: go with importance='activation' or 'taylor', got 'magnitude'")
        return {}
    modules = dict(model.named_modules())
    for name in names:
        if not isinstance(modules.get(name), nn.Conv2d):
            raise ValueError(f"importance: {name!r} is no Conv2d, which {kind!r} needs")
    if batches is None:
        raise ValueError(f"batches: expected inputs to calibrate on, for importance={kind!r}")
    if kind == "taylor":
        if not callable(closure):
            raise TypeError("closure: expected a function from a batch to the loss, for importance='taylor'")
        return taylor(model, names, batches, closure)
    moments = second_moments(clean, names, batches)
    return {
        name: squared_sums(clean.get_submodule(name).weight) * moments[name]  # type: ignore[arg-type]
        for name in names
    }
