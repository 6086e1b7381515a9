"""The deep nuclei as smooth shapes, and how each varies from head to head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fdl_bidsapp.simulation.geometry import rotation

Array = np.ndarray


@dataclass(frozen=True)
class Shape:
    """An ellipsoidal structure of the left side in MNI152NLin2009aSym space.

    Attributes
    ----------
    tissue
        Row of the tissue table.
    centre, radii
        mm, in the template's RAS axes.
    angles
        Rotation about x, y, z in degrees.
    """

    tissue: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0)


# In painting order: later shapes lie over earlier ones.
SHAPES = (
    Shape("thalamus", (-12.0, -19.0, 7.0), (8.5, 14.0, 8.0), (0, 0, 20)),
    Shape("caudate", (-12.5, 14.0, 6.0), (4.2, 10.0, 7.5), (25, 0, 0)),
    Shape("caudate", (-16.0, -4.0, 20.0), (3.0, 14.0, 3.0), (10, 0, 20)),
    Shape("putamen", (-26.0, 3.0, 1.0), (4.8, 14.5, 8.5), (0, 0, 12)),
    Shape("globus_pallidus", (-19.0, -4.0, -1.0), (3.6, 8.5, 5.0), (0, 0, 28)),
    Shape("cerebral_peduncle", (-13.0, -17.5, -13.5), (5.5, 4.5, 9.0), (15, -32, 0)),
    Shape("substantia_nigra", (-10.0, -18.5, -12.0), (7.4, 2.7, 5.4), (30, 35, -28)),
    Shape("subthalamic_nucleus", (-11.5, -13.0, -7.0), (5.2, 2.6, 3.0), (0, 28, -35)),
    Shape("red_nucleus", (-5.0, -20.0, -8.0), (3.3, 4.1, 4.6)),
    Shape("dentate_nucleus", (-15.5, -58.0, -34.0), (6.0, 8.5, 4.9), (-18, 25, -25)),
)


@dataclass(frozen=True)
class Painted:
    """A structure on a part of the grid.

    Attributes
    ----------
    region
        The part of the grid.
    outlined
        Share of each voxel of the region that a rater counts to the structure.
    filled
        Share that the structure's tissue fills: less than ``outlined`` in the dentate nucleus
        alone, whose outline holds a folded sheet of grey matter with white matter in its folds.
    """

    region: tuple[slice, slice, slice]
    outlined: Array
    filled: Array


def paint(
    rng: np.random.Generator,
    spec: Shape,
    side: int,
    points: Sequence[Array],
    inverse: Array,
    variation: float,
) -> Painted | None:
    """Draw one individual of a structure on a scan's grid.

    Parameters
    ----------
    rng
        Source of randomness; the same number of draws is taken wherever the structure lies.
    spec
        The structure.
    side
        -1 for left, 1 for right.
    points
        Three (X, Y, Z) arrays: where each voxel lies in the template, mm.
    inverse : (4, 4) array
        Template (mm) to voxels, apart from the non-linear part of ``points``.
    variation
        Factor on the spread of place, size and form; 0 gives the structure as specified.

    Returns
    -------
    Painted, or None where the structure lies outside the field of view
    """
    centre = np.array(spec.centre) * [-side, 1, 1] + rng.normal(0, 0.8, 3) * variation
    radii = np.array(spec.radii) * np.exp(
        variation * (rng.normal(0, 0.05) + rng.normal(0, 0.05, 3))
    )
    angles = np.array(spec.angles) * [1, -side, -side] + rng.normal(0, 6, 3) * variation
    waves, phases = rng.normal(0, 1, (4, 3)), rng.uniform(0, 2 * np.pi, 4)
    fold_phase, fold_turns = rng.uniform(0, 2 * np.pi), rng.uniform(7, 11)
    fold_depth = rng.uniform(0.15, 0.4)

    reach = float(radii.max()) * 1.3 + 8 * variation
    region = _region(centre, reach, inverse, points[0].shape)
    if region is None:
        return None
    offset = np.stack([p[region] - c for p, c in zip(points, centre, strict=True)])
    scaled = np.tensordot(rotation(angles).T, offset, 1) / radii[:, None, None, None]
    radius = np.sqrt((scaled**2).sum(0)) + 1e-6
    direction = scaled / radius
    share = _ellipsoid(radius, direction, radii, variation * _bumps(direction, waves, phases))
    if spec.tissue != "dentate_nucleus":
        return Painted(region, share, share)
    share = np.clip(share - _hilum(scaled, -side, float(radii.min())), 0, 1)
    azimuth = np.arctan2(direction[1], direction[0])
    folds = 1 - fold_depth * (0.5 + 0.5 * np.cos(fold_turns * azimuth + fold_phase))
    return Painted(region, share, share * folds)


def _region(
    centre: Array, reach: float, inverse: Array, shape: Sequence[int]
) -> tuple[slice, slice, slice] | None:
    """Return the part of the grid within ``reach`` mm of a point of the template."""
    middle = inverse[:3, :3] @ centre + inverse[:3, 3]
    half = np.abs(inverse[:3, :3]).sum(1) * reach
    low = np.maximum(np.floor(middle - half), 0).astype(int)
    high = np.minimum(np.ceil(middle + half) + 1, shape).astype(int)
    if np.any(low >= high):
        return None
    x, y, z = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return x, y, z


def _bumps(direction: Array, waves: Array, phases: Array) -> Array:
    """Return the relative change of an ellipsoid's radius in each direction."""
    total = np.zeros(direction.shape[1:])
    for wave, phase in zip(waves, phases, strict=True):
        total += np.cos(2.2 * np.tensordot(wave / np.linalg.norm(wave), direction, 1) + phase)
    return 0.04 * total


def _ellipsoid(radius: Array, direction: Array, radii: Array, bumps: Array) -> Array:
    """Return the share of each voxel inside, with an edge one millimetre wide."""
    gradient = np.sqrt((direction**2 / radii[:, None, None, None] ** 2).sum(0))
    distance = (radius * (1 + bumps) - 1) / np.maximum(gradient, 1e-3)
    return np.clip(0.5 - distance, 0, 1)


def _hilum(scaled: Array, medial: int, smallest_radius: float) -> Array:
    """Return the share of the dentate's hilum, which opens towards the midline and up."""
    centre = np.array([medial * 0.55, 0.15, 0.45])[:, None, None, None]
    radii = np.array([0.62, 0.72, 0.5])[:, None, None, None]
    radius = np.sqrt((((scaled - centre) / radii) ** 2).sum(0))
    return np.clip(0.5 - (radius - 1) * 0.5 * smallest_radius, 0, 1)
