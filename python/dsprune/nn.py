"""The drop-in layer: a convolution whose groups of filters read their own, uneven subsets of the input
channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dsp_kernels import GroupLayout, activations
from dsp_kernels.backends import NAMES, choose
from dsp_kernels.conv import conv2d_from_plan
from dsp_kernels.geometry import Geometry
from dsp_kernels.norm import batch_norm_act, conv2d_batch_norm_act

__all__ = ["PackedBatchNorm2d", "PackedConv2d", "PermutedGroupedConv2d", "conv_norm_act", "norm_act"]


def _check_backend(backend: object) -> None:
    """That it is the name of one; whether it can run is known where the input is."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected one of {list(NAMES)} or None, got {backend!r}")
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend: expected one of {list(NAMES)} or None, got {backend!r}")


class PermutedGroupedConv2d(nn.Module):
    """``activation(conv(x) + bias + residual)`` with a ``GroupLayout`` in place of dense weights.

    Keeps ``nn.Conv2d``'s attributes (``in_channels``, ``out_channels``, ``kernel_size``, ``stride``,
    ``padding``, ``dilation``, ``padding_mode``), so that model code that reads them goes on to work;
    ``groups`` is 1 because the groups here are uneven: they are in ``layout``.

    Shapes: ``x`` (N, in_channels, H, W), ``residual`` and the result (N, out_channels, H', W'). ``weight`` is
    1-D, the groups in order, each (filters, channels, kh, kw); ``bias`` (out_channels,) or None. Any floating
    dtype.

    Args:
        layout: who reads what; its ``in_channels`` and ``out_channels`` are the layer's.
        kernel_size, stride, padding, dilation, padding_mode: as in ``nn.Conv2d``, ``padding="same"``
            included.
        bias: whether there is one.
        activation: None, or a name of ``dsp_kernels.activations``, applied after bias and residual.
        backend: which implementation runs (``dsp_kernels.available_backends()``); None: chosen at each call.

    Raises:
        TypeError, ValueError: an argument that is not of this form.
    """

    plan: torch.Tensor
    blank: torch.Tensor | None  # uint8: the filters of no group, whose convolution is 0

    def __init__(
        self,
        layout: GroupLayout,
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        activation: str | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layout, GroupLayout):
            raise TypeError(f"layout: expected a GroupLayout, got {type(layout).__name__}")
        activations.find(activation)
        _check_backend(backend)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(
                f"padding_mode: expected 'zeros', 'reflect', 'replicate' or 'circular', got {padding_mode!r}"
            )
        self.layout = layout
        self.in_channels, self.out_channels = layout.in_channels, layout.out_channels
        geometry = Geometry.of(kernel_size, stride, padding, dilation)
        self.kernel_size, self.stride, self.dilation = geometry.kernel, geometry.stride, geometry.dilation
        self.padding = padding if isinstance(padding, str) else (geometry.pads[0][0], geometry.pads[1][0])
        self.padding_mode, self.groups, self.transposed = padding_mode, 1, False
        self.activation, self.backend = activation, backend
        # What runs: zero padding inside the kernel where it is symmetric, F.pad before it otherwise.
        inside = padding_mode == "zeros" and geometry.padding is not None
        (top, bottom), (left, right) = geometry.pads
        outer = (left, right, top, bottom)
        self._inner_padding = (top, left) if inside else (0, 0)
        self._outer_padding = None if inside or not any(outer) else outer
        self.weight = nn.Parameter(
            torch.empty(layout.weight_numel(self.kernel_size), device=device, dtype=dtype)
        )
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("plan", layout.plan().clone(), persistent=False)
        blank = torch.ones(self.out_channels, dtype=torch.uint8)
        for _, filters in layout.groups:
            blank[list(filters)] = 0
        self.register_buffer("blank", blank if bool(blank.any()) else None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform weights with each group's own fan-in, as ``nn.Conv2d`` has for its one."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        with torch.no_grad():
            offset = 0
            for channels, filters in self.layout.groups:
                count = len(channels) * len(filters) * taps
                if count:
                    bound = 1 / math.sqrt(len(channels) * taps)
                    self.weight[offset : offset + count].uniform_(-bound, bound)
                offset += count
            if self.bias is not None:
                self.bias.zero_()

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        layout: GroupLayout | None = None,
        *,
        activation: str | None = None,
        backend: str | None = None,
    ) -> PermutedGroupedConv2d:
        """The packed form of a plain convolution; weights outside the layout are left out.

        Args:
            conv: groups 1, floating weights of any dtype on any device. Not changed.
            layout: None: filters with equal sets of non-zero channels form a group.

        Raises:
            TypeError: ``conv`` is no ``nn.Conv2d``. ValueError: it has groups, or ``layout`` is of another
                shape.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected a torch.nn.Conv2d, got {type(conv).__name__}")
        if conv.groups != 1:
            raise ValueError(f"conv: expected groups=1, got {conv.groups}")
        weight = conv.weight.detach()
        if layout is None:
            layout = GroupLayout.from_mask(weight.flatten(2).ne(0).any(-1).cpu())
        layer = cls(
            layout,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            activation=activation,
            backend=backend,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            layer.weight.copy_(layout.pack(weight))
            if conv.bias is not None and layer.bias is not None:
                layer.bias.copy_(conv.bias)
        layer.weight.requires_grad_(conv.weight.requires_grad)
        layer.train(conv.training)
        return layer

    def dense_weight(self) -> torch.Tensor:
        """(out_channels, in_channels, kh, kw), zeros where pruned; differentiable."""
        return self.layout.unpack(self.weight, self.kernel_size)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """(N, in_channels, H, W), and optionally what to add before the activation, to (N, out_channels, H',
        W').
        """
        if self._outer_padding is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._outer_padding, mode=mode)
        return conv2d_from_plan(
            x,
            self.weight,
            self.plan,
            self.bias,
            residual,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self._inner_padding,
            dilation=self.dilation,
            activation=self.activation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        layout = self.layout
        full = layout.in_channels * layout.out_channels
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}, "
            f"groups of filters={len(layout.groups)}, kept={100 * layout.pairs / full:.1f}%, "
            f"activation={self.activation}"
        )


class PackedConv2d(nn.Conv2d):
    """A dense ``nn.Conv2d`` that runs, and differentiates, by the native kernels: one group that reads all.

    Made by ``from_conv`` from a convolution with one group and zero padding; ``pack(train=True)`` makes them.
    The attributes, parameters and state dict of ``nn.Conv2d``; same results up to rounding.

    Shapes: ``x`` (N, in_channels, H, W), the result (N, out_channels, H', W'), both of the weight's dtype.
    Where the input is no contiguous float32 batch on the CPU, under autocast, and where the native backend
    cannot run or another one is named, torch's own convolution runs.

    Raises:
        ValueError, RuntimeError: in the forward pass, as ``nn.Conv2d``, for an input with other channels.
    """

    plan: torch.Tensor

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, backend: str | None = None) -> PackedConv2d:
        """This layer with the very parameters of ``conv``.

        Args:
            conv: an ``nn.Conv2d`` with ``groups=1``, zero padding and ``padding`` in numbers; not changed.
            backend: a name of ``dsp_kernels.available_backends()``, or None; with another than ``"native"``
                torch's own convolution runs.

        Raises:
            TypeError: ``conv`` is no ``nn.Conv2d``. ValueError: one that this layer cannot run.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected a torch.nn.Conv2d, got {type(conv).__name__}")
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(
                "conv: expected groups=1, padding_mode='zeros' and padding in numbers, got "
                f"groups={conv.groups}, padding_mode={conv.padding_mode!r}, padding={conv.padding!r}"
            )
        _check_backend(backend)
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.__dict__.update({name: value for name, value in conv.__dict__.items() if name[0] != "_"})
        made._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice
        made._parameters = dict(conv._parameters)
        layout = GroupLayout(
            conv.in_channels, conv.out_channels, [(range(conv.in_channels), range(conv.out_channels))]
        )
        made.register_buffer("plan", layout.plan().clone(), persistent=False)
        made.backend = backend
        return made

    backend: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H', W')."""
        if (
            x.dtype != torch.float32
            or x.device.type != "cpu"
            or x.dim() != 4
            or not x.is_contiguous()
            or torch.is_autocast_enabled("cpu")
            or choose(self.backend, "cpu", x.dtype) != "native"
        ):
            return super().forward(x)
        return conv2d_from_plan(
            x,
            self.weight.reshape(-1),
            self.plan,
            self.bias,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.dilation,
            backend=self.backend,
        )


class PackedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that trains by the native kernel, with a residual and an activation inside if asked.

    The arguments, parameters and buffers of ``nn.BatchNorm2d``; same results up to rounding. In evaluation,
    without running statistics' own momentum (``momentum=None``), or where the input is no contiguous float32
    batch on the CPU, torch's own runs.
    """

    @classmethod
    def from_norm(cls, norm: nn.BatchNorm2d) -> PackedBatchNorm2d:
        """This layer with the very parameters and buffers of ``norm``."""
        made = cls(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        made.affine, made.track_running_stats = norm.affine, norm.track_running_stats
        made._parameters = dict(norm._parameters)
        made._buffers = dict(norm._buffers)
        made.train(norm.training)
        return made

    def _own(self, x: torch.Tensor) -> bool:
        return (
            self.training
            and x.dtype == torch.float32
            and x.device.type == "cpu"
            and x.dim() == 4
            and x.shape[1] == self.num_features
            and x.shape[0] * x.shape[2] * x.shape[3] > 1
            and x.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
            and (self.running_mean is None or self.momentum is not None)
        )

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, activation: str | None = None
    ) -> torch.Tensor:
        """``act(norm(x) + residual)``; ``x`` and ``residual`` (N, C, H, W), ``activation`` None or
        ``"relu"``.
        """
        if not self._own(x):
            out = super().forward(x)
            out = out if residual is None else out + residual
            return torch.relu(out) if activation == "relu" else out
        out, mean, variance = batch_norm_act(
            x, self.weight, self.bias, residual, eps=self.eps, activation=activation
        )
        self._track(mean, variance, x.shape[0] * x.shape[2] * x.shape[3])
        return out

    def _track(self, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        """Moves the running statistics towards those of a batch with ``count`` values a channel."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.momentum is not None
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


def norm_act(norm: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """``relu(norm(x) + residual)``, in one kernel where ``norm`` is a ``PackedBatchNorm2d``.

    Args:
        norm: any normalisation of images.
        x: (N, C, H, W), floating point, what ``norm`` takes.
        residual: the shape of ``x``, or None.

    Returns:
        (N, C, H, W), a new tensor. In training the running statistics of ``norm`` move as it moves them.

    Raises:
        TypeError, ValueError: as ``dsp_kernels.norm.batch_norm_act``; another ``norm`` raises what it raises.
    """
    if isinstance(norm, PackedBatchNorm2d):
        return norm(x, residual, "relu")
    out = norm(x)
    return torch.relu(out if residual is None else residual + out)


def _together(conv: nn.Module, norm: nn.Module, x: torch.Tensor) -> bool:
    """Whether one operator may run both: nobody looks between them, and the native kernels take them."""
    if not isinstance(norm, PackedBatchNorm2d) or not isinstance(conv, PermutedGroupedConv2d | PackedConv2d):
        return False
    if isinstance(conv, PermutedGroupedConv2d):
        plain = conv._outer_padding is None and conv.activation is None
    else:
        plain = conv.weight.dtype == torch.float32
    return (
        plain
        and conv.bias is None
        and conv.backend in (None, "native")
        and conv.out_channels == norm.num_features
        and x.dim() == 4
        and x.shape[0] > 1  # else what lies between may be too small for statistics, or is no batch at all
        and norm.training
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and (norm.running_mean is None or norm.momentum is not None)
        and not any((m._forward_hooks or m._forward_pre_hooks or m._backward_hooks) for m in (conv, norm))
        and choose(conv.backend, "cpu", x.dtype) == "native"
    )


def conv_norm_act(
    conv: nn.Module,
    norm: nn.Module,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    activation: str | None = "relu",
) -> torch.Tensor:
    """``act(norm(conv(x)) + residual)``; one operator where both layers are packed for training and plain.

    That is: ``conv`` a ``PermutedGroupedConv2d`` or ``PackedConv2d`` without bias and activation, ``norm`` a
    ``PackedBatchNorm2d`` in training, a contiguous float32 batch on the CPU, no hooks on either and no
    autocast. Elsewhere one layer runs after the other, with the same result up to rounding.

    Args:
        conv: a convolution of images.
        norm: the normalisation of its output.
        x: (N, C, H, W), what ``conv`` takes.
        residual: the shape of the result (N, O, H', W'), or None.
        activation: None or ``"relu"``.

    Returns:
        (N, O, H', W'). In training the running statistics of ``norm`` move as it moves them.

    Raises:
        TypeError, ValueError: ``activation`` is another, or as
        ``dsp_kernels.norm.conv2d_batch_norm_act``; layers of other kinds raise what they raise.

    Sources: see :func:`dsp_kernels.norm.conv2d_batch_norm_act`.
    """
    if activation not in (None, "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    if not _together(conv, norm, x):
        out = conv(x)
        if activation == "relu":
            return norm_act(norm, out, residual)
        return norm(out) if residual is None else norm(out) + residual
    assert isinstance(norm, PackedBatchNorm2d) and isinstance(conv, PermutedGroupedConv2d | PackedConv2d)
    out, mean, variance = conv2d_batch_norm_act(
        x,
        conv.weight.reshape(-1),
        conv.plan,
        norm.weight,
        norm.bias,
        residual,
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        padding=conv._inner_padding if isinstance(conv, PermutedGroupedConv2d) else conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,
        eps=norm.eps,
        activation=activation,
        blank=conv.blank if isinstance(conv, PermutedGroupedConv2d) else None,
    )
    norm._track(mean, variance, out.shape[0] * out.shape[2] * out.shape[3])
    return out
