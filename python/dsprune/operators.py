"""What the graph passes know of each operator: one row each.

An operator that is not here reads everything, makes values that may be anything, and runs in torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx

from dsp_kernels import tail

from . import steps

__all__ = ["ROWS", "Kind", "Operator", "find"]

aten = torch.ops.aten
INFINITY = float("inf")
# Of the definition of SELU (Klambauer et al. 2017), as torch has them.
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805

# How values, and with them channels, go through an operator:
#   pointwise    position by position: a constant position stays one
#   elementwise  position by position of two tensors that broadcast, or of a tensor and a number
#   move         moved or copied without computing
#   item         one of several results
#   flatten      (N, C, 1, 1) to (N, C): a move, in packed graphs
#   pool         over windows of each plane
#   reduction    over whole dimensions; a constant stays what it is
#   pad          around each plane
#   norm         BatchNorm in evaluation mode
#   conv, linear a layer with a weight
#   size         a number: the input's size
Kind = Literal[
    "pointwise",
    "elementwise",
    "move",
    "item",
    "flatten",
    "pool",
    "reduction",
    "pad",
    "norm",
    "conv",
    "linear",
    "size",
]


@dataclass(frozen=True)
class Operator:
    """A row.

    ``activation(*arguments after the first)``: the activation's name (``dsp_kernels.activations``), which a
    convolution before it takes in; None where these arguments have none. ``step(program, *arguments)``: adds
    program steps and returns their value, or raises ``steps.Refused``; a row without one runs in torch.
    ``export(graph, node)`` puts calls that sum as programs do in the place of a node of an exported network.
    """

    targets: tuple[Callable[..., Any], ...]
    kind: Kind | None = None
    activation: Callable[..., str | None] | None = None
    step: Callable[..., Any] | None = None
    export: Callable[[fx.Graph, fx.Node], None] | None = None
    sum: bool = False  # adds two tensors: a residual, where a convolution makes one of them
    product: bool = False  # zero times anything finite is zero
    cast: bool = False  # to the result's dtype
    average: bool = False  # zeros of the padding may count
    flattens: bool = False  # a move that may be (N, C, 1, 1) to (N, C)
    copying: Callable[..., Any] | None = None  # the same of any strides
    resized: bool = False  # a move whose sizes may come from the input's
    cut: bool = False  # a move that takes a piece out along one dimension
    tuple: bool = False  # gives several results, of which the first is meant
    writes: bool = False  # writes into its first argument


def _activated(*targets: Callable[..., Any], named: str | Callable[..., str | None]) -> Operator:
    """A pointwise operator that is an activation of programs."""
    if isinstance(named, str):
        name = named
        return Operator(targets, "pointwise", lambda: name, steps.activation(lambda: name))
    return Operator(targets, "pointwise", named, steps.activation(named))


def _moves(*targets: Callable[..., Any], **traits: Any) -> tuple[Operator, ...]:
    """Operators that move elements, whose steps are found by running them on numbers."""
    return tuple(
        Operator((target,), "move", step=steps.move(traits.get("copying") or target), **traits)
        for target in targets
    )


def _text(name: str, *values: Any) -> str | None:
    """An activation with these parameters; none where they are no numbers."""
    if not all(isinstance(value, (int, float)) for value in values):
        return None
    return f"{name}({', '.join(str(float(value)) for value in values)})"


def _hardtanh(min_val: Any = -1, max_val: Any = 1) -> str | None:
    return "relu6" if (min_val, max_val) == (0, 6) else _clamp(min_val, max_val)


def _clamp(min: Any = None, max: Any = None) -> str | None:
    return _text("clamp", -INFINITY if min is None else min, INFINITY if max is None else max)


def _elu(alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> str | None:
    return _text("elu", alpha * scale, scale) if input_scale == 1 else None


def _mean(graph: fx.Graph, node: fx.Node) -> None:
    """A mean over whole planes as the pooling of programs."""
    given: Any = node.args[1]
    if node.kwargs or {d % 4 for d in ([given] if isinstance(given, int) else given or ())} != {2, 3}:
        return
    with graph.inserting_after(node):
        made = graph.call_function(tail.adaptive_avg_pool, (node.args[0], [1, 1]))
    if not (len(node.args) > 2 and node.args[2]):
        with graph.inserting_after(made):
            made = graph.call_function(torch.flatten, (made, 1))
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _adaptive(graph: fx.Graph, node: fx.Node) -> None:
    size: Any = node.args[1]
    node.target = tail.adaptive_avg_pool
    node.args = (node.args[0], [size, size] if isinstance(size, int) else list(size))


ROWS = (
    # layers
    Operator((aten.conv2d.default, aten.conv2d.padding), "conv"),
    Operator((aten.linear.default,), "linear"),
    Operator((aten.conv_transpose2d.input,), step=steps.conv_transpose),
    Operator((aten._native_batch_norm_legit_no_training.default,), "norm", tuple=True),
    Operator((aten.batch_norm.default,), "norm"),
    Operator((F.batch_norm,), step=steps.batch_norm),  # as packed graphs have it
    Operator((aten.instance_norm.default,), step=steps.instance_norm),
    Operator((aten.group_norm.default,), step=steps.group_norm),
    Operator((aten.layer_norm.default,), step=steps.layer_norm),
    # activations
    _activated(aten.relu.default, named="relu"),
    _activated(aten.relu6.default, named="relu6"),
    _activated(aten.hardtanh.default, named=_hardtanh),
    _activated(aten.clamp.default, named=_clamp),
    _activated(aten.clamp_min.default, named=lambda min: _clamp(min)),
    _activated(aten.clamp_max.default, named=lambda max: _clamp(None, max)),
    _activated(aten.leaky_relu.default, named=lambda slope=0.01: _text("leaky_relu", slope)),
    _activated(aten.hardsigmoid.default, named="hardsigmoid"),
    _activated(aten.hardswish.default, named="hardswish"),
    _activated(aten.sigmoid.default, named="sigmoid"),
    _activated(aten.silu.default, named="silu"),
    _activated(aten.tanh.default, named="tanh"),
    _activated(
        aten.gelu.default, named=lambda approximate="none": "gelu_tanh" if approximate == "tanh" else "gelu"
    ),
    _activated(aten.elu.default, named=_elu),
    _activated(aten.selu.default, named=lambda: _text("elu", SELU_ALPHA * SELU_SCALE, SELU_SCALE)),
    _activated(aten.mish.default, named="mish"),
    # the value itself
    Operator((aten.clone.default, aten.alias.default, aten.detach.default), "pointwise", step=steps.identity),
    Operator((aten.contiguous.default,), "pointwise", step=steps.identity, cast=True),
    Operator((aten._to_copy.default, aten.to.dtype), "pointwise", cast=True),
    # functions of one value
    Operator((aten.neg.default,), "pointwise", step=steps.negative),
    Operator((aten.reciprocal.default,), "pointwise", step=steps.reciprocal),
    Operator((aten.square.default,), "pointwise", step=steps.square),
    Operator((aten.pow.Tensor_Scalar,), "pointwise", step=steps.power),
    Operator((aten.add.Scalar,), "pointwise", step=steps.elementwise(steps.ADD, lambda b: (1.0, b))),
    Operator((aten.sub.Scalar,), "pointwise", step=steps.elementwise(steps.SUBTRACT, lambda b: (1.0, -b))),
    Operator((aten.mul.Scalar,), "pointwise", step=steps.elementwise(steps.MULTIPLY, lambda b: (b, 0.0))),
    Operator((aten.div.Scalar,), "pointwise", step=steps.elementwise(steps.DIVIDE, None)),
    Operator((aten.rsub.Scalar,), "pointwise", step=steps.reverse_subtract),
    Operator(
        (
            aten.exp.default,
            aten.abs.default,
            aten.sqrt.default,
            aten.rsqrt.default,
            aten.softplus.default,
            aten.log.default,
            aten.celu.default,
        ),
        "pointwise",
    ),
    Operator((aten.prelu.default,), step=steps.prelu),
    # of two
    Operator(
        (aten.add.Tensor,), "elementwise", step=steps.elementwise(steps.ADD, lambda b: (1.0, b)), sum=True
    ),
    Operator(
        (aten.mul.Tensor,),
        "elementwise",
        step=steps.elementwise(steps.MULTIPLY, lambda b: (b, 0.0)),
        product=True,
    ),
    Operator((aten.sub.Tensor,), "elementwise", step=steps.elementwise(steps.SUBTRACT, lambda b: (1.0, -b))),
    Operator((aten.div.Tensor,), "elementwise", step=steps.elementwise(steps.DIVIDE, None)),
    Operator((aten.maximum.default,), "elementwise", step=steps.elementwise(steps.MAXIMUM, None)),
    Operator((aten.minimum.default,), "elementwise", step=steps.elementwise(steps.MINIMUM, None)),
    # moves
    *_moves(
        aten.view.default,
        aten._unsafe_view.default,
        resized=True,
        flattens=True,
        copying=aten.reshape.default,
    ),
    *_moves(aten.reshape.default, resized=True, flattens=True),
    *_moves(aten.flatten.using_ints, flattens=True),
    *_moves(aten.expand.default, aten.repeat.default, aten.unflatten.int, resized=True),
    *_moves(aten.slice.Tensor, aten.select.int, aten.narrow.default, cut=True),
    Operator((aten.cat.default,), "move", step=steps.cat),
    Operator((aten.stack.default,), "move", step=steps.stack),
    *_moves(
        aten.permute.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.flip.default,
        aten.roll.default,
        aten.pixel_shuffle.default,
        aten.pixel_unshuffle.default,
        aten.channel_shuffle.default,
        aten.native_channel_shuffle.default,
        aten.unbind.int,
        aten.movedim.int,
        aten.t.default,
    ),
    Operator((aten.index_select.default,), step=steps.move(aten.index_select.default)),
    Operator((aten.index.Tensor,), step=steps.move(aten.index.Tensor)),
    Operator((torch.flatten,), "flatten", step=steps.move(torch.flatten)),  # as packed graphs have it
    Operator((operator.getitem,), "item", step=steps.item),
    # windows and planes
    Operator((aten.max_pool2d.default,), "pool", step=steps.max_pool),
    Operator((aten.avg_pool2d.default,), "pool", step=steps.avg_pool, average=True),
    Operator(
        (aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default),
        "pool",
        step=steps.adaptive_avg_pool,
        export=_adaptive,
    ),
    Operator((aten.adaptive_max_pool2d.default, aten.max_pool2d_with_indices.default), "pool"),
    *(
        Operator((target,), "pool", step=steps.move(target))
        for target in (aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)
    ),
    *(
        Operator((target,), "pool", step=steps.interpolate(target))
        for target in (aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default)
    ),
    Operator((aten.mean.dim,), "reduction", step=steps.mean, export=_mean),
    Operator((aten.amax.default,), "reduction", step=steps.maximum_over),
    Operator((aten.amin.default,), "reduction"),
    Operator((aten.pad.default, aten.constant_pad_nd.default), "pad", step=steps.pad),
    Operator((aten.softmax.int, aten._softmax.default), step=steps.softmax),
    # the rest
    Operator((aten.sym_size.int,), "size"),
    Operator((aten.copy_.default,), writes=True),
)

_UNKNOWN = Operator(())
_BY_TARGET = {target: row for row in ROWS for target in row.targets}
assert len(_BY_TARGET) == sum(len(row.targets) for row in ROWS), "an operator with two rows"


def find(node: Any) -> Operator:
    """The row of an operator, or of a node that calls one; for others a row that says nothing."""
    target: Any = node.target if isinstance(node, fx.Node) else node
    return _BY_TARGET.get(target, _UNKNOWN)
