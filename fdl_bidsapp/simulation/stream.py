"""Fresh draws for training: the region of the nuclei on a model's grid, as tensors on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.settings import CONTRASTS
from fdl_bidsapp.simulation.anatomy import grid_points, sample
from fdl_bidsapp.simulation.labelmaps import HeadMap
from fdl_bidsapp.simulation.parameters import Value, draw_values, generator
from fdl_bidsapp.simulation.simulator import LabelMapScan, reoriented, simulate_label_map

Tensor = torch.Tensor

EDGE = 12.0
"""mm around the region that are simulated with it where maps are made from echoes, as filters of
the field reach so far."""


def draw_batch(
    heads: Sequence[HeadMap],
    seeds: Sequence[Sequence[int] | int],
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    profile: str = "full",
    forced: Mapping[str, Value] | None = None,
    shortcut: float = 0.8,
    jitter: float = 8.0,
) -> tuple[Tensor, Tensor]:
    """Simulate one scan for each seed and cut the region of the nuclei out of it.

    Parameters
    ----------
    heads
        Label maps to draw from, all on one device.
    seeds
        One for each scan of the batch; the same seed gives the same scan.
    shape, spacing
        The model's grid: voxels, and their size in mm.
    profile, forced
        As for :func:`~fdl_bidsapp.simulation.parameters.draw_values`.
    shortcut
        Share of the scans whose maps are made from the tissue instead of echoes.
    jitter
        Largest distance of the region's middle from that of the nuclei along each axis, mm.

    Returns
    -------
    images : (B, 4, X, Y, Z) float32 tensor
        The contrasts in the order of ``CONTRASTS``, in their units; zero beyond the scan.
    labels : (B, X, Y, Z) uint8 tensor
        With the indices of the label table.
    """
    images, labels = [], []
    for seed in seeds:
        rng = generator(seed, "place in the stream")
        head = heads[int(rng.integers(len(heads)))]
        short = bool(rng.random() < shortcut)
        # An edge that moved with the region would tell where its middle is.
        extent = np.array(shape) * spacing + 2 * (jitter + (0 if short else EDGE))
        scan = simulate_label_map(
            head, seed, draw_values(seed, profile, forced), box=extent.tolist(), shortcut=short
        )
        image, label = cut_region(scan, shape, spacing, rng.uniform(-1, 1, 3) * jitter)
        images.append(image)
        labels.append(label)
    return torch.stack(images), torch.stack(labels)


def cut_region(
    scan: LabelMapScan,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    shift: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0),
) -> tuple[Tensor, Tensor]:
    """Resample a scan to a grid along its own axes, which point right, front and up.

    Parameters
    ----------
    scan
        In any orientation.
    shape, spacing
        The grid: voxels, and their size in mm.
    shift
        Where the grid's middle lies, seen from the scan's, mm.

    Returns
    -------
    images : (4, X, Y, Z) float32 tensor
        Linear interpolation; zero beyond the scan.
    labels : (X, Y, Z) uint8 tensor
        Nearest neighbour; zero beyond the scan.
    """
    scan = reoriented(scan, "RAS")
    size = spacing_of(scan.affine)
    native = np.array(scan.labels.shape)
    to_native = np.diag([*(np.array(spacing) / size), 1.0])
    middle = (native - 1) / 2 + np.asarray(shift) / size
    to_native[:3, 3] = middle - to_native[:3, :3] @ ((np.array(shape) - 1) / 2)
    voxels = grid_points(shape, to_native, scan.labels.device)
    last = torch.tensor(native - 1, device=voxels.device).reshape(3, 1, 1, 1)
    held = ((voxels > -0.5) & (voxels < last + 0.5)).all(0)
    images = sample(torch.stack([scan.maps[contrast] for contrast in CONTRASTS]), voxels) * held
    labels = sample(scan.labels[None].float(), voxels, "nearest")[0] * held
    return images, labels.to(torch.uint8)
