"""Training a locator: coarse fields of view, and the balls around the nuclei that it looks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from fdl_bidsapp.imaging.grid import Grid, canonical, canvas_geometry, conform, middle
from fdl_bidsapp.imaging.intensity import limits, scale
from fdl_bidsapp.labels import may_flip
from fdl_bidsapp.models.fdl import CONTRASTS, FusionNetwork, ModelSpec
from fdl_bidsapp.simulation.geometry import rotation
from fdl_bidsapp.training.cases import LabelledScan, read_case
from fdl_bidsapp.training.data import HEAD_STEP, cut_block, degrade, remap
from fdl_bidsapp.training.loop import Schedule, Trained, train
from fdl_bidsapp.training.losses import dice_cross_entropy_loss

Array = np.ndarray

RADIUS_MM = 16.0
"""Of the balls, which hold the nuclei of a midbrain or cerebellum."""

BALL_WEIGHT = 2.0
"""Of the balls' voxels in the cross-entropy: more of it blurs them, and their middle is wanted."""


TURNED_DEGREES, OBLIQUE_DEGREES = 7.0, 18.0
"""Standard deviations of a field of view's turn about each axis: of heads, and of oblique slices.
A locator that sees few of those learns to look for one region straight below the other."""


@dataclass(frozen=True)
class Head:
    """A field of view at a locator's spacing.

    Attributes
    ----------
    images : contrast → (X, Y, Z) float32 array
        Not normalised.
    regions : (X, Y, Z) float32 array
        The number of the region from 1 in the ball around its nuclei, else 0.
    """

    images: Mapping[str, Array]
    regions: Array


def cached_head(
    path: Path, regions: Sequence[Sequence[int]], *, step: int = 2, radius: float = RADIUS_MM
) -> Head:
    """Read a head that :func:`fdl_bidsapp.training.data.cache_head` wrote.

    Parameters
    ----------
    path
        The file.
    regions
        The values of the structures of each region.
    step
        Voxels of the file to one of the head's, an axis.
    radius
        Of the balls, mm.
    """
    scan = np.load(path, mmap_mode="r")
    images = [_pooled(np.asarray(each, np.float32), step) for each in scan[:-1]]
    labels = np.asarray(scan[-1])
    centres = [middle(np.isin(labels, region)) for region in regions]
    coarse = [None if c is None else (c + 0.5) / step - 0.5 for c in centres]
    balls = _balls(images[0].shape, coarse, np.full(3, step * HEAD_STEP), radius)
    return Head(dict(zip(CONTRASTS, images, strict=True)), balls)


def labelled_head(labelled: LabelledScan, spec: ModelSpec) -> Head:
    """Read a labelled scan as the locator of a model sees it.

    Parameters
    ----------
    labelled
        The scan.
    spec
        The model, which has a locator.

    Raises
    ------
    FdlError
        See :func:`fdl_bidsapp.training.cases.read_case`.
    """
    locator = spec.locator
    assert locator is not None
    read, labels = read_case(labelled, spec.contrasts, locator.contrasts)
    native = {
        name: nib.Nifti1Image(data, read.affine)
        for name, data in read.maps.items()
        if name in locator.contrasts
    }
    # Its windows are found on the canvas of the contrast that is segmented.
    grid = Grid(locator.grid_shape, locator.grid_spacing)
    shape, affine, _ = canvas_geometry(canonical(native[read.target]), grid)
    to_voxel = np.linalg.inv(affine) @ read.affine
    centres = []
    for positions in spec.windows:
        centre = middle(np.isin(labels, [spec.labels[k].index for k in positions]))
        centres.append(None if centre is None else (to_voxel @ [*centre, 1])[:3])
    images = {name: conform(image, shape, affine) for name, image in native.items()}
    return Head(images, _balls(shape, centres, np.asarray(grid.spacing), RADIUS_MM))


