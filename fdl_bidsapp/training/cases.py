"""Labelled sets: which image has which label map, in which split; from a table or from BIDS."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from fdl_bidsapp.bids.inputs import Scan, Source, find_scans, open_datasets, parse_name
from fdl_bidsapp.errors import (
    AmbiguousInputError,
    DataError,
    FdlError,
    ImageError,
    InputMissingError,
    UsageError,
)
from fdl_bidsapp.imaging.grid import (
    Corner,
    Grid,
    canonical,
    canvas_geometry,
    conform,
    load_image,
    middle,
    same_grid,
    shifted,
    window_around,
)
from fdl_bidsapp.labels import Label, nuclei
from fdl_bidsapp.models.fdl import CONTRASTS, ModelSpec
from fdl_bidsapp.pipeline import ScanImages, read_scan, to_canvas

Array = np.ndarray

BLOCK_MARGIN = 0.15
"""Of the window's length: what a warp may fetch from beyond the window's faces."""

SPLITS = ("train", "validation", "test")

PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c")
"""Colours of structures whose table gives none."""


@dataclass(frozen=True)
class LabelledScan:
    """One labelled scan, not yet read.

    Attributes
    ----------
    name
        Its id in tables.
    participant
        Who it is of; scans of one participant are not independent.
    split
        ``train``, ``validation``, ``test``, or ``""`` where the set has no splits.
    scan
        Its images.
    label
        Its label map.
    """

    name: str
    participant: str
    split: str
    scan: Scan
    label: Path


@dataclass(frozen=True)
class Case:
    """One labelled scan on a model's canvas.

    Attributes
    ----------
    name, participant
        As in :class:`LabelledScan`.
    maps : contrast → (X, Y, Z) float32 array
        In the contrasts' units.
    classes : (X, Y, Z) uint8 array
        0 for background, k for the k-th structure.
    starts
        For each of the model's regions the corner of the window that it sees first; ``None`` where
        nothing of the region is labelled.
    """

    name: str
    participant: str
    maps: dict[str, Array]
    classes: Array
    starts: tuple[tuple[int, int, int] | None, ...]


def read_table(path: str | Path) -> list[LabelledScan]:
    """Read a table of labelled scans.

    Parameters
    ----------
    path
        Tab-separated, with the columns ``id``, ``label``, one for each contrast (``qsm``,
        ``r2star``, ``imag``, ``swi``), and, where wanted, ``split`` and ``participant``. Paths are
        relative to the table; an absent contrast is empty or ``n/a``.

    Raises
    ------
    InputMissingError
        No such table, or it names a file that is not there.
    DataError
        Not such a table, an unknown split, or a case in two splits.
    """
    path = Path(path)
    columns, rows = _tsv(path)
    contrasts = [contrast for contrast in CONTRASTS if contrast in columns]
    missing = [column for column in ("id", "label") if column not in columns]
    if missing or not contrasts:
        what = " and ".join(missing) or f"any of {', '.join(CONTRASTS)}"
        raise DataError(
            f"the table has no column {what}",
            "give the columns id, split, label and one for each contrast, tab-separated",
            path=path,
        )
    scans = []
    for row in rows:
        name = row["id"]
        given = [(contrast, row[contrast]) for contrast in contrasts if row[contrast]]
        if not name or not row["label"] or not given:
            raise DataError(
                f"the row of {name or 'an unnamed case'} has no id, label or image",
                "fill it in or remove it",
                path=path,
            )
        sources = tuple(Source(c, (_existing(path, file),), "map") for c, file in given)
        scans.append(
            LabelledScan(
                name,
                row.get("participant") or name,
                row.get("split", ""),
                Scan((("subject", name),), sources),
                _existing(path, row["label"]),
            )
        )
    check_splits(scans, path)
    return scans


def read_bids(
    bids_dir: str | Path,
    labels_dir: str | Path,
    *,
    derivatives: Sequence[tuple[str | None, str | Path]] = (),
    validation_share: float = 0.0,
) -> list[LabelledScan]:
    """Find the labelled scans of a BIDS dataset.

    Parameters
    ----------
    bids_dir
        The dataset with the images.
    labels_dir
        A derivative dataset with one ``_dseg`` label map for each labelled scan; scans without one
        are left out.
    derivatives
        Further datasets with images, as for :func:`fdl_bidsapp.bids.inputs.find_scans`.
    validation_share
        Where ``participants.tsv`` has no column ``split``: this share of the participants, at least
        one of them, are for validation, spread evenly over the sorted list. With 0 there are no
        splits.

    Raises
    ------
    FdlError
        As ``find_scans``; or no scan is labelled, or a scan has two label maps.
    """
    (labels_dataset,) = open_datasets(labels_dir)
    found: dict[str, list[tuple[dict[str, str], Path]]] = {}
    for path in sorted(labels_dataset.root.glob("sub-*/**/*_dseg.nii*")):
        entities = parse_name(path.name)
        if entities["extension"] in (".nii", ".nii.gz"):
            found.setdefault(entities.get("subject", ""), []).append((entities, path))
    discovery = find_scans(
        bids_dir,
        derivatives=derivatives,
        exclude=[labels_dataset.root],
        reconstruct=False,
    )
    labelled = []
    for scan in discovery.scans:
        label = _label_of(scan, found.get(scan.subject, []))
        if label is not None:
            labelled.append(LabelledScan(scan.source_prefix, scan.subject, "", scan, label))
    if not labelled:
        raise InputMissingError(
            "no scan of the dataset has a label map in it",
            "name label maps like their images, such as sub-01_dseg.nii.gz",
            path=labels_dataset.root,
        )
    splits = _participant_splits(Path(bids_dir), labelled, validation_share)
    labelled = [replace(one, split=splits.get(one.participant, "")) for one in labelled]
    check_splits(labelled, Path(bids_dir))
    return labelled


def check_splits(scans: Iterable[LabelledScan], path: Path) -> None:
    """Make sure that no participant, id or image is in two splits.

    Raises
    ------
    DataError
        One is (what a model learnt from must not judge it), a name is given twice, or a split is
        unknown.
    """
    seen: dict[tuple[str, str], str] = {}
    names: set[str] = set()
    for one in scans:
        if one.split not in ("", *SPLITS):
            raise DataError(
                f"the split of {one.name} is {one.split!r}",
                f"give one of {', '.join(SPLITS)}",
                path=path,
            )
        if one.name in names:
            raise DataError(f"the case {one.name} is there twice", "remove one", path=path)
        names.add(one.name)
        files = [*(file for source in one.scan.sources for file in source.paths), one.label]
        keys = [("participant", one.participant), *(("file", str(file)) for file in files)]
        for key in keys:
            other = seen.setdefault(key, one.split)
            if other != one.split:
                kind, what = key
                raise DataError(
                    f"the {kind} {what} is in two splits, {other or 'none'} and"
                    f" {one.split or 'none'}: what is learnt from must not be measured on",
                    "put all scans of a participant into one split",
                    path=path,
                )


def in_split(scans: Iterable[LabelledScan], split: str, path: Path) -> list[LabelledScan]:
    """Return the scans of one split.

    Raises
    ------
    DataError
        There is none.
    """
    chosen = [one for one in scans if one.split == split]
    if not chosen:
        raise DataError(
            f"the split {split!r} is empty",
            "name it in the column split of the table, or of a BIDS dataset's participants.tsv",
            path=path,
        )
    return chosen


def read_labels(path: str | Path) -> tuple[Label, ...]:
    """Read a label table.

    Parameters
    ----------
    path
        Tab-separated like BIDS ``dseg.tsv``: ``index`` and ``name``; where there are, also
        ``abbreviation``, ``structure``, ``hemisphere``, ``mapping`` and ``color``. Without
        ``hemisphere``, a name that says left or right has that side. Index 0 is background.

    Raises
    ------
    InputMissingError, DataError
        No such table, or not such a table.
    """
    path = Path(path)
    columns, rows = _tsv(path)
    if not {"index", "name"} <= set(columns):
        raise DataError("the label table has no index and name", "add these columns", path=path)
    labels: list[Label] = []
    for row in rows:
        try:
            if int(row["index"]) != 0:
                labels.append(_label(row, len(labels)))
        except ValueError as error:
            raise DataError(
                f"the row of {row['name'] or row['index']} has an index or mapping that is no"
                " whole number",
                "correct it",
                path=path,
            ) from error
    if not labels:
        raise DataError("the label table names no structure", "add one row for each", path=path)
    return tuple(labels)


def known_labels(
    table: str | Path | None,
    labels_dir: str | Path | None,
    structures: Sequence[str],
    otherwise: tuple[Label, ...] = (),
) -> tuple[tuple[Label, ...], frozenset[int]]:
    """Return the structures to segment, and all values that a label map may have.

    Parameters
    ----------
    table
        A label table; ``None`` for ``dseg.tsv`` in the dataset of label maps, and where there is
        none the app's own table of nuclei.
    labels_dir
        The dataset of label maps, if there is one.
    structures
        Abbreviations of those to segment; all if empty. Needed with the app's own table.
    otherwise
        Structures to segment where there is neither table nor choice.

    Raises
    ------
    UsageError
        An abbreviation is not in the table, or there is neither table nor choice.
    """
    if table is None and labels_dir is not None and (Path(labels_dir) / "dseg.tsv").is_file():
        table = Path(labels_dir) / "dseg.tsv"
    if table is None and not structures:
        if otherwise:
            return otherwise, frozenset(label.index for label in otherwise)
        raise UsageError(
            "nothing says what the label values mean",
            "give a label table with --labels, or the nuclei with --structures",
        )
    labels = nuclei() if table is None else read_labels(table)
    known = frozenset(label.index for label in labels)
    if not structures:
        return labels, known
    table_of = {label.abbreviation: label for label in labels}
    unknown = [name for name in structures if name not in table_of]
    if unknown:
        raise UsageError(
            f"the label table has no structure {', '.join(unknown)}",
            f"choose among {', '.join(table_of)}",
        )
    return tuple(table_of[name] for name in structures), known


def read_case(
    labelled: LabelledScan,
    targets: Sequence[str],
    contrasts: Sequence[str],
) -> tuple[ScanImages, Array]:
    """Read a labelled scan on the grid of its first target.

    Parameters
    ----------
    labelled
        What to read.
    targets
        Contrasts that may be segmented, the preferred one first.
    contrasts
        Contrasts to read beside these, where the scan has them.

    Returns
    -------
    images
        As the app reads them.
    labels : (X, Y, Z) int16 array
        The label map, on the same grid.

    Raises
    ------
    FdlError
        What :func:`fdl_bidsapp.pipeline.read_scan` finds wrong; no target; a label map on another
        grid or with values that are no labels.
    """
    scan = labelled.scan
    target = next((contrast for contrast in targets if scan.get(contrast)), None)
    if target is None:
        there = ", ".join(source.contrast for source in scan.sources) or "nothing"
        raise InputMissingError(
            f"{labelled.name} lacks the contrast to segment, {' or '.join(targets)}; it has"
            f" {there}",
            "add it, remove the case, or choose another target",
            path=labelled.label,
        )
    wanted = {target, *targets, *contrasts}
    sources = tuple(source for source in scan.sources if source.contrast in wanted)
    images = read_scan(replace(scan, sources=sources), target, tuple(targets))
    label = load_image(labelled.label).image
    reference = nib.Nifti1Image(images.maps[target], images.affine)
    if not same_grid(label, reference):
        raise ImageError(
            f"the label map is {_size(label)} and its image {_size(reference)}"
            if label.shape != reference.shape
            else "the label map lies elsewhere than its image: the affines differ",
            f"bring it to the grid of {_source_path(scan, target)}",
            path=labelled.label,
        )
    values = np.asarray(label.dataobj, np.float32)
    rounded = np.rint(values)
    if np.abs(values - rounded).max() > 1e-3 or rounded.min() < 0 or rounded.max() > 32767:
        raise ImageError(
            "the label map has values that are no whole numbers from 0 to 32767",
            "give a map of labels, not of probabilities",
            path=labelled.label,
        )
    return images, rounded.astype(np.int16)


def check_values(labels: Array, known: frozenset[int], path: Path) -> None:
    """Make sure that a label map has no values but 0 and those of the label table.

    Raises
    ------
    ImageError
        It has.
    """
    unknown = sorted({int(value) for value in np.unique(labels)} - known - {0})
    if unknown:
        raise ImageError(
            f"the label map has values that the label table does not know:"
            f" {', '.join(map(str, unknown[:8]))}",
            "add them to the table, or correct the map",
            path=path,
        )


def load_case(
    labelled: LabelledScan, spec: ModelSpec, known: frozenset[int], modalities: Sequence[str] = ()
) -> Case:
    """Read a labelled scan and put it on a model's canvas.

    Parameters
    ----------
    labelled
        What to read.
    spec
        The model's grid, targets and labels.
    known
        All values that a label map may have.
    modalities
        Contrasts to read beside the targets.

    Raises
    ------
    FdlError
        See :func:`read_case` and :func:`check_values`; or no structure to segment is labelled.
    """
    images, labels = read_case(labelled, spec.contrasts, modalities)
    check_values(labels, known, labelled.label)
    classes = np.zeros(labels.shape, np.float32)
    for position, label in enumerate(spec.labels, start=1):
        classes[labels == label.index] = position
    if not classes.any():
        raise ImageError(
            "the label map has none of the structures to segment",
            "label them, or remove the case",
            path=labelled.label,
        )
    starts: tuple[Corner | None, ...]
    if spec.locator is None:
        # Any of the contrasts may be needed here, whichever the model segments.
        canvas = to_canvas(images, replace(spec, method="multimodal"))
        maps, affine = canvas.maps, canvas.affine
        i, j, k = (int(n) for n in canvas.starts[0])
        starts = ((i, j, k),)
    else:
        maps, affine, starts = _around_regions(images, classes, spec)
    moved = canonical(nib.Nifti1Image(classes, images.affine))
    placed = conform(moved, maps[images.target].shape, affine, order=0)
    return Case(labelled.name, labelled.participant, maps, placed.astype(np.uint8), starts)


def _around_regions(
    images: ScanImages, classes: Array, spec: ModelSpec
) -> tuple[dict[str, Array], Array, tuple[Corner | None, ...]]:
    """Sample the part of a scan that windows around the labelled regions may show.

    The model looks for its windows itself; where it ought to find them is known here.
    """
    native = {name: nib.Nifti1Image(data, images.affine) for name, data in images.maps.items()}
    grid = Grid(spec.grid_shape, spec.grid_spacing)
    shape, affine, _ = canvas_geometry(native[images.target], grid)
    to_canvas_voxel = np.linalg.inv(affine) @ images.affine
    starts: list[Corner | None] = []
    for positions in spec.windows:
        centre = middle(np.isin(classes, np.add(positions, 1)))
        if centre is not None:
            centre = (to_canvas_voxel @ [*centre, 1])[:3]
        starts.append(None if centre is None else window_around(centre, shape, grid))
    corners = np.array([start for start in starts if start is not None])
    # A window that still holds the middle lies half its length away at most.
    room = np.ceil((0.5 + BLOCK_MARGIN) * np.array(grid.shape)).astype(int)
    low = np.maximum(corners.min(0) - room, 0)
    high = np.minimum(corners.max(0) + grid.shape + room, shape)
    part = [int(n) for n in high - low]
    affine = shifted(affine, low)
    maps = {name: conform(image, part, affine) for name, image in native.items()}
    return maps, affine, tuple(None if s is None else _minus(s, low) for s in starts)


def _minus(start: Corner, low: Array) -> Corner:
    i, j, k = (int(a - b) for a, b in zip(start, low, strict=True))
    return i, j, k


def load_cases(
    scans: Sequence[LabelledScan],
    spec: ModelSpec,
    known: frozenset[int],
    modalities: Sequence[str] = (),
) -> list[Case]:
    """Read all of a labelled set, and tell of everything that is wrong with it at once.

    Raises
    ------
    FdlError
        The one error, or a :class:`DataError` that lists the first few.
    """
    cases, errors = [], []
    for one in scans:
        try:
            cases.append(load_case(one, spec, known, modalities))
        except FdlError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        first = " ".join(str(error) for error in errors[:3])
        raise DataError(
            f"{len(errors)} of {len(scans)} cases cannot be used: {first.rstrip('.')}",
            "correct or remove them",
        )
    return cases


def _tsv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read a tab-separated table; empty cells and ``n/a`` become empty strings."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t")
            rows = [
                {
                    key: "" if value in (None, "n/a") else value.strip()
                    for key, value in row.items()
                    if key is not None
                }
                for row in reader
            ]
            return list(reader.fieldnames or []), rows
    except FileNotFoundError as error:
        raise InputMissingError("there is no such table", "check the path", path=path) from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            "the table cannot be read", "give tab-separated text in UTF-8", path=path
        ) from error


def _existing(table: Path, file: str) -> Path:
    path = table.parent / file
    if not path.exists():
        raise InputMissingError(
            "there is no such file, though a table names it", f"correct {table}", path=path
        )
    return path


def _label_of(scan: Scan, candidates: list[tuple[dict[str, str], Path]]) -> Path | None:
    """Choose the label map whose entities contradict none of the scan's."""
    own = dict(scan.entities)
    fitting = [
        path
        for entities, path in candidates
        if all(
            value == own.get(name)
            for name, value in entities.items()
            if name not in ("suffix", "extension", "desc", "segmentation", "space", "label")
        )
        and entities.get("session") == own.get("session")
        and entities.get("space") in (None, "orig")
        and "label" not in entities
    ]
    if len(fitting) > 1:
        raise AmbiguousInputError(
            f"two label maps for one scan, the other is {fitting[1]}",
            "keep one of them in the dataset of label maps",
            path=fitting[0],
        )
    return fitting[0] if fitting else None


