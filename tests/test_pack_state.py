"""What forward touches: arguments, buffers, attributes, extra state, layers used twice, second outputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dsprune
from dsprune.graph import ExportError, trace
from dsprune.state import State, preserved


class Body(nn.Module):
    """Two convolutions, the second with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(x)))

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(x)


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nets.structured_zeros(nets.random_norms(kind())).eval()


def packed_of(model: nn.Module, *args: Any, train: bool = False) -> dsprune.PackedNetwork:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layers are replaced one by one", UserWarning)
        return dsprune.pack(model, args, train=train).eval()


def check(exact: nn.Module, packed: nn.Module, x: torch.Tensor) -> None:
    """Same outputs and same writing into the argument; ``exact`` is the dense network in float64."""
    given, wide = x.clone(), x.double()
    with torch.no_grad():
        outs = packed(given), exact(wide)
    for a, b in zip(*(out if isinstance(out, (tuple, list)) else [out] for out in outs), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given.double(), wide, rtol=1e-6, atol=1e-6)


# ---- arguments written in place ----


class InPlace(Body):
    """Normalises the image where it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.sub_(0.5).mul_(2))


class ReluInPlace(Body):
    """A ReLU of the image itself, as models with ``inplace=True`` have it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(F.relu(x, inplace=True)) + x[:, :1]


class IntoDictionary(Body):
    """Leaves its features in the dictionary that it was given."""

    def forward(self, d: dict[str, torch.Tensor]) -> torch.Tensor:
        d["features"] = self.body(d["image"])
        return d["features"].mean((2, 3))


class OutOfDictionary(Body):
    """Takes the image out of the dictionary that it was given, and appends to a list."""

    def forward(self, d: dict[str, Any]) -> torch.Tensor:
        y = self.body(d.pop("image"))
        d["more"].append(y)
        return y


@pytest.mark.parametrize("kind", [IntoDictionary, OutOfDictionary])
def test_containers_are_changed_as_by_the_dense_network(kind: type[nn.Module]) -> None:
    model, x = made(kind), torch.randn(2, 3, 8, 8)
    example: dict[str, Any] = {"image": x, "more": []}
    with pytest.warns(UserWarning, match="forward changes '0.0"):
        packed = dsprune.pack(model, (example,))
    assert set(example) == {"image", "more"} and example["more"] == []
    for size in (8, 12):
        ours: dict[str, Any] = {"image": torch.randn(1, 3, size, size), "more": []}
        theirs = {"image": ours["image"].double(), "more": []}
        with torch.no_grad():
            given, expected = packed(ours), copy.deepcopy(model).double()(theirs)
        torch.testing.assert_close(given.double(), expected, rtol=1e-4, atol=1e-5)
        assert ours.keys() == theirs.keys() and len(ours["more"]) == len(theirs["more"])
        if "features" in theirs:
            torch.testing.assert_close(ours["features"].double(), theirs["features"], rtol=1e-4, atol=1e-5)


class PartInPlace(Body):
    """Writes one channel of the image, after it was read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        x[:, 0] = 0
        return y + x.sum(1, keepdim=True)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", [InPlace, ReluInPlace, PartInPlace])
def test_the_example_is_left_alone_and_later_arguments_are_written(
    kind: type[nn.Module], train: bool
) -> None:
    model, x = made(kind), torch.randn(1, 3, 8, 8)
    before = x.clone()
    packed = packed_of(model, x, train=train)
    assert torch.equal(x, before)
    exact = copy.deepcopy(model).double()
    check(exact, packed, x)
    check(exact, packed, torch.randn(3, 3, 9, 7))
    dsprune.summary(packed, x)
    dsprune.prunable_convs(model, x)
    assert torch.equal(x, before)


# ---- state from one call to the next ----


class Anchors(Body):
    """Remembers a tensor by the image's shape."""

    shape: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.anchors = torch.zeros(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if self.shape != x.shape:
            self.anchors = torch.arange(y.shape[2] * y.shape[3]).to(y).view(1, 1, *y.shape[2:])
            self.shape = x.shape
        return y + self.anchors


class Cache(Body):
    """The same, in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.grids: dict[Any, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = int(x.shape[2]), int(x.shape[3])
        if key not in self.grids:
            self.grids[key] = torch.linspace(0, 1, key[1], dtype=x.dtype)
        return self.body(x) * self.grids[key]


class CountsInBuffer(Body):
    """A buffer that goes up with each call and is part of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.body(x) * self.calls


class CountsInAttribute(Body):
    """A plain number that goes up with each call."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return self.body(x) * self.calls


class Previous(Body):
    """Adds the last result, as a recurrent network does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x).mean((0, 2, 3)) + self.last
        self.last = y.detach()
        return y


