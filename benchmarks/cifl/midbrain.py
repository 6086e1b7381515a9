"""Do features help on contrasts that were not trained on? Red and dentate nuclei, simulated heads.

    python benchmarks/midbrain/cohort.py LABELS COHORT --spin-echo
    python benchmarks/cifl/midbrain.py COHORT OUT [--features cifl] [--minutes 90] [--steps 3000]

Two networks are trained on QSM alone, one on the image and one on its features; both and the
default model are measured on each contrast of the test heads, and on T1- and T2-weighted images of
them, as of a cohort without any gradient echo. Run again, it goes on. Writes
``benchmarks/results/cifl_midbrain.tsv``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
from machine import command_line, machine

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.imaging.overlap import METRICS
from fdl_bidsapp.models.bundle import Bundle, load_bundle, load_features, save_bundle
from fdl_bidsapp.models.fdl import CONTRASTS, ModelSpec
from fdl_bidsapp.training.cases import in_split, read_table
from fdl_bidsapp.training.evaluate import MEAN, SUMMARY_COLUMNS, evaluate, summarise
from fdl_bidsapp.training.fit import fit, make_settings

RESULTS = Path(__file__).parents[1] / "results"
SPIN_ECHOES = ("T1w", "T2w")
STRUCTURES = ["RNL", "RNR", "DNL", "DNR"]


def main() -> None:
    """Train what is not trained, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--features", default="cifl")
    parser.add_argument("--minutes", type=float, default=90, help="of each training")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    models = {"default, all contrasts": load_bundle("default")}
    for name, features in (("QSM alone", ""), ("QSM alone, CIFL", options.features)):
        settings = make_settings(
            {
                "name": name,
                "table": str(options.cohort / "cases.tsv"),
                "structures": STRUCTURES,
                "features": features,
                "backbone_options": {"width": 8, "levels": 4},
                "grid_shape": [64, 80, 72],
                "recipe_options": {"steps": options.steps, "batch": 1, "validate_every": 300},
                "seed": options.seed,
            }
        )
        file = options.out / f"{'features' if features else 'image'}.safetensors"
        if not file.exists():
            fit(settings, file, max_minutes=options.minutes)
        models[name] = for_all_contrasts(file)
    tables = dict.fromkeys(CONTRASTS, options.cohort / "cases.tsv")
    tables |= {name: options.cohort / f"{name}.tsv" for name in SPIN_ECHOES}
    rows = []
    for target, table in tables.items():
        scans = in_split(read_table(table), "test", table)
        for name, bundle in models.items():
            cases = evaluate(bundle, scans, target=target if target in CONTRASTS else "imag")
            found = summarise(with_means(cases))
            rows += [{"target": target, **row, "model": name} for row in found]
            print(target, name, len(scans), file=sys.stderr)
    about = {
        "features_sha256": load_features(options.features).sha256[:12],
        "command": command_line(
            "benchmarks/cifl/midbrain.py", COHORT=options.cohort, OUT=options.out
        ),
        "machine": f"{machine()}, app {__version__}, {time.strftime('%Y-%m-%d')}",
    }
    kept = [{**row, **about} for row in rows if row["metric"] == "dice"]
    write_tsv(RESULTS / "cifl_midbrain.tsv", kept, ("target", *SUMMARY_COLUMNS, *about))


def with_means(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the structures that are compared, and each case's mean over them."""
    rows = [dict(row) for row in cases if row["structure"] in STRUCTURES]
    for name in dict.fromkeys(row["id"] for row in rows):
        own = [row for row in rows if row["id"] == name]
        means = {metric: float(np.nanmean([row[metric] for row in own])) for metric in METRICS}
        rows.append({**own[0], "structure": MEAN, **means})
    return rows


def for_all_contrasts(file: Path) -> Bundle:
    """Return a model of one contrast as one that takes all, each normalised in its own way."""
    bundle = load_bundle(file)
    spec = replace(
        bundle.spec, contrasts=CONTRASTS, intensity=dict(ModelSpec("defaults").intensity)
    )
    widened = file.with_stem(f"{file.stem}_all")
    save_bundle(widened, bundle.network(), spec)
    return load_bundle(widened)


if __name__ == "__main__":
    main()
