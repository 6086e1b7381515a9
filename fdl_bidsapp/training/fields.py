"""What PedQ-NET is trained on: local fields with their masks, weights and directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import EllipsisType

import numpy as np
import scipy.ndimage as ndi

from fdl_bidsapp.models.pedqnet import upright_field
from fdl_bidsapp.physics import GAMMA_BAR
from fdl_bidsapp.physics.dipole import field_direction, field_from_susceptibility
from fdl_bidsapp.physics.upright import UprightGrid
from fdl_bidsapp.simulation.contrast import susceptibility_map
from fdl_bidsapp.simulation.head import Head, build_head
from fdl_bidsapp.simulation.scan import scan_geometry
from fdl_bidsapp.simulation.tissue import Person, Tissue, draw_tissues

Array = np.ndarray

SUBCORTICAL = ("caudate", "putamen", "globus_pallidus", "thalamus")
"""Structures that sharpen the reconstruction; each left, then right, from label 1."""

INFANT_SPACING = (0.78, 0.78, 2.0)
"""mm."""

INFANT_SCALE = (0.66, 0.85)
"""Length of a head in the first two years over an adult's: head circumference grows from some 35
to 48 cm, and is 56 cm in adults (WHO Child Growth Standards, 2007)."""

RIM = 2.0
"""mm of the brain's rim that the removal of the background field takes away."""


@dataclass(frozen=True)
class FieldCase:
    """A local field to reconstruct.

    Attributes
    ----------
    local_field : (X, Y, Z) float32 array
        ppm, zero outside the mask.
    mask : (X, Y, Z) bool array
    weight : (X, Y, Z) float32 array
        Trust in each voxel, about 1; zero outside the mask.
    magnitude : (X, Y, Z) float32 array
        Mean of the echoes.
    spacing
        Voxel size in mm.
    direction : (3,) array
        Unit vector of B0 in voxel axes.
    radians_per_ppm
        2π γ̄ B0 TE.
    labels : (X, Y, Z) uint8 array
        Subcortical structures, or ``None`` where they are not known.
    susceptibility : (X, Y, Z) float32 array
        The truth in ppm, to measure with and never to train with; ``None`` where it is not known.
    brain : (X, Y, Z) bool array
        The whole brain, also where its field is not known; ``None`` if that is the mask.
    repeat : (X, Y, Z) float32 array
        The same field measured once more, with noise of its own; ``None`` if it was not.
    """

    local_field: Array
    mask: Array
    weight: Array
    magnitude: Array
    spacing: tuple[float, float, float]
    direction: Array
    radians_per_ppm: float
    labels: Array | None = None
    susceptibility: Array | None = None
    brain: Array | None = None
    repeat: Array | None = None


def simulate_field(
    seed: Sequence[int] | int,
    *,
    infant: bool = False,
    spacing: Sequence[float] | None = None,
    field_strength: float = 3.0,
    echo_time: float = 0.02,
    tilt: float = 12.0,
    snr: float = 40.0,
) -> FieldCase:
    """Simulate the local field of a head, as it is after an ideal background removal, twice.

    Parameters
    ----------
    seed
        Decides the head and its position.
    infant
        A small head with little iron at 0.78 × 0.78 × 2 mm, rather than an adult one at 1 mm.
    spacing
        Voxel size in mm, if another one is wanted.
    field_strength, echo_time
        Tesla and seconds; an effective echo time of the combined echoes.
    tilt
        Standard deviation of the grid's turn about each axis, degrees: no two fields have the same
        direction.
    snr
        Signal of white matter over the noise.

    Returns
    -------
    FieldCase
    """
    rng = np.random.default_rng(seed)
    x, y, z = (float(s) for s in spacing or (INFANT_SPACING if infant else (1.0, 1.0, 1.0)))
    size = (x, y, z)
    scale = float(rng.uniform(*INFANT_SCALE)) if infant else 1.0
    angles = rng.normal(0, tilt, 3)
    # The anatomy is drawn on an adult's scale; its voxels are then so much larger.
    shape, affine = scan_geometry([s / scale for s in size], angles)
    head = replace(build_head(rng, shape, affine), spacing=size)
    age = float(rng.uniform(0.1, 2.0)) if infant else float(rng.uniform(20, 80))
    tissues = draw_tissues(rng, Person(age=age), field_strength=field_strength)
    chi = susceptibility_map(head, tissues, rng)
    # Bone and air in the outermost voxels would be most of all susceptibility there is.
    mask = ndi.distance_transform_edt(head.brain, size) > RIM
    mask &= np.abs(chi) < 1
    chi = np.where(mask, chi - chi[mask].mean(), 0).astype(np.float32)
    direction = field_direction(affine)
    field = field_from_susceptibility(chi, size, direction)
    magnitude = _decayed(head, tissues, echo_time)
    typical = float(np.median(magnitude[mask]))
    radians_per_ppm = 2 * np.pi * GAMMA_BAR * field_strength * echo_time
    noise = typical / (snr * radians_per_ppm) / np.maximum(magnitude, 0.1 * typical)
    noise = noise.astype(np.float32)
    first, second = (
        np.where(mask, field + rng.standard_normal(shape, np.float32) * noise, 0) for _ in range(2)
    )
    weight = np.where(mask, np.clip(magnitude / typical, 0, 1.5), 0).astype(np.float32)
    return FieldCase(
        first.astype(np.float32),
        mask,
        weight,
        magnitude,
        size,
        direction,
        radians_per_ppm,
        subcortical_labels(head),
        chi,
        head.brain,
        second.astype(np.float32),
    )


