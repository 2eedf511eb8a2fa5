"""The operators' namespace: one library object into which every operator family registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

NAMESPACE = "dsp_kernels"

# One object for the life of the process: what it registered goes away with it.
library = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str) -> None:
    """Defines an operator of the namespace from its schema, marked as fit for ``torch.compile``."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def transforming() -> bool:
    """Whether forward-mode derivatives or ``torch.func``'s transforms may be following the tensors."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def register_derivatives(
    name: str,
    definition: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
) -> None:
    """Makes an operator of the namespace differentiable, in every mode that torch has.

    Args:
        name: of the operator, without the namespace.
        definition: the operator in torch's own, out-of-place operators, with the same arguments. It runs
            where kernels would lose what torch attaches to tensors: in forward mode (dual tensors, ``jvp``,
            ``jacfwd``), in the transforms of ``torch.func``, and under ``vmap``.
        backward, setup_context: for reverse mode elsewhere, as ``torch.library.register_autograd`` has them.
    """
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    # What torch.library.register_autograd registers; it drops tangents without a word.
    reverse = make_autograd_impl(operator, Info(backward, setup_context))

    def differentiate(keyset: Any, *args: Any) -> Any:
        return definition(*args) if transforming() else reverse(keyset, *args)

    def batch(keyset: Any, *args: Any) -> Any:
        return definition(*args)

    library.impl(name, differentiate, "Autograd", with_keyset=True)
    library.impl(name, batch, "FuncTorchBatched", with_keyset=True)
