"""Prune masks by the convention of ``torch.nn.utils.prune``, and parametrizations."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .state import tensors_in

__all__ = [
    "applied",
    "bare",
    "copies_of_results",
    "hold",
    "holding",
    "masked",
    "masks_of",
    "renew_results",
    "settle",
    "settle_parametrizations",
    "without_results",
]


def copies_of_results(model: nn.Module) -> dict[int, Any]:
    """What ``copy.deepcopy`` wants as its memo to copy a model that carries masks: their tensors are results
    of autograd, which it refuses.
    """
    return {id(tensor): tensor.detach().clone() for tensor in tensors_in(model) if not tensor.is_leaf}


def _hooks(module: nn.Module) -> Iterator[tuple[int, str]]:
    """The key of each pruning hook of a module, and the tensor that it masks."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod):
            yield key, hook._tensor_name


def holding(model: nn.Module) -> dict[int, Any]:
    """What ``copy.deepcopy`` wants as its memo to copy a model whose masks are applied next (``settle``):
    masks and what they are on alone are of no further use, and may be the largest part of it.
    """
    found: list[Any] = []
    unmasked: set[int] = set()
    for module in model.modules():
        hooks = list(_hooks(module))
        names = {f"{tensor}_orig" for _, tensor in hooks}
        unmasked |= {id(held) for name, held in module._parameters.items() if name not in names}
        if isinstance(module, parametrize.ParametrizationList):
            continue  # applied before the masks, in place
        for key, tensor in hooks:
            found += [module._forward_pre_hooks[key], module._buffers[f"{tensor}_mask"]]
            found += [module._parameters[f"{tensor}_orig"], vars(module).get(tensor)]
    return {id(thing): thing for thing in found if thing is not None and id(thing) not in unmasked}


def without_results(model: nn.Module) -> dict[int, Any]:
    """What ``copy.deepcopy`` wants as its memo to copy a model with no memory for what the masks leave;
    ``renew_results`` brings it back.
    """
    results = [
        vars(module).get(tensor)
        for module in model.modules()
        if not isinstance(module, parametrize.ParametrizationList)
        for _, tensor in _hooks(module)
    ]
    return {
        id(value): value.detach().new_zeros(()).expand(value.shape) for value in results if value is not None
    }


def renew_results(model: nn.Module) -> None:
    """Computes what masks leave from the weights, as the next forward pass will."""
    for module in model.modules():
        for _, tensor in _hooks(module):
            original, mask = module._parameters[f"{tensor}_orig"], module._buffers[f"{tensor}_mask"]
            assert original is not None and mask is not None
            setattr(module, tensor, applied(original, mask))


def masked(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every tensor that a prune mask is on, by the name that it has without masks: its module and its name
    there. A module with several names is there under each.
    """
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for _, tensor in _hooks(module):
            found[f"{prefix}.{tensor}" if prefix else tensor] = (module, tensor)
    return found


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The prune masks of a model by the masked tensors' names: copies on the CPU, bool where they hold zeros
    and ones.
    """
    out = {}
    for name, (module, tensor) in masked(model).items():
        mask = module._buffers[f"{tensor}_mask"]
        assert mask is not None
        mask = mask.detach().cpu()
        kept = mask.ne(0)
        out[name] = kept if bool(mask.eq(kept).all()) else mask.clone()
    return out


def hold(module: nn.Module, tensor: str, mask: torch.Tensor) -> None:
    """Puts a prune mask on a module's parameter, or sets the one that is there. The masked tensor is none of
    autograd's until the next forward pass, so that the module can be copied.
    """
    with torch.no_grad():
        known = module._buffers.get(f"{tensor}_mask")
        if known is None or f"{tensor}_orig" not in module._parameters:
            parameter = module._parameters[tensor]
            assert parameter is not None
            prune.custom_from_mask(module, tensor, mask.to(parameter))
        else:
            known.copy_(mask)
            original = module._parameters[f"{tensor}_orig"]
            assert original is not None
            setattr(module, tensor, applied(original, known))


def applied(original: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What a mask leaves. No zero has a sign: it would tell of the value that was there, and files of the
    same network would differ.
    """
    return (original.detach() * mask.to(original.dtype)).add_(0.0)


def _take_off(module: nn.Module, key: int, tensor: str) -> tuple[nn.Parameter, torch.Tensor]:
    """Takes a mask's hook and tensors off a module; the parameter, and its masked value."""
    original = module._parameters.pop(f"{tensor}_orig")
    mask = module._buffers.pop(f"{tensor}_mask")
    assert original is not None and mask is not None
    del module._forward_pre_hooks[key]
    module.__dict__.pop(tensor, None)
    return original, applied(original, mask)


def bare(module: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A shallow copy of a module with its masks applied for good, and the masks; its other tensors are the
    module's own. The module itself where it has none.
    """
    hooks = list(_hooks(module))
    if not hooks:
        return module, {}
    out = copy.copy(module)
    out._parameters, out._buffers = dict(module._parameters), dict(module._buffers)
    out._forward_pre_hooks = OrderedDict(module._forward_pre_hooks)
    masks = {}
    for key, tensor in hooks:
        mask = out._buffers[f"{tensor}_mask"]
        assert mask is not None
        masks[tensor] = mask
        original, value = _take_off(out, key, tensor)
        out._parameters[tensor] = nn.Parameter(value, requires_grad=original.requires_grad)
    return out, masks


def settle(model: nn.Module) -> None:
    """Applies all prune masks for good, in place.

    A parameter that several modules share stays shared by those whose masked values agree; the others get
    one of their own.
    """
    todo = [(module, key, tensor) for module in model.modules() for key, tensor in _hooks(module)]
    taken = [(module, tensor, *_take_off(module, key, tensor)) for module, key, tensor in todo]
    made: dict[int, list[nn.Parameter]] = {}
    for held in model.parameters():
        made.setdefault(id(held), [held])
    for module, tensor, original, value in taken:
        known = made.setdefault(id(original), [])
        parameter = next((p for p in known if torch.equal(p, value)), None)
        if parameter is None:
            parameter = nn.Parameter(value, requires_grad=original.requires_grad)
            known.append(parameter)
        module.register_parameter(tensor, parameter)


def settle_parametrizations(model: nn.Module) -> None:
    """Takes every parametrization off, in place, ``torch.nn.utils.weight_norm`` and ``spectral_norm`` of old
    included: the weights become parameters with the values computed.

    A parameter under a parametrization that somebody else holds too stays as it was there.
    """
    holders: dict[int, int] = {}
    for module in model.modules():
        for held in module._parameters.values():
            if held is not None:
                holders[id(held)] = holders.get(id(held), 0) + 1
    for module in list(model.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm) and f"{hook.name}_v" in module._parameters:  # else masked
                nn.utils.remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm) and f"{hook.name}_orig" in module._parameters:
                nn.utils.remove_spectral_norm(module, hook.name)
        if not parametrize.is_parametrized(module):
            continue
        # A copied module shares the original's generated class; taking the property off it must not reach it.
        module.__class__ = type(type(module).__name__, type(module).__bases__, dict(vars(type(module))))
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            listed: nn.Module = module.parametrizations[name]  # type: ignore[index, assignment]
            for key, parameter in list(listed._parameters.items()):
                if parameter is not None and holders[id(parameter)] > 1:
                    copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                    listed._parameters[key] = copied
            of_parameters = any(parameter is not None for parameter in listed._parameters.values())
            with torch.enable_grad():  # torch makes a buffer of what wants no gradients
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            if of_parameters and (value := module._buffers.pop(name, None)) is not None:
                module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))
