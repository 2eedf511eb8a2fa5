"""What the tests could not look at on this machine, in words that a log's reader does not pass over:
``python tests/unchecked.py``, which ``make test`` does last. Tests are skipped for these reasons one by one.
"""

from __future__ import annotations

import importlib.util
from typing import Any

MISSING = {
    "compiler": "the compiled core and all of its kernels: {reason}",
    "nvcc": "the CUDA kernels' machine code, registers and spills, on any architecture: the core was built "
    "without nvcc",
    "triton": "the Triton kernels, compiled or interpreted: triton is not installed",
    "device": "whatever needs a CUDA device (docs/not-yet-run.md): {reason}",
}


def unchecked(native: str | None, info: dict[str, Any] | None, triton: bool, device: str | None) -> list[str]:
    """The lines to print, one for each thing that is missing.

    Args:
        native: why the compiled core cannot run, or None.
        info: what the core says of its build, where there is one.
        triton: whether Triton is installed.
        device: why no CUDA device can be used, or None.
    """
    out = []
    if native is not None or info is None:
        out.append(MISSING["compiler"].format(reason=native or "no module"))
    elif info["cuda_architectures"] is None:
        out.append(MISSING["nvcc"])
    if not triton:
        out.append(MISSING["triton"])
    if device is not None:
        out.append(MISSING["device"].format(reason=device))
    return out


def main() -> None:
    import torch

    from dsp_kernels import available_backends
    from dsp_kernels.backends import native_module

    native = available_backends()["native"]
    lines = unchecked(
        native,
        None if native is not None else native_module().build_info(),
        importlib.util.find_spec("triton") is not None,
        None if torch.cuda.is_available() else "there is none",
    )
    if not lines:
        print("Nothing was left unchecked for want of a tool or a device.")
        return
    print("=" * 30, "NOT CHECKED ON THIS MACHINE", "=" * 30)
    for line in lines:
        print("NOT CHECKED:", line)
    print("=" * 89)


if __name__ == "__main__":
    main()
