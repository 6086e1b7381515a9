"""Exchangeable networks that turn a volume into features at its own resolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdl_bidsapp.errors import ModelError


class Backbone(Protocol):
    """What a fusion model asks of its backbone.

    Attributes
    ----------
    feature_channels
        Channels of what :meth:`features` returns.
    """

    feature_channels: int

    def features(self, x: Tensor) -> Tensor:
        """Take ``(B, C, X, Y, Z)`` to ``(B, feature_channels, X, Y, Z)``, for any grid."""
        ...


def convolution_block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Make a 3 × 3 × 3 convolution, an affine instance normalisation and a leaky ReLU.

    Examples
    --------
    >>> convolution_block(2, 4)(torch.rand(1, 2, 5, 6, 7)).shape
    torch.Size([1, 4, 5, 6, 7])
    """
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.InstanceNorm3d(out_channels, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )


class UNet3d(nn.Module):
    """A plain 3-D U-Net: two convolutions a level, strided convolutions down, transposed ones up.

    Any grid is accepted: it is padded to a multiple of ``2 ** (levels - 1)`` inside, by repeating
    its border, and cropped again.

    Parameters
    ----------
    in_channels
        Channels of the input.
    width
        Channels of the first level; each level has twice those of the one above it.
    levels
        Number of resolutions.
    max_width
        Most channels of any level.

    Raises
    ------
    ModelError
        An option is out of its range.

    Examples
    --------
    >>> UNet3d(1, width=4, levels=3).features(torch.rand(1, 1, 9, 12, 7)).shape
    torch.Size([1, 4, 9, 12, 7])
    """

    def __init__(
        self, in_channels: int, *, width: int = 12, levels: int = 4, max_width: int = 128
    ) -> None:
        super().__init__()
        _in_range("in_channels", in_channels, 1, 256)
        _in_range("width", width, 1, 256)
        _in_range("levels", levels, 1, 7)
        _in_range("max_width", max_width, width, 1024)
        widths = [min(width << level, max_width) for level in range(levels)]
        self.feature_channels = width
        self.multiple = 1 << (levels - 1)
        self.encoders = nn.ModuleList(
            nn.Sequential(
                convolution_block(above, here, stride=2 if level else 1),
                convolution_block(here, here),
            )
            for level, (above, here) in enumerate(
                zip([in_channels, *widths[:-1]], widths, strict=True)
            )
        )
        upwards = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(below, here, kernel_size=2, stride=2) for below, here in upwards
        )
        self.decoders = nn.ModuleList(
            nn.Sequential(convolution_block(2 * here, here), convolution_block(here, here))
            for _, here in upwards
        )

    def features(self, x: Tensor) -> Tensor:
        """Take ``(B, in_channels, X, Y, Z)`` to ``(B, width, X, Y, Z)``."""
        shape = x.shape[2:]
        x = self._padded(x)
        skips: list[Tensor] = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
        skips.pop()
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(torch.cat([up(x), skips.pop()], dim=1))
        return x[..., : shape[0], : shape[1], : shape[2]]

    def _padded(self, x: Tensor) -> Tensor:
        # Two samples at the deepest level are the least that can be normalised.
        sizes = [max(-(-n // self.multiple), 2) * self.multiple for n in x.shape[2:]]
        missing = [size - n for size, n in zip(sizes, x.shape[2:], strict=True)]
        if not any(missing):
            return x
        return F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]), mode="replicate")


BACKBONES: dict[str, Callable[..., nn.Module]] = {"unet": UNet3d}
"""Networks by name; each takes ``in_channels`` and its options by keyword."""


def make_backbone(name: str, in_channels: int, **options: object) -> Backbone:
    """Make the backbone of that name.

    Raises
    ------
    ModelError
        No backbone has that name, or it does not take those options.

    Examples
    --------
    >>> make_backbone("unet", 1, width=8).feature_channels
    8
    """
    if name not in BACKBONES:
        raise ModelError(
            f"there is no backbone {name!r}", f"choose one of: {', '.join(sorted(BACKBONES))}"
        )
    try:
        return cast(Backbone, BACKBONES[name](in_channels, **options))
    except TypeError as error:
        raise ModelError(
            f"the backbone {name!r} does not take these options ({error})",
            "see its documentation for the options it has",
        ) from error


def _in_range(option: str, value: int, lowest: int, highest: int) -> None:
    if type(value) is not int or not lowest <= value <= highest:
        raise ModelError(
            f"the backbone's {option} is {value!r}",
            f"give a whole number from {lowest} to {highest}",
        )