def _participant_splits(
    bids_dir: Path, labelled: Sequence[LabelledScan], validation_share: float
) -> Mapping[str, str]:
    table = bids_dir / "participants.tsv"
    if table.is_file():
        columns, rows = _tsv(table)
        if {"participant_id", "split"} <= set(columns):
            return {row["participant_id"].removeprefix("sub-"): row["split"] for row in rows}
    if not validation_share:
        return {}
    participants = sorted({one.participant for one in labelled})
    n = max(1, round(validation_share * len(participants)))
    held = {participants[int((i + 0.5) * len(participants) / n)] for i in range(n)}
    return {name: "validation" if name in held else "train" for name in participants}


def _label(row: Mapping[str, str], position: int) -> Label:
    name = row["name"]
    side = row.get("hemisphere", "")
    plain = name
    if not side:
        found = re.search(r"\b(left|right)\b", name, re.IGNORECASE)
        side = found[1][0].upper() if found else "n/a"
        plain = re.sub(r"\b(left|right)\b", "", name, flags=re.IGNORECASE)
    structure = row.get("structure") or re.sub(r"[^0-9a-z]+", "_", plain.lower()).strip("_")
    short = re.sub(r"[^0-9A-Za-z]", "", row.get("abbreviation") or name)
    mapping = row.get("mapping", "")
    return Label(
        index=int(row["index"]),
        name=name,
        abbreviation=short,
        structure=structure,
        hemisphere=side,
        mapping=int(mapping) if mapping else None,
        color=row.get("color") or PALETTE[position % len(PALETTE)],
    )


def _size(image: nib.Nifti1Image) -> str:
    return " × ".join(map(str, image.shape))


def _source_path(scan: Scan, contrast: str) -> Path:
    source = scan.get(contrast)
    assert source is not None
    return source.paths[0]
