"""From probabilities to labels, and from labels to the rows of a scan's table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from fdl_bidsapp.imaging.confidence import Calibration, describe
from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.labels import Label

Row = dict[str, float | int | str | None]

NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)
"""26-connectivity: voxels that share a corner belong together."""

SURROUND_MM = (1.0, 4.0)
"""Between which distances from a structure its surround lies: clear of the partial volume at its
border, and near enough to be the same tissue."""

SOFT_REACH = 3
"""Voxels around a structure within which its probability counts to the soft volume."""

FRAGMENTED_ABOVE = 0.1
"""Share of a structure's voxels that are dropped by :func:`largest_components`."""

LOW_PROBABILITY_BELOW = 0.6
"""Mean probability over the mask; a voxel enters the mask at 0.5 where two classes compete."""

PLAUSIBLE_VOLUME_MM3 = {
    "red_nucleus": (80.0, 600.0),
    "dentate_nucleus": (200.0, 2500.0),
    "substantia_nigra": (100.0, 1200.0),
    "subthalamic_nucleus": (30.0, 350.0),
}
"""Each side. About a third to three times the means of adult MRI and histology."""

GUESS_BELOW = 0.3
"""Expected Dice below which what was found is a guess, and not kept."""

GUESS_ALONE_BELOW = 0.5
"""The same where nothing else of the scan was found: nuclei come together."""

PLACES_MM = {
    "red_nucleus": (5.0, 0.0, 0.0),
    "substantia_nigra": (10.0, 2.0, -3.0),
    "subthalamic_nucleus": (12.0, 6.0, 2.0),
    "dentate_nucleus": (14.0, -30.0, -27.0),
}
"""To the side, the front and above, from the middle between the red nuclei of a straight head:
rounded means of twenty head label maps whose nuclei are those of the CIT168 atlas (Pauli et al.,
Sci. Data 5 (2018) 180063) and, the dentate ones, of the Allen Human Reference Atlas."""

STRAY_MM = 30.0
"""How far a structure may be from where the others place it: more than a head tilted by a third of
a right angle, or one that is large, moves it."""

UPRIGHT_MM = 8.0
"""Length of the three axes that speak for a straight head, beside the centres that were found: so
long that heads turned by some 10°, with centres that are 2 mm off, weigh alike."""

MAPS = {"qsm": ("Magnetic susceptibility", "ppm"), "r2star": ("R2*", "1/s")}

STATISTICS = {
    "mean": "mean",
    "median": "median",
    "std": "standard deviation (of all the structure's voxels, ddof 0)",
    "p05": "5th percentile",
    "p95": "95th percentile",
}


