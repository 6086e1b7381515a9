"""Figures of a cohort for papers: the plots of the group page at print size, as SVG and PNG."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fdl_bidsapp.bids.inputs import read_json
from fdl_bidsapp.bids.outputs import atomic_write
from fdl_bidsapp.descriptive import Curve, Design, choose_design, normal_curves, number
from fdl_bidsapp.errors import DataError, InputMissingError, UsageError
from fdl_bidsapp.reports.group import MEASURES
from fdl_bidsapp.reports.palette import OKABE_ITO
from fdl_bidsapp.settings import PAPER_MEASURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

WIDTH_MM = 180
"""Two columns of most journals."""

PANEL_MM = 52
DOTS_PER_INCH = 300
MARKERS = "os^Dv*X"

_STYLE: Any = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    # Text stays text, to be edited; and a figure made again has the same bytes.
    "svg.fonttype": "none",
    "svg.hashsalt": "fdl-bidsapp",
}


def read_table(path: Path) -> tuple[list[Row], dict[str, Row]]:
    """Read ``group_morph.tsv``.

    Parameters
    ----------
    path
        The table; its JSON dictionary is read too, where there is one.

    Returns
    -------
    rows
        Measures as numbers, ``None`` for n/a.
    people
        The columns that come from ``participants.tsv``, with their descriptions.

    Raises
    ------
    InputMissingError, DataError
        The table is absent, or is not one.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows = [dict(row) for row in reader]
            columns = list(reader.fieldnames or ())
    except FileNotFoundError:
        raise InputMissingError(
            "there is no table of a cohort", "run the group level first", path=path
        ) from None
    except (OSError, ValueError, csv.Error) as problem:
        told = " ".join(str(problem).split())
        raise DataError(
            f"the table cannot be read ({told})", "run the group level again", path=path
        ) from None
    needed = ("participant_id", "abbreviation", "name", "structure", "hemisphere", "error")
    if not set(needed) <= set(columns):
        raise DataError("this is no table of a cohort", "run the group level again", path=path)
    for row in rows:
        for name in columns:
            value = None if row[name] in (None, "", "n/a") else row[name]
            row[name] = number(value) if name in MEASURES else value
    try:
        described = read_json(path.with_suffix(".json"))
    except (OSError, ValueError):
        described = {}
    own = columns[columns.index("error") + 1 :]
    return rows, {name: described.get(name) or {} for name in own}


def write_figures(
    table: Path,
    folder: Path,
    *,
    measures: Sequence[str] = PAPER_MEASURES,
    by: str | None = None,
    controls: str | None = None,
) -> list[Path]:
    """Draw a cohort's figures.

    Parameters
    ----------
    table
        ``group_morph.tsv``.
    folder
        Where the figures go.
    measures
        Columns to draw by group, against age, and left against right.
    by
        Column that groups; that of the diagnosis by default, where there is one.
    controls
        ``COLUMN=VALUE`` that marks controls.

    Returns
    -------
    list of Path
        An SVG and a PNG of each figure; what the table has no values for is not drawn.

    Raises
    ------
    InputMissingError, DataError
        See `read_table`; also where there is nothing to draw.
    UsageError
        A column is not there.
    OutputError, StorageError
        A file cannot be written.
    """
    import matplotlib as mpl

    rows, people = read_table(table)
    if by is not None and by not in people:
        known = ", ".join(people) or "none"
        raise UsageError(f"the table has no column '{by}'", f"name one of its columns: {known}")
    design = choose_design(rows, people, controls)
    rows = [row for row in rows if row.get("rating") != "bad"]
    curves = {(curve.abbreviation, curve.measure): curve for curve in normal_curves(rows, design)}
    plots = _Plots(rows, by or design.group, design, curves)
    written = []
    with mpl.rc_context(_STYLE):
        for name, figure in plots.all(measures):
            written += _save(figure, folder / name)
    if not written:
        raise DataError("the table has no values to draw", "see the column error in it", path=table)
    return written


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = []
    for extension, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        path = stem.with_name(f"{stem.name}.{extension}")
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=extension, dpi=DOTS_PER_INCH, metadata=metadata)
        paths.append(path)
    return paths


