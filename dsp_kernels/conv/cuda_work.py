"""How much work the CUDA kernels make of a forward convolution, in figures for the cost model: the compiled
planner's own (``csrc/conv/cuda_table.h``). Its tables need no device, and no nvcc when the core is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..backends import available_backends, native_module
from ..layout import GroupLayout

__all__ = ["CudaWork", "cuda_work"]

PIXELS = 128  # of a block
_FORWARD, _AUTO = 0, 0
_FLOAT16, _FLOAT32 = 0, 3  # precisions: one of each size of element


@dataclass(frozen=True)
class CudaWork:
    """``multiply_adds``: of the matrix instructions, padding of pixels, channels and filters included.
    ``effort``: the same, and the copies of halos on top, in multiply-adds that take as long by the planner's
    own rule: a row of a halo costs as much as a pixel at one tap, a gathered one eight times that.
    ``weights``: elements of the laid out weight. ``blocks``: of threads, before sums are split.
    ``most_splits``: into how many shares a sum can go. ``gathered``: groups that are read channel by channel,
    of ``groups``. ``halo_rows``: pixels that a block copies for ``phase_taps`` taps of its 128 outputs.
    """

    multiply_adds: int
    effort: float
    weights: int
    blocks: int
    most_splits: int
    gathered: int
    groups: int
    halo_rows: int
    phase_taps: int

    def splits(self, blocks_wanted: int) -> int:
        """Shares of each sum where ``blocks_wanted`` blocks keep the device busy."""
        if not self.blocks:
            return 1
        return max(1, min(-(-blocks_wanted // self.blocks), self.most_splits))


# Without the compiled core the kernels are not there either: infinitely slow.
_ABSENT = CudaWork(0, math.inf, 0, 0, 1, 0, 0, 0, 1)


@lru_cache(maxsize=4096)
def cuda_work(
    layout: GroupLayout,
    element: int,
    batch: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> CudaWork:
    """The work of a forward convolution of ``batch`` images of ``size`` (height, width) pixels in elements of
    ``element`` bytes (2 or 4); the rest as in :func:`~dsp_kernels.permuted_grouped_conv2d`. Without the
    compiled core ``effort`` is infinite. Raises ValueError for what the kernels do not take.
    """
    if available_backends()["native"] is not None:
        return _ABSENT
    core = native_module()
    plan = layout.plan()
    precision = _FLOAT16 if element == 2 else _FLOAT32
    geometry = (batch, *size, *kernel, *stride, *padding, *dilation)
    arguments = (_FORWARD, precision, *geometry, plan.data_ptr(), plan.numel(), _AUTO, 1)
    status, needed = core.cuda_conv2d_table(*arguments, 0, 0)
    if status == 0:
        words = torch.empty(needed, dtype=torch.int32)
        core.cuda_conv2d_table(*arguments, words.data_ptr(), needed)
        status, *found = core.cuda_conv2d_work(words.data_ptr(), needed)
    if status != 0:
        raise ValueError(f"the CUDA convolution refused: {core.last_error()}")
    return CudaWork(*found)
