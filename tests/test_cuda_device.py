"""The CUDA kernels on a device: the cases of the emulation, and what only a device can show."""

from __future__ import annotations

from typing import Any

import conv_cases
import pytest
import torch
from conv_cases import CORNERS, Case, cases, check_forward, check_gradients
from hypothesis import given, settings
from torch import Tensor

from dsp_kernels import GroupLayout, available_backends, permuted_grouped_conv2d

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
DEVICE = "cuda"
BACKEND = "cuda"


def on_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def there_and_back(*args: Any, **kwargs: Any) -> Tensor:
    """The convolution of tensors on the CPU, made on the device."""
    moved = {name: on_device(value) for name, value in kwargs.items()}
    return permuted_grouped_conv2d(*map(on_device, args), **moved).cpu()


@pytest.fixture(autouse=True, scope="module")
def _on_the_device() -> Any:
    if available_backends()[BACKEND] is not None:
        pytest.skip(f"{BACKEND} backend: {available_backends()[BACKEND]}")
    # monkeypatch cannot put this one back: the module makes it up at each access.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_cases, "permuted_grouped_conv2d", there_and_back)
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CORNERS)
def test_corners(name: str, dtype: torch.dtype) -> None:
    check_forward(CORNERS[name], dtype, BACKEND)
    check_gradients(CORNERS[name], dtype, BACKEND)


@settings(max_examples=60)
@given(case=cases())
def test_random_cases(case: Case) -> None:
    dtype = DTYPES[case.seed % 3]
    out = check_forward(case, dtype, BACKEND)
    grads = check_gradients(case, dtype, BACKEND)
    for _ in range(3):
        assert out.equal(check_forward(case, dtype, BACKEND))
        for first, again in zip(grads, check_gradients(case, dtype, BACKEND), strict=True):
            assert first.equal(again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "size", "kernel", "stride"), [(256, 14, 3, 1), (128, 28, 3, 2), (512, 7, 1, 1)]
)
def test_layers_of_a_large_network(
    width: int, size: int, kernel: int, stride: int, dtype: torch.dtype
) -> None:
    for batch in (1, 32):
        case = Case(
            3, width, width, 4, batch, (size, size), (kernel, kernel), (stride, stride), (kernel // 2,) * 2,
            (1, 1), residual=True, activation="relu", channels_last=True,
        )  # fmt: skip
        check_forward(case, dtype, BACKEND)
        check_gradients(case, dtype, BACKEND)


def test_a_call_is_captured_in_a_graph_once_it_has_run() -> None:
    layout = GroupLayout(16, 24, [(range(10), range(20)), ([11, 13, 15], [20, 22])])
    x = torch.randn(2, 16, 9, 9, device=DEVICE)
    weight = torch.randn(layout.weight_numel((3, 3)), device=DEVICE)

    def run() -> Tensor:
        return permuted_grouped_conv2d(x, weight, layout, kernel_size=3, padding=1, backend=BACKEND)

    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    x.neg_()
    graph.replay()
    assert out.equal(run())
    assert not out.equal(expected)


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    layout = GroupLayout(8, 8, [(range(8), range(8))])
    x, weight = torch.randn(1, 8, 4, 4), torch.randn(64)
    expected = permuted_grouped_conv2d(x, weight, layout, kernel_size=1, backend="reference")
    out = permuted_grouped_conv2d(x.to("cuda:1"), weight.to("cuda:1"), layout, kernel_size=1, backend=BACKEND)
    assert out.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(out.cpu(), expected)
