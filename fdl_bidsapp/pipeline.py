"""The steps of one scan as plain functions: read, put on the model's canvas, segment, bring back.

The Nipype interfaces and the toolbox command both are thin shells around these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import nibabel as nib
import numpy as np

from fdl_bidsapp.bids.inputs import Scan, Source
from fdl_bidsapp.errors import DataError, FdlError, ImageError, InputMissingError, ModelError
from fdl_bidsapp.imaging.grid import (
    Box,
    Corner,
    Grid,
    LoadedImage,
    blend,
    box_around,
    canonical,
    canvas_geometry,
    complete,
    conform,
    crop_to,
    foreground,
    load_image,
    middle,
    onto_grid,
    restore,
    same_grid,
    shifted,
    window_around,
    windows,
)
from fdl_bidsapp.imaging.intensity import ROBUST_PERCENTILES, check_units, normalise
from fdl_bidsapp.imaging.measure import (
    confidences,
    contrasts,
    expected_centre,
    guesses,
    label_map,
    largest_components,
)
from fdl_bidsapp.imaging.relaxometry import mean_magnitude, r2star_from_t2star, r2star_loglinear
from fdl_bidsapp.settings import BEST

if TYPE_CHECKING:
    import torch

    from fdl_bidsapp.models.bundle import Bundle
    from fdl_bidsapp.models.fdl import FusionNetwork, ModelSpec

Array = np.ndarray

TARGET_ORDER = ("qsm", "r2star", "imag", "swi")
"""Which contrast is segmented where the choice is left to the program."""

Places = list[list[Array]]
"""For each region of a model, where it may be, in mm."""

LOOKS = 3
"""How often a window is placed at most, first by the locator, then by what it showed."""


@dataclass(frozen=True)
class ScanImages:
    """The contrasts of one scan on the grid of the one that is segmented.

    Attributes
    ----------
    target
        The contrast that is segmented.
    maps
        (X, Y, Z) float32 arrays by contrast; ppm, 1/s, arbitrary.
    affine
        Voxel to scanner coordinates, mm.
    notes
        Conversions, stand-ins, resampling.
    brain_volume
        mm³, from the scan's brain mask; ``None`` without one.
    brain_qsm
        Mean susceptibility over the brain mask where the map is not 0, ppm; ``None`` without both.
    """

    target: str
    maps: dict[str, Array]
    affine: Array
    notes: tuple[str, ...] = ()
    brain_volume: float | None = None
    brain_qsm: float | None = None


@dataclass(frozen=True)
class Canvas:
    """What a model looks at: images over the whole field of view.

    Attributes
    ----------
    target
        The contrast that is segmented.
    maps
        Arrays by contrast, in their units, not normalised: at the model's spacing, or, for a model
        that locates its windows itself, on the scan's own grid in the closest RAS order.
    affine
        Their voxels to scanner coordinates, mm.
    box
        (3, 2) ints: start and stop of the field of view on the canvas.
    starts
        (W, 3) ints: corners of the model's windows on the head, the most promising first; none for
        a model that locates its windows itself.
    reserve
        (V, 3) ints: corners of further windows, with which all of the field of view is covered.
    """

    target: str
    maps: dict[str, Array]
    affine: Array
    box: Array
    starts: Array
    reserve: Array


@dataclass(frozen=True)
class Segmentation:
    """Structures on the native grid.

    Attributes
    ----------
    labels : (X, Y, Z) uint8 array
    probabilities : (K, X, Y, Z) float32 array
    components
        For each abbreviation: components found, voxels dropped with all but the largest.
    contrasts
        For each abbreviation, by how many standard deviations of its surround it differs from it.
    confidence
        For each abbreviation, the Dice to be expected; ``None`` without a calibration for it.
    guessed
        For each abbreviation of a structure that was not kept, why.
    """

    labels: Array
    probabilities: Array
    components: dict[str, tuple[int, int]] = field(default_factory=dict)
    contrasts: dict[str, float | None] = field(default_factory=dict)
    confidence: dict[str, float | None] = field(default_factory=dict)
    guessed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StandardSpace:
    """The label map in a standard space, and the way there.

    Attributes
    ----------
    space
        Name of the space.
    labels : (X, Y, Z) uint8 array
        On the template's grid.
    affine
        Its voxels to the space's coordinates, mm.
    transform
        Composite transform file from the scan to the template.
    image, template : (X, Y, Z) float32 arrays
        What was registered, moved to the template, and the template itself.
    """

    space: str
    labels: Array
    affine: Array
    transform: Path
    image: Array
    template: Array


def choose_target(available: Sequence[str], wanted: str, allowed: Sequence[str]) -> str:
    """Choose the contrast to segment.

    Parameters
    ----------
    available
        Contrasts of the scan.
    wanted
        A contrast; ``auto``, or ``best`` as long as nothing is segmented yet: the first that will
        do.
    allowed
        Contrasts that the model takes as target.

    Raises
    ------
    DataError
        The model does not take the wanted contrast.
    InputMissingError
        The scan has no contrast that will do.

    Examples
    --------
    >>> choose_target(["imag", "r2star"], "auto", ["qsm", "r2star", "imag"])
    'r2star'
    """
    open_choice = wanted in ("auto", BEST)
    if not open_choice and wanted not in allowed:
        raise DataError(
            f"the model does not segment {wanted}", f"choose --target among: {', '.join(allowed)}"
        )
    for contrast in TARGET_ORDER if open_choice else (wanted,):
        if contrast in available and contrast in allowed:
            return contrast
    what = "no contrast that the model segments" if open_choice else f"no {wanted} image"
    found = ", ".join(available) or "nothing"
    raise InputMissingError(
        f"the scan has {what}; it has {found}", "choose another --target or --model"
    )


def read_scan(scan: Scan, target: str, allowed: Sequence[str]) -> ScanImages:
    """Read all contrasts of a scan and bring them to one grid and to known units.

    Parameters
    ----------
    scan
        From :func:`fdl_bidsapp.bids.inputs.find_scans`.
    target
        As for :func:`choose_target`.
    allowed
        Contrasts that the model takes as target.

    Raises
    ------
    FdlError
        The scan's own error, or whatever is wrong with its target. A contrast that is not the
        target and cannot be read is left out with a note; where any may be the target, so is each
        but the last that could be.
    """
    if scan.error is not None:
        raise scan.error
    available = [source.contrast for source in scan.sources]
    first = choose_target(available, target, allowed)
    candidates = [first]
    if target == BEST:
        candidates = [name for name in TARGET_ORDER if name in available and name in allowed]
    notes = list(scan.notes)
    broken: dict[str, FdlError] = {}
    for chosen in candidates:
        try:
            reference = _read_source(_source(scan, chosen), notes)
            _check_contrast(reference, _source(scan, chosen))
            break
        except (ImageError, InputMissingError) as error:
            broken[chosen] = error
    else:
        raise broken[first]
    notes.extend(f"{contrast} was left out: {error}" for contrast, error in broken.items())
    maps = {chosen: np.asarray(reference.dataobj, np.float32)}
    for source in scan.sources:
        if source.contrast == chosen or source.contrast in broken:
            continue
        try:
            image = _read_source(source, notes)
        except (ImageError, InputMissingError) as error:
            notes.append(f"{source.contrast} was left out: {error}")
            continue
        onto = onto_grid(image, reference)
        if onto is None:
            notes.append(
                f"{source.contrast} was left out: its grid differs from that of {chosen} and "
                "the headers do not say how the two lie in the scanner"
            )
            continue
        if onto is not image:
            notes.append(f"{source.contrast} was resampled to the grid of {chosen}")
        maps[source.contrast] = np.asarray(onto.dataobj, np.float32)
    affine = np.asarray(reference.affine, float)
    volume = mean = None
    if scan.brain_mask:
        volume, mean = _brain(scan.brain_mask, maps.get("qsm"), reference, notes)
    return ScanImages(chosen, maps, affine, tuple(notes), volume, mean)


def _source(scan: Scan, contrast: str) -> Source:
    source = scan.get(contrast)
    assert source is not None
    return source


def _check_contrast(image: nib.Nifti1Image, source: Source) -> None:
    """Refuse a target in which nothing can be seen, such as a mask under a map's name."""
    values = np.asarray(image.dataobj)
    values = values[values != 0]
    low, high = np.percentile(values, ROBUST_PERCENTILES) if values.size else (0.0, 0.0)
    if low == high:
        raise ImageError(
            f"the {source.contrast} has no contrast: nearly every value in it is 0 or {low:g}",
            "make the map again",
            path=source.paths[0],
        )


