"""From multi-echo phase to the local field."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.fft
import scipy.ndimage as ndi

from fdl_bidsapp.physics import GAMMA_BAR
from fdl_bidsapp.physics.dipole import wave_numbers

Array = np.ndarray


def wrap(phase: Array) -> Array:
    """Fold phase into [-π, π].

    Examples
    --------
    >>> print(np.round(wrap(np.array([0.0, 4.0])), 4))
    [ 0.     -2.2832]
    """
    turn = phase.dtype.type(2 * np.pi)
    return phase - turn * np.round(phase / turn)


def fit_field(
    signal: Array,
    mask: Array,
    spacing: Sequence[float],
    echo_times: Sequence[float],
    field_strength: float,
) -> Array:
    """Fit the relative field to the phase of a multi-echo signal, without unwrapping it.

    Parameters
    ----------
    signal : (X, Y, Z, E) complex array
        Signal at each echo.
    mask : (X, Y, Z) bool array
        Where the phase is trusted.
    spacing
        Voxel size in mm.
    echo_times
        Echo times in seconds, increasing.
    field_strength
        B0 in tesla.

    Returns
    -------
    (X, Y, Z) float32 array
        Relative field in ppm, up to a function that is harmonic inside the mask. The removal of
        the background field takes that function away, so the local field is right.

    Notes
    -----
    Between neighbouring voxels phase differs by less than half a turn, so its wrapped difference
    is the true one. A line through these differences over echo time, weighted by the squared
    magnitudes, is the field's gradient; its divergence inside the mask is integrated by Poisson's
    equation (cosine transform), in the manner of Schofield and Zhu, Opt. Lett. 28 (2003)
    1194-1196.
    """
    times = np.asarray(echo_times, np.float32)
    divergence = np.zeros(mask.shape, np.float32)
    for axis in range(3):
        lower = tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))
        upper = tuple(slice(1, None) if a == axis else slice(None) for a in range(3))
        slope = _slope_of_phase_difference(signal[lower], signal[upper], times)
        slope = np.where(mask[lower] & mask[upper], slope, 0) / np.float32(spacing[axis] ** 2)
        divergence[lower] += slope
        divergence[upper] -= slope
    field = _solve_poisson(divergence, spacing)
    return field / np.float32(2 * np.pi * GAMMA_BAR * field_strength)


def _slope_of_phase_difference(lower: Array, upper: Array, times: Array) -> Array:
    """Fit a line over echo time to the phase from one voxel to the next; its slope in rad/s."""
    total, t, d, td, tt = (np.zeros(lower.shape[:-1], np.float32) for _ in range(5))
    slope = np.zeros(lower.shape[:-1], np.float32)
    first = np.angle(upper[..., 0] * np.conj(lower[..., 0]))
    for e, time in enumerate(times):
        product = upper[..., e] * np.conj(lower[..., e])
        # Steep fields wrap even this at late echoes: the earlier ones predict it.
        predicted = first + slope * (time - times[0])
        difference = predicted + wrap(np.angle(product) - predicted)
        weight = np.abs(product)
        total += weight
        t += weight * time
        d += weight * difference
        td += weight * time * difference
        tt += weight * time * time
        if e > 0:
            determinant = np.maximum(total * tt - t * t, np.finfo(np.float32).tiny)
            slope = (total * td - t * d) / determinant
    return slope


def _solve_poisson(divergence: Array, spacing: Sequence[float]) -> Array:
    """Invert the seven-point Laplacian with mirrored edges."""
    laplacian = np.zeros((1, 1, 1), np.float32)
    for axis, (n, h) in enumerate(zip(divergence.shape, spacing, strict=True)):
        values = (2 * np.cos(np.pi * np.arange(n, dtype=np.float32) / n) - 2) / np.float32(h**2)
        laplacian = laplacian + values.reshape([-1 if a == axis else 1 for a in range(3)])
    laplacian[0, 0, 0] = 1.0
    spectrum = scipy.fft.dctn(divergence, workers=-1) / laplacian
    spectrum[0, 0, 0] = 0.0
    return scipy.fft.idctn(spectrum, workers=-1).astype(np.float32)


def remove_background(
    field: Array,
    mask: Array,
    spacing: Sequence[float],
    *,
    radii: Sequence[float] = (12.0, 8.0, 6.0, 4.0, 2.0),
    threshold: float = 0.05,
) -> tuple[Array, Array]:
    """Remove the field of sources outside the mask (V-SHARP).

    Parameters
    ----------
    field : (X, Y, Z) array
        Total field, ppm.
    mask : (X, Y, Z) bool array
        Where the field is trusted.
    spacing
        Voxel size in mm.
    radii
        Radii of the spherical kernels in mm, largest first.
    threshold
        Truncation of the deconvolution with the largest kernel.

    Returns
    -------
    local field : (X, Y, Z) float32 array, ppm, zero outside the eroded mask
    eroded mask : (X, Y, Z) bool array

    Notes
    -----
    A harmonic field equals its mean over any sphere (Schweser et al., NeuroImage 54 (2011)
    2789-2807); the sphere shrinks towards the edge (Wu et al., Magn. Reson. Med. 67 (2012)
    137-147).
    """
    shape = mask.shape
    masked = np.where(mask, field, 0).astype(np.float32)
    spectrum = scipy.fft.rfftn(masked, workers=-1)
    depth = ndi.distance_transform_edt(mask, sampling=spacing)
    high_passed = np.zeros(shape, np.float32)
    done = np.zeros(shape, bool)
    for radius in sorted(radii, reverse=True):
        kernel = 1 - _sphere_spectrum(shape, spacing, radius)
        inside = (depth > radius) & ~done
        convolved = scipy.fft.irfftn(spectrum * kernel, s=shape, workers=-1)
        high_passed[inside] = convolved[inside]
        done |= inside
    largest = 1 - _sphere_spectrum(shape, spacing, max(radii))
    divisor = np.where(np.abs(largest) > threshold, largest, np.inf)
    local = scipy.fft.irfftn(
        scipy.fft.rfftn(high_passed, workers=-1) / divisor, s=shape, workers=-1
    )
    return np.where(done, local, 0).astype(np.float32), done


def _sphere_spectrum(shape: Sequence[int], spacing: Sequence[float], radius: float) -> Array:
    """Spectrum of a normalised sphere centred on voxel (0, 0, 0); real, as a sphere is even."""
    axes = [
        scipy.fft.fftfreq(n, 1 / n).astype(np.float32) * np.float32(h)
        for n, h in zip(shape, spacing, strict=True)
    ]
    squared = (
        axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2][None, None, :] ** 2
    )
    sphere = (squared <= radius**2).astype(np.float32)
    sphere /= sphere.sum()
    return scipy.fft.rfftn(sphere, workers=-1).real


def high_pass_phase(signal: Array, spacing: Sequence[float], fwhm: float = 8.0) -> Array:
    """Return the phase left when the smooth part of a complex image is divided out.

    Parameters
    ----------
    signal : (X, Y, Z) complex array
    spacing
        Voxel size in mm.
    fwhm
        Width of the Gaussian that makes the smooth part, mm.

    Returns
    -------
    (X, Y, Z) float32 array, radians
    """
    kx, ky, kz = wave_numbers(signal.shape, spacing)
    sigma = fwhm / np.sqrt(8 * np.log(2))
    gaussian = np.exp(-2 * (np.pi * sigma) ** 2 * (kx**2 + ky**2 + kz**2))

    def smooth(part: Array) -> Array:
        spectrum = scipy.fft.rfftn(part, workers=-1) * gaussian
        return scipy.fft.irfftn(spectrum, s=signal.shape, workers=-1)

    low = smooth(signal.real) + 1j * smooth(signal.imag)
    return np.angle(signal * np.conj(low)).astype(np.float32)