def _columns() -> dict[str, dict[str, Any]]:
    columns: dict[str, dict[str, Any]] = {
        "index": {"Description": "Value in the label map"},
        "name": {"Description": "Name of the structure with its side"},
        "abbreviation": {"Description": "Value of the label entity in the mask's file name"},
        "structure": {"Description": "Name of the structure without its side"},
        "hemisphere": {"Description": "Side of the body", "Levels": {"L": "left", "R": "right"}},
        "volume": {
            "Description": "Number of voxels times the voxel volume; n/a where nothing was found, "
            "lest it be averaged as a volume of 0",
            "Units": "mm^3",
        },
        "n_voxels": {"Description": "Number of voxels of the mask"},
        "volume_soft": {
            "Description": "Sum of the structure's probability times the voxel volume, within "
            f"{SOFT_REACH} voxels of the mask; n/a where nothing was found",
            "Units": "mm^3",
        },
    }
    for key, (quantity, unit) in MAPS.items():
        for statistic, words in STATISTICS.items():
            columns[f"{key}_{statistic}"] = {
                "Description": f"{quantity}: {words}, over the structure's voxels where the map "
                "is not 0",
                "Units": unit,
            }
    columns["confidence"] = {
        "Description": "Dice with the true structure that is to be expected, 0 to 1, from the "
        "probabilities and the shape of what was found; 0 where nothing was found, n/a where the "
        "model has no calibration for it"
    }
    columns["qc_n_components"] = {
        "Description": "Number of connected components (26 neighbours) before all but the "
        "largest were dropped"
    }
    columns["qc_mean_probability"] = {
        "Description": "Mean of the structure's probability over its voxels"
    }
    columns["qc_contrast"] = {
        "Description": "By how many standard deviations of its surround (what lies {:g} to {:g} mm "
        "around it) the structure's mean differs from that of the surround, in the contrast that "
        "was segmented; below 1, there is little to see of it".format(*SURROUND_MM)
    }
    columns["qc_touches_fov"] = {
        "Description": "Whether the structure touches the end of the field of view",
        "Levels": {"0": "no", "1": "yes"},
    }
    columns["qc_flag"] = {
        "Description": "ok, or the reasons to look at this segmentation, joined by semicolons",
        "Levels": {
            "ok": "nothing conspicuous",
            "empty": "no voxel was found, or what was found was not kept, for the reason that "
            "follows",
            "touches_fov": "the structure may be cut off",
            "fragmented": f"more than {FRAGMENTED_ABOVE:.0%} of its voxels lay apart from "
            "the mask and were dropped",
            "low_probability": f"mean probability below {LOW_PROBABILITY_BELOW}",
            "low_confidence": "confidence below the threshold of the model's calibration; not "
            f"kept below {GUESS_BELOW}",
            "implausible_position": f"further than {STRAY_MM:g} mm from where most of the other "
            "structures place it; not kept",
            "implausible_volume": "volume outside the range of adult anatomy",
        },
    }
    return columns


COLUMNS = _columns()
"""The columns of a scan's table, in order, with their BIDS description."""


def label_map(
    probabilities: NDArray[np.float32],
    labels: Sequence[Label],
    voxels: Sequence[float] | None = None,
) -> NDArray[np.uint8]:
    """Give each voxel its most probable structure, or background.

    Parameters
    ----------
    probabilities : (K, X, Y, Z) float array
        One structure each, without background, which is the rest to 1.
    labels : K labels
        In the order of the first axis.
    voxels
        How many voxels each structure is known to have. Its probabilities are then multiplied by a
        factor, from a half to two, with which it has as many, but for those that several
        structures ask for. Interpolation makes round structures smaller: it takes more
        probability out of them at their border than it leaves there.

    Returns
    -------
    (X, Y, Z) uint8 array
        Label indices; 0 is background, also in a tie with it.

    Raises
    ------
    ValueError
        There are not as many labels as structures.

    Examples
    --------
    >>> from fdl_bidsapp.labels import nuclei
    >>> probabilities = np.array([0.5, 0.2, 0.4]).reshape(1, 3, 1, 1)
    >>> probabilities = np.concatenate([probabilities, [[[[0.3]], [[0.2]], [[0.1]]]]])
    >>> label_map(probabilities, nuclei()[:2]).ravel().tolist()
    [1, 0, 0]
    """
    if len(labels) != len(probabilities):
        raise ValueError(f"{len(labels)} labels for {len(probabilities)} structures")
    index = np.array([label.index for label in labels], dtype=np.uint8)
    background = 1 - probabilities.sum(axis=0)
    if voxels is not None:
        factors = _factors(probabilities, background, voxels)
        probabilities = probabilities * factors[:, None, None, None]
    wins = probabilities.max(axis=0) > background
    return np.where(wins, index[probabilities.argmax(axis=0)], np.uint8(0))


