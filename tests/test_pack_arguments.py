"""Arguments of packed networks: tensors in any nest; flags and numbers other than the example's."""

from __future__ import annotations

import copy
import enum
from typing import Any, NamedTuple

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

import dsprune
from dsprune.inputs import Signature, form_of


class Body(nn.Module):
    """Two convolutions, the second with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(x)))


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nets.structured_zeros(kind()).eval()


def image(n: int = 2, h: int = 8, w: int = 8, c: int = 3) -> torch.Tensor:
    return torch.randn(n, c, h, w)


def check(model: nn.Module, packed: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The packed network gives what the dense one gives in float64."""
    exact = copy.deepcopy(model).double()
    wide = tree_map_only(
        torch.Tensor, lambda v: v.double() if v.is_floating_point() else v.clone(), (args, kwargs)
    )
    with torch.no_grad():
        given, expected = packed(*args, **kwargs), exact(*wide[0], **wide[1])
    given, expected = tree_leaves(given), tree_leaves(expected)
    assert len(given) == len(expected)
    for a, b in zip(given, expected, strict=True):
        if isinstance(b, torch.Tensor):
            assert a.shape == b.shape
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)
        else:
            assert type(a) is type(b) and a == b


class Mode(enum.Enum):
    PLAIN = 0
    TWICE = 1


class Flags(Body):
    """What is done depends on arguments of many types."""

    def forward(
        self,
        x: torch.Tensor,
        flag: Any = False,
        gain: torch.Tensor | float | None = None,
        *more: torch.Tensor,
        how: str = "plain",
        **rest: Any,
    ) -> torch.Tensor:
        y = self.body(x)
        if flag is True:
            y = y * 2
        elif type(flag) is int:
            y = y + flag
        elif type(flag) is float:
            y = y * (flag + 3)
        elif isinstance(flag, str):
            y = y - len(flag)
        elif flag is Mode.TWICE:
            y = y * 4
        elif isinstance(flag, (tuple, list)):
            y = F.interpolate(y, size=tuple(flag))
        y = y if gain is None else y * gain
        for other in more:
            y = y + other
        if how == "relu":
            y = F.relu(y)
        return y if "shift" not in rest else y + rest["shift"]


@pytest.mark.parametrize("train", [False, True])
def test_arguments_other_than_the_examples_are_obeyed(train: bool) -> None:
    model = made(Flags)
    x, gain, more = image(), torch.rand(2, 1, 8, 8), torch.randn(2, 8, 8, 8)
    packed = dsprune.pack(model, (x, 1), train=train).eval()
    for flag in (1, 0, True, False, 1.0, None, "abc", (4, 5), Mode.TWICE):
        check(model, packed, x, flag)
    for args, kwargs in (
        ((x,), {}),
        ((), {"x": x}),
        ((x,), {"flag": True}),
        ((x, 1, None), {}),
        ((x, 1, gain, more, more), {}),
        ((x, 1), {"how": "plain"}),
        ((x,), {"gain": gain, "how": "relu", "shift": 2.0}),
    ):
        check(model, packed, *args, **kwargs)
    check(model, packed, image(3, 11, 9), 1)
    if not train:
        with pytest.raises(TypeError, match=r"got .*\.ndarray"):
            packed(x, x.numpy())
        with pytest.raises(ValueError, match=r"x: the network does not take float32 .*, torch\.float16"):
            packed(x, torch.float16)  # the tracer's limit
        with pytest.raises(TypeError, match="x: given by position and by name"):
            packed(x, x=x)
        with pytest.raises(TypeError, match="x: the argument is missing"):
            packed(gain=gain)
        with pytest.raises(TypeError, match="expected a tensor among the arguments, got 5"):
            packed(5)


