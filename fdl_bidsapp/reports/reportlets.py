"""The figures of one scan, as SVG: drawn while its images are at hand, kept beside its masks.

Pictures are PNG inside, outlines are vectors. The outlines go when the figure is shown under the
fragment ``#plain``, so that a page can turn them on and off.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray
from scipy import ndimage

from fdl_bidsapp.imaging.grid import Box, spacing_of
from fdl_bidsapp.labels import Label
from fdl_bidsapp.reports.palette import CONTRASTS, ON_GREY, structure_colours

if TYPE_CHECKING:
    from fdl_bidsapp.pipeline import ScanImages, Segmentation, StandardSpace

Array = NDArray[Any]

PANEL = 128
"""Side of a panel, in the figure's own units."""

GAP = 4
LEAST_PIXELS, MOST_PIXELS = 48, 112
"""Side of a panel's picture: two for each of the smallest voxels in it, within these."""

FIELD_OF_VIEW = 2.5
"""Side of a panel over the largest side of its nucleus."""

SMALLEST_VIEW_MM, LARGEST_VIEW_MM = 18.0, 90.0
SURROUND_MM = 4.0
"""How far from a nucleus its surround reaches."""

OVERVIEW_HEIGHT = 190

_CUTS = (("axial", 2, (0, 1)), ("coronal", 1, (0, 2)), ("sagittal", 0, (1, 2)))
"""Name, the axis that is cut, the axes that are seen from left to right and from below."""

_ENDS = {0: ("L", "R"), 1: ("P", "A"), 2: ("I", "S")}

_STYLE = """\
<style>
text{font:11px sans-serif;fill:#fff;stroke:#000;stroke-width:2.5px;paint-order:stroke}
.outline path{fill:none;stroke-linejoin:round}
#plain:target~.outline{visibility:hidden}
</style>
<g id="plain"/>
"""


@dataclass(frozen=True)
class Figure:
    """A figure of a scan.

    Attributes
    ----------
    desc
        ``overlay``, ``histogram``, ``overview`` or ``registration``.
    label
        Abbreviation of the nucleus; empty where it is about all of them.
    svg
        The content of the file.
    """

    desc: str
    label: str
    svg: str


@dataclass(frozen=True)
class _Volumes:
    """A scan in RAS+ axes."""

    target: str
    maps: Mapping[str, Array]
    labels: Array
    probabilities: Array
    spacing: Array


def draw_scan(
    images: ScanImages,
    segmentation: Segmentation,
    labels: Sequence[Label],
    standard: StandardSpace | None = None,
) -> list[Figure]:
    """Draw all figures of a scan.

    Parameters
    ----------
    images, segmentation
        The scan and its structures, on one grid.
    labels
        The structures, in the order of the probabilities.
    standard
        The scan in a standard space, where one was asked for.

    Returns
    -------
    list of Figure
        An overview; for each nucleus its cuts and histograms; the registration. A nucleus of which
        nothing was found has no histograms, and cuts only where it has some probability.
    """
    volumes = _to_ras(images, segmentation)
    figures = [Figure("overview", "", _overview(volumes, labels))]
    boxes = _boxes(volumes, labels)
    sides = _view_sizes(volumes, labels, boxes)
    for number, label in enumerate(labels):
        box = boxes.get(label.index)
        place = _place(volumes, label, number, box)
        if place is not None:
            svg = _overlay(volumes, labels, number, place, sides[label.structure])
            figures.append(Figure("overlay", label.abbreviation, svg))
        if box is not None:
            histograms = _histograms(volumes, label, box)
            if histograms:
                figures.append(Figure("histogram", label.abbreviation, histograms))
    if standard is not None:
        figures.append(Figure("registration", "", _registration(standard, labels)))
    return figures


def _names(labels: Iterable[Label]) -> list[str]:
    return [label.structure for label in labels]


def _to_ras(images: ScanImages, segmentation: Segmentation) -> _Volumes:
    orientation = io_orientation(images.affine)

    def turn(data: Array) -> Array:
        return np.asarray(apply_orientation(data, orientation))

    shape = images.maps[images.target].shape
    affine = images.affine @ inv_ornt_aff(orientation, shape)
    order = [images.target, *(name for name in CONTRASTS if name != images.target)]
    return _Volumes(
        images.target,
        {name: _finite(turn(images.maps[name])) for name in order if name in images.maps},
        turn(segmentation.labels),
        np.moveaxis(turn(np.moveaxis(segmentation.probabilities, 0, -1)), -1, 0),
        spacing_of(affine),
    )


