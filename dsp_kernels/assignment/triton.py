"""Launches the Triton kernels: all layers of a network in each launch, on a CUDA device (or, with
``TRITON_INTERPRET=1``, on the CPU in Triton's interpreter).

Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import launch as shared
from . import triton_kernels as kernels
from .launch import count_launches, is_plain, like, note, remembered, rows_contiguous, upload
from .plan import ADDRESSES, Layer, Plan, make_plan, tiling, vector_width
from .reference import NORM_FLOOR, accumulation_dtype

__all__ = [
    "Network",
    "count_launches",
    "group_lasso",
    "group_lasso_backward",
    "group_lasso_hessian",
    "is_plain",
    "sample_groups",
    "sample_groups_backward",
    "update_logits",
]

_plans: dict[Any, Any] = {}
_temperatures: dict[Any, Any] = {}
_WIDTH = 128  # columns of a program of the kernels on (G, N) matrices
_ELEMENTS = {
    torch.float64: kernels.tl.float64,
    torch.float32: kernels.tl.float32,
    torch.bfloat16: kernels.tl.bfloat16,
    torch.float16: kernels.tl.float16,
}


# ---- launching


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return not isinstance(kernels.squares_forward, kernels.triton.runtime.JITFunction)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """One launch of ``kernel``; all of this module's go through here."""
    kernel[grid](*arguments, **constants)


def _start(
    device: torch.device, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any
) -> None:
    note(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *arguments, **constants)
    else:
        launch(kernel, grid, *arguments, **constants)


# ---- one network


