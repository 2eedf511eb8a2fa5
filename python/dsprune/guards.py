"""What an exported graph takes for granted about its inputs' sizes, as data: it pickles, no text is run."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Expression", "Operation", "Size", "evaluate", "parse"]

MOST_NODES = 20_000  # of one network's assumptions; what is longer takes as long to evaluate as the network


@dataclass(frozen=True)
class Size:
    """A size of an input: which one, and which of its dimensions."""

    input: int
    dimension: int


@dataclass(frozen=True)
class Operation:
    """A function of ``FUNCTIONS`` and what it is applied to."""

    name: str
    operands: tuple[Expression, ...]


Expression = bool | int | float | Size | Operation

_BINARY: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "negative": operator.neg,
    "not": operator.not_,
    "max": max,
    "min": min,
    "abs": abs,
}


class _Parser:
    def __init__(self, inputs: Mapping[str, int]) -> None:
        self.inputs, self.nodes = inputs, 0

    def read(self, node: ast.expr) -> Expression:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise ValueError(f"assumptions on sizes of more than {MOST_NODES} terms")
        match node:
            case ast.Constant(bool() | int() | float() as value):
                return value
            case ast.Subscript(
                ast.Call(ast.Attribute(source, "size"), [], []), ast.Constant(int() as dimension)
            ) if (name := ast.unparse(source)) in self.inputs:  # L['x'].size()[2]
                return Size(self.inputs[name], dimension)
            case ast.BinOp(left, kind, right) if type(kind) in _BINARY:
                return Operation(_BINARY[type(kind)], (self.read(left), self.read(right)))
            case ast.UnaryOp(ast.USub(), operand):
                return Operation("negative", (self.read(operand),))
            case ast.UnaryOp(ast.Not(), operand):
                return Operation("not", (self.read(operand),))
            case ast.BoolOp(kind, values):
                return Operation("and" if isinstance(kind, ast.And) else "or", tuple(map(self.read, values)))
            case ast.Call(ast.Name("max" | "min" | "abs" as function), arguments, []):
                return Operation(function, tuple(map(self.read, arguments)))
            case ast.Compare(left, kinds, rights) if all(type(kind) in _BINARY for kind in kinds):
                chain = [self.read(value) for value in (left, *rights)]
                links = tuple(
                    Operation(_BINARY[type(kind)], (chain[i], chain[i + 1])) for i, kind in enumerate(kinds)
                )
                return links[0] if len(links) == 1 else Operation("and", links)
        raise ValueError(f"assumptions on sizes that are not understood: {ast.unparse(node)[:200]}")


def parse(guards: Sequence[str], inputs: Mapping[str, int]) -> Expression | None:
    """The conjunction of the tracer's guards, Python over ``L['name'].size()[dimension]``; None for none.

    Args:
        guards: expressions of sizes, numbers, arithmetic, comparisons, and, or, not, max, min and abs.
        inputs: the position of each input by what it is there, such as ``L['x']`` or ``L['x']['y'][0]``.

    Raises:
        ValueError: an expression of another form, or one that is too long to be of use.
    """
    parser, parts = _Parser(inputs), []
    for guard in dict.fromkeys(guards):
        try:
            parts.append(parser.read(ast.parse(guard.strip(), mode="eval").body))
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"assumptions on sizes that are not understood: {guard[:200]}") from error
    return Operation("and", tuple(parts)) if parts else None


def evaluate(expression: Expression, sizes: Sequence[Any]) -> Any:
    """The value of an expression where ``sizes[i]`` is the shape of input ``i``."""
    if isinstance(expression, Size):
        return sizes[expression.input][expression.dimension]
    if not isinstance(expression, Operation):
        return expression
    values = (evaluate(operand, sizes) for operand in expression.operands)
    if expression.name == "and":
        return all(values)
    if expression.name == "or":
        return any(values)
    return FUNCTIONS[expression.name](*values)
