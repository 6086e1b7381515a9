"""The layers give what PyTorch's own give, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdl_bidsapp.models.layers import (
    Convolution3d,
    NormalisedActivation,
    TransposedConvolution3d,
    convolution_block,
)

LAYERS = {
    "small": (Convolution3d(3, 2, 3, padding=1), nn.Conv3d.forward, (1, 3, 7, 6, 5)),
    "batch": (Convolution3d(3, 2, 3, padding=1), nn.Conv3d.forward, (2, 3, 7, 6, 5)),
    "strided": (Convolution3d(3, 2, 3, 2, padding=1), nn.Conv3d.forward, (1, 3, 8, 6, 4)),
    "voxel": (Convolution3d(3, 2, 1), nn.Conv3d.forward, (2, 3, 4, 5, 6)),
    "voxel without bias": (Convolution3d(3, 2, 1, bias=False), nn.Conv3d.forward, (1, 3, 4, 5, 6)),
    "padded voxel": (Convolution3d(3, 2, 1, padding=1), nn.Conv3d.forward, (1, 3, 4, 5, 6)),
    "doubling": (TransposedConvolution3d(3, 2, 2, 2), nn.ConvTranspose3d.forward, (2, 3, 4, 5, 6)),
    "activation": (
        NormalisedActivation(3),
        lambda layer, x: F.leaky_relu(nn.GroupNorm.forward(layer, x), 0.01),
        (2, 3, 4, 5, 6),
    ),
    "plane activation": (
        NormalisedActivation(3),
        lambda layer, x: F.leaky_relu(nn.GroupNorm.forward(layer, x), 0.01),
        (2, 3, 9, 7),
    ),
}


@pytest.mark.parametrize("innermost", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients_are_those_of_pytorch(name: str, innermost: bool) -> None:
    layer, reference, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(1)
    layer = layer.double()
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    image = torch.randn(shape, generator=generator, dtype=torch.float64)
    if innermost:
        last = torch.channels_last if image.ndim == 4 else torch.channels_last_3d
        image = image.contiguous(memory_format=last)

    def run(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        layer.zero_grad()
        x = image.clone().requires_grad_()
        y = forward(x)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape))
        assert x.grad is not None
        return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]

    ours, theirs = run(layer), run(lambda x: reference(layer, x))
    for here, there in zip(ours, theirs, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


def test_a_block_keeps_channels_innermost() -> None:
    image = torch.rand(1, 4, 8, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    up = TransposedConvolution3d(4, 4, 2, 2)
    for result in (
        convolution_block(4, 4)(image),
        convolution_block(4, 4, width=1)(image),
        up(image),
    ):
        assert result.is_contiguous(memory_format=torch.channels_last_3d)


def test_half_precision_is_normalised_too() -> None:
    image = torch.rand(1, 3, 4, 5, 6).bfloat16()
    assert NormalisedActivation(3).bfloat16()(image).dtype == torch.bfloat16


def test_under_autocast_the_activation_is_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    layer = NormalisedActivation(3)
    image = (100 + torch.randn(1, 3, 12, 11, 10, generator=generator)).bfloat16()

    def run(x: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape).bfloat16().to(y.dtype))
        assert x.grad is not None
        return y.detach(), x.grad

    y, gradient = run(image, autocast=True)
    assert y.dtype == torch.bfloat16
    exact, exact_gradient = run(image.float(), autocast=False)
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(gradient, exact_gradient.bfloat16())
