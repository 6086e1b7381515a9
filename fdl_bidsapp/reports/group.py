"""The page of the cohort: one file with its data, plots and tables."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from fdl_bidsapp.bids.outputs import write_text
from fdl_bidsapp.cohort import (
    OUTLIER_ABOVE,
    OUTLIER_MEASURES,
    OUTLIER_SCANS,
    RATINGS,
    Cohort,
    ScanResult,
    modified_z,
)
from fdl_bidsapp.descriptive import FEWEST_CONTROLS, Design, number, summarise
from fdl_bidsapp.reports.page import render
from fdl_bidsapp.reports.palette import CONTRASTS, OKABE_ITO
from fdl_bidsapp.reports.participant import GROUP_PAGE

Row = dict[str, Any]

MEASURES = {
    "volume": ("Volume", "mm³", 0),
    "qsm_mean": ("QSM mean", "ppm", 4),
    "r2star_mean": ("R2* mean", "1/s", 1),
    "qsm_median": ("QSM median", "ppm", 4),
    "r2star_median": ("R2* median", "1/s", 1),
    "volume_fraction": ("Volume fraction", "of the brain", 6),
    "confidence": ("Confidence", "expected Dice", 2),
    "qc_mean_probability": ("Mean probability", "", 2),
    "qc_contrast": ("Contrast", "SD of the surround", 1),
}
"""What can be plotted: title, unit, digits."""

MAY_DIFFER = (
    *("app_version", "model_name", "target"),
    *("field_strength", "scanner_manufacturer", "scanner_model"),
)
"""Columns that are shown where the scans differ in them."""

MOST_GROUPS = 12
"""Values of a column up to which it can group the plots."""

LONGEST_TEXT = 200
COLUMN_BYTES = 4_000_000
"""Room for the columns of ``participants.tsv``, so that the page stays light."""

SUMMARY_ROWS = 400
FAILURES_NAMED = 200


def write_group_page(out: Path, cohort: Cohort) -> Path:
    """Write ``group_morph.html``.

    Parameters
    ----------
    out
        The output folder.
    cohort
        From :func:`fdl_bidsapp.cohort.collect`.

    Returns
    -------
    Path
        The page.
    """
    path = out / GROUP_PAGE
    write_text(path, group_page(cohort, _dataset_name(out)))
    return path


def _dataset_name(out: Path) -> str:
    try:
        description = json.loads((out / "dataset_description.json").read_text("utf-8"))
        return str(description["Name"])
    except (OSError, ValueError, KeyError, TypeError):
        return "Deep nuclei"


def group_page(cohort: Cohort, title: str = "Deep nuclei") -> str:
    """Make the page of a cohort.

    Parameters
    ----------
    cohort
        From :func:`fdl_bidsapp.cohort.collect`.
    title
        Name of the dataset.

    Returns
    -------
    str
        HTML.
    """
    structures = len(cohort.rows) // max(len(cohort.results), 1)
    done = [scan for scan in cohort.results if scan.status == "ok"]
    outliers = _outliers(cohort)
    columns, left_out = _columns(cohort, structures)
    curves = [
        {
            "abbreviation": curve.abbreviation,
            "measure": curve.measure,
            "n": curve.n,
            "age": [_short(age) for age in curve.age],
            **{name: [_short(value) for value in line] for name, line in curve.quantiles.items()},
        }
        for curve in cohort.curves
    ]
    rated = "rating" in cohort.columns
    data = {
        "palette": OKABE_ITO,
        "nuclei": [
            {
                "abbreviation": row["abbreviation"],
                "name": row["name"],
                "structure": row["structure"],
                "side": row["hemisphere"],
            }
            for row in cohort.rows[:structures]
        ],
        "scans": {
            "name": [scan.name for scan in cohort.results],
            "page": [_page(scan) for scan in cohort.results],
        },
        "columns": columns,
        "measures": [
            {"key": key, "title": name, "unit": unit, "digits": digits}
            for key, (name, unit, digits) in MEASURES.items()
            if key == "volume" or any(row[key] is not None for row in cohort.rows)
        ],
        "values": {
            key: [_short(row[key]) for row in cohort.rows]
            for key in MEASURES
            if key == "volume" or any(row[key] is not None for row in cohort.rows)
        },
        "flags": _coded([row["qc_flag"] for row in cohort.rows]),
        "ratings": _coded([row["rating"] for row in cohort.rows], RATINGS) if rated else None,
        "outliers": outliers,
        "design": {"group": cohort.design.group, "age": cohort.design.age},
        "curves": curves,
    }
    summaries = _summaries(cohort)
    return render(
        "group",
        data,
        title=title,
        summary=_headline(cohort, done),
        warnings=[warning[:1].upper() + warning[1:] for warning in cohort.warnings],
        remarks=_remarks(cohort, left_out),
        facts=_facts(cohort, done, outliers),
        contrasts=_contrasts(done),
        makers=_makers(done),
        design=cohort.design,
        norms=_norm_words(cohort),
        outlier_words=_outlier_words(cohort, done),
        summaries=summaries[:SUMMARY_ROWS],
        summaries_left_out=max(0, len(summaries) - SUMMARY_ROWS),
        summary_words=_summary_words(cohort),
        failures=_failures(cohort.results),
        failures_words=f"{len(cohort.results) - len(done)} of {len(cohort.results)} scans",
    )


def _page(scan: ScanResult) -> str:
    return quote(f"{scan.folder}.html") if scan.folder else ""


def _short(value: float | None) -> float | int | None:
    if value is None:
        return None
    short = float(f"{value:.5g}")
    return int(short) if short.is_integer() else short


def _coded(values: Sequence[str | None], levels: Sequence[str] = ()) -> Row:
    """Replace each text by its place in a list, -1 for none."""
    place = {level: k for k, level in enumerate(levels)}
    codes = [-1 if value is None else place.setdefault(value, len(place)) for value in values]
    return {"levels": list(place), "codes": codes}


def _columns(cohort: Cohort, structures: int) -> tuple[list[Row], list[str]]:
    """Return what is known of each scan, and the names of columns for which there is no room."""
    first = cohort.rows[:: max(structures, 1)]
    own = [
        name
        for name in ("participant_id", "session_id", "acquisition", "run")
        if name == "participant_id" or any(row[name] is not None for row in first)
    ]
    titles = {"participant_id": "Participant", "session_id": "Session"}
    mixed = [
        name
        for name in MAY_DIFFER
        if len({row[name] for row in first if row[name] is not None}) > 1
    ]
    columns, left_out, room = [], [], COLUMN_BYTES
    for name in (*own, "status", *cohort.people, *mixed):
        column = _column(name, [row[name] for row in first], cohort.design)
        given = name in cohort.people
        column["title"] = name if given else titles.get(name, name.replace("_", " ").capitalize())
        column["table"] = name != "participant_id"
        if given:
            room -= len(json.dumps(column))
            if room < 0:
                left_out.append(name)
                continue
        columns.append(column)
    return columns, left_out


def _column(name: str, values: Sequence[Any], design: Design) -> Row:
    numbers = {number(value) for value in values if value is not None}
    # A few numbers that come again and again are codes of groups.
    many = len(numbers) > min(MOST_GROUPS // 2, len(values) / 2)
    if name == design.age or (many and numbers and None not in numbers):
        shown = [None if value is None else _short(number(value)) for value in values]
        digits = max((len(str(value).partition(".")[2]) for value in shown if value), default=0)
        return {"key": name, "numbers": shown, "digits": min(digits, 3), "groups": False}
    texts = [None if value is None else _cut(str(value)) for value in values]
    levels = sorted(
        {text for text in texts if text is not None},
        key=lambda text: (name == design.group and text != design.controls, text.casefold()),
    )
    column = {"key": name, **_coded(texts, levels)}
    column["groups"] = name != "participant_id" and 1 <= len(levels) <= MOST_GROUPS
    return column


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _outliers(cohort: Cohort) -> list[Row]:
    """Return values far from the cohort's, the furthest first."""
    by_structure: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(cohort.rows):
        if row["status"] == "ok":
            by_structure[row["abbreviation"]].append(place)
    found = []
    for places in by_structure.values():
        for measure in OUTLIER_MEASURES:
            known = [place for place in places if cohort.rows[place][measure] is not None]
            if len(known) < OUTLIER_SCANS:
                continue
            values = [cohort.rows[place][measure] for place in known]
            middle = _short(median(values))
            found += [
                {"row": place, "measure": measure, "z": round(z, 2), "median": middle}
                for place, z in zip(known, modified_z(values), strict=True)
                if abs(z) > OUTLIER_ABOVE
            ]
    return sorted(found, key=lambda one: -abs(one["z"]))


