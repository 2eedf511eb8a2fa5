"""The Triton convolution under the interpreter: values, gradients, isolation, allocations, caches."""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from conv_cases import CORNERS, Case, _pairs, activate, assert_within, check_forward, check_gradients, dense
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsp_kernels import GroupLayout, backends, permuted_grouped_conv2d
from dsp_kernels.conv import conv2d_from_plan, op, prepared, reference, tiles
from dsp_kernels.conv import triton as room
from dsprune import gpu, pack
from dsprune.nn import PermutedGroupedConv2d

DTYPES = [torch.float32, torch.float16]
# Few, large programs: each operation of the interpreter costs the same whatever its size.
LAUNCHES = {
    "one tile": room.Launch(128, 32, 64, 4, 2, 1),
    "many tiles": room.Launch(32, 16, 64, 4, 2, 1),
    "split": room.Launch(64, 16, 32, 4, 2, 3),
}
LAYOUT = GroupLayout(5, 6, [([4, 0, 2], [1, 4]), (range(5), [0]), ([3], []), ([1, 4], [5])])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    room.forget()
    yield
    room.forget()


@st.composite
def small_cases(draw: st.DrawFn) -> Case:
    """As ``conv_cases.cases`` draws them, but of few pixels."""
    kernel = draw(st.one_of(st.sampled_from([(1, 1), (1, 1), (3, 3)]), _pairs([1, 2, 3])))
    dilation = draw(_pairs([1, 1, 1, 2]))
    padding = draw(_pairs([0, 1, 1, 2]))
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    least = [max(1, e - 2 * p) for e, p in zip(extent, padding, strict=True)]
    return Case(
        seed=draw(st.integers(0, 2**31)),
        in_channels=draw(st.one_of(st.integers(1, 20), st.sampled_from([8, 16, 24, 32]))),
        out_channels=draw(st.one_of(st.integers(1, 20), st.sampled_from([8, 16, 24, 32]))),
        n_groups=draw(st.integers(1, 8)),
        batch=draw(st.sampled_from([1, 1, 2])),
        size=(draw(st.integers(least[0], least[0] + 2)), draw(st.integers(least[1], least[1] + 3))),
        kernel=kernel,
        stride=draw(_pairs([1, 1, 2, 3])),
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "relu", "relu6"])),
        channels_last=draw(st.booleans()),
    )


# ---- values ------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(small_cases(), st.sampled_from(sorted(LAUNCHES)), st.sampled_from(DTYPES))
def test_forward(case: Case, launch: str, dtype: torch.dtype) -> None:
    with room.launching(LAUNCHES[launch]):
        out = check_forward(case, dtype, "triton")
    x = case.tensors(dtype)[0]
    assert out.stride() == dense(x.float(), case.tensors(torch.float32)[1], case).stride()


@settings(max_examples=8)
@given(small_cases(), st.sampled_from(sorted(LAUNCHES)), st.sampled_from(DTYPES))
def test_gradients(case: Case, launch: str, dtype: torch.dtype) -> None:
    with room.launching(LAUNCHES[launch]):
        check_gradients(case, dtype, "triton")