class FieldsOfView:
    """Draws varied fields of view of heads, with the regions of their nuclei.

    Parameters
    ----------
    heads
        Of the locator's spacing.
    intensity
        Normalisation of each contrast, as in a model's specification.
    contrasts
        How often each is drawn, of those that a head has.
    least
        Size to which smaller fields of view are padded: the locator's grid.
    severity
        How often and how much they are degraded, from 0 to 1.
    flips
        Whether half of them are mirrored: not where a structure has one side only.
    oblique
        Which share of those that are turned is turned as far as oblique slices are.
    """

    def __init__(
        self,
        heads: Sequence[Head],
        intensity: Mapping[str, str],
        contrasts: Mapping[str, float],
        least: Sequence[int],
        *,
        severity: float = 0.7,
        flips: bool = True,
        oblique: float = 0.0,
    ) -> None:
        self.intensity = intensity
        self.least = tuple(least)
        self.severity = severity
        self.flips = flips
        self.oblique = oblique
        self.heads = []
        for head in heads:
            shares = {name: contrasts[name] for name in contrasts if name in head.images}
            stack = np.stack([*(head.images[name] for name in shares), head.regions])
            chances = np.array(list(shares.values()))
            self.heads.append((stack, list(shares), chances / chances.sum()))

    def draw(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a field of view: all of the head, a slab, with or without the nuclei.

        Returns
        -------
        image : (1, 1, X, Y, Z) float32 tensor, normalised and varied
        classes : (1, X, Y, Z) long tensor, the number of the region from 1
        """
        scan, names, chances = self.heads[int(rng.integers(len(self.heads)))]
        contrast = str(rng.choice(names, p=chances))
        whole = np.array(scan.shape[1:])
        shares = np.where(rng.random(3) < 0.5, rng.uniform(0.55, 1, 3), rng.uniform(0.9, 1.15, 3))
        if rng.random() < 0.35:
            # A slab, which may end above, below or in the nuclei.
            shares[2] = rng.uniform(0.15, 0.6)
        a, b, c = (max(4, round(float(n))) for n in whole * shares)
        room = np.abs(whole - (a, b, c)) / 2
        centre = (whole - 1) / 2 + rng.uniform(-1, 1, 3) * room
        linear = np.eye(3)
        if rng.random() < 0.6:
            spread = OBLIQUE_DEGREES if rng.random() < self.oblique else TURNED_DEGREES
            linear = rotation(rng.normal(0, spread, 3)) @ np.diag(np.exp(rng.normal(0, 0.1, 3)))
        (image,), region = cut_patch(scan, [names.index(contrast)], centre, linear, (a, b, c))
        lacking = [max(0, n - m) for n, m in zip(self.least, (a, b, c), strict=True)]
        around = [(n // 2, n - n // 2) for n in lacking]
        image, region = np.pad(image, around), np.pad(region, around)
        if self.flips and rng.random() < 0.5:
            image, region = image[::-1], region[::-1]
        image = degrade(np.ascontiguousarray(image), rng, self.severity)
        if float(np.ptp(image)) > 0:
            image = scale(image, *limits(image, self.intensity[contrast]))
        if rng.random() < 0.5:
            image = image ** np.float32(np.exp(rng.normal(0, 0.3)))
        if rng.random() < 0.2 * self.severity:
            image = remap(image, rng)
        return (
            torch.from_numpy(np.ascontiguousarray(image, np.float32))[None, None],
            torch.from_numpy(np.ascontiguousarray(region).astype(np.int64))[None],
        )


def train_locator(
    network: FusionNetwork,
    spec: ModelSpec,
    heads: Sequence[Head],
    schedule: Schedule,
    folder: Path,
    device: torch.device,
    *,
    configuration: Mapping[str, Any],
    seed: int = 0,
) -> Trained:
    """Train a model's locator on where the nuclei of labelled scans lie.

    Parameters
    ----------
    network
        The locator; its weights are changed.
    spec
        The model.
    heads
        From :func:`labelled_head`.
    schedule, folder, device, configuration
        As for :func:`fdl_bidsapp.training.loop.train`.
    seed
        Of the fields of view.
    """
    assert spec.locator is not None
    views = FieldsOfView(
        heads,
        spec.locator.intensity,
        dict.fromkeys(spec.locator.contrasts, 1.0),
        spec.locator.grid_shape,
        flips=may_flip(spec.labels),
    )

    def draw(step: int, _: float) -> tuple[torch.Tensor, ...]:
        return views.draw(np.random.default_rng([seed, 3, step]))

    def loss(outputs: list[torch.Tensor], classes: torch.Tensor) -> torch.Tensor:
        return dice_cross_entropy_loss(outputs[0], classes, BALL_WEIGHT)

    return train(network, draw, loss, schedule, folder, device, configuration=configuration)


def _pooled(volume: Array, step: int) -> Array:
    return F.avg_pool3d(torch.from_numpy(volume)[None, None], step, ceil_mode=True)[0, 0].numpy()


def _balls(
    shape: Sequence[int], centres: Sequence[Array | None], spacing: Array, radius: float
) -> Array:
    """Number the voxels within a radius in mm of each centre in voxels."""
    regions = np.zeros(shape, np.float32)
    x, y, z = np.ogrid[tuple(slice(n) for n in shape)]
    for value, centre in enumerate(centres, start=1):
        if centre is not None:
            i, j, k = centre
            a, b, c = spacing
            distance = ((x - i) * a) ** 2 + ((y - j) * b) ** 2 + ((z - k) * c) ** 2
            regions[distance <= radius**2] = value
    return regions


def cut_patch(
    scan: Array,
    channels: Sequence[int],
    centre: Array,
    linear: Array,
    shape: tuple[int, int, int],
) -> tuple[Array, Array]:
    """Resample a patch of a cached scan and its labels.

    Parameters
    ----------
    scan : (C + 1, X, Y, Z) array
        Contrasts, then labels.
    channels
        The contrasts to cut.
    centre : (3,) array
        Where the patch's centre lies in the scan, in voxels.
    linear : (3, 3) array
        From steps in the patch to steps in the scan.
    shape
        Size of the patch in voxels.

    Returns
    -------
    images : (len(channels), X, Y, Z) float32 array
        Linear interpolation; zero beyond the scan.
    labels : shape uint8 array
        Nearest neighbour.
    """
    half = (np.array(shape) - 1) / 2
    corners = np.stack(np.meshgrid(*[(-h, h) for h in half], indexing="ij"), -1).reshape(-1, 3)
    reach = np.abs(corners @ linear.T).max(0) + 1
    low = np.floor(centre - reach).astype(int)
    high = np.ceil(centre + reach).astype(int) + 1
    block = cut_block(scan, (*channels, -1), low, high)
    theta = _grid_sample_matrix(linear, half, centre - low, block.shape[1:])
    stack = torch.from_numpy(block)[None]
    grid = F.affine_grid(theta, [1, 1, *shape], align_corners=True)
    moved = F.grid_sample(stack[:, :-1], grid, "bilinear", "zeros", align_corners=True)
    classes = F.grid_sample(stack[:, -1:], grid, "nearest", "zeros", align_corners=True)
    return moved[0].numpy(), classes[0, 0].numpy().astype(np.uint8)


def _grid_sample_matrix(
    linear: Array, half: Array, centre: Array, block: Sequence[int]
) -> torch.Tensor:
    """Write ``linear · (i - half) + centre`` in the normalised, reversed axes of torch."""
    to_unit = 2 / (np.array(block) - 1)
    matrix = np.zeros((3, 4))
    matrix[:, :3] = to_unit[:, None] * linear * half[None, :]
    matrix[:, 3] = to_unit * centre - 1
    matrix[:, :3] = matrix[::-1, 2::-1]
    matrix[:, 3] = matrix[::-1, 3]
    return torch.from_numpy(matrix.astype(np.float32))[None]