def _finite(data: Array) -> Array:
    finite = np.isfinite(data)
    return data if finite.all() else np.where(finite, data, np.float32(0))


def _boxes(volumes: _Volumes, labels: Sequence[Label]) -> dict[int, Box]:
    """Return the box around each structure that is there."""
    found = enumerate(ndimage.find_objects(volumes.labels), start=1)
    wanted = {label.index for label in labels}
    return {index: box for index, box in found if box is not None and index in wanted}


def _view_sizes(
    volumes: _Volumes, labels: Sequence[Label], boxes: Mapping[int, Box]
) -> dict[str, float]:
    """Return the side of the panels of each structure in mm, the same left and right."""
    sizes: dict[str, float] = {}
    for label in labels:
        box = boxes.get(label.index)
        extent = 10.0
        if box is not None:
            lengths = [side.stop - side.start for side in box]
            extent = float((np.array(lengths) * volumes.spacing).max())
        size = min(max(FIELD_OF_VIEW * extent, SMALLEST_VIEW_MM), LARGEST_VIEW_MM)
        sizes[label.structure] = max(size, sizes.get(label.structure, 0.0))
    return sizes


def _place(volumes: _Volumes, label: Label, number: int, box: Box | None) -> Array | None:
    """Return the voxel through which a nucleus is cut, where most of it is seen."""
    if box is None:
        probability = volumes.probabilities[number]
        if probability.max() < 0.01:
            return None
        return np.array(np.unravel_index(probability.argmax(), probability.shape))
    mask = volumes.labels[box] == label.index
    return np.array(
        [
            side.start + mask.sum(axis=tuple(other for other in range(3) if other != axis)).argmax()
            for axis, side in enumerate(box)
        ]
    )


def _overlay(
    volumes: _Volumes, labels: Sequence[Label], number: int, place: Array, side: float
) -> str:
    """Draw the cuts through one nucleus in each contrast, and its probability."""
    label = labels[number]
    colours = structure_colours(_names(labels), ON_GREY)
    parts, outlines = [], []
    rows = [*volumes.maps, "probability"]
    views = [_Cut(cut, place, volumes.labels.shape, volumes.spacing, side) for cut in _CUTS]
    paths = [view.outlines(volumes.labels, PANEL / side) for view in views]
    for row, name in enumerate(rows):
        top = row * (PANEL + GAP)
        data = volumes.maps[volumes.target if name == "probability" else name]
        pictures = [view.sample(data) for view in views]
        low, high = _window(volumes.target if name == "probability" else name, pictures)
        for column, (view, picture) in enumerate(zip(views, pictures, strict=True)):
            left = column * (PANEL + GAP)
            grey = _grey(picture, low, high)
            if name == "probability":
                grey = _coloured(grey, view.sample(volumes.probabilities[number], order=1))
            parts.append(_picture(grey, left, top, PANEL, PANEL))
            move = f'transform="translate({left} {top})"'
            clip = f'clip-path="url(#panel)" {move}'
            lines = []
            for other in labels:
                own = other.index == label.index
                path = paths[column].get(other.index)
                if path is None or (name == "probability" and not own):
                    continue
                colour = colours[other.structure]
                width, dash = (1.6, "") if own else (1.0, ' stroke-dasharray="3 2"')
                lines.append(f'<path d="{path}" stroke="#000" stroke-width="{width + 1.4}"/>')
                lines.append(f'<path d="{path}" stroke="{colour}" stroke-width="{width}"{dash}/>')
            outlines.append(f"<g {clip}>{''.join(lines)}</g>")
            parts.append(f"<g {move}>{_marks(view, row == 0)}</g>")
        title = f"{label.name}: probability" if name == "probability" else _caption(name, low, high)
        parts.append(_text(5, top + 14, title))
        if name == "probability":
            parts.append(_key(2 * (PANEL + GAP), top))
        if row == 0:
            parts.append(_scale_bar(side))
    width, height = 3 * PANEL + 2 * GAP, len(rows) * (PANEL + GAP) - GAP
    clip = f'<clipPath id="panel"><rect width="{PANEL}" height="{PANEL}"/></clipPath>'
    about = f"{label.name}: axial, coronal and sagittal cuts"
    return _svg(width, height, about, clip, parts, outlines)


