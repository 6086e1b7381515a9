"""Images and grids: reading, orientation, resampling, the windows a model sees, and the way back.

A scan goes through three grids. The *native* grid is the file's own. The *canvas* is the whole
field of view at the model's spacing, on the image's own axes in their closest RAS order, or on the
scanner's where slices are oblique. A *window* is a piece of the canvas of exactly the model's
shape.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import IOBase
from itertools import product
from os import PathLike
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray
from scipy import ndimage

from fdl_bidsapp.errors import ImageError, InputMissingError

MAX_VOXELS = 5 * 10**8
"""More than any head scan holds (2 GB as float32); a header that claims more is damaged."""

MAX_OFFSET = 10**8
"""Bytes before the voxels; header extensions take up to some megabytes."""

MIN_AXIS = 8
"""Voxels an axis needs at least, to be an image volume."""

VOXEL_SIZES_MM = (0.1, 10.0)
"""Plausible voxel sizes."""

MAX_EXTENT_MM = 600.0
"""No scanner's field of view is wider; at 1 mm a wider one would also fill the memory."""

MIN_FINITE_SHARE = 0.05
"""A head fills far more of a field of view, even where all else is NaN."""

MAX_DEFLATE_RATIO = 1032
"""Deflate cannot compress further, so a larger claim is a file cut short."""

OBLIQUE_DEGREES = 10.0
"""Tilt above which a scan is turned upright; networks learn from heads that are turned as far."""

NUCLEI_EXTENT_MM = 60.0
"""From the top of the red nuclei to the bottom of the dentate nuclei, generously."""

VERTEX_TO_WINDOW_MM = 30.0
"""Midbrain and dentate nuclei lie 70 to 140 mm below the vertex."""

FWHM_PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))

Box = tuple[slice, slice, slice]
Corner = tuple[int, int, int]


@dataclass(frozen=True)
class Grid:
    """The grid a model works on, in RAS axes.

    Attributes
    ----------
    shape
        Voxels on each axis.
    spacing
        Voxel size on each axis, in mm.
    """

    shape: tuple[int, int, int] = (160, 160, 128)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class LoadedImage:
    """An image that passed every check, and what had to be done to it.

    Attributes
    ----------
    image
        float32 data in memory, finite, scaled as the header says.
    notes
        One line for each repair, for the scan's record.
    """

    image: nib.Nifti1Image
    notes: tuple[str, ...] = ()


# Reading


