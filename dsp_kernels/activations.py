"""What a result goes through before it is stored: one row an activation.

The compiled core has the same rows (``csrc/core/activations.def``); they are held against these when it is
loaded. An activation is named by a string, its parameters in parentheses: ``"relu"``, ``"name(0.1, 2)"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ROWS", "Activation", "differences", "find"]


@dataclass(frozen=True)
class Activation:
    """A row, with the values of its parameters where it has any.

    ``forward(x, *values)`` is its definition, of any floating dtype. ``backward(grad, kept, *values)`` is
    grad times the derivative, with ``kept`` what ``keeps`` says: the "output", the "input" (of the
    activation), or "nothing".
    """

    name: str
    code: int
    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    keeps: Literal["nothing", "output", "input"]
    parameters: tuple[str, ...] = ()
    values: tuple[float, ...] = ()

    def apply(self, x: Tensor) -> Tensor:
        """Of a tensor of any shape."""
        return self.forward(x, *self.values)

    def gradient(self, grad: Tensor, kept: Tensor | None) -> Tensor:
        """The gradient before the activation from that behind it; ``kept``: see ``keeps``."""
        return self.backward(grad, kept, *self.values)

    def floats(self, count: int) -> tuple[float, ...]:
        """The values, and zeros up to ``count``."""
        return self.values + (0.0,) * (count - len(self.values))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.values))})" if self.values else self.name


def _same(grad: Tensor, kept: Tensor | None) -> Tensor:
    return grad


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + (x * 0.5**0.5).erf()) + x * (-0.5 * x * x).exp() * (2 * math.pi) ** -0.5


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    factor = (2 / math.pi) ** 0.5
    t = (factor * (x + 0.044715 * x**3)).tanh()
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * factor * (1 + 3 * 0.044715 * x * x)


def _mish_slope(x: Tensor) -> Tensor:
    t = F.softplus(x).tanh()
    return t + x * x.sigmoid() * (1 - t * t)


# As torch: no infinity times 0, and NaN lets the gradient through.
ROWS = (
    Activation("none", 0, lambda x: x, _same, "nothing"),
    Activation("relu", 1, lambda x: x.relu(), lambda grad, y: grad.masked_fill(y <= 0, 0), "output"),
    Activation(
        "relu6",
        2,
        lambda x: F.hardtanh(x, 0.0, 6.0),
        lambda grad, y: grad.masked_fill((y <= 0) | (y >= 6), 0),
        "output",
    ),
    Activation(
        "clamp",
        3,
        lambda x, least, most: x.clamp(least, most),
        lambda grad, x, least, most: grad.masked_fill((x < least) | (x > most), 0),
        "input",
        ("least", "most"),
    ),
    Activation(
        "leaky_relu",
        4,
        lambda x, slope: F.leaky_relu(x, slope),
        lambda grad, x, slope: torch.where(x > 0, grad, grad * slope),
        "input",
        ("slope",),
    ),
    Activation(
        "hardsigmoid",
        5,
        lambda x: F.hardsigmoid(x),
        lambda grad, x: torch.where((x > -3) & (x < 3), grad / 6, 0),
        "input",
    ),
    Activation(
        "hardswish",
        6,
        lambda x: F.hardswish(x),
        lambda grad, x: torch.where(x < 3, torch.where(x > -3, grad * (x / 3 + 0.5), 0), grad),
        "input",
    ),
    Activation("sigmoid", 7, lambda x: x.sigmoid(), lambda grad, y: grad * y * (1 - y), "output"),
    Activation(
        "silu",
        8,
        lambda x: F.silu(x),
        lambda grad, x: grad * x.sigmoid() * (1 + x * (1 - x.sigmoid())),
        "input",
    ),
    Activation("tanh", 9, lambda x: x.tanh(), lambda grad, y: grad * (1 - y * y), "output"),
    Activation("gelu", 10, lambda x: F.gelu(x), lambda grad, x: grad * _gelu_slope(x), "input"),
    Activation(
        "gelu_tanh",
        11,
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: grad * _gelu_tanh_slope(x),
        "input",
    ),
    Activation(
        "elu",
        12,
        lambda x, alpha, scale: F.elu(x, alpha / scale) * scale,
        lambda grad, x, alpha, scale: grad * torch.where(x > 0, scale, alpha * x.clamp(max=0).exp()),
        "input",
        ("alpha", "scale"),
    ),
    Activation("mish", 13, lambda x: F.mish(x), lambda grad, x: grad * _mish_slope(x), "input"),
)

_found: dict[str | None, Activation] = {row.name: row for row in ROWS if not row.parameters}
_found[None] = _found["none"]


def _accepted() -> str:
    names = [f"{row.name}({', '.join(row.parameters)})" if row.parameters else row.name for row in ROWS[1:]]
    quoted = [f"'{name}'" for name in names]
    return f"None, {', '.join(quoted[:-1])} or {quoted[-1]}"


def _parse(text: object) -> Activation:
    if isinstance(text, str):
        name, _, rest = text.partition("(")
        for row in ROWS:
            if row.name != name or not row.parameters or not rest.endswith(")"):
                continue
            try:
                values = tuple(float(word) for word in rest[:-1].split(","))
            except ValueError:
                break
            if len(values) == len(row.parameters) and not any(map(math.isnan, values)):
                return replace(row, values=values)
    raise ValueError(f"activation must be {_accepted()}, got {text!r}")


# While tracing, Dynamo runs it and keeps its result.
_parse._dynamo_marked_constant = True  # type: ignore[attr-defined]


def find(text: str | None) -> Activation:
    """The activation of a name; None is "none".

    Raises ValueError, with what is accepted, for another name, or parameters that it does not have.
    """
    found = _found.get(text) if text is None or isinstance(text, str) else None
    return found if found is not None else _parse(text)


def differences(core: Sequence[tuple[str, int, int]]) -> str | None:
    """What is other in the compiled core's table of (name, code, number of parameters), or None."""
    own = [(row.name, row.code, len(row.parameters)) for row in ROWS]
    if [tuple(row) for row in core] == own:
        return None
    return f"it has the activations {[row[0] for row in core]}, this package {[row[0] for row in own]}"
