"""Head label maps as anatomy: tissues by structure, deep nuclei as surfaces of their own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
import scipy.ndimage as ndi
import torch

from fdl_bidsapp.errors import ImageError, InputMissingError, UsageError
from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.labels import Label, nuclei
from fdl_bidsapp.simulation.physiology import label_map_table
from fdl_bidsapp.simulation.tissue import IRON_RICH

Array = np.ndarray
Tensor = torch.Tensor

FINE = 0.5
"""mm between the points at which the distance from a nucleus's surface is kept."""

ROOM = 8.0
"""mm around a nucleus in which that distance is kept."""

COARSE = 2
"""Voxels of the label map to one of the map of depth in the brain."""

PARENCHYMA = {
    *IRON_RICH,
    "white_matter",
    "cortical_grey",
    "cerebellar_white_matter",
    "cerebellar_cortex",
    "thalamus",
    "brainstem",
    "white_matter_lesion",
}
INTRACRANIAL = PARENCHYMA | {"csf", "choroid_plexus"}


@dataclass(frozen=True)
class Nucleus:
    """One nucleus of a label map.

    Attributes
    ----------
    label
        Its row of the package's label table.
    centre
        (3,) array, mm in the label map's space.
    axes
        (3, 3) array: its principal directions as rows, the longest first.
    radii
        (3,) array: standard deviation along each, times two, mm.
    depth
        (1, X, Y, Z) float32 tensor: distance from the surface in mm, positive inside.
    to_voxel
        (4, 4) array: mm relative to the centre, to voxels of ``depth``.
    reach
        Distance from the centre that the nucleus does not exceed, mm.
    """

    label: Label
    centre: Array
    axes: Array
    radii: Array
    depth: Tensor
    to_voxel: Array
    reach: float


@dataclass(frozen=True)
class HeadMap:
    """A head label map, ready to be deformed.

    Attributes
    ----------
    name
        Of the file, without its extension.
    tissue
        (X, Y, Z) uint8 tensor: position in ``tissues``. The nuclei are filled with what surrounds
        them, as they are put in one by one.
    tissues
        Names of the tissues.
    to_voxel
        (4, 4) array: mm to voxels of ``tissue``.
    brain_depth
        (1, x, y, z) float32 tensor: distance from the brain's surface in mm, positive inside.
    depth_to_voxel
        (4, 4) array: mm to voxels of ``brain_depth``.
    nuclei
        In the order of the package's label table.
    plexus, ventricle
        (N, 3) arrays: points of the choroid plexus and of the fourth ventricle, mm.
    """

    name: str
    tissue: Tensor
    tissues: tuple[str, ...]
    to_voxel: Array
    brain_depth: Tensor
    depth_to_voxel: Array
    nuclei: tuple[Nucleus, ...]
    plexus: Array
    ventricle: Array

    @cached_property
    def spacing(self) -> tuple[float, float, float]:
        """Return the voxel size of ``tissue``, mm."""
        x, y, z = spacing_of(np.linalg.inv(self.to_voxel)).tolist()
        return x, y, z

    @cached_property
    def lowest(self) -> int:
        """Return the lowest slice that holds head: below it, the neck goes on as it ends."""
        air = self.tissues.index("air")
        held = (self.tissue != air).flatten(0, 1).any(0)
        return int(torch.nonzero(held)[0])

    @cached_property
    def brain_centre(self) -> Array:
        """Return the middle of the brain's bounding box, mm."""
        inside = np.argwhere(self.brain_depth[0].cpu().numpy() > 0)
        voxel = (inside.min(0) + inside.max(0)) / 2
        return (np.linalg.inv(self.depth_to_voxel) @ [*voxel, 1])[:3]

    @cached_property
    def brain_size(self) -> Array:
        """Return the size of the brain's bounding box, mm."""
        inside = np.argwhere(self.brain_depth[0].cpu().numpy() > 0)
        scale = spacing_of(np.linalg.inv(self.depth_to_voxel))
        return (inside.max(0) + 1 - inside.min(0)) * scale

    @property
    def nuclei_centre(self) -> Array:
        """Return the middle of the box around the nuclei's centres, mm."""
        centres = np.stack([nucleus.centre for nucleus in self.nuclei])
        return (centres.min(0) + centres.max(0)) / 2


