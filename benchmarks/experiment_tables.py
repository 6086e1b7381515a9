"""Tables in ``benchmarks/results`` from the cases of finished experiments."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from machine import machine

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.outputs import read_record, write_tsv
from fdl_bidsapp.training.evaluate import CASE_COLUMNS, MEAN
from fdl_bidsapp.training.experiment import (
    DIFFERENCE_COLUMNS,
    PUBLISHED_COLUMNS,
    RESULT_COLUMNS,
    Experiment,
    add_published,
    aggregate,
    method_differences,
    plain,
    read_cases,
    recorded,
)
from fdl_bidsapp.training.fit import read_toml

RESULTS = Path(__file__).parent / "results"
METRICS = ("dice", "hd95")
REFERENCES = {
    "msd_released": "msd_paper",
    "msd_strong_released": "msd_strong",
    "midbrain_released": "midbrain_paper",
    "midbrain_released_shifted": "midbrain_paper_shifted",
}
"""Tables of another spectrum, and those that have the same networks without a split."""


def read_grid(path: Path) -> dict[str, Any]:
    """Read the settings of a grid: what a file names as its ``base``, and on top what it changes.

    A table in the file changes the entries that it has; all else takes the place of the base's.
    """
    values = read_toml(path)
    if "base" not in values:
        return values
    merged = read_grid(path.with_name(values.pop("base")))
    for key, value in values.items():
        merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    return merged


def unfinished(experiment: Experiment, name: str) -> Experiment:
    """Leave out the runs whose cases are in the results already, made with the same settings."""
    known = {row["settings"] for row in _kept(name)}
    runs = [run for run in experiment.runs if _digest(recorded(run, experiment)) not in known]
    return replace(experiment, runs=tuple(runs))


def gather(
    name: str,
    output: Path,
    axes: Sequence[str],
    command: str,
    published: Path | None = None,
    chosen: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Add the runs of a folder to the kept cases; write means and differences of methods of all.

    The cases are kept so that an experiment can go on elsewhere.

    Parameters
    ----------
    name
        Of the tables.
    output
        Holds the finished runs, each in a folder of its own.
    axes
        Settings that vary.
    command
        What made them.
    published, chosen
        Table of published values, and which to show beside.
    """
    cases: list[dict[str, Any]] = list(_kept(name))
    known = {row["settings"] for row in cases}
    for file in sorted(output.glob("**/runs/*/cases.tsv")):
        record = read_record(file.with_name("settings.json"))
        digest = _digest(record)
        if digest not in known:
            given = {axis: plain(record["settings"][axis]) for axis in axes}
            cases += [{"settings": digest, **given, **row} for row in read_cases(file)]
    if not cases:
        return
    if name in REFERENCES:
        cases += _without_split(REFERENCES[name], cases, axes)
    # Means are of what is kept, so that gathering again, elsewhere, gives the same.
    cases = _rounded(cases)
    columns = ("settings", *axes, *CASE_COLUMNS)
    write_tsv(RESULTS / f"{name}_cases.tsv", cases, columns)
    results = aggregate(cases, axes)
    if published is not None:
        add_published(results, published, chosen)
        command += f" --published {published.name}"
    made = made_by(command)
    group = tuple(axis for axis in axes if axis != "seed")
    _write(name, results, (*group, *RESULT_COLUMNS, *PUBLISHED_COLUMNS), made)
    columns = (*group, "reference_method", *DIFFERENCE_COLUMNS)
    _write(f"{name}_differences", method_differences(cases, axes), columns, made)


def _without_split(
    name: str, cases: Sequence[Mapping[str, Any]], axes: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the cases without a split, of the tasks and seeds that the cases are of."""
    others = [axis for axis in axes if axis != "method"]
    known = {row["settings"] for row in cases}
    points = {tuple(str(row[axis]) for axis in others) for row in cases}
    return [
        row
        for row in _kept(name)
        if row["method"] == "none"
        and row["settings"] not in known
        and tuple(str(row[axis]) for axis in others) in points
    ]


def _kept(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}_cases.tsv"
    return read_cases(path) if path.exists() else []


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def _rounded(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]


def made_by(command: str) -> dict[str, str]:
    """Return the columns that say where figures are from."""
    return {
        "command": command,
        "versions": f"torch {torch.__version__}, fdl-bidsapp {__version__}",
        "machine": machine(),
    }


def _write(
    name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], made: Mapping[str, str]
) -> None:
    kept = [{**row, **made} for row in rows if row["metric"] in METRICS or row["structure"] == MEAN]
    write_tsv(RESULTS / f"{name}.tsv", kept, (*columns, *made))