def load_image(path: str | PathLike[str], *, ndim: int = 3) -> LoadedImage:
    """Read a NIfTI file and refuse whatever a segmentation could not trust.

    Parameters
    ----------
    path
        A ``.nii`` or ``.nii.gz`` file; what it is, is decided by its content.
    ndim
        Axes expected: 3, or 4 for echoes in one file. Trailing axes of length 1 are dropped.

    Returns
    -------
    LoadedImage
        The image, float32, and notes on what was repaired.

    Raises
    ------
    InputMissingError
        No such file.
    ImageError
        Not a NIfTI image, damaged, or with a grid or values that cannot be used.

    Notes
    -----
    Maps are often masked with NaN, so values that are not finite become 0, with a note, as long as
    5 % of the voxels are finite.
    """
    path = Path(path)
    if not path.exists():
        hint = "fetch its content, for example with `datalad get`" if path.is_symlink() else ""
        raise InputMissingError("there is no such file", hint or "check the path", path=path)
    if path.is_dir():
        raise ImageError("this is a folder, not an image", "give a NIfTI file", path=path)
    try:
        return _read(path, ndim)
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(
            f"the file is cut short or damaged ({_one_line(error)})",
            "copy or convert it again",
            path=path,
        ) from error
    except (ValueError, TypeError, OverflowError, ImageFileError, HeaderDataError) as error:
        raise ImageError(
            f"the header is damaged ({_one_line(error)})", "convert it again", path=path
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _read(path: Path, ndim: int) -> LoadedImage:
    size = path.stat().st_size
    if size == 0:
        raise ImageError("the file is empty", "copy or convert it again", path=path)
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    with cast("IOBase", gzip.open(path) if compressed else path.open("rb")) as stream:
        start = stream.read(nib.Nifti2Header.sizeof_hdr)
        kind = _nifti_class(start)
        if kind is None:
            raise ImageError("this is not a NIfTI image", "give a NIfTI file", path=path)
        # Without its extensions, which may claim any size and are of no use here.
        header = kind.header_class(start[: kind.header_class.sizeof_hdr])
        shape = _checked_shape(header, path, ndim)
        _check_claim(header, path, size * MAX_DEFLATE_RATIO if compressed else size)
        affine = header.get_best_affine()
        _check_affine(affine, path)
        _check_extent(shape, affine, path)
        data = np.asarray(ArrayProxy(stream, header), dtype=np.float32)
        # Reading on to the end lets gzip compare its checksum.
        stream.read(1)
    notes = []
    if not in_scanner_space(header):
        notes.append(f"{path.name}: the header gives no orientation; left and right are assumed")
    data, repaired = _checked_values(data.reshape(shape), path)
    header.set_data_shape(shape)
    header.set_data_dtype(np.float32)
    return LoadedImage(nib.Nifti1Image(data, affine, header), (*notes, *repaired))


def _nifti_class(start: bytes) -> type[nib.Nifti1Image] | None:
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        header = kind.header_class
        if len(start) >= header.sizeof_hdr and header.may_contain_header(start):
            return kind
    return None


def _checked_shape(header: nib.Nifti1Header, path: Path, ndim: int) -> tuple[int, ...]:
    remedy = "convert it again"
    axes = int(header["dim"][0])
    shape = tuple(int(length) for length in header["dim"][1 : axes + 1])
    if not 1 <= axes <= 7 or min(shape, default=0) < 1:
        raise ImageError(f"the header claims an impossible shape {shape}", remedy, path=path)
    if math.prod(shape) > MAX_VOXELS:
        raise ImageError(f"the header claims an absurd shape {shape}", remedy, path=path)
    dtype = header.get_data_dtype()
    if dtype.fields is not None:
        raise ImageError("the voxels are colours", "give a map of plain numbers", path=path)
    if dtype.kind == "c":
        raise ImageError("the voxels are complex", "split magnitude and phase", path=path)
    kept = shape
    while len(kept) > ndim and kept[-1] == 1:
        kept = kept[:-1]
    if len(kept) != ndim:
        text = " × ".join(map(str, shape))
        raise ImageError(
            f"the image has {len(kept)} axes ({text}) where {ndim} belong",
            f"give a {ndim}-D image",
            path=path,
        )
    if min(kept[:3]) < MIN_AXIS:
        text = " × ".join(map(str, kept))
        raise ImageError(
            f"an axis has fewer than {MIN_AXIS} voxels ({text})", "give a whole volume", path=path
        )
    return kept


def _check_claim(header: nib.Nifti1Header, path: Path, at_most: int) -> None:
    voxels = math.prod(int(length) for length in header.get_data_shape())
    offset = header.get_data_offset()
    if not 0 <= offset <= MAX_OFFSET:
        raise ImageError(
            f"the header claims that the voxels begin at byte {offset}",
            "convert it again",
            path=path,
        )
    claimed = offset + voxels * header.get_data_dtype().itemsize
    if claimed > at_most:
        raise ImageError(
            "the file is cut short: it is too small for the image its header describes",
            "copy or convert it again",
            path=path,
        )


def _check_affine(affine: NDArray[np.float64], path: Path) -> None:
    remedy = "correct the sform or qform of the header"
    if affine is None or not np.isfinite(affine).all():
        raise ImageError("the affine is not finite", remedy, path=path)
    sizes = spacing_of(affine)
    low, high = VOXEL_SIZES_MM
    if sizes.min() == 0:
        raise ImageError("the affine is singular", remedy, path=path)
    if sizes.min() < low or sizes.max() > high:
        text = " × ".join(f"{size:.4g}" for size in sizes)
        raise ImageError(
            f"a voxel size of {text} mm is outside {low:g} to {high:g} mm", remedy, path=path
        )
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < 1e-3:
        raise ImageError("the affine is singular", remedy, path=path)


def _check_extent(shape: Sequence[int], affine: NDArray[np.float64], path: Path) -> None:
    extent = spacing_of(affine) * shape[:3]
    if extent.max() > MAX_EXTENT_MM:
        text = " × ".join(f"{length:.0f}" for length in extent)
        raise ImageError(
            f"a field of view of {text} mm exceeds {MAX_EXTENT_MM:g} mm",
            "correct the voxel size in the header",
            path=path,
        )


def _checked_values(
    data: NDArray[np.float32], path: Path
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    finite = np.isfinite(data)
    share = 1.0 - np.count_nonzero(finite) / data.size
    notes: tuple[str, ...] = ()
    if share > 0:
        if 1.0 - share < MIN_FINITE_SHARE:
            what = "all values are" if share == 1 else f"{share:.0%} of the values are"
            raise ImageError(f"{what} NaN or infinite", "make the map again", path=path)
        notes = (f"{path.name}: {share:.2%} of the voxels, NaN or infinite, were taken as 0",)
        data = np.where(finite, data, np.float32(0))
    if data.min() == data.max():
        raise ImageError(f"every value is {data.flat[0]:g}", "make the map again", path=path)
    return data, notes


# Orientation and resampling


def canonical(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Reorder and flip axes to the closest RAS; no value changes.

    Examples
    --------
    >>> image = nib.Nifti1Image(np.zeros((8, 9, 10), "f4"), np.diag([-1, 1, 1, 1]))
    >>> nib.aff2axcodes(canonical(image).affine)
    ('R', 'A', 'S')
    """
    return nib.as_closest_canonical(image)


def spacing_of(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the voxel size on each axis, in mm.

    Examples
    --------
    >>> spacing_of(np.diag([-1.0, 2.0, 3.0, 1.0])).tolist()
    [1.0, 2.0, 3.0]
    """
    return np.linalg.norm(affine[:3, :3], axis=0)


def same_grid(a: nib.Nifti1Image, b: nib.Nifti1Image, tolerance: float = 1e-3) -> bool:
    """Tell whether two images put every voxel at the same place, within ``tolerance`` mm."""
    if a.shape[:3] != b.shape[:3]:
        return False
    corners = _corners(a.shape[:3])
    return bool(np.abs((a.affine - b.affine) @ corners).max() <= tolerance)


def _corners(shape: Sequence[int]) -> NDArray[np.float64]:
    ends = [(0.0, float(length - 1)) for length in shape]
    return np.array([(*corner, 1.0) for corner in product(*ends)]).T


def middle(inside: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    """Return the middle of the box around what is inside, in voxels; ``None`` without any.

    Examples
    --------
    >>> middle(np.array([[0, 0, 0], [0, 1, 1]]) > 0).tolist()
    [1.0, 1.5]
    """
    places = np.argwhere(inside)
    return (places.min(0) + places.max(0)) / 2 if len(places) else None


def shifted(affine: NDArray[np.float64], corner: Sequence[int]) -> NDArray[np.float64]:
    """Return the affine of a part of an image that begins at a corner.

    Examples
    --------
    >>> shifted(np.diag([2.0, 2, 2, 1]), (1, 0, 3))[:3, 3].tolist()
    [2.0, 0.0, 6.0]
    """
    moved = np.array(affine, float)
    moved[:3, 3] = (affine @ [*corner, 1])[:3]
    return moved


def window_around(centre: NDArray[np.float64], shape: Sequence[int], grid: Grid) -> Corner:
    """Return the corner of the window that lies best around a place on a canvas.

    Parameters
    ----------
    centre : (3,) array
        In voxels of the canvas.
    shape
        Of the canvas, at least the grid's.
    grid
        Of the window, which stays on the canvas.

    Examples
    --------
    >>> window_around(np.array([50.0, 3.0, 20.0]), (99, 99, 40), Grid((20, 20, 40), (1, 1, 1)))
    (40, 0, 0)
    """
    start = np.round(np.asarray(centre) - (np.array(grid.shape) - 1) / 2).astype(int)
    i, j, k = np.clip(start, 0, np.array(shape) - grid.shape)
    return int(i), int(j), int(k)


def canvas_geometry(
    image: nib.Nifti1Image, grid: Grid
) -> tuple[tuple[int, int, int], NDArray[np.float64], Box]:
    """Lay out the canvas: the image's field of view at the model's spacing.

    The canvas keeps the image's own axes in their closest RAS order, is centred on the field of
    view, and is padded alike on both sides to the model's shape at least. A scan that is tilted by
    more than :data:`OBLIQUE_DEGREES` is seen along the scanner's axes instead: heads lie straight
    in scanners, whichever way slices are laid.

    Returns
    -------
    shape : (3,) ints
        Voxels of the canvas.
    affine : (4, 4) array
        Canvas voxel to scanner RAS, in mm.
    box : 3 slices
        The part of the canvas that holds the field of view; all of it on an axis without padding.

    Examples
    --------
    >>> image = nib.Nifti1Image(np.zeros((200, 100, 60), "f4"), np.diag([1, 1, 2, 1]))
    >>> shape, affine, box = canvas_geometry(image, Grid())
    >>> shape, box[1]
    ((200, 160, 128), slice(30, 130, None))
    """
    image = canonical(image)
    sizes = spacing_of(image.affine)
    axes = image.affine[:3, :3] / sizes
    extent = np.asarray(image.shape[:3]) * sizes
    if tilt_degrees(image.affine) > OBLIQUE_DEGREES:
        extent = np.abs(axes) @ extent
        axes = np.eye(3)
    spacing = np.asarray(grid.spacing)
    # A twentieth of a voxel is rounding in the header, not field of view.
    inside = np.ceil(extent / spacing - 0.05).astype(int)
    shape = np.maximum(inside, grid.shape)
    first = (shape - inside) // 2
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    centre = image.affine @ [*(np.asarray(image.shape[:3]) - 1) / 2, 1.0]
    affine[:3, 3] = centre[:3] - affine[:3, :3] @ (first + (inside - 1) / 2)
    box = tuple(
        slice(int(low), int(low + length)) for low, length in zip(first, inside, strict=True)
    )
    return cast("Corner", tuple(int(n) for n in shape)), affine, cast("Box", box)


def tilt_degrees(affine: NDArray[np.float64]) -> float:
    """Return the largest angle between an axis and the scanner's, both in RAS order.

    Examples
    --------
    >>> c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    >>> round(tilt_degrees(np.array([[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]])))
    30
    """
    cosines = np.diag(affine[:3, :3]) / spacing_of(affine)
    return float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))


def conform(
    image: nib.Nifti1Image,
    shape: Sequence[int],
    affine: NDArray[np.float64],
    order: int = 1,
) -> NDArray[np.float32]:
    """Sample an image on another grid, in scanner space; 0 outside its field of view.

    Parameters
    ----------
    image
        3-D image with any orientation and spacing.
    shape, affine
        The grid to sample on.
    order
        1 (linear) for maps, 0 (nearest neighbour) for label maps.

    Returns
    -------
    shape float32 array

    Notes
    -----
    Where the grid is coarser than the image, the image is smoothed first, so that no detail is
    lost between the samples. On each image axis σ = √(r² − 1) / 2.355 voxels, with r the grid's
    step in image voxels: the Gaussian whose full width at half maximum widens the image's voxel to
    the grid's [1]_.

    .. [1] Cardoso MJ et al., Scale factor point spread function matching, MICCAI 2015.
    """
    data = np.asarray(image.dataobj, dtype=np.float32)
    step = np.linalg.inv(image.affine) @ np.asarray(affine)
    if tuple(shape) == data.shape and np.abs((step - np.eye(4)) @ _corners(shape)).max() < 1e-3:
        return data.copy()
    sigma = np.zeros(3)
    if order > 0:
        ratio = np.linalg.norm(step[:3, :3], axis=1)
        # Below 1 % the difference is rounding in the headers.
        sigma = np.where(ratio > 1.01, np.sqrt(np.maximum(ratio**2 - 1, 0)) / FWHM_PER_SIGMA, 0)
    # What lies further from the grid than the smoothing reaches need not be looked at.
    reach = np.ceil(3 * sigma).astype(int) + 2
    places = (step @ _corners(shape))[:3]
    last = np.array(data.shape) - 1
    low = np.clip(np.floor(places.min(1)).astype(int) - reach, 0, last)
    high = np.clip(np.ceil(places.max(1)).astype(int) + reach, low, last)
    near = data[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))]
    if sigma.any():
        near = ndimage.gaussian_filter(near, sigma, mode="nearest", truncate=3.0)
    sampled = ndimage.affine_transform(
        near, step[:3, :3], step[:3, 3] - low, tuple(shape), order=order, mode="nearest",
        prefilter=False,
    )  # fmt: skip
    sampled[~_within(step, shape, data.shape)] = 0
    return sampled