def find_label_maps(folder: Path) -> list[Path]:
    """List the head label maps of a folder, ``*_dseg.nii.gz``, in the order of their names.

    Raises
    ------
    InputMissingError
        The folder, its label table ``dseg.tsv`` or the maps are not there.
    """
    if not folder.is_dir():
        raise InputMissingError("no such folder", "give the folder of head label maps", path=folder)
    if not (folder / "dseg.tsv").is_file():
        raise InputMissingError(
            "the folder has no label table dseg.tsv", "see docs/simulation.md", path=folder
        )
    found = sorted([*folder.glob("*_dseg.nii.gz"), *folder.glob("*_dseg.nii")])
    if not found:
        raise InputMissingError(
            "the folder has no label maps *_dseg.nii.gz", "see docs/simulation.md", path=folder
        )
    return found


def read_head_map(path: Path, device: torch.device | str = "cpu") -> HeadMap:
    """Read a label map, with the table ``dseg.tsv`` beside it.

    Parameters
    ----------
    path
        A label map of a whole head, about 1 mm isotropic.
    device
        Where it is to be deformed.

    Returns
    -------
    HeadMap

    Raises
    ------
    InputMissingError, ImageError
        It cannot be read, or it lacks one of the eight nuclei.
    UsageError
        The table names a structure whose tissue is not known.
    """
    try:
        image = nib.as_closest_canonical(nib.load(path))
        labels = np.asarray(image.dataobj).astype(np.int32)
    except FileNotFoundError as error:
        raise InputMissingError("no such file", "check the path", path=path) from error
    except Exception as error:
        raise ImageError(
            f"the label map cannot be read ({error})", "copy it again", path=path
        ) from error
    return head_map(path.name.split(".")[0], labels, image.affine, _table(path.parent), device)


def head_map(
    name: str,
    labels: Array,
    affine: Array,
    table: dict[int, tuple[str, str]],
    device: torch.device | str = "cpu",
) -> HeadMap:
    """Prepare a label map.

    Parameters
    ----------
    name
        To tell of it.
    labels : (X, Y, Z) integer array
        Its axes point to the right, front and top.
    affine : (4, 4) array
        Voxels to mm.
    table
        Structure and hemisphere (``L``, ``R`` or ``M``) of each index.
    device
        Where it is to be deformed.

    Raises
    ------
    ImageError
        An index is not in the table, or a nucleus is not in the map.
    UsageError
        The table names a structure whose tissue is not known.
    """
    unknown = sorted(set(np.unique(labels).tolist()) - set(table))
    if unknown:
        raise ImageError(
            f"indices {', '.join(map(str, unknown))} are not in the label table",
            "complete dseg.tsv",
            path=name,
        )
    tissue_of = label_map_table()["tissues"]
    strange = sorted({structure for structure, _ in table.values()} - set(tissue_of))
    if strange:
        raise UsageError(
            f"the label table names structures of unknown tissue: {', '.join(strange)}",
            f"name them as one of: {', '.join(tissue_of)}",
        )
    tissues = tuple(sorted(set(tissue_of.values())))
    lookup = np.zeros(max(table) + 1, np.uint8)
    for index, (structure, _) in table.items():
        lookup[index] = tissues.index(tissue_of[structure])

    indices = {
        label.index: [
            i for i, place in table.items() if place == (label.structure, label.hemisphere)
        ]
        for label in nuclei()
    }
    places = {index: np.isin(labels, found) for index, found in indices.items()}
    for label in nuclei():
        if not places[label.index].any():
            raise ImageError(f"the map has no {label.name.lower()}", "use another map", path=name)
    filled = _without(labels, list(places.values()))
    tissue = lookup[filled]
    inside = np.isin(tissue, [tissues.index(t) for t in INTRACRANIAL if t in tissues])
    depth, depth_affine = _brain_depth(inside, affine)

    def points(*structures: str) -> Array:
        chosen = [i for i, (structure, _) in table.items() if structure in structures]
        return np.argwhere(np.isin(labels, chosen)) @ affine[:3, :3].T + affine[:3, 3]

    return HeadMap(
        name,
        torch.from_numpy(tissue).to(device),
        tissues,
        np.linalg.inv(affine),
        torch.from_numpy(depth)[None].to(device),
        np.linalg.inv(depth_affine),
        tuple(_nucleus(label, places[label.index], affine, device) for label in nuclei()),
        points("choroid_plexus_lateral_ventricle"),
        points("fourth_ventricle"),
    )


