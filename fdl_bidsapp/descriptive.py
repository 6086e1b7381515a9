"""Description of a cohort: summaries by group, and normal ranges by age. Nothing is tested."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fdl_bidsapp.errors import UsageError

Row = dict[str, Any]

MEASURES = {
    "volume": "mm^3",
    "volume_fraction": "1",
    "qsm_mean": "ppm",
    "r2star_mean": "1/s",
}
"""What is summarised, with its unit."""

FEWEST_CONTROLS = 20
"""Controls below which no normal range is given."""

QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}

SPAN = 0.75
"""Share of the controls that each point of a curve is fitted to."""

GRID_POINTS = 41

EVERYBODY = "all"
"""Name of the group that holds every participant."""

GROUP_COLUMNS = ("diagnosis", "group", "dx", "disease", "participant_group", "patient_group")
AGE_COLUMNS = ("age", "age_years", "age_at_scan", "participant_age")
CONTROL_VALUES = frozenset(
    {
        *("control", "controls", "healthy", "ctrl", "ctl", "con", "hc", "hv", "cn", "nc"),
        *("normal", "none", "healthy control", "healthy controls", "healthy_control"),
        *("healthy-control", "healthycontrol", "healthy volunteer", "cognitively normal"),
    }
)

SUMMARY_COLUMNS: dict[str, Row] = {
    "group": {"Description": f"Value of the grouping column; {EVERYBODY} for every participant"},
    "name": {"Description": "Name of the structure with its side"},
    "abbreviation": {"Description": "Abbreviation of the structure"},
    "measure": {"Description": "Column of group_morph.tsv that is summarised"},
    "unit": {"Description": "Unit of the measure"},
    "n": {
        "Description": "Participants with a value; each counts once, with the first scan that has "
        "one"
    },
    "mean": {"Description": "Mean"},
    "sd": {"Description": "Standard deviation (n - 1)"},
    "median": {"Description": "Median"},
    "min": {"Description": "Smallest value"},
    "max": {"Description": "Largest value"},
    "n_rated_bad": {"Description": "Scans left out because the structure was rated bad in them"},
}
NORM_COLUMNS: dict[str, Row] = {
    "abbreviation": {"Description": "Abbreviation of the structure"},
    "measure": {"Description": "Column of group_morph.tsv"},
    "unit": {"Description": "Unit of the measure"},
    "n_controls": {"Description": "Controls that the curve was fitted to"},
    "age": {"Description": "Age", "Units": "year"},
    **{
        name: {
            "Description": f"{share:.0%} of controls of this age lie below: LOESS of the value on "
            f"age (span {SPAN}), plus the quantile of the residuals over their LOESS spread"
        }
        for name, share in QUANTILES.items()
    },
}


@dataclass(frozen=True)
class Design:
    """Which columns of ``participants.tsv`` say what.

    Attributes
    ----------
    group
        Column by which participants are grouped; ``None`` without one.
    controls
        Its value that marks controls; ``None`` where there is none.
    age
        Column with the age in years; ``None`` without one.
    """

    group: str | None = None
    controls: str | None = None
    age: str | None = None


@dataclass(frozen=True)
class Curve:
    """How a measure of a structure depends on age in controls.

    Attributes
    ----------
    abbreviation, measure
        Structure and column.
    n
        Number of controls.
    age : (A,) array
        From the youngest control to the oldest, years.
    quantiles
        (A,) array for each of `QUANTILES`.
    """

    abbreviation: str
    measure: str
    n: int
    age: NDArray[np.float64]
    quantiles: Mapping[str, NDArray[np.float64]]

    def at(self, age: float) -> dict[str, float] | None:
        """Return the quantiles at an age; ``None`` outside of the controls' ages."""
        if not self.age[0] <= age <= self.age[-1]:
            return None
        return {
            name: float(np.interp(age, self.age, values)) for name, values in self.quantiles.items()
        }


