"""Tables in ``benchmarks/results`` from the cases of finished experiments."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from machine import machine

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.training.evaluate import MEAN
from fdl_bidsapp.training.experiment import (
    DIFFERENCE_COLUMNS,
    PUBLISHED_COLUMNS,
    RESULT_COLUMNS,
    add_published,
    aggregate,
    method_differences,
    read_cases,
)

RESULTS = Path(__file__).parent / "results"
METRICS = ("dice", "hd95")


def gather(
    name: str,
    files: Sequence[Path],
    axes: Sequence[str],
    command: str,
    published: Path | None = None,
    chosen: Mapping[str, Any] | None = None,
) -> None:
    """Write means and differences of methods over the cases of several experiments.

    Parameters
    ----------
    name
        Of the tables.
    files
        The experiments' ``cases.tsv``.
    axes
        Settings that vary.
    command
        What made them.
    published, chosen
        Table of published values, and which to show beside.
    """
    cases = [row for file in files for row in read_cases(file)]
    if not cases:
        return
    results = aggregate(cases, axes)
    if published is not None:
        add_published(results, published, chosen or {})
    made = made_by(command)
    group = tuple(axis for axis in axes if axis != "seed")
    _write(name, results, (*group, *RESULT_COLUMNS, *PUBLISHED_COLUMNS), made)
    columns = (*group, "reference_method", *DIFFERENCE_COLUMNS)
    _write(f"{name}_differences", method_differences(cases, axes), columns, made)


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