class _Cut:
    """A square piece of a plane through a place."""

    def __init__(
        self,
        cut: tuple[str, int, tuple[int, int]],
        place: Array,
        shape: Sequence[int],
        spacing: Array,
        side: float,
    ) -> None:
        self.name, self.axis, self.seen = cut
        self._slice = int(place[self.axis])
        self._spacing = spacing[list(self.seen)]
        self._middle = place[list(self.seen)].astype(float)
        self._side = side
        pixels = min(max(round(2 * side / self._spacing.min()), LEAST_PIXELS), MOST_PIXELS)
        steps = ((np.arange(pixels) + 0.5) / pixels - 0.5) * side
        across, up = (
            middle + steps / step for middle, step in zip(self._middle, self._spacing, strict=True)
        )
        self._points = np.meshgrid(across, up, indexing="ij")
        first, second = (shape[axis] for axis in self.seen)
        # The part of the plane that is seen, and as much around it as a spline feels.
        self._seen = tuple(
            slice(max(int(points.min()) - 8, 0), max(int(points.max()) + 9, 1))
            for points in (across, up)
        )
        self._offset = np.array([side.start for side in self._seen]).reshape(2, 1, 1)
        self._outside = (
            (self._points[0] < -0.5)
            | (self._points[0] > first - 0.5)
            | (self._points[1] < -0.5)
            | (self._points[1] > second - 0.5)
        )

    def sample(self, volume: Array, order: int = 3) -> Array:
        """Return the picture, first row on top; NaN outside the field of view."""
        plane = np.asarray(_plane(volume, self._slice, self.axis)[self._seen], np.float32)
        points = self._points - self._offset
        picture = ndimage.map_coordinates(plane, points, order=order, mode="nearest")
        return np.where(self._outside, np.nan, picture).T[::-1]

    def outlines(self, labels: Array, scale: float) -> dict[int, str]:
        """Return each structure's outline as the data of an SVG path, in a panel's units."""
        plane = _plane(labels, self._slice, self.axis)[self._seen]
        half, paths = PANEL / 2, {}
        for index, box in enumerate(ndimage.find_objects(plane), start=1):
            if box is None:
                continue
            corner = self._offset.ravel() + [side.start for side in box] - self._middle

            def to_panel(points: Array, corner: Array = corner) -> Array:
                offset = (points + corner) * self._spacing * scale
                return np.column_stack([half + offset[:, 0], half - offset[:, 1]])

            paths[index] = _path(plane[box] == index, to_panel)
        return paths


def _plane(volume: Array, place: int, axis: int) -> Array:
    return np.asarray(volume[(slice(None),) * axis + (place,)])


def _path(plane: Array, to_panel: Any) -> str:
    from contourpy import contour_generator

    if not plane.any():
        return ""
    padded = np.pad(plane.astype(np.float32), 1)
    lines = contour_generator(z=padded.T).lines(0.5)
    pieces = []
    for line in lines:
        points = to_panel(np.asarray(line) - 1)
        pieces.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points[:-1]) + "Z")
    return "".join(pieces)


def _window(contrast: str, pictures: Sequence[Array]) -> tuple[float, float]:
    """Choose black and white, as alike between scans as their values allow."""
    values = np.concatenate([picture[np.isfinite(picture)] for picture in pictures])
    if not values.size:
        return 0.0, 1.0
    if contrast == "qsm":
        top = max(0.2, math.ceil(np.percentile(values, 99.5) * 10) / 10)
        return -top / 2, top
    if contrast == "r2star":
        return 0.0, max(75.0, math.ceil(np.percentile(values, 97) / 25) * 25.0)
    low, high = (float(value) for value in np.percentile(values, (0.5, 97)))
    return (low, high) if high > low else (low, low + 1)


