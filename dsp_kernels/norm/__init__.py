"""Batch normalisation in training, with what stands around it inside: convolution, residual, activation."""

from .fused import conv2d_batch_norm_act
from .op import batch_norm_act

__all__ = ["batch_norm_act", "conv2d_batch_norm_act"]
