"""Group assignment: Gumbel-softmax samples of filter groups and the group penalty, differentiable twice."""

from .op import group_lasso, sample_groups
from .table import LassoTable

__all__ = ["LassoTable", "group_lasso", "sample_groups"]
