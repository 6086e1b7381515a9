"""From the local field to susceptibility."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.fft

from fdl_bidsapp.physics.dipole import dipole_kernel, padded_shape

Array = np.ndarray


def thresholded_division(
    field: Array,
    mask: Array,
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
    *,
    threshold: float = 0.19,
) -> Array:
    """Divide by the dipole where it is larger than a threshold (TKD).

    Parameters
    ----------
    field : (X, Y, Z) array
        Local field, ppm.
    mask : (X, Y, Z) bool array
        Where the field is known; the result is zero elsewhere.
    spacing
        Voxel size in mm.
    direction
        Unit vector of B0 in voxel axes.
    threshold
        Smallest |D| that is divided by.

    Returns
    -------
    (X, Y, Z) float32 array
        Susceptibility in ppm, up to a constant.

    Notes
    -----
    Shmueli, de Zwart et al., Magn. Reson. Med. 62 (2009) 1510-1522.
    """

    def inverse(dipole: Array) -> Array:
        sign = np.where(dipole < 0, -1, 1).astype(np.float32)
        return np.where(
            np.abs(dipole) > threshold, 1 / np.where(dipole == 0, 1, dipole), sign / threshold
        )

    return _invert(field, mask, spacing, direction, inverse)


def tikhonov(
    field: Array,
    mask: Array,
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
    *,
    weight: float = 0.015,
) -> Array:
    """Invert the dipole with a quadratic penalty on susceptibility, in closed form.

    Parameters
    ----------
    field, mask, spacing, direction
        As for :func:`thresholded_division`.
    weight
        Weight of the squared susceptibility against the squared residual of the field.

    Returns
    -------
    (X, Y, Z) float32 array
        Susceptibility in ppm, up to a constant; the penalty makes it smaller than the true one.

    Notes
    -----
    Kressler et al., IEEE Trans. Med. Imaging 29 (2010) 273-281, with the quadratic penalty.
    """

    def inverse(dipole: Array) -> Array:
        return dipole / (dipole**2 + np.float32(weight))

    return _invert(field, mask, spacing, direction, inverse)


def _invert(
    field: Array,
    mask: Array,
    spacing: Sequence[float],
    direction: Sequence[float] | Array,
    inverse: Callable[[Array], Array],
) -> Array:
    """Multiply the field's spectrum by ``inverse(dipole)``."""
    shape = field.shape
    padded = padded_shape(shape, 1.25)
    spectrum = scipy.fft.rfftn(np.where(mask, field, 0).astype(np.float32), s=padded, workers=-1)
    spectrum *= inverse(dipole_kernel(padded, spacing, direction))
    chi = scipy.fft.irfftn(spectrum, s=padded, workers=-1)
    chi = chi[: shape[0], : shape[1], : shape[2]]
    return np.where(mask, chi, 0).astype(np.float32)