def _headline(cohort: Cohort, done: Sequence[ScanResult]) -> str:
    people = len({row["participant_id"] for row in cohort.rows})
    scans = len(cohort.results)
    return (
        f"{scans} scan{'s' * (scans != 1)} of {people} participant{'s' * (people != 1)} · "
        f"{len(done)} segmented"
    )


def _remarks(cohort: Cohort, left_out: Sequence[str]) -> list[str]:
    found = []
    if not cohort.people:
        found.append("No participants.tsv was joined: there is nothing to group by or age to see.")
    elif cohort.design.group is None:
        found.append(
            "participants.tsv has no column that is called diagnosis or group: choose one under "
            "“Group by”."
        )
    if left_out:
        found.append(
            "Left out of this page, which would be too large: the columns "
            f"{', '.join(left_out)}. They are in group_morph.tsv."
        )
    return found


def _facts(
    cohort: Cohort, done: Sequence[ScanResult], outliers: Sequence[Row]
) -> list[tuple[str, str, str]]:
    status = cohort.scans
    rows = [row for row in cohort.rows if row["status"] == "ok"]
    flagged = sum(row["qc_flag"] not in ("ok", None) for row in rows)
    facts = [
        ("Segmented", f"{len(done)} of {len(cohort.results)}", ""),
        ("Failed", str(status.get("failed", 0)), "alarm" if status.get("failed") else ""),
        (
            "Without input",
            str(status.get("missing_input", 0)),
            "alarm" if status.get("missing_input") else "",
        ),
        ("Nuclei with flags", f"{flagged} of {len(rows)}", "care" if flagged else ""),
        (
            "Outliers",
            str(len({one["row"] for one in outliers})) if len(done) >= OUTLIER_SCANS else "n/a",
            "care" if outliers else "",
        ),
    ]
    if "rating" in cohort.columns:
        grades = Counter(row["rating"] for row in rows)
        words = ", ".join(f"{grades[grade]} {grade}" for grade in RATINGS)
        facts.append(("Ratings", words, "alarm" if grades["bad"] else ""))
    return facts


