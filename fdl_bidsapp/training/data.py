"""Training data: simulated scans kept decoded on disk, and the windows drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import scipy.ndimage as ndi
import torch

from fdl_bidsapp.imaging.grid import (
    Grid,
    canonical,
    canvas_geometry,
    conform,
    middle,
    spacing_of,
)
from fdl_bidsapp.imaging.intensity import limits, scale
from fdl_bidsapp.models.fdl import CONTRASTS
from fdl_bidsapp.models.fourier import low_part
from fdl_bidsapp.simulation.geometry import smooth_noise
from fdl_bidsapp.simulation.labelmaps import HeadMap
from fdl_bidsapp.simulation.parameters import Value, draw_values
from fdl_bidsapp.simulation.scan import SimulatedScan, draw_protocol, simulate_scan
from fdl_bidsapp.simulation.simulator import simulate_label_map
from fdl_bidsapp.simulation.stream import cut_region, draw_batch
from fdl_bidsapp.simulation.tissue import Person
from fdl_bidsapp.training.augment import random_warp, warp

Array = np.ndarray

HEAD_STEP = 2.0
"""Spacing in mm at which whole heads are kept for a locator."""
HEAD_VOXELS: dict[str, Value] = {
    "in_plane": 1.2,
    "slice_thickness": 2.0,
    "slab": "off",
    "orientation": "RAS",
}
"""Of their scans: nothing finer is seen at a locator's spacing, and it cuts slabs out itself."""
REGION_JITTER = 5.0
"""Largest distance of a kept region's middle from that of the nuclei along each axis, mm."""


def simulate_template(seed: int) -> SimulatedScan:
    """Simulate an ordinary scan of the template's head, of which each seed makes another one.

    Parameters
    ----------
    seed
        Everything about the scan follows from it.
    """
    rng = np.random.default_rng([seed, 1])
    protocol, spacing, angles = draw_protocol(rng)
    return simulate_scan(
        np.random.default_rng([seed, 2]),
        np.random.default_rng([seed, 3]),
        person=Person(age=float(rng.uniform(25, 85)), parkinson=bool(rng.random() < 0.4)),
        protocol=protocol,
        spacing=spacing,
        angles=angles,
        variation=float(rng.uniform(0.9, 1.3)),
        tissue_spread=float(rng.uniform(0.9, 1.3)),
    )


def cache_template(region: Path, head: Path, seed: int, grid: Grid) -> None:
    """Simulate a scan of the template's head; keep its region and its coarse head.

    Parameters
    ----------
    region, head
        The files, laid out as :func:`cache_region` says. Existing ones are kept.
    seed
        As for :func:`simulate_template`.
    grid
        The region's grid.
    """
    if region.exists() and head.exists():
        return
    scan = simulate_template(seed)
    reference = canonical(nib.Nifti1Image(scan.maps["imag"], scan.affine))

    def keep(path: Path, canvas: Grid, around_nuclei: bool) -> None:
        shape, affine, _ = canvas_geometry(reference, canvas)
        if around_nuclei:
            labels = conform(nib.Nifti1Image(scan.labels, scan.affine), shape, affine, 0)
            centre = middle(labels > 0)
            assert centre is not None
            corner = np.round(centre - (np.array(canvas.shape) - 1) / 2)
            affine[:3, 3] = (affine @ [*corner, 1])[:3]
            shape = canvas.shape
        images = [
            conform(nib.Nifti1Image(scan.maps[contrast], scan.affine), shape, affine)
            for contrast in CONTRASTS
        ]
        labels = conform(nib.Nifti1Image(scan.labels, scan.affine), shape, affine, 0)
        _keep(path, np.stack(images), labels)

    keep(region, grid, True)
    keep(head, Grid((8, 8, 8), (HEAD_STEP,) * 3), False)


