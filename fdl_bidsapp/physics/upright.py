"""Grids that stand upright in the magnet, for networks that know one geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.ndimage as ndi

Array = np.ndarray


@dataclass(frozen=True)
class UprightGrid:
    """The grid of a network's own voxel size whose third axis lies along B0, around a scan.

    On it the dipole is the same for every scan, however its slices lay and whatever its voxels.
    The scan is turned by the smallest angle that does it; a direction and its opposite are one.

    Parameters
    ----------
    shape
        The scan's grid.
    spacing
        Its voxel size in mm.
    direction
        Unit vector of B0 in its voxel axes.
    own_spacing
        Voxel size of the upright grid in mm.

    Attributes
    ----------
    own_shape
        Holds the whole scan.

    Examples
    --------
    >>> grid = UprightGrid((10, 20, 30), (1.0, 1.0, 2.0), (-1.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    >>> grid.own_shape
    (60, 20, 10)
    """

    shape: Sequence[int]
    spacing: Sequence[float]
    direction: Sequence[float] | Array
    own_spacing: Sequence[float]
    own_shape: tuple[int, int, int] = field(init=False)
    _turn: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        x, y, z = np.asarray(self.direction, float) * (-1 if self.direction[2] < 0 else 1)
        # The rotation about the axis across both vectors, which brings (x, y, z) to (0, 0, 1).
        turn = np.array(
            [
                [1 - x * x / (1 + z), -x * y / (1 + z), -x],
                [-x * y / (1 + z), 1 - y * y / (1 + z), -y],
                [x, y, z],
            ]
        )
        size = np.abs(turn) @ np.multiply(self.shape, self.spacing) / self.own_spacing
        a, b, c = (int(n) for n in np.ceil(size - 1e-6))
        object.__setattr__(self, "_turn", turn)
        object.__setattr__(self, "own_shape", (a, b, c))

    def take(self, volume: Array, order: int = 1) -> Array:
        """Sample a volume of the scan's grid on the upright one; what is not in it is 0.

        Parameters
        ----------
        volume : (X, Y, Z) array
        order
            Of the spline; 0 is the nearest voxel.
        """
        matrix = np.diag(1 / np.asarray(self.spacing)) @ self._turn.T @ np.diag(self.own_spacing)
        return _sampled(volume, matrix, self.own_shape, order)

    def put_back(self, volume: Array, order: int = 1) -> Array:
        """Sample a volume of the upright grid on the scan's; see :meth:`take`."""
        matrix = np.diag(1 / np.asarray(self.own_spacing)) @ self._turn @ np.diag(self.spacing)
        return _sampled(volume, matrix, self.shape, order)


def _sampled(volume: Array, matrix: Array, shape: Sequence[int], order: int) -> Array:
    """Sample a volume at the places that a matrix about both grids' middles gives."""
    middle, own = ((np.asarray(n) - 1) / 2 for n in (volume.shape, shape))
    result: Array = ndi.affine_transform(
        volume, matrix, middle - matrix @ own, tuple(shape), order=order, mode="grid-constant"
    )
    return result