def _caption(contrast: str, low: float, high: float) -> str:
    title, unit = CONTRASTS.get(contrast, (contrast, ""))
    if unit == "a.u.":
        return title
    return f"{title} {_number(low)} to {_number(high)} {unit}"


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _grey(picture: Array, low: float, high: float) -> NDArray[np.uint8]:
    scaled = np.clip((picture - low) / (high - low), 0, 1) * 255
    return np.nan_to_num(scaled, nan=0.0).round().astype(np.uint8)


def _coloured(grey: NDArray[np.uint8], probability: Array) -> NDArray[np.uint8]:
    from matplotlib import colormaps

    shown = np.nan_to_num(probability, nan=0.0)
    colour = colormaps["plasma"](np.clip(shown, 0, 1))[..., :3] * 255
    opacity = np.where(shown < 0.02, 0.0, 0.75)[..., None]
    return (grey[..., None] * (1 - opacity) + colour * opacity).round().astype(np.uint8)


def _key(left: float, top: float) -> str:
    """Draw the colours of probability."""
    from matplotlib import colormaps

    width, height = PANEL - 40, 6
    ramp = colormaps["plasma"](np.linspace(0, 1, 64))[None, :, :3] * 255
    bar = _picture(ramp.astype(np.uint8), left + 20, top + PANEL - 16, width, height)
    y = top + PANEL - 9
    return bar + _text(left + 9, y, "0") + _text(left + 20 + width + 4, y, "1")


def _marks(view: _Cut, named: bool) -> str:
    low, high = _ENDS[view.seen[0]]
    middle = PANEL / 2 + 4
    marks = _text(4, middle, low) + _text(PANEL - 11, middle, high)
    if named:
        marks += _text(PANEL - 5, PANEL - 6, view.name, "end")
    return marks


def _scale_bar(side: float) -> str:
    length = 5 if side < 40 else 10
    width = length * PANEL / side
    y = PANEL - 8
    return (
        f'<path d="M5 {y}h{width:.1f}" stroke="#000" stroke-width="5"/>'
        f'<path d="M6 {y}h{width - 2:.1f}" stroke="#fff" stroke-width="2"/>'
        + _text(5, y - 5, f"{length} mm")
    )


def _overview(volumes: _Volumes, labels: Sequence[Label]) -> str:
    """Draw whole cuts with all outlines: where in the head the masks are."""
    colours = structure_colours(_names(labels), ON_GREY)
    data = volumes.maps[volumes.target]
    views = list(_whole_cuts(volumes, labels))
    pictures = [_plane(data, place, axis) for _, axis, _, place in views]
    low, high = _window(volumes.target, [picture[picture != 0] for picture in pictures])
    parts, outlines = [], []
    left = 0.0
    for (name, axis, seen, place), picture in zip(views, pictures, strict=True):
        across, up = (n * volumes.spacing[k] for n, k in zip(picture.shape, seen, strict=True))
        scale = OVERVIEW_HEIGHT / up
        width = across * scale
        parts.append(_picture(_grey(picture.T[::-1], low, high), left, 0, width, OVERVIEW_HEIGHT))
        steps = volumes.spacing[list(seen)] * scale

        def to_panel(points: Array, left: float = left, steps: Array = steps) -> Array:
            x, y = ((points + 0.5) * steps).T
            return np.column_stack([left + x, OVERVIEW_HEIGHT - y])

        for label in labels:
            path = _path(_plane(volumes.labels, place, axis) == label.index, to_panel)
            if path:
                colour = colours[label.structure]
                outlines.append(f'<path d="{path}" stroke="#000" stroke-width="2.2"/>')
                outlines.append(f'<path d="{path}" stroke="{colour}" stroke-width="1.2"/>')
        start, end = _ENDS[seen[0]]
        parts.append(_text(left + 4, OVERVIEW_HEIGHT / 2, start))
        parts.append(_text(left + width - 11, OVERVIEW_HEIGHT / 2, end))
        parts.append(_text(left + width - 5, OVERVIEW_HEIGHT - 6, name, "end"))
        left += width + GAP
    parts.append(_text(5, 14, _caption(volumes.target, low, high)))
    return _svg(left - GAP, OVERVIEW_HEIGHT, "Whole cuts with all outlines", "", parts, outlines)


