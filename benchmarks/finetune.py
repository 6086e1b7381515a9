"""What fine-tuning the default model on four labelled scans of another site brings.

    python benchmarks/finetune.py --labels-dir ../shared/data/headlabels --work WORK

A site differs from what the default model learnt in two ways: its scans (``SITES``) and its rater,
who draws the outer border of each nucleus ``--wider`` mm further out. Four scans of two heads are
labelled, a fifth one is held back to choose the weights; scans of two other heads are measured,
each bent and shaped anew, which intervals take for participants of their own. None of these heads
trained the default model.
Writes ``results/finetune.tsv``: the default model, the fine-tuned one, and their paired difference.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import scipy.ndimage as ndi
from default_model_accuracy import RESULTS, Draw, simulated
from experiment_tables import made_by
from machine import command_line

from fdl_bidsapp.bids.outputs import read_record, write_json, write_tsv
from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.models.bundle import load_bundle
from fdl_bidsapp.simulation.parameters import understood
from fdl_bidsapp.training.cases import in_split, read_table
from fdl_bidsapp.training.evaluate import MEAN, compare, evaluate, summarise
from fdl_bidsapp.training.fit import fit, make_settings

LABELLED, MEASURED = ("sub-17", "sub-18"), ("sub-19", "sub-20")
OLD_SCANNER = {
    "field_strength": "1.5",
    "slice_thickness": "3",
    "inversion": "thresholded_division",
    "echoes": "5",
}
SITES = {"old scanner": OLD_SCANNER, "small children": {"age": "4", "echoes": "5"}}
"""What each site forces on the simulator."""

METRICS = ("dice", "hd95", "volume_error")


def main() -> None:
    """Simulate, fine-tune, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default", help="to go on from")
    parser.add_argument("--labels-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="scans and model, kept")
    parser.add_argument("--sites", nargs="+", choices=SITES, default=list(SITES))
    parser.add_argument("--wider", type=float, default=0.7, help="mm")
    parser.add_argument("--scans", type=int, default=12, help="to measure")
    parser.add_argument("--seed", type=int, default=91_000)
    options = parser.parse_args()
    rows = [{"site": site, **row} for site in options.sites for row in measured(site, options)]
    made = {
        "model_sha256": load_bundle(options.model).sha256[:12],
        **made_by(
            command_line("benchmarks/finetune.py", WORK=options.work, LABELS=options.labels_dir)
        ),
    }
    columns = (
        "site", "model", "structure", "metric", "n_cases", "n_participants", "mean", "lower",
        "upper",
    )  # fmt: skip
    write_tsv(RESULTS / "finetune.tsv", [{**row, **made} for row in rows], (*columns, *made))
    for row in rows:
        if row["structure"] == MEAN:
            print(f"{row['site']}\t{row['model']}\t{row['metric']}\t{row['mean']:.3f}", end="\t")
            print(f"[{row['lower']:.3f}, {row['upper']:.3f}]")


def measured(site: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the measures of both models at a site, and their differences."""
    folder = options.work / site.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    table = write_site(site, folder, options)
    settings = make_settings(
        {
            "name": "fine-tuned",
            "init": options.model,
            "recipe": "finetune",
            "targets": ["qsm"],
            "table": str(table),
            "data": "four simulated scans of another site",
        }
    )
    tuned = load_bundle(fit(settings, folder / "tuned.safetensors"))
    scans = in_split(read_table(table), "test", table)
    base = load_bundle(options.model)
    rows = [row for model in (base, tuned) for row in evaluate(model, scans, target="qsm")]
    kept = [row for row in summarise(rows) if row["metric"] in METRICS]
    gained = [
        {
            **row,
            "model": f"{row['model']} minus {row['reference_model']}",
            "mean": row["difference"],
        }
        for row in compare(rows, tuned.spec.name, base.spec.name)
        if row["metric"] in METRICS
    ]
    return [*kept, *gained]


def write_site(site: str, folder: Path, options: argparse.Namespace) -> Path:
    """Simulate a site's scans where they are not there yet; return their table."""
    plan = [("train", LABELLED[i % 2], i) for i in range(4)] + [("validation", LABELLED[0], 4)]
    plan += [("test", MEASURED[i % 2], 10 + i) for i in range(options.scans)]
    lines = []
    for split, head, number in plan:
        name = f"{split}{number:02d}"
        image, labels = (folder / f"{name}_{what}.nii.gz" for what in ("qsm", "dseg"))
        write_scan(image, labels, head, number, SITES[site], options)
        lines.append({"id": name, "split": split, "qsm": image.name, "label": labels.name})
    table = folder / "cases.tsv"
    write_tsv(table, lines, ("id", "split", "qsm", "label"))
    return table


def write_scan(
    image: Path,
    labels: Path,
    head: str,
    number: int,
    effects: Mapping[str, str],
    options: argparse.Namespace,
) -> None:
    """Simulate a scan and write its QSM and what the rater drew, unless they are there."""
    seed = (options.seed, number)
    draw = Draw(labels.name, "site", head, seed, "ordinary", understood(effects))
    record = labels.with_name(labels.name.replace(".nii.gz", ".json"))
    wanted = {**draw.record, "Wider": options.wider}
    if read_record(record) == wanted:
        return
    scan = simulated(draw, options.labels_dir, "cpu")
    drawn = wider(scan.labels.cpu().numpy(), spacing_of(scan.affine), options.wider)
    nib.save(nib.Nifti1Image(scan.maps["qsm"].cpu().numpy(), scan.affine), image)
    nib.save(nib.Nifti1Image(drawn, scan.affine), labels)
    write_json(record, wanted)


def wider(labels: np.ndarray, spacing: Sequence[float], by: float) -> np.ndarray:
    """Move the borders of all structures outwards, where they do not meet, by some mm.

    A border lies half a voxel off the middle of the last voxel inside.
    """
    distance, nearest = ndi.distance_transform_edt(labels == 0, spacing, return_indices=True)
    reached = distance - np.min(spacing) / 2 <= by
    return np.where(reached, labels[tuple(nearest)], 0).astype(np.uint8)


if __name__ == "__main__":
    main()
