"""Run the grids on the MSD hippocampus crops, and put their results into ``benchmarks/results``.

    python benchmarks/msd_hippocampus/run.py TABLES OUT [--grids strong paper released] \
        [--folds 3] [--jobs 2] [--max-minutes 60]

``TABLES`` is from ``tables.py``. Fold by fold, each grid is trained on the training participants
outside the fold, with the fold's number as the seed, and measured on the participants of the fold:
the validation crops only choose the weights where a recipe chooses. Run again, it goes on. The
results are those of the runs that are done.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from machine import machine

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.training.evaluate import CASE_COLUMNS, MEAN
from fdl_bidsapp.training.experiment import (
    DIFFERENCE_COLUMNS,
    PUBLISHED_COLUMNS,
    RESULT_COLUMNS,
    add_published,
    aggregate,
    make_experiment,
    method_differences,
    read_cases,
    run_experiment,
)
from fdl_bidsapp.training.fit import read_toml

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
METRICS = ("dice", "hd95")


def main() -> None:
    """Run the grids, fold by fold, and gather them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--grids", nargs="+", default=["strong", "paper", "released"])
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--max-minutes", type=float, default=float("inf"))
    parser.add_argument("--published", type=Path, help="table of published values")
    options = parser.parse_args()

    started = time.monotonic()
    for fold in range(options.folds):
        for grid in options.grids:
            left = options.max_minutes - (time.monotonic() - started) / 60
            values = read_toml(HERE / f"{grid}.toml")
            values["table"] = str(options.tables / f"fold-{fold}.tsv")
            values["grid"]["seed"] = [fold]
            run_experiment(
                make_experiment(values),
                options.out / grid / f"fold-{fold}",
                jobs=options.jobs,
                max_minutes=max(left, 0),
                progress=lambda line, fold=fold, grid=grid: print(f"{grid}, fold {fold}: {line}"),
            )
    for grid in options.grids:
        gather(grid, options.out / grid, options.published)


def gather(grid: str, folder: Path, published: Path | None) -> None:
    """Put the means and differences over all folds beside the published values."""
    values = read_toml(HERE / f"{grid}.toml")
    axes = tuple(dict.fromkeys([*values["grid"], "seed"]))
    cases: list[dict[str, Any]] = []
    for file in sorted(folder.glob("fold-*/cases.tsv")):
        cases += read_cases(file)
    if not cases:
        return
    results = aggregate(cases, axes)
    if published is not None:
        add_published(results, published, values.get("published", {}))
    made = {
        "command": f"python benchmarks/msd_hippocampus/run.py TABLES OUT --grids {grid}",
        "versions": f"torch {torch.__version__}, fdl-bidsapp {__version__}",
        "machine": machine(),
    }
    group = tuple(axis for axis in axes if axis != "seed")
    columns = (*group, *RESULT_COLUMNS, *PUBLISHED_COLUMNS)
    write(f"msd_{grid}", results, columns, made)
    columns = (*group, "reference_method", *DIFFERENCE_COLUMNS)
    write(f"msd_{grid}_differences", method_differences(cases, axes), columns, made)
    write_tsv(folder / "cases.tsv", cases, (*axes, *CASE_COLUMNS))


def write(
    name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], made: Mapping[str, str]
) -> None:
    """Write one table of results."""
    kept = [{**row, **made} for row in rows if row["metric"] in METRICS or row["structure"] == MEAN]
    write_tsv(RESULTS / f"{name}.tsv", kept, (*columns, *made))


if __name__ == "__main__":
    main()