def _read_source(source: Source, notes: list[str]) -> nib.Nifti1Image:
    """Read one contrast, whichever way it comes from its files."""
    loaded = [load_image(path) for path in source.paths]
    for one in loaded:
        notes.extend(one.notes)
    first = loaded[0].image
    if source.derivation in ("echo_mean", "echo_fit"):
        data = _derive_from_echoes(source, loaded)
        words = {"echo_mean": "mean of {} echoes", "echo_fit": "R2* fitted to {} echoes"}
        notes.append(f"{source.contrast} is the " + words[source.derivation].format(len(loaded)))
    else:
        kind = "t2star" if source.derivation == "inverse_t2star" else source.contrast
        data, note = check_units(np.asarray(first.dataobj, np.float32), kind)
        if note:
            notes.append(f"{source.paths[0].name}: {note}")
        if kind == "t2star":
            data = r2star_from_t2star(data)
            notes.append("r2star is the inverse of the T2* map")
    return nib.Nifti1Image(data, first.affine, first.header)


def _derive_from_echoes(source: Source, loaded: Sequence[LoadedImage]) -> Array:
    first = loaded[0].image
    for path, one in zip(source.paths, loaded, strict=True):
        if not same_grid(one.image, first):
            raise ImageError(
                "this echo's shape or affine differs from the first echo's",
                "convert the echoes of one series together",
                path=path,
            )
    magnitude = np.stack([np.asarray(one.image.dataobj, np.float32) for one in loaded], -1)
    if source.derivation == "echo_mean":
        return mean_magnitude(magnitude)
    return r2star_loglinear(magnitude, source.echo_times)


