"""Operators for dynamic structure pruning: permuted, uneven grouped convolution and group assignment."""

from . import tail  # noqa: F401  (registers its operators)
from .assignment import group_lasso, sample_groups
from .backends import available_backends
from .conv import permuted_grouped_conv2d
from .layout import GroupLayout

__all__ = ["GroupLayout", "available_backends", "group_lasso", "permuted_grouped_conv2d", "sample_groups"]
