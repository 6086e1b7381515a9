"""Images of random shapes in random contrasts, in two or three dimensions, on any device.

Label maps are the arg-max of smooth noises of several scales, bent by a smooth warp. An image gives
every label an intensity of its own and goes through what a scanner does to it: bias field, blur,
coarse sampling, gamma, noise, and ends of the range cut off. No real image is involved.

Sources of the idea: Hoffmann et al., SynthMorph, IEEE TMI 2022;41:543-558; Billot et al., SynthSeg,
Med Image Anal 2023;86:102789.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ShapeStyle:
    """What the random shapes and images look like; lengths in pixels.

    Attributes
    ----------
    labels
        Most labels in a map.
    scales
        Distances between the knots of the noises that are added up.
    warp
        Largest standard deviation of the warp.
    bias, blur, noise, texture
        Largest log amplitude of the bias field, width of the blur, standard deviation of the noise,
        and of the variation inside a label, as a share of the intensity range.
    gamma
        Largest absolute log of the exponent.
    coarsen
        Largest factor of coarser sampling along one axis.
    clip
        Largest part of the intensity range that is cut off at either end: what lies there becomes
        as flat as air that was masked out.
    """

    labels: int = 16
    scales: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0)
    warp: float = 3.0
    bias: float = 0.4
    blur: float = 1.0
    noise: float = 0.05
    texture: float = 0.08
    gamma: float = 0.5
    coarsen: float = 2.5
    clip: float = 0.2


def smooth_noise(
    generator: torch.Generator, batch: int, channels: int, shape: Sequence[int], scale: float
) -> Tensor:
    """Return smooth noise, interpolated between random knots.

    Parameters
    ----------
    generator
        Source of randomness, on the device that is to hold the result.
    batch, channels
        How many.
    shape : 2 or 3 ints
        Grid.
    scale
        Distance between knots in pixels.

    Returns
    -------
    (batch, channels, *shape) float32 tensor
        About unit standard deviation at the knots.

    Examples
    --------
    >>> smooth_noise(torch.Generator().manual_seed(0), 2, 3, (9, 8), 4.0).shape
    torch.Size([2, 3, 9, 8])
    """
    knots = [max(2, round(n / scale) + 1) for n in shape]
    coarse = _normal(generator, (batch, channels, *knots))
    mode = "bicubic" if len(shape) == 2 else "trilinear"
    return F.interpolate(coarse, tuple(shape), mode=mode, align_corners=True)


def random_labels(
    generator: torch.Generator,
    batch: int,
    shape: Sequence[int],
    style: ShapeStyle = ShapeStyle(),
) -> Tensor:
    """Draw label maps of random shapes.

    Parameters
    ----------
    generator
        Source of randomness, on the device that is to hold the result.
    batch
        How many maps.
    shape : 2 or 3 ints
        Grid.
    style
        Number of labels, scales, warp.

    Returns
    -------
    (batch, *shape) int64 tensor
        From 0 to ``style.labels - 1``. No region is the same in every image, such as a dark
        surround: it would be all that is learnt.

    Examples
    --------
    >>> labels = random_labels(torch.Generator().manual_seed(0), 2, (32, 24))
    >>> labels.shape, bool(labels.max() > 2)
    (torch.Size([2, 32, 24]), True)
    """
    device, axes = generator.device, len(shape)
    field = torch.zeros(batch, style.labels, *shape, device=device)
    # Each map has its own mixture of scales, so that some are fine and others coarse.
    shares = _uniform(generator, (len(style.scales), batch)) ** 3 + 0.02
    for scale, share in zip(style.scales, shares, strict=True):
        noise = smooth_noise(generator, batch, style.labels, shape, scale)
        field += _wide(share, axes) * noise
    # Most maps lack many of the labels: a brain has few tissues in many places.
    least = min(3, style.labels)
    count = least + _uniform(generator, (batch, 1)) ** 2 * (style.labels - least + 1)
    absent = torch.arange(style.labels, device=device) >= count
    field = field.masked_fill(absent.reshape(batch, style.labels, *[1] * axes), -torch.inf)
    return _bend(generator, field.argmax(1), style.warp)


def random_contrast(
    generator: torch.Generator,
    labels: Tensor,
    style: ShapeStyle = ShapeStyle(),
) -> Tensor:
    """Draw one image of each label map, in a contrast of its own.

    Parameters
    ----------
    generator
        Source of randomness, on the labels' device.
    labels : (B, *shape) int64 tensor
        From :func:`random_labels`.
    style
        Strength of bias, blur, noise, texture, gamma, coarse sampling.

    Returns
    -------
    (B, 1, *shape) float32 tensor, from 0 to 1

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> image = random_contrast(generator, random_labels(generator, 2, (16, 16, 12)))
    >>> image.shape, float(image.amin()), float(image.amax())
    (torch.Size([2, 1, 16, 16, 12]), 0.0, 1.0)
    """
    batch, shape, axes = len(labels), labels.shape[1:], labels.ndim - 1
    table = _uniform(generator, (batch, style.labels))
    image = table.gather(1, labels.flatten(1)).reshape(batch, 1, *shape)
    texture = smooth_noise(generator, batch, 1, shape, 3.0) + smooth_noise(
        generator, batch, 1, shape, 10.0
    )
    image = image + texture * _strength(generator, batch, style.texture, axes)
    bias = smooth_noise(generator, batch, 1, shape, max(shape) / 2.5)
    image = image * torch.exp(bias * _strength(generator, batch, style.bias, axes))
    image = _blur(image, 0.3 + _uniform(generator, (batch,)) * style.blur)
    image = _coarsened(generator, image, style.coarsen)
    noise = _normal(generator, image.shape)
    image = image + noise * _strength(generator, batch, style.noise, axes)
    low, high = (edge(image.flatten(1), 1) for edge in (torch.amin, torch.amax))
    image = (image - _wide(low, axes)) / _wide((high - low).clamp(min=1e-6), axes)
    below, above = (_strength(generator, batch, style.clip, axes) for _ in range(2))
    image = ((image - below) / (1 - below - above)).clamp(0, 1)
    exponent = torch.exp((2 * _uniform(generator, (batch,)) - 1) * style.gamma)
    return image ** _wide(exponent, axes)


def random_pair(
    generator: torch.Generator,
    batch: int,
    shape: Sequence[int],
    style: ShapeStyle = ShapeStyle(),
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw two images each of some label maps, with nothing in common but the labels.

    Returns
    -------
    first, second : (batch, 1, *shape) float32 tensors, from 0 to 1
    labels : (batch, *shape) int64 tensor
    """
    labels = random_labels(generator, batch, shape, style)
    first, second = (random_contrast(generator, labels, style) for _ in range(2))
    return first, second, labels