def choose_design(
    rows: Sequence[Row], columns: Mapping[str, Row], controls: str | None = None
) -> Design:
    """Find the columns of group and age.

    Parameters
    ----------
    rows
        Of the cohort's table.
    columns
        Those of ``participants.tsv`` with their BIDS descriptions.
    controls
        ``COLUMN=VALUE`` that marks controls; without it, customary names are looked for.

    Raises
    ------
    UsageError
        `controls` names a column or a value that is not there.

    Examples
    --------
    >>> choose_design([{"dx": "PD", "age": 60}, {"dx": "HC", "age": 61}], {"dx": {}, "age": {}})
    Design(group='dx', controls='HC', age='age')
    """
    folded = {name.casefold(): name for name in columns}
    age = next((folded[name] for name in AGE_COLUMNS if name in folded), None)
    if controls is not None:
        column, _, value = controls.partition("=")
        if column not in columns:
            known = ", ".join(columns) or "none"
            raise UsageError(
                f"participants.tsv has no column '{column}'",
                f"name one of its columns in --controls: {known}",
            )
        values = sorted({str(row[column]) for row in rows if row.get(column) is not None})
        if value not in values:
            raise UsageError(
                f"nobody has the value '{value}' in the column {column} of participants.tsv",
                f"give one of its values in --controls: {', '.join(values[:20]) or 'none'}",
            )
        return Design(column, value, age)
    group = next((folded[name] for name in GROUP_COLUMNS if name in folded), None)
    if group is None:
        return Design(age=age)
    return Design(group, _control_value(rows, group, columns[group]), age)


def _control_value(rows: Sequence[Row], column: str, about: Row) -> str | None:
    values = dict.fromkeys(str(row[column]) for row in rows if row.get(column) is not None)
    levels = about.get("Levels")
    described = levels if isinstance(levels, dict) else {}
    for value in values:
        if {value.casefold(), str(described.get(value, "")).casefold()} & CONTROL_VALUES:
            return value
    return None


def number(value: object) -> float | None:
    """Read a cell of ``participants.tsv`` as a number, ``None`` if it is none.

    Examples
    --------
    >>> number("61.5"), number("89+"), number(None)
    (61.5, None, None)
    """
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return result if np.isfinite(result) else None


def once_each(rows: Iterable[Row], measure: str) -> list[Row]:
    """Keep one row for each participant and structure: the first that has a value.

    Structures that were rated bad are left out.
    """
    kept: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.get(measure) is not None and row.get("rating") != "bad":
            kept.setdefault((row["participant_id"], row["abbreviation"]), row)
    return list(kept.values())


def summarise(rows: Sequence[Row], design: Design) -> list[Row]:
    """Describe each measure by group and structure; see `SUMMARY_COLUMNS`.

    Examples
    --------
    >>> rows = [{"participant_id": f"sub-{k}", "abbreviation": "RNL", "name": "Red nucleus left",
    ...          "volume": 200 + 10 * k, "dx": "HC"} for k in range(3)]
    >>> everybody, controls = summarise(rows, Design("dx"))
    >>> [controls[key] for key in ("group", "n", "mean", "sd", "median", "min", "max")]
    ['HC', 3, 210, 10.0, 210, 200, 220]
    """
    names = {row["abbreviation"]: row["name"] for row in rows}
    groups: list[str] = []
    if design.group:
        found_groups = {str(row[design.group]) for row in rows if row.get(design.group)}
        groups = sorted(
            found_groups, key=lambda name: (name != design.controls, name.casefold(), name)
        )
    found = []
    for measure, unit in MEASURES.items():
        bad: dict[tuple[str, str], int] = defaultdict(int)
        values: dict[tuple[str, str], list[float]] = defaultdict(list)
        for row in rows:
            if row.get("rating") == "bad" and row.get(measure) is not None:
                for group in _groups(row, design):
                    bad[group, row["abbreviation"]] += 1
        for row in once_each(rows, measure):
            for group in _groups(row, design):
                values[group, row["abbreviation"]].append(row[measure])
        if not values:
            continue
        for group in [EVERYBODY, *groups]:
            for abbreviation, name in names.items():
                found.append(
                    {
                        "group": group,
                        "name": name,
                        "abbreviation": abbreviation,
                        "measure": measure,
                        "unit": unit,
                        **_described(values[group, abbreviation]),
                        "n_rated_bad": bad[group, abbreviation],
                    }
                )
    return found