@pytest.mark.parametrize(
    ("example", "called"),
    [
        ((False,), (True,)),
        ((1,), (True,)),
        (((4, 4),), ([5, 5],)),
        ((True, torch.rand(2, 1, 8, 8)), (True, None)),
        ((True, torch.rand(2, 1, 8, 8)), (True, 2)),
        ((True, None, torch.rand(2, 8, 8, 8)), (True, None)),
    ],
)
def test_each_example_obeys_another(example: tuple[Any, ...], called: tuple[Any, ...]) -> None:
    model, x = made(Flags), image()
    packed = dsprune.pack(model, (x, *example))
    assert packed.fused
    for rest in (called, example):
        check(model, packed, x, *rest)


def test_other_sizes_with_another_flag_are_planned_once() -> None:
    model = made(Flags)
    packed = dsprune.pack(model, (image(), True))
    for n, h, w in ((1, 8, 8), (3, 9, 12)):
        check(model, packed, image(n, h, w), 3)
        check(model, packed, image(n, h, w), True)
    assert len(packed._variants) == 1
    packed.double()
    with torch.no_grad():
        x = image(1, 7, 7).double()
        torch.testing.assert_close(packed(x, 3), copy.deepcopy(model).double()(x, 3), rtol=1e-5, atol=1e-5)
    assert len(packed._variants) == 1


class Nest(Body):
    """Images in a dictionary in a list, with numbers among them; the results in a nest."""

    def forward(self, images: Any, scale: dict[str, Any] | None = None) -> dict[str, Any]:
        x, (y, factor) = images["x"], images["more"]
        z = self.body(x) * factor + self.body(y)
        if scale is not None:
            z = z * scale["gain"] + scale.get("shift", 0)
        return {"z": z, "both": [z.mean((2, 3)), (x, None)], "n": factor}


class Pair(NamedTuple):
    x: torch.Tensor
    more: Any


@pytest.mark.parametrize("train", [False, True])
def test_nests_of_tensors_at_other_sizes(train: bool) -> None:
    def images(n: int, h: int, w: int, factor: Any = 2) -> dict[str, Any]:
        return {"x": image(n, h, w), "more": [image(n, h, w), factor]}

    model = made(Nest)
    packed = dsprune.pack(model, (images(1, 8, 8),), train=train).eval()
    for n, h, w in ((1, 8, 8), (2, 8, 8), (3, 11, 6)):
        check(model, packed, images(n, h, w))
        check(model, packed, images=images(n, h, w))
    if not train:
        assert packed.fused and not packed._variants  # batch and image are free in a nest too
        assert packed.example_shapes == [{"x": (1, 3, 8, 8), "more": [(1, 3, 8, 8), 2]}]
    check(model, packed, images(2, 8, 8, 2.0))
    check(model, packed, images(2, 8, 8, torch.rand(2, 1, 1, 1)))
    check(model, packed, {"more": [image(2, 8, 8), 2], "x": image(2, 8, 8)})
    check(model, packed, images(2, 8, 8), {"gain": torch.rand(8, 1, 1), "shift": 1})
    check(model, packed, images(2, 8, 8), scale={"gain": 2.5, "shift": torch.rand(2, 1, 8, 8)})


class Listed(Body):
    """A list of images of sizes of their own, and a named tuple."""

    def forward(self, pair: Any) -> list[torch.Tensor]:
        return [self.body(pair.x), *(F.adaptive_avg_pool2d(self.body(v), 2) for v in pair.more)]


def test_lists_of_images() -> None:
    model = made(Listed)
    packed = dsprune.pack(model, (Pair(image(), [image(h=6), image(w=10)]),))
    for pair in (
        Pair(image(3, 9, 9), [image(3, 7, 5), image(3, 4, 4)]),
        Pair(image(), []),
        Pair(image(), (image(), image(), image(1, 5, 7))),
        Pair(image(1), [image(4), image(2)]),
    ):
        check(model, packed, pair)


