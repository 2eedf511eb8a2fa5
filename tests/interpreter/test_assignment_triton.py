"""Group assignment in Triton, interpreted: against the definition to second order, and in training."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_assignment import hard_logs, layers, leaves, relative, second_order
from torch import nn

from dsp_kernels import group_lasso, sample_groups
from dsp_kernels.assignment import LassoTable, reference
from dsp_kernels.assignment.choice import backend_for
from dsp_kernels.assignment.op import standard_gumbel
from dsprune import GroupLearner

OPS = torch.ops.dsp_kernels
SHAPES = [(5, 3, 2, 2), (4, 6), (6, 2, 3, 1), (1, 4, 3, 3), (9, 20, 1, 1)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def room():
    from dsp_kernels.assignment import triton

    return triton


def lasso(weights, logs, scales):
    return group_lasso(weights, logs, scales, backend="triton")


def assert_close(got, want, tolerance):
    assert relative(got[0].double(), want[0].double()) < tolerance
    for a, b in zip(got[1] + got[2], want[1] + want[2], strict=True):
        assert a.dtype == got[0].dtype or a.dtype in (torch.float16, torch.bfloat16)
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


# ---- the operators ----


def test_penalties_gradients_and_hessian_products_are_those_of_the_definition():
    weights, logs, scales = layers(3, shapes=SHAPES)
    got = second_order(lasso, weights, logs, scales)
    assert_close(got, second_order(reference.group_lasso_definition, weights, logs, scales), 1e-9)


def test_more_groups_than_are_summed_at_a_time(room):
    assert room.tiling(8, True).block(9) < 9
    weights, logs, scales = layers(9, shapes=[(10, 3, 2, 2)])
    got = second_order(lasso, weights, logs, scales)
    assert_close(got, second_order(reference.group_lasso_definition, weights, logs, scales), 1e-9)


@settings(max_examples=4)
@given(
    filters=st.integers(1, 10),
    channels=st.integers(1, 10),
    taps=st.sampled_from([(), (1, 1), (2, 2), (3, 3), (1, 5)]),
    groups=st.integers(1, 4),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_matches_the_definition_to_second_order(filters, channels, taps, groups, last, seed):
    weights, logs, scales = layers(groups, shapes=[(filters, channels, *taps)], seed=seed)
    if last and taps:
        weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]
    got = second_order(lasso, weights, logs, scales, seed)
    want = second_order(reference.group_lasso_definition, weights, logs, scales, seed)
    assert relative(got[0], want[0]) < 1e-12
    for a, b in zip(got[1] + got[2], want[1] + want[2], strict=True):
        assert (a - b).abs().max() < 1e-9 * (1 + b.abs().max())


def test_float32_stays_close_to_float64():
    weights, logs, scales = layers(4, shapes=[(9, 8, 3, 3), (12, 16, 1, 1)])
    want = second_order(reference.group_lasso_definition, weights, logs, scales)
    got = second_order(lasso, [w.float() for w in weights], [log.float() for log in logs], scales)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_half_weights_are_accumulated_in_float32(dtype, rounding):
    weights, logs, scales = layers(3, dtype, shapes=[(8, 16, 3, 3), (16, 8)])
    weights, logs = leaves(weights, logs)
    penalties = lasso(weights, logs, scales)
    assert penalties.dtype == torch.float32
    exact, exact_logs = leaves([w.double() for w in weights], [x.double() for x in logs])
    want = reference.group_lasso_definition(exact, exact_logs, scales)
    assert relative(penalties.double(), want) < 1e-6
    penalties.sum().backward()
    want.sum().backward()
    for got, true in zip(weights + logs, exact + exact_logs, strict=True):
        assert got.grad.dtype == got.dtype
        assert relative(got.grad.double(), true.grad) < (rounding if got.dtype == dtype else 1e-6)


def test_kernels_of_many_taps_are_walked_tap_by_tap(room):
    shapes = [(3, 5, 9, 9), (4, 3, 2, 2)]
    weights, logs, scales = layers(2, shapes=shapes)
    plan, _ = room.Network(weights, 2, scales).bind(weights)
    assert plan.strided and plan.vector == 1
    got = second_order(lasso, weights, logs, scales)
    assert_close(got, second_order(reference.group_lasso_definition, weights, logs, scales), 1e-9)


def test_layers_of_other_groups_and_dtypes_in_one_call():
    weights, logs, scales = layers(2, torch.float32, shapes=[(4, 3, 3, 3), (6, 4)])
    more, more_logs, _ = layers(3, torch.float16, shapes=[(5, 2, 1, 1), (4, 4)])
    weights, logs, scales = [weights[0], *more, weights[1]], [logs[0], *more_logs, logs[1]], [1.0, 2, 3, 4]
    got = lasso(weights, logs, scales)
    want = reference.group_lasso([w.double() for w in weights], [x.double() for x in logs], scales)
    assert relative(got.double(), want) < 1e-6
    grad = torch.tensor([1.0, -2.0, 0.5, 3.0])
    ours = OPS.group_lasso_backward(grad, weights, logs, scales, "triton")
    theirs = OPS.group_lasso_backward(grad, weights, logs, scales, "reference")
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative(a.double(), b.double()) < (2e-3 if a.dtype == torch.float16 else 1e-5)
    directions = ([torch.randn_like(w) for w in weights], [torch.randn_like(x) for x in logs])
    ours = OPS.group_lasso_hessian(grad, *directions, weights, logs, scales, "triton")
    theirs = OPS.group_lasso_hessian(grad, *directions, weights, logs, scales, "reference")
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert relative(a.double(), b.double()) < (2e-3 if a.dtype == torch.float16 else 1e-5)


def test_memory_formats_and_views_change_nothing():
    weights, logs, scales = layers(shapes=[(6, 4, 3, 3)])
    want = second_order(lasso, weights, logs, scales)
    strided = [torch.stack([weights[0]] * 2, -1)[..., 0]]
    columns = [torch.cat([logs[0], logs[0]], 1)[:, 6:]]
    for views in (
        [weights[0].to(memory_format=torch.channels_last)],
        strided,
        [torch.cat([weights[0].flatten(), weights[0].flatten()])[1:217].view(6, 4, 3, 3)],
    ):
        views[0].copy_(weights[0])
        got = lasso(views, columns, scales)
        assert torch.allclose(got, want[0], rtol=1e-14)
        first = OPS.group_lasso_backward(torch.ones(1, dtype=torch.float64), views, columns, scales, "triton")
        true = OPS.group_lasso_backward(
            torch.ones(1, dtype=torch.float64), weights, logs, scales, "reference"
        )
        for a, b in zip(first, true, strict=True):
            assert torch.allclose(a, b, rtol=1e-12)


def test_the_same_bits_in_each_run():
    weights, logs, scales = layers(3, torch.float32, shapes=[(9, 8, 3, 3), (5, 17)])
    first = second_order(lasso, weights, logs, scales)
    again = second_order(lasso, weights, logs, scales)
    for a, b in zip([first[0], *first[1], *first[2]], [again[0], *again[1], *again[2]], strict=True):
        assert torch.equal(a, b)


def test_gradcheck_and_gradgradcheck_of_the_whole_chain():
    weights, _, scales = layers(shapes=[(2, 2, 2, 1)])
    logits = [torch.randn(2, w.shape[0], dtype=torch.float64) for w in weights]
    noise = [torch.randn_like(alpha) for alpha in logits]
    weights, logits = leaves(weights, logits)

    def chain(*tensors):
        pairs = zip(tensors[1:], noise, strict=True)
        logs = [sample_groups(a, 0.3, noise=n, backend="triton") for a, n in pairs]
        return lasso(tensors[:1], logs, scales[:1])

    # Along random directions: each element by itself is held to the definition above, and takes long here.
    assert torch.autograd.gradcheck(chain, (*weights, *logits), fast_mode=True)
    assert torch.autograd.gradgradcheck(chain, (*weights, *logits), fast_mode=True)


@pytest.mark.parametrize("kind", ["zero", "zero filter and channel", "hard", "tiny"])
def test_derivatives_are_finite_at_zero(kind):
    weights, logs, scales = layers(3, torch.float32, shapes=[(5, 3, 2, 2), (4, 6)])
    for weight in weights:
        if kind == "zero":
            weight.zero_()
        elif kind == "tiny":
            weight.mul_(1e-18)
        else:
            weight[:, 0] = 0
            weight[0] = 0
    if kind == "hard":
        logs = [hard_logs([o % 2 for o in range(w.shape[0])], 3, torch.float32) for w in weights]
    value, first, second = second_order(lasso, weights, logs, scales)
    assert all(t.isfinite().all() for t in (value, *first, *second))
    if kind == "zero":
        assert torch.equal(value, torch.zeros(2))
    if kind == "hard":
        closed = partial(group_lasso, backend="reference")
        assert_close((value, first, second), second_order(closed, weights, logs, scales), 1e-5)


def test_nan_weights_are_not_hidden():
    weights, logs, scales = layers(shapes=[(5, 3, 2, 2), (4, 6)])
    weights[0][0, 0] = math.nan
    penalties = lasso(weights, logs, scales)
    assert penalties[0].isnan() and penalties[1].isfinite()


def test_opcheck():
    weights, logs, scales = layers(2, shapes=[(3, 2, 2, 1), (2, 3)])
    weights, logs = leaves(weights, logs)
    grad = torch.ones(2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OPS.group_lasso, (weights, logs, scales, "triton"))
    torch.library.opcheck(OPS.group_lasso_backward, (grad, weights, logs, scales, "triton"))
    plain = [[t.detach() for t in tensors] for tensors in (weights, logs)]
    some = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (grad.detach(), *plain, *plain, scales, "triton")
    torch.library.opcheck(OPS.group_lasso_hessian, arguments, test_utils=some)
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OPS.sample_groups, (logits, noise, 0.5, True, "triton"))
    torch.library.opcheck(OPS.sample_groups_backward, (noise, logits, 0.5, "triton"))


def test_traces_without_graph_breaks():
    weights, logs = leaves(*layers(2, shapes=[(3, 2, 2, 1), (2, 3)])[:2])
    noise = [torch.randn_like(log) for log in logs]

    def penalty(weights, logits):
        pairs = zip(logits, noise, strict=True)
        sampled = [sample_groups(a, 0.5, noise=n, backend="triton") for a, n in pairs]
        return lasso(weights, sampled, [1.0, 2.0]).sum()

    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(weights, logs), weights + logs)
    want = torch.autograd.grad(penalty(weights, logs), weights + logs)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# ---- memory ----

GUARD, PATTERN = 96, 12345.0  # elements: more than a row of lanes of the small tiles


class Guarded:
    """Tensors between two guard zones; what nobody has written yet is NaN."""

    def __init__(self):
        self.zones = []

    def like(self, tensor, values=None):
        """A tensor of that shape, dtype and memory order, of these values."""
        size = tensor.numel()
        memory = torch.full((size + 2 * GUARD,), PATTERN, dtype=tensor.dtype)
        self.zones += [memory[:GUARD], memory[GUARD + size :]]
        inside = memory.as_strided(tensor.shape, tensor.stride(), GUARD)
        return inside.fill_(math.nan) if values is None else inside.copy_(values)

    def empty(self, network, *shape):
        return self.like(torch.empty(shape, dtype=network.dtype, device="meta"))

    def intact(self):
        return all(bool((zone == PATTERN).all()) for zone in self.zones)


@pytest.mark.parametrize("last", [False, True])
def test_kernels_stay_in_their_memory(last, room, monkeypatch):
    from dsp_kernels.assignment.plan import SHIPPED

    guarded = Guarded()
    monkeypatch.setattr(room, "tiling", lambda size, interpreted: SHIPPED[size])
    # Beyond one tile and short of the next, in filters, chunks of filters, channels and lanes.
    shapes = [(3, 260, 1, 1), (9, 12, 2, 2), (70, 1)]
    assert 260 > SHIPPED[8].moved_lanes > SHIPPED[8].lanes // 2 and SHIPPED[8].chunk < 70
    if last:  # the order matters where there are several taps
        shapes = [(9, 12, 2, 2), (3, 130, 2, 1), (4, 5)]
    weights, logs, scales = layers(2, shapes=shapes)
    if last:
        weights = [w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
    theirs = LassoTable([w.clone() for w in weights], 2, scales, backend="reference")
    monkeypatch.setattr(room.Network, "_empty", lambda network, *shape: guarded.empty(network, *shape))
    matrix = guarded.like(torch.cat(logs, 1), torch.cat(logs, 1))
    ours = LassoTable([guarded.like(w, w) for w in weights], 2, scales, backend="triton")
    moves = [guarded.like(w, torch.randn_like(w)) for w in weights]
    rates = [1e-2, 2e-2, 3e-2]
    for displacements in (moves, None):
        got, want = (table.log_gradient(matrix, rates, displacements) for table in (ours, theirs))
        assert relative(got, want) < 1e-9
    grad = torch.ones(3, dtype=torch.float64)
    logs = ours.split(matrix)
    directions = [torch.randn_like(log) for log in logs]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", guarded.like)
        first = OPS.group_lasso_backward(grad, ours.weights, logs, scales, "triton")
        second = OPS.group_lasso_hessian(grad, moves, directions, ours.weights, logs, scales, "triton")
    want = OPS.group_lasso_backward(grad, theirs.weights, logs, scales, "reference")
    assert all(relative(a, b) < 1e-9 for a, b in zip(first, want, strict=True))
    want = OPS.group_lasso_hessian(grad, moves, directions, theirs.weights, logs, scales, "reference")
    assert all(relative(a, b) < 1e-9 for a, b in zip(second, want, strict=True))
    kept = [guarded.like(w) for w in ours.weights]
    ours.shrink(matrix, rates, keep=kept)
    theirs.shrink(matrix, rates)
    assert all(relative(a, b) < 1e-12 for a, b in zip(ours.weights, theirs.weights, strict=True))
    hard = guarded.like(matrix, reference.harden(matrix))
    for table in (ours, theirs):
        table.shrink(hard, rates, proximal=True)
    assert all(relative(a, b) < 1e-12 for a, b in zip(ours.weights, theirs.weights, strict=True))
    ours.copy_from(kept)
    assert all(torch.equal(a, b) for a, b in zip(ours.weights, weights, strict=True))
    assert guarded.intact() and len(guarded.zones) >= 60


def test_guards_see_a_write_outside():
    guarded = Guarded()
    inside = guarded.like(torch.empty(3, 4))
    inside.fill_(0.0)
    assert guarded.intact()
    inside.as_strided((1,), (1,), GUARD + 12).fill_(0.0)
    assert not guarded.intact()


# ---- samples ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["paper", "gumbel"])
def test_samples_and_their_gradients(form, dtype):
    logits = torch.randn(3, 150, dtype=dtype)
    noise = standard_gumbel((3, 150), dtype=dtype)
    cotangent = torch.randn(3, 150, dtype=dtype)
    results = []
    for backend in ("triton", "reference"):
        leaf, free = logits.clone().requires_grad_(), noise.clone().requires_grad_()
        logs = sample_groups(leaf, 0.3, noise=free, form=form, backend=backend)
        results.append((logs.detach(), *torch.autograd.grad(logs, (leaf, free), cotangent)))
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_samples_of_views_and_extreme_logits():
    logits = torch.tensor([[1e30, -1e30, 0.0, math.nan], [-1e30, 1e30, 0.0, 0.0]])
    noise = torch.zeros(4, 2).t()
    got = sample_groups(logits, 0.5, noise=noise, backend="triton")
    want = sample_groups(logits, 0.5, noise=noise, backend="reference")
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.allclose(got, want, equal_nan=True)


def test_hard_samples():
    logits, noise = torch.randn(3, 40), torch.randn(3, 40)
    got = sample_groups(logits, 0.5, noise=noise, hard=True, backend="triton")
    assert torch.equal(got, sample_groups(logits, 0.5, noise=noise, hard=True, backend="reference"))


def test_the_update_is_adam_through_the_softmax(room):
    groups, count = 3, 140
    log_gradient = torch.randn(groups, count, dtype=torch.float64)
    logs = torch.log_softmax(torch.randn(groups, count, dtype=torch.float64), 0)
    leaf = torch.randn(groups, count, dtype=torch.float64, requires_grad=True)
    alpha = leaf.detach().clone()
    state = [torch.zeros_like(alpha) for _ in range(3)]
    optimizer = torch.optim.Adam([leaf], lr=1e-3, eps=1e-12)
    for t in (1, 2, 3):
        leaf.grad = reference.sample_groups_backward(log_gradient, logs, 0.5)
        optimizer.step()
        numbers = (0.5, 0.1, 0.999, 0.001, 1e-12, math.sqrt(1 - 0.999**t), 1e-3 / (1 - 0.9**t))
        hard = room.update_logits(log_gradient, logs, numbers, *state, alpha)
        assert relative(state[0], leaf.grad) < 1e-14
        assert relative(alpha, leaf.detach()) < 1e-13
        assert torch.equal(hard, reference.harden(alpha))
        log_gradient = log_gradient.roll(1, 1)


def test_the_update_breaks_ties_as_argmax_does(room):
    alpha = torch.tensor(
        [[1.0, 0.0, math.nan, 2.0], [1.0, 3.0, 5.0, math.nan], [1.0, 3.0, math.nan, math.nan]]
    )
    zeros = [torch.zeros_like(alpha) for _ in range(4)]
    hard = room.update_logits(zeros[0], zeros[0], (1.0, 0.1, 0.9, 0.1, 1.0, 1.0, 0.0), *zeros[1:], alpha)
    assert torch.equal(hard, reference.harden(alpha))


# ---- all layers in place ----


def table_pair(groups=3, dtype=torch.float64, shapes=SHAPES, last=False):
    weights, logs, scales = layers(groups, dtype, shapes=shapes)
    if last:
        weights = [w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
    pair = [
        LassoTable([w.clone() for w in weights], groups, scales, backend=backend)
        for backend in ("triton", "reference")
    ]
    return *pair, torch.cat(logs, 1)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("proximal", [False, True])
def test_table_shrink(proximal, last):
    ours, theirs, matrix = table_pair(last=last)
    if proximal:
        matrix = reference.harden(matrix)
    before = [w.clone() for w in ours.weights]
    keep = [torch.empty_like(w) for w in before]
    rates = [1e-2 * (index + 1) for index in range(len(before))]
    versions = [w._version for w in ours.weights]
    ours.shrink(matrix, rates, proximal=proximal, keep=keep)
    theirs.shrink(matrix, torch.tensor(rates, dtype=torch.float64), proximal=proximal)
    for got, want, old, kept, version in zip(
        ours.weights, theirs.weights, before, keep, versions, strict=True
    ):
        assert relative(got, want) < 1e-14
        assert torch.equal(kept, old)
        assert got._version > version
    assert any((w == 0).any() for w in ours.weights) == any((w == 0).any() for w in theirs.weights)
    ours.copy_from(keep)
    assert all(torch.equal(a, b) for a, b in zip(ours.weights, before, strict=True))
    ours.weights[0].neg_()
    ours.copy_to(keep)
    assert torch.equal(keep[0], -before[0])


@pytest.mark.parametrize(("mixed", "last"), [(False, False), (True, False), (True, True)])
def test_table_log_gradient(mixed, last):
    ours, theirs, matrix = table_pair(last=last)
    moves = [torch.randn_like(w) for w in ours.weights] if mixed else None
    rates = [1e-2 * (index + 1) for index in range(len(ours.weights))]
    got, want = (table.log_gradient(matrix, rates, moves) for table in (ours, theirs))
    assert relative(got, want) < 1e-9
    if mixed and not last:
        rates = torch.tensor(rates, dtype=torch.float64)
        assert torch.equal(ours.log_gradient(matrix, rates, moves), got)


def test_table_in_float32_with_several_tiles_each_way():
    ours, _, matrix = table_pair(2, torch.float32, [(9, 18, 3, 3), (9, 66, 1, 1)])
    exact = LassoTable([w.double() for w in ours.weights], 2, ours.scales, backend="reference")
    moves = [torch.randn_like(w) for w in ours.weights]
    got = ours.log_gradient(matrix, [1e-3, 2e-3], moves)
    want = exact.log_gradient(matrix.double(), [1e-3, 2e-3], [m.double() for m in moves])
    assert relative(got.double(), want) < 1e-5
    assert relative(ours.penalties(matrix).double(), exact.penalties(matrix.double())) < 1e-6


def test_a_table_takes_new_moves_and_reordered_weights():
    ours, theirs, matrix = table_pair(shapes=SHAPES[:2])
    for _ in range(2):
        moves = [torch.randn_like(w) for w in ours.weights]
        got, want = (table.log_gradient(matrix, [0.1, 0.2], moves) for table in (ours, theirs))
        assert relative(got, want) < 1e-9
    ours.weights[0].data = ours.weights[0].contiguous(memory_format=torch.channels_last)
    assert relative(ours.penalties(matrix), theirs.penalties(matrix)) < 1e-14
    ours.weights[0].data = torch.stack([ours.weights[0]] * 2, -1)[..., 0]  # neither order: the reference
    assert relative(ours.penalties(matrix), theirs.penalties(matrix)) < 1e-14
    ours.weights[1].data = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weights\[1\]: expected"):
        ours.penalties(matrix)


def test_table_refuses_rates_of_another_kind():
    ours, _, matrix = table_pair(shapes=SHAPES[:2])
    for rates in (torch.zeros(3, dtype=torch.float64), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"rates: expected torch\.float64 of shape"):
            ours.shrink(matrix, rates)


def test_a_table_of_several_dtypes_takes_the_reference():
    weights = [torch.randn(4, 3), torch.randn(4, 3).half()]
    assert LassoTable(weights, 2, backend="triton").backend == "reference"


def test_interpreted_kernels_read_host_memory_only(monkeypatch):
    monkeypatch.setattr("dsp_kernels.assignment.choice.choose", lambda *arguments: "triton")
    assert backend_for(None, "cuda", torch.float32) == "reference"
    with pytest.raises(ValueError, match="interpreter reads host memory only"):
        backend_for("triton", "cuda", torch.float32)


# ---- the learner ----


class Chain(nn.Module):
    def __init__(self, depth, width=4):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Conv2d(width, width, 3 if i % 2 else 1, padding=i % 2) for i in range(depth)
        )

    def forward(self, x):
        x = self.stem(x)
        for conv in self.body:
            x = conv(torch.relu(x))
        return x.mean((2, 3))


def learn(backend, monkeypatch, order="exact", steps=2):
    monkeypatch.setenv("DSP_KERNELS_BACKEND", backend)
    torch.manual_seed(0)
    model, x = Chain(3).double(), torch.randn(4, 1, 5, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    learner = GroupLearner(model, x, groups=2, strength=0.1, total_steps=4, order=order)
    assert learner._table.backend == backend
    for _ in range(steps):
        learner.step(lambda: model(x).square().mean(), optimizer)
    return learner, model


@pytest.mark.parametrize("order", ["exact", "first"])
def test_the_learner_on_triton_is_the_learner(order, monkeypatch):
    ours, our_model = learn("triton", monkeypatch, order)
    theirs, their_model = learn("reference", monkeypatch, order)
    for name, logits in ours.logits.items():
        assert relative(logits.detach(), theirs.logits[name].detach()) < 1e-9
        assert relative(logits.grad, theirs.logits[name].grad) < 1e-9
        assert torch.equal(ours.assignment()[name], theirs.assignment()[name])
    for a, b in zip(our_model.parameters(), their_model.parameters(), strict=True):
        assert relative(a.detach(), b.detach()) < 1e-9


@pytest.mark.parametrize(("order", "most"), [("exact", 18), ("first", 14)])
def test_launches_of_a_step_do_not_depend_on_the_number_of_layers(order, most, room, monkeypatch):
    """Counted with kernels that do nothing: what is launched does not depend on values."""
    monkeypatch.setenv("DSP_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(room, "launch", lambda *arguments, **constants: None)
    counts = []
    for depth in (5, 60 if order == "exact" else 20):
        model, x = Chain(depth), torch.randn(2, 1, 4, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        learner = GroupLearner(model, x, groups=2, strength=0.1, total_steps=10, order=order)
        assert len(learner.names) == depth
        learner.step(lambda model=model, x=x: model(x).square().mean(), optimizer)
        with room.count_launches() as seen:
            learner.step(lambda model=model, x=x: model(x).square().mean(), optimizer)
        counts.append((sum(name != "copy" for name in seen), seen.count("copy")))
    assert counts[0] == counts[1]
    # Step lengths, addresses of the gradients and Adam's numbers: three small copies beside the kernels.
    assert counts[0][0] <= most <= 20 and counts[0][1] <= 3