def _groups(row: Row, design: Design) -> list[str]:
    own = row.get(design.group) if design.group else None
    return [EVERYBODY] if own is None else [EVERYBODY, str(own)]


def _described(values: Sequence[float]) -> Row:
    if not values:
        return {"n": 0}
    return {
        "n": len(values),
        "mean": mean(values),
        "sd": stdev(values) if len(values) > 1 else None,
        "median": median(values),
        "min": min(values),
        "max": max(values),
    }


def normal_curves(rows: Sequence[Row], design: Design) -> list[Curve]:
    """Fit each measure of each structure on age, in controls alone.

    Parameters
    ----------
    rows
        Of the cohort's table.
    design
        Which columns say who is a control, and how old.

    Returns
    -------
    list of Curve
        None for a structure and measure with fewer than `FEWEST_CONTROLS` controls.

    Notes
    -----
    The centre is a robust LOESS [1]_ of the value on age, and the spread the root of a LOESS of the
    squared residuals; the quantiles are those of the residuals over the spread. So they may fan out
    with age and cannot cross.

    .. [1] Cleveland WS, J Am Stat Assoc 1979;74:829-836.
    """
    if design.group is None or design.controls is None or design.age is None:
        return []
    curves = []
    for measure in MEASURES:
        known: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in once_each(rows, measure):
            age = number(row.get(design.age))
            if str(row.get(design.group)) == design.controls and age is not None:
                known[row["abbreviation"]].append((age, row[measure]))
        for abbreviation, pairs in known.items():
            if len(pairs) >= FEWEST_CONTROLS and len({age for age, _ in pairs}) > 1:
                ages, values = np.array(sorted(pairs)).T
                curves.append(
                    Curve(abbreviation, measure, len(pairs), *quantile_curves(ages, values))
                )
    return curves


def quantile_curves(
    ages: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Fit quantiles of values on age; see `normal_curves`.

    Parameters
    ----------
    ages, values : (N,) arrays
        Sorted by age, years; values in any unit.

    Returns
    -------
    age : (A,) array
        From the smallest to the largest.
    quantiles
        (A,) array for each of `QUANTILES`.
    """
    from statsmodels.nonparametric.smoothers_lowess import lowess

    grid = np.linspace(ages[0], ages[-1], GRID_POINTS)

    def smooth(of: NDArray[np.float64], robust: int) -> NDArray[np.float64]:
        # Where most controls are of one age, a local line has no slope, and lowess no value.
        with np.errstate(invalid="ignore", divide="ignore"):
            fitted = lowess(of, ages, frac=SPAN, it=robust, xvals=grid)
        return np.where(np.isfinite(fitted), fitted, np.median(of))

    centre = smooth(values, 3)
    residuals = values - np.interp(ages, grid, centre)
    floor = 0.25 * residuals.std() + np.finfo(float).tiny
    spread = np.sqrt(np.maximum(smooth(residuals**2, 0), floor**2))
    standard = residuals / np.interp(ages, grid, spread)
    return grid, {
        name: centre + spread * np.quantile(standard, share) for name, share in QUANTILES.items()
    }


def norm_rows(curves: Iterable[Curve]) -> list[Row]:
    """Put curves in the rows of a table; see `NORM_COLUMNS`."""
    return [
        {
            "abbreviation": curve.abbreviation,
            "measure": curve.measure,
            "unit": MEASURES[curve.measure],
            "n_controls": curve.n,
            "age": age,
            **{name: values[k] for name, values in curve.quantiles.items()},
        }
        for curve in curves
        for k, age in enumerate(curve.age)
    ]
