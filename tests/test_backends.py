"""Which backend runs, and why the others do not."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsp_kernels import (
    GroupLayout,
    _compiled,
    activations,
    available_backends,
    backends,
    permuted_grouped_conv2d,
)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    backends.forget()
    yield
    backends.forget()


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As if the module had not been built; returns where the build's record is looked for."""
    record = tmp_path / "_build_info.json"
    monkeypatch.setattr(_compiled, "BUILD_INFO", record)
    _importing(monkeypatch, ModuleNotFoundError("No module", name="dsp_kernels._native"))
    return record


def _importing(monkeypatch: pytest.MonkeyPatch, result: object) -> None:
    def load(name: str) -> object:
        assert name == "dsp_kernels._native"
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(_compiled.importlib, "import_module", load)


@pytest.fixture
def with_native(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(
        abi_version=lambda: _compiled.ABI_VERSION,
        activations=lambda: [(row.name, row.code, len(row.parameters)) for row in activations.ROWS],
        use_team=lambda runner: None,
    )
    _importing(monkeypatch, module)


def test_every_backend_is_listed_and_the_reference_always_runs() -> None:
    found = available_backends()
    assert tuple(found) == backends.NAMES
    assert found["reference"] is None
    assert all(reason is None or reason for reason in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_triton_says_that_there_is_no_device() -> None:
    assert available_backends()["triton"] == "no CUDA device"


def test_no_record_of_the_build(without_native: Path) -> None:
    assert available_backends()["native"] == "not built"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"native": null}', '"text"'])
def test_a_useless_record_of_the_build(without_native: Path, text: str) -> None:
    without_native.write_text(text, encoding="utf-8")
    assert available_backends()["native"] == "not built"


def test_the_builds_own_reason(without_native: Path) -> None:
    without_native.write_text(json.dumps({"native": "not built: no C++ compiler"}), encoding="utf-8")
    assert available_backends()["native"] == "not built: no C++ compiler"
    with pytest.raises(RuntimeError, match="native backend is not available: not built: no C"):
        backends.native_module()


def test_a_module_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    _importing(monkeypatch, ImportError("libgomp.so.1: cannot open"))
    assert available_backends()["native"] == "cannot be loaded: libgomp.so.1: cannot open"


def test_a_module_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    _importing(monkeypatch, SimpleNamespace(abi_version=lambda: 999))
    assert "built for ABI 999" in str(available_backends()["native"])
    assert backends.choose(None, "cpu", torch.float32) == "reference"


@pytest.mark.usefixtures("with_native")
@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, "native"),
        ("cpu", torch.float64, "reference"),
        ("cpu", torch.bfloat16, "reference"),
        ("cuda", torch.float32, "reference"),
        ("meta", torch.float32, "reference"),
    ],
)
def test_the_rule(device: str, dtype: torch.dtype, expected: str) -> None:
    assert backends.choose(None, device, dtype) == expected


@pytest.mark.usefixtures("with_native")
def test_the_environment_comes_before_the_rule_and_after_the_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert backends.choose(None, "cpu", torch.float32) == "reference"
    assert backends.choose("native", "cpu", torch.float32) == "native"
    monkeypatch.setenv(backends.ENVIRONMENT, "native")
    assert backends.choose("reference", "cpu", torch.float32) == "reference"
    monkeypatch.setenv(backends.ENVIRONMENT, "")
    assert backends.choose(None, "cpu", torch.float32) == "native"


@pytest.mark.usefixtures("with_native")
def test_an_environment_that_does_not_fit_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, "native")
    with caplog.at_level(logging.DEBUG, logger="dsp_kernels"):
        for _ in range(3):
            assert backends.choose(None, "cpu", torch.float64) == "reference"
            backends._chosen.clear()
    about = [r for r in caplog.records if "native" in r.getMessage()]
    assert len(about) == 1
    assert about[0].levelno == logging.WARNING
    assert "takes torch.float32, not torch.float64" in about[0].getMessage()


def test_a_backend_passed_over_by_the_rule_is_logged_once(
    without_native: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without_native.write_text('{"native": "not built: no cmake"}', encoding="utf-8")
    with caplog.at_level(logging.INFO, logger="dsp_kernels"):
        for dtype in (torch.float32, torch.float64, torch.float32):
            backends.choose(None, "cpu", dtype)
    about = [r.getMessage() for r in caplog.records if "native" in r.getMessage()]
    assert about == ["backend native not used: not built: no cmake"]


def test_an_unknown_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, "fastest")
    with pytest.raises(ValueError, match=r"DSP_KERNELS_BACKEND must be one of .*got 'fastest'"):
        backends.choose(None, "cpu", torch.float32)


@pytest.mark.parametrize(("name", "error"), [("cudnn", ValueError), ("", ValueError), (3, TypeError)])
def test_an_unknown_argument_is_an_error(name: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="backend must be one of reference, native, triton, cuda, got"):
        backends.choose(name, "cpu", torch.float32)


def test_a_wish_that_cannot_be_met_says_why_and_what_can(without_native: Path) -> None:
    layout = GroupLayout(1, 1, [([0], [0])])
    with pytest.raises(ValueError, match=r"'native' cannot run here: not built.*accepted: \['reference'\]"):
        permuted_grouped_conv2d(
            torch.ones(1, 1, 2, 2), torch.ones(1), layout, kernel_size=1, backend="native"
        )


def test_the_error_and_the_choice_come_from_one_check(without_native: Path) -> None:
    for name in backends.NAMES:
        for device in ("cpu", "cuda"):
            for dtype in (torch.float32, torch.float64):
                reason = backends.can_run(name, device, dtype)
                if reason is None:
                    assert backends.choose(name, device, dtype) == name
                else:
                    with pytest.raises(ValueError) as raised:
                        backends.choose(name, device, dtype)
                    assert reason in str(raised.value)


def test_the_package_imports_and_runs_without_its_compiled_module_and_without_triton() -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "dsp_kernels._native" or name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import torch, dsp_kernels
assert dsp_kernels.available_backends()["native"], dsp_kernels.available_backends()
layout = dsp_kernels.GroupLayout(2, 2, [([0, 1], [1])])
out = dsp_kernels.permuted_grouped_conv2d(torch.ones(1, 2, 1, 1), torch.ones(2), layout, kernel_size=1)
assert out.flatten().tolist() == [0.0, 2.0]
assert "torch._dynamo" not in sys.modules, "the import costs a second more than it must"
"""
    paths = [str(Path(importlib.import_module("dsp_kernels").__file__ or "").parent.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    environment.pop(backends.ENVIRONMENT, None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
