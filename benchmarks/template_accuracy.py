"""Measure a model on fresh simulated heads through the whole app, against the simulated truth.

    python benchmarks/template_accuracy.py [--model default] [--participants 9] [--seed 9001]

Nine participants are ten scans of nine heads; of the last one there are raw echoes only, from which
the app makes the maps. The seed makes heads that no training has seen.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from machine import machine

from fdl_bidsapp import __version__
from fdl_bidsapp.imaging.overlap import dice
from fdl_bidsapp.models.bundle import load_bundle

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Simulate, run the app once for each target, compare with the truth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--participants", type=int, default=9)
    parser.add_argument("--seed", type=int, default=9001)
    parser.add_argument("--targets", nargs="+", default=["qsm", "r2star", "imag", "swi"])
    parser.add_argument("--data", type=Path, help="keep the simulated dataset here, and reuse it")
    options = parser.parse_args()
    command = (
        f"python benchmarks/template_accuracy.py --model {options.model}"
        f" --participants {options.participants} --seed {options.seed}"
        f" --targets {' '.join(options.targets)}"
    )
    bundle = load_bundle(options.model)
    tools = Path(sys.executable).parent

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        bids, truth = folder / "bids", folder / "truth"
        if not bids.exists():
            _call(
                tools / "fdl", "simulate", bids, "--truth", truth,
                "--participants", options.participants, "--seed", options.seed,
            )  # fmt: skip
        rows = []
        for target in options.targets:
            out = Path(temporary) / f"out-{target}"
            _call(
                tools / "fdl-bidsapp", bids, out, "participant", "--target", target,
                "--model", options.model, accept=(0, 1),
            )  # fmt: skip
            for reference in sorted(truth.rglob("*_dseg.nii.gz")):
                prefix = reference.name.removesuffix("_dseg.nii.gz")
                found = out / reference.relative_to(truth).with_name(
                    f"{prefix}_space-orig_seg-fdl_dseg.nii.gz"
                )
                true = np.asarray(nib.load(reference).dataobj)
                # A scan that failed counts, as nothing found.
                mine = np.zeros_like(true)
                if found.exists():
                    mine = np.asarray(nib.load(found).dataobj)
                for label in bundle.spec.labels:
                    a, b = mine == label.index, true == label.index
                    rows.append(
                        {
                            "target": target,
                            "scan": prefix,
                            "structure": label.abbreviation,
                            "dice": dice(a, b),
                            "volume_ratio": a.sum() / max(b.sum(), 1),
                        }
                    )
    table = pd.DataFrame(rows)
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(
        RESULTS / "template_accuracy_cases.tsv", sep="\t", index=False, float_format="%.4f"
    )
    summary = table.groupby(["target", "structure"], sort=False).agg(
        scans=("dice", "size"),
        dice_mean=("dice", "mean"),
        dice_min=("dice", "min"),
        volume_ratio_mean=("volume_ratio", "mean"),
    )
    summary = summary.reset_index()
    summary["model_sha256"] = bundle.sha256[:12]
    summary["command"] = command
    summary["machine"] = machine()
    summary["versions"] = (
        f"Python {platform.python_version()}, torch {version('torch')}, fdl-bidsapp {__version__}"
    )
    summary.to_csv(RESULTS / "template_accuracy.tsv", sep="\t", index=False, float_format="%.3f")
    print(summary.iloc[:, :6].to_string(index=False))


def _call(*words: object, accept: tuple[int, ...] = (0,)) -> None:
    code = subprocess.run([str(word) for word in words], check=False).returncode
    if code not in accept:
        raise SystemExit(f"{words[0]} failed with exit code {code}")


if __name__ == "__main__":
    main()
