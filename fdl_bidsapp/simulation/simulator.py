"""A scan of a head label map: from its seed and the values of the effects to maps and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import torch

from fdl_bidsapp.physics.forward import average_slices
from fdl_bidsapp.simulation.acquisition import ScanGrid, acquire, field_in_scanner, scan_grid
from fdl_bidsapp.simulation.anatomy import Body, build_body, draw_deformation
from fdl_bidsapp.simulation.labelmaps import HeadMap
from fdl_bidsapp.simulation.maps import shortcut_maps, site_maps
from fdl_bidsapp.simulation.parameters import Values
from fdl_bidsapp.simulation.physiology import draw_properties

Array = np.ndarray
Tensor = torch.Tensor


@dataclass(frozen=True)
class LabelMapScan:
    """A scan of a label map, with its truth; tensors are on the head map's device.

    Attributes
    ----------
    maps
        ``qsm``, ``r2star``, ``imag``, ``swi``; (X, Y, Z) float32 each.
    labels
        (X, Y, Z) uint8: the nuclei, with the indices of the label table.
    susceptibility, r2star
        (X, Y, Z) float32: the true maps, ppm and 1/s.
    depth
        (X, Y, Z) float32: distance from the brain's surface in mm, positive inside.
    signal
        (E, X, Y, Z) complex64; ``None`` where the maps were made by the short cut.
    affine
        Voxel to scanner coordinates, mm.
    values
        The value of each effect.
    """

    maps: dict[str, Tensor]
    labels: Tensor
    susceptibility: Tensor
    r2star: Tensor
    depth: Tensor
    signal: Tensor | None
    affine: Array
    values: Values


def simulate_label_map(
    head: HeadMap,
    seed: Sequence[int] | int,
    values: Values,
    *,
    box: Sequence[float] | None = None,
    shortcut: bool = False,
) -> LabelMapScan:
    """Simulate a scan of a head label map, on the device that the head map is on.

    Parameters
    ----------
    head
        The label map.
    seed
        With the label map and the values, it decides the scan.
    values
        Value of each effect, as :func:`~fdl_bidsapp.simulation.parameters.draw_values` gives them.
    box
        Extent in mm along each axis of a region around the nuclei that is simulated instead of the
        whole brain. The rest of the head still makes its field.
    shortcut
        Whether the maps are made from the tissue, without echoes: fast, for training.

    Returns
    -------
    LabelMapScan
    """
    deformation = draw_deformation(head, seed, values)
    tissues = draw_properties(seed, values)
    grid = scan_grid(head, deformation, seed, values, box)
    body = build_body(head, deformation, tissues, values, seed, grid.fine_shape, grid.fine_affine)
    depth = average_slices(body.depth, grid.parts)
    signal = None
    if shortcut:
        maps = shortcut_maps(body, tissues, grid, seed, values)
    else:
        field = field_in_scanner(head, deformation, tissues, body, grid, values)
        signal = acquire(body, field, tissues, grid, seed, values)
        maps = site_maps(signal, depth, grid, seed, values)
    scan = LabelMapScan(
        maps,
        outlined(body, grid),
        average_slices(body.chi, grid.parts),
        average_slices(body.r2star, grid.parts),
        depth,
        signal,
        grid.affine,
        values,
    )
    return reoriented(scan, str(values["orientation"]))


def outlined(body: Body, grid: ScanGrid) -> Tensor:
    """Return the (X, Y, Z) labels: where a nucleus fills more than half of a voxel.

    Parameters
    ----------
    body
        The head on the finer grid.
    grid
        The scan's grid.
    """
    n = grid.parts
    labels = torch.zeros(grid.shape, dtype=torch.uint8, device=body.chi.device)
    for index, box, share in body.outlines:
        x, y, z = box
        before, after = z.start % n, -z.stop % n
        whole = average_slices(torch.nn.functional.pad(share, (before, after)), n)
        part = labels[x, y, (z.start - before) // n : (z.stop + after) // n]
        part[whole > 0.5] = index
    return labels


def reoriented(scan: LabelMapScan, codes: str) -> LabelMapScan:
    """Store a scan with its voxel axes in other directions, such as ``LPS``.

    Parameters
    ----------
    scan
        With axes in any directions.
    codes
        Directions in which the axes are to point.
    """
    wanted = nib.orientations.axcodes2ornt(tuple(codes))
    change = nib.orientations.ornt_transform(nib.orientations.io_orientation(scan.affine), wanted)
    shape = tuple(scan.labels.shape)
    order = np.argsort(change[:, 0]).astype(int).tolist()
    flipped = [int(change[axis, 0]) for axis in range(3) if change[axis, 1] < 0]

    def turned(data: Tensor) -> Tensor:
        lead = data.ndim - 3
        moved = data.permute(*range(lead), *(lead + axis for axis in order))
        return moved.flip([lead + axis for axis in flipped]).contiguous()

    fields: dict[str, Any] = {
        name: turned(getattr(scan, name))
        for name in ("labels", "susceptibility", "r2star", "depth")
    }
    return LabelMapScan(
        maps={contrast: turned(image) for contrast, image in scan.maps.items()},
        signal=None if scan.signal is None else turned(scan.signal),
        affine=scan.affine @ nib.orientations.inv_ornt_aff(change, shape),
        values=scan.values,
        **fields,
    )