def to_canvas(images: ScanImages, spec: ModelSpec) -> Canvas:
    """Put the contrasts that a model reads on its canvas.

    Parameters
    ----------
    images
        From :func:`read_scan`.
    spec
        The model's specification: grid, method.
    """
    used = list(images.maps) if spec.method == "multimodal" else [images.target]
    native = {
        contrast: nib.Nifti1Image(data, images.affine) for contrast, data in images.maps.items()
    }
    if spec.locator is not None:
        turned = {contrast: canonical(native[contrast]) for contrast in used}
        own = {name: np.asarray(image.dataobj, np.float32) for name, image in turned.items()}
        whole = np.array([(0, n) for n in own[images.target].shape])
        nowhere = np.empty((0, 3), int)
        affine = np.asarray(turned[images.target].affine, float)
        return Canvas(images.target, own, affine, whole, nowhere, nowhere)
    grid = Grid(spec.grid_shape, spec.grid_spacing)
    shape, affine, box = canvas_geometry(native[images.target], grid)
    maps = {contrast: conform(native[contrast], shape, affine) for contrast in used}
    bounds = np.array([(side.start, side.stop) for side in box])
    # The head is seen best in the magnitude.
    outline = "imag" if "imag" in native else images.target
    outlined = maps.get(outline)
    if outlined is None:
        outlined = conform(native[outline], shape, affine)
    starts = windows(foreground(outlined), box, grid)
    everything = np.zeros(shape, bool)
    everything[box] = True
    reserve = [start for start in windows(everything, box, grid) if start not in starts]
    return Canvas(
        images.target,
        maps,
        affine,
        bounds,
        np.array(starts),
        np.array(reserve, int).reshape(-1, 3),
    )


