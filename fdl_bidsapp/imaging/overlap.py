"""How well two segmentations agree."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Return the Dice coefficient 2|A ∩ B| / (|A| + |B|) of two masks.

    Parameters
    ----------
    a, b
        Masks of one shape; not 0 counts as inside.

    Returns
    -------
    float
        0 to 1. NaN where both are empty: there was nothing to agree on, and a 1 would reward a
        structure that lies outside every field of view.

    Raises
    ------
    ValueError
        The shapes differ.

    Examples
    --------
    >>> dice(np.array([1, 1, 0, 0]), np.array([0, 1, 1, 0]))
    0.5
    """
    if a.shape != b.shape:
        raise ValueError(f"masks of shapes {a.shape} and {b.shape} do not lie on one grid")
    inside_a, inside_b = a != 0, b != 0
    total = np.count_nonzero(inside_a) + np.count_nonzero(inside_b)
    if total == 0:
        return math.nan
    return float(2 * np.count_nonzero(inside_a & inside_b) / total)
