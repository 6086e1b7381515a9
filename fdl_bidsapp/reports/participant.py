"""The page of a participant, from the records, tables and figures in the output folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.boilerplate import BIBLIOGRAPHY, methods
from fdl_bidsapp.bids.inputs import parse_name
from fdl_bidsapp.bids.outputs import write_text
from fdl_bidsapp.cohort import (
    RATING_COLUMNS,
    RATINGS,
    Cohort,
    ScanResult,
    read_people,
    read_results,
)
from fdl_bidsapp.descriptive import Curve, number
from fdl_bidsapp.imaging.measure import LOW_PROBABILITY_BELOW
from fdl_bidsapp.reports.page import render
from fdl_bidsapp.reports.palette import CONTRASTS

Row = dict[str, Any]

GROUP_PAGE = "group_morph.html"

MOST_FACTS = 12
"""Columns of ``participants.tsv`` and ``sessions.tsv`` that are shown, each at its place."""

HIGH_ABOVE, MODERATE_ABOVE = 0.9, 0.75
"""Mean probability over the mask, in words."""

HIGH_DICE = 0.85
"""Expected Dice from which confidence is called high."""

ADVICE = {
    "empty": "Nothing was found that could be kept. See whether the field of view holds the "
    "nucleus and the contrast shows it. Where another contrast of the scan does, run it with "
    "--target best; else draw it by hand.",
    "touches_fov": "It touches the end of the field of view and may be cut off: its volume is "
    "then too small.",
    "fragmented": "More than a tenth of its voxels lay apart from the largest piece and were "
    "dropped: vessels or noise may have been taken for the nucleus.",
    "low_probability": "The network was unsure of most of it: look at the borders on all cuts.",
    "low_confidence": "Segmentations like this one often overlap poorly with the true nucleus: "
    "where it was kept, look at it, and leave it out where you cannot correct it.",
    "implausible_position": "What was found lay far from where the other structures place it, and "
    "was taken out: vessels or calcifications may have been taken for the nucleus.",
    "implausible_volume": "Its volume is outside the range of adult anatomy: part of it may be "
    "missing, or something else be included.",
}
"""What each flag of ``qc_flag`` means, and what to do."""

DERIVATIONS = {
    "map": "read from the map",
    "inverse_t2star": "1 / T2*, from the T2* map",
    "echo_mean": "mean of the echoes' magnitudes, as there is no map",
    "echo_fit": "R2* fitted to the echoes' magnitudes, as there is no map",
    "reconstruction": "made from magnitude and phase, as there is no map",
}

_SHOWN = (("volume", "Volume", "mm³"), ("qsm", "QSM", "ppm"), ("r2star", "R2*", "1/s"))


@dataclass(frozen=True)
class Surroundings:
    """What a participant's page says beyond the participant.

    Attributes
    ----------
    people
        What the dataset says of each scan's participant and session, by scan and column.
    curves
        Normal ranges by age, by abbreviation and measure.
    ages
        In years, by scan, where they are known.
    outliers
        Measures that are far from the cohort's, by scan and abbreviation.
    compared
        Whether there is a cohort to compare with.
    previous, next
        Names of the neighbours' folders.
    """

    people: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    curves: Mapping[tuple[str, str], Curve] = field(default_factory=dict)
    ages: Mapping[str, float | None] = field(default_factory=dict)
    outliers: Mapping[tuple[str, str], str] = field(default_factory=dict)
    compared: bool = False
    previous: str = ""
    next: str = ""

    def person(self) -> Row:
        """Return what holds for all of the participant's scans."""
        first, *others = self.people.values() or [{}]
        return {
            name: value
            for name, value in first.items()
            if value is not None and all(other.get(name) == value for other in others)
        }

    def visit(self, scan: str) -> Row:
        """Return what holds for this scan, but not for all of the participant's."""
        shared = self.person()
        own = self.people.get(scan, {})
        return {name: own[name] for name in own if own[name] is not None and name not in shared}


