"""Variation of training cases on torch tensors: one warp for images and labels, then intensities.

Everything random follows from a NumPy generator, so that a resumed training sees what it would have
seen.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor

ROTATION_DEGREES = 12.0
SCALING = 0.10
ELASTIC_VOXELS = 2.0
ELASTIC_SPACING = 12
"""Voxels between the control points of the elastic deformation."""


def random_warp(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    start: tuple[float, float, float],
    block: tuple[int, int, int],
    strength: float,
    device: torch.device,
) -> Tensor:
    """Draw a rotation, scaling, shift and elastic deformation of a window.

    Parameters
    ----------
    rng
        Source of randomness.
    shape
        Size of the window in voxels.
    start
        Its corner in the block that it is sampled from.
    block
        Size of the block.
    strength
        0 for the window as it is, 1 as a rule.
    device
        Where to put it.

    Returns
    -------
    (1, X, Y, Z, 3) float32 tensor
        Sampling grid for :func:`torch.nn.functional.grid_sample`, corners aligned.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> grid = random_warp(rng, (4, 4, 4), (0, 0, 0), (4, 4, 4), 0.0, torch.device("cpu"))
    >>> x = torch.rand(1, 1, 4, 4, 4)
    >>> torch.allclose(F.grid_sample(x, grid, align_corners=True), x, atol=1e-5)
    True
    """
    half = (np.array(shape) - 1) / 2
    linear = np.eye(3)
    shift = np.zeros(3)
    if strength > 0 and rng.random() < 0.8:
        angles = np.clip(rng.normal(0, ROTATION_DEGREES * strength, 3), -45, 45)
        scales = np.exp(rng.normal(0, SCALING * strength) + rng.normal(0, SCALING / 2, 3))
        linear = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(scales)
        shift = rng.normal(0, 2.0 * strength, 3)
    axes = [
        torch.arange(n, dtype=torch.float32, device=device) - h
        for n, h in zip(shape, half, strict=True)
    ]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    matrix = torch.tensor(linear, dtype=torch.float32, device=device)
    places = offsets @ matrix.T
    if strength > 0 and rng.random() < 0.6:
        amplitude = ELASTIC_VOXELS * strength * rng.uniform(0.3, 1.3)
        coarse = [max(2, round(n / ELASTIC_SPACING)) + 1 for n in shape]
        control = rng.normal(0, amplitude, (1, 3, *coarse)).astype(np.float32)
        field = F.interpolate(
            torch.from_numpy(control).to(device), shape, mode="trilinear", align_corners=True
        )
        places = places + field[0].movedim(0, -1)
    centre = torch.tensor(half + np.array(start) + shift, dtype=torch.float32, device=device)
    size = torch.tensor(block, dtype=torch.float32, device=device)
    normalised = (places + centre) * 2 / (size - 1).clamp(min=1) - 1
    return normalised.flip(-1)[None]


def warp(images: Tensor, classes: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Sample images and labels at the places of a grid; 0 beyond the block.

    Labels are those of the nearest voxel, which keeps volumes on average. The class with the
    largest interpolated share would shrink what is convex, small structures most.

    Parameters
    ----------
    images : (1, C, X', Y', Z') float32 tensor
    classes : (1, X', Y', Z') integer tensor
    grid
        From :func:`random_warp`.

    Returns
    -------
    images : (1, C, X, Y, Z) float32 tensor, linear interpolation
    classes : (1, X, Y, Z) int64 tensor
    """
    moved = F.grid_sample(images, grid, align_corners=True)
    labels = classes.to(images.dtype)[:, None]
    nearest = F.grid_sample(labels, grid, mode="nearest", align_corners=True)[:, 0]
    return moved, nearest.long()


def vary_intensity(image: Tensor, rng: np.random.Generator, strength: float = 1.0) -> Tensor:
    """Shade, blur, coarsen an image, add noise, change its contrast, each at random.

    Parameters
    ----------
    image : (1, 1, X, Y, Z) float32 tensor
        Normalised to [0, 1].
    rng
        Source of randomness.
    strength
        1 as a rule.

    Returns
    -------
    (1, 1, X, Y, Z) float32 tensor, in [0, 1]
    """
    shape = image.shape[2:]
    if rng.random() < 0.3:
        control = rng.normal(0, 0.2 * strength, (1, 1, 3, 3, 3)).astype(np.float32)
        field = torch.from_numpy(control).to(image.device)
        image = image * F.interpolate(field, shape, mode="trilinear", align_corners=True).exp()
    if rng.random() < 0.2:
        image = blur(image, float(rng.uniform(0.4, 1.0)))
    if rng.random() < 0.15:
        smaller = [max(2, int(n / rng.uniform(1.2, 2.0))) for n in shape]
        coarse = F.interpolate(image, smaller, mode="trilinear", align_corners=True)
        image = F.interpolate(coarse, shape, mode="trilinear", align_corners=True)
    low, high = rng.normal(0, 0.08 * strength, 2)
    image = ((image - low) / max(1 + high - low, 0.3)).clamp(0, 1)
    if rng.random() < 0.4:
        image = image ** float(np.exp(rng.normal(0, 0.3 * strength)))
    if rng.random() < 0.3:
        seed = int(rng.integers(2**31))
        generator = torch.Generator(image.device).manual_seed(seed)
        noise = torch.empty_like(image).normal_(generator=generator)
        image = image + float(rng.uniform(0, 0.08 * strength)) * noise
    return image.clamp(0, 1)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Smooth with a Gaussian of ``sigma`` voxels.

    Examples
    --------
    >>> image = torch.zeros(1, 1, 9, 9, 9)
    >>> image[..., 4, 4, 4] = 1
    >>> round(float(blur(image, 0.7).sum()), 3)
    1.0
    """
    radius = max(1, round(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(3):
        view = [1, 1, 1, 1, 1]
        view[2 + axis] = -1
        padding = [0, 0, 0]
        padding[axis] = radius
        image = F.conv3d(image, kernel.view(view), padding=padding)
    return image