def _table(folder: Path) -> dict[int, tuple[str, str]]:
    try:
        lines = (folder / "dseg.tsv").read_text("utf-8").splitlines()
    except OSError as error:
        raise InputMissingError(
            "the folder has no label table dseg.tsv", "see docs/simulation.md", path=folder
        ) from error
    header = lines[0].split("\t")
    try:
        rows = [dict(zip(header, line.split("\t"), strict=True)) for line in lines[1:] if line]
        return {int(row["index"]): (row["name"], row["hemisphere"]) for row in rows}
    except (KeyError, ValueError) as error:
        raise ImageError(
            "the label table has no whole-numbered index, name and hemisphere in each line",
            "see docs/simulation.md",
            path=folder / "dseg.tsv",
        ) from error


def _without(labels: Array, places: list[Array]) -> Array:
    """Fill the nuclei with the nearest other label."""
    taken = np.logical_or.reduce(places)
    box = tuple(
        slice(max(s.start - 3, 0), s.stop + 3) for s in ndi.find_objects(taken.astype(np.uint8))[0]
    )
    nearest = ndi.distance_transform_edt(taken[box], return_distances=False, return_indices=True)
    filled = labels.copy()
    filled[box] = labels[box][tuple(nearest)]
    return filled


def _brain_depth(inside: Array, affine: Array) -> tuple[Array, Array]:
    """Return the distance from the surface of the closed brain, mm, on a coarser grid."""
    shape = [n // COARSE * COARSE for n in inside.shape]
    x, y, z = (n // COARSE for n in shape)
    blocks = inside[: shape[0], : shape[1], : shape[2]].reshape(x, COARSE, y, COARSE, z, COARSE)
    coarse = np.pad(blocks.mean((1, 3, 5)) > 0.5, 4)
    parts, _ = ndi.label(ndi.binary_opening(coarse))
    coarse = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    coarse = ndi.binary_fill_holes(ndi.binary_closing(coarse, iterations=3))[4:-4, 4:-4, 4:-4]
    size = spacing_of(affine) * COARSE
    depth = ndi.distance_transform_edt(coarse, sampling=size)
    depth -= ndi.distance_transform_edt(~coarse, sampling=size)
    # The first voxel of a block lies half a block before its middle.
    scaled = affine @ np.diag([COARSE, COARSE, COARSE, 1.0])
    scaled[:3, 3] = affine[:3, 3] + affine[:3, :3] @ np.full(3, (COARSE - 1) / 2)
    return depth.astype(np.float32), scaled


def _nucleus(label: Label, place: Array, affine: Array, device: torch.device | str) -> Nucleus:
    """Smooth the voxels of a nucleus to a surface that holds the same volume."""
    size = spacing_of(affine)
    margin = np.ceil(ROOM / size).astype(int)
    inside = np.argwhere(place)
    low = inside.min(0) - margin
    high = inside.max(0) + 1 + margin
    patch = np.zeros(high - low, np.float32)
    patch[tuple((inside - low).T)] = 1
    blurred = ndi.gaussian_filter(patch, 0.8 / size)
    steps = [np.arange(0, n - 1, FINE / s) for n, s in zip(patch.shape, size, strict=True)]
    fine = ndi.map_coordinates(blurred, np.meshgrid(*steps, indexing="ij"), order=1)
    count = round(len(inside) * float(np.prod(size)) / FINE**3)
    threshold = np.partition(fine.ravel(), -count)[-count]
    surface = fine >= threshold
    depth = ndi.distance_transform_edt(surface) - ndi.distance_transform_edt(~surface)
    # Distances between voxel centres on either side of the surface are half a voxel too long.
    depth = ndi.gaussian_filter((depth - 0.5 * np.sign(depth)) * FINE, 0.7)
    centre = affine[:3, :3] @ inside.mean(0) + affine[:3, 3]
    offsets = (inside - inside.mean(0)) @ affine[:3, :3].T
    spread, axes = np.linalg.eigh(np.cov(offsets.T))
    to_patch = np.eye(4)
    to_patch[:3, :3] = np.diag(size / FINE) @ np.linalg.inv(affine[:3, :3])
    to_patch[:3, 3] = (inside.mean(0) - low) * size / FINE
    return Nucleus(
        label,
        centre,
        axes.T[::-1].copy(),
        2 * np.sqrt(spread[::-1]),
        torch.from_numpy(depth.astype(np.float32))[None].to(device),
        to_patch,
        float(np.linalg.norm(offsets, axis=1).max() + size.max()),
    )