def write_participants(
    out: Path, labels: Iterable[str] = ("*",), bids_dir: Path | None = None
) -> list[Path]:
    """Write the pages of participants without a look at the others.

    Parameters
    ----------
    out
        The output folder.
    labels
        Participants, without ``sub-``; those without output are passed over.
    bids_dir
        Dataset whose ``participants.tsv`` says who they are, and their ``sessions.tsv`` more.

    Returns
    -------
    list of Path
        The pages.
    """
    results = read_results(out, labels)
    people = read_people(bids_dir, results, [])
    written = []
    for folder, scans in _by_folder(results):
        about = Surroundings({scan.name: people.about(scan) for scan in scans})
        written.append(_write(out, folder, scans, about))
    return written


def write_cohort_participants(out: Path, cohort: Cohort) -> list[Path]:
    """Write the pages of all participants of a cohort, each with its place in it.

    Returns
    -------
    list of Path
        The pages.
    """
    curves = {(curve.abbreviation, curve.measure): curve for curve in cohort.curves}
    first: dict[str, Row] = {}
    outliers = {}
    structures = len(cohort.rows) // max(len(cohort.results), 1)
    for place, row in enumerate(cohort.rows):
        name = cohort.results[place // structures].name
        first.setdefault(name, row)
        if row["qc_outlier"] not in (None, "none"):
            outliers[name, row["abbreviation"]] = row["qc_outlier"]
    # In the cohort's order, in which sub-2 stands before sub-10.
    groups = list(_by_folder(scan for scan in cohort.results if scan.folder))
    folders = ["", *(folder for folder, _ in groups), ""]
    written = []
    for (folder, scans), before, after in zip(groups, folders, folders[2:], strict=False):
        rows = {scan.name: first[scan.name] for scan in scans}
        age = cohort.design.age
        about = Surroundings(
            {scan: {name: row[name] for name in cohort.people} for scan, row in rows.items()},
            curves,
            {scan: number(row[age]) for scan, row in rows.items()} if age else {},
            outliers,
            True,
            before,
            after,
        )
        written.append(_write(out, folder, scans, about))
    return written


def _by_folder(scans: Iterable[ScanResult]) -> Iterable[tuple[str, list[ScanResult]]]:
    groups: dict[str, list[ScanResult]] = {}
    for scan in scans:
        groups.setdefault(scan.folder, []).append(scan)
    return groups.items()


def _write(out: Path, folder: str, scans: Sequence[ScanResult], about: Surroundings) -> Path:
    path = out / f"{folder}.html"
    linked = about.compared or (out / GROUP_PAGE).is_file()
    write_text(path, participant_page(folder, scans, _figures(out, folder), about, linked=linked))
    return path


def _figures(out: Path, folder: str) -> dict[tuple[str, str, str], str]:
    """Return the paths of figures, relative to the page, by scan, ``desc-`` and ``label-``."""
    found = {}
    for path in sorted((out / folder / "figures").glob("sub-*_dseg.svg")):
        name = path.name.partition("_seg-fdl")[0]
        values = parse_name(path.name)
        found[name, values.get("desc", ""), values.get("label", "")] = quote(
            f"{folder}/figures/{path.name}"
        )
    return found


def participant_page(
    folder: str,
    scans: Sequence[ScanResult],
    figures: Mapping[tuple[str, str, str], str],
    about: Surroundings | None = None,
    *,
    linked: bool = False,
) -> str:
    """Make the page of one participant.

    Parameters
    ----------
    folder
        The participant's, ``sub-01``.
    scans
        Its scans, one at least.
    figures
        Relative paths by scan name, ``desc-`` and ``label-``.
    about
        What is known beyond these.
    linked
        Whether there is a group page to go back to.

    Returns
    -------
    str
        HTML.
    """
    about = about or Surroundings()
    views = [_scan_view(scan, figures, about, alone=len(scans) == 1) for scan in scans]
    done = [scan for scan in scans if scan.measures]
    standard = any(view["registration"] for view in views)
    version = next((scan.provenance.get("app_version") for scan in done), None) or __version__
    paragraphs, references = _methods(str(version), registration=standard)
    return render(
        "participant",
        {"columns": RATING_COLUMNS, "file": f"{folder}_ratings.tsv"},
        title=folder,
        summary=_counts(scans),
        person=list(about.person().items())[:MOST_FACTS],
        scans=views,
        overview=_overview(done, scans),
        change=_change(done, figures) if len(done) > 1 else None,
        warnings=_mixtures(done),
        methods=paragraphs,
        references=references,
        grades=RATINGS,
        ratable=bool(done),
        cohort_page=GROUP_PAGE if linked else "",
        previous=quote(f"{about.previous}.html") if about.previous else "",
        next=quote(f"{about.next}.html") if about.next else "",
    )


def _counts(scans: Sequence[ScanResult]) -> str:
    done = [scan for scan in scans if scan.status == "ok"]
    flagged = sum(row["qc_flag"] not in ("ok", None) for scan in done for row in scan.measures)
    words = [f"{len(done)} of {len(scans)} scan{'s' * (len(scans) != 1)} segmented"]
    if done:
        words.append(
            f"{flagged} of {sum(len(scan.measures) for scan in done)} nuclei with flags"
            if flagged
            else "no flags"
        )
    return " · ".join(words)


def _mixtures(done: Sequence[ScanResult]) -> list[str]:
    found = []
    for key, words in (("app_version", "versions"), ("model_name", "models")):
        values = sorted({str(scan.provenance.get(key)) for scan in done})
        if len(values) > 1:
            found.append(
                f"These scans were done with different {words} ({', '.join(values)}): they are "
                "not to be compared with each other. Run all of them alike."
            )
    return found


def _titles(scan: ScanResult) -> tuple[str, str]:
    parts = scan.name.split("_")[1:]
    title = " ".join(parts) or "Scan"
    return title, title


def _row_id(scan: ScanResult, abbreviation: str) -> str:
    return f"{scan.name}_{abbreviation}"


def _verdict(row: Row) -> tuple[str, str]:
    if row["qc_flag"] in ("ok", None):
        return "fine", "no flag"
    if "empty" in row["qc_flag"]:
        return "alarm", "nothing found"
    return "care", "look at this"


def _confidence(row: Row) -> str:
    probability, confidence = row["qc_mean_probability"], row["confidence"]
    if confidence is not None and probability is not None:
        if "low_confidence" in (row["qc_flag"] or ""):
            word = "low"
        else:
            word = "high" if confidence >= HIGH_DICE else "moderate"
        return f"Confidence {word}: a Dice of {confidence:.2f} with the true nucleus is expected."
    if probability is None:
        return ""
    if probability >= HIGH_ABOVE:
        word = "high"
    elif probability >= MODERATE_ABOVE:
        word = "moderate"
    else:
        word = "low" if probability >= LOW_PROBABILITY_BELOW else "very low"
    return f"Confidence {word}: mean probability {probability:.2f} over the mask."


def _overview(done: Sequence[ScanResult], scans: Sequence[ScanResult]) -> Row | None:
    if not done:
        return None
    names = {row["abbreviation"]: row["name"] for scan in done for row in scan.measures}
    rows = []
    for abbreviation, name in names.items():
        cells: list[Row | None] = []
        for scan in scans:
            row = _measured(scan, abbreviation)
            if row is None:
                cells.append(None)
                continue
            tone, words = _verdict(row)
            cells.append({"id": _row_id(scan, abbreviation), "tone": tone, "words": words})
        rows.append({"name": name, "cells": cells})
    return {"scans": [_titles(scan)[0] for scan in scans], "rows": rows}


def _measured(scan: ScanResult, abbreviation: str) -> Row | None:
    return next((row for row in scan.measures if row["abbreviation"] == abbreviation), None)


def _scan_view(
    scan: ScanResult,
    figures: Mapping[tuple[str, str, str], str],
    about: Surroundings,
    *,
    alone: bool,
) -> Row:
    record = scan.record
    title, heading = _titles(scan)
    told = _mapping(record.get("Error"))
    error = None
    if scan.error is not None:
        error = {
            "cause": scan.error,
            "remedy": told.get("Remedy") if told.get("Cause") else "",
            "path": told.get("Path") if told.get("Cause") else "",
        }
    inputs = _inputs(record)
    return {
        "name": scan.name,
        "title": title,
        "heading": heading if not alone else "The scan" if heading == "Scan" else heading,
        "status": scan.status,
        "visit": list(about.visit(scan.name).items())[:MOST_FACTS],
        "error": error,
        "inputs": inputs,
        "absent": _absent(record) if scan.status == "ok" else "",
        "notes": [str(note) for note in _listed(record.get("Notes"))],
        "overview": _figure(
            figures,
            (scan.name, "overview", ""),
            f"{scan.name}: whole axial, coronal and sagittal cuts with the outlines of all masks",
        ),
        "measures": _measures(scan, about) if scan.measures else None,
        "nuclei": [_nucleus(scan, row, figures) for row in scan.measures],
        "registration": _registration(scan, figures),
        "origin": _origin(scan),
    }


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _inputs(record: Mapping[str, Any]) -> list[Row]:
    how = _mapping(record.get("Derivations"))
    rows = []
    for contrast, uris in _mapping(record.get("InputsUsed")).items():
        title, unit = CONTRASTS.get(contrast, (contrast, ""))
        derivation = str(how.get(contrast, ""))
        rows.append(
            {
                "title": title,
                "unit": unit,
                "target": contrast == record.get("Target"),
                "how": DERIVATIONS.get(derivation, derivation or "not recorded"),
                "files": [str(uri).removeprefix("bids:") for uri in _listed(uris)],
            }
        )
    return rows


def _absent(record: Mapping[str, Any]) -> str:
    used = _mapping(record.get("InputsUsed"))
    return ", ".join(title for name, (title, _) in CONTRASTS.items() if name not in used)


def _origin(scan: ScanResult) -> list[tuple[str, str]]:
    record = scan.record
    size = [f"{mm:.3g}" for mm in _listed(record.get("VoxelSize")) if isinstance(mm, int | float)]
    values = {
        "fdl-bidsapp": record.get("AppVersion"),
        "Model": record.get("ModelName"),
        "SHA-256 of the model": record.get("ModelSHA256"),
        "Segmented contrast": CONTRASTS.get(str(record.get("Target")), (record.get("Target"),))[0],
        "Voxel (mm)": " × ".join(size),
        "Brain volume (mm³)": f"{scan.brain_volume:.0f}" if scan.brain_volume else None,
        "Scanner": ", ".join(
            f"{value:g} T" if name == "field_strength" else str(value)
            for name in ("scanner_manufacturer", "scanner_model", "field_strength")
            if (value := scan.provenance.get(name))
        ),
    }
    return [(name, str(value)) for name, value in values.items() if value]


def _figure(
    figures: Mapping[tuple[str, str, str], str],
    key: tuple[str, str, str],
    alt: str,
    absent: str = "",
) -> Row:
    desc = key[1]
    path = figures.get(key, "")
    if not absent:
        absent = (
            f"The {desc} figure is not in the output folder. Figures are made when a scan is "
            "segmented: they are absent after an earlier version, or if they were deleted."
        )
    return {"path": path, "kind": desc, "alt": alt, "absent": absent, "caption": "", "width": 0}


def _nucleus(scan: ScanResult, row: Row, figures: Mapping[tuple[str, str, str], str]) -> Row:
    abbreviation, name = row["abbreviation"], row["name"]
    tone, words = _verdict(row)
    flags = [] if row["qc_flag"] in ("ok", None) else row["qc_flag"].split(";")
    empty = "There is nothing to be shown." if tone == "alarm" else ""
    volume = f", volume {_shown(row['volume'], 'volume')} mm³" if row["volume"] else ""
    summary = ", ".join(flags) or "no flag"
    return {
        "id": _row_id(scan, abbreviation),
        "name": name,
        "abbreviation": abbreviation,
        "tone": tone,
        "words": words,
        "confidence": _confidence(row),
        "flags": [ADVICE.get(flag, flag) for flag in flags],
        "overlay": _figure(
            figures,
            (scan.name, "overlay", abbreviation),
            f"{name}: outline of the mask on axial, coronal and sagittal cuts of each contrast, "
            f"and its probability{volume}, {summary}",
            empty,
        ),
        "histogram": _figure(
            figures,
            (scan.name, "histogram", abbreviation),
            f"{name}: histograms of QSM and R2* inside the mask and in its surround"
            + "".join(
                f"; {title} inside {_shown(row[f'{key}_mean'], key)} {unit}"
                for key, title, unit in _SHOWN[1:]
                if row[f"{key}_mean"] is not None
            ),
            empty
            or "There are no histograms: neither QSM nor R2* was found, or their figure "
            "is not in the output folder.",
        ),
    }


def _registration(scan: ScanResult, figures: Mapping[tuple[str, str, str], str]) -> Row | None:
    key = (scan.name, "registration", "")
    if key not in figures:
        return None
    alt = "The template and the registered scan in turn, with the outlines of the masks"
    return _figure(figures, key, alt) | {
        "space": "MNI152NLin2009aSym",
        "id": f"{scan.name}_registration",
    }


def _measures(scan: ScanResult, about: Surroundings) -> Row:
    ranges = _ranges(scan, about)
    columns = ["Volume (mm³)", *(["normal"] if "volume" in ranges else [])]
    for key, title, unit in _SHOWN[1:]:
        columns += [f"{title} mean ± SD ({unit})"]
        columns += ["normal"] if f"{key}_mean" in ranges else []
    columns += ["Asymmetry (%)", "Probability"]
    calibrated = any(row["confidence"] is not None for row in scan.measures)
    columns += ["Expected Dice"] if calibrated else []
    rows = []
    for row in scan.measures:
        far = about.outliers.get((scan.name, row["abbreviation"]), "")
        cells = []
        for measure, text in (
            ("volume", _shown(row["volume"], "volume")),
            *((f"{key}_mean", _mean_and_sd(row, key)) for key in ("qsm", "r2star")),
        ):
            normal = ranges.get(measure, {}).get(row["abbreviation"])
            value = row[measure]
            beyond = normal and value is not None and not normal[0] <= value <= normal[1]
            cells.append({"text": text, "out": bool(beyond) or measure in far.split(";")})
            if measure in ranges:
                key = measure.removesuffix("_mean")
                words = f"{_shown(normal[0], key)} – {_shown(normal[1], key)}" if normal else "n/a"
                cells.append({"text": words, "out": False})
        cells.append({"text": _asymmetry(scan, row), "out": False})
        for value in (row["qc_mean_probability"], row["confidence"])[: 1 + calibrated]:
            cells.append({"text": "n/a" if value is None else f"{value:.2f}", "out": False})
        rows.append({"name": row["name"], "cells": cells})
    return {"columns": columns, "rows": rows, "caption": _measures_caption(scan, ranges, about)}


def _ranges(scan: ScanResult, about: Surroundings) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the 5th and 95th percentile of controls of this age, by measure and structure."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    age = about.ages.get(scan.name)
    if age is None:
        return found
    for row in scan.measures:
        for measure in ("volume", "qsm_mean", "r2star_mean"):
            curve = about.curves.get((row["abbreviation"], measure))
            quantiles = curve.at(age) if curve else None
            if quantiles:
                found.setdefault(measure, {})[row["abbreviation"]] = (
                    quantiles["p05"],
                    quantiles["p95"],
                )
    return found


def _measures_caption(scan: ScanResult, ranges: Mapping[str, Any], about: Surroundings) -> str:
    age = about.ages.get(scan.name)
    far = "" if not about.compared else " Marked: outside of it, or far from the cohort's median."
    if ranges:
        n = min(curve.n for curve in about.curves.values())
        return (
            f"Normal: 5th to 95th percentile of this cohort's controls at age {age:g} "
            f"(n = {n} or more).{far}"
        )
    if not about.compared:
        return "The group level adds the cohort's normal range, where there are controls enough."
    if not about.curves:
        return f"No normal range: the cohort has fewer than 20 controls of known age.{far}"
    if age is None:
        return f"No normal range: the participant's age is not known.{far}"
    return f"No normal range: no control is as young or as old.{far}"


def _shown(value: float | None, key: str) -> str:
    if value is None:
        return "n/a"
    digits = {"volume": 0, "qsm": 3, "r2star": 1}[key]
    return f"{value:.{digits}f}".replace("-", "−")


def _mean_and_sd(row: Row, key: str) -> str:
    if row[f"{key}_mean"] is None:
        return "n/a"
    return f"{_shown(row[f'{key}_mean'], key)} ± {_shown(row[f'{key}_std'], key)}"


def _asymmetry(scan: ScanResult, row: Row) -> str:
    sides = {
        other["hemisphere"]: other["volume"]
        for other in scan.measures
        if other["structure"] == row["structure"]
    }
    left, right = sides.get("L"), sides.get("R")
    if left is None or right is None or left + right == 0:
        return "n/a"
    return f"{200 * (left - right) / (left + right):+.1f}".replace("-", "−")


def _change(done: Sequence[ScanResult], figures: Mapping[tuple[str, str, str], str]) -> Row:
    titles = [_titles(scan)[0] for scan in done]
    names = {row["abbreviation"]: row["name"] for scan in done for row in scan.measures}
    rows, nuclei = [], []
    for abbreviation, name in names.items():
        measured = [_measured(scan, abbreviation) for scan in done]
        for key, title, unit in _SHOWN:
            column = key if key == "volume" else f"{key}_mean"
            values = [row[column] if row else None for row in measured]
            if all(value is None for value in values):
                continue
            first, last = values[0], values[-1]
            difference = last - first if first is not None and last is not None else None
            share = 100 * difference / first if difference is not None and first else None
            rows.append(
                {
                    "name": name,
                    "measure": f"{title} ({unit})",
                    "cells": [
                        *(_shown(value, key) for value in values),
                        _signed(difference, key),
                        # A share of a susceptibility, whose zero is a convention, says nothing.
                        ""
                        if key == "qsm"
                        else "n/a"
                        if share is None
                        else _signed(share, "r2star"),
                    ],
                }
            )
        shown = [
            (title, _nucleus(scan, row, figures)["overlay"])
            for title, scan, row in zip(titles, done, measured, strict=True)
            if row
        ]
        nuclei.append({"name": name, "figures": shown})
    return {
        "first": titles[0],
        "last": titles[-1],
        "scans": titles,
        "rows": rows,
        "nuclei": nuclei,
    }


def _signed(value: float | None, key: str) -> str:
    if value is None:
        return "n/a"
    return ("+" if value > 0 else "") + _shown(value, key)


def _methods(version: str, *, registration: bool) -> tuple[list[str], list[str]]:
    """Return the paragraphs of the methods text with numbers in place of keys, and the works."""
    text = methods(version, registration=registration).partition("# References")[0]
    order: list[str] = []

    def numbers(match: re.Match[str]) -> str:
        keys = [key.strip().removeprefix("@") for key in match[1].split(";")]
        order.extend(key for key in keys if key not in order)
        return "[" + ", ".join(str(order.index(key) + 1) for key in keys) + "]"

    text = re.sub(r"\[(@[^\]]+)\]", numbers, text.replace("# Methods", ""))
    works = _works()
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    return paragraphs, [works.get(key, key) for key in order]


def _works() -> dict[str, str]:
    """Return each work of the bibliography as a line of text."""
    works = {}
    for key, body in re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", BIBLIOGRAPHY, re.MULTILINE | re.DOTALL):
        fields = {
            name: " ".join(value.replace("{", "").replace("}", "").split())
            for name, value in re.findall(
                r"^  (\w+) = \{(.*?)\},?$", body, re.MULTILINE | re.DOTALL
            )
        }
        authors = fields.get("author", "").replace(" and others", " et al")
        where = fields.get("journal") or fields.get("publisher", "")
        volume = fields.get("volume", "")
        if number_ := fields.get("number"):
            volume += f"({number_})"
        pages = fields.get("pages", "").replace("--", "–")
        place = ":".join(part for part in (volume, pages) if part)
        parts = [
            f"{authors}. {fields.get('title', key)}.",
            " ".join(part for part in (where, fields.get("year", "")) if part)
            + (f";{place}." if place else "."),
        ]
        if doi := fields.get("doi"):
            parts.append(f"https://doi.org/{doi}")
        elif eprint := fields.get("eprint"):
            parts.append(f"arXiv:{eprint}")
        works[key] = " ".join(parts)
    return works
