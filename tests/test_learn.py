"""Group learning: the logits' gradient against autograd, what a step leaves alone, resuming, bad input."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from dsp_kernels.assignment.reference import group_lasso_definition
from dsprune import learn
from dsprune.graph import ConvInfo, prunable_convs
from dsprune.learn import GroupLearner
from dsprune.models import cifar_resnet

GROUPS = 3


class Net(nn.Module):
    """A stem, three prunable convolutions (one without BatchNorm), dropout on demand, a classifier."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 1)
        self.third = nn.Conv2d(6, 5, (1, 3), padding=(0, 1), stride=2)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.norm(self.first(x)))
        x = self.dropout(torch.tanh(self.second(x)))
        return self.head(torch.tanh(self.third(x)).mean((2, 3)))


NAMES = ("first", "second", "third")
_FOUND: list[ConvInfo] = []


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def found_once(monkeypatch):
    """The search for prunable convolutions exports the model, half a second each time: once is enough."""

    def search(model, example_input):
        if not isinstance(model, Net) or any(m._forward_pre_hooks for m in model.modules()):
            return prunable_convs(model, example_input)
        if not _FOUND:
            _FOUND.extend(prunable_convs(model, example_input))
        return list(_FOUND)

    monkeypatch.setattr(learn, "prunable_convs", search)


def make(dtype=torch.float64, dropout=0.0, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    torch.manual_seed(seed)
    model = Net(dropout).to(dtype)
    x = torch.randn(6, 3, 6, 6, dtype=dtype, generator=generator)
    y = torch.randint(0, 4, (6,), generator=generator)
    return model, x, y


def make_learner(model, x, **keywords):
    options = {"groups": GROUPS, "strength": 0.05, "total_steps": 10, **keywords}
    return GroupLearner(model, x[:1], **options)


def closure_of(model, x, y):
    return lambda: F.cross_entropy(model(x), y)


def spread_logits(learner, seed=7):
    """Logits far from a tie, so that groups differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for logits in learner.logits.values():
            logits.copy_(torch.randn(logits.shape, generator=generator, dtype=torch.float64))


def sgd(model, lr=0.1, **keywords):
    return torch.optim.SGD(model.parameters(), lr=lr, **keywords)


OPTIMIZERS = {
    "sgd": sgd,
    "momentum": lambda m: sgd(m, momentum=0.9, weight_decay=1e-2),
    "dampened": lambda m: sgd(m, momentum=0.9, dampening=0.3),
    "nesterov": lambda m: sgd(m, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "maximize": lambda m: sgd(m, lr=1e-3, momentum=0.5, maximize=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, weight_decay=1e-2),
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, amsgrad=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-2, momentum=0.5, centered=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=1e-2),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=1e-3),
    "adadelta": lambda m: torch.optim.Adadelta(m.parameters(), lr=0.5),
}


def bits(value):
    """A deep copy of optimizer state that compares by value."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, tuple(value.shape), value.detach().clone().reshape(-1).tolist())
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(entry) for entry in value]
    return value


# ---- the gradient of the logits ----


