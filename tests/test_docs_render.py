"""`make docs`: the docstrings render without a warning, every public function among them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dsprune

ROOT = Path(__file__).resolve().parent.parent


def test_the_docstrings_render(tmp_path: Path) -> None:
    if importlib.util.find_spec("pdoc") is None:
        pytest.skip("pdoc is not installed")
    modules_of = ("interop", "latency", "models", "nn")  # which dsprune itself names
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    modules = re.findall(r"^DOCUMENTED := (.*)$", makefile, re.MULTILINE)[0].split()
    command = re.findall(r"-W error -m pdoc (.*) --output-directory", makefile)[0].split()
    path = os.pathsep.join(entry for entry in sys.path if entry)
    render = [sys.executable, "-W", "error", "-m", "pdoc", *command]
    done = subprocess.run(
        [*render, "--output-directory", str(tmp_path), *modules],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0 and "Warn" not in done.stderr, done.stderr
    modules += [f"dsprune.{name}" for name in modules_of]
    pages = {module: tmp_path / f"{module.replace('.', '/')}.html" for module in modules}
    assert all(page.stat().st_size > 10_000 for page in pages.values())
    text = pages["dsprune"].read_text(encoding="utf-8")
    assert all(f'id="{name}"' in text for name in dsprune.__all__ if name not in modules_of)
