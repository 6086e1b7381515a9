"""R2* and mean magnitude from multi-echo magnitudes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fdl_bidsapp.errors import DataError

SHORTEST_T2STAR = 1e-4
"""Seconds. A shorter T2* is noise, and its inverse would drown the map."""


def r2star_loglinear(
    magnitude: NDArray[np.float32], echo_times: Sequence[float], *, weighted: bool = True
) -> NDArray[np.float32]:
    """Fit R2* by log-linear least squares.

    Parameters
    ----------
    magnitude : (X, Y, Z, E) array
        Magnitude at each echo, arbitrary unit.
    echo_times : E floats
        Echo times in seconds, increasing.
    weighted
        Whether echoes count by their squared magnitude; else all alike.

    Returns
    -------
    (X, Y, Z) float32 array
        R2* in 1/s; 0 where fewer than two echoes are positive, and where the signal grows.

    Raises
    ------
    DataError
        Fewer than two echoes, their number differs from the last axis, or the times are not
        increasing seconds.

    Notes
    -----
    Mono-exponential decay S = S₀ exp(−R2* TE). Squared magnitudes as weights undo the noise that
    the logarithm amplifies in late echoes.

    Examples
    --------
    >>> times = [0.005, 0.010, 0.020]
    >>> signal = 100 * np.exp(-30.0 * np.array(times)).reshape(1, 1, 1, 3)
    >>> round(float(r2star_loglinear(signal, times)[0, 0, 0]), 3)
    30.0
    """
    _check_echoes(magnitude.shape[-1], echo_times)
    # Times from their mean keep the normal equations well conditioned.
    times = np.asarray(echo_times, dtype=np.float64) - np.mean(echo_times)
    shape = magnitude.shape[:-1]
    w, wt, wtt, wy, wty = (np.zeros(shape) for _ in range(5))
    usable = np.zeros(shape, dtype=np.uint16)
    for echo, time in enumerate(times):
        signal = magnitude[..., echo].astype(np.float64)
        positive = signal > 0
        usable += positive
        logarithm = np.log(signal, out=np.zeros(shape), where=positive)
        weight = np.where(positive, signal**2 if weighted else 1.0, 0)
        w += weight
        wt += weight * time
        wtt += weight * time**2
        wy += weight * logarithm
        wty += weight * logarithm * time
    determinant = w * wtt - wt**2
    fitted = (usable >= 2) & (determinant > 0)
    rate = np.divide(wt * wy - w * wty, determinant, out=np.zeros(shape), where=fitted)
    return np.maximum(rate, 0).astype(np.float32)


def r2star_arlo(magnitude: NDArray[np.float32], echo_times: Sequence[float]) -> NDArray[np.float32]:
    """Fit R2* by auto-regression on linear operations (ARLO).

    Parameters
    ----------
    magnitude : (X, Y, Z, E) array
        Magnitude at each echo, arbitrary unit.
    echo_times : E floats
        Echo times in seconds, evenly spaced.

    Returns
    -------
    (X, Y, Z) float32 array
        R2* in 1/s; 0 where the signal grows.

    Raises
    ------
    DataError
        Fewer than three echoes, unevenly spaced ones, or times that do not fit the images.

    Notes
    -----
    The integral of an exponential over two echo spacings, by Simpson's rule, is its fall over them
    times T2* (Pei et al., Magn. Reson. Med. 73 (2015) 843-850).

    Examples
    --------
    >>> times = [0.005, 0.010, 0.015, 0.020]
    >>> signal = 100 * np.exp(-30.0 * np.array(times)).reshape(1, 1, 1, 4)
    >>> round(float(r2star_arlo(signal, times)[0, 0, 0]), 1)
    30.0
    """
    _check_echoes(magnitude.shape[-1], echo_times)
    steps = np.diff(np.asarray(echo_times, np.float64))
    if len(steps) < 2 or np.ptp(steps) > 0.01 * steps.mean():
        raise DataError("ARLO needs three evenly spaced echoes or more", "fit R2* by least squares")
    third = float(steps.mean()) / 3
    area, fall_area, fall = (np.zeros(magnitude.shape[:-1]) for _ in range(3))
    for echo in range(len(steps) - 1):
        first, second, last = (magnitude[..., echo + i].astype(np.float64) for i in range(3))
        integral, lost = third * (first + 4 * second + last), first - last
        area += integral**2
        fall_area += integral * lost
        fall += lost**2
    below = area + third * fall_area
    rate = np.divide(third * fall + fall_area, below, out=np.zeros(below.shape), where=below > 0)
    return np.maximum(rate, 0).astype(np.float32)


def _check_echoes(n: int, echo_times: Sequence[float]) -> None:
    remedy = "check EchoTime in the sidecars"
    if len(echo_times) != n:
        raise DataError(f"{n} echoes have {len(echo_times)} echo times", remedy)
    if n < 2:
        raise DataError("R2* needs two echoes or more", "give all echoes or an R2* map")
    times = np.asarray(echo_times, dtype=np.float64)
    text = ", ".join(f"{time:g}" for time in times)
    if not np.isfinite(times).all() or times[0] <= 0 or (np.diff(times) <= 0).any():
        raise DataError(f"echo times {text} are not positive and increasing", remedy)
    if times[-1] > 1:
        raise DataError(f"echo times {text} are not in seconds", remedy)


def mean_magnitude(magnitude: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average the echoes of an (X, Y, Z, E) magnitude to an (X, Y, Z) float32 image (iMag).

    Examples
    --------
    >>> float(mean_magnitude(np.array([[[[1.0, 3.0]]]]))[0, 0, 0])
    2.0
    """
    return magnitude.mean(axis=-1, dtype=np.float32)


def r2star_from_t2star(t2star: NDArray[np.float32]) -> NDArray[np.float32]:
    """Invert T2* in seconds to R2* in 1/s; 0 where T2* is not above 0.1 ms.

    Examples
    --------
    >>> r2star_from_t2star(np.array([0.0, 0.05])).tolist()
    [0.0, 20.0]
    """
    rate = np.zeros(t2star.shape, dtype=np.float32)
    return np.divide(1.0, t2star, out=rate, where=t2star > SHORTEST_T2STAR)
