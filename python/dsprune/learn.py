"""Differentiable group learning: which filters of a convolution belong together (arXiv 2303.09736).

Every step draws one soft assignment p of filters to groups, moves the weights one penalty step with it,
looks at what the loss does there, turns that into a gradient for the assignment's logits, puts everything
back, and takes the penalty step of the hard assignment.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import optimizer as optimizer_module

from dsp_kernels._written import stepped
from dsp_kernels.assignment import LassoTable, sample_groups
from dsp_kernels.assignment.choice import room
from dsp_kernels.assignment.op import FORMS, check_form, check_temperature, standard_gumbel
from dsp_kernels.assignment.reference import harden, sample_groups_backward, spread, square_sum, tap_product

from .graph import as_inputs, prunable_convs, unwrap
from .inputs import own_tensors
from .state import preserved

__all__ = ["GroupLearner"]

ORDERS = ("exact", "first", "released")
UPDATES = ("subgradient", "proximal")
SCALES = ("paper", "released")
_FORMAT = 1
MOST_GROUPS = 4096
_BETAS = (0.9, 0.999)
_RELEASED_EPS = 1e-8

Closure = Callable[[], Tensor]


# ---- arguments


def _one_of(name: str, value: object, accepted: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(accepted)}, got {type(value).__name__}")
    if value not in accepted:
        raise ValueError(f"{name}: expected one of {', '.join(accepted)}, got {value!r}")
    return value


def _integer(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def _finite(name: str, value: object, *, positive: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(
            f"{name}: expected a finite number {'above 0' if positive else 'of at least 0'}, got {value}"
        )
    return float(value)


def _excluded(model: nn.Module, exclude: object) -> tuple[str, ...]:
    if isinstance(exclude, str) or not isinstance(exclude, (Sequence, set, frozenset)):
        raise TypeError(f"exclude: expected module names, got {type(exclude).__name__}")
    known = dict(model.named_modules())
    for name in exclude:
        if name not in known or not name:
            raise ValueError(f"exclude: expected names of modules of the model, got {name!r}")
    return tuple(sorted(exclude))


def _input_volumes(model: nn.Module, names: Sequence[str], inputs: tuple[Any, ...]) -> dict[str, int]:
    """C H W of what each named module reads, for one image; the largest where a module is used more than
    once."""
    volumes: dict[str, int] = {}
    modes = {module: module.training for module in model.modules()}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            volumes[name] = max(volumes.get(name, 0), math.prod(args[0].shape[1:]))

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        model.eval()
        with torch.no_grad(), preserved(model):
            model(*own_tensors(inputs))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return volumes


def _parallel(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The ``DistributedDataParallel`` among a model's wrappers."""
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model.module if isinstance(model, nn.DataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


def _group_of(parallel: nn.parallel.DistributedDataParallel | None, given: Any) -> Any:
    """The process group to share the logits' gradient in; None where there is a single process."""
    if given is None and parallel is not None:
        given = parallel.process_group
    if given is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("process_group: torch.distributed is not initialized")
    if not isinstance(given, dist.ProcessGroup):
        raise TypeError(f"process_group: expected a torch.distributed group, got {type(given).__name__}")
    return given if dist.get_world_size(given) > 1 else None


def _digest(*values: Any) -> int:
    """64 bits that differ where the values (tensors, or what JSON can carry) do."""
    state = hashlib.blake2b(digest_size=8)
    for value in values:
        if isinstance(value, Tensor):
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            state.update(json.dumps(value, sort_keys=True).encode())
    return int.from_bytes(state.digest(), "little", signed=True)


# ---- the look-ahead


def _take(value: Any) -> Any:
    """A snapshot of nested optimizer state that remembers the objects themselves beside their contents."""
    if isinstance(value, Tensor):
        return ("tensor", value, value.detach().clone())
    if isinstance(value, dict):
        return ("dict", value, {key: _take(entry) for key, entry in value.items()})
    if isinstance(value, list):
        return ("list", value, [_take(entry) for entry in value])
    return ("value", value, copy.copy(value))


def _give(snapshot: Any) -> Any:
    """The object of a snapshot, with its contents as they were."""
    kind, target, content = snapshot
    if kind == "tensor":
        target.copy_(content)
    elif kind == "dict":
        restored = {key: _give(entry) for key, entry in content.items()}
        target.clear()
        target.update(restored)
    elif kind == "list":
        target[:] = [_give(entry) for entry in content]
    else:
        return content
    return target


@contextmanager
def _optimizer_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Leaves the optimizer's parameters, state and options bit for bit as they were; new state is dropped."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    options = [
        {key: _take(v) for key, v in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    with torch.no_grad():
        values = [p.detach().clone() for p in parameters]
        states = {p: _take(optimizer.state[p]) for p in parameters if p in optimizer.state}
        others = {key: _take(v) for key, v in optimizer.state.items() if not isinstance(key, Tensor)}
        state: dict[Any, Any] = optimizer.state
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
            for new in [key for key in state if key not in states and key not in others]:
                del state[new]
            for owner, snapshot in (*states.items(), *others.items()):
                state[owner] = _give(snapshot)
            for group, kept in zip(optimizer.param_groups, options, strict=True):
                for key in [key for key in group if key != "params" and key not in kept]:
                    del group[key]
                for key, snapshot in kept.items():
                    group[key] = _give(snapshot)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Leaves every buffer of the model (BatchNorm's statistics) the same object with the same bits."""
    kept = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                if buffer is not None and value is not None:
                    buffer.copy_(value)
                module._buffers[name] = buffer


class RandomState:
    """The state of the random number generators that a forward pass on ``device`` may use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._accelerator = None
        if device.type != "cpu":
            self._accelerator = torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._accelerator is not None:
            torch.get_device_module(self._device).set_rng_state(self._accelerator, self._device)


@contextmanager
def _random_kept(device: torch.device) -> Iterator[None]:
    state = RandomState(device)
    try:
        yield
    finally:
        state.restore()


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    own = (getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post"))
    for_all = (getattr(optimizer_module, f"_global_optimizer_{when}_hooks", None) for when in ("pre", "post"))
    return any(own) or any(hook is not stepped for hooks in for_all for hook in (hooks or {}).values())


def _replaced_step(optimizer: torch.optim.Optimizer) -> bool:
    step = vars(optimizer).get("step")
    if step is None or getattr(step, "__func__", None) is type(optimizer).step:
        return False
    # A learning rate scheduler wraps the method only to count its calls.
    return not hasattr(step, "_wrapped_by_lr_sched")


def _has_formula(optimizer: torch.optim.Optimizer) -> bool:
    """Whether :func:`_formula_displacement` is this optimizer's step."""
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        return False
    if _has_hooks(optimizer) or _replaced_step(optimizer):
        return False
    return all(
        not isinstance(beta, Tensor) for group in optimizer.param_groups for beta in group.get("betas", ())
    )


def _formula_displacement(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, gradient: Tensor
) -> None:
    """Overwrites ``gradient`` by the move that SGD's, Adam's or AdamW's next step makes; reads the state
    only."""
    lr = float(group["lr"])
    decay = float(group["weight_decay"])
    state = optimizer.state.get(parameter, {})
    if group["maximize"]:
        gradient.neg_()
    if isinstance(optimizer, torch.optim.SGD):
        if decay:
            gradient.add_(parameter, alpha=decay)
        momentum, buffer = group["momentum"], state.get("momentum_buffer")
        if momentum:
            keep = 1.0 if buffer is None else 1.0 - group["dampening"]
            if group["nesterov"]:
                gradient.mul_(1 + momentum * keep)
                if buffer is not None:
                    gradient.add_(buffer, alpha=momentum * momentum)
            else:
                gradient.mul_(keep)
                if buffer is not None:
                    gradient.add_(buffer, alpha=momentum)
        gradient.mul_(-lr)
        return
    decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
    if decay and not decoupled:
        gradient.add_(parameter, alpha=decay)
    first, second = group["betas"]
    step = float(state.get("step", 0)) + 1
    scale = gradient.square().mul_(1 - second)
    if "exp_avg_sq" in state:
        scale.add_(state["exp_avg_sq"], alpha=second)
    if group["amsgrad"] and "max_exp_avg_sq" in state:
        torch.maximum(scale, state["max_exp_avg_sq"], out=scale)
    scale.sqrt_().div_(math.sqrt(1 - second**step)).add_(group["eps"])
    gradient.mul_(1 - first)
    if "exp_avg" in state:
        gradient.add_(state["exp_avg"], alpha=first)
    gradient.div_(scale).mul_(-lr / (1 - first**step))
    if decay and decoupled:
        # The decay acts before the move, on the weight itself.
        gradient.add_(parameter, alpha=-lr * decay)


class _ReleasedForm:
    """The formulas of the authors' released code, for comparison with the exact ones.

    Norms are guarded by adding 1e-8, the first gradient is taken after the optimizer's step, the
    displacement includes the penalty step there, the layer's scale is left out of the logits' gradient, and
    the mixed product replaces the derivative of the norm by one that is not its own (it sums the weights
    themselves, not weights times direction).
    """

    def __init__(self, table: LassoTable, log_probabilities: Tensor, rates: Sequence[float]) -> None:
        self._table = table
        self._rates = [rate * scale for rate, scale in zip(rates, table.scales, strict=True)]
        self._logs = table.split(log_probabilities)

    @staticmethod
    def _norms(square: Tensor, logs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p = logs.exp()
        root_sum = p.sqrt().sum(1)
        return p, root_sum, root_sum.square(), (p.square() @ square).sqrt()

    def _factor(self, square: Tensor, logs: Tensor, rate: float) -> Tensor:
        p, _, size, norm = self._norms(square, logs)
        return 1 - rate * (p.square().t() @ (size[:, None] / (norm + _RELEASED_EPS)))

    @torch.no_grad()
    def shrink(self) -> None:
        """One subgradient step on all weights, in place. Keeps what the mixed product needs of the weights
        before it."""
        self._before = [weight.detach().clone() for weight in self._table.weights]
        for weight, logs, rate in zip(self._table.weights, self._logs, self._rates, strict=True):
            weight.mul_(spread(self._factor(square_sum(weight), logs, rate), weight))

    @torch.no_grad()
    def log_gradient(self, moves: Sequence[Tensor]) -> Tensor:
        """The gradient (G, N) for the log-probabilities, the weights being those after :meth:`shrink`."""
        parts = []
        for w, old, move, logs, rate in zip(
            self._table.weights, self._before, moves, self._logs, self._rates, strict=True
        ):
            moved = w + move
            square = square_sum(moved)
            p, root_sum, size, norm = self._norms(square, logs)
            guarded = size[:, None] * p.sqrt() / (root_sum[:, None] * p + _RELEASED_EPS)
            first = (
                size[:, None] * p * ((1 / (norm + _RELEASED_EPS)) @ square.t())
                + norm.sum(1)[:, None] * guarded
            )

            direction = moved * spread(self._factor(square, logs, rate), moved) - w
            taps = old.flatten(2) if old.ndim > 2 else old[:, :, None]
            towards = direction.reshape(taps.shape)
            _, _, _, norm = self._norms(square_sum(old), logs)
            inverse = 1 / (norm + _RELEASED_EPS)
            product = tap_product(old, direction)
            bent = (towards * taps.square()).sum(-1)
            sums = p @ taps.sum(-1)
            mixed = 2 * p * (inverse @ product.t())
            mixed = mixed - p.square() * ((sums * inverse / (norm.square() + _RELEASED_EPS)) @ bent.t())
            pair = ((p.square() @ product) * inverse).sum(1)
            parts.append(p * (first + size[:, None] * mixed + pair[:, None] * guarded))
        return torch.cat(parts, dim=1)


class GroupLearner:
    """Learns, while the network trains, to which group each filter of each prunable convolution belongs.

    Args:
        model: the network; wrappers of ``torch.compile`` and ``DistributedDataParallel`` are looked through.
            Its prunable convolutions must be trainable parameters on one device. With
            ``DistributedDataParallel`` give the wrapped model: its processes then learn the same groups.
        example_input: a tensor (N, C, H, W), or a tuple of positional arguments; only shapes matter.
        groups: G, 1 to 4096.
        strength: the penalty's weight against the loss, lambda; finite, at least 0. The penalty step at step
            t of T is as long as strength * lr * (t + 1) / T, where lr is the current learning rate of the
            weight's own parameter group; after T steps the ramp stays at 1.
        total_steps: T.
        temperature: of the Gumbel softmax; finite, above 0.
        scale: the penalty of a layer is multiplied by k (G/O)^1.5 ("paper", k the square root of the number
            of taps), or by that and sqrt(C H W / (16 * 32 * 32)) of the layer's input ("released").
        seed: of the Gumbel noise, which is drawn on the CPU: all ranks of a distributed run draw the same.
        generator: a CPU generator to draw from instead.
        alpha_lr, alpha_eps: Adam's learning rate and epsilon for the logits (betas 0.9 and 0.999).
        order: "exact", the gradient of the loss plus the penalty after one penalty step; "first", without the
            mixed second derivative and so without a second forward and backward; "released", the formulas of
            the authors' released code, which leave out the terms across filters, for comparison.
        update: "subgradient", or "proximal" for exact zeros.
        exclude: names of modules; convolutions that are or lie inside one are left alone.
        form: "paper" or "gumbel", see ``dsp_kernels.sample_groups``.
        process_group: the ``torch.distributed`` group whose processes learn together; None: that of the
            model's ``DistributedDataParallel`` wrapper, else each process learns alone. Whoever averages the
            weights' gradients in another way names the group here. The gradient of the logits is averaged
            over the group in each step. Before the first step, and after each ``load_state_dict``, the
            processes compare settings, weights, logits and noise.

    Raises:
        TypeError, ValueError: an argument that is not of this form, by name; a model that does not take
            ``example_input``, has no prunable convolution, or one whose weight is masked, parametrized,
            frozen or shared.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        *,
        groups: int,
        strength: float,
        total_steps: int,
        temperature: float = 0.5,
        scale: str = "paper",
        seed: int = 0,
        generator: torch.Generator | None = None,
        alpha_lr: float = 1e-3,
        alpha_eps: float = 1e-12,
        order: str = "exact",
        update: str = "subgradient",
        exclude: Sequence[str] | set[str] | frozenset[str] = (),
        form: str = "paper",
        process_group: Any = None,
    ) -> None:
        base = unwrap(model)
        self._parallel = _parallel(model)
        self._group = _group_of(self._parallel, process_group)
        self._agreed = self._group is None
        self._random: RandomState | None = None
        inputs = as_inputs(example_input)
        self._groups = _integer("groups", groups, 1)
        if self._groups > MOST_GROUPS:
            raise ValueError(f"groups: expected at most {MOST_GROUPS}, got {self._groups}")
        self._strength = _finite("strength", strength, positive=False)
        self._total_steps = _integer("total_steps", total_steps, 1)
        self._temperature = check_temperature(temperature)
        self._scale = _one_of("scale", scale, SCALES)
        self._seed = _integer("seed", seed, 0)
        self._alpha_lr = _finite("alpha_lr", alpha_lr, positive=True)
        self._alpha_eps = _finite("alpha_eps", alpha_eps, positive=True)
        self._order = _one_of("order", order, ORDERS)
        self._update = _one_of("update", update, UPDATES)
        self._form = check_form(_one_of("form", form, FORMS))
        self._exclude = _excluded(base, exclude)
        if generator is None:
            generator = torch.Generator().manual_seed(self._seed)
        elif not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        elif generator.device.type != "cpu":
            raise ValueError(f"generator: expected one on the CPU, got one on {generator.device}")
        self._generator = generator

        names = [info.name for info in prunable_convs(base, example_input)]
        self._names = [
            name for name in names if not any(name == e or name.startswith(f"{e}.") for e in self._exclude)
        ]
        if not self._names:
            raise ValueError(
                "model: expected at least one prunable convolution that is not excluded, found none"
            )
        self._model = base
        self._modules = [base.get_submodule(name) for name in self._names]
        weights = [
            self._weight_of(name, module) for name, module in zip(self._names, self._modules, strict=True)
        ]
        owners: dict[Tensor, str] = {}
        for name, weight in zip(self._names, weights, strict=True):
            if weight in owners:
                raise ValueError(
                    f"model: {name!r} shares its weight with {owners[weight]!r}; exclude one of them"
                )
            owners[weight] = name
        scales = self._layer_scales(weights, inputs)
        self._table = LassoTable(weights, self._groups, scales)
        self._weights: list[Tensor] = list(weights)
        # What the look-ahead overwrites.
        self._kept = [torch.empty_like(weight, requires_grad=False) for weight in weights]

        size, dtype, device = (self._groups, self._table.filters), self._table.dtype, self._table.device
        self._alpha = torch.zeros(size, dtype=dtype, device=device)
        self._gradient = torch.zeros_like(self._alpha)
        self._moment = torch.zeros_like(self._alpha)
        self._square_moment = torch.zeros_like(self._alpha)
        self._soft = torch.log_softmax(self._alpha, 0)
        self._steps = 0
        self._updates = 0
        self._logits = dict(zip(self._names, map(nn.Parameter, self._table.split(self._alpha)), strict=True))

    @staticmethod
    def _weight_of(name: str, module: nn.Module) -> nn.Parameter:
        weight = module._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"model: the weight of {name!r} is not a plain parameter (masked or parametrized); "
                "remove the parametrization or exclude the module"
            )
        if not weight.requires_grad:
            raise ValueError(f"model: the weight of {name!r} does not require a gradient; exclude the module")
        return weight

    def _layer_scales(self, weights: Sequence[Tensor], inputs: tuple[Any, ...]) -> list[float]:
        volumes = _input_volumes(self._model, self._names, inputs) if self._scale == "released" else {}
        scales = []
        for name, weight in zip(self._names, weights, strict=True):
            value = math.sqrt(math.prod(weight.shape[2:])) * (self._groups / weight.shape[0]) ** 1.5
            if self._scale == "released":
                value *= math.sqrt(volumes[name] / (16 * 32 * 32))
            scales.append(value)
        return scales

    # ---- what was learned

    @property
    def names(self) -> tuple[str, ...]:
        """The convolutions whose groups are learned, in execution order."""
        return tuple(self._names)

    @property
    def steps(self) -> int:
        """How many steps have been taken."""
        return self._steps

    @property
    def scales(self) -> dict[str, float]:
        """The factor on each layer's penalty."""
        return dict(zip(self._names, self._table.scales, strict=True))

    @property
    def logits(self) -> dict[str, nn.Parameter]:
        """The logits (G, O) of each convolution; ``.grad`` is the gradient last used, None before the
        first."""
        return dict(self._logits)

    @property
    def probabilities(self) -> dict[str, Tensor]:
        """The last soft sample (G, O) of each convolution; uniform before the first step."""
        return dict(zip(self._names, self._table.split(self._soft.exp()), strict=True))

    def assignment(self) -> dict[str, Tensor]:
        """The group of each filter, (O,) int64 on the CPU, for each convolution: the largest logit, the
        first on a tie.

        Raises RuntimeError where the logits are not finite.
        """
        best = self._alpha.argmax(0).cpu()
        if not bool(self._alpha.isfinite().all()):
            raise RuntimeError("the logits are not finite: the loss or its gradient was not")
        bounds = zip(self._table.offsets[:-1], self._table.offsets[1:], strict=True)
        return {name: best[a:b].clone() for name, (a, b) in zip(self._names, bounds, strict=True)}

    def penalty(self) -> Tensor:
        """The scaled penalty of the whole network under the hard assignment, a scalar."""
        return self._table.penalties(harden(self._alpha)).sum()

    # ---- one step

    def step(
        self,
        closure: Closure | Sequence[Closure],
        optimizer: torch.optim.Optimizer,
        *,
        scaler: Any = None,
        grad_hook: Callable[[], object] | None = None,
    ) -> Tensor:
        """One ordinary training step and one step of the groups; returns the loss, detached.

        Args:
            closure: computes and returns the loss, a scalar, on one fixed batch: forward only, under autocast
                if wanted. It is called twice (once with ``order="first"``), with the same torch random state,
                so that dropout draws the same masks. A list of closures accumulates the gradient of their
                mean over micro-batches.
            optimizer: any ``torch.optim.Optimizer`` that holds the weights, with any number of parameter
                groups; its learning rates are read at each step, so a scheduler steps as usual. Optimizers
                that need a closure (L-BFGS) are not supported. What the optimizer would do next is computed
                from SGD's, Adam's and AdamW's formulas without touching their state; any other optimizer
                takes the step, and its state is put back.
            scaler: a ``torch.amp.GradScaler``, stepped and updated here, once a step. A step it skips leaves
                weights and logits alone; where only the second gradient overflows, the logits keep their
                value.
            grad_hook: called after each of the two backwards, with unscaled gradients in place: for clipping.

        In a distributed run the loss is that of this process's part of the batch.

        The learner's own work leaves buffers, random state, optimizer state and weights bit for bit as the
        ordinary step left them, also when it is interrupted; then the penalty step changes the weights.
        ``.grad`` of the model's and the optimizer's parameters is None afterwards.
        """
        closures = self._closures(closure)
        groups = self._parameter_groups(optimizer)
        self._agree()
        before = RandomState(self._table.device)

        self._clear_gradients(optimizer)
        loss = self._backward(closures, scaler)
        if scaler is None:
            if grad_hook is not None:
                grad_hook()
            optimizer.step()
        else:
            if grad_hook is not None:
                scaler.unscale_(optimizer)
                grad_hook()
            old_scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < old_scale:
                self._clear_gradients(optimizer)
                self._steps += 1
                return loss
        self._learn(closures, optimizer, groups, before, scaler, grad_hook)
        return loss

    def before_step(self) -> None:
        """For loops that take the ordinary step themselves: call this before the forward pass, and
        ``after_step`` after the optimizer's step.

        Remembers the random state, so that the look-ahead draws the same dropout masks.
        """
        self._random = RandomState(self._table.device)

    def after_step(
        self,
        closure: Closure | Sequence[Closure],
        optimizer: torch.optim.Optimizer,
        *,
        scaler: Any = None,
        grad_hook: Callable[[], object] | None = None,
        skipped: bool = False,
    ) -> None:
        """What ``step`` does after the ordinary training step, which the caller has taken.

        Arguments and errors as for ``step``; the closures give the loss of the batch just trained on.
        ``skipped``: the gradient scaler skipped that step, so nothing is learned either. ``scaler`` is only
        read here: the caller has updated it.
        """
        closures = self._closures(closure)
        groups = self._parameter_groups(optimizer)
        self._agree()
        before, self._random = self._random, None
        self._clear_gradients(optimizer)
        if skipped:
            self._steps += 1
        else:
            self._learn(closures, optimizer, groups, before, scaler, grad_hook)

    @staticmethod
    def _closures(closure: Closure | Sequence[Closure]) -> Sequence[Closure]:
        closures = [closure] if callable(closure) else closure
        if not isinstance(closures, Sequence) or not closures or not all(callable(c) for c in closures):
            raise TypeError("closure: expected a function without arguments, or a non-empty list of them")
        return closures

    def _agree(self) -> None:
        """RuntimeError on all processes of the group where they would not learn the same."""
        if self._agreed:
            return
        layers = [[name, list(weight.shape)] for name, weight in zip(self._names, self._weights, strict=True)]
        own = {
            "settings": _digest(self._settings(), layers),
            "weights": _digest(*self._weights),
            "learner's state": _digest([self._steps, self._updates], *self._tensors().values()),
            "noise (seed or generator)": _digest(self._generator.get_state()),
        }
        digests = torch.tensor(list(own.values()), dtype=torch.int64, device=self._table.device)
        all_digests = [torch.zeros_like(digests) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(all_digests, digests, group=self._group)
        same = (torch.stack(all_digests) == all_digests[0]).all(0).tolist()
        if not all(same):
            different = ", ".join(name for name, equal in zip(own, same, strict=True) if not equal)
            raise RuntimeError(
                f"the processes of this distributed run differ in: {different}; give all the same, and load "
                "checkpoints in every process"
            )
        self._agreed = True

    def _learn(
        self,
        closures: Sequence[Closure],
        optimizer: torch.optim.Optimizer,
        groups: Sequence[dict[str, Any]],
        before: RandomState | None,
        scaler: Any,
        grad_hook: Callable[[], object] | None,
    ) -> None:
        """The step of the groups, and the penalty step on the weights."""
        ramp = self._strength * min(1.0, (self._steps + 1) / self._total_steps)
        rates = [ramp * float(group["lr"]) for group in groups]

        noise = standard_gumbel(self._alpha.shape, generator=self._generator, dtype=self._alpha.dtype)
        if self._alpha.is_cuda:
            noise = noise.pin_memory()
        noise = noise.to(self._alpha.device, non_blocking=True)
        self._soft = sample_groups(self._alpha, self._temperature, noise=noise, form=self._form)
        if self._order == "first":
            self._clear_gradients(optimizer)
            log_gradient: Tensor | None = self._table.log_gradient(self._soft, rates)
        else:
            log_gradient = self._look_ahead(closures, optimizer, groups, rates, before, scaler, grad_hook)
        log_gradient = self._averaged(log_gradient, scaler)
        hard = harden(self._alpha) if log_gradient is None else self._update_logits(log_gradient)
        if self._order == "released" and self._update == "subgradient":
            _ReleasedForm(self._table, hard, rates).shrink()
        else:
            self._table.shrink(hard, rates, proximal=self._update == "proximal")
        self._steps += 1

    def _averaged(self, log_gradient: Tensor | None, scaler: Any) -> Tensor | None:
        """The mean over the process group; None where it overflowed in any process."""
        if self._group is None:
            return log_gradient
        if scaler is not None:
            usable = torch.tensor(float(log_gradient is not None), device=self._table.device)
            dist.all_reduce(usable, dist.ReduceOp.MIN, group=self._group)
            if not usable.item():
                return None
        assert log_gradient is not None
        log_gradient = log_gradient.contiguous()
        dist.all_reduce(log_gradient, group=self._group)
        return log_gradient.div_(dist.get_world_size(self._group))

    def _parameter_groups(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """The optimizer's parameter group of each weight, after checking that the weights are still the
        ones known."""
        if not isinstance(getattr(optimizer, "param_groups", None), list):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("optimizer: LBFGS calls the closure itself and is not supported")
        owners = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        stale = self._table.stale()
        for index, (name, module, weight) in enumerate(
            zip(self._names, self._modules, self._weights, strict=True)
        ):
            if module._parameters.get("weight") is not weight or stale == index:
                raise RuntimeError(
                    f"the weight of {name!r} was replaced, moved or cast since the learner was made"
                )
            if id(weight) not in owners:
                raise ValueError(f"optimizer: the weight of {name!r} is in none of its parameter groups")
        return [owners[id(weight)] for weight in self._weights]

    def _clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for parameter in self._model.parameters():
            parameter.grad = None

    def _backward(self, closures: Sequence[Closure], scaler: Any, scale: float = 1.0) -> Tensor:
        total: Tensor | None = None
        for index, closure in enumerate(closures, 1):
            # Gradients of micro-batches add up in each process; only the last one needs their mean.
            alone = self._parallel is not None and index < len(closures)
            with torch.enable_grad(), self._parallel.no_sync() if alone else nullcontext():  # type: ignore
                loss = closure()
                if not isinstance(loss, Tensor):
                    raise TypeError(
                        f"closure: expected it to return the loss, a tensor, got {type(loss).__name__}"
                    )
                if loss.numel() != 1 or not loss.requires_grad:
                    raise ValueError("closure: expected a loss with one element that requires a gradient")
                part = loss / len(closures)
                (part * scale if scaler is None else scaler.scale(part)).backward()
            total = part.detach() if total is None else total + part.detach()
        assert total is not None
        return total

    def _look_ahead(
        self,
        closures: Sequence[Closure],
        optimizer: torch.optim.Optimizer,
        groups: Sequence[dict[str, Any]],
        rates: Sequence[float],
        before: RandomState | None,
        scaler: Any,
        grad_hook: Callable[[], object] | None,
    ) -> Tensor | None:
        """The gradient (G, N) for the log-probabilities, or None where the second gradient overflowed.

        The weights move to W', the loss is taken there, and everything is back when this returns, whatever
        happens.
        """
        released = _ReleasedForm(self._table, self._soft, rates) if self._order == "released" else None
        out = None
        with _random_kept(self._table.device), _buffers_kept(self._model), self._weights_kept():
            if released is None:
                self._table.shrink(self._soft, rates)
            else:
                released.shrink()
            self._clear_gradients(optimizer)
            if before is not None:
                before.restore()
            scale = 1.0 if scaler is None else float(scaler.get_scale())
            self._backward(closures, None, scale)
            usable = scaler is None or self._unscale(optimizer, scale)
            if usable:
                if grad_hook is not None:
                    grad_hook()
                moves = self._displacements(optimizer, groups)
                if released is not None:
                    out = released.log_gradient(moves)
        if usable and released is None:
            out = self._table.log_gradient(self._soft, rates, moves)
        self._clear_gradients(optimizer)
        return out

    @contextmanager
    def _weights_kept(self) -> Iterator[None]:
        self._table.copy_to(self._kept)
        try:
            yield
        finally:
            self._table.copy_from(self._kept)

    def _unscale(self, optimizer: torch.optim.Optimizer, scale: float) -> bool:
        """Divides all gradients by the loss scale; whether those of the weights are finite."""
        unique = {id(p): p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        for parameter in unique.values():
            assert parameter.grad is not None
            parameter.grad.div_(scale)
        grads = [p.grad for p in unique.values() if p.grad is not None]
        return bool(torch.stack([grad.isfinite().all() for grad in grads]).all())

    @torch.no_grad()
    def _displacements(
        self, optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]]
    ) -> list[Tensor]:
        """The move of each weight that the optimizer's next step would make; the optimizer is left as it
        was."""
        if _has_formula(optimizer) and not any(
            w.grad is not None and w.grad.is_sparse for w in self._weights
        ):
            moves = []
            for weight, group in zip(self._weights, groups, strict=True):
                if weight.grad is None:
                    moves.append(torch.zeros_like(weight))
                else:
                    _formula_displacement(optimizer, group, weight, weight.grad)
                    moves.append(weight.grad)
            return moves
        start = [weight.detach().clone() for weight in self._weights]
        with _optimizer_kept(optimizer):
            with torch.enable_grad():
                optimizer.step()
            for move, weight in zip(start, self._weights, strict=True):
                torch.sub(weight, move, out=move)
        return start

    @torch.no_grad()
    def _update_logits(self, log_gradient: Tensor) -> Tensor:
        """One step of Adam on the logits; returns the hard assignment's log-probabilities (G, N)."""
        for logits, gradient in zip(self._logits.values(), self._table.split(self._gradient), strict=True):
            logits.grad = gradient
        self._updates += 1
        first, second = _BETAS
        correction = math.sqrt(1 - second**self._updates)
        rate = self._alpha_lr / (1 - first**self._updates)
        if self._table.backend == "triton":
            numbers = (self._temperature, 1 - first, second, 1 - second, self._alpha_eps, correction, rate)
            hard: Tensor = room("triton").update_logits(
                log_gradient,
                self._soft,
                numbers,
                self._gradient,
                self._moment,
                self._square_moment,
                self._alpha,
            )
            return hard
        self._gradient.copy_(sample_groups_backward(log_gradient, self._soft, self._temperature))
        self._moment.lerp_(self._gradient, 1 - first)
        self._square_moment.mul_(second).addcmul_(self._gradient, self._gradient, value=1 - second)
        scale = self._square_moment.sqrt().div_(correction).add_(self._alpha_eps)
        self._alpha.addcdiv_(self._moment, scale, value=-rate)
        return harden(self._alpha)

    # ---- saving

    def _settings(self) -> dict[str, Any]:
        return {
            "groups": self._groups,
            "strength": self._strength,
            "total_steps": self._total_steps,
            "temperature": self._temperature,
            "scale": self._scale,
            "alpha_lr": self._alpha_lr,
            "alpha_eps": self._alpha_eps,
            "order": self._order,
            "update": self._update,
            "form": self._form,
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "logits": self._alpha,
            "gradient": self._gradient,
            "moment": self._moment,
            "square_moment": self._square_moment,
            "log_probabilities": self._soft,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a step depends on, the noise generator included, as copies.

        ``{"meta": ..., "tensors": ...}``: plain JSON values, and a flat dictionary of tensors. The model
        and its optimizer are stored by their owner.
        """
        tensors = {name: tensor.clone() for name, tensor in self._tensors().items()}
        tensors["generator"] = self._generator.get_state()
        layers = [[name, weight.shape[0]] for name, weight in zip(self._names, self._weights, strict=True)]
        meta = {
            "format": _FORMAT,
            "settings": self._settings(),
            "layers": layers,
            "steps": self._steps,
            "updates": self._updates,
        }
        return {"meta": meta, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state_dict()`` of a learner with the same settings and layers; the next step has
        the same bits.

        Raises TypeError or ValueError, and changes nothing, where the state is of another format, learner
        or network.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a dictionary of state_dict(), got {type(state).__name__}")
        meta, tensors = state.get("meta"), state.get("tensors")
        if not isinstance(meta, Mapping) or not isinstance(tensors, Mapping):
            raise ValueError(
                f"state: expected the entries 'meta' and 'tensors', got {sorted(map(str, state))}"
            )
        if meta.get("format") != _FORMAT:
            raise ValueError(f"state: format {meta.get('format')!r}, expected {_FORMAT}")
        layers = [[name, weight.shape[0]] for name, weight in zip(self._names, self._weights, strict=True)]
        if [list(layer) for layer in meta.get("layers", [])] != layers:
            raise ValueError("state: made for a network with other prunable convolutions")
        settings = meta.get("settings")
        for key, value in self._settings().items():
            if not isinstance(settings, Mapping) or settings.get(key) != value:
                given = settings.get(key) if isinstance(settings, Mapping) else None
                raise ValueError(f"state: {key} is {given!r}, expected this learner's {value!r}")
        counts = [_integer(f"state: {key}", meta.get(key), 0) for key in ("steps", "updates")]
        for name, own in self._tensors().items():
            value = tensors.get(name)
            if not isinstance(value, Tensor) or value.shape != own.shape or value.dtype != own.dtype:
                given = (
                    f"{value.dtype} {tuple(value.shape)}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                raise ValueError(f"state: {name}: expected {own.dtype} {tuple(own.shape)}, got {given}")
        noise = tensors.get("generator")
        probe = self._generator.get_state()
        if not isinstance(noise, Tensor) or noise.dtype != probe.dtype or noise.shape != probe.shape:
            raise ValueError(f"state: generator: expected {probe.dtype} {tuple(probe.shape)}")
        self._generator.set_state(noise.cpu())
        with torch.no_grad():
            for name, own in self._tensors().items():
                own.copy_(tensors[name])
        self._steps, self._updates = counts
        self._agreed = self._group is None
        for logits, gradient in zip(self._logits.values(), self._table.split(self._gradient), strict=True):
            logits.grad = gradient if self._updates else None
