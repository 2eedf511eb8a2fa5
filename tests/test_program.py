"""Programs against torch: every step, every layout of memory, threads, batches and refusals."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_kernels import GroupLayout, activations, available_backends

pytestmark = pytest.mark.skipif(
    available_backends()["native"] is not None, reason=f"native: {available_backends()['native']}"
)

from dsp_kernels.program import Program, Value  # noqa: E402


def random_layout(channels: int, filters: int, groups: int, seed: int = 0, dead: int = 0) -> GroupLayout:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(filters, generator=generator).tolist()[: filters - dead]
    parts = []
    for g in range(groups):
        members = order[g::groups]
        count = int(torch.randint(1, channels + 1, (1,), generator=generator))
        parts.append((torch.randperm(channels, generator=generator)[:count].tolist(), members))
    return GroupLayout(channels, filters, parts)


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert actual.shape == expected.shape
    scale = max(1.0, expected.abs().max().item())
    assert (actual.double() - expected.double()).abs().max().item() <= tolerance * scale


def one_step(shape: tuple[int, int, int], make: Callable[[Program, Value], Value], x: Tensor) -> Tensor:
    program = Program(shape)
    return program.build(make(program, program.input))(x)


SIZES = [(32, 32), (16, 16), (8, 8), (4, 4), (7, 7), (14, 14), (9, 24), (5, 33), (1, 1), (3, 56)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_matches_torch(size: tuple[int, int], kernel: int, stride: int) -> None:
    """Two in a row, so that the second reads a value in the program's own memory."""
    torch.manual_seed(kernel)
    first = random_layout(5, 13, 3, seed=1, dead=1)
    second = random_layout(13, 9, 2, seed=2, dead=2)
    w1, w2 = torch.randn(13, 5, kernel, kernel), torch.randn(9, 13, kernel, kernel)
    b1, b2 = torch.randn(13), torch.randn(9)
    program = Program((5, *size))
    pad = kernel // 2
    y = program.conv(
        program.input, first.pack(w1), first, b1, kernel_size=kernel, padding=pad, activation="relu"
    )
    y = program.conv(
        y, second.pack(w2), second, b2, kernel_size=kernel, stride=stride, padding=pad, activation="relu6"
    )
    program.build(y)
    x = torch.randn(3, 5, *size)
    m1 = first.unpack(first.pack(w1), kernel).double()
    m2 = second.unpack(second.pack(w2), kernel).double()
    middle = F.conv2d(x.double(), m1, b1.double(), padding=pad).relu()
    close(program(x), F.relu6(F.conv2d(middle, m2, b2.double(), stride=stride, padding=pad)))


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (7, 7), (12, 20)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_residual_dilation_and_even_groups(size: tuple[int, int], dilation: int) -> None:
    torch.manual_seed(0)
    w1, w2 = torch.randn(8, 4, 3, 3), torch.randn(8, 1, 3, 3)
    program = Program((8, *size))
    a = program.conv2d(program.input, w1, padding=dilation, dilation=dilation, groups=2, activation="relu")
    b = program.conv2d(a, w2, padding=1, groups=8, residual=program.input, activation="relu")
    c = program.conv2d(b, torch.randn(8, 8, 1, 1, generator=torch.Generator().manual_seed(3)), residual=a)
    program.build(c)
    x = torch.randn(2, 8, *size)
    ra = F.conv2d(x, w1, padding=dilation, dilation=dilation, groups=2).relu()
    rb = (F.conv2d(ra, w2, padding=1, groups=8) + x).relu()
    rc = F.conv2d(rb, torch.randn(8, 8, 1, 1, generator=torch.Generator().manual_seed(3))) + ra
    close(program(x), rc)


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (9, 16), (16, 20)])
@pytest.mark.parametrize(
    ("kernel", "padding", "dilation"), [(1, 0, 1), (3, 1, 1), (3, 0, 2), (5, 4, 1), (7, 3, 1)]
)
@pytest.mark.parametrize("residual", [False, True])
def test_two_convolutions_of_stride_2_read_one_result(
    size: tuple[int, int], kernel: int, padding: int, dilation: int, residual: bool
) -> None:
    """Where nobody else reads it, it is stored with even and odd columns apart."""
    torch.manual_seed(kernel)
    first = random_layout(6, 6, 2, seed=1, dead=2)
    second = random_layout(6, 9, 2, seed=2, dead=1)
    w1, w2, w3 = torch.randn(6, 6, 3, 3), torch.randn(9, 6, kernel, kernel), torch.randn(4, 6, 1, 1)
    b1, b2 = torch.randn(6), torch.randn(9)
    program = Program((6, *size))
    y = program.conv(
        program.input,
        first.pack(w1),
        first,
        b1,
        kernel_size=3,
        padding=1,
        residual=program.input if residual else None,
        activation="relu",
    )
    a = program.conv(
        y, second.pack(w2), second, b2, kernel_size=kernel, stride=2, padding=padding, dilation=dilation
    )
    b = program.conv2d(y, w3, stride=2)
    program.build(program.concat([program.adaptive_avg_pool(v, 3) for v in (a, b)]))
    x = torch.randn(3, 6, *size)
    m1 = first.unpack(first.pack(w1), 3).double()
    m2 = second.unpack(second.pack(w2), kernel).double()
    middle = F.conv2d(x.double(), m1, b1.double(), padding=1)
    middle = (middle + x.double() if residual else middle).relu()
    ra = F.conv2d(middle, m2, b2.double(), stride=2, padding=padding, dilation=dilation)
    rb = F.conv2d(middle, w3.double(), stride=2)
    close(program(x), torch.cat([F.adaptive_avg_pool2d(v, 3) for v in (ra, rb)], 1))