class PerChannel(Body):
    """A vector of gains, whose size never changes."""

    def forward(self, x: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
        return self.body(x) * gains[:, None, None]


def test_the_batch_stays_free_beside_a_tensor_of_fixed_size() -> None:
    model = made(PerChannel)
    packed = dsprune.pack(model, (image(1), torch.rand(8)))
    for x in (image(1), image(3), image(2, 11, 7)):
        check(model, packed, x, torch.rand(8))
    assert not packed._variants


class Either(Body):
    """One image, in one of two places; and a factor of any rank."""

    def forward(
        self, x: torch.Tensor | None = None, *, y: torch.Tensor | None = None, by: Any = None
    ) -> torch.Tensor:
        image = y if x is None else x * 2
        assert image is not None
        out = self.body(image)
        return out if by is None else out * by


def test_the_image_by_another_name_and_factors_of_any_rank() -> None:
    model, x = made(Either), torch.randn(2, 3, 8, 8)
    packed, exact = dsprune.pack(model, x), copy.deepcopy(model).double()
    with torch.no_grad():
        for _ in range(2):  # the second call has a program, or a plan, already
            for given in (
                {"y": x},
                {"x": x},
                *({"x": x, "by": torch.rand(s)} for s in ((), (8, 1, 1), (8,))),
            ):
                wide = {name: value.double() for name, value in given.items()}
                torch.testing.assert_close(packed(**given).double(), exact(**wide), rtol=1e-4, atol=1e-5)


class ByDtype(Body):
    """Bytes are pixels from 0 to 255."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.uint8:
            x = x.to(self.a.weight.dtype) / 255
        return self.body(x)


@pytest.mark.parametrize("first", [torch.uint8, torch.float32])
def test_another_dtype_is_planned_again(first: torch.dtype) -> None:
    model = made(ByDtype)
    pixels = torch.randint(256, (2, 3, 8, 8))
    packed = dsprune.pack(model, pixels.to(first))
    check(model, packed, pixels.to(torch.uint8))
    check(model, packed, pixels.float() / 255)
    check(model, packed, pixels.to(torch.uint8)[:1, :, :5])


def test_an_example_that_does_not_fit_the_signature() -> None:
    with pytest.raises(
        ValueError, match=r"^example_input: the model does not take float32 \(2, 3, 8, 8\), 1"
    ):
        dsprune.pack(nets.Plain().eval(), (image(), 1))


def test_the_form_tells_types_and_values_apart() -> None:
    x = torch.zeros(1)
    values = [1, True, 1.0, 1j, "1", b"1", None, 0, False, 0.0, -0.0, (1,), [1], {"a": 1}, {"b": 1}, {1: 1}]
    values += [torch.float32, torch.device("cpu"), Mode.PLAIN, slice(1), range(1), x, x.int(), [], (), {}]
    forms = [form_of((x, value), {}, torch.float64)[0] for value in values]
    assert len(set(forms)) == len(forms)
    assert form_of((x, float("nan")), {}, None)[0] == form_of((x, float("nan")), {}, None)[0]
    assert form_of((x,), {}, torch.float32)[0] == form_of((x.double(),), {}, torch.float64)[0]


def test_bind_gives_one_form() -> None:
    def forward(a: Any, b: Any = 1, /, c: Any = None, *, d: Any = "x", **rest: Any) -> None: ...

    signature = Signature(forward)
    assert signature.bind((0,), {}) == signature.bind((0, 1, None), {"d": "x"}) == ((0,), {})
    assert signature.bind((0,), {"c": 2}) == signature.bind((0, 1, 2), {}) == ((0, 1, 2), {})
    assert signature.bind((0, True), {}) == ((0, True), {})  # no 1
    assert signature.bind((0,), {"b": 5, "e": 6, "d": 7}) == ((0,), {"d": 7, "b": 5, "e": 6})
    assert signature.arguments((0, 1, 2), {"d": 7, "b": 5}) == {
        "a": 0,
        "b": 1,
        "c": 2,
        "d": 7,
        "rest": {"b": 5},
    }
    with pytest.raises(TypeError, match="takes 3 positional arguments"):
        signature.bind((0, 1, 2, 3), {})
