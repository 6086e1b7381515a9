"""The table of a cohort, from the output folder alone.

The long table is balanced: every scan has a row for every structure, whatever became of it, so that
a scan that failed is seen as missing and not overlooked. The wide table has one row a scan.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from fdl_bidsapp.bids.inputs import parse_name, read_json
from fdl_bidsapp.bids.outputs import write_json, write_tsv
from fdl_bidsapp.descriptive import (
    NORM_COLUMNS,
    SUMMARY_COLUMNS,
    Curve,
    Design,
    choose_design,
    norm_rows,
    normal_curves,
    summarise,
)
from fdl_bidsapp.errors import DataError, InputMissingError
from fdl_bidsapp.imaging.measure import COLUMNS
from fdl_bidsapp.labels import nuclei

Row = dict[str, Any]

OUTLIER_ABOVE = 3.5
"""Modified z-score from which a value is called an outlier (Iglewicz & Hoaglin, 1993)."""

OUTLIER_SCANS = 10
"""Fewest scans from which a median and a spread are worth comparing with."""

SAME_FIELD = 1.1
"""Ratio up to which two field strengths are called the same."""

OUTLIER_MEASURES = ("volume", "qsm_mean", "r2star_mean")

_NOT_RUN = "no output found: run the participant level"
_IDENTITY = ("index", "name", "abbreviation", "structure", "hemisphere")
_ENTITIES = {
    "subject": "participant_id",
    "session": "session_id",
    "acquisition": "acquisition",
    "run": "run",
}
_BEFORE: dict[str, Row] = {
    "participant_id": {"Description": "Participant"},
    "session_id": {"Description": "Session"},
    "acquisition": {"Description": "Label of the acquisition"},
    "run": {"Description": "Index of the run"},
}
_STATUS: dict[str, Row] = {
    "status": {
        "Description": "What became of the scan",
        "Levels": {
            "ok": "segmented and measured",
            "failed": "not segmented, for the reason under error",
            "missing_input": "no usable image was found",
        },
    }
}
_COMPUTED: dict[str, Row] = {
    "brain_volume": {
        "Description": "Volume of the brain mask that came with the scan",
        "Units": "mm^3",
    },
    "volume_fraction": {"Description": "Volume of the structure divided by that of the brain"},
    "qsm_brain_mean": {
        "Description": "Magnetic susceptibility: mean over the brain mask that came with the scan, "
        "where the map is not 0; subtracted from a structure's, it gives its value relative to "
        "the whole brain",
        "Units": "ppm",
    },
    "qc_asymmetry": {
        "Description": "Difference between the left and the right volume over their mean; the "
        "same on both rows of a pair",
        "Units": "percent",
    },
    "qc_outlier": {
        "Description": "Measures of this structure that lie far from those of the other scans: "
        f"modified z-score (from median and median absolute deviation) above {OUTLIER_ABOVE}; "
        f"joined by semicolons, or none; n/a with fewer than {OUTLIER_SCANS} scans",
    },
}
RATINGS = ("good", "needs editing", "bad")
"""What a reader may say of a structure, from best to worst."""

RATING_COLUMNS = ("scan", "abbreviation", "rating", "comment", "rater")
"""Of a file of ratings; the last two may be absent."""

_RATED: dict[str, Row] = {
    "rating": {
        "Description": "What a reader said of the structure; where several did, the worst of it",
        "Levels": {
            "good": "to be used as it is",
            "needs editing": "to be used once it is corrected",
            "bad": "not to be used",
        },
    },
    "rating_comment": {"Description": "Comments of the readers"},
}
_PROVENANCE: dict[str, Row] = {
    "app_version": {"Description": "Version of fdl-bidsapp"},
    "model_name": {"Description": "Name of the model"},
    "model_sha256": {"Description": "SHA-256 of the model file"},
    "target": {"Description": "Contrast that was segmented"},
    "inputs_used": {"Description": "Input images as BIDS URIs: contrast=URI,URI;contrast=URI"},
    "voxel_volume": {"Description": "Volume of a voxel of the scan", "Units": "mm^3"},
    "field_strength": {"Description": "Strength of the scanner's field", "Units": "T"},
    "scanner_manufacturer": {"Description": "Manufacturer of the scanner"},
    "scanner_model": {"Description": "Model of the scanner, as its manufacturer calls it"},
    "error": {"Description": "Why there is no segmentation"},
}


@dataclass(frozen=True)
class Cohort:
    """The long table of a cohort.

    Attributes
    ----------
    rows
        One for each scan and structure, sorted; numbers as numbers, ``None`` where there is none.
    columns
        The columns in order, each with its BIDS description.
    scans
        How many scans have which status.
    warnings
        What a reader of the table should know, one line each.
    results
        The scans, in the order of the rows.
    people
        Columns joined from ``participants.tsv`` and the participants' ``sessions.tsv``, as they are
        named in the rows.
    design
        Which of them say who is compared with whom.
    curves
        Normal ranges by age, where there are controls enough.
    """

    rows: list[Row]
    columns: dict[str, Row]
    scans: dict[str, int]
    warnings: tuple[str, ...]
    results: tuple[ScanResult, ...] = ()
    people: tuple[str, ...] = ()
    design: Design = field(default_factory=Design)
    curves: tuple[Curve, ...] = ()


@dataclass(frozen=True)
class ScanResult:
    """What the output folder says of one scan.

    Attributes
    ----------
    name
        Beginning of the names of its files, such as ``sub-01_ses-1``.
    entities
        By pybids' names.
    status
        ``ok``, ``failed`` or ``missing_input``.
    error
        Why there is no segmentation, on one line.
    provenance
        Versions, model, target, inputs.
    brain_volume
        mm³.
    brain_qsm
        Mean susceptibility of the brain, ppm.
    measures
        Rows of its table.
    record
        The whole record, as it was read; empty where it cannot be.
    folder
        Name of the participant's folder; empty for participants without any output.
    """

    name: str
    entities: dict[str, str]
    status: str
    error: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    brain_volume: float | None = None
    brain_qsm: float | None = None
    measures: tuple[Row, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""


def collect(
    output_dir: Path,
    bids_dir: Path | None = None,
    *,
    ratings: Sequence[Path] = (),
    controls: str | None = None,
) -> Cohort:
    """Gather the tables of all scans in an output folder.

    Parameters
    ----------
    output_dir
        Output of the participant level.
    bids_dir
        Dataset whose ``participants.tsv`` is joined, where it has one, and what it says of their
        sessions. Its participants without any output are listed as ``missing_input``.
    ratings
        Files of ratings, as participant pages export them; see `RATING_COLUMNS`.
    controls
        ``COLUMN=VALUE`` that marks controls in ``participants.tsv``; see `choose_design`.

    Returns
    -------
    Cohort
        A scan whose record or table cannot be read is a failed one.

    Raises
    ------
    InputMissingError
        The folder is absent, or holds no record of any scan; a file of ratings is absent.
    DataError
        A file of ratings is not one.
    UsageError
        `controls` does not fit ``participants.tsv``.
    """
    warnings: list[str] = []
    scans = read_results(output_dir)
    if not scans:
        raise InputMissingError(
            "there is no result of any scan here",
            "run the participant level first, with the same output folder",
            path=output_dir,
        )
    people = read_people(bids_dir, scans, warnings)
    known = {scan.entities.get("subject") for scan in scans}
    scans += [
        ScanResult(f"sub-{label}", {"subject": label}, "missing_input", _NOT_RUN)
        for label in people.participants
        if label not in known
    ]
    others = sorted({name for scan in scans for name in scan.entities} - set(_ENTITIES))
    order = (*_ENTITIES, *others)
    scans.sort(key=lambda scan: [_natural(scan.entities.get(name)) for name in order])
    structures = _structures(scans)
    rows = [row for scan in scans for row in _rows(scan, structures, others)]
    _mark_outliers(rows)
    if ratings:
        _join_ratings(rows, scans, len(structures), ratings, warnings)

    columns = {
        **_BEFORE,
        **{name: {"Description": f"Value of the BIDS entity {name}"} for name in others},
        **_STATUS,
        **COLUMNS,
        **_COMPUTED,
        **(_RATED if ratings else {}),
        **_PROVENANCE,
    }
    joined = {name: f"{name}_participants" if name in columns else name for name in people.columns}
    told = [people.about(scan) for scan in scans]
    for number, row in enumerate(rows):
        about = told[number // len(structures)]
        row.update({joined[name]: about.get(name) for name in people.columns})
    own = {joined[name]: about for name, about in people.columns.items()}
    columns |= own
    warnings += _mixtures(scans)
    status = dict(sorted(Counter(scan.status for scan in scans).items()))
    design = choose_design(rows, own, controls)
    return Cohort(
        rows,
        columns,
        status,
        tuple(warnings),
        tuple(scans),
        tuple(own),
        design,
        tuple(normal_curves(rows, design)),
    )


def widen(cohort: Cohort) -> tuple[list[Row], dict[str, Row]]:
    """Put all structures of a scan in one row, as ``<abbreviation>_<measure>``.

    Returns
    -------
    rows, columns
        As in `Cohort`.
    """
    measures = [
        name
        for name in (*COLUMNS, "volume_fraction", "qc_asymmetry", "qc_outlier", *_RATED)
        if name not in _IDENTITY and name in cohort.columns
    ]
    names = {row["abbreviation"]: row["name"] for row in cohort.rows}
    shared = [name for name in cohort.columns if name not in (*measures, *_IDENTITY)]
    first = shared[: shared.index("status") + 1]
    columns = {name: cohort.columns[name] for name in first}
    for abbreviation, title in names.items():
        for measure in measures:
            about = cohort.columns[measure]
            columns[f"{abbreviation}_{measure}"] = {
                **about,
                "Description": f"{title}: {about['Description']}",
            }
    columns |= {name: cohort.columns[name] for name in shared}

    rows = []
    # Balanced, and sorted by scan: each run of as many rows as there are structures is one scan.
    for start in range(0, len(cohort.rows), len(names)):
        group = cohort.rows[start : start + len(names)]
        row = {name: group[0][name] for name in shared}
        for part in group:
            row |= {f"{part['abbreviation']}_{name}": part[name] for name in measures}
        rows.append(row)
    return rows, columns


def write_group(
    output_dir: Path,
    bids_dir: Path | None = None,
    *,
    ratings: Sequence[Path] = (),
    controls: str | None = None,
) -> Cohort:
    """Write the tables of a cohort, each with its JSON dictionary.

    They are ``group_morph.tsv``, ``group_morph_wide.tsv``, ``group_summary.tsv`` and, where there
    are controls enough, ``group_norms.tsv``.

    Parameters, errors and result are those of `collect`.
    """
    cohort = collect(output_dir, bids_dir, ratings=ratings, controls=controls)
    tables = [
        ("group_morph", cohort.rows, cohort.columns),
        ("group_morph_wide", *widen(cohort)),
        ("group_summary", summarise(cohort.rows, cohort.design), SUMMARY_COLUMNS),
    ]
    if cohort.curves:
        tables.append(("group_norms", norm_rows(cohort.curves), NORM_COLUMNS))
    else:
        for extension in ("tsv", "json"):
            (output_dir / f"group_norms.{extension}").unlink(missing_ok=True)
    for name, rows, columns in tables:
        write_tsv(output_dir / f"{name}.tsv", rows, list(columns))
        write_json(output_dir / f"{name}.json", columns)
    return cohort


def read_results(output_dir: Path, labels: Iterable[str] = ("*",)) -> list[ScanResult]:
    """Read the records and tables of all scans in an output folder.

    Parameters
    ----------
    output_dir
        Output of the participant level.
    labels
        Participants, without ``sub-``.

    Returns
    -------
    list of ScanResult
        By file name; a scan whose record or table cannot be read is a failed one.
    """
    found = {
        path.with_suffix("")
        for label in labels
        for pattern in (f"sub-{label}/anat/*_morph.*", f"sub-{label}/ses-*/anat/*_morph.*")
        for path in output_dir.glob(pattern)
        if path.suffix in (".json", ".tsv") and not path.name.startswith(".")
    }
    return [
        replace(_read_scan(stem), folder=stem.relative_to(output_dir).parts[0])
        for stem in sorted(found)
    ]


def _read_scan(stem: Path) -> ScanResult:
    path = stem.with_suffix(".json")
    name = stem.name.removesuffix("_morph")
    try:
        record = read_json(path)
        scan = ScanResult(
            name=name,
            entities={name: str(value) for name, value in record["Entities"].items()},
            status=record["Status"],
            error=_one_line(record["Error"]["Cause"]) if record.get("Error") else None,
            provenance=_provenance(record),
            brain_volume=_number(record.get("BrainVolume")),
            brain_qsm=_number(record.get("BrainQSM")),
            record={key: value for key, value in record.items() if key not in COLUMNS},
        )
        if scan.status not in _STATUS["status"]["Levels"]:
            raise ValueError("no known status")
        if f"sub-{scan.entities['subject']}" not in stem.parts:
            raise ValueError("it is of another participant")
    except FileNotFoundError:
        error = f"{path.name} is missing: run the scan again"
        return ScanResult(name, _from_name(stem), "failed", error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return ScanResult(name, _from_name(stem), "failed", _unreadable(path, problem))
    if scan.status != "ok":
        return scan
    path = stem.with_suffix(".tsv")
    try:
        return replace(scan, measures=_read_measures(path))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as problem:
        return replace(scan, status="failed", error=_unreadable(path, problem))


def _read_measures(path: Path) -> tuple[Row, ...]:
    rows = []
    for cells in _read_tsv(path):
        row: Row = {name: cells[name] for name in _IDENTITY}
        row["index"] = int(cells["index"])
        if None in row.values():
            raise ValueError("a row is cut short")
        for name in COLUMNS:
            if name not in _IDENTITY:
                text = _text(cells.get(name))
                row[name] = text if text is None or name == "qc_flag" else _number(text)
        rows.append(row)
    if not rows:
        raise ValueError("there are no rows")
    return tuple(rows)


def _provenance(record: Mapping[str, Any]) -> Row:
    used = record.get("InputsUsed") or {}
    return {
        "app_version": record.get("AppVersion"),
        "model_name": record.get("ModelName"),
        "model_sha256": record.get("ModelSHA256"),
        "target": record.get("Target"),
        "inputs_used": ";".join(f"{name}={','.join(uris)}" for name, uris in used.items()) or None,
        "voxel_volume": _number(record.get("VoxelVolume")),
        "field_strength": _number(record.get("MagneticFieldStrength")),
        "scanner_manufacturer": record.get("Manufacturer"),
        "scanner_model": record.get("ManufacturersModelName"),
    }


def _rows(scan: ScanResult, structures: Sequence[Row], others: Sequence[str]) -> list[Row]:
    start = {
        column: _prefixed(entity, scan.entities.get(entity)) for entity, column in _ENTITIES.items()
    }
    start |= {name: scan.entities.get(name) for name in others}
    start["status"] = scan.status
    end = {**dict.fromkeys(_PROVENANCE), **scan.provenance, "error": scan.error}
    measured = {row["abbreviation"]: row for row in scan.measures}
    volumes = {(row["structure"], row["hemisphere"]): row["volume"] for row in scan.measures}
    rows = []
    for structure in structures:
        row = dict.fromkeys(COLUMNS) | structure | measured.get(structure["abbreviation"], {})
        volume = row["volume"]
        brain = row["brain_volume"] = scan.brain_volume
        row["volume_fraction"] = volume / brain if brain and volume is not None else None
        row["qsm_brain_mean"] = scan.brain_qsm
        row["qc_asymmetry"] = _asymmetry(
            volumes.get((row["structure"], "L")), volumes.get((row["structure"], "R"))
        )
        row["qc_outlier"] = None
        rows.append({**start, **row, **end})
    return rows


def _structures(scans: Iterable[ScanResult]) -> list[Row]:
    found: dict[str, Row] = {}
    for scan in scans:
        for row in scan.measures:
            found.setdefault(row["abbreviation"], {name: row[name] for name in _IDENTITY})
    if not found:
        return [{name: getattr(label, name) for name in _IDENTITY} for label in nuclei()]
    return sorted(found.values(), key=lambda row: (row["index"], row["abbreviation"]))


def _asymmetry(left: float | None, right: float | None) -> float | None:
    if left is None or right is None or left + right == 0:
        return None
    return 200 * (left - right) / (left + right)


def _mark_outliers(rows: Sequence[Row]) -> None:
    by_structure = defaultdict(list)
    for row in rows:
        if row["status"] == "ok":
            by_structure[row["abbreviation"]].append(row)
    for group in by_structure.values():
        for measure in OUTLIER_MEASURES:
            known = [row for row in group if row[measure] is not None]
            if len(known) < OUTLIER_SCANS:
                continue
            scores = modified_z([row[measure] for row in known])
            for row, score in zip(known, scores, strict=True):
                before = row["qc_outlier"] or "none"
                if abs(score) > OUTLIER_ABOVE:
                    row["qc_outlier"] = measure if before == "none" else f"{before};{measure}"
                else:
                    row["qc_outlier"] = before


def modified_z(values: Sequence[float]) -> list[float]:
    """Return the modified z-scores, from median and median absolute deviation.

    All are 0 where most values are the same.

    Examples
    --------
    >>> [round(z, 1) for z in modified_z([10, 11, 12, 13, 14, 40])]
    [-1.1, -0.7, -0.2, 0.2, 0.7, 12.4]
    """
    middle = median(values)
    spread = median(abs(value - middle) for value in values)
    # 0.6745 makes the median absolute deviation of a normal distribution its standard deviation.
    return [0.6745 * (value - middle) / spread if spread else 0.0 for value in values]


def _join_ratings(
    rows: Sequence[Row],
    scans: Sequence[ScanResult],
    structures: int,
    paths: Sequence[Path],
    warnings: list[str],
) -> None:
    given: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for path in paths:
        for rating in _read_ratings(path, warnings):
            given[rating["scan"], rating["abbreviation"]].append(rating)
    differing = 0
    for number, row in enumerate(rows):
        name = scans[number // structures].name
        said = given.pop((name, row["abbreviation"]), [])
        grades = {each["rating"] for each in said}
        row["rating"] = max(grades, key=RATINGS.index, default=None)
        comments = [
            f"{each['rater']}: {each['comment']}" if each["rater"] else each["comment"]
            for each in said
            if each["comment"]
        ]
        row["rating_comment"] = "; ".join(dict.fromkeys(comments)) or None
        differing += len(grades) > 1
    if differing:
        warnings.append(f"{differing} structures are rated differently: the worst rating counts")
    if given:
        first = ", ".join(f"{scan} {abbreviation}" for scan, abbreviation in list(given)[:3])
        warnings.append(f"{len(given)} ratings are of no scan in the output folder ({first})")


def _read_ratings(path: Path, warnings: list[str]) -> Iterable[Row]:
    remedy = "give the file that a participant page exports"
    try:
        table = list(_read_tsv(path))
    except FileNotFoundError:
        raise InputMissingError("the file of ratings is not there", remedy, path=path) from None
    except (OSError, ValueError, csv.Error) as problem:
        told = _one_line(str(problem))
        raise DataError(f"the ratings cannot be read ({told})", remedy, path=path) from None
    needed = set(RATING_COLUMNS[:3])
    if not table or not needed <= table[0].keys():
        raise DataError(
            f"this is no file of ratings: it has no rows, or not the columns "
            f"{', '.join(RATING_COLUMNS[:3])}",
            remedy,
            path=path,
        )
    for line, cells in enumerate(table, start=2):
        row = {name: _text(cells.get(name)) for name in RATING_COLUMNS}
        if row["rating"] in RATINGS and row["scan"] and row["abbreviation"]:
            yield row
        elif row["rating"] is not None:
            warnings.append(
                f"{path}: line {line} is left out, it has no rating among {', '.join(RATINGS)}"
            )


def _mixtures(scans: Iterable[ScanResult]) -> list[str]:
    finished = [scan.provenance for scan in scans if scan.status == "ok"]
    found = []
    for key, words in (
        ("app_version", "versions of fdl-bidsapp"),
        ("model_sha256", "models"),
        ("target", "target contrasts"),
    ):
        values = sorted({str(each[key]) for each in finished if each[key]})
        if len(values) > 1:
            found.append(
                f"the table mixes {len(values)} {words} ({', '.join(v[:12] for v in values)}): "
                "compare scans within one, or run all scans alike"
            )
    fields = sorted({each["field_strength"] for each in finished if each["field_strength"]})
    # Some scanners say 2.89 T where others say 3.
    if fields and fields[-1] > SAME_FIELD * fields[0]:
        found.append(
            f"the scans are of different field strengths ({fields[0]:g} to {fields[-1]:g} T): R2* "
            "and what is seen of a nucleus grow with the field, so compare within one, or model it"
        )
    return found


@dataclass(frozen=True)
class People:
    """What a dataset says of its participants and of their sessions.

    Attributes
    ----------
    participants
        Values by column, by participant label without ``sub-``.
    sessions
        The same, by the labels of participant and session.
    columns
        The columns with their BIDS descriptions.
    """

    participants: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    sessions: Mapping[tuple[str, str], Mapping[str, str | None]] = field(default_factory=dict)
    columns: Mapping[str, Row] = field(default_factory=dict)

    def about(self, scan: ScanResult) -> dict[str, str | None]:
        """Return what is known of a scan: first of its session, then of the participant."""
        subject, session = (scan.entities.get(name, "") for name in ("subject", "session"))
        visit = self.sessions.get((subject, session), {})
        known = {name: value for name, value in visit.items() if value is not None}
        return {**self.participants.get(subject, {}), **known}


def read_people(bids_dir: Path | None, scans: Iterable[ScanResult], warnings: list[str]) -> People:
    """Read ``participants.tsv`` and each ``sub-*_sessions.tsv``, as far as they are there.

    Parameters
    ----------
    bids_dir
        The dataset, if there is one.
    scans
        Those of whose sessions something may be said.
    warnings
        Told what is wrong with the tables and their dictionaries.
    """
    if bids_dir is None:
        return People()
    path = bids_dir / "participants.tsv"
    people, names = _read_keyed(path, "participant_id", "sub-", warnings)
    described = _read_descriptions(path.with_suffix(".json"), warnings) if people else {}
    columns = {
        name: described.get(name) or {"Description": "From participants.tsv"} for name in names
    }
    sessions: dict[tuple[str, str], dict[str, str | None]] = {}
    at_top: dict[str, Row] | None = None
    described = {}
    ill: list[str] = []
    subjects = {scan.entities["subject"] for scan in scans if "session" in scan.entities}
    for subject in sorted(subjects):
        path = bids_dir / f"sub-{subject}" / f"sub-{subject}_sessions.tsv"
        visits, names = _read_keyed(path, "session_id", "ses-", ill)
        sessions |= {(subject, label): values for label, values in visits.items()}
        # One dictionary at the top may stand for all; else they are alike.
        if visits and at_top is None:
            at_top = described = _read_descriptions(bids_dir / "sessions.json", ill)
        if visits and not described:
            described = _read_descriptions(path.with_suffix(".json"), ill)
        for name in names:
            if name not in columns:
                columns[name] = described.get(name) or {"Description": "From sessions.tsv"}
    if ill:
        more = f" (and {len(ill) - 1} more of the tables of sessions)" if len(ill) > 1 else ""
        warnings.append(ill[0] + more)
    return People(people, sessions, columns)


def _read_keyed(
    path: Path, key: str, prefix: str, warnings: list[str]
) -> tuple[dict[str, dict[str, str | None]], list[str]]:
    """Read a table with a row for each label; return the rows by label, and the other columns."""
    try:
        table = list(_read_tsv(path))
    except FileNotFoundError:
        return {}, []
    except (OSError, ValueError, csv.Error) as problem:
        warnings.append(f"{path}: not joined, it cannot be read ({_one_line(str(problem))})")
        return {}, []
    if not table or key not in table[0]:
        warnings.append(f"{path}: not joined, it has no rows or no column {key}")
        return {}, []
    names = [name for name in table[0] if name and name != key]
    found: dict[str, dict[str, str | None]] = {}
    for row in table:
        label = (row[key] or "").removeprefix(prefix)
        if label in found:
            warnings.append(f"{path}: {prefix}{label} is listed twice; its first row is used")
        elif label and label != "n/a":
            found[label] = {name: _text(row[name]) for name in names}
    return found, names


def _read_descriptions(path: Path, warnings: list[str]) -> dict[str, Row]:
    try:
        return {name: about for name, about in read_json(path).items() if isinstance(about, dict)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as problem:
        warnings.append(f"{path}: not used, it cannot be read ({_one_line(str(problem))})")
        return {}


def _read_tsv(path: Path) -> Iterable[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        yield from csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)


def _number(value: object) -> int | float | None:
    """Read a number; ``None`` if there is none or it is not finite.

    Raises
    ------
    TypeError, ValueError
        It is not a number.
    """
    if value is None:
        return None
    if isinstance(value, str) and value.lstrip("-").isdecimal():
        return int(value)
    number = float(value)  # type: ignore[arg-type]
    return number if math.isfinite(number) else None


def _text(text: str | None) -> str | None:
    text = text.strip() if text else ""
    return None if text in ("", "n/a") else text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _unreadable(path: Path, problem: Exception) -> str:
    return _one_line(f"{path.name} cannot be read ({type(problem).__name__}: {problem})")


def _prefixed(entity: str, value: str | None) -> str | None:
    prefix = {"subject": "sub-", "session": "ses-"}.get(entity, "")
    return None if value is None else prefix + value


def _from_name(stem: Path) -> dict[str, str]:
    parts = parse_name(stem.name)
    return {name: parts[name] for name in parts if name not in ("suffix", "extension")}


def _natural(text: str | None) -> list[tuple[int, int, str]]:
    """Sort key by which ``2`` comes before ``10``, and nothing before anything."""
    parts = re.findall(r"\d+|\D+", text or "")
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]
