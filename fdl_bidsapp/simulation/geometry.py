"""Rotations and smooth random fields, of which positions and deformations are made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import make_interp_spline

Array = np.ndarray


def rotation(angles: Sequence[float] | Array) -> Array:
    """Return the 3 × 3 rotation about the fixed axes x, then y, then z.

    Parameters
    ----------
    angles
        Three angles in degrees, anticlockwise when looking against the axis.

    Returns
    -------
    (3, 3) float64 array

    Examples
    --------
    >>> print(np.round(rotation((0, 0, 90)) @ [1, 0, 0], 3) + 0.0)
    [0. 1. 0.]
    """
    result = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(angles)):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        sign = -1.0 if axis == 1 else 1.0
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -sign * np.sin(angle), sign * np.sin(angle)
        result = turn @ result
    return result


def smooth_noise(
    rng: np.random.Generator, shape: Sequence[int], spacing: Sequence[float], scale: float
) -> Array:
    """Return smooth noise: random knots, interpolated by cubic splines.

    Parameters
    ----------
    rng
        Source of randomness.
    shape
        Grid size in voxels.
    spacing
        Voxel size in mm.
    scale
        Distance of the knots, mm.

    Returns
    -------
    shape float32 array
        Standard deviation 1 over the grid; the mean is not taken out.
    """
    coarse = [max(2, int(np.ceil(n * h / scale)) + 1) for n, h in zip(shape, spacing, strict=True)]
    result = rng.standard_normal([c + 2 for c in coarse])
    for axis, (c, n) in enumerate(zip(coarse, shape, strict=True)):
        # A spline through unit vectors is the matrix of the interpolation along one axis.
        spline = make_interp_spline(np.arange(c + 2), np.eye(c + 2), k=min(3, c + 1))
        matrix = spline(np.linspace(1, c, n))
        result = np.moveaxis(np.tensordot(matrix.astype(np.float32), result, (1, axis)), 0, axis)
    return (result / max(float(result.std()), 1e-6)).astype(np.float32)
