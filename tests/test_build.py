"""The native core: no torch in it, a C header, and builds that cannot be done or go wrong."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".c", ".cu", ".cuh"))
MODULE = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"


def copy_tree(to: Path) -> Path:
    """The tree as it is built from, without what builds left in it."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", "*.egg-info")
    for name in ("csrc", "dsp_kernels", "python", "tests", "bench", "requirements"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=ignore)
    for name in (
        "setup.py",
        "pyproject.toml",
        "CMakeLists.txt",
        "MANIFEST.in",
        "LICENSE",
        "README.md",
        "Makefile",
    ):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, to / name)
    return to


def clean_environment(**changes: str) -> dict[str, str]:
    """This environment without the variables that steer a build or an import, and with ``changes``."""
    steering = ("CC", "CXX", "CXXFLAGS", "PYTHONPATH", "DSP_KERNELS_NATIVE", "DSP_KERNELS_CMAKE_ARGS")
    return {**{k: v for k, v in os.environ.items() if k not in steering}, **changes}


def build_in_place(tree: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env=clean_environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )


def build_info(tree: Path) -> dict[str, str | None]:
    loaded: dict[str, str | None] = json.loads((tree / "dsp_kernels" / "_build_info.json").read_text())
    return loaded


def need_compiler() -> str:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which("c++") is None:
        pytest.skip("no C and C++ compiler on PATH")
    return compiler


# ---- the core knows nothing of torch ----


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_includes_torch(path: Path) -> None:
    includes = re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", path.read_text(encoding="utf-8"), re.M)
    assert [i for i in includes if re.match(r"(torch|ATen|c10|caffe2)\b", i)] == []
    if path.name != "bindings.cpp":
        assert [i for i in includes if i.startswith(("pybind11", "Python"))] == []


@pytest.mark.parametrize(
    ("text", "headers"),
    [
        (
            '#include "dsp.h"\nint main(void) { return dsp_abi_version() != DSP_ABI_VERSION; }\n',
            {"dsp.h", "dsp_runtime.h", "activations.def", "steps.def"},
        ),
        (
            '#include "runtime/dsp_runtime.h"\nint main(void) { return dsp_runtime_version() != 1; }\n',
            {"dsp_runtime.h"},
        ),
    ],
)
def test_the_headers_are_plain_c_of_their_own(text: str, headers: set[str], tmp_path: Path) -> None:
    """It compiles as strict C99, and beside itself reads only the compiler's and the C library's headers."""
    compiler = need_compiler()
    source = tmp_path / "user.c"
    source.write_text(text)
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wstrict-prototypes", "-Werror"]
    command = [compiler, *flags, "-I", str(ROOT / "csrc"), str(source)]
    done = subprocess.run([*command, "-MM"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = [Path(word).name for word in done.stdout.replace("\\\n", " ").split(":")[1].split()]
    assert set(ours) == {"user.c", *headers}
    done = subprocess.run([*command, "-fsyntax-only"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_links_no_torch() -> None:
    module = ROOT / "dsp_kernels" / MODULE
    if not module.exists():
        pytest.skip("the native module is not built in this tree")
    data = module.read_bytes()
    for library in (b"libtorch", b"libc10", b"libshm"):
        assert library not in data


def test_setup_imports_no_torch() -> None:
    names = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    assert names <= {*sys.stdlib_module_names, "setuptools"}


def test_build_requirements_do_not_name_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    names = {re.split(r"[<>=!~ \[]", r)[0] for r in project["build-system"]["requires"]}
    assert names == {"setuptools", "pybind11", "cmake", "ninja"}


def test_pins_cover_what_the_package_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lines = (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    # A torch with CUDA requires the Triton of its own release, so that one is a range.
    loose = [p for p in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", p)]
    assert [p.partition(">=")[0] for p in loose] == ["triton"]
    pinned = {p.split("==")[0].lower() for p in pins}
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["dev"], *extras["test"]]
    wanted += project["build-system"]["requires"]
    names = {re.split(r"[<>=!~ \[]", w)[0].lower() for w in wanted} - {"dsp-kernels"}
    assert names - pinned == set()


# ---- builds that are not done, and builds that fail ----


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_tree(tmp_path / "tree")


def test_without_a_compiler_the_reason_is_recorded(tree: Path, tmp_path: Path) -> None:
    (tree / "dsp_kernels" / MODULE).write_bytes(b"left by an earlier build")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    done = build_in_place(tree, PATH=str(nothing))
    assert done.returncode == 0, done.stdout
    reason = build_info(tree)["native"]
    assert reason is not None and "no C++ compiler on PATH" in reason
    assert "no C++ compiler on PATH" in done.stdout
    assert not (tree / "dsp_kernels" / MODULE).exists()


def test_a_compiler_that_is_named_and_missing_is_named(tree: Path) -> None:
    done = build_in_place(tree, CXX="no-such-c++ -O2")
    assert done.returncode == 0, done.stdout
    assert "CXX=no-such-c++ -O2 is not a program" in (build_info(tree)["native"] or "")


def test_required_and_missing_is_an_error(tree: Path, tmp_path: Path) -> None:
    done = build_in_place(tree, PATH=str(tmp_path), DSP_KERNELS_NATIVE="1")
    assert done.returncode != 0
    assert "DSP_KERNELS_NATIVE=1, but no C++ compiler on PATH" in done.stdout
    assert not (tree / "dsp_kernels" / "_build_info.json").exists()


def test_off_by_request(tree: Path) -> None:
    done = build_in_place(tree, DSP_KERNELS_NATIVE="0")
    assert done.returncode == 0, done.stdout
    assert build_info(tree)["native"] == "left out when the package was built (DSP_KERNELS_NATIVE=0)"
    assert not (tree / "dsp_kernels" / MODULE).exists()


def test_a_misspelt_switch_is_an_error(tree: Path) -> None:
    done = build_in_place(tree, DSP_KERNELS_NATIVE="off")
    assert done.returncode != 0
    assert "DSP_KERNELS_NATIVE='off' must be 0 (off), 1 (required) or unset" in done.stdout


def test_a_compile_error_is_an_error(tree: Path) -> None:
    """With a compiler at hand, code that does not compile must not turn into a silent pure-Python install."""
    need_compiler()
    for path in (tree / "csrc").rglob("*.cpp"):
        path.write_text("#error broken on purpose\n")
    done = build_in_place(tree)
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout
    assert "DSP_KERNELS_NATIVE=0 installs the package without it" in done.stdout
    assert not (tree / "dsp_kernels" / MODULE).exists()
    assert not (tree / "dsp_kernels" / "_build_info.json").exists()
