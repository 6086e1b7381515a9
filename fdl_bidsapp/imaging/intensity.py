"""Intensities: to the [0, 1] a network reads, and checks of a map's unit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fdl_bidsapp.errors import ImageError

QSM_PPB_ABOVE = 10.0
"""Brain susceptibility stays within ±1 ppm, which is ±1000 in ppb (robust ends: hundreds)."""

T2STAR_MS_ABOVE = 1.0
"""Brain T2* is 0.01 to 0.3 s, which is 10 to 300 in ms."""

R2STAR_LIMIT = 1e4
"""1/s. A decay within 0.1 ms is beyond any echo train."""

ROBUST_PERCENTILES = (0.5, 99.5)

RATE_LIMITS = (0.0, 80.0)
"""1/s. Iron-rich nuclei have 20 to 60 at 3 T; at 7 T they may be cut, their surround is not."""


def minmax(data: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale linearly so that the smallest value is 0 and the largest 1.

    Raises
    ------
    ImageError
        All values are the same.

    Examples
    --------
    >>> minmax(np.array([-1.0, 0.0, 3.0])).tolist()
    [0.0, 0.25, 1.0]
    """
    return scale(data, float(data.min()), float(data.max()))


def robust(
    data: NDArray[np.float32],
    low: float = ROBUST_PERCENTILES[0],
    high: float = ROBUST_PERCENTILES[1],
) -> NDArray[np.float32]:
    """Scale as `minmax`, between percentiles, and clip what lies beyond.

    A few voxels of streaking in a QSM map can be ten times as strong as any nucleus; min-max would
    then leave the nuclei a sliver of the range.

    Parameters
    ----------
    data
        Any shape.
    low, high
        Percentiles over the voxels that are not 0: the empty surround of a masked map would take
        part of the percentile otherwise, as much as the field of view is wide.

    Raises
    ------
    ImageError
        The percentiles are the same value.

    Examples
    --------
    >>> data = np.append(np.linspace(1, 2, 1000), 500.0)
    >>> bool(robust(data)[990] > 0.99)
    True
    """
    first, last = _percentiles(data, low, high)
    return scale(data, first, last)


def _percentiles(data: NDArray[np.float32], low: float, high: float) -> tuple[float, float]:
    values = data[data != 0]
    if not values.size:
        return 0.0, 0.0
    first, last = np.percentile(values, [low, high])
    return float(first), float(last)


def scale(data: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """Take ``low`` to 0 and ``high`` to 1, and clip what lies beyond.

    Raises
    ------
    ImageError
        ``high`` is not above ``low``.
    """
    if not high > low:
        raise ImageError(f"the image has no contrast: every value is {low:g}", "make it again")
    scaled = (data.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(scaled, 0, 1, out=scaled)


def limits(data: NDArray[np.float32], scheme: str) -> tuple[float, float]:
    """Return the values that the named scheme takes to 0 and 1.

    Parameters
    ----------
    data
        Any shape.
    scheme
        ``minmax``; ``robust``, between percentiles; or ``rate``, the fixed range 0 to 80 1/s for
        R2*, which outside the head is noise of any size and has no percentile worth the name.

    Raises
    ------
    ValueError
        There is no such scheme.

    Examples
    --------
    >>> limits(np.array([-1.0, 3.0]), "minmax")
    (-1.0, 3.0)
    """
    if scheme == "minmax":
        return float(data.min()), float(data.max())
    if scheme == "robust":
        return _percentiles(data, *ROBUST_PERCENTILES)
    if scheme == "rate":
        return RATE_LIMITS
    raise ValueError(f"unknown scheme {scheme!r}; there are minmax, robust and rate")


def normalise(data: NDArray[np.float32], scheme: str) -> NDArray[np.float32]:
    """Scale to [0, 1] by the named scheme, and clip; see `limits`.

    Raises
    ------
    ImageError
        The image has no contrast.
    ValueError
        There is no such scheme.
    """
    return scale(data, *limits(data, scheme))


def check_units(data: NDArray[np.float32], contrast: str) -> tuple[NDArray[np.float32], str | None]:
    """Tell a map's unit by its range and convert it to the unit used here.

    Parameters
    ----------
    data
        Map with zeros outside, where it is masked.
    contrast
        ``qsm``, ``r2star``, ``t2star``; others have no unit and pass.

    Returns
    -------
    data
        QSM in ppm, R2* in 1/s, T2* in s.
    note
        What was converted or looks wrong, for the scan's record; ``None`` if nothing.

    Notes
    -----
    QSM whose 0.5th or 99.5th percentile (over voxels that are not 0) exceeds 10 in size is in ppb.
    T2* whose median over positive voxels exceeds 1 is in ms. R2* is never converted, but noted
    where more than 1 % of the map is negative or the 99.5th percentile exceeds 10⁴ 1/s.

    Examples
    --------
    >>> data, note = check_units(np.array([-80.0, 20.0, 150.0], "f4"), "qsm")
    >>> note
    'QSM in ppb was converted to ppm'
    >>> round(float(data[2]), 2)
    0.15
    """
    if contrast == "qsm":
        if max(map(abs, _percentiles(data, *ROBUST_PERCENTILES))) > QSM_PPB_ABOVE:
            return data * np.float32(1e-3), "QSM in ppb was converted to ppm"
    elif contrast == "t2star":
        positive = data[data > 0]
        if positive.size and np.median(positive) > T2STAR_MS_ABOVE:
            return data * np.float32(1e-3), "T2* in ms was converted to s"
    elif contrast == "r2star":
        negative = float(np.mean(data[data != 0] < 0)) if data.any() else 0.0
        if negative > 0.01:
            return data, f"R2* is negative in {negative:.0%} of the map"
        if _percentiles(data, *ROBUST_PERCENTILES)[1] > R2STAR_LIMIT:
            return data, f"R2* exceeds {R2STAR_LIMIT:g} 1/s; is it in 1/s?"
    return data, None
