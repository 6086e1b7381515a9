"""Write ``docs/cifl.md`` and its figures from the tables of results.

    python benchmarks/cifl/page.py [--features FEATURES.safetensors]

Every figure on the page comes from ``benchmarks/results``; what has no table yet is named as open.
``--features``, a network for slices, draws the channels of two contrasts of the ICBM template that
comes with nilearn.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np

from fdl_bidsapp.imaging.confidence import BAD_DICE

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "cifl.md"
IMAGES = ROOT / "docs" / "images"

Row = Mapping[str, str]

INPUTS = {
    ("none", ""): "the image",
    ("high", ""): "high band of the split",
    ("high_magnitude", ""): "size of the high band",
    ("cifl", "1"): "CIFL, τγ = 1",
    ("cifl", "0.1"): "CIFL, τγ = 0.1",
    ("cifl", "0.01"): "CIFL, τγ = 0.01",
}
CONTRASTS = {
    "t1": "T1 (as trained)",
    "inverted": "inverted in the brain",
    "inverted_whole": "inverted as a whole",
    "remapped": "remapped, no order kept",
}
PUBLISHED = {
    ("segmentation", "none"): "0.18",
    ("segmentation", "cifl"): "0.84",
    ("registration", "none"): "0.45",
    ("registration", "cifl"): "0.69",
}
"""The abstract's Dice on inverted T1: the baseline, and CIFL with τγ = 1."""

ALONE, ALONE_FEATURES = "QSM alone", "QSM alone, CIFL"
"""Models of the table of benchmarks/cifl/midbrain.py."""

BARS = {"segmentation": 0.84, "registration": 0.69}

METHOD = """# Contrast-invariant features (CIFL)

A small network is trained on nothing but random shapes: two images of one label map in unlike
contrasts should give the same features, and the features of one image should differ among each
other. What is trained on the features of one contrast should then work on others. The idea is that
of Chua and Dalca, "Contrast Invariant Feature Representations for Segmentation and Registration of
Medical Images"; this page sets our figures beside theirs. It is written by
`python benchmarks/cifl/page.py` from the tables in `benchmarks/results`; no figure is typed by
hand.

## Method

* Shapes (`fdl_bidsapp/simulation/random_shapes.py`): the arg-max of smooth noises of several
  scales, warped. Each of two views gives every label an intensity of its own, then bias field,
  blur, coarse sampling, noise, gamma.
* Network (`fdl_bidsapp/models/cifl.py`): eight convolutions of width 3, leaky ReLU, the last one
  linear, 16 channels. It sees 17 pixels.
* Loss: for the maps r1 and r2 of the two views,
  `-log Σ_c exp(r1_c·r2_c/τα) / [Σ_c exp(r1_c·r2_c/τβ) + Σ_c Σ_c'≠c exp(r1_c·r1_c'/τγ)]`, with
  τα = τβ = 0.1. Each channel's map is a unit vector over space.
* Features for other networks have unit length at each pixel.

The abstract leaves some things open. What was found:

* Maps are centred before they are compared. The constant part of a map is otherwise most of it, and
  all views agree on it without anything learnt.
* The border is left out of the loss, as far as a feature can see beyond it. The padding of the
  convolutions leaves the same frame in every contrast; networks that were allowed to see it learnt
  the frame, agreed almost perfectly on random shapes, and hardly on brains.
* For the same reason the shapes have no surround that is dark in both views.
* The image repeats beyond its border. With a frame of zeros, a bright surround has an edge there.
* Ends of the intensity range are cut off in many of the random images: air that was masked out is
  flat, and is no noise.
* Features of two contrasts are alike, not equal, and a network that sees T1 only finds in the rest
  what tells T1. While it is trained, each channel is therefore scaled and shifted at random.
* A registration network on features at full resolution hardly learns: their detail hides turns and
  shifts. Ours goes from averages over eight pixels to two (`fdl_bidsapp/models/registration.py`).
* The finished channels are brought to mean 0 and deviation 1 over random shapes, which the loss
  leaves open and which the unit length at each pixel needs.

## Use

```sh
fdl features sub-01_T1w.nii.gz sub-01_T2w.nii.gz --output seen
fdl train settings.toml --features cifl --output ours.safetensors
fdl-bidsapp study out participant --model ours.safetensors
```

`fdl features` writes the channels as 4-D NIfTI and one figure of all images, in which columns
should look alike. The features `cifl` come along; `fdl train --recipe cifl --output FILE` trains
others. A model trained with `--features` has the frozen features in its file, for any
fusion method. `fdl_bidsapp.imaging.registration.register_features` gives channels to ANTs as
further metrics. Settings of the training: `fdl_bidsapp/training/cifl.py`.
"""