def objective_gradient(model, x, y, learner, weights, rates, factor):
    """Autograd through L(W') + factor R(W', p), W' = W - rate dR/dW(W, p), for the logits.

    ``weights`` are those between the ordinary step and the penalty step, buffers those of then.
    """
    soft = learner.probabilities
    logits = {name: torch.zeros_like(p, requires_grad=True) for name, p in soft.items()}
    # Softmax is blind to a constant: log p stands for the scores, whose derivative for the logits is
    # 1/temperature.
    logs = {name: torch.log_softmax(soft[name].log() + logits[name] / 0.5, 0) for name in soft}
    leaves = {name: weights[f"{name}.weight"].clone().requires_grad_() for name in soft}
    scales = learner.scales
    penalties = {
        name: group_lasso_definition([leaves[name]], [logs[name]], [scales[name]]).sum() for name in soft
    }
    grads = torch.autograd.grad(sum(penalties.values()), list(leaves.values()), create_graph=True)
    moved = {
        name: leaf - rates[name] * grad for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    state = {**weights, **{f"{name}.weight": value for name, value in moved.items()}}
    loss = F.cross_entropy(functional_call(model, state, (x,)), y)
    penalty = sum(group_lasso_definition([moved[n]], [logs[n]], [scales[n]]).sum() for n in soft)
    return dict(zip(soft, torch.autograd.grad(loss + factor * penalty, list(logits.values())), strict=True))


def state_after_ordinary_step(model, x, y, make_optimizer):
    """The weights and buffers that the ordinary step alone leaves, on a copy."""
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(twin)
    closure_of(twin, x, y)().backward()
    optimizer.step()
    return {name: value.detach().clone() for name, value in twin.state_dict().items()}


def cosine_and_ratio(got, want):
    got, want = torch.cat([t.flatten() for t in got]), torch.cat([t.flatten() for t in want])
    ratio = (got @ want / (want @ want)).item()
    return ((got - ratio * want).norm() / got.norm()).item(), ratio


@pytest.mark.parametrize("scale", ["paper", "released"])
@pytest.mark.parametrize("seed", [0, 1])
def test_plain_sgd_gives_autograds_gradient_of_the_one_step_objective(scale, seed):
    model, x, y = make(seed=seed)
    learner = make_learner(model, x, scale=scale, strength=0.4, seed=seed)
    spread_logits(learner)
    weights = state_after_ordinary_step(model, x, y, sgd)
    learner.step(closure_of(model, x, y), sgd(model))
    factor = 0.4 * 1 / 10
    want = objective_gradient(model, x, y, learner, weights, dict.fromkeys(NAMES, 0.1 * factor), factor)
    error, ratio = cosine_and_ratio([learner.logits[n].grad for n in NAMES], [want[n] for n in NAMES])
    assert error < 1e-9
    assert ratio == pytest.approx(1 / factor, rel=1e-9)


def test_the_gradient_holds_with_one_learning_rate_for_each_layer():
    rates = {"first": 0.2, "second": 0.05, "third": 0.11}

    def grouped(model):
        layers = [{"params": [getattr(model, n).weight], "lr": lr} for n, lr in rates.items()]
        known = {id(p) for group in layers for p in group["params"]}
        rest = [p for p in model.parameters() if id(p) not in known]
        return torch.optim.SGD([{"params": rest}, *layers], lr=0.01)

    model, x, y = make()
    learner = make_learner(model, x, strength=0.4)
    spread_logits(learner)
    weights = state_after_ordinary_step(model, x, y, grouped)
    learner.step(closure_of(model, x, y), grouped(model))
    moves = {name: lr * 0.04 for name, lr in rates.items()}
    want = objective_gradient(model, x, y, learner, weights, moves, 0.04)
    error, _ = cosine_and_ratio([learner.logits[n].grad for n in NAMES], [want[n] for n in NAMES])
    assert error < 1e-9


def test_the_mixed_term_matters_and_first_order_leaves_it_out():
    gradients = {}
    for order in ("exact", "first", "released"):
        model, x, y = make()
        learner = make_learner(model, x, order=order, strength=0.4)
        spread_logits(learner)
        learner.step(closure_of(model, x, y), sgd(model))
        gradients[order] = torch.cat([p.grad.flatten() for p in learner.logits.values()])
    exact = gradients["exact"]
    for order in ("first", "released"):
        assert (exact - gradients[order]).norm() / exact.norm() > 1e-3


def test_first_order_gradient_is_the_penaltys_at_the_adapted_weights():
    model, x, y = make()
    learner = make_learner(model, x, order="first", strength=0.4)
    spread_logits(learner)
    weights = state_after_ordinary_step(model, x, y, sgd)
    learner.step(closure_of(model, x, y), sgd(model))
    for name in NAMES:
        weight = weights[f"{name}.weight"].clone().requires_grad_()
        logs = learner.probabilities[name].log()
        penalty = group_lasso_definition([weight], [logs], [learner.scales[name]]).sum()
        (grad,) = torch.autograd.grad(penalty, weight)
        moved = (weight - 0.1 * 0.04 * grad).detach()
        shift = torch.zeros_like(logs, requires_grad=True)
        soft = torch.log_softmax(logs + shift / 0.5, 0)
        (want,) = torch.autograd.grad(
            group_lasso_definition([moved], [soft], [learner.scales[name]]).sum(), shift
        )
        assert (learner.logits[name].grad - want).norm() / want.norm() < 1e-9


def test_first_order_calls_the_closure_once_and_exact_twice():
    for order, calls in (("first", 1), ("exact", 2), ("released", 2)):
        model, x, y = make()
        count = []
        learner = make_learner(model, x, order=order)
        learner.step(lambda m=model, c=count, x=x, y=y: c.append(1) or F.cross_entropy(m(x), y), sgd(model))
        assert len(count) == calls


def test_released_gradient_follows_the_released_formulas_group_by_group():
    model, x, y = make()
    learner = make_learner(model, x, order="released", strength=0.4)
    spread_logits(learner)
    weights = state_after_ordinary_step(model, x, y, sgd)
    twin, rate, eps = copy.deepcopy(model), 0.1 * 0.04, 1e-8
    learner.step(closure_of(model, x, y), sgd(model))

    def penalty_of(w, p, scale):
        out = torch.zeros_like(w)
        for row in p:
            member = row.view(-1, 1, 1, 1) * w
            norm = member.square().sum((0, 2, 3), keepdim=True).sqrt()
            out += scale * row.sqrt().sum() ** 2 * row.view(-1, 1, 1, 1) * member / (norm + eps)
        return out

    soft, scales = learner.probabilities, learner.scales
    adapted = {
        n: weights[f"{n}.weight"] - rate * penalty_of(weights[f"{n}.weight"], soft[n], scales[n])
        for n in NAMES
    }
    twin.load_state_dict({**weights, **{f"{n}.weight": w for n, w in adapted.items()}})
    closure_of(twin, x, y)().backward()
    for name in NAMES:
        old, p = weights[f"{name}.weight"], soft[name]
        there = adapted[name] - 0.1 * twin.get_submodule(name).weight.grad
        there_after = there - rate * penalty_of(there, p, scales[name])
        move = there_after - adapted[name]
        grads = []
        for row in p:
            size, root = row.sqrt().sum() ** 2, row.sqrt() / (row.sqrt().sum() * row + eps)
            column = row.view(-1, 1, 1, 1)
            norm = (column * there).square().sum((0, 2, 3), keepdim=True).sqrt()
            grad = size * (column * there / (norm + eps) * there).sum((1, 2, 3)) + norm.sum() * size * root
            member = column * old
            norm = member.square().sum((0, 2, 3), keepdim=True).sqrt()
            unit = member / (norm + eps)
            bend = 1 / (norm + eps) - member.sum((0, 2, 3), keepdim=True) / (norm**2 + eps) * unit
            grad = grad + (move * (size * unit + size * column * bend * old)).sum((1, 2, 3))
            grads.append(grad + (move * unit * column).sum() * size * root)
        whole = p * torch.stack(grads)
        want = (whole - p * whole.sum(0)) / 0.5
        assert (learner.logits[name].grad - want).norm() / want.norm() < 1e-9


def test_logits_follow_torchs_adam():
    model, x, y = make()
    learner = make_learner(model, x, alpha_lr=3e-3, alpha_eps=1e-8)
    twins = [nn.Parameter(p.detach().clone()) for p in learner.logits.values()]
    adam = torch.optim.Adam(twins, lr=3e-3, eps=1e-8)
    optimizer = sgd(model)
    for _ in range(4):
        learner.step(closure_of(model, x, y), optimizer)
        for twin, logits in zip(twins, learner.logits.values(), strict=True):
            twin.grad = logits.grad.clone()
        adam.step()
    for twin, logits in zip(twins, learner.logits.values(), strict=True):
        assert torch.allclose(twin, logits, rtol=1e-12, atol=1e-15)


# ---- what a step leaves alone ----


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("order", ["exact", "released"])
def test_look_ahead_leaves_weights_buffers_and_optimizer_state_bit_equal(name, order):
    """With strength 0 a step is the ordinary step and a look-ahead that must leave no trace."""
    model, x, y = make(torch.float32, dropout=0.3)
    twin = copy.deepcopy(model)
    optimizer, other = OPTIMIZERS[name](model), OPTIMIZERS[name](twin)
    learner = make_learner(model, x, strength=0.0, order=order)
    for seed in range(3):
        torch.manual_seed(seed)
        loss = learner.step(closure_of(model, x, y), optimizer)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        other.zero_grad()
        want = closure_of(twin, x, y)()
        want.backward()
        other.step()
        assert torch.equal(loss, want.detach())
        assert torch.equal(torch.get_rng_state(), state)
    for (key, value), reference in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, reference), key
    assert bits(optimizer.state_dict()) == bits(other.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_displacement_is_the_move_the_optimizer_would_make(name):
    model, x, y = make()
    optimizer = OPTIMIZERS[name](model)
    learner = make_learner(model, x)
    for _ in range(3):
        learner.step(closure_of(model, x, y), optimizer)
    closure_of(model, x, y)().backward()
    twin = copy.deepcopy((model, optimizer))
    for copied, original in zip(twin[0].parameters(), model.parameters(), strict=True):
        copied.grad = original.grad.clone()
    before = bits(optimizer.state_dict())
    groups = learner._parameter_groups(optimizer)
    moves = learner._displacements(optimizer, groups)
    assert bits(optimizer.state_dict()) == before
    start = {n: twin[0].get_submodule(n).weight.detach().clone() for n in NAMES}
    twin[1].step()
    for name, move in zip(NAMES, moves, strict=True):
        want = twin[0].get_submodule(name).weight.detach() - start[name]
        assert (move - want).norm() / want.norm() < 1e-12


def test_first_steps_state_is_dropped_with_the_look_ahead_when_there_was_none():
    model, x, y = make()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-2)
    learner = make_learner(model, x)
    closure_of(model, x, y)().backward()
    learner._displacements(optimizer, learner._parameter_groups(optimizer))
    assert len(optimizer.state) == 0


