"""Masks from magnitude and its decay: of the brain, of reliable phase, of the ventricles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import scipy.ndimage as ndi

Array = np.ndarray

BRIDGES = (3.5, 5.0, 7.0, 9.0, 12.0, 15.0, 18.0, 21.0)
"""mm: half the width of what may join brain and scalp, face or neck (vessels, nerves, bone that is
not dark at a short echo time); the least that parts them is taken."""

CORNERS = 0.025
"""Share of the volume that the next width may take where nothing is joined any more."""

LARGEST_BRAIN = 1900.0
"""ml; what is larger is brain and scalp in one, unless no bridge parts it."""

LARGEST_HOLE = 5.0
"""ml; dark vessels and nuclei are smaller, and bone is larger."""

MOST_RESIDUAL = 0.6
"""Radians; phase that is noise alone leaves 1.8."""

FLUID_DECAY = 5.0
"""1/s; R2* of cerebrospinal fluid is lower, that of tissue at 1.5 T and above higher."""

CENTRE = 30.0
"""mm around the middle of the brain, where the ventricles are."""

VENTRICLES = 3
"""Largest pieces of fluid there that are taken: both lateral ventricles and the third."""


def brain_mask(magnitude: Array, spacing: Sequence[float]) -> Array:
    """Find the brain in a gradient-echo magnitude image.

    Parameters
    ----------
    magnitude : (X, Y, Z) array
        Magnitude, better of a late echo or of the echoes' mean: there the skull is dark.
    spacing
        Voxel size in mm.

    Returns
    -------
    (X, Y, Z) bool array
        One connected part without holes; empty where nothing stands out.

    Notes
    -----
    The coils' sensitivity is divided out by a wide smoothing within the head; what is bright is
    eroded until the brain is parted from the scalp; the largest part is grown back within the
    bright voxels. It is simpler than a learned mask and knows no anatomy: a mask in the dataset
    is better.
    """
    sizes = np.asarray(spacing, float)
    image = np.asarray(magnitude, np.float32)
    head = image > _otsu(image)
    if not head.any():
        return head
    even = _evened(image, head, sizes)
    bright = even > 0.5 * np.median(even[head])
    bright = _without_small_holes(bright & ndi.binary_dilation(head, iterations=2), sizes)
    depth = ndi.distance_transform_edt(bright, sampling=sizes)
    found = _parted(bright, depth, _bridge(bright, sizes), sizes)
    return ndi.binary_fill_holes(_largest(_closed(found, 3.0, sizes))) if found.any() else found


def _parted(bright: Array, depth: Array, bridge: float, sizes: Array) -> Array:
    """Return the largest part of a mask, of known depth, that only a bridge joins to the rest."""
    core = _largest(depth > bridge)
    if not core.any():
        return core
    reach = ndi.distance_transform_edt(~core, sampling=sizes)
    grown = _largest(bright & (reach <= bridge + float(sizes.max()) / 2))
    return np.asarray(ndi.binary_fill_holes(grown))


def _bridge(bright: Array, sizes: Array) -> float:
    """Choose the width of bridges, on voxels of some 2 mm, which are enough for that."""
    every = np.maximum(1, np.floor(2.0 / sizes).astype(int))
    coarse, sizes = bright[tuple(slice(None, None, n) for n in every)], sizes * every
    depth = ndi.distance_transform_edt(coarse, sampling=sizes)
    volumes = (
        _parted(coarse, depth, bridge, sizes).sum() * np.prod(sizes) / 1000 for bridge in BRIDGES
    )
    flat = None
    for bridge, (volume, after) in zip(BRIDGES, pairwise(volumes), strict=False):
        # What parts the last muscle from the brain takes a lot; after it only corners go.
        if after > (1 - CORNERS) * volume:
            if volume < LARGEST_BRAIN:
                return bridge
            flat = flat or bridge
    return flat or BRIDGES[0]


def _otsu(image: Array) -> float:
    """Threshold that best parts the values into two classes."""
    from skimage.filters import threshold_otsu

    low, high = np.percentile(image, (0.5, 99.5))
    if low == high:
        return float(high)
    # The background is so dark that half the way up to its border with the head is still head.
    return 0.5 * float(threshold_otsu(np.clip(image, low, high)))


def _evened(image: Array, head: Array, sizes: Array) -> Array:
    sigma = 20.0 / sizes
    weight = ndi.gaussian_filter(head.astype(np.float32), sigma, truncate=2.0)
    smooth = ndi.gaussian_filter(np.where(head, image, 0), sigma, truncate=2.0)
    return np.where(weight > 1e-3, image * weight / np.maximum(smooth, 1e-12), 0)


def _without_small_holes(mask: Array, sizes: Array) -> Array:
    """Fill what a vein or a nucleus leaves dark, but not the bone between brain and scalp."""
    holes, _ = ndi.label(ndi.binary_fill_holes(mask) & ~mask)
    small = np.bincount(holes.ravel()) * np.prod(sizes) / 1000 < LARGEST_HOLE
    small[0] = False
    return mask | small[holes]


def _largest(mask: Array) -> Array:
    parts, n = ndi.label(mask)
    if n == 0:
        return np.zeros(mask.shape, bool)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def _closed(mask: Array, radius: float, sizes: Array) -> Array:
    """Close gaps narrower than twice a radius in mm."""
    margin = [int(np.ceil(radius / size)) + 1 for size in sizes]
    padded = np.pad(mask, [(m, m) for m in margin])
    near = ndi.distance_transform_edt(~padded, sampling=sizes) <= radius
    closed = ndi.distance_transform_edt(near, sampling=sizes) > radius
    x, y, z = (slice(m, m + n) for m, n in zip(margin, mask.shape, strict=True))
    return mask | closed[x, y, z]


def reliable_phase(
    mask: Array, late_magnitude: Array, residual: Array | None = None, *, least: float = 0.2
) -> Array:
    """Leave out of a brain mask what lies so near to air that its phase cannot be followed.

    Parameters
    ----------
    mask : (X, Y, Z) bool array
    late_magnitude : (X, Y, Z) array
        Magnitude of the last echo.
    residual : (X, Y, Z) array
        What a field fit left, radians; not looked at by default.
    least
        Share of the mask's median magnitude below which the neighbourhood of a voxel has decayed.

    Returns
    -------
    (X, Y, Z) bool array
        The largest connected part of what is reliable, with its holes filled: a vein inside the
        brain is dark but surrounded by good phase.
    """
    if not mask.any():
        return mask
    around = ndi.uniform_filter(np.asarray(late_magnitude, np.float32), 3)
    reliable = mask & (around > least * np.median(late_magnitude[mask]))
    if residual is not None:
        reliable &= ndi.uniform_filter(residual, 3) < MOST_RESIDUAL
    return ndi.binary_fill_holes(_largest(ndi.binary_opening(reliable))) & mask


def ventricular_fluid(r2star: Array, mask: Array, spacing: Sequence[float]) -> Array:
    """Find cerebrospinal fluid of the ventricles, as a reference of susceptibility.

    Parameters
    ----------
    r2star : (X, Y, Z) array
        1/s.
    mask : (X, Y, Z) bool array
        Where susceptibility is known.
    spacing
        Voxel size in mm.

    Returns
    -------
    (X, Y, Z) bool array
        Fluid in the middle of the mask, without voxels that touch tissue; empty where there is
        none.

    Notes
    -----
    What decays slowly, in the largest pieces near the middle of the brain: the choice of Liu et
    al., Magn. Reson. Med. 79 (2018) 2795-2803.
    """
    sizes = np.asarray(spacing, float)
    if not mask.any():
        return np.zeros(mask.shape, bool)
    middle = ndi.center_of_mass(mask)
    axes = [
        ((np.arange(n) - c) * size) ** 2
        for n, c, size in zip(mask.shape, middle, sizes, strict=True)
    ]
    near = axes[0][:, None, None] + axes[1][:, None] + axes[2] < CENTRE**2
    # One voxel may be noise, and one at the edge is part tissue.
    smooth = ndi.median_filter(np.asarray(r2star, np.float32), 3)
    fluid = ndi.binary_erosion(mask & near & (smooth < FLUID_DECAY))
    pieces, n = ndi.label(fluid)
    counts = np.bincount(pieces.ravel(), minlength=n + 1)
    counts[0] = 0
    largest = np.argsort(counts)[::-1][:VENTRICLES]
    return np.isin(pieces, largest[counts[largest] > 0]) & fluid