def _whole_cuts(
    volumes: _Volumes, labels: Sequence[Label]
) -> Iterator[tuple[str, int, tuple[int, int], int]]:
    """Choose an axial cut for each region that is found, and one of each other direction."""
    found: dict[str, Array] = {}
    for label in labels:
        mask = volumes.labels == label.index
        if mask.any():
            found.setdefault(label.structure, np.zeros(mask.shape, bool))
            found[label.structure] |= mask
    masks = list(found.values()) or [np.ones(volumes.labels.shape, bool)]

    def best(mask: Array, axis: int) -> int:
        if mask.all():
            return mask.shape[axis] // 2
        return int(mask.sum(axis=tuple(k for k in range(3) if k != axis)).argmax())

    name, axis, seen = _CUTS[0]
    levels: list[int] = []
    for mask in masks:
        level = best(mask, axis)
        if all(abs(level - other) * volumes.spacing[axis] > 10 for other in levels):
            levels.append(level)
    yield from ((name, axis, seen, level) for level in levels[:2])
    for name, axis, seen in _CUTS[1:]:
        yield name, axis, seen, best(masks[0], axis)


def _histograms(volumes: _Volumes, label: Label, box: Box) -> str:
    """Draw how QSM and R2* are distributed in a nucleus and around it."""
    place, inside, around = _inside_and_around(volumes, label, box)
    shown = []
    for name in ("qsm", "r2star"):
        if name not in volumes.maps:
            continue
        within, outside = (volumes.maps[name][place][where] for where in (inside, around))
        within, outside = within[within != 0], outside[outside != 0]
        if within.size and outside.size:
            shown.append((name, within, outside))
    if not shown:
        return ""
    width, height = 194, 132
    parts = [
        f'<g transform="translate({k * (width + GAP)} 0)">'
        f"{_histogram(name, within, outside, width, height)}</g>"
        for k, (name, within, outside) in enumerate(shown)
    ]
    about = f"{label.name}: distribution inside and in the surround"
    style = (
        "<style>text{font:11px sans-serif;fill:#222}.axis{stroke:#555;fill:none}"
        ".in{fill:#D55E00;fill-opacity:.35;stroke:#B34700;stroke-width:1.5}"
        ".out{fill:none;stroke:#333;stroke-width:1.5;stroke-dasharray:4 2}</style>"
    )
    total = 2 * width + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" role="img">'
        f"<title>{about}</title>{style}"
        f'<rect width="{total}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _inside_and_around(volumes: _Volumes, label: Label, box: Box) -> tuple[Box, Array, Array]:
    """Return a part of the volume, and what of it is a structure and its surround."""
    reach = np.ceil(SURROUND_MM / volumes.spacing).astype(int) + 1
    i, j, k = (
        slice(max(side.start - by, 0), side.stop + by) for side, by in zip(box, reach, strict=True)
    )
    part = volumes.labels[i, j, k]
    inside = part == label.index
    distance = ndimage.distance_transform_edt(~inside, sampling=volumes.spacing)
    return (i, j, k), inside, (distance <= SURROUND_MM) & (part == 0)


