"""The runtime in an environment without torch: examples/serve.py under load, and the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nets
import pytest
from test_runtime import exported, pytestmark

from bench import runtime as bench_runtime

__all__ = ["pytestmark"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def plain_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with NumPy, FastAPI and uvicorn alone."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    pip = [python, "-m", "pip", "-q", "--disable-pip-version-check", "install", "numpy", "fastapi", "uvicorn"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"packages cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 1
    return python


@pytest.mark.nightly
def test_the_service_under_load(folder: Path, plain_python: Path) -> None:
    """Mixed batches, wrong requests, workers killed: the same bits, all workers back, memory flat."""
    done = subprocess.run(
        [plain_python, ROOT / "bench" / "serve_load.py", exported(folder, nets.Residual),
         "--requests", "2000", "--kills", "3"],
        capture_output=True, text=True, timeout=1200, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] >= 1 and result["wrong"] == 0 and result["workers_at_the_end"] == 2
    assert result["answers"] + result["refused"] == 2000 and result["refused"] > 0


@pytest.mark.nightly
def test_the_benchmark_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_runtime, "ROUNDS", 1)
    rows = bench_runtime.measure("ResNet-20", sys.executable, 0.01)
    packed, in_c = rows["packed"], rows["packed in C"]
    # The promise of docs/deploy.md: weights, activations and 20 MB.
    most = packed["memory"]["weight_bytes"] + packed["memory"]["arena_bytes"] + (20 << 20)
    assert 0 < packed["held_bytes"] < most and 0 < in_c["held_bytes"] < most
    env = {"cpu": "", "date": "", "commit": ""}
    results = {"environment": env, "load": "", "library": bench_runtime.library(), "networks": {"net": rows}}
    assert "| net | packed in C |" in bench_runtime.table(results)
