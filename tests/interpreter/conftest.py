"""Triton kernels under Triton's interpreter, on the CPU: ``TRITON_INTERPRET=1 pytest tests/interpreter``.

Whether kernels are interpreted or compiled is settled when their modules are imported, so these tests have a
run of their own (``make test``) and are skipped in any other.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dsp_kernels import backends

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not backends.interpreted():
        reason = "Triton's interpreter is off: TRITON_INTERPRET=1 pytest tests/interpreter"
    elif (missing := backends.available_backends()["triton"]) is not None:
        reason = f"triton backend: {missing}"
    else:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