def _histogram(name: str, inside: Array, around: Array, width: float, height: float) -> str:
    low, high = np.percentile(np.concatenate([inside, around]), (0.5, 99.5))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 31)
    counts = [np.histogram(np.clip(values, low, high), edges)[0] for values in (inside, around)]
    shares = [count / max(count.sum(), 1) for count in counts]
    top = max(share.max() for share in shares) * 1.05
    left, right, upper, base = 6.0, width - 6.0, 34.0, height - 34.0

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    def steps(share: Array) -> str:
        points = [f"M{x(edges[0]):.1f} {base:.1f}"]
        for value, start, end in zip(share, edges, edges[1:], strict=False):
            y = base - value / top * (base - upper)
            points.append(f"L{x(start):.1f} {y:.1f}L{x(end):.1f} {y:.1f}")
        return "".join(points) + f"L{x(edges[-1]):.1f} {base:.1f}"

    title, unit = CONTRASTS[name]
    ticks = "".join(
        f'<path class="axis" d="M{x(value):.1f} {base}v4"/>'
        f'<text x="{x(value):.1f}" y="{base + 15}" text-anchor="middle">{_number(value)}</text>'
        for value in nice_ticks(low, high, 4)
    )
    legend = (
        '<rect class="in" x="6" y="18" width="12" height="8"/><text x="22" y="27">inside</text>'
        '<path class="out" d="M68 22h18"/><text x="90" y="27">surround</text>'
    )
    return (
        f'<text x="6" y="12" font-weight="bold">{title}</text>{legend}'
        f'<path class="out" d="{steps(shares[1])}"/><path class="in" d="{steps(shares[0])}"/>'
        f'<path class="axis" d="M{left} {base}H{right}"/>{ticks}'
        f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">{unit}</text>'
    )


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Choose round values for an axis.

    Examples
    --------
    >>> nice_ticks(-0.03, 0.21, 4)
    [0.0, 0.1, 0.2]
    """
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _registration(standard: StandardSpace, labels: Sequence[Label]) -> str:
    """Draw the template and the registered scan in turn, with the outlines of the labels."""
    colours = structure_colours(_names(labels), ON_GREY)
    spacing = spacing_of(standard.affine)
    orientation = io_orientation(standard.affine)
    template, scan, marked = (
        np.asarray(apply_orientation(data, orientation))
        for data in (standard.template, standard.image, standard.labels)
    )
    volumes = _Volumes("template", {"template": template}, marked, marked[None], spacing)
    layers: dict[str, list[str]] = {"template": [], "scan": []}
    parts, outlines = [], []
    left = 0.0
    for name, axis, seen, place in _whole_cuts(volumes, labels):
        across, up = (template.shape[k] * spacing[k] for k in seen)
        scale = OVERVIEW_HEIGHT / up
        width = across * scale
        for layer, volume in (("template", template), ("scan", scan)):
            low, high = np.percentile(volume[template > 0], (0.5, 99.5))
            picture = _grey(_plane(volume, place, axis).T[::-1], low, max(high, low + 1e-6))
            layers[layer].append(_picture(picture, left, 0, width, OVERVIEW_HEIGHT))
        steps = spacing[list(seen)] * scale

        def to_panel(points: Array, left: float = left, steps: Array = steps) -> Array:
            x, y = ((points + 0.5) * steps).T
            return np.column_stack([left + x, OVERVIEW_HEIGHT - y])

        for label in labels:
            path = _path(_plane(marked, place, axis) == label.index, to_panel)
            if path:
                colour = colours[label.structure]
                outlines.append(f'<path d="{path}" stroke="#000" stroke-width="2.6"/>')
                outlines.append(f'<path d="{path}" stroke="{colour}" stroke-width="1.2"/>')
        start, end = _ENDS[seen[0]]
        parts.append(_text(left + 4, OVERVIEW_HEIGHT / 2, start))
        parts.append(_text(left + width - 11, OVERVIEW_HEIGHT / 2, end))
        parts.append(_text(left + width - 5, OVERVIEW_HEIGHT - 6, name, "end"))
        left += width + GAP
    style = (
        "<style>@keyframes turn{0%,49%{opacity:1}50%,100%{opacity:0}}"
        ".scan{animation:turn 2s infinite}"
        "@media(prefers-reduced-motion:reduce){.scan{animation:none}}"
        "#scan:target~.scan{animation:none}#template:target~.scan{animation:none;opacity:0}"
        '</style><g id="scan"/><g id="template"/>'
    )
    pictures = (
        f"<g>{''.join(layers['template'])}{_text(5, 14, 'template')}</g>"
        f'<g class="scan">{"".join(layers["scan"])}{_text(5, 14, "scan")}</g>'
    )
    about = "The template and the registered scan in turn"
    return _svg(left - GAP, OVERVIEW_HEIGHT, about, style, [pictures, *parts], outlines)


def _svg(
    width: float,
    height: float,
    title: str,
    head: str,
    parts: Sequence[str],
    outlines: Sequence[str],
) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'role="img">\n<title>{title}</title>\n{_STYLE}{head}'
        f'<rect width="100%" height="100%" fill="#000"/>\n'
        + "\n".join(part for part in parts if part.startswith(("<image", "<g")))
        + f'\n<g class="outline">{"".join(outlines)}</g>\n'
        + "\n".join(part for part in parts if not part.startswith(("<image", "<g")))
        + "</svg>\n"
    )


def _picture(
    pixels: NDArray[np.uint8], left: float, top: float, width: float, height: float
) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    content = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<image x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{content}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{text}</text>'