SHAPES = ["padding wider than the image", "stride beyond the kernel", "7x7 stem", "dilated"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_corner(name: str, dtype: torch.dtype) -> None:
    """With the table's own launches, but for the pixels of a tile."""
    case = CORNERS[name]
    with room.launching(room.Launch(512, 32, 64, 4, 2, 1)):
        check_forward(case, dtype, "triton")
        check_gradients(dataclasses.replace(case, batch=1), dtype, "triton")


def test_the_tables_own_launches() -> None:
    case = Case(1, 24, 40, 4, 1, (5, 6), (3, 3), (1, 1), (1, 1), (1, 1), activation="relu", residual=True)
    for dtype in DTYPES:
        check_forward(case, dtype, "triton")
        check_gradients(case, dtype, "triton")


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_epilogue(activation: str | None, bias: bool, residual: bool) -> None:
    case = Case(
        3, 16, 12, 3, 1, (4, 5), (1, 1), (1, 1), (0, 0), (1, 1),
        bias=bias, residual=residual, activation=activation,
    )  # fmt: skip
    for launch in ("one tile", "split"):
        with room.launching(LAUNCHES[launch]):
            check_forward(case, torch.float16, "triton")


# In single precision a vector is 4 channels at most, so that fewer sizes differ.
SIZES = [(torch.float16, n) for n in (1, 2, 3, 7, 8, 9, 12, 14, 16)] + [
    (torch.float32, n) for n in (3, 7, 12, 14)
]


@pytest.mark.parametrize(("dtype", "channels"), SIZES)
def test_every_alignment(channels: int, dtype: torch.dtype) -> None:
    """Vectors of 8, 4, 2 and 1 channels, and fewer channels than a chunk, on both sides."""
    case = Case(channels, channels, 17 - channels, 3, 1, (4, 4), (1, 2), (1, 1), (0, 1), (1, 1))
    with room.launching(LAUNCHES["one tile"]):
        check_forward(dataclasses.replace(case, channels_last=True), dtype, "triton")
        check_gradients(dataclasses.replace(case, channels_last=True), dtype, "triton")


def test_bfloat16() -> None:
    case = Case(4, 16, 12, 3, 1, (4, 5), (3, 3), (1, 1), (1, 1), (1, 1), activation="relu", residual=True)
    with room.launching(LAUNCHES["one tile"]):
        check_forward(case, torch.bfloat16, "triton")
        check_gradients(case, torch.bfloat16, "triton")


def test_a_dead_layout_gives_bias_and_residual() -> None:
    layout = GroupLayout(3, 4, [([1], [])])
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    bias, residual = torch.tensor([-1.0, 0.0, 2.0, 9.0]), torch.randn(2, 4, 3, 3)
    weight = torch.empty(0, requires_grad=True)
    out = permuted_grouped_conv2d(
        x, weight, layout, bias, kernel_size=3, residual=residual, activation="relu6", backend="triton"
    )
    assert out.equal((bias[:, None, None] + residual).clamp(0, 6))
    of_x, of_weight = torch.autograd.grad(out.sum(), (x, weight))
    assert of_x.equal(torch.zeros_like(x)) and of_weight.shape == (0,)


@pytest.mark.parametrize("backward", [False, True])
def test_batch_zero(backward: bool) -> None:
    x = torch.randn(0, 5, 4, 4, requires_grad=backward)
    weight = torch.randn(LAYOUT.weight_numel(1), requires_grad=backward)
    out = permuted_grouped_conv2d(x, weight, LAYOUT, kernel_size=1, backend="triton")
    assert out.shape == (0, 6, 4, 4)
    if backward:
        of_x, of_weight = torch.autograd.grad(out.sum(), (x, weight))
        assert of_x.shape == x.shape and of_weight.equal(torch.zeros_like(weight))


# ---- NaN and infinity --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:invalid value encountered in (matmul|add):RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("launch", sorted(LAUNCHES))
def test_an_unread_channel_reaches_nothing(launch: str, bad: float) -> None:
    """Holes of chunks, filling of steps, neighbours of a slice: none may leak, forward or backward."""
    layout = GroupLayout(20, 9, [([0, 2, 3, 9], [0, 4]), (range(8, 16), [1, 2, 3]), ([19], [5, 6])])
    weight = torch.randn(layout.weight_numel((3, 1)))
    geometry: dict[str, Any] = {"kernel_size": (3, 1), "padding": (1, 0)}
    x = torch.randn(1, 20, 3, 4).contiguous(memory_format=torch.channels_last)

    def run(x: Tensor) -> Tensor:
        return permuted_grouped_conv2d(x, weight, layout, backend="triton", **geometry)

    with room.launching(LAUNCHES[launch]):
        clean = run(x)
        readers = layout.mask()
        for channel in (1, 2, 8, 9, 17, 19):
            spoiled = x.clone(memory_format=torch.preserve_format)
            spoiled[:, channel] = bad
            out = run(spoiled)
            reads = readers[:, channel]
            assert out[:, ~reads].equal(clean[:, ~reads])
            assert not out[:, reads].isfinite().any()

        grad = torch.randn(1, 9, 3, 4).contiguous(memory_format=torch.channels_last)
        shape = ((3, 1), (1, 1), (1, 0), (1, 1))
        clean_x = room.grad_input(grad, weight, layout.plan(), x.shape, *shape)
        clean_w = layout.unpack(room.grad_weight(grad, x, layout.plan(), weight.numel(), *shape), (3, 1))
        for f in (0, 2, 7):
            spoiled = grad.clone(memory_format=torch.preserve_format)
            spoiled[:, f] = bad
            read = readers[f]
            of_x = room.grad_input(spoiled, weight, layout.plan(), x.shape, *shape)
            assert of_x[:, ~read].equal(clean_x[:, ~read]) and not of_x[:, read].isfinite().any()
            of_w = layout.unpack(room.grad_weight(spoiled, x, layout.plan(), weight.numel(), *shape), (3, 1))
            others = torch.arange(9) != f
            assert of_w[others].equal(clean_w[others])


@pytest.mark.filterwarnings("ignore:invalid value encountered in (matmul|add):RuntimeWarning")
@pytest.mark.parametrize("stride", [1, 2])
def test_infinity_beside_the_padding_is_no_nan(stride: int) -> None:
    """Taps outside of the image add nothing, whatever lies inside: the same NaN and infinities as the
    definition, whose zeros meet an infinity in the weight's gradient alone.
    """
    case = Case(21, 12, 10, 3, 1, (4, 5), (3, 3), (stride, stride), (1, 1), (1, 1), channels_last=True)
    layout = case.layout
    x, dense_weight, _, _ = case.tensors(torch.float32)
    weight = layout.pack(dense_weight)
    grad = torch.randn(1, 10, *case.out_size).contiguous(memory_format=torch.channels_last)
    x[0, 3, 0, 0] = x[0, 7, 3, 2] = float("inf")
    x[0, 8, 1, 4] = float("-inf")
    grad[0, 2, 0, 0] = grad[0, 5, -1, -1] = float("inf")
    shape = (case.kernel, case.stride, case.padding, case.dilation)

    def results(backend: Any) -> tuple[Tensor, ...]:
        return (
            backend.forward(x, weight, layout.plan(), None, None, 10, *shape, "none"),
            backend.grad_input(grad, weight, layout.plan(), x.shape, *shape),
            backend.grad_weight(grad, x, layout.plan(), weight.numel(), *shape),
        )

    exact = results(reference)
    assert exact[0].isinf().any() and exact[0].isfinite().any() and exact[1].isinf().any()
    for launch in LAUNCHES.values():
        with room.launching(launch):
            for ours, theirs in zip(results(room), exact, strict=True):
                for kind in (Tensor.isnan, Tensor.isposinf, Tensor.isneginf):
                    assert kind(ours).equal(kind(theirs))


def test_activations_let_nan_through() -> None:
    layout = GroupLayout(8, 8, [(range(8), range(8))])
    x = torch.full((1, 8, 1, 1), float("nan"))
    for activation in (None, "relu", "relu6"):
        out = permuted_grouped_conv2d(
            x, torch.ones(64), layout, kernel_size=1, activation=activation, backend="triton"
        )
        assert out.isnan().all()


# ---- memory ------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Every tensor that an operator makes, but for views: (operator, shape)."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.dsp_kernels.permuted_grouped_conv2d.default:
            with self:  # what the operator makes inside is not seen otherwise
                return op._forward(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in given:
                self.made.append((func.overloadpacket.__name__, tuple(value.shape)))
        return out


class Launches:
    """In place of the kernels' module: notes what would be launched, and does nothing."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def at(grid: tuple[int, ...]) -> Any:
            assert all(0 < size < 2**31 for size in grid)
            return lambda *args, **kwargs: self.names.append(name)

        return type("Kernel", (), {"__getitem__": lambda self, grid: at(grid)})()


@pytest.mark.parametrize("split", [1, 2])
def test_a_forward_pass_allocates_its_output_and_named_workspaces(
    split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches()
    monkeypatch.setattr(room, "_kernels", lambda: launches)
    layout = GroupLayout(16, 24, [(range(0, 12), range(10)), (range(5, 16), range(10, 20))])
    weight = torch.randn(layout.weight_numel(3))
    x = torch.randn(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(2, 24, 5, 5).contiguous(memory_format=torch.channels_last)
    bias = torch.ones(24)
    launch = room.Launch(64, 16, 32, 4, 2, split)
    tables = tiles.forward_tiles(layout, (3, 3), (1, 1), (1, 1), block_n=16, block_k=32, align=4)
    out = ("empty", (2, 24, 5, 5))
    tiled = ("empty", (tables.weight_index.numel(),))
    sums = [("empty", (split * tables.n_items * 64 * 16,))] if split > 1 else []
    kernels = ["conv_kernel"] if split == 1 else ["conv_kernel", "conv_reduce_kernel"]

    def run(x: Tensor) -> list[tuple[str, tuple[int, ...]]]:
        launches.names.clear()
        with Allocations() as seen, room.launching(launch):
            room.forward(x, weight, layout.plan(), bias, residual, 24, (3, 3), (1, 1), (1, 1), (1, 1), "relu")
        return seen.made

    first = run(x)  # the plan is read and its tables are made
    assert first[0] == out and first[-1 - len(sums)] == tiled
    assert not any(shape in (tuple(x.shape), (2, 16, 7, 7)) for _, shape in first)
    assert launches.names == ["prepare_weight_kernel", *kernels]
    assert run(x) == [out, *sums]  # the weight's tiles are kept
    assert launches.names == kernels
    weight.requires_grad_()  # in training they are made each time
    assert run(x) == [out, tiled, *sums]
    assert launches.names == ["prepare_weight_kernel", *kernels]
    weight.requires_grad_(False)  # and none are kept
    assert run(x) == [out, tiled, *sums] and run(x) == [out, *sums]
    sliced = torch.randn(2, 32, 5, 5).contiguous(memory_format=torch.channels_last)[:, 8:24]
    assert run(sliced) == [out, *sums]
    copied = run(x.contiguous())
    assert copied == [out, ("clone", tuple(x.shape)), *sums]


def test_the_gradients_allocate_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    monkeypatch.setattr(room, "_kernels", lambda: launches)
    layout = GroupLayout(16, 24, [(range(0, 12), range(10)), (range(5, 16), range(10, 20))])
    weight = torch.randn(layout.weight_numel(3), requires_grad=True)
    x = torch.randn(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 24, 3, 3).contiguous(memory_format=torch.channels_last)
    shape = ((3, 3), (2, 2), (1, 1), (1, 1))
    for _ in range(2):
        with Allocations() as of_x:
            room.grad_input(grad, weight, layout.plan(), x.shape, *shape)
        with Allocations() as of_w:
            room.grad_weight(grad, x, layout.plan(), weight.numel(), *shape)
    names = [name for name, _ in of_x.made]
    assert names == ["empty", "empty"] and of_x.made[0][1] == tuple(x.shape)
    assert [name for name, _ in of_w.made] == ["new_empty", "empty"]
    assert launches.names[-4:] == [
        "prepare_weight_kernel",
        "conv_kernel",
        "grad_weight_kernel",
        "grad_weight_reduce_kernel",
    ]


def test_a_packed_network_allocates_what_its_layers_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole packed network in inference, step by step: each packed layer takes its output, and the work
    space of a split sum where there is one. No gathered, padded or reordered activation is ever there.
    """
    torch.manual_seed(0)
    model = nets.structured_zeros(nets.random_norms(nets.Residual())).eval()
    packed = pack(model, torch.randn(2, 3, 12, 12), backend="triton").eval()
    network = gpu.pad_channels(packed.network)
    images = torch.randn(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    steps = gpu.trace_steps(network, images.shape, torch.float32)
    monkeypatch.setattr(room, "_kernels", Launches)
    found: list[tuple[str, tuple[int, ...]]] = []
    with torch.no_grad():
        network(images)
        with Allocations() as seen:
            network(images)
        found = seen.made
    convs = [step.conv for step in steps if step.conv is not None]
    assert len(convs) == 6 and any(len(conv.layout.groups) > 1 for conv in convs)
    for conv in convs:
        x = torch.empty(conv.batch, conv.layout.in_channels, *conv.size)
        launch, _, processors = room._launch("conv", x, conv.layout, conv.kernel, conv.pixels)
        assert (launch.split, processors) == (0, 1), "one multiprocessor: no sum is split"
        assert found.pop(0) == ("empty", (conv.batch, conv.layout.out_channels, *conv.out_size))
    assert [name for name, _ in found] == ["mean", "addmm"], "what is behind the convolutions"


def test_channels_that_are_neighbours_are_read_where_they_are() -> None:
    x = torch.randn(2, 5, 5, 4)
    residual = torch.randn(2, 6, 5, 4)
    weight = torch.randn(LAYOUT.weight_numel(1))

    def run(x: Tensor, residual: Tensor) -> Tensor:
        return permuted_grouped_conv2d(x, weight, LAYOUT, residual=residual, kernel_size=1, backend="triton")

    expected = run(x, residual)
    wide = torch.full((3, 6, 6, 16), float("nan"))[:2, :5, 1:5, 3:8].permute(0, 3, 1, 2)
    wide.copy_(x)
    assert run(wide, residual).equal(expected)
    more = torch.full((2, 12, 10, 8), float("nan"))[:, ::2, ::2, ::2]
    more.copy_(residual)
    assert run(wide, more).equal(expected)
    assert run(x, more.contiguous(memory_format=torch.channels_last)).equal(expected)
    flat = torch.randn(1, 5, 1, 1).expand(2, 5, 5, 4)
    assert run(flat, residual).equal(run(flat.contiguous(), residual))


def test_same_bits_each_time() -> None:
    case = Case(5, 20, 18, 2, 1, (3, 5), (2, 2), (2, 1), (1, 1), (1, 1))
    with room.launching(LAUNCHES["split"]):
        outs = [
            (check_forward(case, torch.float16, "triton"), *check_gradients(case, torch.float16, "triton"))
            for _ in range(2)
        ]
    assert all(a.equal(b) for a, b in zip(*outs, strict=True))


def test_calls_from_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's part: the interpreter itself runs one kernel at a time."""
    monkeypatch.setattr(room, "_kernels", Launches)
    monkeypatch.setattr(room, "_tables", room.Kept(2))
    x, weight = torch.randn(1, 5, 9, 9), torch.randn(LAYOUT.weight_numel(1))
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                permuted_grouped_conv2d(
                    x, weight, LAYOUT, kernel_size=1, padding=rng.randrange(4), backend="triton"
                )
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failed == [] and len(room._tables) <= 2


# ---- caches ------------------------------------------------------------------------------------------------


def test_weights_written_in_place_are_seen() -> None:
    x = torch.randn(1, 5, 2, 2)
    weight = torch.randn(LAYOUT.weight_numel(1))
    for _ in range(3):
        out = permuted_grouped_conv2d(x, weight, LAYOUT, kernel_size=1, backend="triton")
        exact = permuted_grouped_conv2d(x, weight, LAYOUT, kernel_size=1, backend="reference")
        torch.testing.assert_close(out, exact)
        weight.mul_(-2.0)
    trained = weight.clone().requires_grad_()
    for _ in range(2):
        out = permuted_grouped_conv2d(x, trained, LAYOUT, kernel_size=1, backend="triton")
        exact = permuted_grouped_conv2d(x, trained, LAYOUT, kernel_size=1, backend="reference")
        torch.testing.assert_close(out, exact)
        trained.data.mul_(-2.0)  # past the version counter
    with torch.inference_mode():
        held = weight.clone()
        for _ in range(2):
            out = permuted_grouped_conv2d(x, held, LAYOUT, kernel_size=1, backend="triton")
            exact = permuted_grouped_conv2d(x, held, LAYOUT, kernel_size=1, backend="reference")
            torch.testing.assert_close(out, exact)
            held.mul_(-2.0)


def test_inference_lays_a_trainable_weight_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients a weight that could be trained is kept as well; training makes it anew each time, and
    drops what was kept, as an optimizer may write past the version counter.
    """
    launches = Launches()
    monkeypatch.setattr(room, "_kernels", lambda: launches)
    layer = PermutedGroupedConv2d(LAYOUT, 3, padding=1, backend="triton").eval()
    x = torch.randn(1, 5, 4, 4)

    def laid_out(context: AbstractContextManager[Any]) -> bool:
        launches.names.clear()
        with context:
            layer(x)
        return "prepare_weight_kernel" in launches.names

    assert layer.weight.requires_grad
    assert [laid_out(torch.no_grad()) for _ in range(3)] == [True, False, False]
    assert [laid_out(torch.inference_mode()) for _ in range(2)] == [False, False]
    with torch.no_grad():
        layer.weight.mul_(2.0)
    assert [laid_out(torch.no_grad()) for _ in range(2)] == [True, False]
    assert [laid_out(nullcontext()) for _ in range(2)] == [True, True] and len(prepared._weights) == 0
    layer.weight.data.mul_(2.0)
    assert [laid_out(torch.no_grad()) for _ in range(2)] == [True, False]
    # Two sizes of tile side by side, and each version's own.
    with room.launching(LAUNCHES["many tiles"]):
        assert [laid_out(torch.no_grad()) for _ in range(2)] == [True, False]
    assert not laid_out(torch.no_grad()) and len(prepared._weights) == 1


def test_what_is_kept_of_a_weight_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each padding has a table of its own: of a weight's laid out copies the last few stay."""
    launches = Launches()
    monkeypatch.setattr(room, "_kernels", lambda: launches)
    x, weight = torch.randn(1, 5, 4, 4), torch.randn(LAYOUT.weight_numel(1))

    def run(padding: int) -> list[str]:
        launches.names.clear()
        permuted_grouped_conv2d(x, weight, LAYOUT, kernel_size=1, padding=padding, backend="triton")
        return launches.names

    room.forget()
    for padding in range(prepared.FORMS + 2):
        assert run(padding)[0] == "prepare_weight_kernel" and run(padding)[0] == "conv_kernel"
    (kept,) = prepared._weights._values.values()
    assert len(kept) == prepared.FORMS
    run(0)
    with prepared.recording() as held:
        run(0)
    (kept,) = prepared._weights._values.values()
    table = list(room._tables._values.values())[-1]
    assert {id(tensor) for tensor in held} == {
        id(kept[-1].laid_out),
        *(id(tensor) for tensor in table.tensors.values()),
    }


def test_memory_that_is_used_again_is_not_mistaken_for_what_it_held() -> None:
    """Plans and weights of one size, one after the other in the same memory."""
    x = torch.randn(1, 4, 2, 2)
    rng = random.Random(0)
    for _ in range(8):
        channels = rng.sample(range(4), 2)
        layout = GroupLayout(4, 2, [(channels, [0, 1])])
        plan = layout.plan().clone()
        weight = torch.randn(4)
        out = conv2d_from_plan(x, weight, plan, out_channels=2, kernel_size=1, backend="triton")
        torch.testing.assert_close(
            out, permuted_grouped_conv2d(x, weight, layout, kernel_size=1, backend="reference")
        )
        del layout, plan, weight
        gc.collect()
    assert len(prepared._layouts) <= 2 and len(prepared._weights) <= 2


def test_tables_are_dropped_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_tables", room.Kept(3))
    x, weight = torch.randn(1, 5, 9, 9), torch.randn(LAYOUT.weight_numel(1))
    for padding in range(4):
        permuted_grouped_conv2d(x, weight, LAYOUT, kernel_size=1, padding=padding, backend="triton")
        assert len(room._tables) <= 3


# ---- arguments ---------------------------------------------------------------------------------------------

SHAPE = ((1, 1), (1, 1), (0, 0), (1, 1))


def test_bad_input_is_refused() -> None:
    plan, x, weight = LAYOUT.plan(), torch.randn(1, 5, 2, 2), torch.randn(LAYOUT.weight_numel(1))
    bias, residual = torch.randn(6), torch.randn(1, 6, 2, 2)

    def run(x: Any = x, weight: Any = weight, plan: Any = plan, bias: Any = bias, residual: Any = residual,
            filters: int = 6, shape: Any = SHAPE) -> Tensor:  # fmt: skip
        return room.forward(x, weight, plan, bias, residual, filters, *shape, "none")

    run()
    with pytest.raises(ValueError, match="x has 4 channels, the layout has in_channels=5"):
        run(x=x[:, :4])
    with pytest.raises(ValueError, match="the output has 7 channels"):
        run(filters=7)
    with pytest.raises(ValueError, match="weight must have 13 elements"):
        run(weight=weight[1:])
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(5,\)"):
        run(bias=bias[1:])
    with pytest.raises(ValueError, match="residual must have the output's shape"):
        run(residual=residual[..., :1])
    with pytest.raises(ValueError, match=r"takes torch.float16, .*, got torch.float64"):
        run(x=x.double())
    with pytest.raises(ValueError, match=r"weight must be torch.float32 on cpu .* got torch.float16"):
        run(weight=weight.half())
    with pytest.raises(ValueError, match="plan is not a plan"):
        run(plan=plan[1:].clone())
    with pytest.raises(ValueError, match=r"spans 40001 pixels; .*at most 32768"):
        narrow = torch.randn(1, 5, 1, 2)
        wide = torch.randn(LAYOUT.weight_numel((1, 2)))
        shape = ((1, 2), (1, 1), (0, 20000), (1, 40000))
        room.forward(narrow, wide, plan, None, None, 6, *shape, "none")
    with pytest.raises(ValueError, match="x has 4 channels"):
        room.grad_input(residual, weight, plan, (1, 4, 2, 2), *SHAPE)
    with pytest.raises(ValueError, match="grad must be"):
        room.grad_weight(residual.half(), x, plan, weight.numel(), *SHAPE)


def test_double_precision_is_refused_with_what_is_accepted() -> None:
    x = torch.randn(1, 5, 2, 2, dtype=torch.float64)
    weight = torch.randn(LAYOUT.weight_numel(1), dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"'triton' cannot run here: takes .*, not torch.float64; .*accepted"
    ):
        permuted_grouped_conv2d(x, weight, LAYOUT, kernel_size=1, backend="triton")


def test_the_rule_does_not_choose_interpreted_kernels() -> None:
    assert backends.available_backends()["triton"] is None
    assert backends.can_run("triton", "cpu", torch.float16) is None
    assert backends.choose(None, "cpu", torch.float16) == "reference"
    assert backends.choose("triton", "cpu", torch.float16) == "triton"


# ---- the operators' registration ---------------------------------------------------------------------------


def example() -> tuple[Tensor, ...]:
    """x, packed weight, bias, residual for :func:`call`."""
    g = torch.Generator().manual_seed(5)
    shapes = ((1, 5, 4, 4), (LAYOUT.weight_numel((3, 2)),), (6,), (1, 6, 2, 3))
    return tuple(torch.randn(s, generator=g).requires_grad_() for s in shapes)


def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, backend: str = "triton") -> Tensor:
    return permuted_grouped_conv2d(
        x, weight, LAYOUT, bias, residual=residual, activation="relu", kernel_size=(3, 2), stride=(2, 1),
        padding=(1, 0), dilation=(1, 1), backend=backend,
    )  # fmt: skip


def test_compiled_gradients_equal_eager_ones() -> None:
    arguments = example()

    def loss(*tensors: Tensor) -> Tensor:
        return call(*tensors).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(loss(*arguments), arguments)
    again = torch.autograd.grad(compiled(*arguments), arguments)
    assert all(a.equal(b) for a, b in zip(eager, again, strict=True))


def test_second_order() -> None:
    arguments = example()

    def second(backend: str) -> tuple[Tensor, ...]:
        out = call(*arguments, backend=backend)
        of_x, of_w = torch.autograd.grad(out.square().sum(), arguments[:2], create_graph=True)
        return torch.autograd.grad((of_x.square().sum() + of_w.square().sum()), arguments[:2])

    for ours, exact in zip(second("triton"), second("reference"), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-3)


def test_opcheck() -> None:
    x, weight, bias, residual = example()
    ops, plan, shape = torch.ops.dsp_kernels, LAYOUT.plan(), ((3, 2), (2, 1), (1, 0), (1, 1))
    calls = [
        (ops.permuted_grouped_conv2d.default, (x, weight, plan, bias, residual, 6, *shape, "relu", "triton")),
        (
            ops.permuted_grouped_conv2d_grad_input.default,
            (residual, weight, plan, [1, 5, 4, 4], *shape, "triton"),
        ),
        (
            ops.permuted_grouped_conv2d_grad_weight.default,
            (residual, x, plan, weight.numel(), *shape, "triton"),
        ),
    ]
    for operator, arguments in calls:
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_against_the_definition_on_a_network_s_shape() -> None:
    """One larger layer, four groups in Gray order, all three passes in half precision."""
    layout = GroupLayout(
        32, 32, [(range(0, 12), range(0, 8)), (range(6, 24), range(8, 16)),
                 (range(12, 32), range(16, 24)), ([*range(0, 4), *range(20, 32)], range(24, 32))],
    )  # fmt: skip
    x = torch.randn(1, 32, 8, 8).half().contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(layout.weight_numel(3)) / 10).half()
    out = permuted_grouped_conv2d(x, weight, layout, kernel_size=3, padding=1, backend="triton")
    full = layout.unpack(weight.double(), 3)
    exact = F.conv2d(x.double(), full, padding=1)
    assert_within(out, exact, F.conv2d(x.double().abs(), full.abs(), padding=1), 20 * 9)
    assert activate(out, "relu").equal(
        permuted_grouped_conv2d(
            x, weight, layout, kernel_size=3, padding=1, activation="relu", backend="triton"
        )
    )
    args = (layout.plan(), x.shape, (3, 3), (1, 1), (1, 1), (1, 1))
    of_x = room.grad_input(out, weight, *args)
    torch.testing.assert_close(of_x, reference.grad_input(out, weight, *args), rtol=2e-3, atol=2e-3)