def _within(
    step: NDArray[np.floating], shape: Sequence[int], source: Sequence[int]
) -> NDArray[np.bool_]:
    inside = np.ones(tuple(shape), dtype=bool)
    x, y, z = np.ogrid[tuple(slice(length) for length in shape)]
    for (a, b, c, d), length in zip(step[:3], source, strict=True):
        place = (a * x + b * y + d).astype(np.float32) + (c * z).astype(np.float32)
        inside &= (place > -0.55) & (place < length - 0.45)
    return inside


def resample(
    image: nib.Nifti1Image,
    shape: Sequence[int],
    affine: NDArray[np.float64],
    order: int = 1,
) -> nib.Nifti1Image:
    """Return `conform`'s result as an image.

    Examples
    --------
    >>> fine = nib.Nifti1Image(np.ones((16, 16, 16), "f4"), np.eye(4))
    >>> coarse = resample(fine, (8, 8, 8), np.array(
    ...     [[2, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 2, 0.5], [0, 0, 0, 1]]))
    >>> coarse.shape, float(coarse.dataobj[4, 4, 4])
    ((8, 8, 8), 1.0)
    """
    return nib.Nifti1Image(conform(image, shape, affine, order), affine)


def in_scanner_space(header: nib.Nifti1Header) -> bool:
    """Tell whether a header says how its image lies in the scanner.

    Examples
    --------
    >>> image = nib.Nifti1Image(np.ones((8, 8, 8), "f4"), np.eye(4))
    >>> in_scanner_space(image.header)
    True
    >>> image.set_sform(None, 0)
    >>> in_scanner_space(image.header)
    False
    """
    return bool(header["sform_code"] > 0 or header["qform_code"] > 0)


