"""Run the grids on the MSD hippocampus crops, and put their results into ``benchmarks/results``.

    python benchmarks/msd_hippocampus/run.py TABLES OUT [--grids paper paper-all …] \
        [--folds 3] [--jobs 2] [--max-minutes 60]

``TABLES`` is from ``tables.py``. Fold by fold, each grid is trained on the training participants
outside the fold, with the fold's number as the seed, and measured on the participants of the fold:
the validation crops only choose the weights where a recipe chooses. Run again, it goes on, also on
another machine: runs whose cases are in the results are not done again. The results are those of
the runs that are done.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiment_tables import gather, read_grid, unfinished

from fdl_bidsapp.training.experiment import make_experiment, run_experiment

HERE = Path(__file__).parent
GRIDS = ["paper", "paper-all", "released", "released-all", "strong", "warped", "strong-released"]


def main() -> None:
    """Run the grids, fold by fold, and gather them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--grids", nargs="+", default=GRIDS)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--max-minutes", type=float, default=float("inf"))
    parser.add_argument("--published", type=Path, help="table of published values")
    options = parser.parse_args()

    started = time.monotonic()
    for fold in range(options.folds):
        for grid in options.grids:
            left = options.max_minutes - (time.monotonic() - started) / 60
            values = read_grid(HERE / f"{grid}.toml")
            values["table"] = str(options.tables / f"fold-{fold}.tsv")
            values["grid"]["seed"] = [fold]
            run_experiment(
                unfinished(make_experiment(values), results_of(grid)),
                options.out / table_of(grid) / grid / f"fold-{fold}",
                jobs=options.jobs,
                max_minutes=max(left, 0),
                progress=lambda line, fold=fold, grid=grid: print(f"{grid}, fold {fold}: {line}"),
            )
    for table in dict.fromkeys(map(table_of, options.grids)):
        values = read_grid(HERE / f"{table}.toml")
        grids = " ".join(grid for grid in GRIDS if table_of(grid) == table)
        gather(
            results_of(table),
            options.out / table,
            tuple(dict.fromkeys([*values["grid"], "seed"])),
            f"python benchmarks/msd_hippocampus/run.py TABLES OUT --grids {grids}",
            options.published,
            values.get("published", []),
        )


def table_of(grid: str) -> str:
    """Name the table of a grid: many crops and few crops come into one."""
    return grid.removesuffix("-all")


def results_of(grid: str) -> str:
    """Name the table of results of a grid."""
    return f"msd_{table_of(grid)}".replace("-", "_")


if __name__ == "__main__":
    main()
