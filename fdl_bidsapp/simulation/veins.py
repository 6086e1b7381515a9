"""Veins: the dural sinuses, the internal cerebral and basal veins, and random cortical ones."""

from __future__ import annotations

import numpy as np

Array = np.ndarray

N_CORTICAL_VEINS = 60


def paint_veins(
    rng: np.random.Generator, room: Array, inverse: Array, spacing: tuple[float, float, float]
) -> Array:
    """Draw a head's veins on a scan's grid.

    Parameters
    ----------
    rng
        Source of randomness.
    room : (X, Y, Z) array
        Share of each voxel that veins may take.
    inverse : (4, 4) array
        Template (mm) to voxels.
    spacing
        Voxel size in mm.

    Returns
    -------
    (X, Y, Z) float32 array
        Share of each voxel that venous blood fills.
    """
    vein = np.zeros(room.shape, np.float32)
    for course, radius in _courses(rng):
        course = course + rng.normal(0, 1.0, 3)
        voxels = course @ inverse[:3, :3].T + inverse[:3, 3]
        paint_tube(vein, voxels, radius, np.asarray(spacing))
    return vein * np.clip(room, 0, 1)


def _courses(rng: np.random.Generator) -> list[tuple[Array, float]]:
    """Return the veins' points in the template and their radii, both in mm."""
    t = np.linspace(0, 1, 160)[:, None]
    bend = np.sin(np.pi * t)
    turn = np.pi * (0.05 + 1.02 * t)
    sagittal_sinus = np.hstack([0 * t, -18 + 92 * np.cos(turn), 4 + 78 * np.sin(turn)])
    straight_sinus = np.hstack([0 * t, -42 - 42 * t, 8 - 20 * t])
    courses = [(sagittal_sinus, 2.6), (straight_sinus, 1.7)]
    for side in (-1, 1):
        internal_cerebral = np.hstack([side * (2 + 0 * t), 0 - 38 * t, 14 - 4 * t])
        basal = np.hstack([side * (13 - 9 * t + 7 * bend), -5 - 32 * t, -12 + 18 * t])
        transverse_sinus = np.hstack([side * (8 + 45 * t), -86 + 38 * t, -16 - 8 * t])
        courses += [(internal_cerebral, 1.0), (basal, 0.8), (transverse_sinus, 2.4)]
    for _ in range(N_CORTICAL_VEINS):
        start = rng.normal(0, 1, 3)
        start = start / np.linalg.norm(start) * [62, 80, 62] + [0, -18, 8]
        end = start * rng.uniform(0.35, 0.8) + rng.normal(0, 8, 3)
        sideways = rng.normal(0, 4, 3) * bend
        courses.append((start + (end - start) * t + sideways, rng.uniform(0.3, 0.9)))
    return courses


def paint_tube(vein: Array, voxels: Array, radius: float, spacing: Array) -> None:
    """Fill a tube along a line of points (in voxels), thinner ones than a voxel in part."""
    reach = np.ceil((radius + 1) / spacing).astype(int)
    steps = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), -1)
    near = np.round(voxels)[:, None] + steps.reshape(-1, 3)
    distance = np.linalg.norm((near - voxels[:, None]) * spacing, axis=-1)
    share = np.clip(radius + 0.5 - distance, 0, min(1.0, 2 * radius)).astype(np.float32).ravel()
    near = near.reshape(-1, 3).astype(int)
    inside = np.all((near >= 0) & (near < vein.shape), 1)
    np.maximum.at(vein, tuple(near[inside].T), share[inside])
