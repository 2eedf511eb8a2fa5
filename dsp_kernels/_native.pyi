"""Types of the compiled module; addresses are integers, every call returns a status (0 is success)."""

from typing import Any

def abi_version() -> int: ...
def cpu_isa() -> str: ...
def fma_rounds(rounds: int) -> int: ...
def last_error() -> str: ...
def build_info() -> dict[str, Any]: ...
def conv2d_forward(
    x: int,
    x_numel: int,
    weight: int,
    weight_numel: int,
    plan: int,
    plan_numel: int,
    bias: int,
    residual: int,
    out: int,
    out_numel: int,
    batch: int,
    height: int,
    width: int,
    kh: int,
    kw: int,
    sh: int,
    sw: int,
    ph: int,
    pw: int,
    dh: int,
    dw: int,
    activation: int,
    threads: int,
    prepared: int = 0,
) -> int: ...
def conv2d_prepare(
    kh: int,
    kw: int,
    weight: int,
    weight_numel: int,
    plan: int,
    plan_numel: int,
    prepared: int,
    prepared_numel: int,
) -> int: ...
def conv2d_grad_input(
    grad: int,
    grad_numel: int,
    weight: int,
    weight_numel: int,
    plan: int,
    plan_numel: int,
    grad_x: int,
    grad_x_numel: int,
    batch: int,
    height: int,
    width: int,
    kh: int,
    kw: int,
    sh: int,
    sw: int,
    ph: int,
    pw: int,
    dh: int,
    dw: int,
    threads: int,
) -> int: ...
def conv2d_grad_weight(
    grad: int,
    grad_numel: int,
    x: int,
    x_numel: int,
    plan: int,
    plan_numel: int,
    grad_w: int,
    weight_numel: int,
    batch: int,
    height: int,
    width: int,
    kh: int,
    kw: int,
    sh: int,
    sw: int,
    ph: int,
    pw: int,
    dh: int,
    dw: int,
    threads: int,
) -> int: ...
def program_create(words: int, words_numel: int, floats: int, floats_numel: int) -> tuple[int, int]: ...
def program_run(
    program: int, x: int, x_numel: int, out: int, out_numel: int, batch: int, threads: int
) -> int: ...
def program_destroy(program: int) -> None: ...
def program_output(program: int) -> tuple[int, int, int]: ...
def program_memory(program: int) -> dict[str, int]: ...
def batch_norm_forward(
    x: int,
    numel: int,
    batch: int,
    channels: int,
    pixels: int,
    weight: int,
    bias: int,
    residual: int,
    eps: float,
    activation: int,
    mean: int,
    variance: int,
    out: int,
    threads: int,
) -> int: ...
def batch_norm_backward(
    grad: int,
    x: int,
    y: int,
    numel: int,
    batch: int,
    channels: int,
    pixels: int,
    weight: int,
    bias: int,
    mean: int,
    variance: int,
    eps: float,
    activation: int,
    grad_x: int,
    grad_residual: int,
    grad_weight: int,
    grad_bias: int,
    threads: int,
) -> int: ...
def lasso(
    operation: int,
    element: int,
    words: int,
    words_numel: int,
    numbers: int,
    numbers_numel: int,
    groups: int,
    penalties: int,
    threads: int,
) -> int: ...
