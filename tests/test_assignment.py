"""Group assignment: the operators against the definition, their derivatives, the table, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dsp_kernels import available_backends, group_lasso, sample_groups
from dsp_kernels.assignment import LassoTable, reference
from dsp_kernels.assignment.op import standard_gumbel

OPS = torch.ops.dsp_kernels
HAS_NATIVE = available_backends()["native"] is None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason=f"native: {available_backends()['native']}")
CPU_BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
SHAPES = [(5, 3, 2, 2), (4, 6), (6, 2, 3, 1), (1, 4, 3, 3)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layers(groups=3, dtype=torch.float64, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    log_dtype = reference.accumulation_dtype(dtype)
    logs = [
        torch.log_softmax(2 * torch.randn(groups, shape[0], generator=generator, dtype=torch.float64), 0)
        for shape in shapes
    ]
    scales = [0.3 + 0.4 * index for index in range(len(shapes))]
    return weights, [log.to(log_dtype) for log in logs], scales


def hard_logs(index, groups, dtype=torch.float64):
    one_hot = F.one_hot(torch.as_tensor(index), groups).t()
    return torch.where(one_hot > 0, 0.0, -torch.inf).to(dtype)


def leaves(*lists):
    return [[t.detach().clone().requires_grad_() for t in tensors] for tensors in lists]


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def second_order(function, weights, logs, scales, seed=3):
    """Penalties, gradients, and the gradients of a random contraction of the gradients."""
    weights, logs = leaves(weights, logs)
    generator = torch.Generator().manual_seed(seed)
    penalties = function(weights, logs, scales)
    cotangent = torch.randn(penalties.shape, generator=generator, dtype=torch.float64).to(penalties.dtype)
    cotangent.requires_grad_()
    first = torch.autograd.grad(penalties, weights + logs, cotangent, create_graph=True)
    towards = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in weights + logs
    ]
    product = sum((a * b).sum() for a, b in zip(first, towards, strict=True))
    second = torch.autograd.grad(product, [cotangent, *weights, *logs])
    return penalties.detach(), [t.detach() for t in first], list(second)


# ---- the penalty against its definition ----


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_penalties_gradients_and_hessian_products_are_those_of_the_definition(groups):
    weights, logs, scales = layers(groups)
    value, first, second = second_order(group_lasso, weights, logs, scales)
    want_value, want_first, want_second = second_order(
        reference.group_lasso_definition, weights, logs, scales
    )
    assert relative(value, want_value) < 1e-12
    for got, want in zip(first + second, want_first + want_second, strict=True):
        assert relative(got, want) < 1e-9


@given(
    filters=st.integers(1, 7),
    channels=st.integers(1, 6),
    taps=st.sampled_from([(), (1, 1), (2, 2), (3, 3), (1, 5)]),
    groups=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_any_shape_matches_the_definition_to_second_order(filters, channels, taps, groups, seed):
    weights, logs, scales = layers(groups, shapes=[(filters, channels, *taps)], seed=seed)
    got = second_order(group_lasso, weights, logs, scales, seed)
    want = second_order(reference.group_lasso_definition, weights, logs, scales, seed)
    assert relative(got[0], want[0]) < 1e-12
    for a, b in zip(got[1] + got[2], want[1] + want[2], strict=True):
        # One group is l = 0 throughout, where every derivative for l can still be compared.
        assert (a - b).abs().max() < 1e-9 * (1 + b.abs().max())


def test_float32_stays_close_to_float64():
    weights, logs, scales = layers(4, shapes=[(16, 8, 3, 3), (32, 16, 1, 1)])
    want = second_order(reference.group_lasso_definition, weights, logs, scales)
    got = second_order(group_lasso, [w.float() for w in weights], [log.float() for log in logs], scales)
    assert got[0].dtype == torch.float32
    for a, b in zip(got[1] + got[2], want[1] + want[2], strict=True):
        assert relative(a.double(), b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_accumulated_in_float32(dtype):
    weights, logs, scales = layers(3, dtype, shapes=[(8, 64, 3, 3), (16, 8)])
    weights, logs = leaves(weights, logs)
    penalties = group_lasso(weights, logs, scales)
    assert penalties.dtype == torch.float32
    want = reference.group_lasso_definition([w.double() for w in weights], [x.double() for x in logs], scales)
    assert relative(penalties.double(), want) < 1e-6
    penalties.sum().backward()
    assert [w.grad.dtype for w in weights] == [dtype] * 2
    assert [log.grad.dtype for log in logs] == [torch.float32] * 2


def test_scales_default_to_one_and_multiply():
    weights, logs, _ = layers()
    plain = group_lasso(weights, logs)
    assert torch.equal(plain, group_lasso(weights, logs, [1.0] * 4))
    scaled = group_lasso(weights, logs, torch.tensor([1.0, 2.0, -3.0, 0.0]))
    assert torch.allclose(scaled, plain * torch.tensor([1.0, 2.0, -3.0, 0.0], dtype=torch.float64))


def test_a_hard_assignment_gives_the_group_lasso_by_hand():
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    index = [0, 0, 1, 1, 1, 0]
    logs = hard_logs(index, 2)
    want = 0.0
    for group in range(2):
        members = [o for o, g in enumerate(index) if g == group]
        for channel in range(4):
            want += len(members) ** 2 * weight[members, channel].norm().item()
    assert group_lasso([weight], [logs]).item() == pytest.approx(want, rel=1e-12)


def test_balanced_groups_with_the_paper_scale_weigh_root_group_size():
    filters, groups, taps = 8, 4, 9
    weight = torch.randn(filters, 5, 3, 3, dtype=torch.float64)
    index = [o % groups for o in range(filters)]
    scale = 3 * (groups / filters) ** 1.5
    norms = sum(
        weight[[o for o in range(filters) if index[o] == g], c].norm().item()
        for g in range(groups)
        for c in range(5)
    )
    want = math.sqrt(taps * filters / groups) * norms
    assert group_lasso([weight], [hard_logs(index, groups)], [scale]).item() == pytest.approx(want)


def test_gradcheck_and_gradgradcheck_of_the_whole_chain():
    weights, _, scales = layers(shapes=SHAPES[:2])
    logits = [torch.randn(3, w.shape[0], dtype=torch.float64) for w in weights]
    noise = [torch.randn_like(alpha) for alpha in logits]
    weights, logits = leaves(weights, logits)

    def chain(*tensors):
        logs = [sample_groups(a, 0.5, noise=n) for a, n in zip(tensors[2:], noise, strict=True)]
        return group_lasso(tensors[:2], logs, scales[:2])

    assert torch.autograd.gradcheck(chain, (*weights, *logits))
    assert torch.autograd.gradgradcheck(chain, (*weights, *logits))


def test_gradgradcheck_in_free_log_probabilities():
    weights, logs = leaves(*layers(shapes=SHAPES[:2])[:2])
    assert torch.autograd.gradgradcheck(lambda *t: group_lasso(t[:2], t[2:], [1.5, 0.7]), (*weights, *logs))


def test_only_some_inputs_need_gradients():
    weights, logs, scales = layers()
    logs[1].requires_grad_()
    group_lasso(weights, logs, scales).sum().backward()
    assert logs[1].grad is not None and logs[0].grad is None
    (want,) = torch.autograd.grad(reference.group_lasso_definition(weights, logs, scales).sum(), logs[1])
    assert relative(logs[1].grad, want) < 1e-12


def test_a_third_derivative_is_refused_with_a_reason():
    weights, logs = leaves(*layers(shapes=SHAPES[:1])[:2])
    (first,) = torch.autograd.grad(group_lasso(weights, logs).sum(), weights, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), weights, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable twice"):
        second.sum().backward()


# ---- at zero ----


def all_derivatives(weights, logs):
    value, first, second = second_order(group_lasso, weights, logs, [1.0] * len(weights))
    return [value, *first, *second]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_weights_give_finite_derivatives(dtype):
    weights, logs, _ = layers(dtype=dtype)
    for weight in weights:
        weight.zero_()
    results = all_derivatives(weights, logs)
    assert all(t.isfinite().all() for t in results)
    assert torch.equal(results[0], torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_channel_and_a_zero_filter_give_finite_derivatives(dtype):
    weights, logs, _ = layers(dtype=dtype)
    for weight in weights:
        weight[:, 0] = 0
        weight[0] = 0
    assert all(t.isfinite().all() for t in all_derivatives(weights, logs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_probabilities_give_finite_derivatives(dtype):
    weights, _, _ = layers(dtype=dtype)
    logs = [
        hard_logs([o % 2 for o in range(w.shape[0])], 3, dtype) for w in weights
    ]  # the third group is empty
    results = all_derivatives(weights, logs)
    assert all(t.isfinite().all() for t in results)
    for log, gradient in zip(logs, results[1 + len(weights) : 1 + 2 * len(weights)], strict=True):
        assert torch.equal(gradient[log.isneginf()], torch.zeros(int(log.isneginf().sum()), dtype=dtype))


def test_vanishing_probabilities_approach_the_hard_limit():
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    hard = hard_logs([0, 1, 0, 1], 2)
    soft = torch.where(hard.isneginf(), -400.0, 0.0).double()
    (want,), (got,) = group_lasso([weight], [hard]), group_lasso([weight], [soft])
    assert got.item() == pytest.approx(want.item(), rel=1e-12)


def test_tiny_weights_do_not_overflow_float32():
    weights, logs, _ = layers(dtype=torch.float32, shapes=[(4, 3, 3, 3)])
    for size in (1e-8, 1e-14, 1e-20, 1e-38):
        assert all(t.isfinite().all() for t in all_derivatives([weights[0] * size], logs))


def test_nan_weights_are_not_hidden():
    weights, logs, _ = layers()
    weights[0][0, 0] = math.nan
    penalties = group_lasso(weights, logs)
    assert penalties[0].isnan() and penalties[1:].isfinite().all()


def test_one_filter_and_one_group():
    weight = torch.randn(1, 1, 1, 1, dtype=torch.float64)
    value, first, _ = second_order(group_lasso, [weight], [torch.zeros(1, 1, dtype=torch.float64)], [1.0])
    assert value.item() == pytest.approx(weight.abs().item())
    assert torch.isfinite(first[0]).all()


def test_memory_formats_and_views_change_nothing():
    weights, logs, scales = layers(shapes=[(6, 4, 3, 3)])
    want = group_lasso(weights, logs, scales)
    last = [weights[0].to(memory_format=torch.channels_last)]
    strided = [torch.stack([weights[0]] * 2, -1)[..., 0]]
    columns = [torch.cat([logs[0], logs[0]], 1)[:, 6:]]
    assert torch.allclose(group_lasso(last, logs, scales), want, rtol=1e-14)
    assert torch.allclose(group_lasso(strided, columns, scales), want, rtol=1e-14)


# ---- operators as torch sees them ----


def opcheck_arguments(requires_grad=True):
    weights, logs, scales = layers(shapes=SHAPES[:2])
    if requires_grad:
        weights, logs = leaves(weights, logs)
    return weights, logs, scales[:2]


def test_opcheck_group_lasso():
    torch.library.opcheck(OPS.group_lasso, (*opcheck_arguments(), "reference"))


def test_opcheck_group_lasso_backward():
    grad = torch.ones(2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OPS.group_lasso_backward, (grad, *opcheck_arguments(), "reference"))


def test_opcheck_group_lasso_hessian():
    weights, logs, scales = opcheck_arguments(requires_grad=False)
    grad = torch.ones(2, dtype=torch.float64)
    torch.library.opcheck(OPS.group_lasso_hessian, (grad, weights, logs, weights, logs, scales, "reference"))


@pytest.mark.parametrize("divide", [False, True])
def test_opcheck_sample_groups(divide):
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OPS.sample_groups, (logits, noise, 0.5, divide, "reference"))


def test_opcheck_sample_groups_backward_and_harden():
    logs = torch.log_softmax(torch.randn(3, 5, dtype=torch.float64), 0).requires_grad_()
    grad = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OPS.sample_groups_backward, (grad, logs, 0.5, "reference"))
    torch.library.opcheck(OPS.harden_groups, (logs,), test_utils=("test_schema", "test_faketensor"))


def test_traces_without_graph_breaks():
    weights, logs = leaves(*layers(shapes=SHAPES[:2])[:2])
    noise = [torch.randn_like(log) for log in logs]

    def penalty(weights, logits):
        sampled = [sample_groups(a, 0.5, noise=n) for a, n in zip(logits, noise, strict=True)]
        return group_lasso(weights, sampled, [1.0, 2.0]).sum()

    compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(weights, logs), weights + logs)
    want = torch.autograd.grad(penalty(weights, logs), weights + logs)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b)


def test_the_flop_counter_knows_the_penalty():
    weights, logs = leaves(*layers(groups=3, shapes=[(4, 6, 3, 3)])[:2])
    with FlopCounterMode(display=False) as counter:
        group_lasso(weights, logs).sum()
    assert counter.get_total_flops() == 2 * 4 * 6 * 9 + 2 * 3 * 4 * 6


# ---- sampling ----


def test_sample_is_a_log_softmax_in_both_forms():
    logits, noise = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    assert torch.equal(sample_groups(logits, 0.5, noise=noise), torch.log_softmax(logits / 0.5 + noise, 0))
    gumbel = sample_groups(logits, 0.5, noise=noise, form="gumbel")
    assert torch.equal(gumbel, torch.log_softmax((logits + noise) / 0.5, 0))
    assert torch.allclose(
        sample_groups(logits, 1.0, noise=noise), sample_groups(logits, 1.0, noise=noise, form="gumbel")
    )


def test_gumbel_form_is_torchs_gumbel_softmax():
    logits = torch.randn(4, 9)
    torch.manual_seed(5)
    want = F.gumbel_softmax(logits, tau=0.7, dim=0)
    torch.manual_seed(5)
    got = sample_groups(logits, 0.7, form="gumbel")
    assert torch.allclose(got.exp(), want, atol=1e-6)


@pytest.mark.parametrize("form", ["paper", "gumbel"])
def test_gradients_of_logits_and_noise(form):
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def sample(a, n):
        return sample_groups(a, 0.4, noise=n, form=form)

    assert torch.autograd.gradcheck(sample, (logits, noise))
    assert torch.autograd.gradgradcheck(sample, (logits, noise))


def test_hard_is_one_hot_with_the_soft_gradient():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 6, dtype=torch.float64)
    soft = sample_groups(logits, 0.5, noise=noise)
    hard = sample_groups(logits, 0.5, noise=noise, hard=True)
    assert torch.equal(hard.exp(), F.one_hot(soft.argmax(0), 3).t().double())
    cotangent = torch.randn(3, 6, dtype=torch.float64)
    (want,) = torch.autograd.grad(soft, logits, cotangent)
    (got,) = torch.autograd.grad(hard, logits, cotangent)
    assert torch.equal(got, want)


def test_hard_penalty_has_finite_gradients():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    logs = sample_groups(logits, 0.5, hard=True)
    group_lasso([weight], [logs]).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
    assert weight.grad.isfinite().all()


def test_hard_ties_go_to_the_first_group():
    hard = sample_groups(torch.zeros(3, 4), 1.0, noise=torch.zeros(3, 4), hard=True)
    assert torch.equal(hard.exp(), torch.tensor([[1.0] * 4, [0.0] * 4, [0.0] * 4]))


def test_extreme_logits_give_no_nan():
    logits = torch.tensor([[1e30, -1e30, 0.0], [-1e30, 1e30, 0.0]], requires_grad=True)
    logs = sample_groups(logits, 0.5, noise=torch.zeros(2, 3))
    assert not logs.isnan().any()
    group_lasso([torch.randn(3, 2, 1, 1)], [logs]).sum().backward()
    assert logits.grad.isfinite().all()


def test_generator_reproduces_the_noise_and_the_global_state_is_untouched():
    logits = torch.zeros(3, 5)
    state = torch.get_rng_state()
    first = sample_groups(logits, 0.5, generator=torch.Generator().manual_seed(1))
    second = sample_groups(logits, 0.5, generator=torch.Generator().manual_seed(1))
    other = sample_groups(logits, 0.5, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_standard_gumbel():
    noise = standard_gumbel((200_000,), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_samples_follow_the_logits():
    logits = torch.log(torch.tensor([[0.7], [0.2], [0.1]])).expand(3, 40_000).contiguous()
    picks = sample_groups(logits, 1.0, hard=True, generator=torch.Generator().manual_seed(0)).exp().mean(1)
    assert torch.allclose(picks, torch.tensor([0.7, 0.2, 0.1]), atol=0.01)


# ---- bad input ----


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        sample_groups(torch.zeros(2, 3), temperature)


@pytest.mark.parametrize("temperature", ["1", None, True, torch.tensor(1.0)])
def test_bad_temperature_type(temperature):
    with pytest.raises(TypeError, match="temperature: expected a number"):
        sample_groups(torch.zeros(2, 3), temperature)


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"logits": torch.zeros(3)}, ValueError, "logits: expected a non-empty"),
        ({"logits": torch.zeros(0, 3)}, ValueError, "logits: expected a non-empty"),
        ({"logits": torch.zeros(2, 3, 1)}, ValueError, "logits: expected a non-empty"),
        ({"logits": [[0.0]]}, TypeError, "logits: expected a tensor, got list"),
        ({"logits": torch.zeros(2, 3, dtype=torch.float16)}, TypeError, "logits: dtype torch.float16"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logits: dtype torch.int64"),
        (
            {"noise": torch.zeros(3, 2)},
            ValueError,
            r"noise: expected the logits' shape \(2, 3\), got \(3, 2\)",
        ),
        ({"noise": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "noise: expected the logits' dtype"),
        ({"noise": torch.zeros(2, 3, device="meta")}, ValueError, "noise: expected the logits' device"),
        ({"noise": 0.0}, TypeError, "noise: expected a tensor, got float"),
        ({"form": "other"}, ValueError, "form: expected one of paper, gumbel, got 'other'"),
        ({"hard": 1}, TypeError, "hard: expected True or False"),
        (
            {"noise": torch.zeros(2, 3), "generator": torch.Generator()},
            ValueError,
            "generator: accepted only",
        ),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"backend": 3}, TypeError, "backend"),
    ],
)
def test_bad_sample_arguments(keywords, error, text):
    arguments = {"logits": torch.zeros(2, 3), "temperature": 0.5, **keywords}
    with pytest.raises(error, match=text):
        sample_groups(**arguments)


W, P = torch.ones(4, 3, 1, 1), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([], []), ValueError, "weights: expected at least one layer"),
        ((W, [P]), TypeError, "weights: expected a list"),
        (([W], P), TypeError, "log_probabilities: expected a list"),
        (([W], [P, P]), ValueError, "log_probabilities: expected 1 matrices"),
        (([W], [P], [1.0, 2.0]), ValueError, "scales: expected 1 numbers"),
        (([W], [P], [math.nan]), ValueError, r"scales\[0\]: expected a finite number, got nan"),
        (([W], [P], [math.inf]), ValueError, r"scales\[0\]: expected a finite number, got inf"),
        (([W], [P], ["1"]), TypeError, r"scales\[0\]: expected a number"),
        (([W], [P], 1.0), TypeError, "scales: expected a list"),
        (([W, 3], [P, P]), TypeError, r"weights\[1\]: expected a tensor, got int"),
        (([W.int()], [P]), TypeError, r"weights\[0\]: dtype torch.int32"),
        (([W[:, 0, 0, 0]], [P]), ValueError, r"weights\[0\]: expected a non-empty"),
        (([W[:, :0]], [P]), ValueError, r"weights\[0\]: expected a non-empty"),
        (
            ([W], [P[:, :3]]),
            ValueError,
            r"log_probabilities\[0\]: expected \(groups, 4\), got shape \(2, 3\)",
        ),
        (([W], [P[0]]), ValueError, r"log_probabilities\[0\]: expected \(groups, 4\)"),
        (([W], [P[:0]]), ValueError, r"log_probabilities\[0\]: expected \(groups, 4\)"),
        (([W], [P.double()]), TypeError, r"log_probabilities\[0\]: expected torch.float32"),
        (([W.double()], [P]), TypeError, r"log_probabilities\[0\]: expected torch.float64"),
        (([W], [P.half()]), TypeError, r"log_probabilities\[0\]: dtype torch.float16"),
        (([W, W.double()], [P, P.double()]), TypeError, r"weights\[1\]: dtype torch.float64 cannot stand"),
        (([W, W.to("meta")], [P, P]), ValueError, r"weights\[1\]: expected device cpu"),
        (([W], [P.to("meta")]), ValueError, r"log_probabilities\[0\]: expected device cpu"),
    ],
)
def test_bad_lasso_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        group_lasso(*arguments)


def test_bad_lasso_backend():
    with pytest.raises(ValueError, match="backend"):
        group_lasso([W], [P], backend="nonsense")


# ---- all layers in place ----


def table_of(groups=3, dtype=torch.float64, **keywords):
    weights, logs, scales = layers(groups, dtype, **keywords)
    return LassoTable(weights, groups, scales), torch.cat(logs, 1)


def test_table_penalties_are_the_operators():
    table, matrix = table_of()
    want = group_lasso(table.weights, table.split(matrix), table.scales)
    assert torch.allclose(table.penalties(matrix), want, rtol=1e-14)


def test_table_shrink_is_a_gradient_step_and_keeps_what_was():
    table, matrix = table_of()
    weights, logs = leaves(table.weights, table.split(matrix))
    before = [w.clone() for w in table.weights]
    keep = [torch.empty_like(w) for w in before]
    rates = [1e-3, 2e-3, 0.0, 5e-3]
    grads = torch.autograd.grad(reference.group_lasso_definition(weights, logs, table.scales).sum(), weights)
    table.shrink(matrix, rates, keep=keep)
    for got, old, grad, rate, kept in zip(table.weights, before, grads, rates, keep, strict=True):
        assert relative(got, old - rate * grad) < 1e-14
        assert torch.equal(kept, old)


def test_table_log_gradient_is_autograds_through_one_step():
    table, matrix = table_of()
    weights, logs = leaves(table.weights, table.split(matrix))
    moves = [torch.randn_like(w) for w in table.weights]
    rates = [1e-2, 2e-2, 3e-3, 5e-2]
    definition = reference.group_lasso_definition
    grads = torch.autograd.grad(definition(weights, logs, table.scales).sum(), weights, create_graph=True)
    moved = [w - rate * g for w, rate, g in zip(weights, rates, grads, strict=True)]
    # d/dl of rate R(W', l) - <move, W'> is rate times what is asked for: the move is minus the loss's
    # gradient.
    for index, (rate, move) in enumerate(zip(rates, moves, strict=True)):
        penalty = definition([moved[index]], [logs[index]], [table.scales[index]]).sum()
        objective = penalty - (move * moved[index]).sum() / rate
        (want,) = torch.autograd.grad(objective, logs[index], retain_graph=True)
        got = table.split(table.log_gradient(matrix, rates, moves))[index]
        assert relative(got, want) < 1e-9


def test_table_first_order_gradient_is_the_penaltys_at_the_moved_weights():
    table, matrix = table_of()
    rates = [1e-2] * 4
    got = table.log_gradient(matrix, rates)
    table.shrink(matrix, rates)
    logs = leaves(table.split(matrix))[0]
    want = torch.autograd.grad(group_lasso(table.weights, logs, table.scales).sum(), logs)
    assert relative(got, torch.cat(want, 1)) < 1e-12


def test_table_proximal_step_minimises_and_gives_exact_zeros():
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    weight[:, 0] *= 1e-3
    old = weight.clone()
    index = [0, 1, 0, 1, 1, 0]
    table = LassoTable([weight], 2, [0.5])
    rate = 0.2
    table.shrink(hard_logs(index, 2), [rate], proximal=True)
    assert torch.equal(weight[:, 0], torch.zeros(6, 3, 3, dtype=torch.float64))
    for group in range(2):
        members = [o for o, g in enumerate(index) if g == group]
        for channel in range(1, 5):
            block, before = weight[members, channel], old[members, channel]
            threshold = rate * 0.5 * len(members) ** 2
            want = before * max(0.0, 1 - threshold / before.norm().item())
            assert torch.allclose(block, want, rtol=1e-12)


def test_table_shrink_leaves_zeros_zero():
    table, matrix = table_of()
    for weight in table.weights:
        weight.zero_()
    for proximal in (False, True):
        table.shrink(matrix, [0.1] * 4, proximal=proximal)
        assert all(torch.equal(w, torch.zeros_like(w)) for w in table.weights)


TABLE_METHODS = {
    "copy_to": lambda table, matrix, others: table.copy_to(others),
    "copy_from": lambda table, matrix, others: table.copy_from(others),
    "penalties": lambda table, matrix, others: table.penalties(matrix),
    "shrink": lambda table, matrix, others: table.shrink(matrix, [0.1] * 4, keep=others),
    "log_gradient": lambda table, matrix, others: table.log_gradient(matrix, [0.1] * 4, others),
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("method", TABLE_METHODS)
def test_table_notices_a_changed_weight(method, backend):
    weights, logs, scales = layers()
    table, matrix = LassoTable(weights, 3, scales, backend=backend), torch.cat(logs, 1)
    assert table.stale() is None
    old = [w.data for w in weights]
    others = [torch.randn_like(w) for w in weights]
    for changed in (old[2][:1].clone(), old[2].float(), old[2].to("meta")):
        table.weights[2] = changed
        assert table.stale() == 2
        for taken in (others, [torch.randn_like(w) for w in table.weights]):
            before = [w.clone() for w in (*table.weights, *taken)]
            with pytest.raises(
                ValueError, match=r"weights\[2\]: expected torch\.float64 of shape \(6, 2, 3, 1\)"
            ):
                TABLE_METHODS[method](table, matrix, taken)
            after = [*table.weights, *taken]
            assert all(b.is_meta or torch.equal(a, b) for a, b in zip(before, after, strict=True))
    table.weights[2] = old[2]
    TABLE_METHODS[method](table, matrix, others)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("rates", [[0.1] * 3, [0.1] * 5, torch.zeros(3), torch.zeros(4, 1)])
def test_table_refuses_rates_of_another_number(rates, backend):
    weights, logs, scales = layers()
    table = LassoTable(weights, 3, scales, backend=backend)
    before = [w.clone() for w in weights]
    for method in (table.shrink, table.log_gradient):
        with pytest.raises(ValueError, match="rates: expected"):
            method(torch.cat(logs, 1), rates)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([], 2), ValueError, "weights: expected at least one"),
        (([W], 0), ValueError, "groups: expected at least 1, got 0"),
        (([W], 2.0), TypeError, "groups: expected an integer"),
        (([W], 2, [math.nan]), ValueError, r"scales\[0\]"),
        (([W.int()], 2), ValueError, r"weights\[0\]"),
        (([W, W.double()], 2), TypeError, r"weights\[1\]"),
        (([W, W.to("meta")], 2), ValueError, r"weights\[1\]"),
    ],
)
def test_bad_table(arguments, error, text):
    with pytest.raises(error, match=text):
        LassoTable(*arguments)


def test_table_refuses_a_matrix_of_another_network():
    table, matrix = table_of()
    before = [w.clone() for w in table.weights]
    with pytest.raises(ValueError, match="log_probabilities: expected"):
        table.shrink(matrix[:, 1:], [0.1] * 4)
    assert all(torch.equal(a, b) for a, b in zip(table.weights, before, strict=True))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("wrong", ["shape", "dtype", "device", "number"])
def test_table_refuses_tensors_unlike_the_weights(wrong, backend):
    weight = torch.randn(8, 4, 3, 3)
    before, room = weight.clone(), torch.full((8, 4, 3, 3), 7.0)
    table, matrix = LassoTable([weight], 2, backend=backend), hard_logs([0, 1] * 4, 2, torch.float32)
    given = {
        "shape": [room[:1]],  # the weight's strides, and memory behind it
        "dtype": [room.double()],
        "device": [room.to("meta")],
        "number": [room, room],
    }[wrong]
    where = "" if wrong == "number" else r"\[0\]"
    for name, call in {
        "keep": lambda: table.shrink(matrix, [0.1], keep=given),
        "targets": lambda: table.copy_to(given),
        "sources": lambda: table.copy_from(given),
        "displacements": lambda: table.log_gradient(matrix, [0.1], given),
    }.items():
        if (name, wrong) == ("displacements", "dtype"):
            continue  # cast
        with pytest.raises(ValueError, match=f"{name}{where}: expected"):
            call()
    assert torch.equal(weight, before) and bool((room == 7).all())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_table_takes_displacements_of_another_dtype(dtype, backend):
    weight = torch.randn(8, 4, 3, 3)
    table, matrix = LassoTable([weight], 2, backend=backend), hard_logs([0, 1] * 4, 2, torch.float32)
    move = torch.randint(-3, 4, weight.shape)
    want = table.log_gradient(matrix, [0.1], [move.float()])
    assert torch.equal(table.log_gradient(matrix, [0.1], [move.to(dtype)]), want)


# ---- the compiled core against the reference ----

NATIVE_SHAPES = [
    (5, 3, 2, 2),
    (4, 6),
    (40, 33, 3, 3),
    (33, 130, 1, 1),
    (16, 7, 3, 3),
    (1, 1, 1, 1),
    (8, 20, 5, 5),
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def with_backend(backend):
    return lambda weights, logs, scales: group_lasso(weights, logs, scales, backend=backend)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6])
def test_native_matches_the_reference_to_second_order(groups, dtype):
    weights, logs, scales = layers(groups, dtype, shapes=NATIVE_SHAPES)
    got = second_order(with_backend("native"), weights, logs, scales)
    want = second_order(with_backend("reference"), weights, logs, scales)
    for a, b in zip([got[0], *got[1], *got[2]], [want[0], *want[1], *want[2]], strict=True):
        assert a.dtype == b.dtype and relative(a.double(), b.double()) < TOLERANCE[dtype]


@needs_native
@given(
    filters=st.integers(1, 40),
    channels=st.integers(1, 70),
    taps=st.sampled_from([(), (1, 1), (2, 2), (3, 3), (1, 5)]),
    groups=st.integers(1, 6),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_native_matches_the_definition_on_any_shape(filters, channels, taps, groups, last, seed):
    weights, logs, scales = layers(groups, shapes=[(filters, channels, *taps)], seed=seed)
    if last and taps:
        weights = [w.to(memory_format=torch.channels_last) for w in weights]
    got = second_order(with_backend("native"), weights, logs, scales, seed)
    want = second_order(reference.group_lasso_definition, weights, logs, scales, seed)
    assert relative(got[0], want[0]) < 1e-12
    for a, b in zip(got[1] + got[2], want[1] + want[2], strict=True):
        assert (a - b).abs().max() < 1e-9 * (1 + b.abs().max())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [2, 5])
@pytest.mark.parametrize("last", [False, True])
def test_native_sums_over_blocks_of_large_layers(dtype, groups, last):
    shapes = [(300, 150, 3, 3), (700, 330, 1, 1), (120, 90, 5, 5)]
    weights, logs, scales = layers(groups, dtype, shapes=shapes)
    if last:
        weights = [w.to(memory_format=torch.channels_last) for w in weights]
    got = second_order(with_backend("native"), weights, logs, scales)
    want = second_order(
        with_backend("reference"), [w.double() for w in weights], [x.double() for x in logs], scales
    )
    for a, b in zip([got[0], *got[1], *got[2]], [want[0], *want[1], *want[2]], strict=True):
        assert relative(a.double(), b) < TOLERANCE[dtype]
    matrix, rates = torch.cat(logs, 1), [1e-4, 1e-5, 1e-4]
    moves = [torch.randn_like(w) for w in weights]
    one = LassoTable([w.clone() for w in weights], groups, scales, backend="native")
    two = LassoTable([w.double() for w in weights], groups, scales, backend="reference")
    for taken in (None, moves):
        wide = None if taken is None else [m.double() for m in taken]
        step = one.log_gradient(matrix, rates, taken)
        assert relative(step.double(), two.log_gradient(matrix.double(), rates, wide)) < TOLERANCE[dtype]
    one.shrink(matrix, rates)
    two.shrink(matrix.double(), rates)
    for a, b in zip(one.weights, two.weights, strict=True):
        assert relative(a.double(), b) < TOLERANCE[dtype]


@needs_native
def test_native_gradgradcheck():
    weights, logs = leaves(*layers(shapes=SHAPES[:2])[:2])

    def penalty(*t):
        return group_lasso(t[:2], t[2:], [1.5, 0.7], backend="native")

    assert torch.autograd.gradcheck(penalty, (*weights, *logs))
    assert torch.autograd.gradgradcheck(penalty, (*weights, *logs))


@needs_native
def test_native_opcheck():
    weights, logs, scales = opcheck_arguments()
    torch.library.opcheck(OPS.group_lasso, (weights, logs, scales, "native"))
    grad = torch.ones(2, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(OPS.group_lasso_backward, (grad, weights, logs, scales, "native"))


@needs_native
@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [False, True])
def test_native_table_matches_the_reference(proximal, dtype, last):
    weights, logs, scales = layers(3, dtype, shapes=NATIVE_SHAPES)
    if last:
        weights = [w.to(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
    matrix = torch.cat(logs, 1)
    rates = [1e-3 * (index + 1) for index in range(len(weights))]
    moves = [torch.randn_like(w) for w in weights]
    tables = [LassoTable([w.clone() for w in weights], 3, scales, backend=b) for b in ("native", "reference")]
    assert [table.backend for table in tables] == ["native", "reference"]
    for arguments in ((matrix, rates), (matrix, rates, moves)):
        got, want = (table.log_gradient(*arguments) for table in tables)
        assert relative(got, want) < TOLERANCE[dtype]
    got, want = (table.penalties(matrix) for table in tables)
    assert relative(got, want) < TOLERANCE[dtype]
    assert got.dtype == want.dtype
    step = reference.harden(matrix) if proximal else matrix
    keep = [torch.empty_like(w) for w in weights]
    for table in tables:
        table.shrink(step, rates, proximal=proximal, keep=keep)
    for a, b, kept, old in zip(tables[0].weights, tables[1].weights, keep, weights, strict=True):
        assert relative(a, b) < TOLERANCE[dtype]
        assert torch.equal(kept, old)


@needs_native
def test_native_results_do_not_depend_on_threads_or_runs():
    weights, logs, scales = layers(4, torch.float32, shapes=[(64, 64, 3, 3), (128, 64, 1, 1), (16, 8, 3, 3)])
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        value, first, second = second_order(with_backend("native"), weights, logs, scales)
        results.append([value, *first, *second])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_native_step_raises_the_version_of_the_weights():
    weights, logs, scales = layers()
    table = LassoTable(weights, 3, scales, backend="native")
    before = [w._version for w in weights]
    table.shrink(torch.cat(logs, 1), [1e-3] * 4)
    assert all(w._version > old for w, old in zip(weights, before, strict=True))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_is_finite_at_zero(dtype):
    weights, _, scales = layers(dtype=dtype, shapes=NATIVE_SHAPES)
    weights[0].zero_()
    weights[2][:, 4] = 0
    weights[2][3] = 0
    logs = [hard_logs([o % 2 for o in range(w.shape[0])], 3, dtype) for w in weights]
    value, first, second = second_order(with_backend("native"), weights, logs, scales)
    assert all(t.isfinite().all() for t in [value, *first, *second])
    weights[1][0, 0] = math.nan
    assert (
        group_lasso(weights, logs, scales, backend="native").isnan().tolist() == [False, True] + [False] * 5
    )


@needs_native
def test_strided_weights_and_matrices_are_read_rightly():
    weights, logs, scales = layers(3, torch.float32, shapes=[(6, 4, 3, 3), (6, 4, 3, 3)])
    wide = [torch.stack([w, w], -1)[..., 1] for w in weights]
    columns = [torch.cat([log, log], 1)[:, 6:] for log in logs]
    transposed = [log.t().contiguous().t() for log in logs]
    want = second_order(with_backend("reference"), weights, logs, scales)
    for a, b in ((wide, logs), (weights, columns), (weights, transposed)):
        penalties = group_lasso(a, b, scales, backend="native")
        assert torch.allclose(penalties, want[0], rtol=1e-6)
    table = LassoTable(wide, 3, scales)
    twin = LassoTable([w.clone() for w in weights], 3, scales, backend="reference")
    for one in (table, twin):
        one.shrink(torch.cat(logs, 1), [1e-3] * 2)
    assert all(torch.allclose(a, b) for a, b in zip(table.weights, twin.weights, strict=True))


@needs_native
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"logs": lambda log: log[:, 2:4]},
            r"log_probabilities\[1\]: shape: expected \(groups, 6\), got \(3, 2\)",
        ),
        ({"logs": lambda log: log.float()}, r"log_probabilities\[1\]: dtype"),
        ({"logs": lambda log: log[0]}, r"log_probabilities\[1\]: shape"),
        ({"logs": lambda log: log[:0]}, r"log_probabilities\[1\]: shape"),
        ({"weights": lambda weight: weight[:4]}, r"log_probabilities\[1\]: shape"),
        ({"weights": lambda weight: weight.float()}, r"weights\[1\]: accumulation dtype"),
        ({"weights": lambda weight: weight[:0]}, r"weights\[1\]: expected a filled"),
        ({"logs": None}, "log_probabilities: number of layers: expected 2, got 1"),
        ({"scales": None}, "scales: number of layers: expected 2, got 1"),
        ({"grad": lambda grad: grad[:1]}, r"grad: shape: expected \(2,\), got \(1,\)"),
        ({"towards": lambda towards: towards[:4]}, r"weight_directions\[1\]: shape"),
        ({"log_towards": lambda towards: towards[:, 2:4]}, r"log_directions\[1\]: shape"),
        ({"log_towards": lambda towards: towards.float()}, r"log_directions\[1\]: dtype"),
    ],
)
def test_native_operators_refuse_what_they_would_read_past_its_end(change, text):
    weights, logs, scales = layers(shapes=[(4, 6), (6, 4, 3, 3)])
    given = {"weights": weights, "logs": logs, "scales": scales[:2], "grad": torch.ones(2)}
    given |= {"towards": list(weights), "log_towards": list(logs)}
    ((name, changed),) = change.items()
    if changed is None:
        given[name] = given[name][:1]
    elif name == "grad":
        given[name] = changed(given[name])
    else:
        given[name] = [given[name][0], changed(given[name][1])]
    common = (given["weights"], given["logs"], given["scales"], "native")
    with pytest.raises(ValueError, match=text):
        OPS.group_lasso_hessian(given["grad"], given["towards"], given["log_towards"], *common)
    if name in ("weights", "logs", "scales", "grad"):
        with pytest.raises(ValueError, match=text):
            OPS.group_lasso_backward(given["grad"], *common)
    if name in ("weights", "logs", "scales"):
        with pytest.raises(ValueError, match=text):
            OPS.group_lasso(*common)


@needs_native
def test_native_hessian_casts_the_directions_of_weights():
    weights, logs, scales = layers(shapes=SHAPES[:2])
    towards, grad = [w.float() for w in weights], torch.ones(2, dtype=torch.float64)
    got, want = (
        OPS.group_lasso_hessian(grad, taken, logs, weights, logs, scales[:2], "native")
        for taken in (towards, [t.double() for t in towards])
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_native
def test_layers_may_differ_in_their_number_of_groups():
    weights, _, scales = layers(shapes=SHAPES[:3])
    logs = [
        torch.log_softmax(torch.randn(g, w.shape[0], dtype=torch.float64), 0)
        for g, w in zip((2, 5, 2), weights, strict=True)
    ]
    got = second_order(with_backend("native"), weights, logs, scales[:3])
    want = second_order(reference.group_lasso_definition, weights, logs, scales[:3])
    for a, b in zip([got[0], *got[1], *got[2]], [want[0], *want[1], *want[2]], strict=True):
        assert relative(a, b) < 1e-9


@needs_native
def test_half_weights_take_the_reference_and_refuse_the_native_backend():
    weights, logs, scales = layers(3, torch.bfloat16, shapes=[(8, 4, 3, 3)])
    assert LassoTable(weights, 3, scales).backend == "reference"
    with pytest.raises(ValueError, match="backend 'native' cannot run here"):
        group_lasso(weights, logs, scales, backend="native")


@needs_native
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"operation": 9}, "unknown operation"),
        ({"element": 2}, "unknown element"),
        ({"groups": 0}, "number of groups"),
        ({"threads": 0}, "threads"),
        ({"words_numel": 14}, "wrong length"),
        ({"numbers_numel": 1}, "wrong length"),
        ({"words": 0}, "missing"),
        ({4: 35}, "size is not filters x channels x taps"),
        ({5: 0}, "no filters"),
        ({6: -3}, "no filters"),
        ({5: 1 << 40, 6: 1 << 40}, "lasso"),
        ({9: 0}, "lacks its weight or log-probabilities"),
        ({10: 3}, "rows of the log-probabilities overlap"),
        ({"operation": 2}, "Hessian product needs both directions"),
        ({"operation": 3, 2: 0}, "needs an output for the weights"),
        ({"operation": 5}, "needs an output"),
        ({14: 1, 13: 8}, "rows of the output overlap"),
    ],
)
def test_the_core_refuses_a_table_that_does_not_fit(change, text):
    from array import array

    from dsp_kernels.backends import native_module

    weight, log = torch.ones(4, 3, 3), torch.zeros(2, 4)
    words = [weight.data_ptr(), 0, 0, 0, 36, 4, 3, 3, 0, log.data_ptr(), 4, 0, 0, 0, 0]
    for key, value in change.items():
        if isinstance(key, int):
            words[key] = value
    table, numbers = array("q", words), array("d", [1.0, 1.0])
    arguments = {
        "operation": 0,
        "element": 0,
        "words": table.buffer_info()[0],
        "words_numel": 15,
        "numbers": numbers.buffer_info()[0],
        "numbers_numel": 2,
        "groups": 2,
        "penalties": 0,
        "threads": 1,
    }
    module = native_module()
    assert module.lasso(**arguments) == 0 or any(isinstance(key, int) for key in change)
    arguments.update({key: value for key, value in change.items() if isinstance(key, str)})
    assert module.lasso(**arguments) != 0
    assert text in module.last_error()


# ---- what is kept on a device ----


def test_another_stream_waits_for_what_is_kept(monkeypatch):
    from dsp_kernels.assignment import launch

    class Stream:
        def __init__(self, handle):
            self.cuda_stream, self.seen = handle, []

        def record_event(self):
            self.seen.append("recorded")
            return f"event of {self.cuda_stream}"

        def wait_event(self, event):
            self.seen.append(event)

    first, second = Stream(0), Stream(5)
    now = {"stream": first, "capturing": False}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now["stream"])
    monkeypatch.setattr(launch, "capturing", lambda: now["capturing"])
    store, device = {}, torch.device("cuda", 0)

    def take():
        return launch.remembered(store, "key", lambda: first.seen.append("made") or "value", device)

    assert take() == take() == "value"
    assert first.seen == ["made", "recorded"]  # and no wait in the same stream
    now["stream"] = second
    assert take() == "value" and second.seen == ["event of 0"]
    now["capturing"] = True
    assert take() == "value" and second.seen == ["event of 0"]
