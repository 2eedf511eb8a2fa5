"""Dynamic Structure Pruning: learn filter groups, prune input channels per group, pack what is left into fast
layers.
"""

from . import interop, latency, models, nn
from .export import export_aoti, export_onnx, export_torch, standard_network
from .graph import prunable_convs
from .groups import group_filters
from .io import load, save
from .learn import GroupLearner
from .pack import PackedNetwork, PackError, pack, unpack
from .program_file import export_program
from .regression import reconstruct
from .report import Summary, summary
from .resume import load_training, save_training
from .run.coverage import Coverage, coverage
from .structure import Structure, apply_structure, find_structure

__all__ = [
    "Coverage", "GroupLearner", "PackError", "PackedNetwork", "Structure", "Summary", "apply_structure",
    "coverage", "export_aoti", "export_onnx", "export_program", "export_torch", "find_structure",
    "group_filters", "interop", "latency", "load", "load_training", "models", "nn", "pack",
    "prunable_convs", "reconstruct", "save", "save_training", "standard_network", "summary", "unpack",
]  # fmt: skip
