"""Multiply-adds as torch counts them: one counter for dense, masked and packed networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from .graph import evaluating
from .inputs import own_tensors
from .masks import masked
from .state import preserved

__all__ = ["Work", "one_image", "work_of"]

# Products that torch has no formula for; its other operators without one (sums, norms, pooling) are no work.
_PRODUCTS = {
    "mv", "addmv", "dot", "vdot", "addr", "addbmm", "_addmm_activation", "_int_mm", "_trilinear",
    "_cdist_forward", "_euclidean_dist", "grid_sampler_2d", "grid_sampler_3d", "mkldnn_rnn_layer",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "_cudnn_rnn", "miopen_rnn",
    "_transformer_encoder_layer_fwd",
    "_native_multi_head_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable", "_fft_c2c", "_fft_r2c", "_fft_c2r", "_sparse_mm",
    "_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu",
}  # fmt: skip
_NO_WORK = {("dsp_kernels", "program_adaptive_avg_pool")}
_QUIET_NAMESPACES = {"aten", "prim", "prims", "profiler", "inductor"}


@dataclass(frozen=True)
class Work:
    """The multiply-adds of one forward pass.

    ``macs`` has them by the parameter that is an operator's weight (all its names, in the order of the
    model), and by the operator's name where its factors are computed. ``uncounted`` names the operators that
    multiply and that torch has no formula for, with how often each ran.
    """

    macs: dict[tuple[str, ...], int]
    uncounted: dict[str, int]


class _Seen(TorchDispatchMode):
    """Notes the operators that ran and that nobody counts."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.uncounted: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "_overloadpacket", func)
        if packet not in flop_registry and func not in flop_registry:
            namespace, _, name = str(packet).rpartition(".")
            namespace = getattr(func, "namespace", namespace)
            product = name in _PRODUCTS or name.startswith(("linalg_", "_linalg_"))
            foreign = namespace not in _QUIET_NAMESPACES and (namespace, name) not in _NO_WORK
            if product if namespace == "aten" else foreign:
                self.uncounted[str(packet)] = self.uncounted.get(str(packet), 0) + 1
        if isinstance(func, torch._ops.HigherOrderOperator):
            return NotImplemented
        return func(*args, **(kwargs or {}))


class _Names:
    """Which parameter a tensor is, or is a view of."""

    def __init__(self, model: nn.Module) -> None:
        self.known: dict[int, list[tuple[int, int, tuple[str, ...]]]] = {}
        names: dict[int, tuple[torch.Tensor, list[str]]] = {}
        for name, held in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(held), (held, []))[1].append(name)
        for parameter, found in names.values():
            start = int(parameter.storage_offset())
            place = self.known.setdefault(parameter.untyped_storage().data_ptr(), [])
            place.append((start, start + parameter.numel(), tuple(found)))
        self.masked = masked(model)

    def of(self, tensor: torch.Tensor) -> tuple[str, ...] | None:
        storage, offset = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
        for start, end, names in self.known.get(storage, []):
            if start <= offset < end:
                return names
        for name, (module, key) in self.masked.items():  # made anew in each pass
            value = getattr(module, key, None)
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == storage:
                return (name,)
        return None


def _factors(packet: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """The operands of a product that may be its weight, the likeliest first; no bias among them."""
    name = str(packet).rpartition(".")[2]
    if str(packet).startswith("dsp_kernels."):
        return [args[1]]
    operands = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
    return [value for value in reversed(operands) if isinstance(value, torch.Tensor)]


def work_of(model: nn.Module, inputs: tuple[Any, ...]) -> Work:
    """Runs a model once, in evaluation mode, and counts: ``torch.utils.flop_counter``'s formulas, halved.

    Raises whatever the model raises on ``inputs``.
    """
    names = _Names(model)
    flops: dict[tuple[str, ...], int] = {}

    def counted(packet: Any, formula: Callable[..., int]) -> Callable[..., int]:
        def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            found = int(formula(*args, **kwargs, out_val=out_val))
            owners = (names.of(factor) for factor in _factors(packet, args))
            operator = (f"({str(packet).rpartition('.')[2]})",)
            key = next((owner for owner in owners if owner is not None), operator)
            flops[key] = flops.get(key, 0) + found
            return found

        count._get_raw = True  # type: ignore[attr-defined]
        return count

    mapping = {packet: counted(packet, formula) for packet, formula in flop_registry.items()}
    seen = _Seen()
    given, counter = own_tensors(inputs), FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.no_grad(), evaluating(model), preserved(model), seen, counter:
        model(*given)
    return Work({key: count // 2 for key, count in flops.items()}, seen.uncounted)


def one_image(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], Work]:
    """The inputs cut down to one image, and the work on it; the inputs as they are where that fails."""
    first = next((v for v in torch.utils._pytree.tree_leaves(inputs) if isinstance(v, torch.Tensor)), None)
    batch = first.shape[0] if first is not None and first.dim() > 1 else 1
    if batch > 1:

        def cut(value: torch.Tensor) -> torch.Tensor:
            return value[:1] if value.dim() > 1 and value.shape[0] == batch else value

        single = tree_map_only(torch.Tensor, cut, inputs)
        try:
            return single, work_of(model, single)
        except Exception:  # an image without a batch, or a model that wants several
            pass
    return inputs, work_of(model, inputs)
