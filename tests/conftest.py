"""What every test gets: poisoned memory, fixed seeds, reproducible hypothesis, and the authors' data."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.overrides
import torch.utils._device
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# Tests that build the package want it without nvcc, which takes a minute for all devices.
os.environ.setdefault("DSP_KERNELS_CUDA", "0")

# The same examples on every machine and in every run; "explore" looks for new ones.
settings.register_profile("ci", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


# ---- poisoned memory ----
#
# Fresh memory is often zero, and an element that a kernel forgets to write then looks like a right answer. So
# what torch hands out uninitialised is filled with NaN, or with the largest integer. torch's own
# fill_uninitialized_memory is not used: it needs deterministic mode, which swaps torch's algorithms and would
# hide a lack of determinism of ours. The replacement stays for the whole run: compilers keep functions by
# identity.


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        return _poison(allocate(*args, **kwargs))

    return wrapper


POISONED_FUNCTIONS = ("empty", "empty_like", "empty_strided", "empty_permuted")
POISONED_METHODS = ("new_empty", "new_empty_strided")


def _install_poison() -> None:
    # Tables filled on first use, which must hold the real functions: `with torch.device(...)` looks them up.
    torch.utils._device._device_constructors()
    torch.overrides.get_ignored_functions()
    torch.overrides.get_overridable_functions()
    for name in POISONED_FUNCTIONS:
        setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in POISONED_METHODS:
        setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


_install_poison()


# ---- options and fixtures ----


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dsp-kernels")
    group.addoption("--authors", metavar="DIR", help="the authors' checkpoints (also: DSP_AUTHORS_DATA)")
    group.addoption("--single-thread", action="store_true", help="run torch on one thread")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--single-thread"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    built = (
        "this torch has no CUDA"
        if torch.version.cuda is None
        else f"torch sees none (CUDA {torch.version.cuda})"
    )
    skip = pytest.mark.skip(reason=f"no CUDA device: {built}")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds_and_threads() -> Iterator[None]:
    """The same random numbers for a test whichever tests run before it; its settings of torch end with it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def authors_data(pytestconfig: pytest.Config) -> Path:
    """The folder of the authors' checkpoints; the test is skipped where there is none."""
    named = pytestconfig.getoption("--authors") or os.environ.get("DSP_AUTHORS_DATA")
    path = Path(named) if named else ROOT.parent / "shared" / "data" / "authors"
    if not path.is_dir():
        if named:
            pytest.fail(f"the authors' data: {named} is no folder")
        pytest.skip(
            "the authors' checkpoints are not here: name their folder by --authors or DSP_AUTHORS_DATA"
        )
    return path
