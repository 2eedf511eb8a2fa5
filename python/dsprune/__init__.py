"""Dynamic Structure Pruning: learn filter groups, prune input channels per group, pack what is left into fast layers."""

from . import models, nn
from .graph import prunable_convs
from .pack import PackedNetwork, PackError, pack, unpack
from .structure import Structure, apply_structure, find_structure

__all__ = [
    "PackError", "PackedNetwork", "Structure", "apply_structure", "find_structure", "models", "nn", "pack",
    "prunable_convs", "unpack",
]  # fmt: skip
