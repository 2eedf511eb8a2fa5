"""What the values of a packed graph are at given sizes of its inputs, found without computing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["UNKNOWN", "Shapes", "batch_of", "batches", "image_of"]

UNKNOWN = object()  # the value of a node whose operator asks what is in a tensor


def batches(leaves: Sequence[Any]) -> tuple[int, ...]:
    """Per argument with dimensions, which of them were the first to have its first size."""
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
    return tuple(sizes.index(size) for size in sizes)


class Shapes:
    """Values of a graph's nodes as fake tensors, and sizes as numbers.

    The first sizes of the arguments stay symbols, equal ones one symbol, so that what is found holds for any
    batch; all others are those of ``leaves``. ``exact``: no symbols, for graphs with operators that take
    batches of one size, or look into tensors.

    Attributes:
        values: by node: a fake tensor, a nest of them, a size, a parameter, or ``UNKNOWN``.
        macs: multiply-adds by node, of one image; of all, where ``exact``.
    """

    def __init__(self, network: fx.GraphModule, leaves: Sequence[Any], *, exact: bool = False) -> None:
        self.exact = exact
        self.values: dict[fx.Node, Any] = {}
        self.macs: dict[fx.Node, int] = {}
        self._environment = None if exact else ShapeEnv()
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self._environment)
        self._batch = 1
        given = [self._fake(mode, leaf) for leaf in self._representatives(leaves)]
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), enable_python_dispatcher(), mode, counter:
            _Walk(network, self, counter).run(*given, enable_io_processing=False)

    def hold(self) -> bool:
        """Whether all was found, for a batch of any size."""
        guarded = self._environment is not None and bool(self._environment.guards)
        return not guarded and not any(value is UNKNOWN for value in self.values.values())

    def _representatives(self, leaves: Sequence[Any]) -> list[Any]:
        """Arguments with first sizes that stand for all of them: 2 and more, each for equal ones."""
        if self.exact:
            sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
            self._batch = max([1, *sizes[:1]])
            return [leaf.new_empty(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        known: dict[int, int] = {}
        out: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
                size = known.setdefault(leaf.shape[0], len(known) + 2)
                leaf = leaf.new_empty((size, *leaf.shape[1:]))
            out.append(leaf)
        self._batch = 2 if known else 1
        return out

    def _fake(self, mode: FakeTensorMode, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        dynamic = [DimDynamic.STATIC] * leaf.dim()
        if leaf.dim() > 0 and not self.exact:
            dynamic[0] = DimDynamic.DYNAMIC
        context: Any = None
        if not self.exact:
            context = StatelessSymbolicContext(dynamic_sizes=dynamic)
        return mode.from_tensor(leaf, symbolic_context=context)

    def found(self, node: fx.Node, value: Any, flops: Any) -> None:
        self.values[node] = value
        # Nothing is known of what depends on the contents of tensors.
        count = flops.node.hint if isinstance(flops, torch.SymInt) else flops
        if count:
            self.macs[node] = int(count) // 2 // self._batch


class _Walk(fx.Interpreter):
    def __init__(self, network: fx.GraphModule, shapes: Shapes, counter: FlopCounterMode) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.shapes, self.counter = shapes, counter

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return None
        before = self.counter.get_total_flops()
        value: Any = UNKNOWN
        if not any(self.env[parent] is UNKNOWN for parent in n.all_input_nodes):
            try:
                value = super().run_node(n)
            except Exception:  # an operator that looks into its tensors, or that knows no fake ones
                value = UNKNOWN
        self.shapes.found(n, value, self.counter.get_total_flops() - before)
        return value


def image_of(value: Any) -> tuple[int, ...] | None:
    """The shape of one image, (channels, height, width) or (features,), where a value of a program can stand
    for this one.
    """
    if not isinstance(value, torch.Tensor) or value.dim() not in (2, 4) or value.layout is not torch.strided:
        return None
    if value.dtype is not torch.float32 or value.device.type != "cpu":
        return None
    sizes = tuple(value.shape[1:])
    return sizes if all(isinstance(size, int) and size >= 1 for size in sizes) else None


def batch_of(value: torch.Tensor) -> Any:
    """The first size: a number, or a term of the batch's symbol, which compares as such."""
    size = value.shape[0]
    return size.node.expr if isinstance(size, torch.SymInt) else size
