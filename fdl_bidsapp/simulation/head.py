"""A simulated head: the ICBM template's tissues, with nuclei placed in it as smooth shapes.

The template (T1, grey and white matter maps) comes with nilearn; the nuclei are ellipsoids and
folded plates at their known coordinates. Every head is another deformation of it, and every
nucleus varies in place, size and form on its own, so that nothing can be learnt from position
alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import scipy.ndimage as ndi

from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.simulation.geometry import rotation, smooth_noise
from fdl_bidsapp.simulation.shapes import SHAPES, paint
from fdl_bidsapp.simulation.veins import paint_veins

Array = np.ndarray

AIR = (
    # centre, radii (mm): frontal, ethmoid and sphenoid sinuses, nasal cavity, mastoid cells
    ((0, 72, 2), (16, 7, 10)),
    ((0, 52, -36), (11, 14, 11)),
    ((0, 22, -38), (11, 10, 8)),
    ((0, 48, -62), (10, 26, 12)),
    ((-54, -32, -44), (7, 11, 13)),
    ((54, -32, -44), (7, 11, 13)),
)

NEAR, FAR = 25, 60.0
"""Up to where the distance from the brain is known, beyond the scalp; what stands for more, mm."""

OUTSIDE_SKULL = ("air", "skull", "soft_tissue", "scalp_fat")
"""Tissues that no brain mask holds."""


@dataclass
class Head:
    """Soft anatomy on a voxel grid.

    Attributes
    ----------
    labels
        (X, Y, Z) uint8 array: the nuclei, with the indices of the label table.
    brain
        (X, Y, Z) bool array: inside the skull.
    spacing
        Voxel size in mm.
    weights
        Tissue name to (X, Y, Z) float32 array: the share of each voxel that the tissue fills.
        They sum to one.
    """

    labels: Array
    brain: Array
    spacing: tuple[float, float, float]
    weights: dict[str, Array] = field(default_factory=dict)


def build_head(
    rng: np.random.Generator,
    shape: Sequence[int],
    affine: Array,
    *,
    variation: float = 1.0,
) -> Head:
    """Deform the template into a new head on a scan's grid.

    Parameters
    ----------
    rng
        Source of randomness: the same generator state gives the same head.
    shape
        Grid size in voxels.
    affine : (4, 4) array
        Voxel to scanner coordinates, mm; scanner coordinates are those of the template before
        deformation.
    variation
        Factor on the size of all deformations.

    Returns
    -------
    Head
    """
    x, y, z = spacing_of(affine).tolist()
    matrix = _head_to_template(rng, variation) @ affine
    inverse = np.linalg.inv(matrix)
    points = _warped_points(rng, shape, (x, y, z), matrix, variation)
    weights = _tissues(rng, points)
    labels = np.zeros(shape, np.uint8)
    for spec in SHAPES:
        # Either side varies on its own: real heads are not symmetric.
        for side in (-1, 1):
            painted = paint(rng, spec, side, points, inverse, variation)
            if painted is None:
                continue
            for weight in weights.values():
                weight[painted.region] *= 1 - painted.filled
            weights[spec.tissue][painted.region] += painted.filled
            index = _label_index(spec.tissue, side)
            if index:
                labels[painted.region][painted.outlined > 0.5] = index
    intracranial = 1 - _sum_of(weights, OUTSIDE_SKULL)
    # Veins run beside nuclei, not through them, and not through air or bone.
    room = intracranial
    for spec in SHAPES:
        room = room - weights[spec.tissue]
    veins = paint_veins(rng, room, inverse, (x, y, z))
    for weight in weights.values():
        weight *= 1 - veins
    weights["venous_blood"] = veins
    return Head(labels, intracranial > 0.5, (x, y, z), weights)


def _head_to_template(rng: np.random.Generator, variation: float) -> Array:
    """Draw a position and size of the head; return scanner to template coordinates, mm."""
    angles = rng.normal(0, 4, 3) * variation
    scales = np.exp(variation * (rng.normal(0, 0.04) + rng.normal(0, 0.03, 3)))
    shift = rng.normal(0, 3, 3) * variation
    centre = np.array([0.0, -18.0, 0.0])
    linear = np.diag(1 / scales) @ rotation(angles).T
    to_template = np.eye(4)
    to_template[:3, :3] = linear
    to_template[:3, 3] = centre - linear @ (centre + shift)
    return to_template


def _warped_points(
    rng: np.random.Generator,
    shape: Sequence[int],
    spacing: Sequence[float],
    matrix: Array,
    variation: float,
) -> list[Array]:
    """Return where each voxel lies in the template, mm, with a smooth random warp."""
    i, j, k = np.meshgrid(
        *(np.arange(n, dtype=np.float32) for n in shape), indexing="ij", sparse=True
    )
    points = []
    for row in matrix[:3].astype(np.float32):
        coordinate = row[0] * i + row[1] * j + row[2] * k + row[3]
        coarse = smooth_noise(rng, shape, spacing, 45)
        warp = 2.2 * coarse + 0.8 * smooth_noise(rng, shape, spacing, 18)
        points.append((coordinate + np.float32(variation) * warp).astype(np.float32))
    return points


def _label_index(tissue: str, side: int) -> int:
    """Return the index of a nucleus in the label table; 0 if it is not one of them."""
    hemisphere = "L" if side < 0 else "R"
    for label in nuclei():
        if label.structure == tissue and label.hemisphere == hemisphere:
            return label.index
    return 0


def _sum_of(weights: dict[str, Array], names: Iterable[str]) -> Array:
    total = np.zeros((), np.float32)
    for name in names:
        total = total + weights[name]
    return total


# Everything but the nuclei


@dataclass(frozen=True)
class _Template:
    """Grey and white matter (0 to 1) and the distance from the brain's surface (mm)."""

    grey: Array
    white: Array
    outside: Array
    to_voxel: Array

    def at(self, points: Sequence[Array]) -> tuple[Array, Array, Array]:
        """Return grey matter, white matter and distance at points of the template, mm."""
        voxels = [
            p * np.float32(self.to_voxel[a, a]) + np.float32(self.to_voxel[a, 3])
            for a, p in enumerate(points)
        ]

        def sample(data: Array, beyond: float) -> Array:
            return ndi.map_coordinates(data, voxels, order=1, mode="constant", cval=beyond)

        return sample(self.grey, 0.0), sample(self.white, 0.0), sample(self.outside, FAR)


