"""Run the few-label experiment on the simulated cohort, and put it into ``benchmarks/results``.

    python benchmarks/midbrain/run.py COHORT OUT [--recipes paper strong] [--seeds 1] \
        [--jobs 2] [--max-minutes 60]

``COHORT`` is from ``cohort.py``. Run again, it goes on, also on another machine: runs whose cases
are in the results are not done again. The results are those of the runs that are done.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiment_tables import gather, unfinished

from fdl_bidsapp.training.experiment import make_experiment, run_experiment
from fdl_bidsapp.training.fit import read_toml

HERE = Path(__file__).parent


def main() -> None:
    """Run the grids and gather them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["paper", "strong"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--max-minutes", type=float, default=float("inf"))
    options = parser.parse_args()

    started = time.monotonic()
    for seed in range(options.seeds):
        for recipe in options.recipes:
            for part in ("multimodal", "others"):
                run(options, recipe, seed, part, (time.monotonic() - started) / 60)
    for recipe in options.recipes:
        gather(
            f"midbrain_{recipe}",
            options.out / recipe,
            tuple(read_toml(HERE / f"{recipe}.toml")["grid"]),
            f"python benchmarks/midbrain/run.py COHORT OUT --recipes {recipe}",
        )


def run(
    options: argparse.Namespace, recipe: str, seed: int, part: str, minutes_spent: float
) -> None:
    """Run one recipe's grid with one seed: multimodal fusion, or the methods of one contrast."""
    values = read_toml(HERE / f"{recipe}.toml")
    values["table"] = str(options.cohort / "cases.tsv")
    values["grid"]["seed"] = [seed]
    methods = values["grid"]["method"]
    if part == "multimodal":
        values["grid"]["method"] = ["multimodal"]
    else:
        values["grid"]["method"] = [method for method in methods if method != "multimodal"]
        del values["modalities"]
    run_experiment(
        unfinished(make_experiment(values), f"midbrain_{recipe}"),
        options.out / recipe / f"{part}-{seed}",
        jobs=options.jobs,
        max_minutes=max(options.max_minutes - minutes_spent, 0),
        progress=lambda line: print(f"{recipe}: {line}"),
    )


if __name__ == "__main__":
    main()
