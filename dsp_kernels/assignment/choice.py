"""Which implementation of group assignment runs."""

from __future__ import annotations

import functools

import torch

from ..backends import choose, implementation, interpreted

__all__ = ["backend_for", "room"]


def backend_for(backend: str | None, device_type: str, dtype: torch.dtype) -> str:
    """The backend for group assignment on tensors of ``dtype``.

    Raises ValueError for a wish that cannot be met, TypeError for one that is no string.
    """
    # The choice is worded for the convolution, which is not float64; every room here is.
    name = choose(backend, device_type, torch.float32 if dtype == torch.float64 else dtype)
    if name == "triton" and device_type != "cpu" and interpreted():
        # The tables hold addresses, which the interpreter takes for those of host memory.
        if backend is not None:
            raise ValueError(
                "backend 'triton' cannot run here: Triton's interpreter reads host memory only; "
                f"for {dtype} on {device_type} accepted: ['reference']"
            )
        return "reference"
    return name


# As ``choose``: made while tracing, part of the graph.
backend_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


room = functools.partial(implementation, "assignment")