def _factors(
    probabilities: NDArray[np.float32], background: NDArray[np.float32], voxels: Sequence[float]
) -> NDArray[np.float32]:
    """Return what to multiply each structure with so that it wins as many voxels as are known."""
    factors = np.ones(len(probabilities), np.float32)
    for k, wanted in enumerate(voxels):
        rival = np.delete(probabilities, k, axis=0).max(axis=0, initial=0)
        rival = np.maximum(np.maximum(rival, background), 1e-6)
        lead = np.sort((probabilities[k] / rival)[probabilities[k] > 0])[::-1]
        n = round(wanted)
        if n > 0 and len(lead):
            # It wins where it leads by more than one over its factor.
            last = lead[min(n, len(lead)) - 1]
            following = lead[n] if n < len(lead) else last / 4
            factors[k] = np.clip(1 / np.sqrt(last * following), 0.5, 2)
    return factors


OTHER_SIDE = 1 / 3
"""Least size of the smaller of two sides, over the larger one."""


def largest_components(
    label_map: NDArray[np.uint8], labels: Sequence[Label]
) -> tuple[NDArray[np.uint8], dict[str, tuple[int, int]]]:
    """Keep each structure's largest component, and of one without a side that of each side.

    A structure whose label has no side may be one on the left and one on the right. Its second
    largest component is kept too where it is not much smaller: see :data:`OTHER_SIDE`.

    Parameters
    ----------
    label_map : (X, Y, Z) array
        Label indices.
    labels
        The structures to clean; other indices stay as they are.

    Returns
    -------
    label_map : (X, Y, Z) array
        A copy with everything else set to background.
    dropped : {abbreviation: (components, voxels)}
        Number of components found, and of voxels dropped.
    """
    cleaned = label_map.copy()
    dropped = {}
    for label, box in zip(labels, _boxes(label_map, labels), strict=True):
        if box is None:
            dropped[label.abbreviation] = (0, 0)
            continue
        regions, n = ndimage.label(label_map[box] == label.index, NEIGHBOURS)
        sizes = np.bincount(regions.ravel())[1:]
        order = np.argsort(-sizes, kind="stable")
        kept = order[: 1 if label.hemisphere in ("L", "R") else 2]
        kept = kept[sizes[kept] >= OTHER_SIDE * sizes[order[0]]]
        lost = (regions > 0) & ~np.isin(regions, 1 + kept)
        cleaned[box][lost] = 0
        dropped[label.abbreviation] = (n, int(np.count_nonzero(lost)))
    return cleaned, dropped


def contrasts(
    label_map: NDArray[np.uint8],
    labels: Sequence[Label],
    affine: NDArray[np.float64],
    image: NDArray[np.float32],
) -> dict[str, float | None]:
    """Tell by how many standard deviations of its surround each structure differs from it.

    The surround is what lies within :data:`SURROUND_MM` of it and belongs to no structure.

    Parameters
    ----------
    label_map, labels, affine
        As for :func:`measure`.
    image : (X, Y, Z) array
        The contrast that was segmented; where it is exactly 0 it was masked, and says nothing.

    Returns
    -------
    {abbreviation: contrast}
        0 or more; ``None`` where there is no structure, no surround, or no spread in it.

    Examples
    --------
    >>> from fdl_bidsapp.labels import nuclei
    >>> image = np.tile(np.float32([1, 3]), (20, 20, 10))
    >>> labelled = np.zeros((20, 20, 20), np.uint8)
    >>> labelled[8:12, 8:12, 8:12] = 1
    >>> image[labelled == 1] = 7
    >>> contrasts(labelled, nuclei()[:2], np.eye(4), image)
    {'RNL': 5.0, 'RNR': None}
    """
    spacing = spacing_of(affine)
    margins = np.ceil(SURROUND_MM[1] / spacing).astype(int)
    found: dict[str, float | None] = {}
    for label, box in zip(labels, _boxes(label_map, labels), strict=True):
        found[label.abbreviation] = None
        if box is None:
            continue
        near = _widened(box, label_map.shape, margins)
        inside = label_map[near] == label.index
        distance = ndimage.distance_transform_edt(~inside, spacing)
        around = (distance > SURROUND_MM[0]) & (distance <= SURROUND_MM[1]) & (label_map[near] == 0)
        own, other = (_known(image[near][part]) for part in (inside, around))
        spread = float(other.std()) if other.size else 0.0
        if own.size and spread > 0:
            found[label.abbreviation] = float(abs(own.mean() - other.mean()) / spread)
    return found