def test_images_meet_halfway_through_a_network() -> None:
    """Each image alone up to rows of 8 pixels, then two by two: what one leaves the other does not touch."""
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / (3 * shape[1] ** 0.5)

    weights = [
        weight(6, 3, 3, 3),
        weight(8, 6, 3, 3),
        weight(8, 6, 1, 1),
        weight(10, 8, 3, 3),
        weight(10, 8, 1, 1),
    ]
    weights += [weight(10, 10, 3, 3) for _ in range(3)]
    program = Program((3, 32, 32))
    y = program.conv2d(program.input, weights[0], padding=1, activation="relu")
    for first, second in ((1, 2), (3, 4)):
        a = program.conv2d(y, weights[first], stride=2, padding=1)
        y = program.conv2d(y, weights[second], stride=2, residual=a, activation="relu")
    early = y
    for w in weights[5:]:
        y = program.conv2d(y, w, padding=1, residual=y, activation="relu")
    program.build(program.flatten(program.adaptive_avg_pool(program.concat([early, y]), 2)))
    x = torch.randn(8, 3, 32, 32, generator=generator)
    z = F.conv2d(x.double(), weights[0].double(), padding=1).relu()
    for first, second in ((1, 2), (3, 4)):
        a = F.conv2d(z, weights[first].double(), stride=2, padding=1)
        z = (F.conv2d(z, weights[second].double(), stride=2) + a).relu()
    early_z = z
    for w in weights[5:]:
        z = (F.conv2d(z, w.double(), padding=1) + z).relu()
    expected = F.adaptive_avg_pool2d(torch.cat([early_z, z], 1), 2).flatten(1)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for batch in (8, 5, 2):
                close(program(x[:batch]), expected[:batch])
                assert torch.equal(
                    program(x[:batch]), torch.cat([program(image[None]) for image in x[:batch]])
                )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("height", [1, 4, 7, 8])
