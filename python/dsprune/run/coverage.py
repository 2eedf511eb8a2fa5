"""What of a packed network runs natively for given arguments, and what keeps the rest in torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..pack import PackedNetwork
from .native import NativeRunner
from .segments import Plan

__all__ = ["Coverage", "coverage"]


@dataclass(frozen=True)
class Coverage:
    """What runs where; ``str()`` is a table.

    Attributes:
        native: the share of the multiply-adds, as torch counts them, that run in native segments, 0 to 1; of
            a network that multiplies nothing, 1 where all of it is native, else 0.
        segments: how many native segments there are.
        reasons: by operator or layer that runs in torch, how often it does; arithmetic on sizes is not among
            them. Where nothing is native for another cause (hooks, another backend, ...): that cause, once.
        reason: why the first operator that runs in torch does; None where all is native.
        macs: the multiply-adds of one image.
        parts: of each segment, in order, the number of operators and layers and the multiply-adds.
    """

    native: float
    segments: int
    reasons: dict[str, int]
    reason: str | None
    macs: int
    parts: tuple[tuple[int, int], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        rows = [("runs", "operators", "multiply-adds", "share")]
        for number, (steps, macs) in enumerate(self.parts, 1):
            share = f"{macs / self.macs:.1%}" if self.macs else ""
            rows.append((f"native segment {number}", str(steps), f"{macs:,}", share))
        left = self.macs - sum(macs for _, macs in self.parts)
        share = f"{1 - self.native:.1%}" if self.macs else ""
        rows.append(("torch", str(sum(self.reasons.values())), f"{left:,}", share))
        rows += [(f"  {name}", str(count), "", "") for name, count in self.reasons.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        text = "\n".join(line.rstrip() for line in lines)
        return text if self.reason is None else f"{text}\nfirst in torch: {self.reason}"


def coverage(packed: PackedNetwork, *inputs: Any) -> Coverage:
    """What runs natively where a packed network is called with these arguments, without gradients.

    Args:
        packed: from ``pack`` or ``load``.
        inputs: the arguments of its forward, in the order of their position. Nothing is computed of what is
            in them.

    Raises:
        TypeError: ``packed`` is no packed network, or has no such arguments. ValueError: it does not take
        them.
    """
    if not isinstance(packed, PackedNetwork):
        raise TypeError(f"packed: expected a PackedNetwork, got {type(packed).__name__}")
    if not packed.fused:
        return _nothing(packed.unfused_reason or "layers were replaced one by one")
    with torch.no_grad():
        args, kwargs = packed.bind(inputs)
        runner, leaves = packed.runner_for(args, kwargs), tree_leaves((args, kwargs))
        found = runner.plan(leaves) if isinstance(runner, NativeRunner) else runner.find(leaves)
    if found is None:
        return _nothing(runner.reason or "nothing is native")
    if not isinstance(found, Plan):  # a CUDA graph has all of the network
        return Coverage(1.0, 1, {}, None, 0)
    parts = tuple((segment.steps, segment.macs) for segment in found.segments)
    macs = sum(count for _, count in parts)
    share = macs / found.macs if found.macs else float(found.whole)
    return Coverage(share, len(parts), dict(found.torch), found.reason, found.macs, parts)


def _nothing(reason: str) -> Coverage:
    return Coverage(0.0, 0, {reason: 1}, reason, 0)
