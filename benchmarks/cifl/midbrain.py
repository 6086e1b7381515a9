"""Do features help on contrasts that were not trained on? Red and dentate nuclei, simulated heads.

    fdl simulate TRAIN --truth TRAIN_TRUTH --participants 40 --seed 1
    fdl simulate TEST --truth TEST_TRUTH --participants 12 --seed 9001
    python benchmarks/cifl/midbrain.py TRAIN TRAIN_TRUTH TEST TEST_TRUTH OUT
        --features FEATURES.safetensors [--minutes 60] [--other T1w=TABLE.tsv]

Two networks are trained on QSM alone, one on the image and one on its features; both and the
default model are measured on each contrast of the test heads. ``--other`` adds a contrast of heads
without any gradient echo: a table as ``fdl train`` takes it, with the images in its column
``imag``. Run again, it goes on. Writes ``benchmarks/results/cifl_midbrain.tsv``.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import machine

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.models.bundle import Bundle, load_bundle, save_bundle
from fdl_bidsapp.models.fdl import CONTRASTS, ModelSpec
from fdl_bidsapp.training.cases import read_bids, read_table
from fdl_bidsapp.training.evaluate import SUMMARY_COLUMNS, evaluate, summarise
from fdl_bidsapp.training.fit import fit, make_settings

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Train what is not trained, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("train", "train_truth", "test", "test_truth", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--features", required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--other", nargs="*", default=[], metavar="NAME=TABLE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    models = [load_bundle("default")]
    for name, features in (("QSM alone", ""), ("QSM alone, CIFL", options.features)):
        settings = make_settings(
            {
                "name": name,
                "bids_dir": str(options.train),
                "labels_dir": str(options.train_truth),
                "structures": ["RNL", "RNR", "DNL", "DNR"],
                "features": features,
                "recipe_options": {"steps": options.steps},
                "seed": options.seed,
            }
        )
        file = options.out / f"{'features' if features else 'image'}.safetensors"
        if not file.exists():
            fit(settings, file, max_minutes=options.minutes)
        models.append(for_all_contrasts(file))
    tests = {target: read_bids(options.test, options.test_truth) for target in CONTRASTS}
    for word in options.other:
        name, _, table = word.partition("=")
        tests[name] = read_table(table)
    rows = []
    for target, scans in tests.items():
        contrast = target if target in CONTRASTS else "imag"
        with_target = [one for one in scans if one.scan.get(contrast) is not None]
        for bundle in models:
            measured = summarise(evaluate(bundle, with_target, target=contrast))
            rows += [{"target": target, **row} for row in measured]
            print(target, bundle.spec.name, len(with_target), file=sys.stderr)
    about = {
        "command": "python " + " ".join(["benchmarks/cifl/midbrain.py", *sys.argv[1:]]),
        "machine": f"{machine()}, app {__version__}, {time.strftime('%Y-%m-%d')}",
    }
    kept = [{**row, **about} for row in rows if row["metric"] == "dice"]
    write_tsv(RESULTS / "cifl_midbrain.tsv", kept, ("target", *SUMMARY_COLUMNS, *about))


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
