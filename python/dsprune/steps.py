"""Operators as steps of a program: for the rows of ``operators``.

Each function takes the program and the operator's arguments, and adds steps. In the place of tensors that are
computed from the image it gets and gives values of the program (``Value``, with ``sizes``), or such in other
orders (``Moved``): what only moves elements is not copied before somebody reads it. Parameters are tensors,
sizes are numbers, the batch is a symbol.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_kernels import activations
from dsp_kernels.program import Program, Value

__all__ = ["Moved", "Refused", "settled"]

BATCH = 2  # images of numbers, on which operators that move elements are run


class Refused(Exception):
    """No steps do that: it runs in torch. The text says what is refused, without the operator's name."""


@dataclass(frozen=True, eq=False)
class Moved:
    """Elements of a value in another shape or order, or some of them.

    ``index`` (2, *sizes) in float64: which element each is, of two images in a row; -1 is ``fill``.
    """

    value: Value
    index: Tensor
    fill: float = 0.0

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.index.shape[1:])


Image = Value | Moved


def sized(value: Value, *sizes: int) -> Value:
    """A value that was made here, with the sizes of one image."""
    return dataclasses.replace(value, sizes=sizes)


def _shape(value: Value) -> tuple[int, int, int]:
    channels, height, width = (*value.sizes, 1, 1)[:3]
    return channels, height, width


def _numbers(*sizes: int) -> Tensor:
    return torch.arange(BATCH * math.prod(sizes), dtype=torch.float64).reshape(BATCH, *sizes)


def _moved(given: Any) -> Moved:
    if isinstance(given, Moved):
        return given
    _image(given)
    return Moved(given, _numbers(*given.sizes))


def _image(given: Any) -> None:
    """Refuses what is not computed from the image: numbers, sizes, weights."""
    if not isinstance(given, (Value, Moved)):
        number = isinstance(given, (int, float))
        raise Refused(f"on {repr(given) if number else 'a ' + type(given).__name__}")


def value(program: Program, given: Any) -> Value:
    """A value of the program with these elements in this order, for steps to read."""
    _image(given)
    return settled(program, given)


def settled(program: Program, given: Any) -> Value:
    """What was moved, copied to where it belongs. Raises Refused for tensors of other ranks than 2 and 4."""
    if isinstance(given, Value):
        return given
    made = _cheap(program, given)
    if made is not None:
        return made
    if len(given.sizes) not in (1, 3):
        raise Refused(f"on a tensor of {len(given.sizes) + 1} dimensions")
    if bool((given.index < 0).any()):
        raise Refused("on a padded tensor in another order")
    channels, height, width = (*given.sizes, 1, 1)[:3]
    flat = len(given.sizes) == 1
    elements = given.index[0].long().flatten().tolist()
    made = program.step(
        "reorder", x=given.value, channels=channels, height=height, width=width, elements=elements, flat=flat
    )
    return sized(made, *given.sizes)


