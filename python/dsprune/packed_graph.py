"""The graph of a packed network, which pickles as data: nodes and modules, and no code."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.node import _get_qualified_name, map_aggregate

__all__ = ["PackedGraph"]

# Where functions that a graph calls may come from.
MODULES = ("torch", "operator", "_operator", "math", "builtins", "dsp_kernels", "dsprune")
_OF_GRAPHS = set(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - set(vars(nn.Module()))


@dataclass(frozen=True)
class _Value:
    """Stands for the value of a node."""

    node: str


@dataclass(frozen=True)
class _Nodes:
    """A graph without its modules: per node (kind, name, target, arguments, keywords), and how it takes its
    inputs and gives its outputs.
    """

    nodes: tuple[tuple[str, str, str, Any, Any], ...]
    signature: Any  # torch.fx's _PyTreeInfo; None: flat

    @classmethod
    def of(cls, graph: fx.Graph) -> _Nodes:
        def stand_in(leaf: Any) -> Any:
            return _Value(leaf.name) if isinstance(leaf, fx.Node) else leaf

        def plain(value: Any) -> Any:
            return map_aggregate(value, stand_in)

        codegen = graph._codegen
        return cls(
            tuple((n.op, n.name, _name(n.target), plain(n.args), plain(n.kwargs)) for n in graph.nodes),
            codegen.pytree_info if isinstance(codegen, _PyTreeCodeGen) else None,
        )

    def graph(self) -> fx.Graph:
        graph, made = fx.Graph(), dict[str, fx.Node]()

        def linked(value: Any) -> Any:
            return map_aggregate(value, lambda leaf: made[leaf.node] if isinstance(leaf, _Value) else leaf)

        for kind, name, target, args, kwargs in self.nodes:
            called = _function(target) if kind == "call_function" else target
            made[name] = graph.create_node(kind, called, linked(args), linked(kwargs), name)
        if self.signature is not None:
            graph.set_codegen(_PyTreeCodeGen(self.signature))
        return graph


def _name(target: Any) -> str:
    """A node's target as text. Raises TypeError for a function that has no name in ``MODULES``."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target.namespace}.{target._opname}.{target._overloadname}"
    name = _get_qualified_name(target)
    try:
        found = _function(name)
    except (ValueError, AttributeError, ImportError):
        found = None
    if found is not target:
        raise TypeError(f"a packed network that calls {name} does not pickle: it is no function of {MODULES}")
    return name


def _function(name: str) -> Callable[..., Any]:
    """The function of a name that ``_name`` gave."""
    first, *path = name.split(".")
    if first not in MODULES:
        raise ValueError(f"{name} is no function of {MODULES}")
    value: Any = importlib.import_module(first)
    for position, part in enumerate(path):
        if not hasattr(value, part) and isinstance(value, type(operator)):
            importlib.import_module(".".join([first, *path[: position + 1]]))
        value = getattr(value, part)
    if not callable(value):
        raise ValueError(f"{name} is no function")
    return cast(Callable[..., Any], value)


def _rebuilt(nodes: _Nodes, state: dict[str, Any]) -> PackedGraph:
    root = nn.Module()
    root.__dict__.update(state)
    made = PackedGraph(root, nodes.graph())
    made.__dict__.update(state)
    return made


class PackedGraph(fx.GraphModule):
    """A graph of packed layers and ATen calls, its inputs and outputs in the dense network's own structure.

    ``torch.fx`` would pickle the Python code that it generates, and trace that again, which loses how outputs
    are packed. Here the nodes themselves are pickled.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "PackedGraph") -> None:
        super().__init__(root, graph, class_name)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name not in _OF_GRAPHS}
        return _rebuilt, (_Nodes.of(self.graph), state)

    def _deepcopy_init(self) -> Callable[..., None]:
        return PackedGraph.__init__