class Log(Body):
    """A list that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append(len(self.log))
        return self.body(x) + len(self.log)


class Recurrent(Body):
    """The same in a plain attribute, a tensor from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x).mean((0, 2, 3))
        self.last = y + self.last.to(y) * 0.5
        return self.last


class RecurrentInDictionary(Body):
    """The same in a dictionary that has it already."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"last": torch.zeros(1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x).mean((0, 2, 3))
        self.kept["last"] = y + self.kept["last"].to(y)
        return y * self.kept["last"]


REMEMBERING = [
    Anchors, Cache, CountsInBuffer, CountsInAttribute, Previous, Log, Recurrent, RecurrentInDictionary,
]  # fmt: skip


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", REMEMBERING)
def test_what_a_network_remembers_is_not_frozen(kind: type[nn.Module], train: bool) -> None:
    """The packed network starts from the model's state, and then goes on as the dense one does."""
    model = made(kind)
    images = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 12, 9), torch.randn(2, 3, 8, 8)]
    with torch.no_grad():
        model(images[1])
    state = State(model)
    packed = packed_of(model, images[0], train=train)
    assert state.changed() is None
    exact = copy.deepcopy(model).double()
    if isinstance(exact, Anchors):
        exact.anchors = exact.anchors.double()
    for x in images:
        check(exact, packed, x)
    assert state.changed() is None


@pytest.mark.parametrize("kind", REMEMBERING)
def test_what_keeps_a_network_from_a_graph_is_said(kind: type[nn.Module]) -> None:
    model, x = made(kind), torch.randn(2, 3, 8, 8)
    with pytest.warns(
        UserWarning, match="one by one, nothing is fused or dropped: .*(forward changes|export)"
    ):
        packed = dsprune.pack(model, x)
    assert not packed.fused


class Tables(Body):
    """Tensors in plain attributes that are only read."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.more = torch.rand(8, 1, 1), {"shift": (torch.ones(1),)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return y * self.scale.to(y) + self.more["shift"][0].to(y)


def test_tensors_that_are_only_read_are_no_state() -> None:
    model, x = made(Tables), torch.randn(2, 3, 8, 8)
    packed = dsprune.pack(model, x)
    assert packed.fused
    check(copy.deepcopy(model).double(), packed, x)


def test_a_failed_export_leaves_nothing_behind() -> None:
    model = made(Anchors)
    state = State(model)
    with pytest.raises(ExportError):
        trace(model, torch.randn(2, 3, 8, 8))
    assert state.changed() is None and type(model.anchors) is torch.Tensor and model.anchors.numel() == 0


def test_state_is_found_and_restored() -> None:
    class Part:
        def __init__(self) -> None:
            self.count, self.items = 0, {"a": [1]}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.BatchNorm2d(2)
            self.part, self.hidden = Part(), [nn.Conv2d(1, 1, 1)]
            self.register_buffer("nan", torch.tensor(float("nan")))

    model = Net()
    first = model.hidden[0]
    changes: list[tuple[str, Callable[[], Any]]] = [
        ("inner.running_mean", lambda: model.inner.running_mean.add_(1)),
        ("inner.num_batches_tracked", lambda: model.inner.num_batches_tracked.add_(1)),
        ("part.count", lambda: setattr(model.part, "count", 1)),
        ("part.items.a", lambda: model.part.items["a"].append(2)),
        ("part.items", lambda: model.part.items.update(b=1)),
        ("hidden", lambda: model.hidden.append(1)),
        ("hidden.0.padding", lambda: setattr(first, "padding", 3)),
        ("new", lambda: setattr(model, "new", torch.ones(1))),
        ("inner", lambda: setattr(model, "inner", nn.Identity())),
    ]
    start = State(model)
    for name, change in changes:
        with preserved(model) as state:
            assert state.changed() is None
            change()
            assert (state.changed() or "").startswith(name.rpartition(".")[0])
        assert start.changed() is None, name
    with preserved(model, parameters=True), torch.no_grad():
        first.weight.add_(1)
        first.bias.data = torch.ones(1)
    assert State(model, parameters=True).changed() is None and not torch.equal(first.bias, torch.ones(1))


# ---- extra state ----


class Extra(Body):
    """Extra state that is no tensor."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


class OnlyGets(Body):
    """Extra state that cannot be set."""

    def get_extra_state(self) -> Any:
        return 5


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("value", [{"epoch": 3}, 7, None, torch.ones(2), [object], "text"])
def test_extra_state_of_any_type(value: Any, train: bool) -> None:
    model = nets.structured_zeros(Extra(value)).eval()
    x = torch.randn(1, 3, 8, 8)
    packed = packed_of(model, x, train=train)
    check(copy.deepcopy(model).double(), packed, x)
    fresh = dsprune.unpack(packed, Extra())
    assert (
        fresh.value is value
        or torch.equal(torch.as_tensor(fresh.value == value), torch.tensor(True))
        or (isinstance(value, torch.Tensor) and torch.equal(fresh.value, value))
    )
    with pytest.raises(ValueError, match="it lacks \\['_extra_state'\\]"):
        dsprune.unpack(packed, Body())