@cache
def _template() -> _Template:
    from nilearn import datasets

    brain = datasets.load_mni152_brain_mask(resolution=1)
    # The template ends at the foramen magnum and has room around the head only above: pad, so that
    # the distance to the brain is known wherever a voxel of a scan may lie.
    pad = 40
    inside = np.pad(np.asarray(brain.dataobj) > 0, pad)
    distance = np.full(inside.shape, FAR, np.float32)
    x, y, z = ndi.find_objects(inside.astype(np.uint8))[0]
    near = tuple(slice(s.start - NEAR, s.stop + NEAR) for s in (x, y, z))
    distance[near] = ndi.distance_transform_edt(~inside[near])
    distance[near] -= ndi.distance_transform_edt(inside[near])
    affine = np.array(brain.affine, float)
    affine[:3, 3] -= pad * np.diag(affine)[:3]

    def padded(image: Any) -> Array:
        return np.pad(np.asarray(image.dataobj, np.float32), pad)

    return _Template(
        padded(datasets.load_mni152_gm_template(resolution=1)),
        padded(datasets.load_mni152_wm_template(resolution=1)),
        distance,
        np.linalg.inv(affine),
    )


def _tissues(rng: np.random.Generator, points: Sequence[Array]) -> dict[str, Array]:
    """Return the share of every tissue but the nuclei and veins, whose shares are zero."""
    grey, white, outside = _template().at(points)
    brain = np.clip(0.5 - outside, 0, 1)
    total = np.maximum(grey + white, 1e-3)
    parenchyma = np.clip(total * 1.1, 0, 1) * brain
    grey, white = parenchyma * grey / total, parenchyma * white / total
    x, y, z = points
    cerebellum = np.clip((-20 - z + 0.35 * (y + 60)) / 4, 0, 1) * np.clip((-38 - y) / 4, 0, 1)
    stem = (np.hypot(x / 16, (y + 26) / 17) < 1) & (z < -4)
    coverings, inner = _coverings(rng, points, outside)
    weights = coverings | {
        "csf": inner - parenchyma,
        "cortical_grey": grey * (1 - cerebellum),
        "cerebellar_cortex": grey * cerebellum,
        "white_matter": white * (1 - cerebellum) * ~stem,
        "cerebellar_white_matter": white * cerebellum,
        "brainstem": white * (1 - cerebellum) * stem,
    }
    names = {spec.tissue for spec in SHAPES} | {"venous_blood"}
    weights |= {name: np.zeros_like(outside) for name in sorted(names)}
    total = _sum_of(weights, weights)
    return {name: (weight / total).astype(np.float32) for name, weight in weights.items()}


def _coverings(
    rng: np.random.Generator, points: Sequence[Array], outside: Array
) -> tuple[dict[str, Array], Array]:
    """Return skull, scalp, face, neck and air, and the share that lies inside the skull."""
    csf_width = rng.uniform(1.5, 3.5)
    skull_width = rng.uniform(4, 7)
    scalp_width = rng.uniform(4, 8)

    def within(limit: float) -> Array:
        return np.clip(0.5 + limit - outside, 0, 1)

    face = np.maximum(
        _ball(points, (0, 40, -62), (58, 52, 50)), _ball(points, (0, -30, -110), (56, 60, 70))
    )
    head = np.maximum(within(csf_width + skull_width + scalp_width), face)
    bone = within(csf_width + skull_width)
    inner = within(csf_width)
    air = np.zeros_like(outside)
    for centre, radii in AIR:
        size = np.exp(rng.normal(0, 0.2))
        air = np.maximum(air, _ball(points, centre, np.multiply(radii, size)))
    air = air * (1 - inner)
    fat = np.clip(1 - np.abs(outside - csf_width - skull_width - 2) / 2, 0, 1) * (1 - bone)
    coverings = {
        "air": 1 - head * (1 - air),
        "scalp_fat": fat * head * (1 - air),
        "soft_tissue": np.maximum((head - bone) * (1 - fat) * (1 - air), 0),
        "skull": (bone - inner) * (1 - air),
    }
    return coverings, inner


def _ball(
    points: Sequence[Array], centre: Sequence[float], radii: Sequence[float] | Array
) -> Array:
    """Return the soft share of an ellipsoid, one millimetre wide at its surface."""
    squared = np.zeros((), np.float32)
    for p, c, r in zip(points, centre, radii, strict=True):
        squared = squared + ((p - np.float32(c)) / np.float32(r)) ** 2
    return np.clip(0.5 - (np.sqrt(squared) - 1) * np.float32(min(radii)), 0, 1)
