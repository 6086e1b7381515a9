"""Put the trained hippocampus models into the package, measured, each with its card.

    python benchmarks/msd_hippocampus/ship.py TABLES MODEL.safetensors …

``TABLES`` is from ``tables.py``; the models are from ``fdl train`` with ``strong-n*.toml``, and the
largest with ``refine-n165.toml`` after that. They are measured on the validation crops, which chose
nothing in that recipe but its settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiment_tables import RESULTS, made_by

from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.models.bundle import Bundle, load_bundle, save_bundle
from fdl_bidsapp.training.cases import in_split, read_labels, read_table
from fdl_bidsapp.training.evaluate import MEAN, evaluate, summarise

HERE = Path(__file__).parent
WEIGHTS = HERE.parents[1] / "fdl_bidsapp" / "models" / "weights"
SHIPPED = (4, 17, 165)
BARS = {4: 0.83, 17: 0.86, 165: 0.885}
"""Aims for the mean Dice, by number of training crops."""

CARD = """# Model card: {name}

**What it is.** A plain 3-D U-Net ({method}, {width} first-layer channels) that finds the
anterior and the posterior hippocampus in a T1-weighted crop of 1 mm around one hippocampus. It is
here to be measured beside published figures, and as an example of training on few labels; it has
nothing to do with the red or dentate nucleus, and finds nothing in a whole head.

**State.** Dice {dice} (mean of anterior and posterior, with its
95 % interval over participants) and 95th-percentile Hausdorff distance {hd95} mm on {n_cases}
validation crops of {n_participants} participants who were not trained on.

**What it was trained on.** {n_train} labelled crops of {train_participants} participants of the
Medical Segmentation Decathlon, Task04 Hippocampus (Antonelli et al., Nature Communications 13,
4128, 2022), licence CC BY-SA 4.0. Recipe and settings:
{recipe}, on a processor core.

**What was not checked.** Whole heads, other contrasts, other voxel sizes, disease other than in
that dataset.

**Use.** Research only; not a medical device. `fdl segment CROP.nii.gz --model {name} --output DIR`

**Licence.** CC BY-SA 4.0, as the data: hippocampus images and labels of the Medical Segmentation
Decathlon, by Vanderbilt University Medical Center.
"""


def main() -> None:
    """Measure the models, and write table, weights and cards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path)
    parser.add_argument("models", nargs="+", type=Path)
    options = parser.parse_args()
    table = options.tables / "cases.tsv"
    scans = in_split(read_table(table), "validation", table)
    rows: list[dict[str, Any]] = []
    for file in options.models:
        bundle = load_bundle(file)
        n = int(str(bundle.spec.provenance["n_train"]))
        if n in SHIPPED:
            file = WEIGHTS / f"{bundle.spec.name}.safetensors"
            save_bundle(file, bundle.network(), bundle.spec, bundle.bank, dtype="float16")
            bundle = load_bundle(file)
        summary = summarise(
            evaluate(bundle, scans, reference_labels=read_labels(HERE / "labels.tsv"))
        )
        aim = BARS[n]
        for row in summary:
            if row["metric"] in ("dice", "hd95"):
                judged = row["metric"] == "dice" and row["structure"] == MEAN
                met = ("yes" if row["mean"] >= aim else "no") if judged else None
                rows.append({"n_train": n, **row, "aim": aim if judged else None, "met": met})
        if n in SHIPPED:
            text = card(bundle, summary)
            file.with_suffix(".md").write_text(text, encoding="utf-8")
    made = made_by("python benchmarks/msd_hippocampus/ship.py TABLES MODELS")
    columns = (
        "model", "n_train", "structure", "metric", "n_cases", "n_participants", "mean", "lower",
        "upper", "sem", "aim", "met",
    )  # fmt: skip
    write_tsv(RESULTS / "msd_models.tsv", [{**row, **made} for row in rows], (*columns, *made))


def card(bundle: Bundle, summary: list[dict[str, Any]]) -> str:
    """Write a model's card."""
    found = {row["metric"]: row for row in summary if row["structure"] == MEAN}
    dice = found["dice"]
    spec = bundle.spec
    words = {"none": "no split of frequencies"}
    return CARD.format(
        name=spec.name,
        method=words.get(spec.method, f"{spec.method} fusion"),
        width=spec.backbone_options["width"],
        dice=f"{dice['mean']:.3f} [{dice['lower']:.3f}, {dice['upper']:.3f}]",
        hd95=f"{found['hd95']['mean']:.2f}",
        n_cases=dice["n_cases"],
        n_participants=dice["n_participants"],
        n_train=spec.provenance["n_train"],
        train_participants=spec.provenance["train_participants"],
        recipe=recipe(spec.provenance),
    )


def recipe(provenance: Mapping[str, Any]) -> str:
    """Say how a model was trained."""
    n = provenance["n_train"]
    first = f"`benchmarks/msd_hippocampus/strong-n{n}.toml`"
    if not provenance["init"]:
        return f"{first}, {provenance['steps']} steps"
    averaged = "averaged" in provenance
    steps = []
    while provenance.get("init"):
        steps.insert(0, str(provenance["steps"]))
        provenance = provenance.get("before", {})
    second = f"`refine-n{n}.toml` there, {' and then '.join(steps)} steps more"
    last = "; the weights are the mean of those before and after the last" if averaged else ""
    return f"{first}, and\n{second},\nfrom the model that this gave{last}"


if __name__ == "__main__":
    main()