TABLE = """## Table 1 of the abstract, on other data

Twenty mid-coronal OASIS-1 slices, T1, with white matter, grey matter, CSF and thalamus; everything
is trained on the T1 slices of 14 and measured on those of 6 other subjects, in T1 and in contrasts
that no training has seen. The abstract had 232 subjects to train on. Mean Dice over classes and
cases, of {seeds}, with the 95 % bootstrap interval over subjects; n/a was not run yet."""

REGISTRATION = """### Registration

A network aligns T1 slices with each other; it is measured on pairs of unseen subjects, T1 to each
contrast. The slices come affinely aligned, so that already without any registration the Dice is
{before}. Pairs are therefore also measured with the moving slice displaced at random."""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=Path, help="draw these features of two contrasts")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    if options.features:
        draw_channels(options.features, IMAGES / "cifl_channels.png")
    parts = [METHOD]
    if (IMAGES / "cifl_channels.png").exists():
        parts += ["![Channels of two contrasts](images/cifl_channels.png)"]
        parts += ["The ICBM template, its inverse, and the remapped template with their channels."]
    rows = read("cifl_table1.tsv")
    parts += table1(rows) if rows else ["## Table 1 of the abstract\n\nNot run yet."]
    parts += midbrain(read("cifl_midbrain.tsv"))
    PAGE.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    print(PAGE)


def read(name: str) -> list[Row]:
    """Read a table of results; empty where there is none."""
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def table1(rows: Sequence[Row]) -> list[str]:
    """Return the parts on segmentation, registration and the split."""
    dice = [row for row in rows if row["structure"] == "mean" and row["metric"] == "dice"]
    first = rows[0]
    seeds = int(float(first["n_seeds"]))
    parts = [TABLE.format(seeds="one seed" if seeds == 1 else f"{seeds} seeds")]
    parts += ["### Segmentation", grid(dice, "segmentation", ""), verdict(dice, "segmentation", "")]
    before = value(dice, "registration", "none", "", "before")
    parts += [REGISTRATION.format(before=shown(before))]
    for prefix, title in (("", "As they come"), ("displaced_", "Displaced")):
        start = value(dice, "registration", "none", "", f"{prefix}before")
        parts += [f"{title} (before: {shown(start)}):", grid(dice, "registration", prefix)]
        parts += [verdict(dice, "registration", prefix)]
    draw_transfer(dice, IMAGES / "cifl_transfer.png")
    parts += [
        "## Is this what the split's high band already gives?",
        "The high band of the frequency split leaves out slow intensity, as fusion models do, and"
        " turns its sign with an inverted contrast; its size does not. Both stand in the tables"
        " above as inputs of the same networks.",
        "![Dice by input and contrast](images/cifl_transfer.png)",
        band_verdict(dice),
        f"Made by `{first['command']}` on {first['machine']}; the longest training of features took"
        f" {float(first['minutes_of_features']):.0f} minutes.",
    ]
    return parts


def grid(dice: Sequence[Row], task: str, prefix: str) -> str:
    """Return a table of inputs by contrasts."""
    lines = [
        "| input | " + " | ".join(CONTRASTS.values()) + " | the abstract, inverted |",
        "| --- |" + " --- |" * (len(CONTRASTS) + 1),
    ]
    for (features, tau), name in INPUTS.items():
        cells = [
            shown(value(dice, task, features, tau, f"{prefix}{contrast}")) for contrast in CONTRASTS
        ]
        theirs = PUBLISHED.get((task, features), "") if tau in ("", "1") else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {theirs} |")
    return "\n".join(lines)


