"""What runs a packed graph without gradients: native segments, with torch between them.

A runner (``Runner``) is asked by ``find`` what it keeps for the arguments, flat in the order of their nest;
``run`` runs that. Where ``find`` gives None, ``reason`` says why, and the layers run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["Runner"]


class Runner(Protocol):
    """Runs a packed graph for the arguments that it has something kept for."""

    reason: str | None

    def find(self, leaves: Sequence[Any]) -> Any: ...
    def run(self, found: Any, leaves: Sequence[Any]) -> Any: ...
