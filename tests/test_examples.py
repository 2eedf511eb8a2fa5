"""Every script of examples/ runs, in a process of its own, in a short form."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Script, arguments ("{out}" is an empty folder), text in what it prints, modules that it needs.
EXAMPLES: list[tuple[str, list[str], str, list[str]]] = [
    ("train_amp_ema.py", ["--out", "{out}", "--steps", "3", "--form", "packed"], "packed network:", []),
    ("lightning_learn.py", ["--out", "{out}", "--steps", "3"], "packed network:", ["lightning"]),
    ("accelerate_learn.py", ["--out", "{out}", "--epochs", "1", "--cpu"], "packed network:", ["accelerate"]),
    (
        "transformers_learn.py",
        ["--out", "{out}", "--steps", "3"],
        "packed network:",
        ["transformers", "accelerate"],
    ),
    ("export_onnx.py", ["--out", "{out}"], "largest difference", ["onnxscript", "onnxruntime"]),
    (
        "latency_target.py",
        ["--batch", "16", "--latency", "0.6", "--cache", "{out}/c.json"],
        "measured 0.",
        [],
    ),
    ("cuda_graphs_and_compile.py", ["--batch", "2"], "packed, torch.compile: largest difference", []),
    ("torch_prune_masks.py", [], "one layer: largest difference", []),
    ("monai_unet.py", [], "fused: True", ["monai"]),
    ("with_torch_pruning.py", [], "whole channels cut", ["torch_pruning"]),
]

# The shortest run with every change; the others are `nightly`, and one measures times.
MARKS: dict[str, list[str]] = {
    "export_onnx.py": [],
    "torch_prune_masks.py": [],
    "train_amp_ema.py": [],
    "latency_target.py": ["nightly", "alone"],
}

# Run by other tests.
ELSEWHERE = {
    "serve.py": "test_serving.py",
    "ddp_learn.py": "test_distributed.py",
    "export_torch.py": "test_example_pairs.py",
    "prune_transformers_resnet.py": "test_example_pairs.py",
    "recipes.py": "test_recipes.py",
}


@pytest.mark.parametrize(
    ("script", "arguments", "text", "needs"),
    [
        pytest.param(
            *example, marks=[getattr(pytest.mark, mark) for mark in MARKS.get(example[0], ["nightly"])]
        )
        for example in EXAMPLES
    ],
    ids=[" ".join([script, *arguments]) for script, arguments, _, _ in EXAMPLES],
)
def test_example(script: str, arguments: list[str], text: str, needs: list[str], tmp_path: Path) -> None:
    for module in needs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{script} needs {module}, which is not installed")
    command = [sys.executable, str(ROOT / "examples" / script)]
    command += [argument.format(out=tmp_path) for argument in arguments]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    assert text in done.stdout


def test_no_example_is_forgotten() -> None:
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert scripts == {script for script, *_ in EXAMPLES} | set(ELSEWHERE)
    for script, test in ELSEWHERE.items():
        assert script in (ROOT / "tests" / test).read_text(encoding="utf-8")
