"""How well two segmentations agree: overlap, volume, correlation, distances of surfaces.

What each measure is, and what it gives where a mask is empty, stands in ``docs/metrics.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]

METRICS = (
    "dice",
    "precision",
    "recall",
    "volume_error",
    "absolute_volume_error",
    "pearson_r",
    "hd95",
    "mean_surface_distance",
)
"""Names of what :func:`agreement` gives, in the order of the tables."""


def dice(a: Mask, b: Mask) -> float:
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
    both, only_a, only_b = _counts(a, b)
    return _ratio(2 * both, 2 * both + only_a + only_b)


def precision(predicted: Mask, true: Mask) -> float:
    """Return the share of the predicted voxels that are true.

    0 where nothing is predicted and there was something to find; NaN where both are empty.

    Examples
    --------
    >>> precision(np.array([1, 1, 0, 0]), np.array([0, 1, 1, 1]))
    0.5
    """
    both, only_predicted, only_true = _counts(predicted, true)
    if only_true and not both + only_predicted:
        return 0.0
    return _ratio(both, both + only_predicted)


def recall(predicted: Mask, true: Mask) -> float:
    """Return the share of the true voxels that are predicted.

    0 where something is predicted and there was nothing to find; NaN where both are empty.

    Examples
    --------
    >>> round(recall(np.array([1, 1, 0, 0]), np.array([0, 1, 1, 1])), 3)
    0.333
    """
    return precision(true, predicted)


def volume_error(predicted: Mask, true: Mask) -> float:
    """Return (V_predicted - V_true) / V_true; NaN where the true mask is empty.

    Its mean over scans is the mean volume error rate (MVER), the mean of its absolute value the
    mean absolute volume error rate (MAVER).

    Examples
    --------
    >>> volume_error(np.array([1, 1, 1, 0]), np.array([0, 1, 1, 0]))
    0.5
    """
    both, only_predicted, only_true = _counts(predicted, true)
    return _ratio(only_predicted - only_true, both + only_true)


def pearson_r(predicted: Mask, true: Mask) -> float:
    """Return Pearson's correlation of two masks over all voxels of the image.

    0 where one mask is constant (empty or full) and the other is not the same; NaN where both are
    empty.

    Examples
    --------
    >>> pearson_r(np.array([1, 1, 0, 0]), np.array([1, 1, 0, 0]))
    1.0
    """
    both, only_a, only_b = _counts(predicted, true)
    if not both + only_a + only_b:
        return math.nan
    n = predicted.size
    a, b = (both + only_a) / n, (both + only_b) / n
    spread = math.sqrt(a * (1 - a) * b * (1 - b))
    if not spread:
        return 1.0 if not only_a + only_b else 0.0
    return (both / n - a * b) / spread


def surface_distances(a: Mask, b: Mask, spacing: Sequence[float]) -> NDArray[np.float64]:
    """Return the distance of each surface voxel of one mask to the surface of the other.

    A mask's surface are its voxels with a face towards the outside or the end of the image.

    Parameters
    ----------
    a, b : (X, Y, Z) arrays
        Masks with at least one voxel each.
    spacing
        Voxel size on each axis in mm.

    Returns
    -------
    (N,) float64 array
        In mm, from ``a`` to ``b``.
    """
    box = ndimage.find_objects(((a != 0) | (b != 0)).astype(np.uint8))[0]
    a, b = (np.pad(mask[box] != 0, 1) for mask in (a, b))
    surface_a, surface_b = (mask & ~ndimage.binary_erosion(mask) for mask in (a, b))
    return ndimage.distance_transform_edt(~surface_b, sampling=spacing)[surface_a]


def hausdorff95(a: Mask, b: Mask, spacing: Sequence[float]) -> float:
    """Return the 95th-percentile Hausdorff distance in mm, the larger of the two directions.

    Where just one mask is empty, the length of the image's diagonal; NaN where both are.

    Examples
    --------
    >>> a, b = np.zeros((2, 9, 9, 9), bool)
    >>> a[2, 4, 4] = b[5, 4, 4] = True
    >>> hausdorff95(a, b, (0.5, 1, 1))
    1.5
    """
    return _distances(a, b, spacing)[0]


def mean_surface_distance(a: Mask, b: Mask, spacing: Sequence[float]) -> float:
    """Return the mean distance in mm between surfaces, over the surface voxels of both masks.

    Where just one mask is empty, the length of the image's diagonal; NaN where both are.

    Examples
    --------
    >>> a = np.zeros((9, 9, 9), bool)
    >>> a[2:5, 2:5, 2:5] = True
    >>> mean_surface_distance(a, a, (1, 1, 1))
    0.0
    """
    return _distances(a, b, spacing)[1]


def agreement(predicted: Mask, true: Mask, spacing: Sequence[float]) -> dict[str, float]:
    """Return all measures of :data:`METRICS` for two masks.

    Parameters
    ----------
    predicted, true : (X, Y, Z) arrays
        Masks on one grid.
    spacing
        Voxel size on each axis in mm.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    error = volume_error(predicted, true)
    values = (
        dice(predicted, true),
        precision(predicted, true),
        recall(predicted, true),
        error,
        abs(error),
        pearson_r(predicted, true),
        *_distances(predicted, true, spacing),
    )
    return dict(zip(METRICS, values, strict=True))


def _counts(a: Mask, b: Mask) -> tuple[int, int, int]:
    """Count the voxels inside both, only the first, only the second."""
    if a.shape != b.shape:
        raise ValueError(f"masks of shapes {a.shape} and {b.shape} do not lie on one grid")
    inside_a, inside_b = a != 0, b != 0
    both = int(np.count_nonzero(inside_a & inside_b))
    return both, int(np.count_nonzero(inside_a)) - both, int(np.count_nonzero(inside_b)) - both


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _distances(a: Mask, b: Mask, spacing: Sequence[float]) -> tuple[float, float]:
    """Return the 95th-percentile Hausdorff distance and the mean surface distance."""
    some_a, some_b = bool(np.any(a)), bool(np.any(b))
    if some_a and some_b:
        there, back = surface_distances(a, b, spacing), surface_distances(b, a, spacing)
        farthest = max(np.percentile(there, 95), np.percentile(back, 95))
        return float(farthest), float(np.concatenate([there, back]).mean())
    if not (some_a or some_b):
        return math.nan, math.nan
    diagonal = math.hypot(*(n * size for n, size in zip(a.shape, spacing, strict=True)))
    return diagonal, diagonal
