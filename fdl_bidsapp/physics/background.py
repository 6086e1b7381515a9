"""Removal of the field of sources outside the brain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.fft

from fdl_bidsapp.physics.dipole import dipole_kernel, padded_shape
from fdl_bidsapp.physics.solving import conjugate_gradients

Array = np.ndarray

LARGEST_RADIUS = 12.0
"""mm. Larger spheres keep more of the field's low frequencies and cost only time."""

SMALLEST_RADIUS = 3.0
"""mm. Where the mask holds the brain's very rim, what smaller spheres add there is so faulty near
air that it spoils the deep regions too: on a simulated head at 1.5 mm, spheres down to one voxel
raise the error there by a fifth. In a mask without the rim they do no harm, and add little."""


def v_sharp(
    field: Array,
    mask: Array,
    spacing: Sequence[float],
    *,
    largest_radius: float = LARGEST_RADIUS,
    smallest_radius: float = SMALLEST_RADIUS,
    threshold: float = 0.05,
) -> tuple[Array, Array]:
    """Remove the background field with the largest sphere that fits around each voxel (V-SHARP).

    Parameters
    ----------
    field : (X, Y, Z) array
        Total field, ppm.
    mask : (X, Y, Z) bool array
        Where the field is trusted.
    spacing
        Voxel size in mm.
    largest_radius, smallest_radius
        Radii of the largest and the smallest sphere, mm; between them they fall in steps of the
        largest voxel side. None is smaller than one voxel.
    threshold
        Truncation of the deconvolution with the largest sphere.

    Returns
    -------
    local field : (X, Y, Z) float32 array, ppm, zero outside the eroded mask
    eroded mask : (X, Y, Z) bool array
        The voxels around which at least the smallest sphere fits into the mask.

    Notes
    -----
    A harmonic field equals its mean over any sphere (Schweser et al., NeuroImage 54 (2011)
    2789-2807); the sphere shrinks towards the edge (Wu et al., Magn. Reson. Med. 67 (2012)
    137-147). Whether a sphere fits is counted: the mask's mean over it is one. Voxels at a
    sphere's surface count by the share that lies inside.
    """
    shape = padded_shape(mask.shape, 1 + largest_radius / min(np.multiply(mask.shape, spacing)))
    box = tuple(slice(n) for n in mask.shape)
    spectrum = scipy.fft.rfftn(np.where(mask, field, 0).astype(np.float32), s=shape)
    mask_spectrum = scipy.fft.rfftn(mask.astype(np.float32), s=shape)
    step = float(max(spacing))
    high_passed = np.zeros(mask.shape, np.float32)
    done = np.zeros(mask.shape, bool)
    largest = None
    smallest = max(smallest_radius, step)
    for radius in np.arange(max(largest_radius, smallest), 0.999 * smallest, -step):
        sphere = _sphere_spectrum(shape, spacing, float(radius))
        largest = sphere if largest is None else largest
        count = scipy.fft.irfftn(mask_spectrum * sphere, s=shape)[box]
        inside = (count > 0.999) & mask & ~done
        if inside.any():
            mean = scipy.fft.irfftn(spectrum * sphere, s=shape)[box]
            high_passed[inside] = field[inside] - mean[inside]
            done |= inside
    assert largest is not None
    kernel = 1 - largest
    divisor = np.where(np.abs(kernel) > threshold, kernel, np.inf)
    local = scipy.fft.irfftn(scipy.fft.rfftn(high_passed, s=shape) / divisor, s=shape)[box]
    return np.where(done, local, 0).astype(np.float32), done


def _sphere_spectrum(shape: Sequence[int], spacing: Sequence[float], radius: float) -> Array:
    """Spectrum of a normalised sphere centred on voxel (0, 0, 0); real, as a sphere is even.

    The surface is one voxel wide, so that the sphere has its volume however small it is.
    """
    axes = [
        scipy.fft.fftfreq(n, 1 / n).astype(np.float32) * np.float32(h)
        for n, h in zip(shape, spacing, strict=True)
    ]
    distance = np.sqrt(
        axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2][None, None, :] ** 2
    )
    sphere = np.clip((np.float32(radius) - distance) / np.float32(max(spacing)) + 0.5, 0, 1)
    sphere /= sphere.sum(dtype=np.float64)
    return scipy.fft.rfftn(sphere.astype(np.float32)).real


def project_onto_dipoles(
    field: Array,
    mask: Array,
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
    *,
    weight: Array | None = None,
    iterations: int = 40,
    tolerance: float = 0.02,
) -> tuple[Array, Array]:
    """Remove the background field as that of sources outside the mask (PDF).

    Parameters
    ----------
    field : (X, Y, Z) array
        Total field, ppm.
    mask : (X, Y, Z) bool array
        Where the field is trusted.
    spacing
        Voxel size in mm.
    direction
        Unit vector of B0 in voxel axes.
    weight : (X, Y, Z) array
        Trust in each voxel of the mask, such as the magnitude; equal everywhere by default.
    iterations, tolerance
        Where conjugate gradients stop: at most so many steps, or when the gradient has fallen to
        this share.

    Returns
    -------
    local field : (X, Y, Z) float32 array, ppm, zero outside the mask
    mask : (X, Y, Z) bool array, unchanged

    Notes
    -----
    Liu, T. et al., NMR Biomed. 24 (2011) 1129-1136.
    """
    shape = padded_shape(mask.shape, 1.25)
    box = tuple(slice(n) for n in mask.shape)
    dipole = dipole_kernel(shape, spacing, direction)
    trust = np.zeros(shape, np.float32)
    trust[box] = mask if weight is None else np.where(mask, weight / weight[mask].mean(), 0)
    outside = np.ones(shape, np.float32)
    outside[box] = ~mask

    def convolve(x: Array) -> Array:
        return scipy.fft.irfftn(scipy.fft.rfftn(x) * dipole, s=shape)

    total = np.zeros(shape, np.float32)
    total[box] = np.where(mask, field, 0)
    right = outside * convolve(trust**2 * total)
    sources = conjugate_gradients(
        lambda x: outside * convolve(trust**2 * convolve(x)),
        right,
        iterations,
        product=np.vdot,
        tolerance=tolerance,
    )
    local = (total - convolve(sources))[box]
    return np.where(mask, local, 0).astype(np.float32), mask