def test_optimizer_tensors_keep_their_identity():
    model, x, y = make()
    for kind in ("momentum", "rmsprop"):
        optimizer = OPTIMIZERS[kind](model)
        learner = make_learner(model, x)
        learner.step(closure_of(model, x, y), optimizer)
        held = {id(t) for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)}
        learner.step(closure_of(model, x, y), optimizer)
        again = {id(t) for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)}
        assert held == again


def test_step_hooks_and_tensor_learning_rates_take_the_general_way():
    model, x, y = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1, dtype=torch.float64))
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    learner = make_learner(model, x)
    learner.step(closure_of(model, x, y), optimizer)
    assert len(calls) == 2 and optimizer.param_groups[0]["lr"].item() == 0.1


def test_batch_norm_statistics_are_those_of_one_forward():
    model, x, y = make()
    make_learner(model, x).step(closure_of(model, x, y), sgd(model))
    assert model.norm.num_batches_tracked.item() == 1


def test_dropout_draws_the_same_masks_in_the_look_ahead():
    model, x, y = make(dropout=0.5)
    masks = []
    learner = make_learner(model, x)
    model.dropout.register_forward_hook(lambda m, i, out: masks.append((out == 0).clone()))
    learner.step(closure_of(model, x, y), sgd(model))
    assert len(masks) == 2 and torch.equal(masks[0], masks[1]) and masks[0].any()