def _cheap(program: Program, given: Moved) -> Value | None:
    """The value in whose order the elements are, or one of copied channels, rows and columns; else None."""
    sizes, flat = given.sizes, len(given.sizes) == 1
    if len(sizes) not in (1, 3):
        return None
    channels, height, width = _shape(given.value)
    index = given.index[0].long().reshape((*sizes, 1, 1)[:3])
    count = channels * height * width
    if index.numel() == count and torch.equal(index.flatten(), torch.arange(count)):
        if sizes == given.value.sizes:
            return given.value
        if flat:
            return sized(program.flatten(given.value), count)
    # By channel, row and column, each on its own.
    parts = []
    for number, dim in ((index // (height * width), 0), (index // width % height, 1), (index % width, 2)):
        others = [d for d in range(3) if d != dim]
        parts.append(torch.where(index < 0, -1, number).amax(others))
    c, y, x = parts[0][:, None, None], parts[1][:, None], parts[2]
    copied = torch.where((c < 0) | (y < 0) | (x < 0), -1, (c * height + y) * width + x)
    if not torch.equal(copied, index):
        return None
    made = program.step(
        "gather",
        x=given.value,
        fill=torch.tensor([given.fill]),
        channels=(parts[0] + 1).tolist(),
        rows=(parts[1] + 1).tolist(),
        columns=(parts[2] + 1).tolist(),
        flat=flat,
    )
    return sized(made, *sizes)


def _result(program: Program, source: Value, index: Tensor, fill: float = 0.0) -> Image:
    """What an operator made of a value's numbers, which must treat all images alike."""
    count = math.prod(source.sizes)
    inside = index >= 0
    alike = index.dim() > 1 and index.shape[0] == BATCH and index.numel() > 0
    if alike:
        alike = bool(torch.equal(index[1], torch.where(inside[0], index[0] + count, index[0])))
        alike = alike and bool((index[0] < count).all())
    if not alike:
        raise Refused("across images")
    made = Moved(source, index, fill)
    return _cheap(program, made) or made


def _plain(given: Any) -> Any:
    """Arguments for a run on numbers: the batch is theirs."""
    if isinstance(given, torch.SymInt):
        if not given.node.expr.is_Symbol:
            raise Refused("with arithmetic on the batch")
        return BATCH
    if isinstance(given, (list, tuple)):
        return [_plain(item) for item in given]
    if isinstance(given, (Value, Moved)):
        raise Refused("by a computed tensor")
    return given


def move(target: Callable[..., Any]) -> Callable[..., Any]:
    """The step of an operator that moves elements: it is run on their numbers."""

    def step(program: Program, x: Any, *args: Any, **kwargs: Any) -> Any:
        known = _moved(x)
        given = {k: _plain(v) for k, v in kwargs.items() if k not in ("memory_format", "dtype")}
        made = target(known.index, *_plain(args), **given)
        if isinstance(made, (list, tuple)):
            return [_result(program, known.value, part, known.fill) for part in made]
        return _result(program, known.value, made, known.fill)

    return step


def pad(program: Program, x: Any, pad: Any, *rest: Any, **kwargs: Any) -> Image:
    """``aten.pad`` (mode, fill) and ``aten.constant_pad_nd`` (fill)."""
    mode = next((r for r in (*rest, kwargs.get("mode")) if isinstance(r, str)), "constant")
    fill = next((r for r in (*rest, kwargs.get("value")) if isinstance(r, (int, float))), 0)
    known, pads = _moved(x), _plain(pad)
    index = known.index
    if mode == "constant" and bool((index < 0).any()) and known.fill != fill:
        known = _moved(value(program, x))
        index = known.index
    if mode == "constant":
        return _result(program, known.value, F.pad(index, pads, mode, -1.0), float(fill))
    return _result(program, known.value, F.pad(index, pads, mode), known.fill)


def cat(program: Program, values: Sequence[Any], dim: int = 0) -> Image:
    return _joined(program, values, dim, torch.cat)


def stack(program: Program, values: Sequence[Any], dim: int = 0) -> Image:
    return _joined(program, values, dim, torch.stack)


def _joined(program: Program, values: Sequence[Any], dim: int, join: Callable[..., Tensor]) -> Image:
    for v in values:
        _image(v)
    sources = [settled(program, v) if len(v.sizes) in (1, 3) else v for v in values]
    rank = {len(v.sizes) + 1 for v in sources}
    if len(rank) != 1:
        raise Refused("of tensors of several ranks")
    if join is torch.cat and dim % rank.pop() == 1 and all(isinstance(v, Value) for v in sources):
        made = program.concat([v for v in sources if isinstance(v, Value)])
        return sized(made, sum(v.sizes[0] for v in sources), *sources[0].sizes[1:])
    # All elements of all of them as one vector, and their numbers there.
    known = [_moved(v) for v in sources]
    if any(bool((m.index < 0).any()) for m in known):
        raise Refused("of padded tensors in another order")
    counts = [math.prod(m.value.sizes) for m in known]
    flats = [m.value if m.value.flat else program.flatten(m.value) for m in known]
    vector = sized(flats[0] if len(flats) == 1 else program.concat(flats), sum(counts))
    parts, before = [], 0
    for m, count in zip(known, counts, strict=True):
        images = torch.arange(BATCH).reshape(BATCH, *[1] * len(m.sizes)) * (sum(counts) - count)
        parts.append(m.index + images + before)
        before += count
    return _result(program, vector, join(parts, dim))


def item(program: Program, values: Any, place: Any) -> Any:
    if not isinstance(values, (list, tuple)):
        raise Refused(f"on a {type(values).__name__}")
    return values[place]


def _through(program: Program, x: Any, call: Callable[[Value], Value]) -> Image:
    """A function of each element, before or after moves."""
    if isinstance(x, Moved) and not bool((x.index < 0).any()):
        return Moved(sized(call(x.value), *x.value.sizes), x.index)
    source = value(program, x)
    return sized(call(source), *source.sizes)


def activation(named: Callable[..., str | None]) -> Callable[..., Image]:
    """The step of an activation whose name ``named`` finds from the arguments after the first."""

    def step(program: Program, x: Any, *args: Any, **kwargs: Any) -> Image:
        name = named(*args, **kwargs)
        if name is None:
            raise Refused(f"with {args}")
        return _through(program, x, lambda v: program.activation(v, name))

    return step


def identity(program: Program, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Tensor):
        _image(x)
    return x


# Arithmetic.

_NONE = activations.find(None)
ADD, SUBTRACT, MULTIPLY, DIVIDE, MAXIMUM, MINIMUM, PRELU = range(7)  # of csrc/conv/planar/kernel.h


def _per_channel(program: Program, x: Value, scale: Any, shift: Any) -> Value:
    channels = x.sizes[0]

    def vector(given: Any) -> Tensor:
        return torch.as_tensor(given, dtype=torch.float32).detach().reshape(-1).expand(channels).contiguous()

    return sized(program.affine(x, vector(scale), vector(shift)), *x.sizes)


def _constant(program: Program, x: Image, given: Tensor) -> Value:
    """A tensor that broadcasts against images of x's sizes, as a value."""
    if given.dtype != torch.float32 or given.device.type != "cpu":
        raise Refused(f"with a tensor of {given.dtype} on {given.device.type}")
    sizes = tuple(given.shape)
    if len(sizes) > len(x.sizes):
        if sizes[0] != 1:
            raise Refused("with a tensor for each image")
        sizes = sizes[1:]
    if len(sizes) > len(x.sizes):
        raise Refused(f"with a tensor of {given.dim()} dimensions")
    sizes = (1,) * (len(x.sizes) - len(sizes)) + sizes
    channels, height, width = (*sizes, 1, 1)[:3]
    made = program.step(
        "constant",
        channels=channels,
        height=height,
        width=width,
        content=given.detach().contiguous(),
        flat=len(sizes) == 1,
    )
    return sized(made, *sizes)


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    if len(a) != len(b):
        raise Refused("of a vector and an image")
    return tuple(max(x, y) for x, y in zip(a, b, strict=True))


def _number(given: Any) -> float | None:
    if isinstance(given, Tensor) and given.dim() == 0 and given.is_floating_point():
        return float(given)
    return float(given) if isinstance(given, (int, float)) else None


def elementwise(op: int, of_number: Callable[[float], tuple[float, float]] | None) -> Callable[..., Image]:
    """The step of an operator on two tensors; ``of_number(b)``: the scale and shift that it is for one."""

    def step(program: Program, a: Any, b: Any, *, alpha: Any = 1) -> Image:
        if not isinstance(a, (Value, Moved)) and isinstance(b, (Value, Moved)):
            if op in (ADD, MULTIPLY, MAXIMUM, MINIMUM) and alpha == 1:
                return step(program, b, a)
            number = _number(a)
            a = torch.full((1,), number) if number is not None else a
            if not isinstance(a, Tensor):
                raise Refused(f"on a {type(a).__name__}")
            right = value(program, b)
            return both(program, _constant(program, right, a), right, alpha)
        number = _number(b)
        if number is not None and op == DIVIDE and number != 0 and math.isfinite(1 / number):
            return scaled(program, a, 1 / number)
        if number is not None and of_number is not None:
            scale, shift = of_number(number * alpha)
            return _through(program, a, lambda v: _per_channel(program, v, scale, shift))
        left = value(program, a)
        if number is not None:
            b = torch.full((1,), number)
        if isinstance(b, Tensor):
            sizes = (1,) * (len(left.sizes) + 1 - b.dim()) + tuple(b.shape)
            channels = b.numel() == max(sizes[1:2]) and sizes[1] in (1, left.sizes[0])
            if channels and op in (ADD, MULTIPLY) and alpha == 1 and len(sizes) == len(left.sizes) + 1:
                return _per_channel(program, left, *((1.0, b) if op == ADD else (b, 0.0)))
            b = _constant(program, left, b)
        return both(program, left, value(program, b), alpha)

    def both(program: Program, a: Value, b: Value, alpha: Any) -> Value:
        sizes = _broadcast(a.sizes, b.sizes)
        if alpha != 1:
            b = _per_channel(program, b, alpha, 0.0)
        if op == ADD and a.sizes == b.sizes:
            return sized(program.add(a, b), *sizes)
        made = program.step("elementwise", a=a, b=b, op=op, activation=_NONE, flat=a.flat and b.flat)
        return sized(made, *sizes)

    return step


def reverse_subtract(program: Program, x: Any, number: Any, alpha: Any = 1) -> Image:
    if _number(number) is None:
        raise Refused("from a tensor")
    return _through(program, x, lambda v: _per_channel(program, v, -float(alpha), float(number)))


def scaled(program: Program, x: Any, scale: float) -> Image:
    return _through(program, x, lambda v: _per_channel(program, v, scale, 0.0))


def negative(program: Program, x: Any) -> Image:
    return scaled(program, x, -1.0)


def reciprocal(program: Program, x: Any) -> Image:
    return elementwise(DIVIDE, None)(program, 1.0, x)


def square(program: Program, x: Any) -> Image:
    return power(program, x, 2)


def power(program: Program, x: Any, exponent: Any) -> Image:
    if exponent != 2:
        raise Refused(f"with the exponent {exponent}")
    return _through(
        program,
        x,
        lambda v: program.step("elementwise", a=v, b=v, op=MULTIPLY, activation=_NONE, flat=v.flat),
    )


def prelu(program: Program, x: Any, weight: Any) -> Image:
    source = value(program, x)
    if not isinstance(weight, Tensor):
        raise Refused("with computed slopes")
    slopes = _constant(program, source, weight.reshape(-1, *[1] * (len(source.sizes) - 1)))
    made = program.step("elementwise", a=source, b=slopes, op=PRELU, activation=_NONE, flat=source.flat)
    return sized(made, *source.sizes)


# Windows and planes.


def max_pool(program: Program, x: Any, *args: Any, **kwargs: Any) -> Value:
    return program.max_pool(value(program, x), *args, **kwargs)


def avg_pool(
    program: Program,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    if divisor_override is not None:
        raise Refused("with a divisor of its own")
    source = value(program, x)
    return program.avg_pool(source, kernel_size, stride or None, padding, ceil_mode, count_include_pad)


def adaptive_avg_pool(program: Program, x: Any, output_size: Any) -> Value:
    given = [output_size] if isinstance(output_size, int) else list(output_size)
    return program.adaptive_avg_pool(value(program, x), given[0] if len(given) == 1 else given)


def _planes(x: Value, dim: Any) -> set[int]:
    dims = {d % 4 for d in ([dim] if isinstance(dim, int) else dim or ())}
    if x.flat or not dims:
        raise Refused("over something else than channels, rows or columns")
    return dims


def _reduced(program: Program, x: Value, dims: set[int], made: Value, keepdim: bool) -> Image:
    kept = sized(made, *(1 if d + 1 in dims else size for d, size in enumerate(x.sizes)))
    if keepdim:
        return kept
    known = _moved(kept)
    left = [size for d, size in enumerate(kept.sizes) if d + 1 not in dims]
    return _result(program, kept, known.index.reshape(BATCH, *left))


def mean(program: Program, x: Any, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Image:
    source = value(program, x)
    dims = _planes(source, dim)
    channels, height, width = source.sizes
    if dtype not in (None, torch.float32):
        raise Refused(f"to {dtype}")
    if dims == {1}:  # a filter that reads all channels
        made = program.conv2d(source, torch.full((1, channels, 1, 1), 1 / channels))
    elif dims <= {2, 3}:
        size = (1 if 2 in dims else height, 1 if 3 in dims else width)
        made = program.adaptive_avg_pool(source, 1 if size == (1, 1) else size)
    else:
        raise Refused("over something else than channels, rows or columns")
    return _reduced(program, source, dims, made, keepdim)


def maximum_over(program: Program, x: Any, dim: Any, keepdim: bool = False) -> Image:
    source = value(program, x)
    dims = _planes(source, dim)
    if not dims <= {2, 3}:
        raise Refused("over channels")
    kernel = (source.sizes[1] if 2 in dims else 1, source.sizes[2] if 3 in dims else 1)
    return _reduced(program, source, dims, program.max_pool(source, kernel), keepdim)


def interpolate(target: Callable[..., Any]) -> Callable[..., Value]:
    """The step of a linear interpolation; where it reads is found by running it on positions."""

    def step(program: Program, x: Any, *args: Any, **kwargs: Any) -> Value:
        source = value(program, x)
        channels, height, width = source.sizes
        rows = torch.arange(height, dtype=torch.float64).reshape(1, 1, -1, 1).expand(1, 1, height, width)
        columns = torch.arange(width, dtype=torch.float64).expand(1, 1, height, width)
        given, named = _plain(args), {k: _plain(v) for k, v in kwargs.items()}
        down = target(rows.contiguous(), *given, **named)[0, 0, :, 0]
        right = target(columns.contiguous(), *given, **named)[0, 0, 0]
        made = program.step(
            "interpolate",
            x=source,
            down=(down - down.floor()).float(),
            right=(right - right.floor()).float(),
            rows=down.floor().long().tolist(),
            columns=right.floor().long().tolist(),
        )
        return sized(made, channels, len(down), len(right))

    return step


def conv_transpose(
    program: Program,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    output_padding: Any = (0, 0),
    groups: int = 1,
    dilation: Any = (1, 1),
) -> Image:
    """Output pixels that have the same remainder by the stride are one convolution, and these take turns.

    With y + padding = q stride + r, the taps k of remainder r, those with k dilation = r + o stride, read the
    row q - o: an ordinary convolution over o.
    """
    source = value(program, x)
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        raise Refused("with computed weights")
    channels, *image = source.sizes
    steps, pads, more, spread = (
        [int(v) for v in (given if len(given) == 2 else [*given, *given])]
        for given in (stride, padding, output_padding, dilation)
    )
    per = weight.shape[1]
    kernel = weight.shape[2:]
    reach = [spread[d] * (kernel[d] - 1) // steps[d] for d in (0, 1)]
    inputs = channels // groups
    filters = weight.new_zeros(groups, *steps, per, inputs, reach[0] + 1, reach[1] + 1)
    for ky in range(kernel[0]):
        for kx in range(kernel[1]):
            (oy, ry), (ox, rx) = divmod(ky * spread[0], steps[0]), divmod(kx * spread[1], steps[1])
            taps = weight[:, :, ky, kx].detach().reshape(groups, inputs, per)
            filters[:, ry, rx, :, :, reach[0] - oy, reach[1] - ox] = taps.transpose(1, 2)
    filters = filters.view(-1, inputs, reach[0] + 1, reach[1] + 1)
    repeated = None
    if bias is not None:
        repeated = bias.detach().reshape(groups, 1, per).expand(-1, steps[0] * steps[1], -1).reshape(-1)
    sizes = [
        (image[d] - 1) * steps[d] - 2 * pads[d] + spread[d] * (kernel[d] - 1) + more[d] + 1 for d in (0, 1)
    ]
    places = [torch.arange(sizes[d]) + pads[d] for d in (0, 1)]
    if min(sizes) < 1:
        raise Refused("without output pixels")
    beyond = [max(0, int(places[d][-1]) // steps[d] + 1 - image[d] - reach[d]) for d in (0, 1)]
    if any(beyond):
        source = value(program, pad(program, source, [0, beyond[1], 0, beyond[0]]))
    made = sized(
        program.conv2d(source, filters, repeated, padding=(reach[0], reach[1]), groups=groups),
        len(filters),
        *(source.sizes[1 + d] + reach[d] for d in (0, 1)),
    )
    numbers = _numbers(groups, *steps, per, *made.sizes[1:])
    y, x_ = places[0][:, None], places[1]
    # (y, x, 2, groups, filters of one)
    index = numbers[:, :, y % steps[0], x_ % steps[1], :, y // steps[0], x_ // steps[1]]
    index = index.permute(2, 3, 4, 0, 1).reshape(BATCH, groups * per, *sizes)
    return _result(program, made, index)


# Norms and shares.


def _channels_last(x: Moved) -> bool:
    """Whether the last dimension is the value's channels and those before it are its pixels in order."""
    channels, height, width = _shape(x.value)
    if x.index.shape[-1] != channels or x.index.numel() != BATCH * channels * height * width:
        return False
    expected = _numbers(channels, height * width).transpose(1, 2)
    return torch.equal(x.index.reshape(BATCH, height * width, channels), expected)


def _pixels(program: Program, x: Any, channels: int, call: Callable[[Value], Value]) -> Image:
    """A function of each pixel's channels, which are the last dimension; ``channels``: of the result."""
    if isinstance(x, Value) and x.flat:
        return sized(call(x), channels)
    if not isinstance(x, Moved) or not _channels_last(x):
        raise Refused("over a dimension that is not the channels")
    source = x.value
    made = sized(call(source), channels, *source.sizes[1:])
    _, height, width = _shape(made)
    index = _numbers(channels, height * width).transpose(1, 2)
    return _result(program, made, index.reshape(BATCH, *x.sizes[:-1], channels))


def linear(program: Program, x: Any, weight: Tensor, bias: Tensor | None) -> Image:
    _image(x)

    def call(source: Value) -> Value:
        if source.flat:
            return program.linear(source, weight, bias)
        return program.conv2d(source, weight.detach()[:, :, None, None], bias)

    return _pixels(program, x, weight.shape[0], call)


def _norm(program: Program, x: Value, groups: int, scale: Any, shift: Any, eps: float) -> Value:
    made = program.step(
        "norm", x=x, groups=groups, eps=torch.tensor([float(eps)]), scale=scale, shift=shift, flat=x.flat
    )
    return sized(made, *x.sizes)


def group_norm(
    program: Program, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Value:
    return _norm(program, value(program, x), groups, weight, bias, eps)


def instance_norm(
    program: Program,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Value:
    source = value(program, x)
    if use_input_stats:
        return _norm(program, source, source.sizes[0], weight, bias, eps)
    return batch_norm(program, source, mean, var, weight, bias, False, momentum, eps)


def layer_norm(
    program: Program, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Image:
    _image(x)
    if list(shape) == list(x.sizes) and len(x.sizes) == 3 and weight is None and bias is None:
        return _norm(program, value(program, x), 1, None, None, eps)
    if len(shape) != 1 or shape[0] != x.sizes[-1]:
        raise Refused(f"over {list(shape)}")
    return _pixels(program, x, int(shape[0]), lambda v: _norm(program, v, 0, weight, bias, eps))


def softmax(program: Program, x: Any, dim: int, *rest: Any, **kwargs: Any) -> Image:
    _image(x)
    if any(r not in (None, False, torch.float32) for r in (*rest, *kwargs.values())):
        raise Refused("to another dtype")

    def call(source: Value, over_channels: int) -> Value:
        made = program.step("softmax", x=source, over_channels=over_channels, flat=source.flat)
        return sized(made, *source.sizes)

    place = dim % (len(x.sizes) + 1)
    if isinstance(x, Value) and place == 1:
        return call(x, 1)
    if place == 0 or place != len(x.sizes):
        raise Refused(f"over dimension {dim}")
    if isinstance(x, Moved):
        channels, height, width = _shape(x.value)
        if torch.equal(x.index, _numbers(channels, height * width).reshape(x.index.shape)) and (
            x.sizes[-1] == height * width
        ):
            return Moved(call(x.value, 0), x.index)
    return _pixels(program, x, x.sizes[-1], lambda v: call(v, 1))


def batch_norm(
    program: Program,
    x: Any,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Value:
    source = value(program, x)
    scale = torch.rsqrt(var.double() + eps) * (1.0 if weight is None else weight.double())
    shift = -mean.double() * scale + (0.0 if bias is None else bias.double())
    return sized(program.affine(source, scale.float(), shift.float()), *source.sizes)
