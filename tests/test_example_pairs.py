"""Scripts of examples/ that save in one process and load in another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsp_kernels import available_backends

pytestmark = pytest.mark.nightly

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(script: str, *arguments: object) -> str:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(
    available_backends()["native"] is not None, reason=f"native: {available_backends()['native']}"
)
def test_export_torch(tmp_path: Path) -> None:
    """The program and the compiled package, in another process and at other sizes: the same bits."""
    run("export_torch.py", "--out", tmp_path / "new", "--small", "--aoti")
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"packed.pt2", "compiled.pt2", "logits.pt"}
    said = run("export_torch.py", "--out", tmp_path / "new", "--load")
    assert "packed.pt2: the same bits" in said and "compiled.pt2: the same bits" in said


def test_prune_transformers_resnet(tmp_path: Path) -> None:
    """The newcomer's path: the network in the file is the one that was pruned, and does its work."""
    pytest.importorskip("transformers")
    said = run("prune_transformers_resnet.py", "--out", tmp_path, "--epochs", "1")
    accuracy = re.findall(r"packed.safetensors: test accuracy ([\d.]+)%", said)
    loaded = run("prune_transformers_resnet.py", "--out", tmp_path, "--load")
    assert f"loaded: test accuracy {accuracy[0]}%" in loaded and "batch 32: dense" in loaded
    assert float(accuracy[0]) > 30