def value(
    dice: Sequence[Row], task: str, features: str, tau: str, contrast: str
) -> tuple[float, float, float] | None:
    """Find a mean with its interval."""
    for row in dice:
        place = (row["task"], row["features"], row["tau_channels"].replace("n/a", ""))
        if place == (task, features, tau) and row["contrast"] == contrast:
            return float(row["mean"]), float(row["lower"]), float(row["upper"])
    return None


def shown(found: tuple[float, float, float] | None) -> str:
    """Write a mean with its interval."""
    return "n/a" if found is None else f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


def best(dice: Sequence[Row], task: str, prefix: str, contrast: str) -> tuple[str, float]:
    """Return the CIFL that does best on a contrast."""
    scores = {
        name: (value(dice, task, *key, f"{prefix}{contrast}") or (0.0,))[0]
        for key, name in INPUTS.items()
        if key[0] == "cifl"
    }
    name = max(scores, key=lambda one: scores[one])
    return name, scores[name]


def verdict(dice: Sequence[Row], task: str, prefix: str) -> str:
    """Say whether the bar is reached."""
    sentences = []
    for contrast in ("inverted", "inverted_whole"):
        name, score = best(dice, task, prefix, contrast)
        baseline = (value(dice, task, "none", "", f"{prefix}{contrast}") or (0.0,))[0]
        reached = "reached" if score >= BARS[task] else "not reached"
        sentences.append(
            f"{CONTRASTS[contrast][0].upper()}{CONTRASTS[contrast][1:]}: {name} {score:.2f} against"
            f" {baseline:.2f} for the image; the bar of {BARS[task]} is {reached}."
        )
    below = []
    for key, name in INPUTS.items():
        for contrast in ("inverted", "inverted_whole", "remapped"):
            found = value(dice, task, *key, f"{prefix}{contrast}") if key[0] == "cifl" else None
            if found is not None and found[0] < BARS[task]:
                below.append(f"{name} {CONTRASTS[contrast]} ({found[0]:.2f})")
    if below:
        sentences.append(f"Not at the bar: {'; '.join(below)}.")
    return fill(" ".join(sentences), 100, break_long_words=False, break_on_hyphens=False)


def band_verdict(dice: Sequence[Row]) -> str:
    """Compare features and high band on the contrasts that were not seen."""
    sentences = []
    for contrast in ("inverted", "inverted_whole", "remapped"):
        name, score = best(dice, "segmentation", "", contrast)
        bands = [
            (value(dice, "segmentation", band, "", contrast) or (0.0,))[0]
            for band in ("high", "high_magnitude")
        ]
        sentences.append(
            f"{CONTRASTS[contrast][0].upper()}{CONTRASTS[contrast][1:]}: high band {bands[0]:.2f},"
            f" its size {bands[1]:.2f}, {name} {score:.2f}."
        )
    return " ".join(sentences)


MIDBRAIN = """Mean Dice of red and dentate nuclei, left and right, on unseen simulated heads, in
boxes of 64 × 80 × 72 mm around the nuclei. All but the default model were trained on QSM alone, the
default model on all four contrasts of a scan. T1w and T2w are rough simulations of the same heads,
as of a cohort that has no gradient echo."""