def _normal(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, device=generator.device)


def _uniform(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    return torch.rand(tuple(shape), generator=generator, device=generator.device)


def _wide(values: Tensor, axes: int) -> Tensor:
    """Return one value for each image as a tensor that multiplies images."""
    return values.reshape(-1, 1, *[1] * axes)


def _strength(generator: torch.Generator, batch: int, largest: float, axes: int) -> Tensor:
    # Squared, so that many images have hardly any: real backgrounds are flat.
    return _wide(largest * _uniform(generator, (batch,)) ** 2, axes)


def _chance(generator: torch.Generator, batch: int, share: float, axes: int) -> Tensor:
    return _wide(_uniform(generator, (batch,)) < share, axes)


def _bend(generator: torch.Generator, labels: Tensor, amplitude: float) -> Tensor:
    """Warp label maps with smooth displacements, nearest neighbour."""
    batch, shape, axes = len(labels), labels.shape[1:], labels.ndim - 1
    field = sum(
        smooth_noise(generator, batch, axes, shape, scale)
        * _strength(generator, batch, amplitude, axes)
        for scale in (6.0, 20.0)
    )
    assert isinstance(field, Tensor)
    lines = [torch.linspace(-1, 1, n, device=labels.device) for n in shape]
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij"))[None]
    size = torch.tensor(shape, dtype=torch.float32, device=labels.device)
    grid = grid + field * 2 / (size - 1).reshape(1, axes, *[1] * axes)
    moved = F.grid_sample(
        labels[:, None].float(),
        grid.flip(1).movedim(1, -1),
        mode="nearest",
        padding_mode="reflection",
        align_corners=True,
    )
    return moved[:, 0].round().long()


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Smooth each image with a Gaussian of its own width, in pixels."""
    batch, axes = len(image), image.ndim - 2
    x = torch.arange(-3, 4, dtype=torch.float32, device=image.device)
    kernels = torch.exp(-0.5 * (x / sigma[:, None]) ** 2)
    kernels = kernels / kernels.sum(1, keepdim=True)
    convolve = F.conv2d if axes == 2 else F.conv3d
    stacked = image.transpose(0, 1)
    for axis in range(axes):
        view, padding = [batch, 1, *[1] * axes], [0] * (2 * axes)
        view[2 + axis] = 7
        # F.pad counts axes from the last.
        padding[2 * (axes - 1 - axis) : 2 * (axes - axis)] = [3, 3]
        padded = F.pad(stacked, padding, mode="replicate")
        stacked = convolve(padded, kernels.reshape(view), groups=batch)
    return stacked.transpose(0, 1)


def _coarsened(generator: torch.Generator, image: Tensor, largest: float) -> Tensor:
    """Sample a third of the images more coarsely along one axis, and back."""
    axes = image.ndim - 2
    chosen = _chance(generator, len(image), 1 / 3, axes)
    # One factor and axis for all of a batch, as images of one size are interpolated together.
    factor, axis = _uniform(generator, (2,)).tolist()
    shape = list(image.shape[2:])
    axis = int(axis * axes)
    shape[axis] = max(2, round(shape[axis] / (1 + factor * (largest - 1))))
    mode = "bilinear" if axes == 2 else "trilinear"
    coarse = F.interpolate(image, shape, mode=mode, align_corners=True)
    back = F.interpolate(coarse, image.shape[2:], mode=mode, align_corners=True)
    return torch.where(chosen, back, image)
