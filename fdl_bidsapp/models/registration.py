"""A small registration network: two images in, a dense displacement out.

U-Nets on the channels of both images, at coarse resolution and then at finer ones, give the
displacement that moves one image onto the other by a spatial transformer. They are trained without
labels, by the likeness of the moved and the fixed channels and the smoothness of the displacement.
Source: Balakrishnan et al., VoxelMorph, IEEE TMI 2019;38:1788-1800.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdl_bidsapp.models.backbones import UNet


class RegistrationNetwork(nn.Module):
    """U-Nets that give the displacement from a fixed image to a moving one, coarse to fine.

    Each stage sees averages over squares or cubes of both images, the moving one as the stages
    before have left it, and adds its own displacement. Coarse ones find turns and shifts that fine
    detail would only hide.

    Parameters
    ----------
    dimensions
        2 or 3.
    channels
        Channels of each image.
    width, levels
        Of the U-Nets.
    sides
        Sides of the squares or cubes of each stage, in pixels.

    Examples
    --------
    >>> network = RegistrationNetwork(2, 3, width=4, levels=2)
    >>> moved, displacement = network(torch.rand(1, 3, 9, 8), [torch.rand(1, 3, 9, 8)])
    >>> moved.shape, displacement.shape
    (torch.Size([1, 3, 9, 8]), torch.Size([1, 2, 9, 8]))
    """

    def __init__(
        self,
        dimensions: int,
        channels: int,
        *,
        width: int = 16,
        levels: int = 4,
        sides: Sequence[int] = (8, 4, 2),
    ) -> None:
        super().__init__()
        self.sides = tuple(sides)
        self.stages = nn.ModuleList(
            UNet(dimensions, 2 * channels, width=width, levels=levels) for _ in sides
        )
        convolution = nn.Conv2d if dimensions == 2 else nn.Conv3d
        self.heads = nn.ModuleList(convolution(width, dimensions, 3, padding=1) for _ in sides)
        for head in self.heads:
            # Training starts from very nearly no displacement.
            nn.init.normal_(cast(Tensor, head.weight), std=1e-3)
            nn.init.zeros_(cast(Tensor, head.bias))

    def forward(self, moving: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
        """Register a moving image to a fixed one.

        Parameters
        ----------
        moving : (B, C, *shape) tensor
        others
            The fixed image, of the same shape, alone in a list.

        Returns
        -------
        moved : (B, C, *shape) tensor
            The moving image on the fixed one's grid.
        displacement : (B, dimensions, *shape) tensor
            In pixels; see :func:`warp`.
        """
        (fixed,) = others
        dimensions = fixed.ndim - 2
        pool = F.avg_pool2d if dimensions == 2 else F.avg_pool3d
        mode = "bilinear" if dimensions == 2 else "trilinear"
        total = torch.zeros(len(fixed), dimensions, *fixed.shape[2:], device=fixed.device)
        moved = moving
        for side, stage, head in zip(self.sides, self.stages, self.heads, strict=True):
            pair = pool(torch.cat([moved, fixed], dim=1), side, ceil_mode=True)
            features = cast(UNet, stage).features(pair)
            # In pixels of the full grid, so that all stages learn alike.
            here = F.interpolate(
                head(features).float() * side, fixed.shape[2:], mode=mode, align_corners=False
            )
            total = here + warp(total, here)
            moved = warp(moving, total)
        return [moved, total]


def warp(image: Tensor, displacement: Tensor, mode: str = "bilinear") -> Tensor:
    """Fetch each pixel from where its displacement points.

    Parameters
    ----------
    image : (B, C, *shape) tensor
    displacement : (B, dimensions, *shape) tensor
        In pixels, one channel an axis, in the order of the axes.
    mode
        ``bilinear`` (linear also in 3-D), or ``nearest`` for labels.

    Returns
    -------
    (B, C, *shape) tensor
        The border is repeated beyond the image.

    Examples
    --------
    >>> image = torch.arange(4.0).reshape(1, 1, 1, 4)
    >>> shift = torch.zeros(1, 2, 1, 4)
    >>> shift[:, 1] = 1
    >>> warp(image, shift).flatten().tolist()
    [1.0, 2.0, 3.0, 3.0]
    """
    shape = displacement.shape[2:]
    lines = [torch.arange(n, dtype=torch.float32, device=image.device) for n in shape]
    places = torch.stack(torch.meshgrid(*lines, indexing="ij"))[None] + displacement.float()
    size = torch.tensor(shape, dtype=torch.float32, device=image.device)
    size = size.reshape(1, -1, *[1] * len(shape))
    normalised = 2 * places / (size - 1).clamp(min=1) - 1
    return F.grid_sample(
        image.float(),
        normalised.flip(1).movedim(1, -1),
        mode=mode,
        padding_mode="border",
        align_corners=True,
    )


def roughness(displacement: Tensor) -> Tensor:
    """Return the mean squared difference of neighbouring displacements.

    Parameters
    ----------
    displacement : (B, dimensions, *shape) tensor

    Examples
    --------
    >>> float(roughness(torch.ones(1, 2, 5, 5)))
    0.0
    """
    axes = range(2, displacement.ndim)
    return torch.stack([displacement.diff(dim=axis).square().mean() for axis in axes]).mean()


def registration_loss(
    moved: Tensor,
    fixed: Tensor,
    displacement: Tensor,
    smoothness: float,
    scales: Sequence[int] = (2, 4, 8, 16, 32),
) -> Tensor:
    """Return the distance of two images at several scales, plus the weighted :func:`roughness`.

    Fine channels alone are blind to shifts larger than their detail; their averages over squares
    are not.

    Parameters
    ----------
    moved, fixed : (B, C, *shape) tensors
    displacement : (B, dimensions, *shape) tensor
    smoothness
        Weight of the roughness.
    scales
        Sides of the squares or cubes, in pixels; those of which two fit. The mean over the scales
        is taken of the squared distance over the variance of the fixed image.

    Examples
    --------
    >>> fixed = torch.rand(1, 2, 16, 16)
    >>> none = torch.zeros(1, 2, 16, 16)
    >>> float(registration_loss(fixed, fixed, none, 1.0))
    0.0
    """
    pool = F.avg_pool2d if displacement.shape[1] == 2 else F.avg_pool3d
    space = tuple(range(2, fixed.ndim))
    fixed = fixed.float()
    varying = fixed - fixed.mean(space, keepdim=True)
    distances = [
        pool(moved - fixed, side).square().mean()
        / pool(varying, side).square().mean().clamp(min=1e-8)
        for side in scales
        if 2 * side <= min(fixed.shape[2:])
    ]
    return torch.stack(distances).mean() + smoothness * roughness(displacement)


def folded_share(displacement: Tensor) -> Tensor:
    """Return for each image the share of its pixels where the warp folds.

    Parameters
    ----------
    displacement : (B, dimensions, *shape) tensor

    Returns
    -------
    (B,) tensor
        Share of pixels with a Jacobian determinant of the warp that is not above 0.

    Examples
    --------
    >>> mirrored = torch.stack([-2 * torch.arange(5.0)[:, None].expand(5, 5), torch.zeros(5, 5)])
    >>> folded_share(mirrored[None]).tolist(), folded_share(0 * mirrored[None]).tolist()
    ([1.0], [0.0])
    """
    axes = range(displacement.ndim - 2)
    slopes = []
    for axis in axes:
        slope = displacement.diff(dim=2 + axis)
        for other in axes:
            # All slopes on the pixels that have a next one on every axis.
            slope = (
                slope if other == axis else slope.narrow(2 + other, 0, slope.shape[2 + other] - 1)
            )
        slopes.append(slope)
    jacobian = torch.stack(slopes, dim=-1).movedim(1, -2)
    jacobian = jacobian + torch.eye(len(axes), device=displacement.device)
    return (torch.linalg.det(jacobian) <= 0).float().flatten(1).mean(1)