def _contrasts(done: Sequence[ScanResult]) -> list[Row]:
    used = Counter(
        name for scan in done for name in _mapping(scan.record.get("InputsUsed")) if name
    )
    targets = Counter(str(scan.provenance.get("target")) for scan in done)
    return [
        {"title": title, "found": used[name], "of": len(done), "target": targets[name]}
        for name, (title, _) in CONTRASTS.items()
    ]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _makers(done: Sequence[ScanResult]) -> list[Row]:
    counts = Counter(
        tuple(
            str(scan.provenance.get(key) or "not recorded")
            for key in ("app_version", "model_name", "model_sha256")
        )
        for scan in done
    )
    return [
        {"version": version, "model": model, "sha": sha[:12], "scans": scans}
        for (version, model, sha), scans in counts.most_common()
    ]


def _norm_words(cohort: Cohort) -> str:
    design = cohort.design
    if cohort.curves:
        numbers = sorted({curve.n for curve in cohort.curves})
        n = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        return (
            f"Grey: 5th, 25th, 75th and 95th percentile and median by age of controls "
            f"({design.group} = {design.controls}, n = {n}), by LOESS; see group_norms.tsv."
        )
    if design.age is None:
        return "No normal range by age: participants.tsv has no column age."
    if design.controls is None:
        return "No normal range: no controls are known. Name them with --controls COLUMN=VALUE."
    return (
        f"No normal range: it takes {FEWEST_CONTROLS} controls ({design.group} = "
        f"{design.controls}) of known age."
    )


def _outlier_words(cohort: Cohort, done: Sequence[ScanResult]) -> str:
    if len(done) < OUTLIER_SCANS:
        return f"Outliers are looked for in {OUTLIER_SCANS} scans or more; there are {len(done)}."
    return (
        "Values with a robust z-score (from median and median absolute deviation of the cohort, "
        f"by nucleus) beyond ±{OUTLIER_ABOVE}. A link opens the nucleus on the participant's page."
    )


def _summary_words(cohort: Cohort) -> str:
    words = (
        "Of all participants, whatever is selected above; each counts once, with the first scan "
        "that has a value. The same is in group_summary.tsv."
    )
    if "rating" in cohort.columns:
        words += " Nuclei rated bad are left out."
    return words


def _summaries(cohort: Cohort) -> list[Row]:
    found = []
    for row in summarise(cohort.rows, cohort.design):
        title, unit, digits = MEASURES[row["measure"]]
        if not row["n"]:
            continue

        def shown(value: float | None, digits: int = digits) -> str:
            return "n/a" if value is None else f"{value:.{digits}f}".replace("-", "−")

        found.append(
            {
                "measure": f"{title} ({unit})",
                "name": row["name"],
                "group": row["group"],
                "n": row["n"],
                "mean": shown(row["mean"]),
                "sd": shown(row["sd"]),
                "median": shown(row["median"]),
                "range": f"{shown(row['min'])} to {shown(row['max'])}",
            }
        )
    return found


def _failures(scans: Iterable[ScanResult]) -> list[Row]:
    """Return reasons with their scans, the most frequent first."""
    reasons: dict[str, list[ScanResult]] = defaultdict(list)
    for scan in scans:
        if scan.status != "ok":
            reasons[scan.error or "not recorded"].append(scan)
    return [
        {
            "reason": reason,
            "scans": [
                {"name": scan.name, "page": _page(scan)} for scan in concerned[:FAILURES_NAMED]
            ],
            "more": max(0, len(concerned) - FAILURES_NAMED),
        }
        for reason, concerned in sorted(reasons.items(), key=lambda item: -len(item[1]))
    ]