def confidences(
    label_map: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    labels: Sequence[Label],
    affine: NDArray[np.float64],
    components: Mapping[str, tuple[int, int]],
    contrasts: Mapping[str, float | None],
    target: str,
    calibration: Calibration | None,
) -> dict[str, float | None]:
    """Foretell the Dice of every structure, by its abbreviation.

    Parameters
    ----------
    label_map, probabilities, labels, affine, components, contrasts
        As for :func:`measure`.
    target
        The contrast that was segmented.
    calibration
        Of the model; without it, there is no confidence.
    """
    if calibration is None:
        return {label.abbreviation: None for label in labels}
    described = describe(label_map, probabilities, labels, affine, components, contrasts)
    return {
        label.abbreviation: calibration.expected_dice(target, label.structure, features)
        for label, features in zip(labels, described, strict=True)
    }


def guesses(
    label_map: NDArray[np.uint8],
    labels: Sequence[Label],
    affine: NDArray[np.float64],
    confidence: Mapping[str, float | None],
) -> dict[str, str]:
    """Find the structures that are not to be kept, since they are no more than a guess.

    Parameters
    ----------
    label_map, labels, affine
        As for :func:`measure`.
    confidence
        From :func:`confidences`.

    Returns
    -------
    {abbreviation: reason}
        ``implausible_position`` where more than half of the structures agree on where the head
        is and this one is more than :data:`STRAY_MM` away from its place in it;
        ``low_confidence`` where its expected Dice is below :data:`GUESS_BELOW`, or below
        :data:`GUESS_ALONE_BELOW` and it is the only one of several that is left.
    """
    found = dict.fromkeys(_strays(label_map, labels, affine), "implausible_position")
    there = set(np.unique(label_map).tolist())

    def drop(below: float) -> list[str]:
        left = [each.abbreviation for each in labels if each.index in there]
        left = [name for name in left if name not in found]
        for name in left:
            expected = confidence[name]
            if expected is not None and expected < below:
                found[name] = "low_confidence"
        return [name for name in left if name not in found]

    if len(drop(GUESS_BELOW)) == 1 < len(labels):
        drop(GUESS_ALONE_BELOW)
    return found


def expected_centre(
    wanted: Sequence[Label],
    found: Sequence[tuple[Label, NDArray[np.float64]]],
    affine: NDArray[np.float64],
) -> NDArray[np.float64] | None:
    """Foretell where the middle of some structures is from where others are.

    Parameters
    ----------
    wanted
        The structures that are looked for.
    found
        Others, and the middle of each in voxels.
    affine : (4, 4) array
        Voxel to scanner, in mm.

    Returns
    -------
    (3,) array
        In voxels; ``None`` where nothing is known of one of the two.
    """
    known = [(place, centre) for label, centre in found if (place := _place(label)) is not None]
    places = [place for label in wanted if (place := _place(label)) is not None]
    if not known or not places:
        return None
    straight, voxels = (np.array(each) for each in zip(*known, strict=True))
    seen = voxels @ affine[:3, :3].T + affine[:3, 3]
    # How the head is turned, as far as what was found says more of it than that heads are straight.
    upright = UPRIGHT_MM * np.eye(3)
    turn, _ = Rotation.align_vectors(
        np.concatenate([seen - seen.mean(0), upright]),
        np.concatenate([straight - straight.mean(0), upright]),
    )
    origin = np.median(seen - turn.apply(straight), 0)
    centre = origin + turn.apply(np.mean(places, 0))
    return np.linalg.solve(affine[:3, :3], centre - affine[:3, 3])


