"""Exported graphs freed of in-place operators without being traced a second time.

``ExportedProgram.run_decompositions`` traces the whole graph again, which takes longer than the export
itself. What it does to an inference graph is little: where nothing else is needed than what stands here, the
graph is rewritten instead.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

aten = torch.ops.aten

_ON_SIZES = {getattr(operator, name) for name in dir(operator) if not name.startswith("_")}


def _schema(node: fx.Node) -> Any:
    """The schema where the node calls an operator of torch, else None."""
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _in_place(node: fx.Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    """``relu`` for ``relu_``: the same arguments, and what would be written is returned."""
    schema = _schema(node)
    writes = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    space, name = schema.name.split("::")
    if not writes[0] or sum(writes) != 1 or not name.endswith("_") or name.startswith("_"):
        return None
    packet = getattr(getattr(torch.ops, space), name[:-1], None)
    found = getattr(packet, schema.overload_name or "default", None)
    if found is None or found._schema.is_mutable:
        return None
    given = [(a.name, str(a.type), a.kwarg_only) for a in schema.arguments]
    return found if given == [(a.name, str(a.type), a.kwarg_only) for a in found._schema.arguments] else None


def _keeps_type(node: fx.Node) -> bool:
    """Whether the functional form returns what is written: a comparison and a wider number would not."""
    function = _functional(node)
    if function is None:
        return False
    values: Any = map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    args, kwargs = values
    with torch.no_grad():
        out = function(*args, **kwargs)
    return isinstance(out, torch.Tensor) and (out.dtype, out.shape) == (args[0].dtype, args[0].shape)


def _makes_new(node: fx.Node) -> bool:
    """Whether the node's value is one tensor that shares its memory with none of the arguments."""
    schema = _schema(node)
    if schema is None or schema.is_mutable:
        return False
    if torch.Tag.maybe_aliasing_or_mutating in node.target.tags:  # type: ignore[union-attr]
        return node.target is aten.batch_norm.default  # in evaluation; _simple lets no other pass
    return [(out.alias_info, str(out.type)) for out in schema.returns] == [(None, "Tensor")]


def _simple(node: fx.Node) -> bool:
    """Whether the node (in-place ones excepted) stays as it is or has a rule in ``make_functional``."""
    if node.op != "call_function":
        return True
    schema = _schema(node)
    if schema is None:
        values = [node, *node.all_input_nodes]
        return node.target in _ON_SIZES and (
            node.target is operator.getitem
            or not any(isinstance(v.meta.get("val"), torch.Tensor) for v in values)
        )
    if node.target is aten.batch_norm.default:
        return len(node.args) >= 8 and node.args[5] is False and None not in node.args[3:5]
    if node.target is aten.dropout.default:
        return node.args[2:] == (False,)
    if node.target in (aten.flatten.using_ints, aten.reshape.default):
        return True  # means what the view means that it would become
    if node.target is aten.lift_fresh_copy.default:
        return False  # a constant made in forward, which becomes a plain copy
    view = any(out.alias_info is not None for out in schema.returns)
    composed = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)  # type: ignore[union-attr]
    return not (view and composed) and torch.Tag.maybe_aliasing_or_mutating not in node.target.tags  # type: ignore[union-attr]


def is_simple(graph: fx.Graph) -> bool:
    """Whether ``make_functional`` does to this graph what tracing it again would.

    An in-place operator may write into a tensor that an operator made, as long as no view of it was taken
    before: then nobody else sees the write but who names the tensor.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    names: dict[fx.Node, list[fx.Node]] = {}  # one list for all nodes that are the same memory

    def readers(node: fx.Node, members: list[fx.Node]) -> Iterator[fx.Node]:
        for member in members:
            yield from (user for user in member.users if order[user] < order[node])

    for node in graph.nodes:
        written = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        same = _in_place(node) or node.target is aten.dropout.default
        if not (_in_place(node) or _simple(node)) or (same and written is None):
            return False
        if not same:
            continue
        assert written is not None
        members = names.setdefault(written, [written])
        if _in_place(node) and not (
            _makes_new(members[0])
            and all(_makes_new(user) or user in members for user in readers(node, members))
            and _keeps_type(node)
        ):
            return False
        members.append(node)
        names[node] = members
    return True


def make_functional(graph: fx.Graph) -> None:
    """Rewrites batch_norm, dropout and in-place operators of a graph that ``is_simple``, in place.

    One that was traced again has nothing of these but what it writes into its arguments, which stays.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is aten.dropout.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.batch_norm.default:
            x, weight, bias, mean, variance, _, momentum, epsilon = node.args[:8]
            with graph.inserting_before(node):
                norm = graph.call_function(
                    aten._native_batch_norm_legit_no_training.default,
                    (x, weight, bias, mean, variance, momentum, epsilon),
                )
                out = graph.call_function(operator.getitem, (norm, 0))
            out.meta = dict(node.meta)
            norm.meta = {**node.meta, "val": (node.meta.get("val"),)}
            node.replace_all_uses_with(out)
            graph.erase_node(node)
        elif _in_place(node):
            written, function = node.args[0], _functional(node)
            if isinstance(written, fx.Node) and written.op == "placeholder":
                continue
            assert isinstance(written, fx.Node) and function is not None
            node.target = function
            for user in list(written.users):
                if order.get(user, -1) > order[node]:
                    user.replace_input_with(written, node)
    graph.lint()