def test_making_a_learner_changes_nothing():
    model, x, _ = make()
    model.train()
    model.norm.eval()
    before, random = bits(model.state_dict()), torch.get_rng_state()
    make_learner(model, x, scale="released")
    assert bits(model.state_dict()) == before
    assert model.training and not model.norm.training
    assert torch.equal(torch.get_rng_state(), random)


def test_an_interrupted_look_ahead_restores_everything():
    model, x, y = make(torch.float32, dropout=0.2)
    optimizer = OPTIMIZERS["momentum"](model)
    learner = make_learner(model, x)
    learner.step(closure_of(model, x, y), optimizer)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    calls = []

    def interrupted():
        calls.append(1)
        if len(calls) == 2:
            model(x)
            raise KeyboardInterrupt
        return F.cross_entropy(model(x), y)

    logits = bits(dict(learner.logits))
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        learner.step(interrupted, optimizer)
    random = torch.get_rng_state()
    torch.manual_seed(3)
    twin_optimizer.zero_grad()
    closure_of(twin, x, y)().backward()
    twin_optimizer.step()
    assert bits(model.state_dict()) == bits(twin.state_dict())
    assert bits(optimizer.state_dict()) == bits(twin_optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), random)
    assert bits(dict(learner.logits)) == logits


def test_a_failing_optimizer_in_the_look_ahead_restores_everything():
    model, x, y = make()
    optimizer = OPTIMIZERS["rmsprop"](model)
    learner = make_learner(model, x, strength=0.0)
    learner.step(closure_of(model, x, y), optimizer)
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no")

    optimizer.register_step_post_hook(fail)
    twin = copy.deepcopy(model)
    twin_optimizer = OPTIMIZERS["rmsprop"](twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="no"):
        learner.step(closure_of(model, x, y), optimizer)
    closure_of(twin, x, y)().backward()
    twin_optimizer.step()
    assert bits(model.state_dict()) == bits(twin.state_dict())
    assert bits(optimizer.state_dict()) == bits(twin_optimizer.state_dict())


def test_gradients_are_cleared():
    model, x, y = make()
    for order in ("exact", "first"):
        make_learner(model, x, order=order).step(closure_of(model, x, y), sgd(model))
        assert all(p.grad is None for p in model.parameters())


def test_the_loss_is_the_ordinary_one_and_detached():
    model, x, y = make()
    want = closure_of(copy.deepcopy(model), x, y)().item()
    loss = make_learner(model, x).step(closure_of(model, x, y), sgd(model))
    assert loss.item() == want and not loss.requires_grad and loss.ndim == 0


# ---- the penalty step ----


@pytest.mark.parametrize("scale", ["paper", "released"])
def test_scales(scale):
    model, x, _ = make()
    scales = make_learner(model, x, scale=scale).scales
    volumes = {"first": 6 * 6 * 6, "second": 8 * 6 * 6, "third": 6 * 6 * 6}
    for name in NAMES:
        weight = model.get_submodule(name).weight
        want = math.sqrt(weight[0, 0].numel()) * (GROUPS / weight.shape[0]) ** 1.5
        if scale == "released":
            want *= math.sqrt(volumes[name] / (16 * 32 * 32))
        assert scales[name] == pytest.approx(want, rel=1e-12)


