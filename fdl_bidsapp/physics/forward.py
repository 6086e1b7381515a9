"""From tissue to the complex signal, on CPU or GPU: field of a head, echoes, k-space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fdl_bidsapp.physics import GAMMA_BAR
from fdl_bidsapp.physics.dipole import dipole_kernel, padded_shape

Array = np.ndarray
Tensor = torch.Tensor


def dipole_field(
    susceptibility: Tensor,
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
    *,
    outside: float = 0.0,
    padding: float = 2.0,
) -> Tensor:
    """Convolve susceptibility with the unit dipole, many maps at once.

    Parameters
    ----------
    susceptibility : (..., X, Y, Z) tensor
        ppm.
    spacing
        Voxel size in mm.
    direction
        Unit vector of B0 in voxel axes.
    outside
        Susceptibility beyond the grid, ppm.
    padding
        Size of the grid of the convolution over that of the map. Two keeps the periodic copies
        away; less does where the map's sources cancel over short distances.

    Returns
    -------
    (..., X, Y, Z) tensor
        Relative field shift in ppm.

    Examples
    --------
    >>> ball = torch.zeros(2, 16, 16, 16)
    >>> ball[:, 8, 8, 8] = torch.tensor([1.0, -1.0])
    >>> field = dipole_field(ball, (1, 1, 1))
    >>> bool(field[0, 8, 8, 11] > 0 > field[0, 11, 8, 8]), bool(field[1, 8, 8, 11] < 0)
    (True, True)
    """
    shape = susceptibility.shape[-3:]
    padded = padded_shape(shape, padding)
    kernel = dipole_kernel(padded, spacing, direction, susceptibility.device)
    spectrum = torch.fft.rfftn(susceptibility - outside, s=padded, dim=(-3, -2, -1))
    field = torch.fft.irfftn(spectrum * kernel, s=padded, dim=(-3, -2, -1))
    return field[..., : shape[0], : shape[1], : shape[2]]


def echo(
    rho: Tensor,
    r2star: Tensor,
    field: Tensor,
    time: float,
    field_strength: float,
    *,
    initial_phase: Tensor | float = 0.0,
) -> Tensor:
    """Return the complex signal of one echo.

    Parameters
    ----------
    rho, r2star, field : (..., X, Y, Z) tensors
        Signal at echo time zero, R2* in 1/s, relative field in ppm.
    time
        Echo time in seconds.
    field_strength
        Tesla.
    initial_phase
        Phase at echo time zero, radians.

    Returns
    -------
    (..., X, Y, Z) complex64 tensor

    Notes
    -----
    ρ exp(-R2* TE) exp(i [φ0 + 2π γ̄ B0 f TE]), and in each voxel what is left of the sum over the
    phases that a locally linear field spreads across it: sinc of the turns from face to face along
    each axis.
    """
    magnitude = rho * torch.exp(-r2star * time)
    turns = GAMMA_BAR * field_strength * time
    for axis in (-3, -2, -1):
        if field.shape[axis] > 1:
            magnitude = magnitude * torch.sinc(turns * torch.gradient(field, dim=axis)[0])
    return torch.polar(magnitude.clamp(min=0), 2 * np.pi * turns * field + initial_phase)


def average_slices(image: Tensor, n: int) -> Tensor:
    """Average ``n`` neighbours along the last axis to one.

    Examples
    --------
    >>> average_slices(torch.tensor([1.0, 3.0, 5.0, 7.0]), 2).tolist()
    [2.0, 6.0]
    """
    return image.unflatten(-1, (-1, n)).mean(-1)


def steps_and_waves(
    image: Tensor,
    spacing: Sequence[float],
    *,
    acquired: float = 1.0,
    displacement: Tensor | None = None,
    phase: Tensor | None = None,
) -> Tensor:
    """Change the in-plane k-space of a complex image as the acquisition does.

    Parameters
    ----------
    image : (..., X, Y, Z) complex tensor
        X is the readout axis, Y that of phase encoding.
    spacing
        Voxel size in mm.
    acquired
        Share of k-space along X and Y that is acquired; the rest is zero.
    displacement : (Y, 2) tensor
        Where the head is along X and Y while each line is acquired, mm. Lines are in the order of
        rising wave number.
    phase : (Y,) tensor
        Phase that the whole image has gained while each line is acquired, radians.

    Returns
    -------
    (..., X, Y, Z) complex tensor
    """
    x, y = image.shape[-3:-1]
    kx = torch.fft.fftfreq(x, device=image.device)
    ky = torch.fft.fftfreq(y, device=image.device)
    spectrum = torch.fft.fft2(image, dim=(-3, -2))
    turn = torch.zeros(x, y, device=image.device)
    if displacement is not None:
        moved = torch.fft.ifftshift(displacement, dim=0).to(image.device)
        turn = turn + kx[:, None] * moved[:, 0] / float(spacing[0])
        turn = turn + ky * moved[:, 1] / float(spacing[1])
    if phase is not None:
        turn = turn - torch.fft.ifftshift(phase).to(image.device) / (2 * np.pi)
    factor = torch.polar(torch.ones_like(turn), -2 * np.pi * turn)
    inside = (kx.abs() <= 0.5 * acquired)[:, None] & (ky.abs() <= 0.5 * acquired)
    return torch.fft.ifft2(spectrum * (factor * inside)[..., None], dim=(-3, -2))


def smooth(image: Tensor, spacing: Sequence[float], fwhm: float) -> Tensor:
    """Smooth (..., X, Y, Z) images with a Gaussian of a width in mm; the border goes on."""
    if fwhm <= 0:
        return image
    result = image
    for axis, size in zip((-3, -2, -1), spacing, strict=True):
        sigma = fwhm / 2.3548 / float(size)
        n = int(np.ceil(3 * sigma))
        if sigma < 0.15:
            continue
        steps = np.arange(-n, n + 1)
        weights = np.exp(-0.5 * (steps / sigma) ** 2)
        length = result.shape[axis]
        # A sum of shifted copies: far faster than a convolution layer on a CPU.
        at = (torch.arange(-n, length + n, device=image.device)).clamp(0, length - 1)
        wide = result.index_select(axis, at)
        total = torch.zeros_like(result)
        for step, weight in zip(steps, weights / weights.sum(), strict=True):
            total.add_(wide.narrow(axis, int(step) + n, length), alpha=float(weight))
        result = total
    return result
