"""Batch normalisation in training, with what follows it inside: residual and activation."""

from .op import batch_norm_act

__all__ = ["batch_norm_act"]