def cache_region(
    path: Path, head: HeadMap, seed: int, grid: Grid, *, profile: str, shortcut: bool
) -> None:
    """Simulate a scan of a head label map, and keep the region of its nuclei on a model's grid.

    Parameters
    ----------
    path
        The file: a float16 array of shape (C + 1, X, Y, Z), the contrasts in the order of
        ``CONTRASTS``, then the labels. An existing one is kept.
    head
        The label map.
    seed
        With the label map and the profile, it decides the scan.
    grid
        The model's grid.
    profile
        ``ordinary`` or ``full``.
    shortcut
        Whether the maps are made without echoes.
    """
    if path.exists():
        return
    images, labels = draw_batch(
        [head],
        [seed],
        grid.shape,
        grid.spacing,
        profile=profile,
        shortcut=float(shortcut),
        jitter=REGION_JITTER,
    )
    _keep(path, images[0].cpu().numpy(), labels[0].cpu().numpy())


def cache_head(path: Path, head: HeadMap, seed: int) -> None:
    """Simulate a coarse scan of a whole head label map for a locator, and keep it.

    Parameters
    ----------
    path, head, seed
        As for :func:`cache_region`; the spacing is ``HEAD_STEP``.
    """
    if path.exists():
        return
    values = draw_values(seed, "full", HEAD_VOXELS)
    scan = simulate_label_map(head, seed, values, shortcut=True)
    size = np.array(scan.labels.shape) * spacing_of(scan.affine)
    x, y, z = (round(float(n)) for n in size / HEAD_STEP)
    images, labels = cut_region(scan, (x, y, z), (HEAD_STEP,) * 3)
    _keep(path, images.cpu().numpy(), labels.cpu().numpy())


def _keep(path: Path, images: Array, labels: Array) -> None:
    # Float16 holds R2* and the magnitude to 0.1 %, and susceptibility far below its noise.
    stack = np.concatenate([images, labels[None]]).astype(np.float16)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, stack)
    temporary.replace(path)


def cut_block(scan: Array, channels: Sequence[int], low: Array, high: Array) -> Array:
    """Read a box of a cached scan.

    Parameters
    ----------
    scan : (C + 1, X, Y, Z) array
        Contrasts, then labels.
    channels
        Which of them.
    low, high : (3,) int arrays
        The box's first voxel, and the one behind its last; they may lie beyond the scan.

    Returns
    -------
    (len(channels), *(high - low)) float32 array
        Zero beyond the scan.

    Examples
    --------
    >>> cut_block(np.ones((1, 2, 2, 2)), [0], np.array([1, 0, 0]), np.array([3, 1, 1])).ravel()
    array([1., 0.], dtype=float32)
    """
    inside = tuple(
        slice(min(max(a, 0), n), max(min(b, n), 0))
        for a, b, n in zip(low, high, scan.shape[1:], strict=True)
    )
    around = [
        (min(max(-a, 0), b - a), max(b - max(n, a), 0))
        for a, b, n in zip(low, high, scan.shape[1:], strict=True)
    ]
    cut = np.stack([np.asarray(scan[channel][inside], np.float32) for channel in channels])
    return np.pad(cut, [(0, 0), *around])


