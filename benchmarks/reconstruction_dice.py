"""Segmentation of QSM that the app reconstructs, beside that of the simulated site's own maps.

    python benchmarks/reconstruction_dice.py LABELS_DIR WORK [--heads sub-17 …] [--draws 2]
    python benchmarks/reconstruction_dice.py --page-only

Heads that no training has seen are simulated with their echoes (``fdl simulate --echoes``). The
app segments each scan twice: once the dataset has the site's maps, once the echoes alone. Dice of
both with the truth goes to ``results/reconstruction_dice.tsv`` (one row a scan and structure).
What is in WORK already is not made again.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from machine import machine
from page import replace_part

from fdl_bidsapp.imaging.overlap import dice
from fdl_bidsapp.models.bundle import load_bundle

RESULTS = Path(__file__).parent / "results" / "reconstruction_dice.tsv"
DOCUMENT = Path(__file__).parents[1] / "docs" / "reconstruction.md"
LOSS = 0.03
"""Of Dice, that reconstruction may cost."""

SOURCES = ("site", "echoes")
KEYS = ["scan", "structure", "hemisphere"]


def main() -> None:
    """Simulate, segment twice, compare, write table and page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("labels_dir", type=Path, nargs="?")
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--heads", nargs="+", default=["sub-17", "sub-18", "sub-19", "sub-20"])
    parser.add_argument("--draws", type=int, default=2, help="scans of each head")
    parser.add_argument("--model", default="default")
    parser.add_argument("--recon", default="auto")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--seed", type=int, default=73_000)
    parser.add_argument("--set", action="append", default=[], metavar="EFFECT=VALUE")
    parser.add_argument("--page-only", action="store_true", help="from the table that is there")
    options = parser.parse_args()
    if not options.page_only:
        if options.work is None:
            parser.error("give LABELS_DIR and WORK")
        simulate(options)
        for source in SOURCES:
            run(
                "fdl-bidsapp",
                *(options.work / source, options.work / f"out-{source}", "participant"),
                *("--model", options.model, "--recon", options.recon, "--target", "qsm"),
                *("--nprocs", options.processes, "--omp-nthreads", 1),
            )
        bundle = load_bundle(options.model)
        measured(options.work, bundle.spec.labels).assign(
            model_sha256=bundle.sha256[:12],
            command="python benchmarks/reconstruction_dice.py LABELS_DIR WORK "
            + " ".join(sys.argv[3:]),
            machine=machine(),
            versions=f"Python {platform.python_version()}, fdl-bidsapp {version('fdl-bidsapp')}",
        ).to_csv(RESULTS, sep="\t", index=False, na_rep="n/a", float_format="%.4g")
    replace_part(DOCUMENT, "benchmarks/reconstruction_dice.py", figures())


def run(name: str, *words: object) -> None:
    """Run a command of this package; scans that fail show in the table."""
    command = [str(word) for word in (Path(sys.executable).parent / name, *words)]
    if subprocess.run(command).returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} failed")


def simulate(options: argparse.Namespace) -> None:
    """Write the dataset with the site's maps, and the same without them."""
    chosen = options.work / "labels"
    with_maps, without = (options.work / source for source in SOURCES)
    if without.exists():
        return
    shutil.rmtree(chosen, ignore_errors=True)
    chosen.mkdir(parents=True)
    for name in ("dseg.tsv", *(f"{head}_dseg.nii.gz" for head in options.heads)):
        (chosen / name).symlink_to((options.labels_dir / name).resolve())
    run(
        "fdl",
        *("simulate", with_maps, "--labels-dir", chosen, "--truth", options.work / "truth"),
        *("--participants", options.draws * len(options.heads), "--seed", options.seed),
        "--echoes",
        *(word for given in options.set for word in ("--set", given)),
    )
    part = without.with_name(f"{without.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    maps = shutil.ignore_patterns("*_Chimap.*", "*_R2starmap.*", "*_T2starw.*")
    shutil.copytree(with_maps, part, ignore=maps)
    part.rename(without)


def measured(work: Path, labels: tuple) -> pd.DataFrame:
    """Compare both segmentations of each scan with the truth."""
    rows = []
    for truth in sorted((work / "truth").rglob("*_dseg.nii.gz")):
        scan = truth.name.removesuffix("_dseg.nii.gz")
        image = nib.load(truth)
        true = np.asarray(image.dataobj)
        for source in SOURCES:
            mine = np.zeros_like(true)
            out = work / f"out-{source}" / truth.parent.relative_to(work / "truth")
            path = out / f"{scan}_space-orig_seg-fdl_dseg.nii.gz"
            if path.exists():  # else the scan failed
                mine = np.asarray(nib.load(path).dataobj)
            rows += [
                {
                    **{"scan": scan, "structure": label.structure, "hemisphere": label.hemisphere},
                    **{"source": source, "dice": dice(mine == label.index, true == label.index)},
                }
                for label in labels
            ]
    table = pd.DataFrame(rows).pivot_table("dice", KEYS, "source", sort=False).reset_index()
    return table[[*KEYS, *SOURCES]].rename_axis(columns=None)


def figures() -> str:
    """Return the measured figures as Markdown."""
    table = pd.read_csv(RESULTS, sep="\t", na_values="n/a")
    means = table.groupby("structure", sort=False)[list(SOURCES)].mean()
    means.loc["mean"] = means.mean()
    lines = ["| | site's maps | from the echoes | difference |", "| --- | ---: | ---: | ---: |"]
    for name, (site, echoes) in means.iterrows():
        words = str(name).replace("_", " ")
        lines.append(f"| {words} | {site:.3f} | {echoes:.3f} | {echoes - site:+.3f} |")
    worst = (means["echoes"] - means["site"]).min()
    return (
        f"Dice of the default model on {table['scan'].nunique()} simulated scans of heads that no"
        " training has seen, from the maps that the simulated site would have made and from those"
        " that the app makes of the same scans' echoes; the target is QSM"
        " (`benchmarks/results/reconstruction_dice.tsv`).\n\n"
        + "\n".join(lines)
        + f"\n\nReconstruction is to cost at most {LOSS:g}: the lowest difference is {worst:+.3f},"
        f" {'met' if worst >= -LOSS else 'missed'}."
    )


if __name__ == "__main__":
    main()