def test_extra_state_in_a_file(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 8, 8)
    packed = packed_of(nets.structured_zeros(Extra({"epoch": 3, "names": ["a", None]})).eval(), x)
    dsprune.save(packed, tmp_path / "net")
    fresh = Extra()
    dsprune.load(tmp_path / "net", fresh)
    assert fresh.value == {"epoch": 3, "names": ["a", None]}
    for value in (object, (1, 2), {1: 2}, torch.ones(1)):
        with pytest.raises(TypeError, match="packed: _extra_state is a"):
            dsprune.save(packed_of(Extra(value).eval(), x, train=True), tmp_path / "net")


def test_extra_state_that_cannot_be_set() -> None:
    model, x = made(OnlyGets), torch.randn(1, 3, 8, 8)
    packed = packed_of(model, x)
    check(copy.deepcopy(model).double(), packed, x)
    check(copy.deepcopy(model).double(), dsprune.unpack(packed, OnlyGets()), x)


# ---- layers used twice ----


class NormTwice(nn.Module):
    """One BatchNorm after a pool in two branches that lose different channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.other = nn.Conv2d(3, 8, 1)
        self.a, self.b = nn.Conv2d(8, 6, 3), nn.Conv2d(8, 6, 3)
        with torch.no_grad():
            self.a.weight[:, :3] = 0
            self.b.weight[:, 4:] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = F.max_pool2d(self.stem(x), 2), F.max_pool2d(self.other(x), 2)
        return self.a(F.relu(self.norm(one))) + self.b(F.relu(self.norm(two)))


class NormReadToo(NormTwice):
    """The norm's weight is also a gain on another value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(F.relu(self.norm(F.max_pool2d(self.stem(x), 2))))
        return (
            y
            + self.norm.weight.sum()
            + self.b(F.max_pool2d(self.other(x), 2) * self.norm.bias[:, None, None])
        )


class ConvTwice(Body):
    """One convolution with a norm, a residual and an activation after its first call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.a(x))
        return self.b(F.relu6(self.norm(self.b(y)) + y))


class Aliases(Body):
    """One layer by two names of one parent, and in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.parts = self.b, [self.b]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts[0](F.relu(self.c(F.relu(self.a(x)))))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", [NormTwice, NormReadToo, ConvTwice, Aliases])
def test_layers_used_twice(kind: type[nn.Module], train: bool) -> None:
    model = made(kind)
    packed = packed_of(model, torch.randn(1, 3, 12, 12), train=train)
    assert packed.fused is not train
    exact = copy.deepcopy(model).double()
    for shape in ((1, 3, 12, 12), (3, 3, 16, 10)):
        check(exact, packed, torch.randn(shape))


def test_an_alias_stays_one_layer_in_training() -> None:
    model = made(Aliases)
    packed = packed_of(model, torch.randn(1, 3, 8, 8), train=True)
    net: Any = packed.network
    assert net.b is net.c is net.parts[0]
    assert len(list(net.parameters())) == len(list(model.parameters()))


# ---- outputs after the first ----


class Indices(Body):
    """Max pooling's indices, and nothing else of it."""

    def forward(self, x: torch.Tensor) -> Any:
        _, indices = F.max_pool2d(self.body(x), 2, return_indices=True)
        return indices


class Unpool(Body):
    """Values and indices meet again."""

    def forward(self, x: torch.Tensor) -> Any:
        values, indices = F.max_pool2d(F.relu(self.a(x)), 2, return_indices=True)
        return self.b(F.max_unpool2d(values, indices, 2, output_size=x.shape[2:]))


class AdaptiveIndices(Body):
    """The same for adaptive pooling, where a convolution reads the values of some channels."""

    def forward(self, x: torch.Tensor) -> Any:
        values, indices = F.adaptive_max_pool2d(F.relu(self.a(x)), 3, return_indices=True)
        return self.b(values), indices[:, 1:3]


class Split(Body):
    """The second part of a split alone, and all parts of another."""

    def forward(self, x: torch.Tensor) -> Any:
        y = self.a(x)
        one, two, three = torch.split(y, [3, 3, 2], 1)
        _, best = torch.topk(y.flatten(2).mean(-1), 2)
        return self.b(torch.cat([two, three, one], 1)), y.chunk(2, 1)[1], best