def test_square_kernels_scale_by_their_side():
    model = cifar_resnet(20)
    learner = GroupLearner(model, torch.randn(1, 3, 32, 32), groups=4, strength=1e-3, total_steps=1)
    name = learner.names[0]
    assert learner.scales[name] == pytest.approx(3 * (4 / 16) ** 1.5)
    assert len(learner.names) == 18


@pytest.mark.parametrize("update", ["subgradient", "proximal"])
def test_the_hard_penalty_step_is_taken_on_the_real_weights(update):
    model, x, y = make()
    learner = make_learner(model, x, strength=20.0, update=update)
    spread_logits(learner)
    weights = state_after_ordinary_step(model, x, y, lambda m: sgd(m, momentum=0.9))
    learner.step(closure_of(model, x, y), sgd(model, momentum=0.9))
    rate = 20.0 * 0.1 / 10
    zeros = 0
    for name, index in learner.assignment().items():
        old, new = weights[f"{name}.weight"], model.get_submodule(name).weight.detach()
        want = torch.zeros_like(old)
        for group in range(GROUPS):
            members = index == group
            size = float(members.sum()) ** 2 * learner.scales[name]
            norms = old[members].square().sum((0, 2, 3), keepdim=True).sqrt()
            factor = 1 - rate * size / norms
            want[members] = old[members] * (factor.clamp(min=0) if update == "proximal" else factor)
        assert torch.allclose(new, want, rtol=1e-11, atol=1e-15)
        zeros += int((new == 0).sum())
    assert (zeros > 0) == (update == "proximal")


def test_proximal_zeros_are_exact_and_stay_finite():
    model, x, y = make(torch.float32)
    learner = make_learner(model, x, strength=50.0, update="proximal", total_steps=1)
    optimizer = OPTIMIZERS["momentum"](model)
    for _ in range(4):
        loss = learner.step(closure_of(model, x, y), optimizer)
    assert loss.isfinite()
    assert all(
        torch.equal(model.get_submodule(n).weight, torch.zeros_like(model.get_submodule(n).weight))
        for n in NAMES
    )
    assert all(p.grad.isfinite().all() for p in learner.logits.values())


@pytest.mark.parametrize("order", ["exact", "first", "released"])
@pytest.mark.parametrize("update", ["subgradient", "proximal"])
def test_zero_weights_give_no_nan(order, update):
    model, x, y = make(torch.float32)
    with torch.no_grad():
        model.first.weight.zero_()
        model.second.weight[:, 2] = 0
        model.second.weight[1] = 0
    learner = make_learner(model, x, order=order, update=update)
    optimizer = sgd(model)
    for _ in range(3):
        learner.step(closure_of(model, x, y), optimizer)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in learner.logits.values())


def test_the_ramp_grows_with_the_steps_and_stays_at_one():
    model, x, y = make()
    learner = make_learner(model, x, strength=0.5, total_steps=2, order="first")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    shrink = learner._table.shrink
    learner._table.shrink = lambda logs, rates, **k: (seen.append(rates), shrink(logs, rates, **k))[1]
    for _ in range(3):
        learner.step(closure_of(model, x, y), optimizer)
    assert [r[0] for r in seen] == pytest.approx([0.5 * 0.1 * 0.5, 0.5 * 0.1, 0.5 * 0.1])


def test_learning_rate_schedulers_are_followed():
    model, x, y = make()
    learner = make_learner(model, x, strength=0.5)
    optimizer = OPTIMIZERS["momentum"](model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    learner.step(closure_of(model, x, y), optimizer)
    scheduler.step()
    before = {n: model.get_submodule(n).weight.detach().clone() for n in NAMES}
    learner.step(closure_of(model, x, y), optimizer)  # lr 0: nothing moves, and nothing breaks
    assert all(torch.equal(before[n], model.get_submodule(n).weight) for n in NAMES)
    assert all(p.grad.isfinite().all() for p in learner.logits.values())


def test_one_group_works():
    model, x, y = make()
    learner = make_learner(model, x, groups=1)
    learner.step(closure_of(model, x, y), sgd(model))
    assert all(torch.equal(a, torch.zeros_like(a)) for a in learner.assignment().values())


def test_more_groups_than_filters_work():
    model, x, y = make()
    learner = make_learner(model, x, groups=9)
    learner.step(closure_of(model, x, y), sgd(model))
    assert all(p.isfinite().all() for p in learner.logits.values())


# ---- closures, scalers, wrappers ----


def test_accumulation_over_micro_batches_is_the_mean():
    model, x, y = make()
    model.norm.eval()
    twin = copy.deepcopy(model)
    learner, other = make_learner(model, x), make_learner(twin, x)
    parts = [closure_of(model, x[:3], y[:3]), closure_of(model, x[3:], y[3:])]
    loss = learner.step(parts, sgd(model))
    want = other.step(closure_of(twin, x, y), sgd(twin))
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    for a, b in zip(learner.logits.values(), other.logits.values(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-14)


def test_autocast_in_the_closure():
    model, x, y = make(torch.float32)
    learner = make_learner(model, x)

    def closure():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x), y)

    optimizer = sgd(model)
    for _ in range(2):
        loss = learner.step(closure, optimizer)
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in learner.logits.values())


