"""Susceptibility-weighted images and their minimum-intensity projection."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.ndimage as ndi

from fdl_bidsapp.physics.phase import high_pass_phase

Array = np.ndarray

SLAB = 10.0
"""Usual thickness of a minimum-intensity projection, mm."""


def susceptibility_weighted(
    signal: Array, spacing: Sequence[float], sign: int = 1, power: int = 4
) -> Array:
    """Multiply the magnitude of an echo by a mask made of its high-pass filtered phase.

    Parameters
    ----------
    signal : (X, Y, Z) complex array
        One late echo.
    spacing
        Voxel size in mm.
    sign
        1 where paramagnetic sources turn the phase forwards, -1 where backwards.
    power
        How often the mask is multiplied.

    Returns
    -------
    (X, Y, Z) float32 array, in the unit of the magnitude

    Notes
    -----
    The mask falls from 1 at zero phase to 0 at half a turn in the paramagnetic sense (Haacke et
    al., Magn. Reson. Med. 52 (2004) 612-618).
    """
    phase = sign * high_pass_phase(signal, spacing)
    mask = np.clip(1 - np.maximum(phase, 0) / np.pi, 0, 1)
    return (np.abs(signal) * mask**power).astype(np.float32)


def minimum_intensity_projection(
    image: Array, spacing: Sequence[float], axis: int = 2, slab: float = SLAB
) -> Array:
    """Take the minimum over a slab that slides along an axis.

    Parameters
    ----------
    image : (X, Y, Z) array
    spacing
        Voxel size in mm.
    axis
        Along which to project, the slices' by default.
    slab
        Thickness in mm.

    Returns
    -------
    (X, Y, Z) float32 array

    Examples
    --------
    >>> image = np.ones((1, 1, 5)); image[..., 2] = 0.5
    >>> minimum_intensity_projection(image, (1, 1, 1), slab=3).ravel().tolist()
    [1.0, 0.5, 0.5, 0.5, 1.0]
    """
    size = max(1, round(slab / float(spacing[axis])))
    return ndi.minimum_filter1d(image, size, axis, mode="nearest").astype(np.float32)