class SimulatedWindows:
    """Draws varied windows of a model's shape from cached scans, as the app would cut them out.

    Parameters
    ----------
    files
        Cached scans, as :func:`cache_region` writes them.
    intensity
        Normalisation of each contrast, as in a model's specification.
    mirrored
        For each structure, the position of its partner on the other side.
    contrasts
        Contrasts to draw from, with their probabilities.
    regions
        The values of the structures around which the windows lie, region by region.
    severity
        How often and how much windows are degraded, from 0 to 1.
    theta
        For multimodal fusion: the low part of another contrast comes with windows. ``None`` for
        other methods.
    low_share
        How many batches it comes with: each costs a part of a step.
    region_shares
        How often a window lies around each region; alike as a rule.
    astray
        How many windows lie off their region, by up to most of their own size: what a locator
        points at in a field of view without that region.
    cut_off
        How many windows reach beyond the field of view, which ends on a slice in them.
    """

    def __init__(
        self,
        files: Sequence[Path],
        intensity: dict[str, str],
        mirrored: Sequence[int],
        contrasts: dict[str, float],
        regions: Sequence[Sequence[int]],
        severity: float = 1.0,
        theta: float | None = None,
        low_share: float = 1.0,
        region_shares: Sequence[float] | None = None,
        astray: float = 0.0,
        cut_off: float = 0.0,
    ) -> None:
        self.intensity = intensity
        self.contrasts = contrasts
        self.severity = severity
        self.theta = theta
        self.low_share = low_share
        self.region_shares = np.asarray(region_shares or [1.0] * len(regions))
        self.astray = astray
        self.cut_off = cut_off
        self.scans = [np.load(file, mmap_mode="r") for file in files]
        self.swap = torch.tensor([0, *(position + 1 for position in mirrored)])
        truths = (np.asarray(scan[-1], np.uint8) for scan in self.scans)
        self.centres = [[middle(np.isin(truth, region)) for region in regions] for truth in truths]

    def draw(
        self,
        rng: np.random.Generator,
        shape: tuple[int, int, int],
        jitter: Sequence[float],
        batch: int = 1,
    ) -> tuple[torch.Tensor, ...]:
        """Draw windows around the regions.

        Parameters
        ----------
        rng
            Source of randomness.
        shape
            Size of a window in voxels.
        jitter
            Largest distance of a window's centre from its region's, in voxels an axis.
        batch
            How many.

        Returns
        -------
        image : (B, 1, X, Y, Z) float32 tensor, normalised and varied
        classes : (B, X, Y, Z) long tensor
        low : (B, 1, n1, n2, n3) float32 tensor, with ``theta`` only, and not with each batch
        """
        others = int(self.theta is not None and rng.random() < self.low_share)
        drawn = [self._window(rng, shape, jitter, 1 + others) for _ in range(batch)]
        images, classes = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        lows = [low_part(images[:, 1:], self.theta)] if others and self.theta is not None else []
        return images[:, :1], classes, *lows

    def _window(
        self,
        rng: np.random.Generator,
        shape: tuple[int, int, int],
        jitter: Sequence[float],
        n_contrasts: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one window in several contrasts: (1, C, X, Y, Z) images, (1, X, Y, Z) classes."""
        which = int(rng.integers(len(self.scans)))
        names, shares = list(self.contrasts), list(self.contrasts.values())
        target = str(rng.choice(names, p=shares))
        rest = [name for name in names if name != target]
        channels = [
            CONTRASTS.index(name)
            for name in [target, *rng.permutation(rest).tolist()][:n_contrasts]
        ]
        shown = [i for i, each in enumerate(self.centres[which]) if each is not None]
        if shown:
            weights = self.region_shares[shown]
            centre = self.centres[which][int(rng.choice(shown, p=weights / weights.sum()))]
            reach = np.asarray(jitter, float)
            if rng.random() < self.astray:
                reach = np.array(shape) * 0.8
            centre = centre + rng.uniform(-1, 1, 3) * reach
        else:
            centre = rng.uniform(0.3, 0.7, 3) * np.array(self.scans[which].shape[1:])
        images, classes = cut_window(self.scans[which], channels, centre, shape, rng)
        if rng.random() < self.cut_off:
            n = int(rng.integers(1, shape[2]))
            beyond = slice(None, n) if rng.random() < 0.5 else slice(n, None)
            images[..., beyond] = 0
            classes[..., beyond] = 0
        if rng.random() < 0.5:
            images = images.flip(2)
            classes = self.swap[classes.flip(1)]
        varied = [
            self._varied(rng, image.numpy(), CONTRASTS[channel])
            for image, channel in zip(images[0], channels, strict=True)
        ]
        return torch.stack(varied)[None], classes

    def _varied(self, rng: np.random.Generator, image: Array, contrast: str) -> torch.Tensor:
        """Degrade an image, normalise it as the app does and vary its intensities."""
        image = degrade(image, rng, self.severity)
        low, high = limits(image, self.intensity[contrast])
        if not high > low:
            return torch.zeros(image.shape)
        # What else is in the window differs from scan to scan, and with it the percentiles.
        width = high - low
        spread = 0.5 + 0.5 * self.severity
        image = scale(
            image,
            low + width * spread * rng.uniform(-0.08, 0.08),
            high + width * spread * rng.uniform(-0.15, 0.15),
        )
        if rng.random() < 0.5:
            image = image ** np.float32(np.exp(rng.normal(0, 0.3 * spread)))
        if rng.random() < 0.25 * self.severity:
            # A contrast that no site has: the shape has to be learnt, not the order of tissues.
            image = remap(image, rng)
        return torch.from_numpy(np.ascontiguousarray(image, np.float32))


def cut_window(
    scan: Array,
    channels: Sequence[int],
    centre: Array,
    shape: tuple[int, int, int],
    rng: np.random.Generator,
    strength: float = 0.6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a window out of a cached scan, turned, scaled and bent at random.

    Parameters
    ----------
    scan : (C + 1, X, Y, Z) array
        Contrasts, then labels.
    channels
        The contrasts to cut.
    centre : (3,) array
        Where the window's middle lies in the scan, in voxels.
    shape
        Size of the window in voxels.
    rng
        Source of randomness.
    strength
        Of the deformation; with 0 the window is a plain one.

    Returns
    -------
    images : (1, len(channels), X, Y, Z) float32 tensor
        Linear interpolation; zero beyond the scan.
    classes : (1, X, Y, Z) int64 tensor
        Those of the nearest voxel.
    """
    corner = np.asarray(centre) - (np.array(shape) - 1) / 2
    margin = 2 + np.ceil(0.2 * strength * max(shape)).astype(int)
    low = np.floor(corner).astype(int) - margin
    high = low + np.array(shape) + 2 * margin + 1
    block = cut_block(scan, (*channels, -1), low, high)
    x, y, z = (float(each) for each in corner - low)
    places = random_warp(
        rng, shape, (x, y, z), (block.shape[1], block.shape[2], block.shape[3]), strength,
        torch.device("cpu"),
    )  # fmt: skip
    images, labels = torch.from_numpy(block[:-1])[None], torch.from_numpy(block[-1])[None]
    return warp(images, labels, places)


def remap(image: Array, rng: np.random.Generator, knots: int = 8) -> Array:
    """Send the intensities of a normalised image through a random curve.

    Parameters
    ----------
    image : array
        In [0, 1].
    rng
        Source of randomness.
    knots
        Points of the curve, which is straight between them.

    Returns
    -------
    float32 array of the same shape
        In [0, 1].

    Examples
    --------
    >>> mapped = remap(np.array([0.2, 0.2, 0.9]), np.random.default_rng(0))
    >>> bool(mapped[0] == mapped[1] != mapped[2])
    True
    """
    values = rng.uniform(size=knots)
    values = (values - values.min()) / np.ptp(values)
    return np.interp(image, np.linspace(0, 1, knots), values).astype(np.float32)


def degrade(image: Array, rng: np.random.Generator, severity: float = 1.0) -> Array:
    """Blur, coarsen, shade and add noise to an image, each at random.

    Parameters
    ----------
    image : (X, Y, Z) float32 array
        Any unit.
    rng
        Source of randomness.
    severity
        From 0 (nothing is done) to 1.

    Returns
    -------
    (X, Y, Z) float32 array
    """
    spread = float(image.std()) + 1e-12
    if rng.random() < 0.25 * severity:
        image = ndi.gaussian_filter(image, rng.uniform(0.3, 1.0))
    if rng.random() < 0.2 * severity:
        axis, factor = int(rng.integers(3)), rng.uniform(1.3, 2.8)
        n = image.shape[axis]
        image = ndi.gaussian_filter1d(image, factor / 2.355, axis=axis)
        positions = np.clip(np.round(np.arange(n) / factor) * factor, 0, n - 1).astype(int)
        image = np.take(image, positions, axis=axis)
    if rng.random() < 0.3 * severity:
        shade = smooth_noise(rng, image.shape, (1, 1, 1), rng.uniform(40, 90))
        image = image * np.exp(np.float32(rng.uniform(0, 0.35)) * shade)
    if rng.random() < 0.4 * severity:
        noise = rng.standard_normal(image.shape, np.float32)
        image = image + np.float32(spread * severity * rng.uniform(0, 0.25)) * noise
    return image.astype(np.float32)