def _place(label: Label) -> NDArray[np.float64] | None:
    """Return where a structure is in a head; one of both sides has its middle in the head's."""
    place = PLACES_MM.get(label.structure)
    side = {"L": -1.0, "R": 1.0}.get(label.hemisphere, 0.0)
    return None if place is None else np.multiply(place, [side, 1.0, 1.0])


def _origin(
    label: Label, centre: NDArray[np.float64], affine: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Return where the middle between the red nuclei is, in mm, if a structure is in its place."""
    place = _place(label)
    return None if place is None else affine[:3, :3] @ centre + affine[:3, 3] - place


def _strays(
    label_map: NDArray[np.uint8], labels: Sequence[Label], affine: NDArray[np.float64]
) -> list[str]:
    """Find the structures that are far from where most of the others place them."""
    names, origins = [], []
    for label, box in zip(labels, _boxes(label_map, labels), strict=True):
        if box is None:
            continue
        corner = [part.start for part in box]
        centre = np.argwhere(label_map[box] == label.index).mean(0) + corner
        origin = _origin(label, centre, affine)
        if origin is not None:
            names.append(label.abbreviation)
            origins.append(origin)
    if not names:
        return []
    middles = np.array(origins)
    together = np.linalg.norm(middles[:, None] - middles, axis=-1) <= STRAY_MM
    most = together[together.sum(0).argmax()]
    if 2 * np.count_nonzero(most) <= len(names):
        return []
    return [name for name, near in zip(names, most, strict=True) if not near]


def measure(
    label_map: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    labels: Sequence[Label],
    affine: NDArray[np.float64],
    maps: Mapping[str, NDArray[np.float32]],
    *,
    components: Mapping[str, tuple[int, int]] | None = None,
    guessed: Mapping[str, str] | None = None,
    contrasts: Mapping[str, float | None] | None = None,
    field_of_view: NDArray[np.bool_] | None = None,
    confidence: Mapping[str, float | None] | None = None,
    threshold: float = 0.0,
) -> list[Row]:
    """Measure every structure; one row each, with the keys of `COLUMNS` in their order.

    Parameters
    ----------
    label_map : (X, Y, Z) array
        Label indices after `largest_components`.
    probabilities : (K, X, Y, Z) array
        In the order of ``labels``.
    labels : K labels
    affine : (4, 4) array
        Voxel to scanner, in mm.
    maps : {"qsm": array, "r2star": array}
        Maps on the same grid, in ppm and 1/s; any may be left out.
    components
        What `largest_components` reported; without it, the label map is taken to be unclean still.
    guessed
        What `guesses` found and was taken out of the label map.
    contrasts
        What `contrasts` told.
    field_of_view : (X, Y, Z) bool array
        Where there is data; without it, the whole array.
    confidence
        From `confidences`, before guesses were taken out, for what those say of the others.
    threshold
        Confidence below which a structure is flagged.

    Returns
    -------
    list of rows
        ``None`` where there is nothing to measure: an empty structure, a map that is missing.
        Statistics leave out voxels where the map is exactly 0, which is where it was masked.
    """
    if components is None:
        _, components = largest_components(label_map, labels)
    voxel_volume = float(abs(np.linalg.det(affine[:3, :3])))
    guessed, confidence, contrasts = guessed or {}, confidence or {}, contrasts or {}
    rows = []
    boxes = _boxes(label_map, labels)
    for label, probability, found in zip(labels, probabilities, boxes, strict=True):
        box = _widened(found or (slice(0, 0),) * 3, label_map.shape, (SOFT_REACH,) * 3)
        mask = label_map[box] == label.index
        n_voxels = int(np.count_nonzero(mask))
        near = ndimage.binary_dilation(mask, iterations=SOFT_REACH) if n_voxels else mask
        row: Row = {
            "index": label.index,
            "name": label.name,
            "abbreviation": label.abbreviation,
            "structure": label.structure,
            "hemisphere": label.hemisphere,
            "volume": n_voxels * voxel_volume if n_voxels else None,
            "n_voxels": n_voxels,
            "volume_soft": float(probability[box][near].sum(dtype=np.float64)) * voxel_volume
            if n_voxels
            else None,
        }
        for key in MAPS:
            values = maps[key][box][mask] if key in maps else np.empty(0)
            row |= {f"{key}_{name}": value for name, value in _statistics(values)}
        row["confidence"] = (
            0.0 if label.abbreviation in guessed else confidence.get(label.abbreviation)
        )
        n_components, lost = components[label.abbreviation]
        row["qc_n_components"] = n_components
        row["qc_mean_probability"] = (
            float(probability[box][mask].mean(dtype=np.float64)) if n_voxels else None
        )
        row["qc_contrast"] = contrasts.get(label.abbreviation) if n_voxels else None
        row["qc_touches_fov"] = int(_touches_end(mask, box, label_map.shape, field_of_view))
        row["qc_flag"] = ";".join(_reasons(row, lost, threshold, guessed)) or "ok"
        rows.append(row)
    return rows


def _boxes(label_map: NDArray[np.uint8], labels: Sequence[Label]) -> list[tuple[slice, ...] | None]:
    """Return the box around each structure; ``None`` where there is nothing of it."""
    boxes = ndimage.find_objects(label_map)
    return [boxes[label.index - 1] if label.index <= len(boxes) else None for label in labels]


def _widened(box: Sequence[slice], shape: Sequence[int], by: Iterable[int]) -> tuple[slice, ...]:
    return tuple(
        slice(max(side.start - margin, 0), min(side.stop + margin, length))
        for side, length, margin in zip(box, shape, by, strict=True)
    )


def _known(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Leave out what was masked or is not a number."""
    return values[np.isfinite(values) & (values != 0)].astype(np.float64)


def _statistics(values: NDArray[np.floating]) -> Iterator[tuple[str, float | None]]:
    values = _known(values)
    if not values.size:
        yield from ((name, None) for name in STATISTICS)
        return
    p05, median, p95 = np.percentile(values, [5, 50, 95])
    numbers = (values.mean(), median, values.std(), p05, p95)
    yield from zip(STATISTICS, map(float, numbers), strict=True)


def _touches_end(
    mask: NDArray[np.bool_],
    box: tuple[slice, ...],
    shape: Sequence[int],
    field_of_view: NDArray[np.bool_] | None,
) -> bool:
    for axis, (side, length) in enumerate(zip(box, shape, strict=True)):
        if side.start == 0 and mask.take(0, axis).any():
            return True
        if side.stop == length and mask.take(-1, axis).any():
            return True
    if field_of_view is None:
        return False
    around = ndimage.binary_dilation(mask, NEIGHBOURS) if mask.any() else mask
    return bool((around & ~field_of_view[box]).any())


def _reasons(row: Row, lost: int, threshold: float, guessed: Mapping[str, str]) -> Iterator[str]:
    n_voxels, volume, probability = (
        float(row[key] or 0) for key in ("n_voxels", "volume", "qc_mean_probability")
    )
    if not n_voxels:
        yield "empty"
        if str(row["abbreviation"]) in guessed:
            yield guessed[str(row["abbreviation"])]
        return
    if row["qc_touches_fov"]:
        yield "touches_fov"
    if lost > FRAGMENTED_ABOVE * (n_voxels + lost):
        yield "fragmented"
    if probability < LOW_PROBABILITY_BELOW:
        yield "low_probability"
    confidence = row["confidence"]
    if confidence is not None and float(confidence) < threshold:
        yield "low_confidence"
    low, high = PLAUSIBLE_VOLUME_MM3.get(str(row["structure"]), (0.0, np.inf))
    if not low <= volume <= high:
        yield "implausible_volume"
