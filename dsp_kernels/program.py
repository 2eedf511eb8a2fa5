"""A network as a program: a list of fused steps that the compiled core runs in one call.

Activations live in one preallocated memory, images go through all layers one after the other, and nothing is
allocated or dispatched between layers. float32 on the CPU only; what is not here runs layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import activations
from .backends import native_module
from .geometry import pair
from .layout import GroupLayout

__all__ = ["Program", "Value"]

IntPair = int | Sequence[int]

# What the core's kinds of fields take; None is the word -1, and of an activation its code.
_TAKES = {
    "int": {"int"},
    "value": {"value"},
    "maybe_value": {"value", "none"},
    "values": {"values"},
    "activation": {"activation"},
    "floats": {"floats"},
    "maybe_floats": {"floats", "none"},
    "plan": {"plan"},
}

_FLOAT32 = 0  # a dsp_dtype
_UNBOUNDED = 1 << 31  # no size of an image reaches it


def _window(
    kernel_size: IntPair, stride: IntPair, padding: IntPair, dilation: IntPair | None = None
) -> dict[str, Any]:
    """The fields of a window that slides over an image."""
    given = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    fields = {}
    for name, value in given.items():
        if value is not None:
            stem = name.removesuffix("_size")
            least = 0 if stem == "padding" else 1
            fields[f"{stem}_h"], fields[f"{stem}_w"] = pair(name, value, least, expand=True)
    return fields


def _read(fields: dict[str, tuple[str, list[int]]]) -> list[int]:
    """The values that a step with these fields reads, by their numbers."""
    single = [words[0] for what, words in fields.values() if what == "value"]
    return single + [number for what, words in fields.values() if what == "values" for number in words[1:]]


def _renumbered(given: tuple[str, list[int]], numbers: Sequence[int]) -> tuple[str, list[int]]:
    what, words = given
    if what == "value":
        return what, [numbers[words[0]]]
    if what == "values":
        return what, [words[0], *(numbers[number] for number in words[1:])]
    return given


@dataclass(frozen=True, eq=False)
class Value:
    """What a step of a program makes, or an input: (channels, height, width) of an image, or a vector of
    features (``flat``). Steps of the same program take it; numbers and tensors are no values. ``sizes``:
    those of one image, where they are known, as they are for inputs.
    """

    program: Program
    number: int  # inputs come first, then what steps make
    flat: bool
    sizes: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"Value({self.number})"


class Program:
    """A network built step by step, then called.

    ``program = Program((3, 32, 32)); y = program.conv2d(program.input, weight); program.build(y);
    out = program(x)``. Each step takes values (``Value``) and returns the one that it makes;
    ``program.inputs`` are the inputs, ``program.input`` the first of them. Weights are float32 on the CPU,
    and are copied when the program is built.
    Calls from several threads at once are fine, the result does not depend on the number of threads, and a
    program can be copied and pickled (it is then built again, from the tensors as they are at that time).

    Each step takes sizes as an int or (vertical, horizontal), in pixels, and activations as names
    (``dsp_kernels.activations``).

    Args:
        input_shapes: per input (channels, height, width) of one image, or (features,) of a vector, each at
            least 1; the batch, of all inputs alike, may be any size in each call.

    Raises:
        ValueError: ``input_shapes`` are others. Steps: TypeError, naming the argument, for a weight that is
        no tensor, or a number or anything else in the place of a value; ValueError for weights of another
        shape, dtype or device, a value of another program, or an unknown activation; RuntimeError for a step
        after ``build``. Shapes that do not fit one another are found by ``build``.
    """

    def __init__(self, *input_shapes: Sequence[int]) -> None:
        shapes = tuple(tuple(int(size) for size in shape) for shape in input_shapes)
        if not shapes or any(len(shape) not in (1, 3) or min(shape) < 1 for shape in shapes):
            raise ValueError(
                "input_shapes must be (channels, height, width) or (features,), each at least 1, "
                f"got {', '.join(map(str, shapes)) or 'none'}"
            )
        self.input_shapes: tuple[tuple[int, ...], ...] = shapes
        self.output_shapes: tuple[tuple[int, ...], ...] = ()  # as those of the inputs; empty before build()
        self._steps: list[tuple[str, dict[str, tuple[str, list[int]]]]] = []  # name, fields as words
        self._floats: list[Tensor] = []
        self._n_floats = 0
        self._outputs: tuple[Value, ...] = ()
        self._handle = 0
        self._native: Any = None

    # ---- building ----

    @property
    def input(self) -> Value:
        """The images that the program is called with; the first of several inputs."""
        return self.inputs[0]

    @property
    def inputs(self) -> tuple[Value, ...]:
        """What the program is called with."""
        return tuple(Value(self, i, len(shape) == 1, shape) for i, shape in enumerate(self.input_shapes))

    def _value(self, name: str, value: Value) -> Value:
        """``value``, where it is one of this program's."""
        if not isinstance(value, Value):
            raise TypeError(f"{name} must be a value of this program, got {type(value).__name__} {value!r}")
        if value.program is not self:
            raise ValueError(f"{name} must be a value of this program, got one of another program")
        return value

    def _store(self, name: str, tensor: Tensor) -> int:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(f"{name} must be float32 on the cpu, got {tensor.dtype} on {tensor.device}")
        at = self._n_floats
        self._floats.append(tensor.detach().reshape(-1))  # no copy: the core makes its own
        self._n_floats += tensor.numel()
        return at

    def _field(self, name: str, given: Any) -> tuple[str, list[int]]:
        """What was given for a field: what it is, and its words."""
        if given is None:
            return "none", [-1]
        if isinstance(given, Value):
            return "value", [self._value(name, given).number]
        if isinstance(given, Tensor):
            return "floats", [self._store(name, given)]
        if isinstance(given, activations.Activation):
            values = [self._store(name, torch.tensor(given.values))] if given.values else []
            return "activation", [given.code, *values]
        if isinstance(given, int):
            return "int", [int(given)]
        items = list(given)
        if items and isinstance(items[0], Value):
            return "values", [len(items), *(self._value(name, item).number for item in items)]
        return "plan", [len(items), *items]

    def step(self, name: str, /, *, flat: bool = False, **fields: Any) -> Value:
        """One step of the core by its name and fields, as ``csrc/program/steps.def`` has them.

        Values, tensors (weights; float32 on the CPU), activations (``activations.find``), numbers, lists of
        values or of a plan's words, and None where a field may be absent. ``flat``: the result is a vector of
        features. The methods below are these steps with torch's arguments.

        Raises: see :class:`Program`; ``build`` raises TypeError for a step or field that the core does not
        have, a field that is missing, and something else than the field takes.
        """
        if self._handle:
            raise RuntimeError("the program is built; make another one for other steps")
        self._steps.append((name, {key: self._field(key, given) for key, given in fields.items()}))
        return Value(self, len(self.input_shapes) + len(self._steps) - 1, flat)

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
        self._value("x", x)
        kernel = pair("kernel_size", kernel_size, 1, expand=True)
        if weight.dim() != 1 or weight.numel() != layout.weight_numel(kernel):
            raise ValueError(
                f"weight must be 1-D with {layout.weight_numel(kernel)} elements, got {tuple(weight.shape)}"
            )
        if bias is not None and bias.shape != (layout.out_channels,):
            raise ValueError(f"bias must have {layout.out_channels} elements, got {tuple(bias.shape)}")
        return self.step(
            "conv",
            x=x,
            residual=None if residual is None else self._value("residual", residual),
            activation=activations.find(activation),
            **_window(kernel, stride, padding, dilation),
            weight=weight,
            bias=bias,
            plan=layout.plan().tolist(),
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
        return self.step(
            "linear",
            x=self._value("x", x),
            activation=activations.find(activation),
            features=weight.shape[0],
            weight=weight,
            bias=bias,
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
        return self.step(
            "max_pool",
            x=self._value("x", x),
            **_window(kernel_size, kernel_size if stride is None else stride, padding, dilation),
            ceil_mode=int(ceil_mode),
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
        return self.step(
            "avg_pool",
            x=self._value("x", x),
            **_window(kernel_size, kernel_size if stride is None else stride, padding),
            ceil_mode=int(ceil_mode),
            count_include_pad=int(count_include_pad),
        )

    def adaptive_avg_pool(self, x: Value, output_size: IntPair) -> Value:
        """As torch.nn.functional.adaptive_avg_pool2d; 1 is the mean over each plane.

        Raises: see :class:`Program`.
        """
        out_h, out_w = pair("output_size", output_size, 1, expand=True)
        return self.step("adaptive_avg_pool", x=self._value("x", x), out_h=out_h, out_w=out_w)

    def add(self, a: Value, b: Value, *, activation: str | None = None) -> Value:
        """act(a + b) of two values of one shape.

        Raises: see :class:`Program`.
        """
        a, b = self._value("a", a), self._value("b", b)
        act = activations.find(activation)
        return self.step("add", a=a, b=b, activation=act, flat=a.flat and b.flat)

    def activation(self, x: Value, activation: str | None) -> Value:
        """act(x).

        Raises: see :class:`Program`.
        """
        self._value("x", x)
        return self.step("activation", x=x, activation=activations.find(activation), flat=x.flat)

    def relu(self, x: Value) -> Value:
        """max(x, 0)."""
        return self.activation(x, "relu")

    def relu6(self, x: Value) -> Value:
        """min(max(x, 0), 6)."""
        return self.activation(x, "relu6")

    def affine(self, x: Value, scale: Tensor, shift: Tensor, *, activation: str | None = None) -> Value:
        """act(x * scale + shift), one scale and shift per channel: a BatchNorm that nothing took in.

        Raises: see :class:`Program`.
        """
        if scale.dim() != 1 or scale.shape != shift.shape:
            raise ValueError(
                f"scale and shift must be 1-D and alike, got {tuple(scale.shape)} and {tuple(shift.shape)}"
            )
        self._value("x", x)
        act = activations.find(activation)
        return self.step("affine", x=x, scale=scale, shift=shift, activation=act, flat=x.flat)

    def concat(self, values: Sequence[Value]) -> Value:
        """Channels of all values, one after the other."""
        values = [self._value("values", value) for value in values]
        return self.step("concat", values=values, flat=all(value.flat for value in values))

    def flatten(self, x: Value) -> Value:
        """(channels, height, width) as one vector, as torch.flatten(x, 1)."""
        return self.step("flatten", x=self._value("x", x), flat=True)

    def build(self, *outputs: Value) -> Program:
        """Checks shapes, lays out memory and weights.

        ``outputs``: the values to return, those of steps. Returns the program itself.

        Raises TypeError or ValueError for other ``outputs``, ValueError with the core's text where shapes do
        not fit one another; RuntimeError where there is no compiled module, or the program is built already.
        """
        if not outputs:
            raise ValueError("output must be the value of a step, got none")
        if any(self._value("output", output).number < len(self.input_shapes) for output in outputs):
            raise ValueError("output must be the value of a step, got an input")
        if self._handle:
            raise RuntimeError("the program is built already")
        self._create(self._simplified(outputs))
        return self

    def _simplified(self, outputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """The outputs without steps that nobody reads, and with activations in the steps before them."""
        first = len(self.input_shapes)
        uses = [0] * (first + len(self._steps))
        for output in outputs:
            uses[output.number] += 1
        for i in reversed(range(len(self._steps))):
            if uses[first + i]:
                for number in _read(self._steps[i][1]):
                    uses[number] += 1
        numbers = list(range(first))  # of values, by the number that they had
        kept: list[tuple[str, dict[str, tuple[str, list[int]]]]] = []
        for i, (name, fields) in enumerate(self._steps):
            if not uses[first + i]:
                numbers.append(-1)
                continue
            what = {key: _renumbered(given, numbers) for key, given in fields.items()}
            x = fields["x"][1][0] if name == "activation" and "x" in fields else -1
            if x >= first and uses[x] == 1 and fields["x"][0] == "value":
                before = kept[numbers[x] - first][1]
                if before.get("activation") == ("activation", [activations.find(None).code]):
                    before["activation"] = what["activation"]
                    numbers.append(numbers[x])
                    continue
            numbers.append(first + len(kept))
            kept.append((name, what))
        self._steps = kept
        return tuple(replace(output, number=numbers[output.number]) for output in outputs)

    def _words(self, table: dict[str, Any], outputs: Sequence[Value]) -> list[int]:
        """The description, by the core's own table (``_native.program_format``)."""
        words: list[int] = []
        for name, given in self._steps:
            if name not in table["steps"]:
                raise TypeError(f"the core has no step {name!r}; it has {', '.join(table['steps'])}")
            code, fields = table["steps"][name]
            if given.keys() != {field for field, *_ in fields}:
                expected = ", ".join(field for field, *_ in fields)
                raise TypeError(f"the fields of step {name!r} are {expected}; got {', '.join(given)}")
            step: list[int] = []
            for field, kind, _, _ in fields:
                what, items = given[field]
                if what not in _TAKES[kind]:
                    raise TypeError(f"{field} of step {name!r} must be {kind}, got {what}")
                step.extend(items)
            words.extend((code, len(step) + 2, *step))
        ends = [size for shape in self.input_shapes for size in (*shape, 1, 1)[:3]]
        ends += [output.number for output in outputs]
        counts = (len(self.input_shapes), len(self._steps), len(outputs))
        header = (table["magic"], table["version"], *counts)
        return [*header, len(header) + 1 + len(ends) + len(words), *ends, *words]

    def _parts(self, native: Any, outputs: tuple[Value, ...]) -> tuple[Tensor, list[Tensor]]:
        """The description's words, and its floats: in the weights' own memory where that is in order."""
        words = torch.tensor(self._words(native.program_format(), outputs), dtype=torch.int64)
        return words, [tensor.resolve_neg().contiguous() for tensor in self._floats]

    def _create(self, outputs: tuple[Value, ...]) -> None:
        native = native_module()
        words, floats = self._parts(native, outputs)
        pieces = [(tensor.data_ptr(), tensor.numel()) for tensor in floats]  # not joined: that takes memory
        status, handle = native.program_create(words.data_ptr(), words.numel(), pieces)
        if status != 0:
            raise ValueError(native.last_error())
        self._native = native
        self._handle = handle
        self._outputs = outputs
        shapes = native.program_outputs(handle)
        self.output_shapes = tuple(
            shape[:1] if output.flat else shape for output, shape in zip(outputs, shapes, strict=True)
        )

    # ---- running ----

    def __call__(self, *inputs: Tensor) -> Any:
        """Inputs (N, *shape), float32 on the CPU -> (N, channels, height, width) of each output.

        A flat output is (N, features); several come as a tuple. Raises TypeError or ValueError for other
        inputs, and RuntimeError before build().
        """
        if not self._handle:
            raise RuntimeError("the program is not built; call build() first")
        if len(inputs) != len(self.input_shapes):
            raise TypeError(f"expected {len(self.input_shapes)} inputs, got {len(inputs)}")
        for x, shape in zip(inputs, self.input_shapes, strict=True):
            if not isinstance(x, Tensor):
                raise TypeError(f"x must be a tensor, got {type(x).__name__}")
            if x.dtype != torch.float32 or x.device.type != "cpu":
                raise ValueError(f"x must be float32 on the cpu, got {x.dtype} on {x.device}")
            if x.dim() != len(shape) + 1 or x.shape[1:] != shape:
                raise ValueError(f"x must be (N, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
            if x.shape[0] != inputs[0].shape[0]:
                raise ValueError(f"x must be {inputs[0].shape[0]} images as the first, got {x.shape[0]}")
        results = self.run(inputs, inputs[0].shape[0])
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, inputs: Sequence[Tensor], batch: int) -> list[Tensor]:
        """A call whose inputs were checked: as many as there are, of these shapes, float32 on the CPU.

        Each line here counts: the call before has emptied the caches.
        """
        tensors = []
        for x in inputs:
            if not x.is_contiguous():
                x = x.detach().contiguous()
            if x.is_neg():  # a view that says "negated": what lies in memory has the other sign
                x = x.detach().resolve_neg()
            tensors.append(x)
        results = [x.new_empty((batch, *shape)) for shape in self.output_shapes]
        tensors += results
        status = self._native.program_run(
            self._handle,
            [t.data_ptr() for t in tensors],
            [t.numel() for t in tensors],
            batch,
            torch.get_num_threads(),
        )
        if status != 0:
            raise RuntimeError(self._native.last_error())
        return results

    def memory(self) -> dict[str, int]:
        """``weight_bytes``, ``arena_bytes`` (image or pair), ``scratch_bytes`` (thread), ``arenas`` (number).

        Raises RuntimeError before build().
        """
        if not self._handle:
            raise RuntimeError("the program is not built; call build() first")
        memory: dict[str, int] = self._native.program_memory(self._handle)
        return memory

    def same_steps(self, other: Program) -> bool:
        """Whether both are built of the same steps with the same weights: all but the sizes of the images."""
        native = native_module()
        mine, theirs = self._parts(native, self._outputs), other._parts(native, other._outputs)
        if mine[0].shape != theirs[0].shape or len(mine[1]) != len(theirs[1]):
            return False
        if not all(map(torch.equal, mine[1], theirs[1])):
            return False
        header = native.program_format()["header"]
        sizes = slice(header, header + 3 * len(self.input_shapes))
        theirs[0][sizes] = mine[0][sizes]
        return torch.equal(mine[0], theirs[0])

    def file(
        self,
        inputs: Sequence[str],
        outputs: Sequence[str],
        least: tuple[int, int] | None = None,
        most: tuple[int | None, int | None] = (None, None),
    ) -> bytes:
        """The program as a file for ``dsp_model_load`` and :mod:`dsp_kernels.runtime`.

        Args:
            inputs, outputs: their names: printable ASCII without spaces, at most 255 characters.
            least, most: of the heights and widths that the file allows for images (None in ``most``: no
                bound); ``least`` None: the program's own sizes alone.

        Raises RuntimeError before build(), ValueError for names or bounds that a file cannot have.
        """
        if not self._handle:
            raise RuntimeError("the program is not built; call build() first")
        native = native_module()
        words, pieces = self._parts(native, self._outputs)
        floats = torch.cat([*pieces, torch.zeros(0)])
        infos = []
        for name, shape in zip(inputs, self.input_shapes, strict=True):
            lower, upper = shape, shape
            if least is not None and len(shape) == 3:
                lower = (shape[0], *least)
                upper = (shape[0], *(_UNBOUNDED if size is None else size for size in most))
            infos.append((name, _FLOAT32, (1, *shape), (0, *lower), (_UNBOUNDED, *upper)))
        shapes = [(1, *shape) for shape in self.output_shapes]
        status, data = native.program_file(
            *(words.data_ptr(), words.numel(), floats.data_ptr(), floats.numel()),
            infos,
            [(name, _FLOAT32, *([shape] * 3)) for name, shape in zip(outputs, shapes, strict=True)],
        )
        if status != 0:
            raise ValueError(native.last_error())
        return bytes(data)

    def profile(self) -> list[dict[str, Any]]:
        """What each step takes of one image, on this thread: a row a step in the order in which they run.

        The image is all ones. A row has ``step`` (its name; "copy": to another layout), ``layout`` of
        its result ("planar" or "lanes"), ``shape`` (channels, height, width), ``macs`` (of a convolution, as
        its structure needs) and ``seconds`` of the thread's clock.

        Raises RuntimeError before build().
        """
        if not self._handle:
            raise RuntimeError("the program is not built; call build() first")
        status, rows = self._native.program_profile(self._handle)
        if status != 0:
            raise RuntimeError(self._native.last_error())
        names = {code: name for name, (code, _) in self._native.program_format()["steps"].items()}
        return [
            {
                "step": names.get(operation, "copy"),
                "layout": "lanes" if last else "planar",
                "shape": shape,
                "macs": macs,
                "seconds": seconds,
            }
            for operation, last, shape, macs, seconds in rows
        ]

    def __len__(self) -> int:
        return len(self._steps)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_native"] = None
        state["_handle"] = 0
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._outputs:
            self._create(self._outputs)

    def __del__(self) -> None:
        handle, native = getattr(self, "_handle", 0), getattr(self, "_native", None)
        destroy = getattr(native, "program_destroy", None)  # gone while Python ends
        if handle and destroy is not None:
            self._handle = 0
            destroy(handle)
