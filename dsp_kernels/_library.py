"""The operators' namespace: one library object into which every operator family registers."""

from __future__ import annotations

import torch

NAMESPACE = "dsp_kernels"

# One object for the life of the process: what it registered goes away with it.
library = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str) -> None:
    """Defines an operator of the namespace from its schema, marked as fit for ``torch.compile``."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
