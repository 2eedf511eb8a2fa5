"""Operators for dynamic structure pruning: permuted, uneven grouped convolution and group assignment."""

from .layout import GroupLayout

__all__ = ["GroupLayout"]
