"""What a C program needs to be built with libdsp: ``python -m dsp_kernels.config --cflags --libs``.

``cc classify.c $(python -m dsp_kernels.config --cflags --libs)``. The library, its header and its CMake
package lie in this package where it was built with a compiler; torch is not imported.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

__all__ = ["cflags", "cmake_folder", "libs", "main"]

ROOT = Path(__file__).resolve().parent


def _library(name: str) -> Path:
    path = ROOT / "lib" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the package was installed without its compiled part")
    return path


def cflags() -> list[str]:
    """Arguments for the compiler. Raises FileNotFoundError where the library is not there."""
    _library("libdsp.so")
    return [f"-I{ROOT / 'include'}"]


def libs(static: bool = False) -> list[str]:
    """Arguments for the linker: the shared library with its place, or the static one with what it needs."""
    if static:
        return [str(_library("libdsp.a")), "-lstdc++", "-lm", "-pthread"]
    folder = _library("libdsp.so").parent
    return [f"-L{folder}", f"-Wl,-rpath,{folder}", "-ldsp"]


def cmake_folder() -> Path:
    """For ``cmake -Ddsp_DIR=...``, before ``find_package(dsp)``."""
    return _library("libdsp.so").parent / "cmake" / "dsp"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsp_kernels.config", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--cflags", action="store_true", help="arguments for the compiler")
    parser.add_argument("--libs", action="store_true", help="arguments for the linker")
    parser.add_argument("--static", action="store_true", help="--libs of the static library")
    parser.add_argument("--cmakedir", action="store_true", help="the folder for -Ddsp_DIR")
    given = parser.parse_args(arguments)
    if not (given.cflags or given.libs or given.cmakedir):
        parser.error("one of --cflags, --libs, --cmakedir is needed")
    try:
        words = cflags() if given.cflags else []
        words += libs(given.static) if given.libs else []
        words += [str(cmake_folder())] if given.cmakedir else []
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    print(shlex.join(words))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
