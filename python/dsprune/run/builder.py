"""The nodes of a packed graph as steps of a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from dsp_kernels.program import Program, Value

from ..nn import PermutedGroupedConv2d
from ..operators import find
from ..steps import Refused, linear, value

__all__ = ["Builder"]


class Builder(fx.Interpreter):
    """Adds the step of a node to a program; ``env`` has values of the program in the place of tensors, and
    sizes as numbers. ``images``: of each node the sizes of one image, where it is one.
    """

    def __init__(
        self, network: fx.GraphModule, program: Program, images: Mapping[fx.Node, tuple[int, ...] | None]
    ) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.program, self.images = program, images

    def step(self, node: fx.Node) -> Any:
        """The value that the node's step makes, or several. Raises Refused where it has none, and whatever
        the program raises.
        """
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.op == "call_module":
            made = self.call_module(node.target, args, kwargs)
        elif node.op == "call_function":
            made = self.call_function(node.target, args, kwargs)
        else:
            raise Refused(f"operator {node.target} is a {node.op}")
        image = self.images.get(node)
        return replace(made, sizes=image) if isinstance(made, Value) and image is not None else made

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        program = self.program
        try:
            if isinstance(layer, nn.Linear):
                return linear(program, args[0], layer.weight, layer.bias)
            x = value(program, args[0])
            residual = value(program, args[1]) if len(args) > 1 else None
        except Refused as reason:
            raise Refused(f"{target} {reason}") from None
        if isinstance(layer, PermutedGroupedConv2d) and layer._outer_padding is None:
            return program.conv(
                x,
                layer.weight,
                layer.layout,
                layer.bias,
                kernel_size=layer.kernel_size,
                stride=layer.stride,
                padding=layer._inner_padding,
                dilation=layer.dilation,
                residual=residual,
                activation=layer.activation,
            )
        if (
            isinstance(layer, nn.Conv2d)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        ):
            return program.conv2d(
                x,
                layer.weight,
                layer.bias,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
            )
        raise Refused(f"{target} is a {type(layer).__name__}")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        row = find(target)
        if row.step is None:
            raise Refused(f"operator {target}")
        try:
            return row.step(self.program, *args, **kwargs)
        except Refused as reason:
            raise Refused(f"operator {target} {reason}") from None