def test_images_two_by_two(height: int) -> None:
    """Rows of 8 pixels: two images share vectors, with the bits each has alone; NaN stays with its own."""
    generator = torch.Generator().manual_seed(height)
    layout = random_layout(7, 7, 2, seed=3, dead=1)
    program = Program((7, height, 8))
    y = program.conv2d(program.input, torch.randn(7, 7, 1, 1, generator=generator), activation="relu")
    weights = [torch.randn(7, 7, 3, 3, generator=generator) / 4 for _ in range(3)]
    for weight in weights:
        y = program.conv(
            y, layout.pack(weight), layout, kernel_size=3, padding=1, residual=y, activation="relu"
        )
    program.build(program.concat([y, program.max_pool(y, 3, 1, 1)]))
    x = torch.randn(9, 7, height, 8, generator=generator)
    alone = torch.cat([program(image[None]) for image in x])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for batch in (2, 3, 8, 9):
                assert torch.equal(program(x[:batch]), alone[:batch])
    finally:
        torch.set_num_threads(threads)
    generator.manual_seed(height)
    z = F.conv2d(x, torch.randn(7, 7, 1, 1, generator=generator)).relu().double()
    for weight in weights:
        z = (F.conv2d(z, layout.unpack(layout.pack(weight), 3).double(), padding=1) + z).relu()
    close(alone, torch.cat([z, F.max_pool2d(z, 3, 1, 1)], 1))
    x[4, 2, 0, 3] = float("nan")
    try:
        torch.set_num_threads(1)
        spoilt = program(x)
    finally:
        torch.set_num_threads(threads)
    others = [n for n in range(9) if n != 4]
    assert spoilt[4].isnan().any()
    assert torch.equal(spoilt[others], alone[others])


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("kernel,stride,padding", [(2, 2, 0), (3, 2, 1), (3, 1, 1), ((3, 2), (2, 1), (1, 0))])
def test_pooling_matches_torch(kernel: int, stride: int, padding: int, ceil_mode: bool) -> None:
    x = torch.randn(2, 3, 11, 16)
    x[0, 1, 3, 4] = float("nan")
    actual = one_step((3, 11, 16), lambda p, v: p.max_pool(v, kernel, stride, padding, 1, ceil_mode), x)
    expected = F.max_pool2d(x, kernel, stride, padding, 1, ceil_mode)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=0, atol=0)
    for include in (True, False):
        actual = one_step(
            (3, 11, 16), lambda p, v, i=include: p.avg_pool(v, kernel, stride, padding, ceil_mode, i), x
        )
        expected = F.avg_pool2d(x, kernel, stride, padding, ceil_mode, include)
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("out", [1, (3, 5), (11, 16), (13, 1)])
def test_adaptive_pooling_matches_torch(out: int | tuple[int, int]) -> None:
    x = torch.randn(2, 3, 11, 16)
    actual = one_step((3, 11, 16), lambda p, v: p.adaptive_avg_pool(v, out), x)
    torch.testing.assert_close(actual, F.adaptive_avg_pool2d(x, out))


