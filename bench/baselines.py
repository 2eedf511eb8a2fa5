"""What stands beside a packed network: the dense one before pruning, and a narrower one."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dsprune.graph import clean_copy


def without_zeros(model: nn.Module) -> nn.Module:
    """The network as it was before pruning, as far as time is concerned."""
    dense = clean_copy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in dense.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.add_(1e-3 * torch.randn(module.weight.shape, generator=generator))
            elif isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.add_(1e-3)
    return dense


def _scaled(model: nn.Module, factor: float, multiple: int) -> nn.Module:
    """The architecture with every width but the image's and the classes' scaled; on the meta device."""

    def width(channels: int) -> int:
        return max(multiple, multiple * round(factor * channels / multiple))

    scaled = clean_copy(model).to("meta")
    image = next(m for m in scaled.modules() if isinstance(m, nn.Conv2d)).in_channels
    with torch.device("meta"):
        for module in scaled.modules():
            if isinstance(module, nn.Conv2d):
                if module.groups != 1:
                    raise ValueError("narrow: the network has grouped convolutions")
                if module.in_channels != image:
                    module.in_channels = width(module.in_channels)
                module.out_channels = width(module.out_channels)
                weight = torch.empty(module.out_channels, module.in_channels, *module.kernel_size)
                module.weight = nn.Parameter(weight)
                if module.bias is not None:
                    module.bias = nn.Parameter(torch.empty(module.out_channels))
            elif isinstance(module, nn.BatchNorm2d):
                module.num_features = width(module.num_features)
                fresh = nn.BatchNorm2d(module.num_features)
                module.weight, module.bias = fresh.weight, fresh.bias
                module.running_mean, module.running_var = fresh.running_mean, fresh.running_var
            elif isinstance(module, nn.Linear):
                module.in_features = width(module.in_features)
                module.weight = nn.Parameter(torch.empty(module.out_features, module.in_features))
    return scaled.eval()


def narrow(model: nn.Module, example: torch.Tensor, macs: int, multiple: int) -> tuple[nn.Module, int]:
    """The same architecture with fewer channels everywhere, of about ``macs`` multiply-adds, and how many.

    ``example`` is one image. Widths are multiples of ``multiple``, as one would choose them; random weights.
    For chains and residual networks of ordinary convolutions that end in one linear layer.

    Raises ValueError where the network has grouped convolutions.
    """
    best: tuple[nn.Module, int] | None = None
    for step in range(10, 101):
        candidate = _scaled(model, step / 100, multiple)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            candidate(example.to("meta"))
        count = counter.get_total_flops() // 2
        if best is None or abs(count - macs) < abs(best[1] - macs):
            best = candidate, count
    assert best is not None
    network = best[0].to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if not tensor.is_floating_point():
                tensor.zero_()
            elif tensor.dim() > 1:
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
            else:
                tensor.uniform_(0.5, 1.5, generator=generator)
    return network, best[1]
