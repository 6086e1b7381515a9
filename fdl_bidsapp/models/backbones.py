"""Exchangeable networks that turn a volume into features at its own resolution."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdl_bidsapp.errors import ModelError
from fdl_bidsapp.models.layers import TransposedConvolution3d, convolution_block


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


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the far border of an image until its axes are multiples, at least twofold.

    Two samples at the deepest level are the least that can be normalised.

    Examples
    --------
    >>> pad_to_multiple(torch.rand(1, 1, 9, 8, 3), 4).shape
    torch.Size([1, 1, 12, 8, 8])
    """
    sizes = [max(-(-n // multiple), 2) * multiple for n in x.shape[2:]]
    missing = [size - n for size, n in zip(sizes, x.shape[2:], strict=True)]
    if not any(missing):
        return x
    padding = [amount for n in reversed(missing) for amount in (0, n)]
    return F.pad(x, padding, mode="replicate")


class UNet(nn.Module):
    """A plain U-Net: two convolutions a level, strided convolutions down, transposed ones up.

    Any grid is accepted: it is padded to a multiple of ``2 ** (levels - 1)`` inside, by repeating
    its border, and cropped again.

    Parameters
    ----------
    dimensions
        2 or 3.
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
    >>> UNet(2, 1, width=4, levels=3).features(torch.rand(1, 1, 9, 12)).shape
    torch.Size([1, 4, 9, 12])
    """

    def __init__(
        self,
        dimensions: int,
        in_channels: int,
        *,
        width: int = 12,
        levels: int = 4,
        max_width: int = 128,
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
                convolution_block(above, here, 2 if level else 1, dimensions),
                convolution_block(here, here, 1, dimensions),
            )
            for level, (above, here) in enumerate(
                zip([in_channels, *widths[:-1]], widths, strict=True)
            )
        )
        upwards = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        transposed = {2: nn.ConvTranspose2d, 3: TransposedConvolution3d}[dimensions]
        self.ups = nn.ModuleList(
            transposed(below, here, kernel_size=2, stride=2) for below, here in upwards
        )
        self.decoders = nn.ModuleList(
            nn.Sequential(
                convolution_block(2 * here, here, 1, dimensions),
                convolution_block(here, here, 1, dimensions),
            )
            for _, here in upwards
        )

    def features(self, x: Tensor) -> Tensor:
        """Take ``(B, in_channels, *shape)`` to ``(B, width, *shape)``."""
        shape = x.shape[2:]
        x = pad_to_multiple(x, self.multiple)
        skips: list[Tensor] = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
        skips.pop()
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(torch.cat([up(x), skips.pop()], dim=1))
        inside = (slice(None), slice(None), *(slice(n) for n in shape))
        return x[inside]


class UNet3d(UNet):
    """A :class:`UNet` on volumes.

    Examples
    --------
    >>> UNet3d(1, width=4, levels=3).features(torch.rand(1, 1, 9, 12, 7)).shape
    torch.Size([1, 4, 9, 12, 7])
    """

    def __init__(
        self, in_channels: int, *, width: int = 12, levels: int = 4, max_width: int = 128
    ) -> None:
        super().__init__(3, in_channels, width=width, levels=levels, max_width=max_width)


class MonaiBackbone(nn.Module):
    """A network of MONAI without its last convolution, on any grid.

    Parameters
    ----------
    network
        Takes ``(B, C, X, Y, Z)`` to features of the same grid.
    feature_channels
        Channels of these features.
    multiple
        The grid is padded inside to a multiple of this, at least two, by repeating its border.
    shape
        The only grid that the network takes, if there is but one.
    """

    def __init__(
        self,
        network: nn.Module,
        feature_channels: int,
        multiple: int,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.feature_channels = feature_channels
        self.multiple = multiple
        self.shape = shape

    def features(self, x: Tensor) -> Tensor:
        """Take ``(B, C, X, Y, Z)`` to ``(B, feature_channels, X, Y, Z)``."""
        shape = tuple(x.shape[2:])
        if self.shape not in (None, shape):
            raise ModelError(
                f"this backbone was made for a grid of {self.shape}, not {shape}",
                "give it the model's grid as its option",
            )
        padded = pad_to_multiple(x, self.multiple)
        features: Tensor = self.network(padded)
        return features[..., : shape[0], : shape[1], : shape[2]]


def dynunet(in_channels: int, *, width: int = 16, levels: int = 4) -> MonaiBackbone:
    """Make MONAI's DynUNet, the network of nnU-Net, with twice the channels at each level.

    Raises
    ------
    ModelError
        MONAI is not installed, or an option is out of its range.
    """
    _in_range("width", width, 1, 256)
    _in_range("levels", levels, 3, 7)
    networks = _monai()
    strides = [1, *[2] * (levels - 1)]
    network = networks.DynUNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=1,
        kernel_size=[3] * levels,
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=[min(width << level, 320) for level in range(levels)],
    )
    # These layers hold all others but the last; the network itself would name each weight twice.
    return MonaiBackbone(network.skip_layers, width, 1 << (levels - 1))


def segresnet(in_channels: int, *, width: int = 16, levels: int = 4) -> MonaiBackbone:
    """Make MONAI's SegResNet, with residual blocks and group normalisation.

    Raises
    ------
    ModelError
        MONAI is not installed, or an option is out of its range.
    """
    _in_range("width", width, 8, 256)
    _in_range("levels", levels, 2, 5)
    if width % 8:
        raise ModelError(
            f"the backbone's width is {width}", "give a multiple of 8, for its group normalisation"
        )
    network = _monai().SegResNet(
        init_filters=width,
        in_channels=in_channels,
        blocks_down=(1, 2, 2, 4, 4)[:levels],
        blocks_up=(1,) * (levels - 1),
    )
    network.conv_final = nn.Identity()
    return MonaiBackbone(network, width, 1 << (levels - 1))


def unetr(
    in_channels: int,
    *,
    grid: str,
    width: int = 16,
    hidden_size: int = 384,
    mlp_size: int = 1536,
    heads: int = 6,
) -> MonaiBackbone:
    """Make MONAI's UNETR, a transformer encoder with a convolutional decoder.

    Parameters
    ----------
    in_channels
        Channels of the input.
    grid
        The model's grid, such as ``64x64x48``, each axis a multiple of 16: a transformer's
        positions are learnt.
    width
        Channels of the features.
    hidden_size, mlp_size, heads
        Of the transformer.

    Raises
    ------
    ModelError
        MONAI is not installed, or an option is out of its range.
    """
    _in_range("width", width, 1, 256)
    sizes = grid.split("x")
    if len(sizes) != 3 or not all(n.isdecimal() and int(n) and int(n) % 16 == 0 for n in sizes):
        raise ModelError(
            f"the backbone's grid is {grid!r}",
            "give the model's grid, such as 64x64x48, with axes that are multiples of 16",
        )
    shape = tuple(int(n) for n in sizes)
    try:
        network = _monai().UNETR(
            in_channels=in_channels,
            out_channels=1,
            img_size=shape,
            feature_size=width,
            hidden_size=hidden_size,
            mlp_dim=mlp_size,
            num_heads=heads,
        )
    except ValueError as error:
        raise ModelError(
            f"the backbone refuses its options ({error})", "change them as it says"
        ) from error
    network.out = nn.Identity()
    for block in network.vit.blocks:
        # MONAI makes these weights for decoders, which attend to another sequence, and leaves them.
        block.norm_cross_attn = block.cross_attn = nn.Identity()
    return MonaiBackbone(network, width, 1, shape)


def _monai() -> ModuleType:
    try:
        return importlib.import_module("monai.networks.nets")
    except ImportError as error:
        raise ModelError(
            "this backbone comes from MONAI, which is not installed",
            "install it with: pip install 'fdl-bidsapp[monai]'",
        ) from error


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "unet": UNet3d,
    "dynunet": dynunet,
    "segresnet": segresnet,
    "unetr": unetr,
}
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
