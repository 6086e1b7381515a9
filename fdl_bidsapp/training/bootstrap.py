"""Intervals by bootstrap over participants: they are independent, their cases are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 20230228


@dataclass(frozen=True)
class Estimate:
    """A mean with what is known of its precision.

    Attributes
    ----------
    n_cases, n_participants
        Those with a value.
    mean
        Over the cases.
    lower, upper
        95 % bootstrap interval over participants.
    sem
        Standard error of the mean, from the participants' means; NaN with one participant.
    p
        Twice the smaller share of the resampled means at or beyond 0.
    """

    n_cases: int
    n_participants: int
    mean: float
    lower: float
    upper: float
    sem: float
    p: float


def bootstrap_mean(values: Sequence[float], participants: Sequence[str]) -> Estimate:
    """Estimate the mean of a value over cases.

    Parameters
    ----------
    values
        One for each case; NaN takes no part.
    participants
        Who each case is of; cases of one participant stay together.

    Returns
    -------
    Estimate
        NaN throughout where there is no value.

    Examples
    --------
    >>> estimate = bootstrap_mean([0.8, 0.9, 0.7, float("nan")], ["a", "a", "b", "c"])
    >>> estimate.n_cases, estimate.n_participants, round(estimate.mean, 3)
    (3, 2, 0.8)
    >>> round(estimate.lower, 3), round(estimate.upper, 3), round(estimate.sem, 3)
    (0.7, 0.85, 0.075)
    """
    data = np.asarray(values, dtype=np.float64)
    kept = np.isfinite(data)
    if not kept.any():
        return Estimate(0, 0, *[math.nan] * 5)
    names, owner = np.unique(np.asarray(participants, dtype=str)[kept], return_inverse=True)
    sums = np.bincount(owner, data[kept]).astype(np.float64)
    counts = np.bincount(owner).astype(np.float64)
    means = _resampled_means(sums, counts)
    lower, upper = np.percentile(means, [2.5, 97.5])
    n = len(names)
    sem = float(np.std(sums / counts, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    beyond = min(float(np.mean(means <= 0)), float(np.mean(means >= 0)))
    return Estimate(
        int(kept.sum()),
        n,
        float(sums.sum() / counts.sum()),
        float(lower),
        float(upper),
        sem,
        min(1.0, max(2 * beyond, 1 / RESAMPLES)),
    )


def _resampled_means(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Draw participants with replacement, and take the mean over the cases of those drawn."""
    n = len(sums)
    # How often each participant is drawn is all that matters.
    times = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    means: NDArray[np.float64] = (times @ sums) / (times @ counts)
    return means