def segment_canvas(
    canvas: Canvas,
    bundle: Bundle,
    network: FusionNetwork,
    device: torch.device,
    *,
    flips: str = "auto",
    places: Places | None = None,
) -> tuple[Array, Array]:
    """Run the network on a canvas.

    A model with a locator looks at one window around each region that it finds; again where the
    structures found show that the window lies badly. Without a region there is nothing of it.

    Without a locator the first window is enough where it holds every structure with room to spare.
    Where it does not, all windows on the head are run and blended; where a structure is missing
    even then, the head may have been taken for something else, and the rest of the field of view is
    searched too.

    Parameters
    ----------
    canvas
        From :func:`to_canvas`.
    bundle, network, device
        The model, built and on its device.
    flips
        Whether to average over left-right mirrored input: ``yes``, ``no``, or ``auto`` for the
        model's own way.
    places
        From :func:`locate_regions`, where that is known already.

    Returns
    -------
    probabilities : (K, X, Y, Z) float32 array, cut down to where there is anything
    affine : (4, 4) array
        Their voxels to scanner coordinates, mm.
    """
    spec = bundle.spec
    both = spec.averages_flips(flips)
    if network.locator is not None:
        if places is None:
            places = locate_regions(canvas, bundle, network, device)
        return _segment_located(canvas, places, bundle, network, device, both)
    grid = Grid(spec.grid_shape, spec.grid_spacing)
    box = cast("Box", tuple(slice(int(a), int(b)) for a, b in canvas.box))
    starts, reserve = (
        [(int(i), int(j), int(k)) for i, j, k in corners]
        for corners in (canvas.starts, canvas.reserve)
    )

    def run(start: Corner) -> Array:
        place = tuple(slice(s, s + n) for s, n in zip(start, grid.shape, strict=True))
        cut = {contrast: data[place] for contrast, data in canvas.maps.items()}
        return _window(cut, canvas.target, bundle, network, device, both)

    first = run(starts[0])
    one = not reserve and len(starts) == 1
    if one or complete(first > 0.5, starts[0], box, grid):
        return crop_to(first, shifted(canvas.affine, starts[0]))

    def each(corners: Sequence[Corner]) -> Iterator[Array]:
        yield first
        yield from (run(start) for start in corners[1:])

    shape = canvas.maps[canvas.target].shape
    blended = blend(each(starts), starts, shape)
    if reserve and not (blended > 0.5).any(axis=(1, 2, 3)).all():
        blended = blend(each(starts + reserve), starts + reserve, shape)
    return crop_to(blended, canvas.affine)


def segment_surest(
    images: ScanImages,
    bundle: Bundle,
    network: FusionNetwork,
    device: torch.device,
    *,
    flips: str = "auto",
) -> tuple[dict[str, float], Array, Array]:
    """Segment every contrast of a scan, and keep the one of which the model expects most.

    Parameters
    ----------
    images
        From :func:`read_scan`.
    bundle, network, device, flips
        As for :func:`segment_canvas`; the model has a calibration.

    Returns
    -------
    expected : contrast → float
        The mean of the structures' expected Dice, 0 for those that are not found; the contrast that
        is kept comes first.
    probabilities : (K, X, Y, Z) float32 array
    affine : (4, 4) array
        As :func:`segment_canvas` returns them, of the contrast that is kept.

    Raises
    ------
    ModelError
        The calibration knows none of the scan's contrasts.
    """
    spec = bundle.spec
    known = spec.calibration.weights if spec.calibration is not None else {}
    expected: dict[str, float] = {}
    # Where the regions are is told by the images of a canvas, whichever of them is segmented.
    places: dict[tuple[str, ...], Places] = {}
    kept = None
    for target in TARGET_ORDER:
        if target not in images.maps or target not in spec.contrasts or target not in known:
            continue
        own = replace(images, target=target)
        canvas = to_canvas(own, spec)
        seen = tuple(canvas.maps)
        if seen not in places:
            places[seen] = locate_regions(canvas, bundle, network, device)
        probabilities, affine = segment_canvas(
            canvas, bundle, network, device, flips=flips, places=places[seen]
        )
        found = to_native(probabilities, affine, own, spec)
        dice = [value for value in found.confidence.values() if value is not None]
        surest = max(expected.values(), default=-1.0)
        expected[target] = float(np.mean(dice)) if dice else 0.0
        if expected[target] > surest:
            kept = probabilities, affine
    if kept is None:
        raise ModelError(
            f"the model {spec.name!r} does not foretell how well it segments "
            f"{', '.join(images.maps)}",
            "name the contrast with --target",
        )
    # Sorting keeps the order of equals, so that the first is the one that was kept.
    ranking = sorted(expected, key=lambda target: -expected[target])
    return {target: expected[target] for target in ranking}, *kept


