"""What is in the wheel and the sdist, and what an installed copy says of itself in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_build import MODULE, ROOT, clean_environment, copy_tree, need_compiler

# A convolution by rule, against torch's dense one on the same weights. An editable install of this tree would
# lend its submodules to a copy that lacks them, so its finder goes first.
CHECK = """
import json, sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import torch
import dsp_kernels
layout = dsp_kernels.GroupLayout(4, 4, [([0, 1], [0, 2]), ([1, 2, 3], [1, 3])])
weight = torch.randn(4, 4, 3, 3) * layout.mask()[:, :, None, None]
x = torch.randn(2, 4, 6, 6)
out = dsp_kernels.permuted_grouped_conv2d(x, layout.pack(weight), layout, kernel_size=3)
error = (out - torch.nn.functional.conv2d(x, weight)).abs().max().item()
print(json.dumps([dsp_kernels.__file__, dsp_kernels.available_backends(), error]))
"""


def run_pip(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments],
        env=clean_environment(PIP_NO_INDEX="1", **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build_wheel(folder: Path, **environment: str) -> Path:
    """A wheel of the tree, built where ``import torch`` fails."""
    tree = copy_tree(folder / "tree")
    trap = folder / "trap"
    trap.mkdir()
    (trap / "torch.py").write_text('raise RuntimeError("the build imported torch")\n')
    run_pip(
        *("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder / "wheel"), str(tree)),
        PYTHONPATH=str(trap),
        **environment,
    )
    (wheel,) = (folder / "wheel").glob("dsp_kernels-*.whl")
    return wheel


def check_copy(site: Path, backend: str = "") -> tuple[Path, dict[str, str | None], float]:
    """Runs CHECK with the package that lies in ``site``."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        cwd=site.parent,
        env=clean_environment(PYTHONPATH=str(site), DSP_KERNELS_BACKEND=backend),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    file, backends, error = json.loads(done.stdout)
    return Path(file), backends, error


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built on a machine with no compiler: PATH names an empty folder."""
    folder = tmp_path_factory.mktemp("pure")
    (folder / "nothing").mkdir()
    return build_wheel(folder, PATH=str(folder / "nothing"))


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_both_packages_typed(pure_wheel: Path) -> None:
    names = names_in(pure_wheel)
    for package, folder in (("dsp_kernels", ROOT / "dsp_kernels"), ("dsprune", ROOT / "python" / "dsprune")):
        assert f"{package}/py.typed" in names
        ours = {f"{package}/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*.py")}
        assert ours and ours - names == set()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"dsp_kernels", "dsprune"}


def test_the_wheel_s_metadata(pure_wheel: Path) -> None:
    with zipfile.ZipFile(pure_wheel) as archive:
        read = {Path(n).name: archive.read(n).decode() for n in archive.namelist() if ".dist-info/" in n}
    lines = read["METADATA"].splitlines()
    assert {"Name: dsp-kernels", "Version: 0.1.0", "License-Expression: Apache-2.0"} <= set(lines)
    assert {"Requires-Python: >=3.11", "Requires-Dist: torch>=2.11"} <= set(lines)
    assert "dsprune = dsprune.cli:main" in read["entry_points.txt"]
    assert "Apache License" in read["LICENSE"]


def test_a_pure_install_works_and_names_its_reason(pure_wheel: Path, tmp_path: Path) -> None:
    assert MODULE not in {Path(n).name for n in names_in(pure_wheel)}
    site = tmp_path / "site"
    run_pip("install", "--no-deps", "--target", str(site), str(pure_wheel))
    file, backends, error = check_copy(site)
    assert file.is_relative_to(site)
    assert backends["reference"] is None
    assert "no C++ compiler on PATH" in (backends["native"] or "")
    assert error < 1e-5


@pytest.mark.nightly
def test_a_native_install(tmp_path: Path) -> None:
    """Unoptimised, to be quick, which also shows that CMake gets the arguments handed to it."""
    need_compiler()
    arguments = "-DDSP_WERROR=OFF '-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG'"
    wheel = build_wheel(tmp_path, DSP_KERNELS_NATIVE="1", DSP_KERNELS_CMAKE_ARGS=arguments)
    assert f"dsp_kernels/{MODULE}" in names_in(wheel)
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    info = json.loads((site / "dsp_kernels" / "_build_info.json").read_text())
    assert info["native"] is None and info["cmake_args"] == arguments
    file, backends, error = check_copy(site, backend="native")
    assert file.is_relative_to(site)
    assert backends["native"] is None
    assert error < 1e-5


@pytest.mark.parametrize(
    ("left", "reason"),
    [(None, "not built"), (b"no shared object", "cannot be loaded")],
    ids=["absent", "broken"],
)
def test_a_module_that_is_hidden_or_broken_is_no_hindrance(
    left: bytes | None, reason: str, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    shutil.copytree(ROOT / "dsp_kernels", site / "dsp_kernels", ignore=ignore)
    if left is not None:
        (site / "dsp_kernels" / MODULE).write_bytes(left)
    file, backends, error = check_copy(site)
    assert file.is_relative_to(site)
    assert backends["reference"] is None
    assert reason in (backends["native"] or "")
    assert error < 1e-5


def test_the_sdist_can_build_the_core(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    (tree / "dsp_kernels" / MODULE).write_bytes(b"built in place")
    (tree / "dsp_kernels" / "_build_info.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path / "dist")],
        cwd=tree,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "dist").glob("dsp_kernels-0.1.0.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    core = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    packages = {"dsp_kernels/py.typed", "python/dsprune/py.typed", "dsp_kernels/layout.py"}
    assert ({"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} | core | packages) - names == set()
    assert [n for n in names if n.endswith((".so", "_build_info.json"))] == []