def test_a_grad_scaler_changes_nothing_but_rounding():
    results = []
    for scaled in (False, True):
        model, x, y = make()
        learner = make_learner(model, x)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        optimizer = OPTIMIZERS["momentum"](model)
        for _ in range(3):
            learner.step(closure_of(model, x, y), optimizer, scaler=scaler)
        results.append([model.first.weight.detach(), *(p.grad for p in learner.logits.values())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


def test_a_step_that_the_scaler_skips_leaves_weights_and_logits():
    model, x, y = make(torch.float32)
    learner = make_learner(model, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = sgd(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = {name: p.detach().clone() for name, p in learner.logits.items()}
    learner.step(lambda: closure_of(model, x, y)() * math.inf, optimizer, scaler=scaler)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, logits[name]) for name, p in learner.logits.items())
    assert learner.steps == 1 and scaler.get_scale() == 1.0


def test_an_overflow_in_the_look_ahead_alone_keeps_the_logits():
    model, x, y = make(torch.float32)
    learner = make_learner(model, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    calls = []

    def closure():
        calls.append(1)
        return closure_of(model, x, y)() * (math.inf if len(calls) == 2 else 1.0)

    learner.step(closure, sgd(model), scaler=scaler)
    assert all(torch.equal(p, torch.zeros_like(p)) for p in learner.logits.values())
    assert all(p.isfinite().all() for p in model.parameters())


def test_grad_hook_clips_both_gradients():
    model, x, y = make()
    norms = []
    learner = make_learner(model, x)
    learner.step(
        closure_of(model, x, y),
        sgd(model),
        grad_hook=lambda: norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item()),
    )
    assert len(norms) == 2 and min(norms) > 1e-3


def test_a_compiled_model_is_looked_through():
    model, x, y = make(torch.float32)
    compiled = torch.compile(model, backend="eager")
    learner = make_learner(compiled, x)
    assert learner.names == NAMES
    learner.step(closure_of(compiled, x, y), sgd(compiled))
    assert learner.logits["first"].grad.isfinite().all()


def test_data_parallel_is_looked_through(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model, x, y = make(torch.float32)
        twin = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        learner, other = make_learner(wrapped, x), make_learner(twin, x)
        for _ in range(2):
            learner.step(closure_of(wrapped, x, y), sgd(wrapped, momentum=0.9))
            other.step(closure_of(twin, x, y), sgd(twin, momentum=0.9))
        assert learner.names == NAMES
        for a, b in zip(learner.logits.values(), other.logits.values(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


# ---- seeds, results, resuming ----


def train(model, x, y, learner, optimizer, steps):
    for _ in range(steps):
        learner.step(closure_of(model, x, y), optimizer)


def test_the_seed_reproduces_and_matters():
    outcomes = {}
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        model, x, y = make(torch.float32)
        learner = make_learner(model, x, seed=seed)
        torch.manual_seed(hash(run) % 1000)  # the global generator has no part in it
        train(model, x, y, learner, OPTIMIZERS["momentum"](model), 4)
        outcomes[run] = [*model.state_dict().values(), *learner.logits.values()]
    assert all(torch.equal(a, b) for a, b in zip(outcomes["a"], outcomes["b"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(outcomes["a"], outcomes["c"], strict=True))


def test_a_given_generator_is_used():
    model, x, y = make(torch.float32)
    generator = torch.Generator().manual_seed(4)
    start = generator.get_state()
    train(model, x, y, make_learner(model, x, generator=generator), sgd(model), 1)
    assert not torch.equal(generator.get_state(), start)


@pytest.mark.parametrize("order", ["exact", "first", "released"])
def test_resuming_gives_the_bits_of_an_uninterrupted_run(order, tmp_path):
    model, x, y = make(torch.float32, dropout=0.2)
    optimizer = OPTIMIZERS["momentum"](model)
    learner = make_learner(model, x, order=order)
    train(model, x, y, learner, optimizer, 3)
    state = learner.state_dict()
    meta = json.loads(json.dumps(state["meta"]))
    torch.save(state["tensors"], tmp_path / "learner.pt")
    held = copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.get_rng_state()
    train(model, x, y, learner, optimizer, 3)

    again, _, _ = make(torch.float32, dropout=0.2, seed=5)
    (weights, optimizer_state), random = held
    again.load_state_dict(weights)
    other = OPTIMIZERS["momentum"](again)
    other.load_state_dict(optimizer_state)
    torch.set_rng_state(random)
    resumed = make_learner(again, x, order=order, seed=9)
    resumed.load_state_dict({"meta": meta, "tensors": torch.load(tmp_path / "learner.pt", weights_only=True)})
    assert resumed.steps == 3
    train(again, x, y, resumed, other, 3)
    assert bits(again.state_dict()) == bits(model.state_dict())
    assert bits(resumed.state_dict()["tensors"]) == bits(learner.state_dict()["tensors"])
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(resumed.logits.values(), learner.logits.values(), strict=True)
    )


def test_state_dict_is_a_copy():
    model, x, y = make()
    learner = make_learner(model, x)
    state = learner.state_dict()
    before = bits(state["tensors"])
    train(model, x, y, learner, sgd(model), 1)
    assert bits(state["tensors"]) == before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s["meta"].update(format=99), "format 99, expected 1"),
        (lambda s: s["meta"].update(layers=[["first", 8]]), "other prunable convolutions"),
        (lambda s: s["meta"]["settings"].update(temperature=0.7), "temperature is 0.7"),
        (lambda s: s["meta"]["settings"].update(order="first"), "order is 'first'"),
        (lambda s: s["meta"].update(steps=-1), "steps"),
        (lambda s: s["tensors"].pop("moment"), "moment: expected"),
        (lambda s: s["tensors"].update(logits=torch.zeros(2, 2)), "logits: expected"),
        (lambda s: s["tensors"].update(generator=torch.zeros(3, dtype=torch.uint8)), "generator"),
        (lambda s: s.pop("meta"), "'meta' and 'tensors'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, text):
    model, x, y = make()
    learner = make_learner(model, x)
    train(model, x, y, learner, sgd(model), 1)
    state = make_learner(model, x).state_dict()
    before = bits(learner.state_dict())
    change(state)
    with pytest.raises(ValueError, match=text):
        learner.load_state_dict(state)
    assert bits(learner.state_dict()) == before


def test_a_state_that_is_no_dictionary_is_refused():
    model, x, _ = make()
    with pytest.raises(TypeError, match="state: expected a dictionary"):
        make_learner(model, x).load_state_dict([])


def test_assignment_probabilities_and_penalty():
    model, x, y = make()
    learner = make_learner(model, x)
    assert all(torch.allclose(p, torch.full_like(p, 1 / GROUPS)) for p in learner.probabilities.values())
    spread_logits(learner)
    train(model, x, y, learner, sgd(model), 1)
    assignment = learner.assignment()
    want = 0.0
    for name in NAMES:
        weight = model.get_submodule(name).weight.detach()
        index = assignment[name]
        assert index.dtype == torch.int64 and index.shape == (weight.shape[0],)
        assert torch.equal(index, learner.logits[name].argmax(0))
        p = learner.probabilities[name]
        assert p.shape == (GROUPS, weight.shape[0])
        assert torch.allclose(p.sum(0), torch.ones_like(p[0]))
        for group in range(GROUPS):
            members = index == group
            norms = weight[members].square().sum((0, 2, 3)).sqrt().sum()
            want += learner.scales[name] * float(members.sum()) ** 2 * norms.item()
    assert learner.penalty().item() == pytest.approx(want, rel=1e-12)


def test_the_learned_logits_move_apart():
    model, x, y = make()
    learner = make_learner(model, x, alpha_lr=0.05)
    train(model, x, y, learner, sgd(model), 8)
    assert all(p.std() > 0.01 for p in learner.logits.values())


def test_not_a_number_logits_give_no_assignment():
    model, x, _ = make()
    learner = make_learner(model, x)
    with torch.no_grad():
        learner.logits["first"][0, 0] = math.nan
    with pytest.raises(RuntimeError, match="not finite"):
        learner.assignment()


# ---- bad input ----


def test_excluded_modules_are_left_alone():
    model = cifar_resnet(20)
    x = torch.randn(2, 3, 32, 32)
    every = GroupLearner(model, x, groups=2, strength=1.0, total_steps=1)
    part = every.names[0].rsplit(".", 2)[0]
    learner = GroupLearner(model, x, groups=2, strength=1.0, total_steps=1, exclude=[part, every.names[-1]])
    assert every.names[-1] not in learner.names
    assert learner.names and not any(name.startswith(f"{part}.") for name in learner.names)


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"groups": 0}, ValueError, "groups: expected at least 1"),
        ({"groups": 2.0}, TypeError, "groups: expected an integer"),
        ({"groups": True}, TypeError, "groups: expected an integer"),
        ({"strength": -1.0}, ValueError, "strength"),
        ({"strength": math.nan}, ValueError, "strength"),
        ({"strength": "1"}, TypeError, "strength: expected a number"),
        ({"total_steps": 0}, ValueError, "total_steps"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"scale": "other"}, ValueError, "scale: expected one of paper, released, got 'other'"),
        ({"scale": 1}, TypeError, "scale"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": None}, TypeError, "seed"),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator"),
        ({"alpha_lr": 0.0}, ValueError, "alpha_lr"),
        ({"alpha_eps": 0.0}, ValueError, "alpha_eps"),
        ({"order": "second"}, ValueError, "order: expected one of exact, first, released"),
        ({"update": "none"}, ValueError, "update: expected one of subgradient, proximal"),
        ({"form": "none"}, ValueError, "form: expected one of paper, gumbel"),
        ({"exclude": "first"}, TypeError, "exclude: expected module names"),
        (
            {"exclude": ["nothing"]},
            ValueError,
            "exclude: expected names of modules of the model, got 'nothing'",
        ),
        ({"exclude": NAMES}, ValueError, "model: expected at least one prunable convolution"),
    ],
)
def test_bad_arguments(keywords, error, text):
    model, x, _ = make()
    with pytest.raises(error, match=text):
        make_learner(model, x, **keywords)


def test_a_model_that_is_none_is_refused():
    with pytest.raises(TypeError, match="model"):
        GroupLearner(3, torch.zeros(1, 3, 8, 8), groups=2, strength=1.0, total_steps=1)
    with pytest.raises(TypeError, match="example_input"):
        GroupLearner(Net(), None, groups=2, strength=1.0, total_steps=1)


def test_frozen_and_masked_weights_are_refused_by_name():
    model, x, _ = make()
    model.second.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="'second' does not require a gradient"):
        make_learner(model, x)
    assert make_learner(model, x, exclude=["second"]).names == ("first", "third")
    model.second.weight.requires_grad_(True)
    nn.utils.prune.custom_from_mask(model.third, "weight", torch.ones_like(model.third.weight))
    with pytest.raises(ValueError, match="'third' is not a plain parameter"):
        make_learner(model, x)


