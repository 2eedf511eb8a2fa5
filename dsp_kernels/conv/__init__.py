"""Permuted grouped convolution: each group of filters reads its own subset of the input channels."""

from .op import conv2d_from_plan, permuted_grouped_conv2d

__all__ = ["conv2d_from_plan", "permuted_grouped_conv2d"]