def _window(
    cut: Mapping[str, Array],
    target: str,
    bundle: Bundle,
    network: FusionNetwork,
    device: torch.device,
    flips: bool,
    region: int = 0,
) -> Array:
    """Return the probabilities of each structure in one window."""
    from fdl_bidsapp.models.inference import predict

    spec = bundle.spec
    images = {}
    for contrast, data in cut.items():
        # A window may hold nothing but the surround of a masked map.
        with suppress(ImageError):
            if contrast in spec.intensity:
                images[contrast] = normalise(data, spec.intensity[contrast])
    if target not in images:
        return np.zeros((len(spec.labels), *spec.grid_shape), np.float32)
    # Low parts differ from region to region: a bank holds one for each.
    bank = {name: lows[region:] for name, lows in bundle.bank.items()}
    return predict(network, spec, images, target, device, flips=flips, bank=bank)


def _segment_located(
    canvas: Canvas,
    places: Places,
    bundle: Bundle,
    network: FusionNetwork,
    device: torch.device,
    flips: bool,
) -> tuple[Array, Array]:
    """Look at one window around each region that the model's locator finds.

    Where that does not lead to all of it, the structures of another region may, whose place in a
    head is known.
    """
    spec = bundle.spec
    grid = Grid(spec.grid_shape, spec.grid_spacing)
    images = {name: nib.Nifti1Image(data, canvas.affine) for name, data in canvas.maps.items()}
    # Windows lie on a canvas at the model's spacing, of which no more than they hold is sampled.
    shape, affine, box = canvas_geometry(images[canvas.target], grid)

    def settled(look: Callable[[Corner], Look], centre: Array) -> Look:
        return _settled(look, window_around(centre, shape, grid), shape, box, grid)

    looks = {
        region: partial(
            _look, images, affine, canvas.target, bundle, network, device, flips, region, positions
        )
        for region, positions in enumerate(spec.windows)
        if positions
    }
    best: dict[int, Look] = {}

    def foretold(region: int) -> Array | None:
        found = [
            (spec.labels[k], centre)
            for other, seen in best.items()
            if other != region
            for k, centre in zip(spec.windows[other], seen.centres, strict=True)
            if centre is not None
        ]
        return expected_centre([spec.labels[k] for k in spec.windows[region]], found, affine)

    for region, look in looks.items():
        for place in places[region]:
            seen = settled(look, np.linalg.solve(affine[:3, :3], place - affine[:3, 3]))
            if region not in best or seen.shown > best[region].shown:
                best[region] = seen
            if seen.shown == len(spec.windows[region]):
                break
    for region, look in looks.items():
        wanted = len(spec.windows[region])
        if region in best and best[region].shown == wanted:
            continue
        centre = foretold(region)
        if centre is None:
            continue
        seen = settled(look, centre)
        # Where the images do not point to, less than everything would be a guess.
        if seen.shown == wanted:
            best[region] = seen
    pieces = [(seen.probabilities, seen.start) for seen in best.values()]
    if not pieces:
        return np.zeros((len(spec.labels), 1, 1, 1), np.float32), affine
    joined, corner = _joined(pieces)
    return crop_to(joined, shifted(affine, corner))


@dataclass(frozen=True)
class Look:
    """One window: its corner, what it gives for each structure, and where it shows those wanted."""

    start: Corner
    probabilities: Array
    found: Array

    @property
    def shown(self) -> int:
        """How many of the structures that are wanted it shows."""
        return int(self.found.any((1, 2, 3)).sum())

    @property
    def centres(self) -> list[Array | None]:
        """Where the middle of each is, in voxels of the canvas."""
        return [np.argwhere(one).mean(0) + self.start if one.any() else None for one in self.found]


def _look(
    images: Mapping[str, nib.Nifti1Image],
    affine: Array,
    target: str,
    bundle: Bundle,
    network: FusionNetwork,
    device: torch.device,
    flips: bool,
    region: int,
    positions: Sequence[int],
    start: Corner,
) -> Look:
    """Segment the structures of one region in one window of a canvas."""
    spec = bundle.spec
    place = shifted(affine, start)
    cut = {name: conform(image, spec.grid_shape, place) for name, image in images.items()}
    window = _window(cut, target, bundle, network, device, flips, region)
    # What a window shows of another region is seen better in that one's own.
    window[[k for k in range(len(spec.labels)) if k not in positions]] = 0
    wanted = [spec.labels[k] for k in positions]
    labelled, _ = largest_components(label_map(window[list(positions)], wanted), wanted)
    return Look(start, window, np.stack([labelled == label.index for label in wanted]))


