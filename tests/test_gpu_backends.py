"""Why a backend for GPUs cannot run: a driver and an installation of any kind, made up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
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

WITHOUT_TRITON = "triton is not installed"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends.forget()
    yield
    backends.forget()


def device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    """As if there were a CUDA device of this compute capability; None: none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    backends.forget()


def module(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
    """As if the compiled module were this one."""
    made = {
        "abi_version": lambda: _compiled.ABI_VERSION,
        "activations": lambda: [(row.name, row.code, len(row.parameters)) for row in activations.ROWS],
        "build_info": lambda: {"cuda_architectures": "80;90"},
        "cuda_device_count": lambda: (0, 1),
        "last_error": lambda: "",
        "use_team": lambda runner: None,
    } | answers
    monkeypatch.setattr(_compiled.importlib, "import_module", lambda name: SimpleNamespace(**made))
    backends.forget()


def triton(monkeypatch: pytest.MonkeyPatch, found: ModuleType | None = None) -> None:
    monkeypatch.setitem(sys.modules, "triton", found or ModuleType("triton"))
    backends.forget()


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, None)
    module(monkeypatch)
    found = available_backends()
    assert found["triton"] == found["cuda"] == "no CUDA device"
    layout = GroupLayout(1, 1, [([0], [0])])
    for name in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"backend '{name}' cannot run here: no CUDA device; .*accepted"):
            permuted_grouped_conv2d(
                torch.ones(1, 1, 2, 2), torch.ones(1), layout, kernel_size=1, backend=name
            )


@pytest.mark.parametrize("capability", [(7, 5), (5, 0), (7, 0)])
def test_a_capability_that_is_too_low(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    device(monkeypatch, capability)
    module(monkeypatch)
    triton(monkeypatch)
    why = f"needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    assert available_backends()["triton"] == available_backends()["cuda"] == why
    assert backends.choose(None, "cuda", torch.float16) == "reference"
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0"):
        backends.choose("triton", "cuda", torch.float16)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_a_device_that_will_do(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    device(monkeypatch, capability)
    module(monkeypatch)
    triton(monkeypatch)
    found = available_backends()
    assert found["triton"] is None and found["cuda"] is None
    assert backends.choose(None, "cuda", torch.bfloat16) == "triton"
    assert backends.choose("cuda", "cuda", torch.bfloat16) == "cuda"
    assert backends.choose(None, "cuda", torch.float64) == "reference"
    for name in ("triton", "cuda"):
        assert "not torch.float64" in str(backends.can_run(name, "cuda", torch.float64))
        assert "not on cpu" in str(backends.can_run(name, "cpu", torch.float32))


def test_no_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device(monkeypatch, (9, 0))
    module(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)  # the import fails as for a missing package
    backends.forget()
    assert available_backends()["triton"] == WITHOUT_TRITON
    with caplog.at_level("INFO", logger="dsp_kernels"):
        assert backends.choose(None, "cuda", torch.float16) == "reference"
    assert f"backend triton not used: {WITHOUT_TRITON}" in caplog.messages
    with pytest.raises(ValueError, match=f"backend 'triton' cannot run here: {WITHOUT_TRITON}"):
        backends.choose("triton", "cuda", torch.float16)


@pytest.mark.parametrize(
    "error", [ImportError("libcuda.so.1: cannot open"), ModuleNotFoundError("no numpy", name="numpy")]
)
def test_a_triton_that_does_not_load(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    device(monkeypatch, (9, 0))

    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "triton":
                raise error

    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    backends.forget()
    assert available_backends()["triton"] == f"triton cannot be loaded: {error}"


def test_a_module_without_cuda_kernels_or_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, (9, 0))
    module(monkeypatch, build_info=lambda: {"cuda_architectures": None})
    assert "built without CUDA kernels: no nvcc was found" in str(available_backends()["cuda"])
    module(
        monkeypatch,
        cuda_device_count=lambda: (4, 0),
        last_error=lambda: "CUDA driver version is insufficient",
    )
    assert available_backends()["cuda"] == "CUDA driver version is insufficient"
    module(monkeypatch, abi_version=lambda: 1)
    assert "built for ABI 1" in str(available_backends()["cuda"])


def test_the_cuda_kernels_are_never_chosen_by_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    device(monkeypatch, (9, 0))
    module(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    backends.forget()
    assert available_backends()["cuda"] is None
    assert backends.choose(None, "cuda", torch.float16) == "reference"
    monkeypatch.setenv(backends.ENVIRONMENT, "cuda")
    assert backends.choose(None, "cuda", torch.float16) == "cuda"
