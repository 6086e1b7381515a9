"""A simulated head: the ICBM template's tissues, with nuclei placed in it as smooth shapes.

The template (T1, grey and white matter maps) comes with nilearn; the nuclei are ellipsoids and
folded plates at their known coordinates. Every head is another deformation of it, and every
nucleus varies in place, size and form on its own, so that nothing can be learnt from position
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import scipy.ndimage as ndi
from scipy.interpolate import make_interp_spline

from fdl_bidsapp.labels import nuclei

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

AIR = (
    # centre, radii (mm): frontal, ethmoid and sphenoid sinuses, nasal cavity, mastoid cells
    ((0, 72, 2), (16, 7, 10)),
    ((0, 52, -36), (11, 14, 11)),
    ((0, 22, -38), (11, 10, 8)),
    ((0, 48, -62), (10, 26, 12)),
    ((-54, -32, -44), (7, 11, 13)),
    ((54, -32, -44), (7, 11, 13)),
)


@dataclass
class Head:
    """Soft anatomy on a voxel grid.

    Attributes
    ----------
    weights
        Tissue name to (X, Y, Z) float32 array: the share of each voxel that the tissue fills.
        They sum to one.
    labels
        (X, Y, Z) uint8 array: the nuclei, with the indices of the label table.
    brain
        (X, Y, Z) bool array: inside the skull.
    spacing
        Voxel size in mm.
    """

    labels: Array
    brain: Array
    spacing: tuple[float, float, float]
    weights: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class _Template:
    grey: Array
    white: Array
    outside: Array
    to_voxel: Array


@cache
def _template() -> _Template:
    from nilearn import datasets

    grey = datasets.load_mni152_gm_template(resolution=1)
    white = datasets.load_mni152_wm_template(resolution=1)
    brain = datasets.load_mni152_brain_mask(resolution=1)
    # The template ends at the foramen magnum and has room around the head only above: pad, so that
    # the distance to the brain is known wherever a voxel of a scan may lie.
    pad = 40
    inside = np.pad(np.asarray(brain.dataobj) > 0, pad)
    distance = ndi.distance_transform_edt(~inside) - ndi.distance_transform_edt(inside)
    affine = np.array(brain.affine, float)
    affine[:3, 3] -= pad * np.diag(affine)[:3]

    def padded(image) -> Array:  # type: ignore[no-untyped-def]
        return np.pad(np.asarray(image.dataobj, np.float32), pad)

    return _Template(
        padded(grey), padded(white), distance.astype(np.float32), np.linalg.inv(affine)
    )


def rotation(angles: Sequence[float]) -> Array:
    """Return the 3 × 3 rotation about x, then y, then z, in degrees.

    Examples
    --------
    >>> print(np.round(rotation((0, 0, 90)) @ [1, 0, 0], 3) + 0.0)
    [0. 1. 0.]
    """
    result = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(angles)):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        sign = -1.0 if axis == 1 else 1.0
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -sign * np.sin(angle), sign * np.sin(angle)
        result = turn @ result
    return result


def smooth_noise(
    rng: np.random.Generator, shape: Sequence[int], spacing: Sequence[float], scale: float
) -> Array:
    """Return smooth noise of unit variance, made on a grid of ``scale`` mm and interpolated."""
    coarse = [max(2, int(np.ceil(n * h / scale)) + 1) for n, h in zip(shape, spacing, strict=True)]
    result = rng.standard_normal([c + 2 for c in coarse])
    for axis, (c, n) in enumerate(zip(coarse, shape, strict=True)):
        # A spline through unit vectors is the matrix of the interpolation along one axis.
        spline = make_interp_spline(np.arange(c + 2), np.eye(c + 2), k=min(3, c + 1))
        matrix = spline(np.linspace(1, c, n))
        result = np.moveaxis(np.tensordot(matrix.astype(np.float32), result, (1, axis)), 0, axis)
    return (result / max(float(result.std()), 1e-6)).astype(np.float32)


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
    template = _template()
    spacing = tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))
    angles = rng.normal(0, 4, 3) * variation
    scales = np.exp(variation * (rng.normal(0, 0.04) + rng.normal(0, 0.03, 3)))
    shift = rng.normal(0, 3, 3) * variation
    centre = np.array([0.0, -18.0, 0.0])
    # Scanner to template: undo shift, rotation and scaling about the brain's centre.
    linear = np.diag(1 / scales) @ rotation(angles).T
    to_template = np.eye(4)
    to_template[:3, :3] = linear
    to_template[:3, 3] = centre - linear @ (centre + shift)
    matrix = to_template @ affine
    grid = np.meshgrid(
        *(np.arange(n, dtype=np.float32) for n in shape), indexing="ij", sparse=True
    )
    points = []
    for axis in range(3):
        coordinate = sum(np.float32(matrix[axis, a]) * grid[a] for a in range(3))
        coordinate = coordinate + np.float32(matrix[axis, 3])
        warp = 2.2 * smooth_noise(rng, shape, spacing, 45) + 0.8 * smooth_noise(
            rng, shape, spacing, 18
        )
        points.append((coordinate + np.float32(variation) * warp).astype(np.float32))

    voxels = [
        p * np.float32(template.to_voxel[a, a]) + np.float32(template.to_voxel[a, 3])
        for a, p in enumerate(points)
    ]

    def sample(data: Array, outside: float) -> Array:
        return ndi.map_coordinates(data, voxels, order=1, mode="constant", cval=outside)

    weights = _tissues(rng, points, sample(template.outside, 60.0), sample, template)
    labels = np.zeros(shape, np.uint8)
    inverse = np.linalg.inv(matrix)
    for spec in SHAPES:
        # Either side varies on its own: real heads are not symmetric.
        for side in (-1, 1):
            region, share, image_share = _paint_shape(
                rng, spec, side, points, inverse, shape, variation
            )
            if region is None:
                continue
            for weight in weights.values():
                weight[region] *= 1 - image_share
            weights[spec.tissue][region] += image_share
            index = _label_index(spec.tissue, side)
            if index:
                labels[region][share > 0.5] = index
    brain = 1 - sum(
        weights[name] for name in ("air", "skull", "soft_tissue", "scalp_fat")
    )
    _paint_veins(rng, weights, inverse, spacing)
    return Head(labels, brain > 0.5, (spacing[0], spacing[1], spacing[2]), weights)


def _label_index(tissue: str, side: int) -> int:
    hemisphere = "L" if side < 0 else "R"
    for label in nuclei():
        if label.structure == tissue and label.hemisphere == hemisphere:
            return label.index
    return 0


def _ball(points: list[Array], centre: Sequence[float], radii: Sequence[float]) -> Array:
    """Soft share of an ellipsoid, one millimetre wide at its surface."""
    scaled = [(p - np.float32(c)) / np.float32(r) for p, c, r in zip(points, centre, radii,
                                                                    strict=True)]
    radius = np.sqrt(sum(s * s for s in scaled))
    return np.clip(0.5 - (radius - 1) * np.float32(min(radii)), 0, 1)


def _tissues(rng, points, outside, sample, template) -> dict[str, Array]:  # type: ignore[no-untyped-def]
    """Everything but the nuclei: brain tissue, CSF, skull, scalp, face, neck, air."""
    grey, white = sample(template.grey, 0.0), sample(template.white, 0.0)
    brain = np.clip(0.5 - outside, 0, 1)
    total = np.maximum(grey + white, 1e-3)
    parenchyma = np.clip(total * 1.1, 0, 1) * brain
    grey, white = parenchyma * grey / total, parenchyma * white / total
    x, y, z = points
    cerebellum = np.clip((-20 - z + 0.35 * (y + 60)) / 4, 0, 1) * np.clip((-38 - y) / 4, 0, 1)
    stem = (np.hypot(x / 16, (y + 26) / 17) < 1) & (z < -4)

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
    weights = {
        "air": 1 - head * (1 - air),
        "scalp_fat": fat * head * (1 - air),
        "soft_tissue": (head - bone) * (1 - fat) * (1 - air),
        "skull": (bone - inner) * (1 - air),
        "csf": inner - parenchyma,
        "cortical_grey": grey * (1 - cerebellum),
        "cerebellar_cortex": grey * cerebellum,
        "white_matter": white * (1 - cerebellum) * ~stem,
        "cerebellar_white_matter": white * cerebellum,
        "brainstem": white * (1 - cerebellum) * stem,
    }
    weights["soft_tissue"] = np.maximum(weights["soft_tissue"], 0)
    names = {spec.tissue for spec in SHAPES} | {"venous_blood"}
    weights |= {name: np.zeros_like(outside) for name in sorted(names)}
    total = sum(weights.values())
    return {name: (weight / total).astype(np.float32) for name, weight in weights.items()}


def _paint_shape(rng, spec, side, points, inverse, shape, variation):  # type: ignore[no-untyped-def]
    """Return the sub-box of the grid, the share that a rater outlines, and the share in the image.

    The two differ for the dentate nucleus alone: its grey matter is a folded sheet around a pale
    hilum, and what is outlined is the region of the sheet.
    """
    centre = np.array(spec.centre) * [-side, 1, 1] + rng.normal(0, 0.8, 3) * variation
    radii = np.array(spec.radii) * np.exp(
        variation * (rng.normal(0, 0.05) + rng.normal(0, 0.05, 3))
    )
    angles = np.array(spec.angles) * [1, -side, -side] + rng.normal(0, 6, 3) * variation
    turn = rotation(angles).T
    waves = rng.normal(0, 1, (4, 3)), rng.uniform(0, 2 * np.pi, 4)
    fold_phase, fold_turns, fold_depth = (
        rng.uniform(0, 2 * np.pi), rng.uniform(7, 11), rng.uniform(0.15, 0.4)
    )
    reach = float(radii.max()) * 1.3 + 8 * variation
    middle = inverse[:3, :3] @ centre + inverse[:3, 3]
    half = np.abs(inverse[:3, :3]).sum(1) * reach
    low = np.maximum(np.floor(middle - half), 0).astype(int)
    high = np.minimum(np.ceil(middle + half) + 1, shape).astype(int)
    if np.any(low >= high):
        return None, None, None
    region = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    offset = np.stack([p[region] - c for p, c in zip(points, centre, strict=True)])
    local = np.tensordot(turn, offset, 1)
    scaled = local / radii[:, None, None, None]
    radius = np.sqrt((scaled**2).sum(0)) + 1e-6
    direction = scaled / radius
    bumps = sum(
        np.cos(2.2 * np.tensordot(w / np.linalg.norm(w), direction, 1) + phase)
        for w, phase in zip(*waves, strict=True)
    )
    radius = radius * (1 + 0.04 * variation * bumps)
    gradient = np.sqrt((direction**2 / radii[:, None, None, None] ** 2).sum(0))
    distance = (radius - 1) / np.maximum(gradient, 1e-3)
    share = np.clip(0.5 - distance, 0, 1)
    if spec.tissue != "dentate_nucleus":
        return region, share, share
    # The hilum opens towards the midline and up; the plate around it is what is outlined.
    medial = -side
    hilum_centre = np.array([medial * 0.55, 0.15, 0.45])[:, None, None, None]
    hilum_radius = np.sqrt((((scaled - hilum_centre) / [[[[0.62]]], [[[0.72]]], [[[0.5]]]]) ** 2)
                           .sum(0))
    hilum = np.clip(0.5 - (hilum_radius - 1) * 0.5 * float(radii.min()), 0, 1)
    share = np.clip(share - hilum, 0, 1)
    azimuth = np.arctan2(direction[1], direction[0])
    folds = 1 - fold_depth * (0.5 + 0.5 * np.cos(fold_turns * azimuth + fold_phase))
    return region, share, share * folds


def _paint_veins(rng, weights, inverse, spacing) -> None:  # type: ignore[no-untyped-def]
    """Draw the large sinuses, internal cerebral and basal veins, and random cortical veins."""
    t = np.linspace(0, 1, 160)[:, None]
    arch = np.hstack([0 * t, -18 + 92 * np.cos(np.pi * (0.05 + 1.02 * t)),
                      4 + 78 * np.sin(np.pi * (0.05 + 1.02 * t))])
    curves = [(arch, 2.6)]
    curves.append((np.hstack([0 * t, -42 - 42 * t, 8 - 20 * t]), 1.7))
    for side in (-1, 1):
        curves.append((np.hstack([side * (2 + 0 * t), 0 - 38 * t, 14 - 4 * t]), 1.0))
        bend = np.sin(np.pi * t)
        curves.append((np.hstack([side * (13 - 9 * t + 7 * bend), -5 - 32 * t, -12 + 18 * t]), 0.8))
        curves.append((np.hstack([side * (8 + 45 * t), -86 + 38 * t, -16 - 8 * t]), 2.4))
    for _ in range(60):
        start = rng.normal(0, 1, 3)
        start = start / np.linalg.norm(start) * [62, 80, 62] + [0, -18, 8]
        end = start * rng.uniform(0.35, 0.8) + rng.normal(0, 8, 3)
        bend = rng.normal(0, 4, 3) * np.sin(np.pi * t)
        curves.append((start + (end - start) * t + bend, rng.uniform(0.3, 0.9)))
    vein = weights["venous_blood"]
    spacing = np.asarray(spacing)
    for curve, radius in curves:
        curve = curve + rng.normal(0, 1.0, 3)
        voxels = curve @ inverse[:3, :3].T + inverse[:3, 3]
        reach = np.ceil((radius + 1) / spacing).astype(int)
        steps = np.stack(
            np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), -1
        ).reshape(-1, 3)
        near = np.round(voxels)[:, None] + steps
        distance = np.linalg.norm((near - voxels[:, None]) * spacing, axis=-1)
        share = np.clip(radius + 0.5 - distance, 0, min(1.0, 2 * radius))
        near = near.reshape(-1, 3).astype(int)
        inside = np.all((near >= 0) & (near < vein.shape), 1)
        np.maximum.at(vein, tuple(near[inside].T), share.reshape(-1)[inside].astype(np.float32))
    # Veins run beside nuclei, not through them, and not through air or bone.
    room = 1 - sum(weights[name] for name in ("air", "skull", "soft_tissue", "scalp_fat"))
    for spec in SHAPES:
        room = room - weights[spec.tissue]
    vein *= np.clip(room, 0, 1)
    for name, weight in weights.items():
        if name != "venous_blood":
            weight *= 1 - vein