def test_small_steps_match_torch() -> None:
    torch.manual_seed(0)
    program = Program((3, 8, 8))
    weight, scale, shift = torch.randn(5, 3, 3, 3), torch.randn(5), torch.randn(5)
    a = program.conv2d(program.input, weight, padding=1)
    b = program.affine(a, scale, shift, activation="relu")
    c = program.relu6(program.add(a, b, activation="relu"))
    d = program.concat([a, program.input, c, program.relu(a)])
    fc, bias = torch.randn(7, 18 * 64), torch.randn(7)
    e = program.linear(program.flatten(d), fc, bias, activation="relu")
    program.build(e)
    x = torch.randn(4, 3, 8, 8)
    ra = F.conv2d(x, weight, padding=1)
    rb = (ra * scale[:, None, None] + shift[:, None, None]).relu()
    rd = torch.cat([ra, x, F.relu6((ra + rb).relu()), ra.relu()], 1)
    close(program(x), F.linear(rd.flatten(1), fc, bias).relu())


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (7, 7)])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("before", [None, "relu", "relu6"])
@pytest.mark.parametrize("after", [None, "relu", "relu6"])
def test_sums_take_the_place_of_their_residuals(
    size: tuple[int, int], kernel: int, before: str | None, after: str | None
) -> None:
    """Dead filters with and without a bias; residuals that are read again, and others; one image and two."""
    generator = torch.Generator().manual_seed(kernel)
    layout = random_layout(6, 6, 2, seed=5, dead=2)
    act = {None: lambda v: v, "relu": torch.relu, "relu6": F.relu6}
    mask = layout.unpack(layout.pack(torch.ones(6, 6, kernel, kernel)), kernel)
    dead = mask.flatten(1).sum(1) == 0
    x = torch.randn(3, 6, *size, generator=generator)
    for bias in (None, torch.randn(6, generator=generator), torch.randn(6, generator=generator) * ~dead):
        for kept in (False, True):
            program = Program((6, *size))
            first = 4 * torch.randn(6, 6, 1, 1, generator=generator)
            a = program.conv2d(program.input, first, activation=before)
            weights = [torch.randn(6, 6, kernel, kernel, generator=generator) / 4 for _ in range(4)]
            y, reference = a, act[before](F.conv2d(x.double(), first.double()))
            start = reference
            for w1, w2 in (weights[:2], weights[2:]):
                h = program.conv(
                    y, layout.pack(w1), layout, kernel_size=kernel, padding=kernel // 2, activation="relu"
                )
                y = program.conv(
                    h,
                    layout.pack(w2),
                    layout,
                    bias,
                    kernel_size=kernel,
                    padding=kernel // 2,
                    residual=y,
                    activation=after,
                )
                inner = F.conv2d(reference, (w1 * mask).double(), padding=kernel // 2).relu()
                outer = F.conv2d(
                    inner, (w2 * mask).double(), None if bias is None else bias.double(), padding=kernel // 2
                )
                reference = act[after](outer + reference)
            if kept:
                y, reference = program.add(y, a), reference + start
            close(program.build(y)(x), reference)


@pytest.mark.parametrize("engine", ["", "planar", "lanes"])
@pytest.mark.parametrize("tail", ["map", "rows", "mean", "flat", "mixed"])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_step_on_either_engine(
    engine: str, tail: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of convolutions with groups of their own, which decide where channels are stored, and what stands
    behind them.
    """
    monkeypatch.setenv("DSP_CPU_ENGINE", engine)
    torch.manual_seed(0)
    x, bias = torch.randn(3, 3, 30, 23), torch.randn(40)
    layouts = [
        random_layout(3, 40, 1),
        random_layout(40, 40, 2, seed=1),
        random_layout(40, 40, 3, seed=2, dead=3),
    ]
    program = Program((3, 30, 23))
    v, y = program.input, x.double()
    for i, layout in enumerate(layouts):
        weight = torch.randn(40, layout.in_channels, 3, 3) * 0.1
        v = program.conv(
            v,
            layout.pack(weight),
            layout,
            bias,
            kernel_size=3,
            padding=1,
            stride=1 if i else 2,
            residual=v if i else None,
        )
        dense = weight.double() * layout.mask()[:, :, None, None]
        made = F.conv2d(y, dense, bias.double(), padding=1, stride=1 if i else 2)
        y = made + y if i else made
        if i == 0:
            v, y = program.relu(program.max_pool(v, 3, 1, 1)), F.relu(F.max_pool2d(y, 3, 1, 1))
    if tail != "map":
        v, y = program.avg_pool(v, 2, 2, 1, False, False), F.avg_pool2d(y, 2, 2, 1, False, False)
    if tail == "mixed":
        scale, shift = torch.rand(40), torch.randn(40)
        w = program.affine(v, scale, shift, activation="relu6")
        z = F.hardtanh(y * scale.double()[:, None, None] + shift.double()[:, None, None], 0.0, 6.0)
        v = program.concat([v, program.add(w, program.relu(v))])
        y = torch.cat([y, z + F.relu(y)], 1)
    if tail in ("flat", "mixed"):
        v, y = program.adaptive_avg_pool(v, (3, 2)), F.adaptive_avg_pool2d(y, (3, 2)).flatten(1)
        last = torch.randn(9, y.shape[1]) * 0.1
        v, y = program.linear(program.flatten(v), last), y @ last.double().T
    if tail == "mean":
        v, y = program.adaptive_avg_pool(v, 1), F.adaptive_avg_pool2d(y, 1)
    program.build(v)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        close(program(x), y)
    finally:
        torch.set_num_threads(before)


def test_the_default_dtype_is_no_matter() -> None:
    program, x = small_network(), torch.randn(2, 3, 32, 32)
    expected = program(x)
    torch.set_default_dtype(torch.float64)
    try:
        out = program(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == torch.float32 and torch.equal(out, expected)


def small_network() -> Program:
    generator = torch.Generator().manual_seed(5)
    program = Program((3, 32, 32))
    layout = random_layout(16, 16, 3, seed=4)
    y = program.conv2d(
        program.input, torch.randn(16, 3, 3, 3, generator=generator), padding=1, activation="relu"
    )
    for _ in range(3):
        weight = torch.randn(layout.weight_numel(3), generator=generator) / 10
        h = program.conv(y, weight, layout, kernel_size=3, padding=1, activation="relu")
        y = program.conv(h, weight, layout, kernel_size=3, padding=1, residual=y, activation="relu")
    y = program.conv2d(y, torch.randn(24, 16, 3, 3, generator=generator) / 10, stride=2, padding=1)
    y = program.flatten(program.adaptive_avg_pool(y, 1))
    return program.build(program.linear(y, torch.randn(10, 24, generator=generator)))


def test_bits_depend_on_neither_threads_nor_batch() -> None:
    program = small_network()
    x = torch.randn(5, 3, 32, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = program(x)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(program(x), expected)
            assert torch.equal(torch.cat([program(x[i : i + 1]) for i in range(5)]), expected)
    finally:
        torch.set_num_threads(before)


def bottlenecks(monkeypatch: pytest.MonkeyPatch, chain_bytes: str, engine: str = "lanes") -> Program:
    """Residual blocks as in ResNet-50; in the last the 3x3 convolution reads what its sum is written over."""
    monkeypatch.setenv("DSP_CPU_CHAIN", chain_bytes)
    monkeypatch.setenv("DSP_CPU_ENGINE", engine)
    generator = torch.Generator().manual_seed(0)
    program = Program((12, 11, 13))

    def conv(
        x: Value, channels: int, out: int, kernel: int, seed: int, residual: Value | None = None
    ) -> Value:
        layout = random_layout(channels, out, 2, seed)
        weight = torch.randn(layout.weight_numel(kernel), generator=generator) / (kernel * channels**0.5)
        bias = torch.randn(out, generator=generator)
        padding = kernel // 2
        return program.conv(
            x, weight, layout, bias, kernel_size=kernel, padding=padding, residual=residual, activation="relu"
        )

    y = conv(program.input, 12, 40, 1, 1)
    for seed in (2, 6):
        inner = conv(conv(y, 40, 24, 1, seed), 24, 24, 3, seed + 1)
        y = conv(inner, 24, 40, 1, seed + 2, residual=y)
    y = conv(conv(y, 40, 40, 3, 10), 40, 40, 1, 11, residual=y)
    return program.build(conv(y, 40, 7, 3, 12))


def test_chains_give_the_bits_of_single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    single = bottlenecks(monkeypatch, "1000000000")
    chained = bottlenecks(monkeypatch, "1")
    assert (
        chained.memory()["arena_bytes"] > single.memory()["arena_bytes"]
    )  # values of a chain live side by side
    x = torch.randn(3, 12, 11, 13)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = single(x)
        close(expected, bottlenecks(monkeypatch, "1", "planar")(x))
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(chained(x), expected)
            assert torch.equal(chained(x[:1]), expected[:1])
    finally:
        torch.set_num_threads(before)


def test_profile_names_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for chain_bytes in ("1", "1000000000"):
        program = bottlenecks(monkeypatch, chain_bytes)
        rows = program.profile()
        convs = [row for row in rows if row["step"] == "conv"]
        assert len(convs) == len(program) and {row["layout"] for row in convs} == {"lanes"}
        layout = random_layout(40, 7, 2, 12)
        assert convs[-1]["shape"] == (7, 11, 13) and convs[-1]["macs"] == layout.pairs * 9 * 11 * 13
        assert all(row["macs"] > 0 and row["seconds"] > 0 for row in convs)
    with pytest.raises(RuntimeError, match="not built"):
        Program((3, 4, 4)).profile()


def test_concurrent_callers_get_their_own_results() -> None:
    program = small_network()
    inputs = [torch.randn(2, 3, 32, 32) for _ in range(4)]
    expected = [program(x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(program(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_copies_and_pickles() -> None:
    program = small_network()
    x = torch.randn(1, 3, 32, 32)
    expected = program(x)
    assert torch.equal(copy.deepcopy(program)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(program))(x), expected)


def test_nan_and_inf_stay_with_the_filters_that_read_them() -> None:
    layout = GroupLayout(4, 4, [([0, 1], [0, 1]), ([2, 3], [2, 3])])
    program = Program((4, 8, 8))
    y = program.relu(program.input)
    y = program.conv(y, torch.ones(layout.weight_numel(3)), layout, kernel_size=3, padding=1)
    program.build(y)
    x = torch.zeros(1, 4, 8, 8)
    x[0, 0, 4, 4] = float("nan")
    x[0, 3, 0, 0] = float("inf")
    out = program(x)
    assert out[0, 0, 3:6, 3:6].isnan().all() and out[0, 0].isnan().sum() == 9
    assert out[0, 2].isinf().sum() == 4 and not out[0, 2:].isnan().any()


def test_memory_is_reused_between_layers() -> None:
    program = small_network()
    program(torch.zeros(1, 3, 32, 32))
    memory = program.memory()
    one_map = 16 * 33 * 34 * 4
    assert one_map < memory["arena_bytes"] < 6 * one_map
    assert memory["arenas"] == 1 and memory["weight_bytes"] > 0
    assert len(program) == 11


def test_empty_batch() -> None:
    assert small_network()(torch.zeros(0, 3, 32, 32)).shape == (0, 10)


@pytest.mark.parametrize(
    "x,error",
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), ValueError),
        (torch.zeros(1, 3, 32, 31), ValueError),
        (torch.zeros(3, 32, 32), ValueError),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError),
        ([1.0], TypeError),
    ],
)
def test_refuses_other_inputs(x: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^x must be"):
        small_network()(x)  # type: ignore[arg-type]


def test_refuses_bad_steps() -> None:
    program = Program((3, 8, 8))
    with pytest.raises(ValueError, match="activation must be"):
        program.add(program.input, program.input, activation="softsign")
    with pytest.raises(ValueError, match="weight must be 1-D"):
        program.conv(program.input, torch.zeros(5), random_layout(3, 4, 1), kernel_size=3)
    with pytest.raises(ValueError, match="weight must be float32"):
        program.conv2d(program.input, torch.zeros(4, 3, 3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="bias must have 4"):
        program.conv2d(program.input, torch.zeros(4, 3, 3, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="input_shape"):
        Program((3, 0, 8))
    with pytest.raises(RuntimeError, match="not built"):
        program(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="output must be"):
        program.build(program.input)


# Every step that takes a value, and each place where it takes one.
TAKERS: dict[str, Callable[[Program, Any], object]] = {
    "conv x": lambda p, v: p.conv(v, torch.zeros(27), GroupLayout(3, 1, [([0, 1, 2], [0])]), kernel_size=3),
    "conv residual": lambda p, v: p.conv(
        p.input, torch.zeros(9), GroupLayout(3, 3, [([0, 1, 2], [0, 1, 2])]), kernel_size=1, residual=v
    ),
    "conv2d x": lambda p, v: p.conv2d(v, torch.zeros(3, 3, 1, 1)),
    "conv2d residual": lambda p, v: p.conv2d(p.input, torch.zeros(3, 3, 1, 1), residual=v),
    "linear x": lambda p, v: p.linear(v, torch.zeros(4, 192)),
    "max_pool x": lambda p, v: p.max_pool(v, 2),
    "avg_pool x": lambda p, v: p.avg_pool(v, 2),
    "adaptive_avg_pool x": lambda p, v: p.adaptive_avg_pool(v, 1),
    "add a": lambda p, v: p.add(v, p.input),
    "add b": lambda p, v: p.add(p.input, v),
    "relu x": lambda p, v: p.relu(v),
    "relu6 x": lambda p, v: p.relu6(v),
    "affine x": lambda p, v: p.affine(v, torch.ones(3), torch.ones(3)),
    "concat values": lambda p, v: p.concat([p.input, v]),
    "flatten x": lambda p, v: p.flatten(v),
    "build output": lambda p, v: p.build(v),
}


@pytest.mark.parametrize("engine", ["", "planar", "lanes"])
def test_several_inputs_and_outputs(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of few and of many channels, as images, residuals and vectors; outputs that are read again, one
    that a sum could overwrite, one given twice.
    """
    monkeypatch.setenv("DSP_CPU_ENGINE", engine)
    torch.manual_seed(0)
    w1, w2, w3 = torch.randn(20, 3, 3, 3), torch.randn(20, 24, 3, 3) * 0.1, torch.randn(20, 20, 1, 1) * 0.2
    v = torch.randn(5, 7)
    program = Program((3, 8, 8), (24, 8, 8), (20, 8, 8), (7,))
    a, b, c, d = program.inputs
    assert (a.flat, d.flat) == (False, True)
    first = program.conv2d(a, w1, padding=1)
    second = program.conv2d(b, w2, padding=1, residual=first, activation="relu")
    third = program.conv2d(second, w3, residual=c)
    fourth = program.concat([third, c])
    fifth = program.linear(d, v)
    program = pickle.loads(pickle.dumps(program.build(fourth, first, fifth, second, first)))
    assert program.output_shapes == ((40, 8, 8), (20, 8, 8), (5,), (20, 8, 8), (20, 8, 8))
    inputs = [torch.randn(5, *shape) for shape in program.input_shapes]
    inputs[1] = inputs[1].contiguous(memory_format=torch.channels_last)
    given = program(*inputs)
    x, y, z, f = (value.double() for value in inputs)
    one = F.conv2d(x, w1.double(), padding=1)
    two = (F.conv2d(y, w2.double(), padding=1) + one).relu()
    expected = torch.cat([F.conv2d(two, w3.double()) + z, z], 1), one, f @ v.double().T, two, one
    for have, want in zip(given, expected, strict=True):
        close(have, want)
    for n in range(5):  # two images at a time, or one: the same bits
        alone = program(*(value[n : n + 1] for value in inputs))
        assert all(torch.equal(p[n : n + 1], q) for p, q in zip(given, alone, strict=True))


def test_refuses_inputs_of_another_number_shape_or_batch() -> None:
    program = Program((3, 4, 4), (2,))
    out = program.relu(program.inputs[0])
    with pytest.raises(ValueError, match="input_shapes must be"):
        Program()
    with pytest.raises(ValueError, match="input_shapes must be"):
        Program((3, 4, 4), (2, 2))
    with pytest.raises(ValueError, match=r"output must be .*got none"):
        program.build()
    with pytest.raises(ValueError, match="output must be"):
        program.build(out, program.inputs[1])
    program.build(out, program.relu(program.inputs[1]))
    x, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 2)
    with pytest.raises(TypeError, match="expected 2 inputs, got 1"):
        program(x)
    with pytest.raises(ValueError, match=r"x must be \(N, 2\)"):
        program(x, x)
    with pytest.raises(ValueError, match="x must be 2 images"):
        program(x, y[:1])


@pytest.mark.parametrize("step", TAKERS)
def test_numbers_and_other_programs_values_are_no_values(step: str) -> None:
    """A program has many steps, so that a number could be taken for one of them."""
    name = step.split()[1]
    program, other = Program((3, 8, 8)), Program((3, 8, 8))
    for made in (program, other):
        made.relu(made.relu(made.input))
    wrong: tuple[Any, ...] = (0, 1, True, 1.0, "1", torch.ones(()), torch.tensor(1), (program.input,))
    for value in wrong if "residual" in step else (*wrong, None):
        with pytest.raises(TypeError, match=f"^{name} must be a value of this program, got "):
            TAKERS[step](program, value)
    with pytest.raises(ValueError, match=f"^{name} must be a value of this program, got one of another"):
        TAKERS[step](program, other.relu(other.input))
    assert len(program) == 2
    TAKERS[step](program, program.relu(program.input))


@pytest.mark.parametrize(
    "make,text",
    [
        (lambda p: p.conv2d(p.input, torch.zeros(4, 5, 3, 3)), "input channels"),
        (lambda p: p.conv2d(p.input, torch.zeros(4, 3, 11, 11)), "larger than the padded input"),
        (lambda p: p.conv2d(p.input, torch.zeros(4, 3, 3, 3), residual=p.input, padding=1), "residual"),
        (lambda p: p.linear(p.input, torch.zeros(4, 3)), "flat"),
        (lambda p: p.add(p.input, p.max_pool(p.input, 2)), "two shapes"),
        (lambda p: p.max_pool(p.input, 2, padding=2), "pads more"),
        (lambda p: p.concat([p.input, p.max_pool(p.input, 2)]), "two sizes"),
    ],
)
def test_build_refuses_what_does_not_fit(make: Callable[[Program], Value], text: str) -> None:
    program = Program((3, 8, 8))
    value = make(program)
    with pytest.raises(ValueError, match=text):
        program.build(value)


def test_steps_by_the_cores_own_table() -> None:
    torch.manual_seed(0)
    program = Program((3, 4, 4))
    scale, shift = torch.randn(3), torch.randn(3)
    y = program.step("affine", x=program.input, scale=scale, shift=shift, activation=activations.find("relu"))
    x = torch.randn(2, 3, 4, 4)
    expected = (x * scale[:, None, None] + shift[:, None, None]).relu()
    torch.testing.assert_close(program.build(y)(x), expected)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("upsample", {}, "the core has no step 'upsample'; it has conv, linear, "),
        ("flatten", {}, "the fields of step 'flatten' are x; got "),
        ("adaptive_avg_pool", {"out_h": 1, "out_w": 1, "k": 1}, "are x, out_h, out_w; got"),
        (
            "adaptive_avg_pool",
            {"out_h": None, "out_w": 1},
            "out_h of step 'adaptive_avg_pool' must be int, got",
        ),
        ("activation", {"activation": None}, "must be activation, got none"),
        ("activation", {"activation": 1}, "must be activation, got int"),
        ("concat", {"values": []}, "must be values, got plan"),
    ],
)
def test_steps_that_the_core_does_not_have(name: str, fields: dict[str, object], message: str) -> None:
    program = Program((3, 4, 4))
    takes = {} if name in ("concat", "upsample") or not fields else {"x": program.input}
    y = program.step(name, **takes, **fields)
    with pytest.raises(TypeError, match=message):
        program.build(y)


