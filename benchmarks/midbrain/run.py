"""Run the few-label experiment on the simulated cohort, and put it into ``benchmarks/results``.

    python benchmarks/midbrain/run.py COHORT OUT [--recipes paper strong] [--structures RN DN] \
        [--targets qsm imag r2star] [--n-train 4 16] [--seeds 1] [--jobs 2] [--max-minutes 60] \
        [--methods none early late multimodal] [--published fdl_tables.tsv]

``COHORT`` is from ``cohort.py``. Red and dentate nuclei are segmented apart, left and right as one
structure, as the papers do: with a class for each side the papers' Dice loss can end with every
other voxel in the wrong one. Where the cohort has scans unlike those to train with
(``shifted.tsv``), each network is measured on them too. Run again, it goes on, also on another
machine: runs whose cases are in the results are not done again. The results are those of the runs
that are done.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import time
from pathlib import Path

import nibabel as nib

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiment_tables import gather, read_grid, unfinished

from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.models.bundle import load_bundle
from fdl_bidsapp.training.cases import in_split, read_table
from fdl_bidsapp.training.evaluate import CASE_COLUMNS, evaluate
from fdl_bidsapp.training.experiment import make_experiment, run_experiment
from fdl_bidsapp.training.fit import read_toml

HERE = Path(__file__).parent
PARTS = ("others", "multimodal")


def main() -> None:
    """Run the grids and gather them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["paper", "strong"])
    parser.add_argument("--structures", nargs="+", default=["RN", "DN"])
    parser.add_argument("--targets", nargs="+", default=["qsm", "imag", "r2star"])
    parser.add_argument("--n-train", nargs="+", type=int, help="in place of those of the recipe")
    parser.add_argument("--methods", nargs="+", help="in place of all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--max-minutes", type=float, default=float("inf"))
    parser.add_argument("--published", type=Path, help="table of published values")
    options = parser.parse_args()
    for recipe in options.recipes:
        check_box(options.cohort, recipe)

    until = time.monotonic() + 60 * options.max_minutes
    for seed, target, nuclei, recipe, part in itertools.product(
        range(options.seeds), options.targets, options.structures, options.recipes, PARTS
    ):
        minutes = (until - time.monotonic()) / 60
        run(options, recipe, [nuclei], [target], seed, part, minutes)
    for recipe in options.recipes:
        for name in (recipe, shifted(recipe)):
            gather(
                f"midbrain_{name}",
                options.out / name,
                tuple(read_grid(HERE / f"{recipe}.toml")["grid"]),
                f"python benchmarks/midbrain/run.py COHORT OUT --recipes {recipe}",
                options.published,
                read_toml(HERE / "published.toml")["published"] if name == recipe else (),
            )


def check_box(cohort: Path, recipe: str) -> None:
    """Refuse a cohort whose images are not of the size that a recipe is for."""
    path = read_table(cohort / "nuclei.tsv")[0].label
    shape = list(nib.nifti1.load(path).shape)
    wanted = read_grid(HERE / f"{recipe}.toml")["grid_shape"]
    if shape != wanted:
        box = " ".join(map(str, wanted))
        raise SystemExit(
            f"{path} has {shape} voxels, and the recipe {recipe} is for {wanted}: make the cohort "
            f"with --box {box}"
        )


def shifted(recipe: str) -> str:
    """Name what is measured on scans unlike those to train with."""
    return f"{recipe}_shifted"


def measure_shifted(cohort: Path, runs: Path, out: Path) -> None:
    """Measure finished networks on the scans unlike those to train with, if there are any."""
    table = cohort / "shifted.tsv"
    if not table.exists():
        return
    for done in sorted(runs.glob("*/cases.tsv")):
        there = out / "runs" / done.parent.name
        if not (there / "cases.tsv").exists():
            scans = in_split(read_table(table), "test", table)
            rows = evaluate(load_bundle(str(done.with_name("model.safetensors"))), scans)
            there.mkdir(parents=True, exist_ok=True)
            shutil.copy(done.with_name("settings.json"), there)
            write_tsv(there / "cases.tsv", rows, CASE_COLUMNS)


def run(
    options: argparse.Namespace,
    recipe: str,
    structures: list[str],
    targets: list[str],
    seed: int,
    part: str,
    minutes: float,
) -> None:
    """Run a part of a recipe's grid: multimodal fusion, or the methods of one contrast."""
    values = read_grid(HERE / f"{recipe}.toml")
    grid = values["grid"]
    grid |= {"structures": [structures], "targets": [targets], "seed": [seed]}
    grid["method"] = [
        each
        for each in options.methods or grid["method"]
        if (each == "multimodal") == (part == "multimodal")
    ]
    if not grid["method"]:
        return
    if options.n_train:
        grid["n_train"] = options.n_train
    values["table"] = str(options.cohort / "nuclei.tsv")
    if part != "multimodal":
        del values["modalities"]
    name = "-".join([*structures, *targets, part, str(seed)])
    out = options.out / recipe / name
    run_experiment(
        unfinished(make_experiment(values), f"midbrain_{recipe}"),
        out,
        jobs=options.jobs,
        max_minutes=max(minutes, 0),
        progress=lambda line: print(f"{recipe}: {line}", flush=True),
    )
    measure_shifted(options.cohort, out / "runs", options.out / shifted(recipe) / name)


if __name__ == "__main__":
    main()
