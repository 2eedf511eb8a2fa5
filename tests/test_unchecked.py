"""What is said of checks that this machine cannot make."""

from __future__ import annotations

import pytest
import torch
import unchecked

BUILT = {"cuda_architectures": "80-real;100"}


def test_what_is_missing_is_named() -> None:
    assert unchecked.unchecked(None, BUILT, True, None) == []
    (line,) = unchecked.unchecked(None, {"cuda_architectures": None}, True, None)
    assert "machine code" in line and "without nvcc" in line
    lines = unchecked.unchecked("no C++ compiler on PATH", None, False, "there is none")
    assert len(lines) == 3
    assert "no C++ compiler on PATH" in lines[0] and "triton" in lines[1] and "not-yet-run.md" in lines[2]


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    unchecked.main()
    said = capsys.readouterr().out
    assert ("NOT CHECKED: whatever needs a CUDA device" in said) != torch.cuda.is_available()