def upright_case(case: FieldCase, spacing: Sequence[float]) -> FieldCase:
    """Bring a case to a network's own grid; see :class:`~fdl_bidsapp.physics.upright.UprightGrid`.

    Parameters
    ----------
    case
        Of any voxel size and field direction.
    spacing
        The network's voxel size in mm.
    """
    grid = UprightGrid(case.mask.shape, case.spacing, case.direction, spacing)
    local_field, mask = upright_field(grid, case.local_field, case.mask)
    brain = case.brain
    x, y, z = spacing
    return replace(
        case,
        local_field=local_field,
        mask=mask,
        weight=np.where(mask, grid.take(case.weight), 0).astype(np.float32),
        magnitude=grid.take(case.magnitude.astype(np.float32)),
        spacing=(x, y, z),
        direction=np.array([0.0, 0.0, 1.0]),
        labels=None if case.labels is None else grid.take(case.labels, order=0),
        susceptibility=None,
        brain=None if brain is None else grid.take(brain.astype(np.float32)) > 0.5,
        repeat=None if case.repeat is None else upright_field(grid, case.repeat, case.mask)[0],
    )


def _decayed(head: Head, tissues: dict[str, Tissue], echo_time: float) -> Array:
    total = np.zeros(head.labels.shape, np.float32)
    for name, share in head.weights.items():
        tissue = tissues[name]
        total += share * np.float32(max(tissue.rho, 0) * np.exp(-tissue.r2star * echo_time))
    return total


def subcortical_labels(head: Head) -> Array:
    """Label the structures of :data:`SUBCORTICAL`, left and right, in an (X, Y, Z) uint8 array."""
    labels: Array = np.zeros(head.labels.shape, np.uint8)
    first = np.arange(labels.shape[0]).reshape(-1, 1, 1)
    middle = (first * head.brain).sum() / max(head.brain.sum(), 1)
    for number, name in enumerate(SUBCORTICAL):
        inside = head.weights[name] > 0.5
        labels[inside & (first < middle)] = 2 * number + 1
        labels[inside & (first >= middle)] = 2 * number + 2
    return labels


@dataclass(frozen=True)
class Patch:
    """A piece of a grid; it may reach beyond the grid.

    Attributes
    ----------
    shape
        Of the patch.
    source, target
        What of the grid is in the patch, and where it lies there.
    """

    shape: tuple[int, ...]
    source: tuple[slice | EllipsisType, ...]
    target: tuple[slice | EllipsisType, ...]

    def cut(self, volume: Array, fill: float = 0) -> Array:
        """Cut the patch out of an (..., X, Y, Z) array; beyond the grid it is ``fill``."""
        result = np.full((*volume.shape[:-3], *self.shape), fill, volume.dtype)
        result[self.target] = volume[self.source]
        return result


def draw_patch(mask: Array, shape: Sequence[int], rng: np.random.Generator) -> Patch:
    """Place a patch at random around a voxel of a mask; it lies in the grid if that is larger."""
    inside = np.flatnonzero(mask)
    centre = np.unravel_index(inside[rng.integers(len(inside))], mask.shape)
    source: list[slice] = []
    target: list[slice] = []
    for c, n, size in zip(centre, shape, mask.shape, strict=True):
        start = int(np.clip(c - n // 2, min(0, size - n), max(0, size - n)))
        source.append(slice(max(start, 0), min(start + n, size)))
        target.append(slice(max(-start, 0), max(-start, 0) + source[-1].stop - source[-1].start))
    return Patch(tuple(shape), (..., *source), (..., *target))
