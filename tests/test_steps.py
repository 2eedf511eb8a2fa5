"""Operators of packed networks as steps of native programs: values against float64, on both engines."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsprune
from dsp_kernels import activations, backends
from dsp_kernels.program import Program

pytestmark = pytest.mark.skipif(
    backends.available_backends()["native"] is not None, reason="no compiled module"
)

Operator = Callable[["Net", Tensor], Tensor]


def of(call: Callable[[Tensor], Tensor]) -> Operator:
    return lambda net, y: call(y)


def shuffle(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)


def squeeze(net: Net, y: Tensor) -> Tensor:
    gate = net.vectors(y.mean((2, 3)))
    return y * gate.sigmoid().view(y.shape[0], -1, 1, 1)


def last(net: Net, y: Tensor) -> Tensor:
    """A block of ConvNeXt."""
    z = net.layer_norm(y.permute(0, 2, 3, 1))
    return y + (F.gelu(net.wider(z))[..., :8] * net.gamma).permute(0, 3, 1, 2)


def tokens(net: Net, y: Tensor) -> Tensor:
    z = net.wider(net.layer_norm(y.flatten(2).transpose(1, 2)))
    return z.transpose(1, 2).reshape(y.shape[0], 12, *y.shape[2:])


GROUPS: dict[str, dict[str, Operator]] = {
    "activations": {
        "silu": of(F.silu),
        "hardswish": of(F.hardswish),
        "hardsigmoid": of(F.hardsigmoid),
        "sigmoid": of(torch.sigmoid),
        "gelu": of(F.gelu),
        "gelu tanh": of(lambda y: F.gelu(y, approximate="tanh")),
        "leaky_relu": of(lambda y: F.leaky_relu(y, 0.2)),
        "elu": of(lambda y: F.elu(y, 0.7)),
        "selu": of(F.selu),
        "mish": of(F.mish),
        "tanh": of(torch.tanh),
        "clamp": of(lambda y: y.clamp(-0.3, 0.8)),
        "clamp(0, 6)": of(lambda y: y.clamp(0, 6)),
        "clamp, one side": of(lambda y: y.clamp(max=0.5)),
        "hardtanh": of(F.hardtanh),
        "prelu": lambda net, y: net.prelu(y),
        "prelu of one": lambda net, y: net.prelu_of_one(y),
    },
    "arithmetic": {
        "x + 1": of(lambda y: y + 1),
        "1 - x": of(lambda y: 1 - y),
        "x - 2": of(lambda y: y - 2),
        "0.2 x": of(lambda y: 0.2 * y),
        "x / 3": of(lambda y: y / 3),
        "1 / x": of(lambda y: 1 / (y.relu() + 1)),
        "-x": of(lambda y: -y),
        "x * x": of(lambda y: y**2),
        "product": of(lambda y: y * y.relu()),
        "quotient": of(lambda y: y / (y.relu() + 1)),
        "difference": of(lambda y: torch.sub(y, y.relu(), alpha=2)),
        "sum, alpha": of(lambda y: torch.add(y, y.relu(), alpha=0.5)),
        "maximum": of(lambda y: torch.maximum(y, -y * 0.3)),
        "minimum": of(lambda y: torch.minimum(y, y * y)),
        "gate": of(lambda y: y * y.mean((2, 3), keepdim=True).sigmoid()),
        "gate first": of(lambda y: y.mean((2, 3), keepdim=True).sigmoid() * y),
        "map": of(lambda y: y * y.mean(1, keepdim=True).sigmoid()),
        "rows": of(lambda y: y - y.mean(3, keepdim=True)),
        "columns": of(lambda y: y + y.amax(2, keepdim=True)),
        "vectors": squeeze,
        "channels": lambda net, y: y * net.scale + net.shift,
        "positions": lambda net, y: y + net.position,
        "vector": lambda net, y: net.vectors(y.amax((2, 3))) - 1,
    },
    "moves": {
        "split": of(lambda y: torch.cat(y.split(2, 1)[::-1], 1)),
        "split, uneven": of(lambda y: torch.cat(y.split([3, 5], 1)[::-1], 1)),
        "chunk": of(lambda y: y.chunk(2, 1)[1] + y.chunk(2, 1)[0]),
        "slice": of(lambda y: y[:, 1:6:2, 1:, :-1]),
        "shuffle": of(shuffle),
        "nn.ChannelShuffle": of(lambda y: F.channel_shuffle(y, 2)),
        "index_select": lambda net, y: y.index_select(1, net.order),
        "focus": of(
            lambda y: torch.cat([y[:, :, ::2, ::2][..., :2, :2], y[:, :, 1::2, ::2][..., :2, :2]], 1)
        ),
        "cat of rows": of(lambda y: torch.cat([y, y.relu()], 2)),
        "cat of columns": of(lambda y: torch.cat([y.flip(3), y.relu()], 3)),
        "stack": of(lambda y: torch.stack([y, y.relu()], 2).flatten(1, 2)),
        "roll": of(lambda y: y.roll((1, 2), (2, 3))),
        "pixel_shuffle": of(lambda y: F.pixel_shuffle(y, 2)),
        "pixel_unshuffle": of(lambda y: F.pixel_unshuffle(y[:, :, :4, :4], 2)),
        "transpose": of(lambda y: y.transpose(2, 3)),
        "expand": of(lambda y: y.mean((2, 3), keepdim=True).expand_as(y)),
        "nearest": of(lambda y: F.interpolate(y, scale_factor=2)),
        "nearest, to a size": of(lambda y: F.interpolate(y, size=(y.shape[2] * 2 + 1, y.shape[3] + 1))),
        "bilinear": of(lambda y: F.interpolate(y, scale_factor=2, mode="bilinear")),
        "bilinear, smaller": of(lambda y: F.interpolate(y, size=(3, 4), mode="bilinear")),
        "bilinear, corners": of(lambda y: F.interpolate(y, size=(9, 7), mode="bilinear", align_corners=True)),
        "pad": of(lambda y: F.pad(y, (0, 1, 2, 1), value=0.5)),
        "pad, cut": of(lambda y: F.pad(y, (-1, 1, 0, -1))),
        "pad channels": of(lambda y: F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3))),
        "reflect": of(lambda y: F.pad(y, (2, 1, 1, 2), mode="reflect")),
        "replicate": of(lambda y: F.pad(y, (2, 1, 1, 2), mode="replicate")),
        "circular": of(lambda y: F.pad(y, (2, 1, 1, 2), mode="circular")),
        "flatten of rows": of(lambda y: y.flatten(2)[:, :, :4]),
    },
    "norms": {
        "instance norm": lambda net, y: net.instance_norm(y),
        "group norm": lambda net, y: net.group_norm(y),
        "layer norm": last,
        "layer norm of tokens": tokens,
        "layer norm of vectors": lambda net, y: net.layer_norm(y.mean((2, 3))),
        "softmax": of(lambda y: y.softmax(1)),
        "softmax of planes": of(lambda y: y.flatten(2).softmax(-1).view(y.shape)),
        "softmax of vectors": of(lambda y: y.mean((2, 3)).softmax(1)),
        "local mean": of(lambda y: F.avg_pool2d(y, 3, 1, 1, count_include_pad=False)),
        "transposed, 2x2": lambda net, y: net.up(y),
        "transposed, 4x4": lambda net, y: net.up4(y),
        "transposed, 3x3": lambda net, y: net.up3(y),
        "transposed, in groups": lambda net, y: net.up_in_groups(y),
        "transposed, dilated": lambda net, y: net.up_dilated(y),
    },
}


class Net(nn.Module):
    """A convolution, what is tried of its result, and all of that behind one another as vectors."""

    def __init__(self, operators: dict[str, Operator]) -> None:
        super().__init__()
        self.operators = list(operators.values())
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.prelu, self.prelu_of_one = nn.PReLU(8), nn.PReLU()
        self.vectors, self.wider, self.layer_norm = nn.Linear(8, 8), nn.Linear(8, 12), nn.LayerNorm(8)
        self.instance_norm, self.group_norm = nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 5, 2, stride=2)
        self.up4 = nn.ConvTranspose2d(8, 5, 4, stride=2, padding=1, bias=False)
        self.up3 = nn.ConvTranspose2d(8, 5, 3, stride=2, padding=1, output_padding=1)
        self.up_in_groups = nn.ConvTranspose2d(8, 6, 3, stride=(2, 3), groups=2, output_padding=(1, 2))
        self.up_dilated = nn.ConvTranspose2d(8, 4, 3, padding=1, dilation=2)
        self.scale, self.shift = nn.Parameter(torch.randn(8, 1, 1)), nn.Parameter(torch.randn(1, 8, 1, 1))
        self.gamma, self.position = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8, 6, 1))
        self.register_buffer("order", torch.tensor([3, 0, 7, 7, 1]))
        with torch.no_grad():
            self.b.weight[:4, :4] = 0
            self.b.weight[4:, 4:] = 0
            self.prelu.weight.uniform_(-0.5, 0.5)
            for module in (self.layer_norm, self.group_norm, self.instance_norm):
                module.weight.normal_()
                module.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return torch.cat([call(self, y).flatten(1) for call in self.operators], 1)


@pytest.mark.parametrize("group", GROUPS)
def test_values_of_operators(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(len(group))
    model = Net(GROUPS[group]).eval()
    exact = copy.deepcopy(model).double()
    packed = dsprune.pack(model, torch.randn(1, 3, 6, 5))
    for engine in ("", "planar", "lanes"):
        monkeypatch.setenv("DSP_CPU_ENGINE", engine)
        packed.refresh()
        for size in ((3, 3, 6, 5), (1, 3, 6, 11)):
            x = torch.randn(size)
            with torch.no_grad():
                given, y = packed(x), exact.b(exact.a(x.double()).relu())
                expected = [call(exact, y).flatten(1) for call in exact.operators]
            assert packed.program_reason is None, packed.program_reason
            assert given.shape[1] == sum(part.shape[1] for part in expected)
            parts = given.split([part.shape[1] for part in expected], 1)
            for name, part, wanted in zip(GROUPS[group], parts, expected, strict=True):
                scale = max(1.0, float(wanted.abs().max()))
                worst = float((part.double() - wanted).abs().max())
                assert worst <= 5e-6 * scale, (name, engine, size, worst)


def test_values_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and infinities come out where torch has them."""
    x = torch.randn(1, 4, 3, 5)
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    x[0, 1, 0, :3] = torch.tensor([float("inf"), 1.0, float("nan")])
    b = x.flip(1).contiguous()
    pairs = {0: x + b, 1: x - b, 2: x * b, 3: x / b, 4: torch.maximum(x, b), 5: torch.minimum(x, b)}
    for op, expected in pairs.items():
        program = Program((4, 3, 5))
        made = program.step(
            "gather",
            x=program.input,
            fill=torch.zeros(1),
            channels=[4, 3, 2, 1],
            rows=[1, 2, 3],
            columns=[1, 2, 3, 4, 5],
        )
        made = program.step("elementwise", a=program.input, b=made, op=op, activation=activations.find(None))
        torch.testing.assert_close(program.build(made)(x), expected, equal_nan=True)
    for over, dims in ((1, (1,)), (0, (2, 3))):
        program = Program((4, 3, 5))
        made = program.build(program.step("softmax", x=program.input, over_channels=over))(x)
        flat = x if over else x.flatten(2)
        torch.testing.assert_close(made, flat.softmax(dims[0] if over else 2).view(x.shape), equal_nan=True)