def onto_grid(image: nib.Nifti1Image, reference: nib.Nifti1Image) -> nib.Nifti1Image | None:
    """Bring an image to another's grid; ``None`` where nothing says how the two lie."""
    if same_grid(image, reference):
        return image
    if not (in_scanner_space(image.header) and in_scanner_space(reference.header)):
        return None
    return resample(image, reference.shape, reference.affine)


# Foreground and windows


def foreground(data: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell the head, or the brain in a masked map, from the air around it.

    Parameters
    ----------
    data : (X, Y, Z) array
        Map or magnitude in RAS axes, any unit.

    Returns
    -------
    (X, Y, Z) bool array
        One connected region without holes; everything where no air can be told apart.

    Notes
    -----
    A signed map whose corners are exactly 0 is masked, and its support is the answer. Elsewhere
    the local strength |x| is split in two by Otsu's threshold [1]_, and air is the class found in
    the corners: the weaker one in magnitudes, the stronger one in a QSM map that was not masked.

    .. [1] Otsu N, IEEE Trans Syst Man Cybern 1979;9:62-66.
    """
    support = data != 0
    if data.min() < 0 and _share_in_corners(support) < 0.05:
        return _solid(support)
    # The square root brings dark tissue closer to bright scalp than to air.
    strength = np.sqrt(ndimage.uniform_filter(np.abs(data), 3, mode="nearest").clip(0))
    top = np.percentile(strength[::2, ::2, ::2], 99.5)
    if top <= 0:
        return np.ones(data.shape, dtype=bool)
    strong = strength > _otsu(strength[::2, ::2, ::2].clip(max=top))
    share = _share_in_corners(strong)
    if 0.3 < share < 0.7:
        return np.ones(data.shape, dtype=bool)
    return _solid(strong if share < 0.5 else ~strong)


def _share_in_corners(mask: NDArray[np.bool_]) -> float:
    """Return the share of a mask in the four columns along z that no head reaches."""
    x, y = (max(1, length // 16) for length in mask.shape[:2])
    ends = [(slice(x), slice(-x, None)), (slice(y), slice(-y, None))]
    return float(np.mean([mask[column].mean() for column in product(*ends)]))


def _otsu(values: NDArray[np.float32]) -> float:
    count, edges = np.histogram(values, bins=256)
    centre = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(count)
    sum_below = np.cumsum(count * centre)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sum_below / below - (sum_below[-1] - sum_below) / above
        between = np.nan_to_num(below * above * gap**2)
    return float(edges[1 + np.argmax(between)])


def _solid(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keep the largest region and fill its holes."""
    opened = ndimage.binary_opening(mask)
    region = _largest(opened if opened.any() else mask)
    return ~_largest(~region, touching_faces=True)


def _largest(mask: NDArray[np.bool_], touching_faces: bool = False) -> NDArray[np.bool_]:
    regions, n = ndimage.label(mask)
    if n == 0:
        return mask
    if touching_faces:
        faces = [regions.take(end, axis) for axis in range(3) for end in (0, -1)]
        keep = np.zeros(n + 1, dtype=bool)
        keep[np.unique(np.concatenate([face.ravel() for face in faces]))] = True
    else:
        size = np.bincount(regions.ravel())
        size[0] = 0
        keep = np.arange(n + 1) == size.argmax()
    keep[0] = False
    return keep[regions]


def windows(
    foreground: NDArray[np.bool_], box: Box, grid: Grid, margin_mm: float = 10.0
) -> list[Corner]:
    """Place windows of the model's shape on the canvas, the most promising one first.

    Parameters
    ----------
    foreground : canvas-shaped bool array
        Head or brain, from `foreground`.
    box
        The field of view on the canvas, from `canvas_geometry`.
    grid
        The model's grid.
    margin_mm
        Distance a nucleus must keep from a window's face, in mm.

    Returns
    -------
    list of (i, j, k)
        Start corners. The first window lies where the midbrain and the cerebellum are expected.
        If it does not do alone, as few as possible follow, evenly spaced, such that any region of
        up to 60 mm within the foreground's bounding box keeps the margin in one of them. Faces at
        the end of the field of view need no margin: there is nothing beyond them.

    Notes
    -----
    The promise needs a model grid longer than 60 mm and two margins; on shorter axes the windows
    lie a quarter of their length apart.

    Examples
    --------
    >>> head = np.zeros((160, 160, 200), bool)
    >>> head[10:150, 10:150, :190] = True
    >>> windows(head, (slice(0, 160), slice(0, 160), slice(0, 200)), Grid())
    [(0, 0, 32), (0, 0, 0), (0, 0, 36), (0, 0, 72)]
    """
    first: list[int] = []
    cover: list[list[int]] = []
    for axis in range(3):
        length, spacing = grid.shape[axis], grid.spacing[axis]
        last = foreground.shape[axis] - length
        others = tuple(other for other in range(3) if other != axis)
        found = np.flatnonzero(foreground.any(axis=others))
        low, high = (
            (int(found[0]), int(found[-1]) + 1) if found.size else (box[axis].start, box[axis].stop)
        )
        if axis < 2:
            guess = (low + high - length) // 2
        elif high < box[axis].stop - round(2 / spacing):
            guess = high - round(VERTEX_TO_WINDOW_MM / spacing) - length
        else:
            # Without air above it, the vertex may lie anywhere outside the field of view.
            guess = last
        guess = min(max(guess, 0), last)
        first.append(guess)
        cover.append(_cover(low, high, length, last, spacing, margin_mm, guess))
    start = cast("Corner", tuple(first))
    rest = [corner for corner in product(*cover) if corner != start]
    return [start, *cast("list[Corner]", rest)]


def _cover(
    low: int, high: int, length: int, last: int, spacing: float, margin_mm: float, guess: int
) -> list[int]:
    """Return the starts on one axis that cover ``low`` to ``high``; only ``guess`` if it does."""
    margin = math.ceil(margin_mm / spacing)
    lowest = min(max(low - margin, 0), last)
    highest = max(min(high + margin - length, last), 0)
    if highest <= guess <= lowest:
        return [guess]
    if highest <= lowest:
        return [lowest]
    step = length - 2 * margin - math.ceil(NUCLEI_EXTENT_MM / spacing)
    if step < 1:
        step = max(length // 4, 1)
    distance = highest - lowest
    n = math.ceil(distance / step)
    return [lowest + i * distance // n for i in range(n + 1)]


def complete(
    found: NDArray[np.bool_], start: Corner, box: Box, grid: Grid, margin_mm: float = 10.0
) -> bool:
    """Tell whether one window holds every structure with its margin.

    Parameters
    ----------
    found : (K, *grid.shape) bool array
        Where the window's segmentation put each structure.
    start
        The window's start corner on the canvas.
    box
        The field of view on the canvas; a window face at or beyond its end needs no margin.

    Examples
    --------
    >>> found = np.zeros((1, 160, 160, 128), bool)
    >>> found[0, 70:90, 70:90, 4:20] = True
    >>> box = slice(0, 160), slice(0, 160), slice(0, 200)
    >>> complete(found, (0, 0, 0), box, Grid())
    True
    >>> complete(found, (0, 0, 40), box, Grid())
    False
    """
    for structure in found:
        for axis in range(3):
            others = tuple(other for other in range(3) if other != axis)
            places = np.flatnonzero(structure.any(axis=others))
            if not places.size:
                return False
            length, margin = grid.shape[axis], math.ceil(margin_mm / grid.spacing[axis])
            open_below = start[axis] > box[axis].start
            open_above = start[axis] + length < box[axis].stop
            if open_below and places[0] < margin:
                return False
            if open_above and places[-1] + 1 > length - margin:
                return False
    return True


def blend(
    window_probabilities: Iterable[NDArray[np.float32]],
    starts: Sequence[Corner],
    canvas_shape: Sequence[int],
) -> NDArray[np.float32]:
    """Put windows back on the canvas, each trusted less towards its faces.

    Parameters
    ----------
    window_probabilities : (K, *grid.shape) arrays
        One for each start; may be a generator, so that one at a time is in memory.
    starts
        Start corners on the canvas.

    Returns
    -------
    (K, *canvas_shape) float32 array
        Mean over the windows, weighted by the product over the axes of the distance to the nearer
        face; 0 where no window lies.

    Examples
    --------
    >>> one = np.full((1, 4, 4, 4), 0.5, "f4")
    >>> float(blend([one, one], [(0, 0, 0), (0, 0, 2)], (4, 4, 6)).min())
    0.5
    """
    total: NDArray[np.float32] | None = None
    weights = np.zeros(tuple(canvas_shape), dtype=np.float32)
    for probabilities, start in zip(window_probabilities, starts, strict=True):
        shape = probabilities.shape[1:]
        x, y, z = (_ramp(length) for length in shape)
        weight = x[:, None, None] * y[:, None] * z
        place = tuple(slice(s, s + length) for s, length in zip(start, shape, strict=True))
        if total is None:
            total = np.zeros((len(probabilities), *canvas_shape), dtype=np.float32)
        total[(slice(None), *place)] += probabilities * weight
        weights[place] += weight
    if total is None:
        raise ValueError("no window to blend")
    return np.divide(total, weights, out=total, where=weights > 0)


def _ramp(length: int) -> NDArray[np.float32]:
    place = np.arange(length) + 0.5
    return (np.minimum(place, length - place) / (length / 2)).astype(np.float32)


# The way back


def crop_to(
    probabilities: NDArray[np.float32],
    affine: NDArray[np.float64],
    threshold: float = 0.01,
    pad: int = 2,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Cut probabilities down to where any of them exceeds ``threshold``, plus ``pad`` voxels.

    Beyond that box of its own each structure's probability is set to 0.

    Returns
    -------
    (K, X, Y, Z) array, (4, 4) affine
        A single voxel where nothing exceeds the threshold.

    Examples
    --------
    >>> probabilities = np.zeros((1, 20, 20, 20), "f4")
    >>> probabilities[0, 10, 10, 10] = 1
    >>> cropped, affine = crop_to(probabilities, np.eye(4))
    >>> cropped.shape, affine[:3, 3].tolist()
    ((1, 5, 5, 5), [8.0, 8.0, 8.0])
    """
    boxes = [box_around(each > threshold, pad) for each in probabilities]
    ends = np.array([[(side.start, side.stop) for side in box] for box in boxes if box is not None])
    if not len(ends):
        ends = np.array([[(0, 1)] * 3])
    low, high = ends[:, :, 0].min(0), ends[:, :, 1].max(0)
    cut = np.zeros((len(probabilities), *(high - low)), probabilities.dtype)
    for box, source, target in zip(boxes, probabilities, cut, strict=True):
        if box is not None:
            place = tuple(slice(s.start - n, s.stop - n) for s, n in zip(box, low, strict=True))
            target[place] = source[box]
    return cut, shifted(affine, low)


def box_around(inside: NDArray[np.bool_], pad: int = 0) -> Box | None:
    """Return the box around what is inside; ``None`` without any.

    Parameters
    ----------
    inside : (X, Y, Z) bool array
    pad
        Voxels by which it is widened, within the array.
    """
    boxes = ndimage.find_objects(inside.view(np.uint8))
    if not boxes:
        return None
    i, j, k = (
        slice(max(side.start - pad, 0), min(side.stop + pad, length))
        for side, length in zip(boxes[0], inside.shape, strict=True)
    )
    return i, j, k


def restore(
    probabilities: NDArray[np.float32],
    affine: NDArray[np.float64],
    shape: Sequence[int],
    target_affine: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Bring probabilities back to a scan's native grid.

    Parameters
    ----------
    probabilities : (K, X, Y, Z) float32 array
        Each structure's probability, 0 outside the array.
    affine : (4, 4) array
        Their voxels to scanner RAS, in mm.
    shape, target_affine
        The native grid.

    Returns
    -------
    (K, *shape) float32 array
        Linear interpolation. Where a native voxel is larger than a source voxel, the mean over the
        native voxel, so that thick slices get their partial volume. Exactly the input where the
        grids coincide.
    """
    restored = np.zeros((len(probabilities), *shape), dtype=np.float32)
    for source, target in zip(probabilities, restored, strict=True):
        box = box_around(source != 0)
        if box is not None:
            own = shifted(affine, [side.start for side in box])
            _restore_one(source[box], np.linalg.inv(own) @ target_affine, target)
    return restored


def _restore_one(
    source: NDArray[np.float32], step: NDArray[np.float64], target: NDArray[np.float32]
) -> None:
    """Sample a volume on a native grid; ``step`` leads from native voxels to the source's."""
    place = _native_box(step, source.shape, target.shape)
    if place is None:
        return
    start = np.array([side.start for side in place])
    length = np.array([side.stop - side.start for side in place])
    parts = np.maximum(np.ceil(spacing_of(step) - 0.05), 1).astype(int)
    # Sub-voxel centres: native = start + (sub + 0.5) / parts - 0.5
    finer = np.diag([*(1.0 / parts), 1.0])
    finer[:3, 3] = start + 0.5 / parts - 0.5
    sub_step = step @ finer
    nearest = np.round(sub_step)
    if np.abs((sub_step - nearest) @ _corners(length * parts)).max() < 1e-3:
        # A whole number of voxels apart: interpolation would only add rounding.
        sub_step = nearest
    sampled = ndimage.affine_transform(
        source,
        sub_step[:3, :3],
        sub_step[:3, 3],
        tuple(length * parts),
        order=1,
        mode="grid-constant",
        prefilter=False,
    )
    blocks = np.stack([length, parts], axis=1).ravel()
    target[place] = sampled.reshape(blocks).mean(axis=(1, 3, 5))


def _native_box(
    step: NDArray[np.floating], source: Sequence[int], shape: Sequence[int]
) -> Box | None:
    """Return the part of the native grid that the source reaches."""
    ends = [(-1.0, float(length)) for length in source]
    corners = np.array([(*corner, 1.0) for corner in product(*ends)]).T
    native = (np.linalg.inv(step) @ corners)[:3]
    # One native voxel more: a voxel whose centre lies outside may still be filled in part.
    low = np.maximum(np.floor(native.min(axis=1)).astype(int) - 1, 0)
    high = np.minimum(np.ceil(native.max(axis=1)).astype(int) + 2, shape)
    if (low >= high).any():
        return None
    return cast("Box", tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)))