def midbrain(rows: Sequence[Row]) -> list[str]:
    """Return the part on what users gain."""
    parts = ["## What users gain: red and dentate nuclei"]
    if not rows:
        return [*parts, "Not run yet: `benchmarks/cifl/midbrain.py`."]
    contrasts = list(dict.fromkeys(row["target"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    mean = {
        (row["model"], row["target"]): row
        for row in rows
        if row["structure"] == "mean" and row["metric"] == "dice"
    }
    lines = [
        "| model | " + " | ".join(contrasts) + " |",
        "| --- |" + " --- |" * len(contrasts),
    ]
    for model in models:
        cells = []
        for contrast in contrasts:
            row = mean.get((model, contrast))
            found = row and (float(row["mean"]), float(row["lower"]), float(row["upper"]))
            cells.append(shown(found or None))
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return [
        *parts,
        MIDBRAIN,
        "\n".join(lines),
        midbrain_verdict(mean, contrasts, models),
        f"Made by `{rows[0]['command']}` on {rows[0]['machine']}.",
    ]


def midbrain_verdict(
    mean: Mapping[tuple[str, str], Row], contrasts: Sequence[str], models: Sequence[str]
) -> str:
    """Say where features help, and whether anything usable comes out of a spin echo."""
    better, worse, usable, useless = [], [], [], []
    for contrast in contrasts:
        by_model = {model: mean[model, contrast] for model in models}
        found, plain = by_model[ALONE_FEATURES], by_model[ALONE]
        said = f"{contrast} ({float(found['mean']):.2f} against {float(plain['mean']):.2f})"
        if float(found["lower"]) > float(plain["upper"]):
            better.append(said)
        elif float(found["upper"]) < float(plain["lower"]):
            worse.append(said)
        best = max(models, key=lambda model: float(by_model[model]["mean"]))
        score = float(by_model[best]["mean"])
        (usable if score >= BAD_DICE else useless).append(f"{contrast} ({best}: {score:.2f})")
    sentences = [
        f"{words} {', '.join(found) or 'none'}."
        for found, words in (
            (better, "Features raise the Dice of the network of QSM alone, intervals apart, on"),
            (worse, "They lower it on"),
            (usable, f"A mean Dice of {BAD_DICE} or more, by the best of these, comes out of"),
            (useless, "Nothing usable comes out of"),
        )
    ]
    return fill(" ".join(sentences), 100, break_long_words=False, break_on_hyphens=False)


def draw_transfer(dice: Sequence[Row], path: Path) -> None:
    """Draw the segmentation's Dice of each input on each contrast."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    fig, plot = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for place, (key, name) in enumerate(INPUTS.items()):
        for number, contrast in enumerate(CONTRASTS):
            found = value(dice, "segmentation", *key, contrast)
            if found is None:
                continue
            x = number + 0.12 * (place - 2.5)
            spread = [[found[0] - found[1]], [found[2] - found[0]]]
            label = name if number == 0 else None
            plot.errorbar(x, found[0], spread, marker="o", color=f"C{place}", label=label)
    plot.axhline(BARS["segmentation"], color="grey", linewidth=0.8, linestyle=":")
    plot.set_xticks(range(len(CONTRASTS)), [fill(name, 14) for name in CONTRASTS.values()])
    plot.set_ylim(0, 1)
    plot.set_ylabel("Dice")
    plot.legend(fontsize="x-small", ncols=2)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def draw_channels(model: Path, path: Path) -> None:
    """Draw the channels of the ICBM template in three contrasts."""
    import torch
    from table1 import REMAPPED

    from fdl_bidsapp.imaging.registration import template
    from fdl_bidsapp.models.bundle import load_features
    from fdl_bidsapp.models.cifl import compute_features
    from fdl_bidsapp.reports.features import draw_mosaic

    image = template()
    data = np.asarray(image.dataobj)
    row = int(np.rint((np.linalg.inv(image.affine) @ [0, -20, 0, 1])[1]))
    t1 = data[:, row, :] / data[:, row, :].max()
    contrasts = {
        "T1": t1,
        "inverted": np.where(t1 > 0, 1 - t1, 0),
        "remapped": np.where(t1 > 0, np.interp(t1, *REMAPPED), 0),
    }
    network = load_features(model).network()
    rows = []
    for name, slice_ in contrasts.items():
        volume = slice_.astype(np.float32)[..., None]
        channels = compute_features(network, volume, torch.device("cpu"))
        rows.append((name, volume[..., 0], channels[..., 0]))
    draw_mosaic(rows, path)


if __name__ == "__main__":
    main()