def _settled(
    look: Callable[[Corner], Look], start: Corner, shape: Sequence[int], box: Box, grid: Grid
) -> Look:
    """Place a window, and again by what it shows; return the last of those that show most."""
    looks: dict[Corner, Look] = {}
    while start not in looks and len(looks) < LOOKS:
        looks[start] = seen = look(start)
        # The structures found say better than the locator where the window belongs.
        centre = middle(np.asarray(seen.found.any(0)))
        if centre is None or complete(seen.found, start, box, grid):
            break
        start = window_around(centre + start, shape, grid)
    most = max(seen.shown for seen in looks.values())
    return [seen for seen in looks.values() if seen.shown == most][-1]


def locate_regions(
    canvas: Canvas, bundle: Bundle, network: FusionNetwork, device: torch.device
) -> Places:
    """Tell where the regions of a model with a locator may be.

    All contrasts of the canvas together say it: they see the same head.

    Parameters
    ----------
    canvas, bundle, network, device
        As for :func:`segment_canvas`.

    Returns
    -------
    list of list of (3,) arrays
        For each region, the most promising place first, in mm; none where the canvas has no
        contrast that the locator knows, or the model has no locator.
    """
    from fdl_bidsapp.models.inference import locate

    spec = bundle.spec
    if network.locator is None or spec.locator is None:
        return []
    coarse = Grid(spec.locator.grid_shape, spec.locator.grid_spacing)
    images = {name: nib.Nifti1Image(data, canvas.affine) for name, data in canvas.maps.items()}
    # The contrasts of a scan are on one grid.
    shape, affine, _ = canvas_geometry(images[canvas.target], coarse)
    seen = []
    for contrast in spec.locator.contrasts:
        # One contrast may be flat and the others good.
        with suppress(ImageError):
            if contrast in images:
                data = conform(images[contrast], shape, affine)
                seen.append(normalise(data, spec.locator.intensity[contrast]))
    if not seen:
        return [[] for _ in spec.locator.labels]
    return [
        [(affine @ [*place, 1])[:3] for place in places]
        for places in locate(network.locator, seen, coarse.spacing, device)
    ]


def _joined(pieces: Sequence[tuple[Array, Corner]]) -> tuple[Array, Corner]:
    """Put windows that hold different structures into the box around them all."""
    low = np.min([start for _, start in pieces], 0)
    high = np.max([np.add(start, window.shape[1:]) for window, start in pieces], 0)
    joined = np.zeros((len(pieces[0][0]), *(high - low)), np.float32)
    for window, start in pieces:
        place = tuple(
            slice(s, s + n) for s, n in zip(np.subtract(start, low), window.shape[1:], strict=True)
        )
        joined[(slice(None), *place)] += window
    i, j, k = (int(n) for n in low)
    return joined, (i, j, k)


def to_native(
    probabilities: Array, affine: Array, images: ScanImages, spec: ModelSpec
) -> Segmentation:
    """Bring probabilities to the scan's own grid, and label it there.

    Structures keep the volume that they have on the network's grid. What is no more than a guess is
    left out.

    Parameters
    ----------
    probabilities, affine
        From :func:`segment_canvas`.
    images
        The scan, with the contrast that was segmented as its target.
    spec
        Of the network: its structures, in the order of the probabilities, and its calibration.
    """
    labels = spec.labels
    target, native_affine = images.maps[images.target], images.affine
    shape = target.shape
    native = restore(probabilities, affine, shape, native_affine)
    mapped = np.zeros(native.shape[1:], np.uint8)
    # A small part of the scan, as a rule.
    box = box_around(np.any(native, axis=0))
    if box is not None:
        there = label_map(probabilities, labels)
        voxels = []
        for label in labels:
            mask = (there == label.index)[None].astype(np.float32)
            # What of it lies in the field of view, in voxels of the scan.
            voxels.append(float(restore(mask, affine, shape, native_affine).sum()))
        mapped[box] = label_map(native[(slice(None), *box)], labels, voxels)
    cleaned, components = largest_components(mapped, labels)
    contrast = contrasts(cleaned, labels, native_affine, target)
    confidence = confidences(
        *(cleaned, native, labels, native_affine, components, contrast),
        *(images.target, spec.calibration),
    )
    guessed = guesses(cleaned, labels, native_affine, confidence)
    for label in labels:
        if label.abbreviation in guessed:
            cleaned[cleaned == label.index] = 0
    return Segmentation(cleaned, native, components, contrast, confidence, guessed)


