"""Types of the compiled module; addresses are integers, every call returns a status (0 is success)."""

from collections.abc import Sequence
from typing import Any

def abi_version() -> int: ...
def cpu_isa() -> str: ...
def fma_rounds(rounds: int) -> int: ...
def last_error() -> str: ...
def use_team(runner: int) -> None: ...
def build_info() -> dict[str, Any]: ...
def activations() -> list[tuple[str, int, int]]: ...  # name, code, number of parameters
def program_format() -> dict[
    str, Any
]: ...  # magic, version, steps: {name: (code, [(field, kind, least, most)])}
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
    first: float,
    second: float,
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
def program_create(words: int, words_numel: int, floats: Sequence[tuple[int, int]]) -> tuple[int, int]: ...
def program_run(
    program: int, tensors: list[int], numel: list[int], batch: int, threads: int
) -> int: ...  # the inputs, then the outputs
def program_destroy(program: int) -> None: ...
def program_outputs(program: int) -> list[tuple[int, int, int]]: ...
def program_memory(program: int) -> dict[str, int]: ...
def program_profile(
    program: int,
) -> tuple[int, list[tuple[int, bool, tuple[int, int, int], int, float]]]: ...

# name, dtype, shape, least, most
_Info = tuple[str, int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]

def program_file(
    words: int, words_numel: int, floats: int, floats_numel: int, inputs: list[_Info], outputs: list[_Info]
) -> tuple[int, bytes]: ...
def model_load(path: str | bytes) -> tuple[int, int]: ...
def model_load_memory(data: int, bytes: int) -> tuple[int, int]: ...
def model_destroy(model: int) -> None: ...
def model_tensors(model: int) -> tuple[list[_Info], list[_Info]]: ...
def model_plan(
    model: int, inputs: list[tuple[int, tuple[int, ...]]]
) -> tuple[int, list[tuple[int, ...]]]: ...
def model_run(
    model: int,
    inputs: list[tuple[int, tuple[int, ...]]],
    outputs: list[tuple[int, tuple[int, ...]]],
    threads: int,
) -> int: ...
def model_memory(model: int) -> dict[str, int]: ...
def batch_norm_forward(
    x: int,
    numel: int,
    batch: int,
    channels: int,
    pixels: int,
    weight: int,
    bias: int,
    residual: int,
    blank: int,
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
    blank: int,
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
def cuda_device_count() -> tuple[int, int]: ...
def cuda_conv2d_table(
    operation: int,
    precision: int,
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
    plan: int,
    plan_numel: int,
    fill: int,
    blocks_wanted: int,
    words: int,
    words_numel: int,
) -> tuple[int, int]: ...
def cuda_conv2d_sizes(table: int, table_numel: int) -> tuple[int, int, int, int, int, int, int]: ...
def cuda_conv2d_prepare(
    device: int,
    stream: int,
    table: int,
    table_numel: int,
    device_table: int,
    weight: int,
    weight_numel: int,
    prepared: int,
    prepared_bytes: int,
) -> int: ...
def cuda_conv2d_run(
    device: int,
    stream: int,
    table: int,
    table_numel: int,
    device_table: int,
    x: int,
    x_numel: int,
    prepared: int,
    prepared_bytes: int,
    bias: int,
    bias_numel: int,
    residual: int,
    residual_numel: int,
    out: int,
    out_numel: int,
    workspace: int,
    workspace_numel: int,
    activation: int,
) -> int: ...
def cuda_conv2d_grad_weight(
    device: int,
    stream: int,
    table: int,
    table_numel: int,
    device_table: int,
    grad: int,
    grad_numel: int,
    x: int,
    x_numel: int,
    grad_weight: int,
    weight_numel: int,
    workspace: int,
    workspace_numel: int,
) -> int: ...
def cuda_lasso_table(
    element: int, groups: int, shapes: int, shapes_numel: int, words: int, words_numel: int
) -> tuple[int, int]: ...
def cuda_lasso_sizes(
    table: int, table_numel: int, operation: int, directed: int
) -> tuple[int, int, int, int, int]: ...
def cuda_lasso_run(
    operation: int,
    device: int,
    stream: int,
    table: int,
    table_numel: int,
    device_table: int,
    addresses: int,
    addresses_numel: int,
    device_addresses: int,
    logs: int,
    log_stride: int,
    logs_numel: int,
    rates: int,
    scales: int,
    numbers_numel: int,
    log_out: int,
    log_out_stride: int,
    log_out_numel: int,
    penalties: int,
    workspace: int,
    workspace_numel: int,
) -> int: ...
def cuda_sample_groups(
    device: int,
    stream: int,
    element: int,
    divide: int,
    groups: int,
    count: int,
    temperature: float,
    first: int,
    first_stride: int,
    second: int,
    second_stride: int,
    out: int,
) -> int: ...
def cuda_sample_groups_backward(
    device: int,
    stream: int,
    element: int,
    divide: int,
    groups: int,
    count: int,
    temperature: float,
    first: int,
    first_stride: int,
    second: int,
    second_stride: int,
    out: int,
) -> int: ...