class _Plots:
    """The figures of one table."""

    def __init__(
        self,
        rows: Sequence[Row],
        by: str | None,
        design: Design,
        curves: Mapping[tuple[str, str], Curve],
    ) -> None:
        self.rows = rows
        self.by = by
        self.design = design
        self.curves = curves
        self.names = {row["abbreviation"]: row["name"] for row in rows}
        found = {str(row[by]) for row in rows if by and row[by] is not None}
        self.groups = sorted(
            found, key=lambda name: (name != design.controls, name.casefold(), name)
        ) or [""]
        self.styles = {
            name: (OKABE_ITO[k % len(OKABE_ITO)], MARKERS[k % len(MARKERS)])
            for k, name in enumerate(self.groups)
        }

    def all(self, measures: Sequence[str]) -> Iterable[tuple[str, Figure]]:
        """Yield each figure that has values, with its name."""
        for measure in measures:
            if not any(row.get(measure) is not None for row in self.rows):
                continue
            yield f"groups_{measure}", self._grid(self.names, self._strip, measure)
            if self.design.age and any(number(row[self.design.age]) for row in self.rows):
                yield f"age_{measure}", self._grid(self.names, self._against_age, measure)
            pairs = self._pairs()
            if pairs:
                yield f"sides_{measure}", self._grid(pairs, self._sides, measure)
        if any(
            row.get("qsm_mean") is not None and row.get("r2star_mean") is not None
            for row in self.rows
        ):
            yield "qsm_r2star", self._grid(self.names, self._iron, "qsm_mean")

    def _pairs(self) -> dict[str, str]:
        sides: dict[str, set[str]] = {}
        for row in self.rows:
            sides.setdefault(row["structure"], set()).add(row["hemisphere"])
        return {
            structure: structure.replace("_", " ").capitalize()
            for structure, found in sides.items()
            if {"L", "R"} <= found
        }

    def _grid(
        self,
        panels: Mapping[str, str],
        draw: Callable[[Axes, str, str], None],
        measure: str,
    ) -> Figure:
        from matplotlib.figure import Figure

        across = min(len(panels), 4)
        down = -(-len(panels) // across)
        millimetre = 1 / 25.4
        size = (WIDTH_MM * across / 4 * millimetre, (PANEL_MM * down + 8) * millimetre)
        figure = Figure(figsize=size, layout="constrained")
        axes = np.atleast_1d(figure.subplots(down, across)).ravel()
        for place, (key, title) in zip(axes, panels.items(), strict=False):
            draw(place, key, measure)
            place.set_title(title)
        for place in axes[len(panels) :]:
            place.set_axis_off()
        if draw != self._strip and self.groups != [""]:
            from matplotlib.lines import Line2D

            handles = [
                Line2D([], [], color=colour, marker=marker, ls="", markersize=3, label=_text(name))
                for name, (colour, marker) in self.styles.items()
            ]
            figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        return figure

    def _of(self, abbreviation: str, group: str) -> list[Row]:
        return [
            row
            for row in self.rows
            if row["abbreviation"] == abbreviation and (not self.by or str(row[self.by]) == group)
        ]

    def _strip(self, axes: Axes, abbreviation: str, measure: str) -> None:
        spread = np.random.default_rng(0)
        boxes = []
        for place, group in enumerate(self.groups):
            rows = self._of(abbreviation, group)
            values = [row[measure] for row in rows if row[measure] is not None]
            boxes.append(values)
            colour, marker = self.styles[group]
            beside = place + spread.uniform(-0.2, 0.2, len(values))
            axes.scatter(beside, values, s=4, color=colour, marker=marker, alpha=0.5, linewidth=0)
        axes.boxplot(
            boxes,
            positions=range(len(boxes)),
            widths=0.5,
            showfliers=False,
            medianprops={"color": "black", "linewidth": 1.4},
            boxprops={"linewidth": 0.8},
            whiskerprops={"linewidth": 0.8},
            capprops={"linewidth": 0},
        )
        axes.set_xticks(
            range(len(boxes)),
            [f"{_text(name)} ({len(v)})" for name, v in zip(self.groups, boxes, strict=True)],
            rotation=35 if len(boxes) > 2 else 0,
            ha="right" if len(boxes) > 2 else "center",
            rotation_mode="anchor",
        )
        axes.set_ylabel(_title(measure))

    def _against_age(self, axes: Axes, abbreviation: str, measure: str) -> None:
        assert self.design.age is not None
        age = self.design.age
        self._points(axes, abbreviation, lambda row: number(row[age]), lambda row: row[measure])
        for group in self.groups:
            scans: dict[str, list[tuple[float, float]]] = {}
            for row in self._of(abbreviation, group):
                years = number(row[age])
                if years is not None and row[measure] is not None:
                    scans.setdefault(row["participant_id"], []).append((years, row[measure]))
            for points in scans.values():
                if len({years for years, _ in points}) > 1:
                    colour, _ = self.styles[group]
                    axes.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=0.5)
        if curve := self.curves.get((abbreviation, measure)):
            lines = curve.quantiles
            axes.fill_between(curve.age, lines["p25"], lines["p75"], color="0.85", zorder=0)
            axes.plot(curve.age, lines["p50"], color="black", linewidth=1)
            for name in ("p05", "p95"):
                axes.plot(curve.age, lines[name], color="black", linewidth=0.7, linestyle="--")
        axes.set_xlabel("Age (years)")
        axes.set_ylabel(_title(measure))

    def _sides(self, axes: Axes, structure: str, measure: str) -> None:
        scan = ("participant_id", "session_id", "acquisition", "run")
        right = {
            tuple(row.get(name) for name in scan): row[measure]
            for row in self.rows
            if row["structure"] == structure and row["hemisphere"] == "R"
        }
        left = next(
            row["abbreviation"]
            for row in self.rows
            if row["structure"] == structure and row["hemisphere"] == "L"
        )
        self._points(
            axes,
            left,
            lambda row: row[measure],
            lambda row: right.get(tuple(row.get(name) for name in scan)),
        )
        low = min(axes.get_xlim()[0], axes.get_ylim()[0])
        high = max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot((low, high), (low, high), color="black", linewidth=0.6, linestyle="--")
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_xlabel(f"Left, {_title(measure)}")
        axes.set_ylabel(f"Right, {_title(measure)}")

    def _iron(self, axes: Axes, abbreviation: str, measure: str) -> None:
        self._points(axes, abbreviation, lambda row: row["r2star_mean"], lambda row: row[measure])
        axes.set_xlabel(_title("r2star_mean"))
        axes.set_ylabel(_title(measure))

    def _points(
        self,
        axes: Axes,
        abbreviation: str,
        x: Callable[[Row], float | None],
        y: Callable[[Row], float | None],
    ) -> None:
        for group in self.groups:
            pairs = [(x(row), y(row)) for row in self._of(abbreviation, group)]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            colour, marker = self.styles[group]
            if known:
                across, up = zip(*known, strict=True)
                axes.scatter(
                    across,
                    up,
                    s=5,
                    color=colour,
                    marker=marker,
                    alpha=0.6,
                    linewidth=0,
                )
        axes.autoscale_view()


def _text(name: str) -> str:
    """Keep Matplotlib from taking dollar signs for formulas."""
    return name.replace("$", r"\$")


def _title(measure: str) -> str:
    title, unit, _ = MEASURES[measure]
    return f"{title} ({unit})" if unit else title