def test_activations_go_into_the_step_before_and_unread_steps_go() -> None:
    torch.manual_seed(3)
    x, weight, scale = torch.randn(2, 4, 6, 5), torch.randn(4, 1, 3, 3), torch.randn(4)
    y = F.conv2d(x, weight, padding=1, groups=4)
    cases = {
        "one reader": (1, F.silu(y)),
        "two readers": (3, y + F.silu(y)),
        "read by the caller": (2, (F.silu(y), y)),
        "one after another": (2, F.silu(y.relu())),
        "behind a product": (3, F.silu(y * scale[:, None, None]) + y),
    }
    for name, (steps, expected) in cases.items():
        program = Program((4, 6, 5))
        made = program.conv2d(program.input, weight, padding=1, groups=4)
        program.affine(made, scale, scale)  # nobody reads that
        if name == "one after another":
            made = program.relu(made)
        before = made
        if name == "behind a product":
            made = program.affine(made, scale, torch.zeros(4))
        acted = program.activation(made, "silu")
        if name in ("two readers", "behind a product"):
            acted = program.add(before, acted)
        program.build(*((acted, before) if name == "read by the caller" else (acted,)))
        assert len(program) == steps, name
        torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pickle.loads(pickle.dumps(program))(x), program(x), rtol=0, atol=0)