def refused(**fields: object) -> None:
    name = str(fields.pop("step"))
    program = Program((4, 3, 5))
    program.build(program.step(name, x=program.input, **fields))


def test_descriptions_that_do_not_fit_are_refused() -> None:
    fill = torch.zeros(1)
    with pytest.raises(ValueError, match="gather has channels that x does not have"):
        refused(step="gather", fill=fill, channels=[5], rows=[1], columns=[1])
    with pytest.raises(ValueError, match="gather has rows"):
        refused(step="gather", fill=fill, channels=[1], rows=[4], columns=[1])
    with pytest.raises(ValueError, match="gather has columns"):
        refused(step="gather", fill=fill, channels=[1], rows=[1], columns=[6])
    with pytest.raises(ValueError, match="size below 1"):
        refused(step="gather", fill=fill, channels=[], rows=[1], columns=[1])
    with pytest.raises(ValueError, match="reorder has not as many"):
        refused(step="reorder", channels=1, height=1, width=2, elements=[0])
    with pytest.raises(ValueError, match="reorder has elements that x does not have"):
        refused(step="reorder", channels=1, height=1, width=1, elements=[60])
    with pytest.raises(ValueError, match="interpolate starts where x ends"):
        refused(step="interpolate", down=fill, right=fill, rows=[3], columns=[0])
    with pytest.raises(ValueError, match="norm of other groups"):
        refused(step="norm", groups=3, eps=fill, scale=None, shift=None)
    with pytest.raises(ValueError, match="shift reaches beyond the floats"):
        refused(step="norm", groups=1, eps=torch.zeros(4), scale=None, shift=fill)
    program = Program((4, 3, 5))
    small = program.step("constant", channels=2, height=1, width=1, content=torch.zeros(2))
    made = program.step("elementwise", a=program.input, b=small, op=0, activation=activations.find(None))
    with pytest.raises(ValueError, match="elementwise of two shapes"):
        program.build(made)