def test_bad_step_arguments_change_nothing():
    model, x, y = make()
    learner = make_learner(model, x)
    before = bits(model.state_dict())
    with pytest.raises(TypeError, match="closure"):
        learner.step([], sgd(model))
    with pytest.raises(TypeError, match="optimizer"):
        learner.step(closure_of(model, x, y), None)
    with pytest.raises(TypeError, match="LBFGS"):
        learner.step(closure_of(model, x, y), torch.optim.LBFGS(model.parameters()))
    with pytest.raises(
        ValueError, match="optimizer: the weight of 'first' is in none of its parameter groups"
    ):
        learner.step(closure_of(model, x, y), torch.optim.SGD(model.head.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="closure: expected a function"):
        learner.step(3, sgd(model))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="closure: expected it to return the loss"):
        learner.step(lambda: None, sgd(model))
    with pytest.raises(ValueError, match="requires a gradient"):
        learner.step(lambda: torch.zeros(()), sgd(model))
    with pytest.raises(ValueError, match="one element"):
        learner.step(lambda: model(x), sgd(model))
    assert bits(model.state_dict())["first.weight"] == before["first.weight"]
    assert learner.steps == 0


def test_a_replaced_weight_is_noticed():
    model, x, y = make()
    learner = make_learner(model, x)
    model.second.weight = nn.Parameter(model.second.weight.detach().clone())
    with pytest.raises(RuntimeError, match="weight of 'second' was replaced"):
        learner.step(closure_of(model, x, y), sgd(model))
    model, x, y = make()
    learner = make_learner(model, x)
    model.float()
    with pytest.raises(RuntimeError, match="was replaced, moved or cast"):
        learner.step(closure_of(model, x.float(), y), sgd(model))


def test_loading_weights_after_making_the_learner_is_fine():
    model, x, y = make()
    learner = make_learner(model, x)
    other, _, _ = make(seed=3)
    model.load_state_dict(other.state_dict())
    train(model, x, y, learner, sgd(model), 1)
    assert learner.logits["first"].grad.isfinite().all()
