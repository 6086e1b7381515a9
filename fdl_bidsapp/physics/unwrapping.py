"""The total field from multi-echo phase, unwrapped along paths or by its Laplacian."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.ndimage as ndi

from fdl_bidsapp.physics import GAMMA_BAR
from fdl_bidsapp.physics.phase import wrap

Array = np.ndarray

OFFSET_SIGMA = 4.0
"""Width in mm to which the phase at echo time zero is smoothed: a coil's varies no faster."""

OFFSET_PASSES = 4
"""How often what smoothing has left of that phase is smoothed again."""


def unwrap_path(phase: Array, mask: Array) -> Array:
    """Unwrap phase along the most reliable path through a mask.

    Parameters
    ----------
    phase : (X, Y, Z) array
        Wrapped phase, radians.
    mask : (X, Y, Z) bool array
        Where the phase is trusted; one connected part.

    Returns
    -------
    (X, Y, Z) float32 array
        Radians, zero outside the mask; differs from ``phase`` by whole turns. The number of turns
        that is common to all voxels is such that the median is within half a turn of zero.

    Notes
    -----
    Voxels are joined in the order of the second differences around them (Abdul-Rahman et al.,
    Appl. Opt. 46 (2007) 6623-6635), with the implementation of scikit-image. Unlike Laplacian
    unwrapping, it leaves the wrapped phase as measured.
    """
    from skimage.restoration import unwrap_phase

    if not mask.any():
        return np.zeros(mask.shape, np.float32)
    box = ndi.find_objects(mask.astype(np.uint8))[0]
    wrapped = np.ma.array(wrap(phase[box].astype(np.float64)), mask=~mask[box])
    # The seed only breaks ties.
    unwrapped = np.asarray(unwrap_phase(wrapped, rng=0).filled(0))
    turns = np.round(np.median(unwrapped[mask[box]]) / (2 * np.pi))
    result = np.zeros(mask.shape, np.float32)
    result[box] = np.where(mask[box], unwrapped - 2 * np.pi * turns, 0)
    return result


def fit_unwrapped_field(
    signal: Array,
    mask: Array,
    spacing: Sequence[float],
    echo_times: Sequence[float],
    field_strength: float,
) -> tuple[Array, Array]:
    """Fit the relative field to the phase of all echoes, unwrapping in space and then in time.

    Parameters
    ----------
    signal : (X, Y, Z, E) complex array
        Signal at each echo.
    mask : (X, Y, Z) bool array
        Where the phase is trusted; one connected part.
    spacing
        Voxel size in mm.
    echo_times
        Echo times in seconds, increasing.
    field_strength
        B0 in tesla.

    Returns
    -------
    field : (X, Y, Z) float32 array
        Relative field in ppm, zero outside the mask.
    residual : (X, Y, Z) float32 array
        Weighted root mean square of what the fit leaves, radians.

    Notes
    -----
    Only the phase that accrues over the shortest echo spacing is unwrapped in space; it predicts
    each echo's phase to within half a turn. The phase at echo time zero is the coils' and smooth:
    estimated voxel by voxel, smoothed and taken out, it leaves a line through the origin, whose
    slope is far less noisy than that of a line with an intercept (the idea of MCPC-3D-S: Eckstein
    et al., Magn. Reson. Med. 79 (2018) 2996-3006). Weights are squared magnitudes, the inverse
    variance of phase.
    """
    times = np.asarray(echo_times, np.float64)
    to_ppm = np.float32(1 / (2 * np.pi * GAMMA_BAR * field_strength))
    if len(times) == 1:
        phase = unwrap_path(np.angle(signal[..., 0]), mask)
        return phase * to_ppm / np.float32(times[0]), np.zeros(mask.shape, np.float32)

    slope = _slope_of_shortest_spacing(signal, mask, times)
    first = np.angle(signal[..., 0])
    phases = np.empty(signal.shape, np.float32)
    phases[..., 0] = 0
    weights = np.empty(signal.shape, np.float32)
    for e, time in enumerate(times):
        weights[..., e] = np.abs(signal[..., e]) ** 2
        if e > 0:
            since = np.angle(signal[..., e] * np.conj(signal[..., 0]))
            predicted = slope * np.float32(time - times[0])
            phases[..., e] = predicted + wrap(since - predicted)
            slope, intercept = _line(phases, weights, times - times[0], e + 1)
    offset = first + intercept - slope * np.float32(times[0])
    offset = _smoothed_angle(offset, np.where(mask, weights[..., 0], 0), spacing)
    predicted = slope * np.float32(times[0])
    phases += (predicted + wrap(first - offset - predicted))[..., None]
    tp = sum(weights[..., e] * phases[..., e] * np.float32(t) for e, t in enumerate(times))
    tt = sum(weights[..., e] * np.float32(t**2) for e, t in enumerate(times))
    slope = np.divide(tp, tt, out=np.zeros(mask.shape, np.float32), where=tt > 0)
    left = sum(
        weights[..., e] * (phases[..., e] - slope * np.float32(t)) ** 2 for e, t in enumerate(times)
    )
    total = weights.sum(-1)
    residual = np.sqrt(np.divide(left, total, out=np.zeros_like(total), where=total > 0))
    return np.where(mask, slope * to_ppm, 0), np.where(mask, residual, 0)


def _slope_of_shortest_spacing(signal: Array, mask: Array, times: Array) -> Array:
    """Unwrap the phase that accrues over the shortest echo spacing; return it in rad/s."""
    spacings = np.diff(times)
    shortest = spacings.min()
    pairs = np.flatnonzero(spacings < 1.01 * shortest)
    accrued = sum(signal[..., e + 1] * np.conj(signal[..., e]) for e in pairs)
    slope = unwrap_path(np.angle(accrued), mask)
    return slope / np.float32(spacings[pairs].mean())


def _line(phases: Array, weights: Array, times: Array, n: int) -> tuple[Array, Array]:
    """Fit a line to the first ``n`` echoes; return slope and intercept."""
    w, wt, wtt, wp, wtp = (np.zeros(phases.shape[:-1], np.float32) for _ in range(5))
    for e in range(n):
        time, weight = np.float32(times[e]), weights[..., e]
        w += weight
        wt += weight * time
        wtt += weight * time**2
        wp += weight * phases[..., e]
        wtp += weight * time * phases[..., e]
    determinant = w * wtt - wt**2
    known = determinant > 1e-6 * w * wtt
    slope = np.divide(w * wtp - wt * wp, determinant, out=np.zeros_like(w), where=known)
    return slope, np.divide(wp - slope * wt, w, out=np.zeros_like(w), where=known)


def _smoothed_angle(angle: Array, weight: Array, spacing: Sequence[float]) -> Array:
    """Smooth an angle as the direction of a weighted mean of unit vectors.

    What is left is smoothed and added again: once is not enough at the mask's edge, where only one
    side has neighbours.
    """
    sigma = [OFFSET_SIGMA / float(size) for size in spacing]

    def smooth(part: Array) -> Array:
        return ndi.gaussian_filter((weight * part).astype(np.float32), sigma, truncate=3.0)

    result = np.zeros(angle.shape, np.float32)
    for _ in range(OFFSET_PASSES):
        left = angle - result
        result += np.arctan2(smooth(np.sin(left)), smooth(np.cos(left)))
    return result
