"""Operators for dynamic structure pruning: permuted, uneven grouped convolution and group assignment.

Torch is imported with the first of the names below, so that :mod:`dsp_kernels.runtime` does without. Once a
process has imported both this package and torch, the operators are registered (``torch.ops.dsp_kernels``).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assignment import group_lasso, sample_groups
    from .backends import available_backends
    from .conv import permuted_grouped_conv2d
    from .layout import GroupLayout

__all__ = ["GroupLayout", "available_backends", "group_lasso", "permuted_grouped_conv2d", "sample_groups"]

_HOMES = {
    "GroupLayout": "layout",
    "available_backends": "backends",
    "group_lasso": "assignment",
    "permuted_grouped_conv2d": "conv",
    "sample_groups": "assignment",
}
_OPERATORS = ("tail", "assignment", "conv")  # modules that register them
_WITHOUT_TORCH = {f"{__name__}.{name}" for name in ("_compiled", "_native", "config", "runtime")}


def _register() -> None:
    for name in _OPERATORS:
        importlib.import_module(f"{__name__}.{name}")
    for name, home in _HOMES.items():
        globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        _register()
        return globals()[name]
    if not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterTorch:
    """Registers the operators when torch has been imported: a saved program finds them by their names."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                # One of ours that is being imported finishes first, and whoever wants it has it then.
                ours = {m for m in sys.modules if m.startswith(f"{__name__}.")}
                if not ours - _WITHOUT_TORCH:
                    # What is wrong is said by the first name that is used; torch itself is there.
                    with contextlib.suppress(Exception):
                        _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "torch" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterTorch())
