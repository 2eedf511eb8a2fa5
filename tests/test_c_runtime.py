"""libdsp as C and C++ programs use it: compiled by the flags that the package gives, the same bits."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from test_runtime import bits, exported, images, packed_net

from dsp_kernels import available_backends, config

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "c"
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]

pytestmark = [
    pytest.mark.skipif(available_backends()["native"] is not None, reason="no compiled module"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("c")


def flags(*options: str) -> list[str]:
    return shlex.split(run(sys.executable, "-m", "dsp_kernels.config", *options))


def test_the_c_example_gives_the_same_bits(folder: Path) -> None:
    """Linked to the shared and to the static library."""
    net, x = exported(folder), images(5, 3, 16, 16)
    x.tofile(folder / "x.f32")
    with torch.no_grad():
        wanted = packed_net(nets.Residual)(torch.from_numpy(x)).numpy()
    for options in ((), ("--static",)):
        program = folder / f"classify{len(options)}"
        given = flags("--cflags", "--libs", *options)
        run("cc", "-std=c99", *WARNINGS, "-O1", EXAMPLES / "classify.c", *given, "-o", program)
        lines = run(program, net, folder / "x.f32", folder / "y.f32").splitlines()
        y = np.fromfile(folder / "y.f32", np.float32).reshape(wanted.shape)
        assert bits(y) == bits(wanted)
        assert [line.partition(":")[0] for line in lines] == [f"image {n}" for n in range(5)]
        assert [int(line.split()[3]) for line in lines] == wanted.argmax(1).tolist()
    for arguments, text in (
        ((folder / "none.dsp", folder / "x.f32"), "No such file"),
        ((folder / "x.f32", folder / "x.f32"), "does not start as one"),
        ((net, net), "part of an image"),
        ((), "usage"),
    ):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and text in done.stderr


def test_the_cmake_package_and_the_threads_example(folder: Path) -> None:
    build = folder / "build"
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    (package,) = flags("--cmakedir")
    run(cmake, "-S", EXAMPLES, "-B", build, f"-Ddsp_DIR={package}", "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CXX_FLAGS={' '.join(WARNINGS)}")  # fmt: skip
    run(cmake, "--build", build, "--target", "threads")
    assert "4 threads agree" in run(build / "threads", exported(folder), 4, 5)


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="no pkg-config")
def test_pkg_config() -> None:
    given = run(
        "pkg-config", "--cflags", "--libs", "dsp", PKG_CONFIG_PATH=str(config.ROOT / "lib" / "pkgconfig")
    ).split()
    assert given[-1] == "-ldsp"
    assert (Path(given[0].removeprefix("-I")) / "dsp_runtime.h").is_file()
    assert (Path(given[1].removeprefix("-L")) / "libdsp.so").is_file()


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_what_the_shared_library_needs_and_shows() -> None:
    """libc alone (with libm and the loader), and its own interface."""
    library = config.ROOT / "lib" / "libdsp.so"
    dynamic = [line for line in run("readelf", "-d", library).splitlines() if "NEEDED" in line]
    system = {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert {line.split("[")[1].rstrip("]") for line in dynamic} <= system
    shown = {
        line.split()[-1].partition("@")[0]
        for line in run("readelf", "--dyn-syms", "-W", library).splitlines()
        if " UND " not in line and (" GLOBAL " in line or " WEAK " in line)
    } - {"DSP_1"}
    header = (config.ROOT / "include" / "dsp_runtime.h").read_text()
    assert shown == set(re.findall(r"DSP_API [^;]*?\b(dsp_\w+)\(", header)) and "dsp_model_run" in shown
    assert library.stat().st_size < 4 << 20


def test_a_package_without_the_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config, "ROOT", Path("/nowhere"))
    assert config.main(["--libs"]) == 1
    assert "without its compiled part" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        config.main([])
