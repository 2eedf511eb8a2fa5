"""A network as a program: a list of fused steps that the compiled core runs in one call.

Activations live in one preallocated memory, images go through all layers one after the other, and nothing is
allocated or dispatched between layers. float32 on the CPU only; what is not here runs layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import native_module
from .layout import GroupLayout

__all__ = ["Program", "Value"]

_MAGIC = 0x44535047
_ACTIVATIONS = {None: 0, "none": 0, "relu": 1, "relu6": 2}
_CONV, _LINEAR, _MAX_POOL, _AVG_POOL, _ADAPTIVE, _ADD, _ACTIVATION, _CONCAT, _FLATTEN, _AFFINE = range(1, 11)

IntPair = int | Sequence[int]


def _pair(name: str, value: IntPair) -> tuple[int, int]:
    items = (value, value) if isinstance(value, int) else tuple(value)
    if len(items) == 1:
        items = (items[0], items[0])
    if len(items) != 2 or not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise ValueError(f"{name} must be an int or two ints, got {value!r}")
    return items[0], items[1]


def _activation(name: str | None) -> int:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be None, 'relu' or 'relu6', got {name!r}")
    return _ACTIVATIONS[name]


@dataclass(frozen=True, eq=False)
class Value:
    """What a step of a program makes, or its input: (channels, height, width) of an image, or a vector of
    features (``flat``). Steps of the same program take it; numbers and tensors are no values.
    """

    program: Program
    number: int  # 0: the input; else that of the step
    flat: bool

    def __repr__(self) -> str:
        return f"Value({self.number})"


class Program:
    """A network built step by step, then called.

    ``program = Program((3, 32, 32)); y = program.conv2d(program.input, weight); program.build(y);
    out = program(x)``. Each step takes values (``Value``) and returns the one that it makes;
    ``program.input`` is the input. Weights are float32 on the CPU, and are copied when the program is built.
    Calls from several threads at once are fine, the result does not depend on the number of threads, and a
    program can be copied and pickled (it is then built again, from the tensors as they are at that time).

    Each step takes sizes as an int or (vertical, horizontal), in pixels, and activations None, "relu" or
    "relu6".

    Args:
        input_shape: (channels, height, width) of one image, each at least 1; the batch may be any size in
            each call.

    Raises:
        ValueError: ``input_shape`` is another. Steps: TypeError, naming the argument, for a weight that is no
        tensor, or a number or anything else in the place of a value; ValueError for weights of another shape,
        dtype or device, a value of another program, or an unknown activation; RuntimeError for a step after
        ``build``. Shapes that do not fit one another are found by ``build``.
    """

    def __init__(self, input_shape: Sequence[int]) -> None:
        shape = tuple(int(size) for size in input_shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(
                f"input_shape must be (channels, height, width), each at least 1, got {tuple(input_shape)}"
            )
        self.input_shape = shape
        self.output_shape: tuple[int, int, int] | None = None
        self._output_sizes: tuple[int, ...] = ()  # of one image; a flat output's are its features alone
        self._steps: list[list[int]] = []
        self._floats: list[Tensor] = []
        self._n_floats = 0
        self._output = 0
        self._output_flat = False
        self._handle = 0
        self._native: Any = None

    # ---- building ----

    @property
    def input(self) -> Value:
        """The images that the program is called with."""
        return Value(self, 0, False)

    def _value(self, name: str, value: Value) -> int:
        """The number of one of this program's values."""
        if not isinstance(value, Value):
            raise TypeError(f"{name} must be a value of this program, got {type(value).__name__} {value!r}")
        if value.program is not self:
            raise ValueError(f"{name} must be a value of this program, got one of another program")
        return value.number

    def _store(self, name: str, tensor: Tensor) -> int:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(f"{name} must be float32 on the cpu, got {tensor.dtype} on {tensor.device}")
        at = self._n_floats
        self._floats.append(tensor.detach().reshape(-1))  # no copy: the core makes its own
        self._n_floats += tensor.numel()
        return at

    def _step(self, operation: int, *arguments: int, flat: bool = False) -> Value:
        if self._handle:
            raise RuntimeError("the program is built; make another one for other steps")
        self._steps.append([operation, len(arguments) + 2, *arguments])
        return Value(self, len(self._steps), flat)

    def conv(
        self,
        x: Value,
        weight: Tensor,
        layout: GroupLayout,
        bias: Tensor | None = None,
        *,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        residual: Value | None = None,
        activation: str | None = None,
    ) -> Value:
        """act(conv + bias + residual), permuted and grouped; ``weight`` as ``layout.pack`` gives it.

        Raises: see :class:`Program`.
        """
        source = self._value("x", x)
        kernel = _pair("kernel_size", kernel_size)
        if weight.dim() != 1 or weight.numel() != layout.weight_numel(kernel):
            raise ValueError(
                f"weight must be 1-D with {layout.weight_numel(kernel)} elements, got {tuple(weight.shape)}"
            )
        if bias is not None and bias.shape != (layout.out_channels,):
            raise ValueError(f"bias must have {layout.out_channels} elements, got {tuple(bias.shape)}")
        plan = layout.plan().tolist()
        return self._step(
            _CONV,
            source,
            -1 if residual is None else self._value("residual", residual),
            _activation(activation),
            *kernel,
            *_pair("stride", stride),
            *_pair("padding", padding),
            *_pair("dilation", dilation),
            self._store("weight", weight),
            -1 if bias is None else self._store("bias", bias),
            len(plan),
            *plan,
        )

    def conv2d(
        self,
        x: Value,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: IntPair = 1,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        residual: Value | None = None,
        activation: str | None = None,
    ) -> Value:
        """An ordinary convolution; ``weight`` is (out, in / groups, kh, kw). Depthwise is groups = in.

        Raises: see :class:`Program`.
        """
        if weight.dim() != 4 or groups < 1 or weight.shape[0] % groups:
            raise ValueError(
                f"weight must be (out, in / groups, kh, kw) with out a multiple of groups={groups}, "
                f"got {tuple(weight.shape)}"
            )
        out, inner = weight.shape[:2]
        per = out // groups
        layout = GroupLayout(
            inner * groups,
            out,
            [(range(g * inner, (g + 1) * inner), range(g * per, (g + 1) * per)) for g in range(groups)],
        )
        return self.conv(
            x,
            weight.detach().reshape(-1),
            layout,
            bias,
            kernel_size=(weight.shape[2], weight.shape[3]),
            stride=stride,
            padding=padding,
            dilation=dilation,
            residual=residual,
            activation=activation,
        )

    def linear(
        self, x: Value, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
    ) -> Value:
        """act(weight @ x + bias) of a flat value; ``weight`` is (out, in).

        Raises: see :class:`Program`.
        """
        if weight.dim() != 2:
            raise ValueError(f"weight must be (out, in), got {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have {weight.shape[0]} elements, got {tuple(bias.shape)}")
        return self._step(
            _LINEAR,
            self._value("x", x),
            _activation(activation),
            weight.shape[0],
            self._store("weight", weight),
            -1 if bias is None else self._store("bias", bias),
            flat=True,
        )

    def max_pool(
        self,
        x: Value,
        kernel_size: IntPair,
        stride: IntPair | None = None,
        padding: IntPair = 0,
        dilation: IntPair = 1,
        ceil_mode: bool = False,
    ) -> Value:
        """As torch.nn.functional.max_pool2d.

        Raises: see :class:`Program`.
        """
        kernel = _pair("kernel_size", kernel_size)
        return self._step(
            _MAX_POOL,
            self._value("x", x),
            *kernel,
            *(_pair("stride", stride) if stride is not None else kernel),
            *_pair("padding", padding),
            *_pair("dilation", dilation),
            int(ceil_mode),
        )

    def avg_pool(
        self,
        x: Value,
        kernel_size: IntPair,
        stride: IntPair | None = None,
        padding: IntPair = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> Value:
        """As torch.nn.functional.avg_pool2d without divisor_override.

        Raises: see :class:`Program`.
        """
        kernel = _pair("kernel_size", kernel_size)
        return self._step(
            _AVG_POOL,
            self._value("x", x),
            *kernel,
            *(_pair("stride", stride) if stride is not None else kernel),
            *_pair("padding", padding),
            int(ceil_mode),
            int(count_include_pad),
        )

    def adaptive_avg_pool(self, x: Value, output_size: IntPair) -> Value:
        """As torch.nn.functional.adaptive_avg_pool2d; 1 is the mean over each plane.

        Raises: see :class:`Program`.
        """
        return self._step(_ADAPTIVE, self._value("x", x), *_pair("output_size", output_size))

    def add(self, a: Value, b: Value, *, activation: str | None = None) -> Value:
        """act(a + b) of two values of one shape.

        Raises: see :class:`Program`.
        """
        numbers = self._value("a", a), self._value("b", b)
        return self._step(_ADD, *numbers, _activation(activation), flat=a.flat and b.flat)

    def relu(self, x: Value) -> Value:
        """max(x, 0)."""
        return self._step(_ACTIVATION, self._value("x", x), 1, flat=x.flat)

    def relu6(self, x: Value) -> Value:
        """min(max(x, 0), 6)."""
        return self._step(_ACTIVATION, self._value("x", x), 2, flat=x.flat)

    def affine(self, x: Value, scale: Tensor, shift: Tensor, *, activation: str | None = None) -> Value:
        """act(x * scale + shift), one scale and shift per channel: a BatchNorm that nothing took in.

        Raises: see :class:`Program`.
        """
        if scale.dim() != 1 or scale.shape != shift.shape:
            raise ValueError(
                f"scale and shift must be 1-D and alike, got {tuple(scale.shape)} and {tuple(shift.shape)}"
            )
        return self._step(
            _AFFINE,
            self._value("x", x),
            self._store("scale", scale),
            self._store("shift", shift),
            _activation(activation),
            flat=x.flat,
        )

    def concat(self, values: Sequence[Value]) -> Value:
        """Channels of all values, one after the other."""
        numbers = [self._value("values", value) for value in values]
        return self._step(_CONCAT, len(numbers), *numbers, flat=all(value.flat for value in values))

    def flatten(self, x: Value) -> Value:
        """(channels, height, width) as one vector, as torch.flatten(x, 1)."""
        return self._step(_FLATTEN, self._value("x", x), flat=True)

    def build(self, output: Value) -> Program:
        """Checks shapes, lays out memory and weights.

        ``output``: the value to return, that of a step. Returns the program itself.

        Raises TypeError or ValueError for another ``output``, ValueError with the core's text where shapes do
        not fit one another; RuntimeError where there is no compiled module, or the program is built already.
        """
        number = self._value("output", output)
        if number == 0:
            raise ValueError("output must be the value of a step, got the input")
        if self._handle:
            raise RuntimeError("the program is built already")
        self._output, self._output_flat = number, output.flat
        self._create()
        return self

    def _create(self) -> None:
        native = native_module()
        length = 8 + sum(len(step) for step in self._steps)
        words = [_MAGIC, 1, *self.input_shape, len(self._steps), self._output, length]
        for step in self._steps:
            words.extend(step)
        description = torch.tensor(words, dtype=torch.int64)
        floats = torch.cat(self._floats) if self._floats else torch.zeros(1)
        status, handle = native.program_create(
            description.data_ptr(), description.numel(), floats.data_ptr(), floats.numel()
        )
        if status != 0:
            raise ValueError(native.last_error())
        self._native = native
        self._handle = handle
        self.output_shape = channels, height, width = native.program_output(handle)
        self._output_sizes = (channels,) if self._output_flat else (channels, height, width)

    # ---- running ----

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` (N, *input_shape), float32 on the CPU -> (N, channels, height, width) of the output.

        A flat output is (N, features). Raises TypeError or ValueError for another x, and RuntimeError before
        build().
        """
        if not self._handle or self.output_shape is None:
            raise RuntimeError("the program is not built; call build() first")
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"x must be float32 on the cpu, got {x.dtype} on {x.device}")
        shape = x.shape
        if len(shape) != 4 or shape[1:] != self.input_shape:
            raise ValueError(f"x must be (N, {', '.join(map(str, self.input_shape))}), got {tuple(shape)}")
        return self._run(x, shape[0])

    def _run(self, x: Tensor, batch: int) -> Tensor:
        """A call whose x was checked. Each line here counts: the call before has emptied the caches."""
        if not x.is_contiguous():
            x = x.detach().contiguous()
        if x.is_neg():  # a view that says "negated": what lies in memory has the other sign
            x = x.detach().resolve_neg()
        out = x.new_empty((batch, *self._output_sizes))
        status = self._native.program_run(
            self._handle,
            x.data_ptr(),
            x.numel(),
            out.data_ptr(),
            out.numel(),
            batch,
            torch.get_num_threads(),
        )
        if status != 0:
            raise RuntimeError(self._native.last_error())
        return out

    def memory(self) -> dict[str, int]:
        """``weight_bytes``, ``arena_bytes`` (image or pair), ``scratch_bytes`` (thread), ``arenas`` (number).

        Raises RuntimeError before build().
        """
        if not self._handle:
            raise RuntimeError("the program is not built; call build() first")
        memory: dict[str, int] = self._native.program_memory(self._handle)
        return memory

    def __len__(self) -> int:
        return len(self._steps)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_native"] = None
        state["_handle"] = 0
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.output_shape is not None:
            self._create()

    def __del__(self) -> None:
        handle, native = getattr(self, "_handle", 0), getattr(self, "_native", None)
        destroy = getattr(native, "program_destroy", None)  # gone while Python ends
        if handle and destroy is not None:
            self._handle = 0
            destroy(handle)
