"""On a CUDA device: the same answers as on the CPU, on whichever backend the rule takes there."""

from __future__ import annotations

import nets
import pytest
import torch

import dsp_kernels
import dsprune
from dsp_kernels import GroupLayout, permuted_grouped_conv2d

pytestmark = pytest.mark.gpu

DEVICE = "cuda"

LAYOUT = GroupLayout(6, 8, [([0, 2, 3], [0, 1, 5]), ([1, 2, 4, 5], [2, 7]), ([5], [3, 4])])


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_convolution_and_gradients(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = torch.randn(3, 6, 9, 7, dtype=torch.float64)
    weight = torch.randn(LAYOUT.weight_numel((3, 3)), dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64)
    grad = torch.randn(3, 8, 5, 4, dtype=torch.float64)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, weight, bias)]
        inputs = leaves[0].contiguous(memory_format=memory_format)
        out = permuted_grouped_conv2d(
            inputs, leaves[1], LAYOUT, leaves[2], kernel_size=3, stride=2, padding=1, activation="relu"
        )
        assert out.is_contiguous(memory_format=memory_format)
        gradients = torch.autograd.grad(out, leaves, grad.to(device, dtype))
        return [out.detach(), *gradients]

    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for here, there in zip(run("cpu", torch.float64), run("cuda", dtype), strict=True):
        assert there.device.type == "cuda" and there.dtype == dtype
        torch.testing.assert_close(there.double().cpu(), here, rtol=tolerance, atol=tolerance)


def test_the_native_backend_refuses_a_cuda_tensor() -> None:
    if dsp_kernels.available_backends()["native"] is not None:
        pytest.skip(f"native backend: {dsp_kernels.available_backends()['native']}")
    x = torch.randn(1, 6, 5, 5, device="cuda")
    weight = torch.randn(LAYOUT.weight_numel((1, 1)), device="cuda")
    with pytest.raises(ValueError, match="runs on cpu, not on cuda"):
        permuted_grouped_conv2d(x, weight, LAYOUT, kernel_size=1, backend="native")


def test_assignment_and_penalty() -> None:
    logits = torch.randn(3, 12, dtype=torch.float64)
    noise = torch.randn(3, 12, dtype=torch.float64)
    weights = [torch.randn(8, 6, 3, 3, dtype=torch.float64), torch.randn(4, 8, 1, 1, dtype=torch.float64)]

    def run(device: str) -> list[torch.Tensor]:
        alpha = logits.to(device).requires_grad_()
        leaves = [w.to(device).requires_grad_() for w in weights]
        sample = dsp_kernels.sample_groups(alpha, 0.5, noise=noise.to(device))
        penalties = dsp_kernels.group_lasso(leaves, list(sample.split([8, 4], dim=1)))
        return [sample.detach(), penalties.detach(), *torch.autograd.grad(penalties.sum(), [alpha, *leaves])]

    for here, there in zip(run("cpu"), run("cuda"), strict=True):
        assert there.device.type == "cuda"
        torch.testing.assert_close(there.cpu(), here, rtol=1e-10, atol=1e-12)


def test_fresh_memory_is_poisoned_here_too() -> None:
    assert torch.empty(1000, device="cuda").isnan().all()
    assert torch.randn(10, device="cuda").new_empty(7).isnan().all()


def test_packed_network() -> None:
    model = nets.structured_zeros(nets.random_norms(nets.Residual())).eval()
    packed = dsprune.pack(model, torch.randn(1, 3, 16, 16)).to(DEVICE)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(packed(x.to(DEVICE)).cpu(), model(x), rtol=1e-3, atol=1e-4)
    assert packed.program_reason is not None and "cpu" in packed.program_reason


def test_packing_on_the_device() -> None:
    model = nets.structured_zeros(nets.random_norms(nets.Zoo())).eval().to(DEVICE)
    x = torch.randn(2, 3, 16, 16, device=DEVICE)
    packed = dsprune.pack(model, x)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-3, atol=1e-4)


def test_group_learner() -> None:
    model = nets.Residual().to(DEVICE)
    x, y = torch.randn(8, 3, 16, 16, device=DEVICE), torch.randint(5, (8,), device=DEVICE)
    learner = dsprune.GroupLearner(model, x, groups=3, strength=1e-3, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = [
        learner.step(lambda: torch.nn.functional.cross_entropy(model(x), y), optimizer) for _ in range(4)
    ]
    assert all(bool(loss.isfinite()) for loss in losses)
    assert all(bool((groups < 3).all()) for groups in learner.assignment().values())