class Network:
    """Plain weights (:func:`is_plain`) of one dtype and device, with their scales, as the kernels see them.

    Log-probabilities are (G, N) matrices over the filters of all layers, of the accumulation dtype. Step
    lengths ``rates`` are one number a layer, or a tensor (L,) of the accumulation dtype on the device.
    """

    def __init__(self, weights: Sequence[Tensor], groups: int, scales: Sequence[float]) -> None:
        self.groups = groups
        self.device = weights[0].device
        self.element = weights[0].dtype
        self.dtype = accumulation_dtype(self.element)
        self.layers = tuple(map(Layer.of, weights))
        self.tiles = tiling(weights[0].element_size(), interpreted())
        self.offsets = (0, *accumulate(layer.filters for layer in self.layers))
        self._scales = tuple(scales)
        self._numbers: dict[tuple[float, ...], Tensor] = {}
        self._bound: dict[tuple[int, ...], tuple[Plan, Tensor]] = {}

    def numbers(self, values: Sequence[float] | Tensor) -> Tensor:
        """One number a layer, on the device.

        Raises ValueError for a tensor of another shape, dtype or device.
        """
        if isinstance(values, Tensor):
            shape = (len(self.layers),)
            if values.shape != shape or values.dtype != self.dtype or values.device != self.device:
                raise ValueError(
                    f"rates: expected {self.dtype} of shape {shape} on {self.device}, "
                    f"got {values.dtype} of shape {tuple(values.shape)} on {values.device}"
                )
            return values.contiguous()
        key = tuple(values)
        return remembered(self._numbers, key, lambda: upload(key, self.dtype, self.device), self.device)

    def bind(
        self,
        weights: Sequence[Tensor],
        directions: Sequence[Tensor] | None = None,
        outs: Sequence[Tensor] | None = None,
        keeps: Sequence[Tensor] | None = None,
    ) -> tuple[Plan, Tensor]:
        """The plan and the table of addresses for these tensors, which have the order of their weights."""
        lists = (weights, directions, outs, keeps)
        key = tuple(
            0 if tensors is None else tensors[index].data_ptr()
            for index in range(len(self.layers))
            for tensors in lists
        )

        def make() -> tuple[Plan, Tensor]:
            size = weights[0].element_size()
            vector = vector_width(self.layers, size, key)
            shape = (self.layers, self.groups, vector, self.tiles, self.device)
            plan = remembered(_plans, shape, lambda: make_plan(*shape), self.device)
            table = upload(key, torch.int64, self.device).view(-1, ADDRESSES)
            return plan, table

        found: tuple[Plan, Tensor] = remembered(self._bound, key, make, self.device)
        return found

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _common(self, plan: Plan) -> dict[str, Any]:
        return {
            "ELEMENT": _ELEMENTS[self.element],
            "ACC": _ELEMENTS[self.dtype],
            "VEC": plan.vector,
            "ALIGN": plan.vector * self.element.itemsize,
            "num_warps": plan.tiles.warps,
        }

    def _sums(self, plan: Plan) -> dict[str, Any]:
        return {
            "ACC": _ELEMENTS[self.dtype],
            "DEPTH": plan.tiles.depth,
            "WIDTH": plan.tiles.width,
            "num_warps": plan.tiles.warps,
        }

    def _start(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        _start(self.device, kernel, grid, *arguments, **constants)

    def _squares(
        self,
        plan: Plan,
        table: Tensor,
        logs: Tensor,
        towards: Tensor | None = None,
        *,
        directed: bool = False,
        stored: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        columns = self._empty(max(1, plan.columns_size))
        squares, products = stored or (columns, columns)
        self._start(
            kernels.squares_forward,
            (len(plan.squares),),
            plan.layers,
            plan.squares,
            table,
            logs,
            logs if towards is None else towards,
            columns,
            squares,
            products,
            logs.stride(0),
            self.groups,
            ROWS=plan.tiles.rows,
            LANES=plan.tiles.lanes,
            REPEAT=plan.tiles.chunk // plan.tiles.rows,
            BLOCK=plan.tiles.block(self.groups),
            STRIDED=plan.strided,
            DIRECTED=directed,
            TOWARDS=towards is not None,
            STORE=stored is not None,
            **self._common(plan),
        )
        return columns

    def _columns(
        self,
        plan: Plan,
        mode: str,
        columns: Tensor,
        logs: Tensor,
        rates: Tensor,
        work: dict[str, Tensor],
        towards: Tensor | None = None,
    ) -> None:
        self._start(
            kernels.columns_forward,
            (len(self.layers), self.groups),
            plan.layers,
            columns,
            logs,
            logs if towards is None else towards,
            rates,
            self.numbers(self._scales),
            work["moved" if mode == "moved" else "ratios"],
            work.get("changes", columns),
            work.get("inverses", columns),
            work["scalars"],
            work["penalties"],
            logs.stride(0),
            self.groups,
            plan.pitch,
            FLOOR=NORM_FLOOR[self.dtype] ** 2,
            MODE=mode,
            **self._sums(plan),
        )

    def _work(self, plan: Plan, *matrices: str) -> dict[str, Tensor]:
        work = {name: self._empty(self.groups, plan.pitch) for name in ("ratios", *matrices)}
        work["scalars"] = self._empty(len(self.layers), self.groups, 2)
        work["penalties"] = self._empty(len(self.layers), self.groups)
        return work

    def _apply(
        self,
        plan: Plan,
        table: Tensor,
        mode: str,
        logs: Tensor,
        rates: Tensor,
        work: dict[str, Tensor],
        rows: Tensor,
        towards: Tensor | None = None,
        keeping: bool = False,
    ) -> None:
        self._start(
            kernels.apply_forward,
            (len(plan.flat),),
            plan.layers,
            plan.flat,
            table,
            logs,
            logs if towards is None else towards,
            rates,
            self.numbers(self._scales),
            work["ratios"],
            work.get("changes", rows),
            rows,
            logs.stride(0),
            self.groups,
            plan.pitch,
            ROWS=plan.tiles.rows,
            LANES=plan.tiles.lanes,
            MODE=mode,
            KEEPING=keeping,
            **self._common(plan),
        )

    def _rows(
        self,
        plan: Plan,
        tiles: Tensor,
        mode: str,
        rows: Tensor,
        scalars: Tensor,
        logs: Tensor,
        rates: Tensor,
        towards: Tensor | None = None,
    ) -> Tensor:
        out = self._empty(self.groups, plan.filters)
        self._start(
            kernels.rows_backward,
            (len(tiles), self.groups),
            plan.layers,
            tiles,
            rows,
            scalars,
            logs,
            logs if towards is None else towards,
            rates,
            self.numbers(self._scales),
            out,
            logs.stride(0),
            out.stride(0),
            self.groups,
            MODE=mode,
            **self._sums(plan),
        )
        return out

    # ---- what it computes

    def penalties(self, weights: Sequence[Tensor], logs: Tensor) -> Tensor:
        """The scaled penalties (L,)."""
        plan, table = self.bind(weights)
        work = self._work(plan)
        scales = self.numbers(self._scales)
        self._columns(plan, "norm", self._squares(plan, table, logs), logs, scales, work)
        return work["penalties"].sum(1)

    def backward(
        self, weights: Sequence[Tensor], logs: Tensor, grad: Tensor, outs: Sequence[Tensor]
    ) -> Tensor:
        """amount dR/dW into ``outs``; returns amount dR/dl (G, N). amount: ``grad`` times scale."""
        plan, table = self.bind(weights, outs=outs)
        work = self._work(plan)
        rows = self._empty(max(1, plan.rows_size))
        self._columns(plan, "norm", self._squares(plan, table, logs), logs, grad, work)
        self._apply(plan, table, "backward", logs, grad, work, rows)
        return self._rows(plan, plan.flat_sums, "norm", rows, work["scalars"], logs, grad)

    def hessian(
        self,
        weights: Sequence[Tensor],
        logs: Tensor,
        grad: Tensor,
        directions: Sequence[Tensor],
        towards: Tensor,
        outs: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The Hessian product along (D, E), the part of the weights into ``outs``; returns the derivative of
        the scaled penalties along (D, E), (L,), and the part of l, (G, N)."""
        plan, table = self.bind(weights, directions, outs)
        work = self._work(plan, "changes")
        rows = self._empty(max(1, plan.rows_size))
        columns = self._squares(plan, table, logs, towards, directed=True)
        self._columns(plan, "hessian", columns, logs, grad, work, towards)
        self._apply(plan, table, "hessian", logs, grad, work, rows, towards)
        out = self._rows(plan, plan.flat_sums, "hessian", rows, work["scalars"], logs, grad, towards)
        return work["penalties"].sum(1), out

    def shrink(
        self,
        weights: Sequence[Tensor],
        logs: Tensor,
        rates: Sequence[float] | Tensor,
        *,
        proximal: bool = False,
        keeps: Sequence[Tensor] | None = None,
    ) -> None:
        """The penalty step in place; see ``LassoTable.shrink``."""
        plan, table = self.bind(weights, outs=weights, keeps=keeps)
        work = self._work(plan)
        lengths = self.numbers(rates)
        columns = self._squares(plan, table, logs)
        self._columns(plan, "proximal" if proximal else "norm", columns, logs, lengths, work)
        mode = "proximal" if proximal else "shrink"
        self._apply(plan, table, mode, logs, lengths, work, columns, keeping=keeps is not None)

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """targets <- sources, bit for bit; both have the order of the weights."""
        plan, table = self.bind(targets, keeps=sources)
        constants = self._common(plan)
        del constants["ACC"]
        self._start(
            kernels.copy_forward,
            (len(plan.flat),),
            plan.layers,
            plan.flat,
            table,
            ROWS=plan.tiles.rows,
            LANES=plan.tiles.lanes,
            **constants,
        )

    def log_gradient(
        self,
        weights: Sequence[Tensor],
        logs: Tensor,
        rates: Sequence[float] | Tensor,
        moves: Sequence[Tensor] | None,
    ) -> Tensor:
        """The gradient (G, N) after one penalty step; see ``LassoTable.log_gradient``."""
        mixed = moves is not None
        if moves is not None:
            moves = [like(move, weight) for move, weight in zip(moves, weights, strict=True)]
        plan, table = self.bind(weights, moves)
        lengths = self.numbers(rates)
        work = self._work(plan, "inverses", "moved", *(("changes",) if mixed else ()))
        squares = self._empty(max(1, plan.squares_size))
        products = self._empty(max(1, plan.squares_size)) if mixed else squares
        rows = self._empty(max(1, plan.rows_size))
        columns = self._squares(plan, table, logs, directed=mixed, stored=(squares, products))
        self._columns(plan, "step", columns, logs, lengths, work)
        self._moved_columns(plan, table, False, squares, products, logs, lengths, work, columns)
        self._columns(plan, "moved", columns, logs, lengths, work)
        if mixed:
            self._moved_columns(plan, table, True, squares, products, logs, lengths, work, columns)
            self._columns(plan, "mixed", columns, logs, lengths, work)
        self._start(
            kernels.moved_rows_forward,
            (len(plan.moved_rows),),
            plan.layers,
            plan.moved_rows,
            table,
            squares,
            products,
            logs,
            work["ratios"],
            work["moved"],
            work.get("changes", columns),
            lengths,
            self.numbers(self._scales),
            rows,
            logs.stride(0),
            self.groups,
            plan.pitch,
            ROWS=plan.tiles.moved_rows,
            LANES=plan.tiles.moved_lanes,
            MIXED=mixed,
            **self._common(plan),
        )
        return self._rows(plan, plan.moved_sums, "moved", rows, work["scalars"], logs, lengths)

    def _moved_columns(
        self,
        plan: Plan,
        table: Tensor,
        mixed: bool,
        squares: Tensor,
        products: Tensor,
        logs: Tensor,
        lengths: Tensor,
        work: dict[str, Tensor],
        columns: Tensor,
    ) -> None:
        self._start(
            kernels.moved_columns_forward,
            (len(plan.moved),),
            plan.layers,
            plan.moved,
            table,
            squares,
            products,
            logs,
            work["ratios"],
            work["moved"],
            lengths,
            self.numbers(self._scales),
            columns,
            logs.stride(0),
            self.groups,
            plan.pitch,
            ROWS=plan.tiles.moved_rows,
            LANES=plan.tiles.moved_lanes,
            REPEAT=plan.tiles.chunk // plan.tiles.moved_rows,
            BLOCK=plan.tiles.block(self.groups),
            MIXED=mixed,
            **self._common(plan),
        )


# ---- the operators


def group_lasso(weights: Sequence[Tensor], logs: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """See :func:`dsp_kernels.assignment.reference.group_lasso`."""
    return shared.group_lasso(Network, weights, logs, scales)


def group_lasso_backward(
    grad: Tensor, weights: Sequence[Tensor], logs: Sequence[Tensor], scales: Sequence[float]
) -> list[Tensor]:
    """See :func:`dsp_kernels.assignment.reference.group_lasso_backward`."""
    return shared.group_lasso_backward(Network, grad, weights, logs, scales)


def group_lasso_hessian(
    grad: Tensor,
    weight_directions: Sequence[Tensor],
    log_directions: Sequence[Tensor],
    weights: Sequence[Tensor],
    logs: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """See :func:`dsp_kernels.assignment.reference.group_lasso_hessian`."""
    return shared.group_lasso_hessian(Network, grad, weight_directions, log_directions, weights, logs, scales)


# ---- samples


def _grid(count: int) -> tuple[int]:
    return (-(-count // _WIDTH),)


def _temperature(value: float, like: Tensor) -> Tensor:
    """The temperature on the device, in the precision of the rest."""
    key = (value, like.dtype, like.device)
    found: Tensor = remembered(
        _temperatures, key, lambda: upload([value], like.dtype, like.device), like.device
    )
    return found


def sample_groups(logits: Tensor, noise: Tensor, temperature: float, divide_noise: bool) -> Tensor:
    """See :func:`dsp_kernels.assignment.reference.sample_groups`."""
    logits, noise = rows_contiguous(logits), rows_contiguous(noise)
    groups, count = logits.shape
    out = torch.empty((groups, count), dtype=logits.dtype, device=logits.device)
    _start(
        logits.device,
        kernels.sample_forward,
        _grid(count),
        logits,
        noise,
        _temperature(temperature, logits),
        out,
        count,
        logits.stride(0),
        noise.stride(0),
        groups,
        DIVIDE=divide_noise,
        ACC=_ELEMENTS[logits.dtype],
        WIDTH=_WIDTH,
        num_warps=4,
    )
    return out


def sample_groups_backward(grad: Tensor, log_probabilities: Tensor, temperature: float) -> Tensor:
    """See :func:`dsp_kernels.assignment.reference.sample_groups_backward`."""
    grad, logs = rows_contiguous(grad), rows_contiguous(log_probabilities)
    groups, count = logs.shape
    out = torch.empty((groups, count), dtype=logs.dtype, device=logs.device)
    _start(
        logs.device,
        kernels.sample_backward,
        _grid(count),
        grad,
        logs,
        _temperature(temperature, logs),
        out,
        count,
        grad.stride(0),
        logs.stride(0),
        groups,
        ACC=_ELEMENTS[logs.dtype],
        WIDTH=_WIDTH,
        num_warps=4,
    )
    return out


def update_logits(
    log_gradient: Tensor,
    log_probabilities: Tensor,
    numbers: Sequence[float],
    gradient: Tensor,
    moment: Tensor,
    square_moment: Tensor,
    logits: Tensor,
) -> Tensor:
    """One step of Adam on the logits in place, from the gradient for the log-probabilities; returns the hard
    assignment's log-probabilities (G, N).

    All are contiguous (G, N). ``gradient`` receives the logits' gradient. ``numbers``: temperature, 1 -
    beta1, beta2, 1 - beta2, epsilon, sqrt(1 - beta2^t), lr / (1 - beta1^t).
    """
    groups, count = logits.shape
    hard = torch.empty((groups, count), dtype=logits.dtype, device=logits.device)
    _start(
        logits.device,
        kernels.update_logits,
        _grid(count),
        log_gradient,
        log_probabilities,
        upload(numbers, logits.dtype, logits.device),
        gradient,
        moment,
        square_moment,
        logits,
        hard,
        count,
        groups,
        ACC=_ELEMENTS[logits.dtype],
        WIDTH=_WIDTH,
        num_warps=4,
    )
    return hard
