"""Layers that a processor computes as fast as it can, and a GPU as PyTorch does.

Their weights and results are those of PyTorch's own layers. On a processor, PyTorch leaves some
sizes of three-dimensional layers to kernels that take several times as long as need be, or that do
not keep the channels innermost in memory, so that the next convolution has to make a copy.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Convolution3d(nn.Conv3d):
    """A convolution.

    PyTorch leaves a single volume of few voxels to a slower kernel than the one for batches: such a
    volume is cut into two halves, which share the planes that the kernel reads beyond the cut. A
    convolution of one voxel is the product of a matrix with each voxel's channels.

    Examples
    --------
    >>> layer, x = Convolution3d(4, 2, 3, padding=1), torch.rand(1, 4, 7, 6, 5)
    >>> torch.allclose(layer(x), nn.Conv3d.forward(layer, x), atol=1e-6)
    True
    >>> layer = Convolution3d(4, 2, 1)
    >>> torch.allclose(layer(x), nn.Conv3d.forward(layer, x), atol=1e-6)
    True
    """

    SMALL = 20480
    """Channels times the first two axes up to which PyTorch chooses that kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Take ``(B, C, X, Y, Z)`` to what :class:`torch.nn.Conv3d` gives."""
        n = x.shape[2]
        if x.device.type != "cpu" or self.stride != (1, 1, 1):
            return super().forward(x)
        if self.kernel_size == (1, 1, 1) and self.padding == (0, 0, 0):
            return _channels_first(F.linear(_channels_last(x), self.weight.flatten(1), self.bias))
        if (
            len(x) != 1
            or self.kernel_size != (3, 3, 3)
            or n < 4
            or x.shape[1] * n * x.shape[3] > self.SMALL
        ):
            return super().forward(x)
        half = (n + 1) // 2
        y = super().forward(torch.cat([x[:, :, : half + 1], x[:, :, n - half - 1 :]]))
        return torch.cat([y[:1, :, :half], y[1:, :, half + 1 - (n - half) :]], 2)


class TransposedConvolution3d(nn.ConvTranspose3d):
    """A transposed convolution of two voxels, which doubles each axis.

    Each voxel becomes eight: four products of a matrix with its channels, each of which gives two
    voxels that lie side by side in memory.

    Examples
    --------
    >>> layer, x = TransposedConvolution3d(4, 2, 2, 2), torch.rand(2, 4, 3, 5, 6)
    >>> torch.allclose(layer(x), nn.ConvTranspose3d.forward(layer, x), atol=1e-6)
    True
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Take ``(B, C, X, Y, Z)`` to what :class:`torch.nn.ConvTranspose3d` gives."""
        if x.device.type != "cpu" or output_size is not None or self.bias is None:
            return super().forward(x, output_size)
        batch, _, nx, ny, nz = x.shape
        voxels = _channels_last(x)
        channels = self.weight.shape[1]
        weight = self.weight.permute(2, 3, 4, 1, 0).reshape(2, 2, 2 * channels, -1)
        bias = self.bias.repeat(2)
        planes = [
            torch.cat(
                [F.linear(voxels, row, bias).reshape(batch, nx, ny, 1, -1) for row in plane], 3
            ).reshape(batch, nx, 1, -1)
            for plane in weight
        ]
        doubled = torch.cat(planes, 2).reshape(batch, 2 * nx, 2 * ny, 2 * nz, channels)
        return _channels_first(doubled)


class NormalisedActivation(nn.GroupNorm):
    """An affine instance normalisation and a leaky ReLU of slope 0.01.

    Examples
    --------
    >>> layer, x = NormalisedActivation(3), torch.rand(2, 3, 4, 5, 6)
    >>> there = F.leaky_relu(nn.GroupNorm.forward(layer, x), layer.SLOPE)
    >>> torch.allclose(layer(x), there, atol=1e-6)
    True
    """

    SLOPE = 0.01

    def __init__(self, channels: int) -> None:
        # With a channel a group this is instance normalisation. Unlike PyTorch's own, it leaves
        # the channels innermost in memory.
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Take ``(B, C, *shape)`` to the same shape."""
        if x.device.type != "cpu":
            return F.leaky_relu(super().forward(x), self.SLOPE, inplace=True)
        voxels = _channels_last(x)
        flat = voxels.reshape(len(x), -1, x.shape[1])
        y = cast(
            Tensor,
            _NormalisedActivation.apply(flat, self.weight, self.bias, self.eps, self.SLOPE),
        )
        return _channels_first(y.to(x.dtype).reshape(voxels.shape))


class _NormalisedActivation(torch.autograd.Function):
    """What :class:`NormalisedActivation` does with (B, voxels, C), in few passes over memory.

    Under autocast in float32, as a GPU does it: sums over a volume want the digits, and PyTorch's
    own gradient in bfloat16 takes longer than all of the convolutions.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
    ) -> Tensor:
        mean = _summed(x) / x.shape[1]
        normal = x - mean
        scale = torch.rsqrt(_summed(normal * normal) / x.shape[1] + eps)
        normal.mul_(scale)
        y = F.leaky_relu_(torch.addcmul(bias, normal, weight), slope)
        ctx.save_for_backward(normal, y, weight, scale)
        ctx.slope = slope
        return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normal, y, weight, scale = ctx.saved_tensors
        # The activation keeps the sign, so that its result does for its argument.
        inner = torch.ops.aten.leaky_relu_backward(gradient, y, ctx.slope, True)
        along, across = _summed(inner), _summed(inner * normal)
        n = inner.shape[1]
        result = inner.sub_(along / n).addcmul_(normal, -across / n).mul_(weight * scale)
        return result, across.sum((0, 1)), along.sum((0, 1)), None, None


def _summed(x: Tensor) -> Tensor:
    """Sum (B, voxels, C) over the voxels, which a product does faster than a sum."""
    return torch.matmul(x.new_ones(1, x.shape[1]), x)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def convolution_block(
    in_channels: int, out_channels: int, stride: int = 1, dimensions: int = 3, width: int = 3
) -> nn.Sequential:
    """Make a convolution of odd width, an affine instance normalisation and a leaky ReLU.

    Examples
    --------
    >>> convolution_block(2, 4)(torch.rand(1, 2, 5, 6, 7)).shape
    torch.Size([1, 4, 5, 6, 7])
    """
    convolution = {2: nn.Conv2d, 3: Convolution3d}[dimensions]
    return nn.Sequential(
        convolution(in_channels, out_channels, width, stride, padding=width // 2, bias=False),
        NormalisedActivation(out_channels),
    )