class Statistics(Body):
    """Norms that take their statistics from the batch and give them."""

    def forward(self, x: torch.Tensor) -> Any:
        y = self.a(x)
        out, mean, inverse = torch.native_batch_norm(y, None, None, None, None, True, 0.1, 1e-5)
        variance, average = torch.var_mean(y, (2, 3))
        return self.b(out), mean, inverse, variance[:, 1:], average


@pytest.mark.parametrize("kind", [Indices, Unpool, AdaptiveIndices, Split, Statistics])
def test_outputs_after_the_first(kind: type[nn.Module]) -> None:
    model = made(kind)
    with torch.no_grad():
        model.b.weight[:, 1:3] = 0  # by the convolution alone these could go
    packed = packed_of(model, torch.randn(1, 3, 12, 12))
    exact = copy.deepcopy(model).double()
    for shape in ((1, 3, 12, 12), (3, 3, 16, 10)):
        check(exact, packed, torch.randn(shape))


# ---- numbers that come from sizes ----


class Biased(nn.Module):
    """Dead filters with a bias: constants, until something that depends on the image's size meets them."""

    step: Callable[[torch.Tensor, int], torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.a.weight[2:5] = 0
            self.a.bias[2:5] = torch.tensor([0.5, -0.5, 0.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = type(self).step(self.a(x), x.shape[2])
        return F.conv2d(y, self.b.weight[:, : y.shape[1]], self.b.bias)


@pytest.mark.parametrize(
    "step",
    [
        lambda y, h: y * h,
        lambda y, h: y / h + h,
        lambda y, h: h - y,
        lambda y, h: y.clamp(max=h / 100),
        lambda y, h: y + torch.full_like(y, h),
        lambda y, h: y[:, : h // 2],
        lambda y, h: y.roll(h // 3, 1),
        lambda y, h: F.pad(y, (0, h // 4)),
        lambda y, h: y.flatten(1)[:, : 4 * 25].unflatten(1, (4, 5, 5)),
    ],
)
def test_numbers_computed_from_sizes_are_no_constants(step: Any) -> None:
    kind = type("Net", (Biased,), {"step": staticmethod(step)})
    torch.manual_seed(0)
    model = kind().eval()
    packed, exact = packed_of(model, torch.randn(1, 3, 12, 12)), copy.deepcopy(model).double()
    for shape in ((1, 3, 12, 12), (2, 3, 9, 9), (2, 3, 16, 6)):
        check(exact, packed, torch.randn(shape))


# ---- dtypes that change, norms whose vectors are computed, reductions over everything ----


class Constants(nn.Module):
    """Dead filters with a bias, something in between, and a convolution that could fold them."""

    step: Callable[[Any, torch.Tensor], torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.gain = nn.Parameter(torch.rand(8))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("var", torch.rand(8) + 0.5)
        with torch.no_grad():
            self.a.weight[2:5] = 0
            self.a.bias[2:5] = torch.tensor([0.7, 1.6, 0.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).relu()
        return type(self).step(self, y)


def inside(y: torch.Tensor) -> torch.Tensor:
    return y[:, :, 1:-1, 1:-1]


@pytest.mark.parametrize(
    "step",
    [
        lambda m, y: m.b(y.int().to(y.dtype)),
        lambda m, y: m.b(y.bool().to(y.dtype)),
        lambda m, y: m.b(y + y.long()),
        lambda m, y: m.b(F.batch_norm(y, m.mean, m.var, 1 + m.gain, m.gain * 2)),
        lambda m, y: m.b(F.batch_norm(F.batch_norm(y, m.mean, m.var), m.mean, m.var, 1 + m.gain)),
        lambda m, y: m.b(F.batch_norm(y, m.mean * 2, m.var + 1, m.gain)),
        lambda m, y: F.batch_norm(m.b(y), m.mean, m.var, 1 + m.gain, m.gain * 2),
        lambda m, y: F.batch_norm(m.b(y), m.mean, m.var + m.gain).relu(),
        lambda m, y: m.b(y * y.amax()),
        lambda m, y: m.b(y + y.amin(dim=(2, 3), keepdim=True)),
        lambda m, y: F.relu(m.b(y) + inside(y).double()),
        lambda m, y: F.relu(m.b(y) + (inside(y) > 0.1)),
        lambda m, y: F.relu(m.b(y) + torch.ones_like(inside(y), dtype=torch.float16)),
        lambda m, y: m.b(F.pad(y, (1, 1, 1, 1), value=float(y.shape[2]))),
    ],
)
def test_dtypes_computed_norms_and_reductions(step: Any) -> None:
    kind = type("Net", (Constants,), {"step": staticmethod(step)})
    torch.manual_seed(1)
    model, x = kind().eval(), torch.randn(2, 3, 9, 8)
    packed, exact = packed_of(model, x), copy.deepcopy(model).double()
    assert packed.fused
    for image in (x, torch.randn(1, 3, 7, 10)):
        check(exact, packed, image)