def to_standard(
    images: ScanImages, segmentation: Segmentation, space: str, folder: Path, seed: int
) -> StandardSpace:
    """Register a scan to a template and take its labels there.

    Parameters
    ----------
    images
        The scan; its mean magnitude is registered, or the target where it has none.
    segmentation
        From :func:`to_native`.
    space
        Name of the standard space.
    folder
        For temporary files and the transform.
    seed
        Of the registration's random sampling.
    """
    from fdl_bidsapp.imaging.registration import register_to_template, template

    moving = nib.Nifti1Image(images.maps.get("imag", images.maps[images.target]), images.affine)
    fixed = template()
    registration = register_to_template(moving, fixed, folder, seed)
    labels = nib.Nifti1Image(segmentation.labels.astype(np.float32), images.affine)
    moved = registration.apply(labels, "genericLabel")
    return StandardSpace(
        space,
        np.rint(np.asarray(moved.dataobj)).astype(np.uint8),
        np.asarray(moved.affine, float),
        registration.forward,
        np.asarray(registration.apply(moving, "linear").dataobj, np.float32),
        np.asarray(fixed.dataobj, np.float32),
    )


def save_images(path: str, images: ScanImages) -> None:
    """Keep a scan's images as an ``.npz`` file."""
    arrays: dict[str, Array] = {f"map_{name}": data for name, data in images.maps.items()}
    brain = [np.nan if v is None else v for v in (images.brain_volume, images.brain_qsm)]
    notes = np.array(images.notes, dtype=np.str_)
    np.savez(
        path,
        allow_pickle=False,
        target=np.str_(images.target),
        affine=images.affine,
        notes=notes,
        brain=brain,
        **arrays,
    )


def load_images(path: str) -> ScanImages:
    """Read what :func:`save_images` kept."""
    with np.load(path, allow_pickle=False) as file:
        volume, mean = (None if np.isnan(v) else float(v) for v in file["brain"])
        return ScanImages(
            str(file["target"]),
            _maps(file),
            file["affine"],
            tuple(str(note) for note in file["notes"]),
            volume,
            mean,
        )


def save_canvas(path: str, canvas: Canvas) -> None:
    """Keep a canvas as an ``.npz`` file."""
    arrays: dict[str, Array] = {f"map_{name}": data for name, data in canvas.maps.items()}
    np.savez(
        path,
        allow_pickle=False,
        target=np.str_(canvas.target),
        affine=canvas.affine,
        box=canvas.box,
        starts=canvas.starts,
        reserve=canvas.reserve,
        **arrays,
    )


def load_canvas(path: str) -> Canvas:
    """Read what :func:`save_canvas` kept."""
    with np.load(path, allow_pickle=False) as file:
        return Canvas(
            str(file["target"]),
            _maps(file),
            file["affine"],
            file["box"],
            file["starts"],
            file["reserve"],
        )


def _maps(file: Mapping[str, Array]) -> dict[str, Array]:
    return {name[4:]: file[name] for name in file if name.startswith("map_")}


def _brain(
    path: Path, qsm: Array | None, reference: nib.Nifti1Image, notes: list[str]
) -> tuple[float | None, float | None]:
    """Return the volume of a brain mask, and the mean of the susceptibility in it."""
    try:
        image = load_image(path).image
    except (ImageError, InputMissingError) as error:
        notes.append(f"the brain volume is not known: {error}")
        return None, None
    voxel = float(abs(np.linalg.det(image.affine[:3, :3])))
    volume = float(np.count_nonzero(np.asarray(image.dataobj) > 0.5)) * voxel
    if qsm is None:
        return volume, None
    onto = onto_grid(image, reference)
    if onto is None:
        notes.append(
            "the mean susceptibility of the brain is not known: the grid of the brain mask "
            "differs and the headers do not say how the two lie in the scanner"
        )
        return volume, None
    inside = qsm[(np.asarray(onto.dataobj) > 0.5) & (qsm != 0)]
    return volume, float(inside.mean(dtype=float)) if inside.size else None
