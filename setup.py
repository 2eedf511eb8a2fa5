"""Builds csrc/ with CMake and ninja into ``dsp_kernels/_native``; everything else stands in pyproject.toml.

Environment:
    DSP_KERNELS_NATIVE      unset: build the native core if the tools are there, else install pure Python and
                            record the reason; "0": never build it; "1": fail where it cannot be built.
    DSP_KERNELS_CUDA        unset: CUDA kernels where nvcc is found; "0": never; "1": fail without nvcc.
    DSP_KERNELS_CMAKE_ARGS  further arguments for CMake, split as a shell would.
    CXX                     the C++ compiler, as CMake reads it.

Torch is not imported here: one build serves every torch, and build isolation works.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
BUILD_INFO = "_build_info.json"
LIBRARY = ("include", "lib")  # folders of the package with what C programs need
CUDA = {"": "AUTO", "0": "OFF", "1": "ON"}  # DSP_KERNELS_CUDA -> CMake's DSP_CUDA


class ToolMissing(Exception):
    """A tool that the native core needs is not on this machine."""


def find_compiler() -> str:
    """Path of the C++ compiler that CMake will take."""
    named = os.environ.get("CXX", "")
    if named:
        # The value may carry a launcher ("ccache g++"); CMake takes the first word as the program.
        found = shutil.which(shlex.split(named)[0])
        if found is None:
            raise ToolMissing(f"no C++ compiler: CXX={named} is not a program on this machine")
        return found
    names = ("clang++", "g++") if os.name == "nt" else ("c++", "g++", "clang++")  # not MSVC
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise ToolMissing(f"no C++ compiler on PATH (looked for {', '.join(names)})")


def find_tool(name: str, folder_attribute: str) -> str:
    """Path of ``cmake`` or ``ninja``: from its Python package, from beside this Python, or from PATH."""
    candidates: list[str | None] = []
    try:
        module = importlib.import_module(name)
        candidates.append(shutil.which(name, path=str(getattr(module, folder_attribute))))
    except (ImportError, AttributeError):
        pass
    candidates.append(shutil.which(name, path=sysconfig.get_path("scripts")))
    candidates.append(shutil.which(name))
    for candidate in candidates:
        if candidate is not None:
            return candidate
    raise ToolMissing(f"{name} is not installed")


def find_pybind11() -> str:
    try:
        return str(importlib.import_module("pybind11").get_cmake_dir())
    except ImportError:
        raise ToolMissing("pybind11 is not installed") from None


class CMakeBuild(build_ext):
    """Runs CMake for the one extension, and leaves a record of how it went beside it."""

    def run(self) -> None:
        wanted = os.environ.get("DSP_KERNELS_NATIVE", "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"DSP_KERNELS_NATIVE={wanted!r} must be 0 (off), 1 (required) or unset")
        if os.environ.get("DSP_KERNELS_CUDA", "") not in CUDA:
            raise SystemExit(
                f"DSP_KERNELS_CUDA={os.environ['DSP_KERNELS_CUDA']!r} must be 0 (off), 1 (required) or unset"
            )
        name = "dsp_kernels._native"
        target = Path(self.get_ext_fullpath(name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # A module of an earlier build must not outlive the sources or the choice that made it.
        target.unlink(missing_ok=True)
        (target.parent / BUILD_INFO).unlink(missing_ok=True)
        for folder in LIBRARY:
            shutil.rmtree(target.parent / folder, ignore_errors=True)

        info: dict[str, str | None] = {
            "native": None,
            "python": sysconfig.get_config_var("SOABI"),
            "compiler": None,
            "cmake_args": os.environ.get("DSP_KERNELS_CMAKE_ARGS", ""),
        }
        if wanted == "0":
            info["native"] = "left out when the package was built (DSP_KERNELS_NATIVE=0)"
        else:
            try:
                # The compiler first: it is what a user can do something about.
                info["compiler"] = find_compiler()
                tools = (find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR"), find_pybind11())
            except ToolMissing as missing:
                if wanted == "1":
                    raise SystemExit(f"DSP_KERNELS_NATIVE=1, but {missing}") from None
                info["native"] = f"not built: {missing} when the package was installed"
                print(f"dsp-kernels: native core {info['native']}", file=sys.stderr)
            else:
                self.build_native(target, *tools)
        (target.parent / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    def build_native(self, target: Path, cmake: str, ninja: str, pybind11_dir: str) -> None:
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_dir}",
            f"-DDSP_CUDA={CUDA[os.environ.get('DSP_KERNELS_CUDA', '')]}",
            *shlex.split(os.environ.get("DSP_KERNELS_CMAKE_ARGS", "")),
        ]
        folder = Path(self.build_temp).resolve() / "cmake"
        # A cache written with other tools (an earlier isolated build, say) or options is not to be trusted.
        compilers = [os.environ.get(k, "") for k in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS")]
        key = hashlib.sha256(json.dumps([configure, compilers]).encode()).hexdigest()
        stamp = folder / "configured-with"
        if folder.exists() and (not stamp.exists() or stamp.read_text() != key):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(key)

        self.call([*configure, "-B", str(folder)])
        self.call([cmake, "--build", str(folder)])
        for component in ("python", "runtime"):
            self.call(
                [cmake, "--install", str(folder), "--component", component, "--prefix", str(target.parent)]
            )
        if not target.exists():
            raise SystemExit(f"CMake installed no {target.name} into {target.parent}")

    def call(self, command: list[str]) -> None:
        print("+", shlex.join(command), flush=True)
        code = subprocess.call(command)
        if code:
            raise SystemExit(
                f"building the native core failed ({Path(command[0]).name} ended with {code}); "
                "DSP_KERNELS_NATIVE=0 installs the package without it"
            )

    def get_outputs(self) -> list[str]:
        target = Path(self.get_ext_fullpath("dsp_kernels._native"))
        library = [p for folder in LIBRARY for p in (target.parent / folder).rglob("*") if p.is_file()]
        return [str(p) for p in (target, target.parent / BUILD_INFO, *library) if p.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        # Nothing is built in one place and mapped to another: both files are written where they stay.
        return {}


class SourceDistribution(sdist):
    """An sdist without what an in-place build left in the tree."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        built = tuple(f"dsp_kernels/{folder}/" for folder in LIBRARY)
        kept = [
            f
            for f in files
            if Path(f).name != BUILD_INFO
            and Path(f).suffix not in (".so", ".pyd")
            and not Path(f).as_posix().startswith(built)
        ]
        super().make_release_tree(base_dir, kept)


setup(
    ext_modules=[Extension("dsp_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "sdist": SourceDistribution},
)
