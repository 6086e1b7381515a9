"""The unit dipole and the field that a susceptibility distribution makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.fft

if TYPE_CHECKING:
    import torch

Array = np.ndarray


def field_direction(affine: Array) -> Array:
    """Return the scanner's z axis, the direction of B0, in voxel axes.

    Parameters
    ----------
    affine : (4, 4) array
        Voxel to scanner coordinates, mm.

    Returns
    -------
    (3,) float64 array
        Unit vector along the voxel axes.

    Examples
    --------
    >>> print(field_direction(np.diag([1.0, 1.0, 2.0, 1.0])))
    [0. 0. 1.]
    """
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    direction = np.linalg.solve(axes, [0.0, 0.0, 1.0])
    return direction / np.linalg.norm(direction)


def wave_numbers(
    shape: Sequence[int],
    spacing: Sequence[float],
    device: torch.device | str | None = None,
) -> tuple[Any, Any, Any]:
    """Return broadcastable wave numbers in 1/mm, in the layout of a real-input FFT.

    They are NumPy arrays, or tensors where a device is given.
    """
    x, y, z = shape
    if device is not None:
        import torch

        tx = torch.fft.fftfreq(x, float(spacing[0]), device=device)[:, None, None]
        ty = torch.fft.fftfreq(y, float(spacing[1]), device=device)[None, :, None]
        tz = torch.fft.rfftfreq(z, float(spacing[2]), device=device)[None, None, :]
        return tx, ty, tz
    kx = scipy.fft.fftfreq(x, spacing[0]).astype(np.float32)[:, None, None]
    ky = scipy.fft.fftfreq(y, spacing[1]).astype(np.float32)[None, :, None]
    kz = scipy.fft.rfftfreq(z, spacing[2]).astype(np.float32)[None, None, :]
    return kx, ky, kz


def dipole_kernel(
    shape: Sequence[int],
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
    device: torch.device | str | None = None,
) -> Any:
    """Return the unit dipole 1/3 - (k·b)²/|k|² in the layout of a real-input FFT.

    Parameters
    ----------
    shape
        Grid size in voxels.
    spacing
        Voxel size in mm.
    direction
        Unit vector of B0 in voxel axes.
    device
        Where a tensor is wanted instead of a NumPy array.

    Returns
    -------
    (X, Y, Z // 2 + 1) float32 array or tensor
        Zero at k = 0, as only differences of susceptibility can be seen.

    Notes
    -----
    Salomir et al., Concepts Magn. Reson. B 19 (2003) 26-34; Marques and Bowtell, Concepts Magn.
    Reson. B 25 (2005) 65-78. On an even grid a rotated kernel is not Hermitian at the Nyquist
    frequency; the inverse of a real-input FFT keeps the real part, as wanted.
    """
    kx, ky, kz = wave_numbers(shape, spacing, device)
    along = kx * np.float32(direction[0]) + ky * np.float32(direction[1])
    along = along + kz * np.float32(direction[2])
    squared = kx**2 + ky**2 + kz**2
    squared[0, 0, 0] = 1.0
    kernel = np.float32(1 / 3) - along**2 / squared
    kernel[0, 0, 0] = 0.0
    return kernel


def padded_shape(shape: Sequence[int], factor: float = 1.5) -> tuple[int, int, int]:
    """Return the next fast FFT sizes of at least ``factor`` times ``shape``."""
    x, y, z = (int(scipy.fft.next_fast_len(int(np.ceil(n * factor)), real=True)) for n in shape)
    return x, y, z


def field_from_susceptibility(
    susceptibility: Array,
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
    *,
    outside: float = 0.0,
) -> Array:
    """Convolve a susceptibility map with the unit dipole.

    Parameters
    ----------
    susceptibility : (X, Y, Z) array
        Susceptibility in ppm.
    spacing
        Voxel size in mm.
    direction
        Unit vector of B0 in voxel axes.
    outside
        Susceptibility beyond the grid, in ppm. Padding by half the size a side keeps the periodic
        copies of the head away.

    Returns
    -------
    (X, Y, Z) float32 array
        Relative field shift in ppm.

    Examples
    --------
    >>> ball = np.zeros((16, 16, 16), np.float32)
    >>> ball[8, 8, 8] = 1.0
    >>> field = field_from_susceptibility(ball, (1, 1, 1))
    >>> bool(field[8, 8, 11] > 0 > field[11, 8, 8])
    True
    """
    shape = susceptibility.shape
    padded = padded_shape(shape, 2.0)
    spectrum = scipy.fft.rfftn(
        susceptibility.astype(np.float32) - np.float32(outside), s=padded, workers=-1
    )
    spectrum *= dipole_kernel(padded, spacing, direction)
    field = scipy.fft.irfftn(spectrum, s=padded, workers=-1)
    return np.ascontiguousarray(field[: shape[0], : shape[1], : shape[2]], np.float32)


def field_of_distant_sources(
    susceptibility: Array,
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
    *,
    outside: float = 0.0,
) -> Array:
    """Sum the fields of point dipoles, one in the centre of each voxel.

    Parameters
    ----------
    susceptibility, spacing, direction, outside
        As for :func:`field_from_susceptibility`.

    Returns
    -------
    (X, Y, Z) float32 array
        Relative field shift in ppm.

    Notes
    -----
    The dipole is sampled in space, not in k-space. Near a steep edge such as that of air it is
    coarse, but unlike :func:`field_from_susceptibility` it does not ring: some voxels away from
    all sources the field is smooth and harmonic, as a background field has to be.
    """
    shape = susceptibility.shape
    padded = padded_shape(shape, 2.0)
    axes = [
        scipy.fft.fftfreq(n, 1 / n).astype(np.float32) * np.float32(size)
        for n, size in zip(padded, spacing, strict=True)
    ]
    x, y, z = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    squared = x**2 + y**2 + z**2
    squared[0, 0, 0] = 1.0
    along = x * np.float32(direction[0]) + y * np.float32(direction[1])
    along = along + z * np.float32(direction[2])
    kernel = np.float32(np.prod(spacing) / (4 * np.pi)) * (3 * along**2 / squared - 1)
    kernel /= squared**1.5
    kernel[0, 0, 0] = 0.0
    spectrum = scipy.fft.rfftn(
        susceptibility.astype(np.float32) - np.float32(outside), s=padded, workers=-1
    )
    spectrum *= scipy.fft.rfftn(kernel, workers=-1)
    field = scipy.fft.irfftn(spectrum, s=padded, workers=-1)
    return np.ascontiguousarray(field[: shape[0], : shape[1], : shape[2]], np.float32)
