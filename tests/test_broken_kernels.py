"""What the emulation of a GPU (docs/cuda.md) finds, each shown by a kernel that was broken on purpose: a
patch under ``tests/native/broken`` is applied to a copy of one source, that unit alone is compiled again, and
the emulation must say what the patch expects.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "native" / "emulation"
CORE = ("core/status.cpp", "core/scratch.cpp", "conv/plan.cpp")
# Of each program: the kernels, what they are linked with, and its main function.
PROGRAMS = {
    "emulate": ("conv/conv2d.cu", ("conv/cuda_check.cpp", "conv/cuda_table.cpp")),
    "emulate_lasso": ("assignment/lasso.cu", ("assignment/cuda_table.cpp",)),
}


@dataclass(frozen=True)
class Patch:
    """``changes``: (block of lines, what stands in its place); ``always``: not in the nightly run alone."""

    name: str
    file: str
    expected: str
    changes: tuple[tuple[str, str], ...]
    always: bool

    @property
    def program(self) -> str:
        return "emulate_lasso" if "assignment" in self.file else "emulate"

    def apply(self, text: str) -> str:
        for before, after in self.changes:
            assert text.count(before) == 1, (
                f"{self.name}: its lines stand {text.count(before)} times in {self.file}"
            )
            text = text.replace(before, after)
        return text


def read(path: Path) -> Patch:
    """A unified diff of one file, with a heading. Numbers of lines are not looked at: the lines say where."""
    head, _, diff = path.read_text(encoding="utf-8").partition("--- a/")
    expected = re.search(r"^Expected: (.+)$", head, re.MULTILINE)
    assert expected is not None, path
    file, *hunks = re.split(r"^@@.*@@.*\n", diff, flags=re.MULTILINE)
    changes = []
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        changes.append((before, "".join(line[1:] for line in lines if line[0] in " +")))
    name, always = path.stem, "Run: always" in head
    return Patch(name, file.splitlines()[0].strip(), expected[1].strip(), tuple(changes), always)


PATCHES = [read(path) for path in sorted((ROOT / "tests" / "native" / "broken").glob("*.patch"))]


class Build:
    """A program's parts, compiled once; ``run`` compiles its kernels and runs it."""

    def __init__(self, compiler: str, program: str, folder: Path) -> None:
        self.compiler, self.folder = compiler, folder
        self.kernels, rest = PROGRAMS[program]
        sources = [ROOT / "csrc" / name for name in (*CORE, *rest)]
        sources += [EMULATION / "emulation.cpp", EMULATION / f"{program}.cpp"]
        self.objects = [self.compile(source, folder) for source in sources]

    def compile(self, source: Path, folder: Path, first: Path | None = None) -> Path:
        out = folder / f"{source.name}.o"
        includes = [path for path in (first, ROOT / "csrc", EMULATION) if path is not None]
        self.call(
            "-DDSP_EMULATE",
            *(f"-I{path}" for path in includes),
            "-x",
            "c++",
            "-c",
            str(source),
            "-o",
            str(out),
        )
        return out

    def call(self, *arguments: str) -> None:
        command = [self.compiler, "-std=c++17", "-O1", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def run(self, patch: Patch | None) -> subprocess.CompletedProcess[str]:
        name = "whole" if patch is None else patch.name
        folder = self.folder / name
        (folder / Path(self.kernels).parent).mkdir(parents=True)
        if patch is not None:
            changed = folder / Path(patch.file).relative_to("csrc")
            changed.parent.mkdir(parents=True, exist_ok=True)
            changed.write_text(patch.apply((ROOT / patch.file).read_text(encoding="utf-8")), encoding="utf-8")
        mine = folder / self.kernels
        kernels = self.compile(mine if mine.exists() else ROOT / "csrc" / self.kernels, folder, folder)
        program = folder / "program"
        self.call(str(kernels), *map(str, self.objects), "-pthread", "-o", str(program))
        return subprocess.run(
            [program, "--rounds", "0"], capture_output=True, text=True, check=False, timeout=200
        )


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.nightly)])
def test_broken_kernels_are_found(program: str, which: str, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    patches = [p for p in PATCHES if p.program == program and (p.always or which == "all")]
    assert patches
    build = Build(compiler, program, tmp_path)
    whole = build.run(None)
    assert whole.returncode == 0, whole.stderr
    missed = []
    for patch in patches:
        done = build.run(patch)
        if done.returncode == 0 or re.search(patch.expected, done.stderr) is None:
            missed.append(
                f"{patch.name}: status {done.returncode}, {done.stderr.strip()!r}, not {patch.expected!r}"
            )
    assert not missed, "\n".join(missed)


def test_patches_apply_to_the_kernels_as_they_are() -> None:
    for patch in PATCHES:
        text = (ROOT / patch.file).read_text(encoding="utf-8")
        assert patch.apply(text) != text
