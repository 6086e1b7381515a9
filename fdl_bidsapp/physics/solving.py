"""Solving the linear equations of least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Data = TypeVar("Data", np.ndarray, "torch.Tensor")


def conjugate_gradients(
    curvature: Callable[[Data], Data],
    right: Data,
    iterations: int,
    *,
    product: Callable[[Data, Data], Any],
    tolerance: float = 0.0,
) -> Data:
    """Solve ``curvature(x) = right`` step by step, beginning with zero.

    Parameters
    ----------
    curvature
        A symmetric, positive semi-definite linear map of arrays of the shape of ``right``.
    right
        Array or tensor of any shape; it stays as it is.
    iterations
        Steps at most.
    product
        Inner product of two of them, ``np.vdot`` for arrays. Where the equations are all but
        singular, its rounding shows.
    tolerance
        Share of the first residual's length at which no further step is taken.

    Returns
    -------
    array or tensor
        As ``right``.

    Notes
    -----
    Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49 (1952) 409-436.

    Examples
    --------
    >>> matrix = np.array([[2.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradients(lambda x: matrix @ x, np.array([3.0, 4.0]), 2, product=np.vdot)
    array([1., 1.])
    """
    found = 0 * right
    rest = ahead = right
    size = first = float(product(rest, rest))
    for _ in range(iterations):
        if size <= tolerance**2 * first:
            break
        curved = curvature(ahead)
        step = size / float(product(ahead, curved))
        found = found + step * ahead
        rest = rest - step * curved
        size, before = float(product(rest, rest)), size
        ahead = rest + (size / before) * ahead
    return found
