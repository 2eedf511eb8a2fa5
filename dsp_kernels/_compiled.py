"""The compiled module, found without torch: loaded, or the reason why not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

__all__ = ["ABI_VERSION", "load"]

ABI_VERSION = 9
BUILD_INFO = Path(__file__).with_name("_build_info.json")


def _reason() -> str:
    """Why the compiled module is missing, as the build left it."""
    try:
        info = json.loads(BUILD_INFO.read_text(encoding="utf-8"))
        reason = info.get("native")  # null where the build succeeded
    except (OSError, ValueError, AttributeError):
        reason = None
    return str(reason) if reason else "not built"


def load() -> tuple[ModuleType | None, str | None]:
    """``dsp_kernels._native`` of this package's ABI, or None and why there is none."""
    try:
        module = importlib.import_module("dsp_kernels._native")
    except ModuleNotFoundError as error:
        missing = error.name == "dsp_kernels._native"
        return None, _reason() if missing else f"cannot be loaded: {error}"
    except ImportError as error:
        return None, f"cannot be loaded: {error}"
    version = module.abi_version()
    if version != ABI_VERSION:
        return None, f"built for ABI {version}, this package needs {ABI_VERSION}: build it again"
    return module, None
