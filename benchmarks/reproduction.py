"""Write ``docs/reproduction.md`` and its pictures from the tables of results.

    python benchmarks/reproduction.py

Every figure on the page comes from ``benchmarks/results``; points of the papers' experiments that
were not run are named.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from fdl_bidsapp.training.evaluate import MEAN
from fdl_bidsapp.training.experiment import (
    PUBLISHED_COLUMNS,
    TASK_AXES,
    draw_figure,
    method_differences,
    read_cases,
)

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "reproduction.md"

Row = Mapping[str, str]

METHODS = {
    "none": "no split",
    "early": "early fusion",
    "late": "late fusion",
    "multimodal": "multimodal",
}

HEAD = """# Do we find what the papers found?

Two papers claim that splitting an image into high and low frequencies makes segmentation better,
most of all where labels are few: "Frequency Disentangled Learning for Segmentation of Midbrain
Structures from Quantitative Susceptibility Mapping Data" (arXiv 2302.12980; below: FDL) and
"Fourier Disentangled Multimodal Prior Knowledge Fusion for Red Nucleus Segmentation in Brain MRI"
(arXiv 2211.01353). This page sets their figures beside those of this package. It is written by
`python benchmarks/reproduction.py` from the tables in `benchmarks/results`, which name the
command that made them; no figure is typed by hand.

There are two spectra. In the text of FDL, the low part is a window around frequency zero, on all
three axes: `centred`, the default of this package. The code that its authors released never shifts
the spectrum before it cuts the window, and cuts two axes only: its low part holds their highest
frequencies, and its high part is nearly the whole image (`spectrum = "released"`). Which of the two
the published figures were made with, the papers do not say. Below it is the text's, but for the
sections that name the released code.

Intervals are 95 % bootstrap intervals over participants. Seeds (each with a fold of its own) are
averaged within each case before. A difference is paired by case and seed. An interval holds the
chance of which participants were measured; that of the initial weights and of the training
participants only as far as there are several seeds. Nothing is corrected for the number of
comparisons: one in twenty falls outside its interval by chance alone.
"""

MSD = """## Hippocampus (Medical Segmentation Decathlon)

What differs from FDL, and has to be kept in mind: our crops are measured by cross-validation by
participant inside 165 crops, FDL's on 52 other crops; so our largest training set has 130 crops
and is set beside FDL's 166. FDL does not say how anterior and posterior hippocampus are joined
into one Dice; ours is the mean of the two. Widths, number of steps and initial weights are not
given there either.

The recipe `paper` is the published one as far as it is written down (whole crops of 64 × 64 × 48,
Adam at 1e-3, Dice loss, one crop a step, no augmentation, weights of the best validation), with
1,200 steps for up to 17 crops and 2,000 for more.
`strong` is what a good engineer does today (augmentation, Dice and cross-entropy, AdamW with a
one-cycle rate, averaged weights; windows of 40 × 56 × 40; as many steps for few crops as for many).
Settings: `benchmarks/msd_hippocampus`.
"""

WARPING = """### Hippocampus, the share of warped windows

What augmentation costs where crops are many: sampled anew, an image is smoother, and its labels are
rougher, than what a network is used on. `strong` warps half of the windows; below, the Dice with
all of them warped, and what half gains on that, paired by case.
"""

MIDBRAIN = """## Midbrain (simulated cohort)

Red and dentate nuclei, each with a network of its own, left and right as one structure, as in both
papers. The images are simulated from head label maps (`benchmarks/midbrain/cohort.py`): 51
participants to train with at most, 8 to choose weights by, 24 of other heads to measure on. The
papers have whole volumes of 160 × 160 × 128 of real participants, which take a GPU; most of the
networks here had a box of 64 × 80 × 72 at 1 mm around the nuclei and 600 steps. So only the order
of the methods can be compared, not the values. And the box is kind to a network without a split:
the published one errs at n = 4 by voxels far from the nuclei (see its HD95), for which the box
has no room; the whole volumes, below, have it. Multimodal fusion has the low parts of the two other
contrasts, and a bank of one training participant; its published values are those of the best choice
of contrasts for each target.

The scans to train and to measure with are alike: ordinary protocols at 3 T. Networks of which the
weights were at hand were measured on scans unlike these, too: other heads, over the simulator's
whole range of field strengths, protocols, iron and artefacts.
"""

SUMMARY = """## In short

Each row counts the points of a grid (structure, contrast, number of training cases) at which a
method was compared with the network without a split: those where the interval of the difference of
the Dice is above zero, below zero, and those where it holds zero. Beside it the mean difference
over these points, and over those of them for which the papers print both values, theirs.
"""

# Read again, and put right, whenever the tables change.
IN_WORDS = """**Where we agree.** On the midbrain, with many labels, late and multimodal fusion are
a little better than a network without a split. At n = 51 both are ahead beyond chance on average
over the midbrain's tasks (below: "averaged over the tasks"), at n = 16 late fusion is, and
multimodal fusion nearly so. Most of it is the red nucleus: at n = 51 multimodal fusion is ahead
there in all three contrasts, late fusion in QSM, by half of what the papers report, and in iMag.
With four red nuclei to learn from, the papers' main point, multimodal fusion is ahead beyond chance
in QSM, over three seeds but by a small part of the papers' gain, and in R2*, there with late
fusion. In whole volumes, as the papers have them, late fusion is ahead beyond chance there, over
two seeds and again by a part of the papers' gain. With the spectrum of the released code, early
fusion is ahead with four red nuclei in QSM, over three seeds, and late fusion a little on the
hippocampus at n = 17, by half of what the papers report.

**Where we do not.** The papers' gain is largest where labels are fewest. Ours is not, in a box
around the nuclei: at n = 4 late and multimodal fusion are behind on average over the tasks, at n =
8 early and multimodal fusion are, and they do most harm in iMag. Early fusion, which the papers
find nearly as good as late, is otherwise ahead at no point of the midbrain, on scans like those of
training, and behind on average at n = 8 and 51. On the hippocampus, with the spectrum of the text,
a split is never ahead, with the published recipe or a strong one. With the published recipe, over
three seeds, both methods are behind with 4 and 8 crops, where the papers have them ahead, and
still, by little, with 130; early fusion also with 17, and, in one seed, late fusion with 50. With
the spectrum of the released code early fusion is behind with 4 and 17. With four crops it is the
strong recipe that gains, not the split. What differs most is the network without a split: ours
loses far less with few labels than theirs, which errs by voxels many centimetres away in the
midbrain (its HD95). What they did differently with that network, the papers do not say; on images
of real participants, in whole volumes, a split may well guard against such errors.

**On scans unlike those of training** a split helps in places in QSM, early fusion most, and nowhere
in R2* and iMag, where it is mostly behind; so are all three methods on average at n = 8 and 51, and
early and multimodal fusion at n = 16.
"""

PAPERS_GRID = {
    "midbrain_paper": {
        "structures": ("RN", "DN"),
        "targets": ("qsm", "imag", "r2star"),
        "n_train": ("4", "8", "16", "51"),
        "method": tuple(METHODS),
    },
    "msd_paper": {"n_train": ("4", "8", "17", "50", "83", "130"), "method": tuple(METHODS)[:3]},
}
"""The points of the papers' experiments."""

MSD_PARTS = {
    "msd_paper": "Hippocampus, the published recipe",
    "msd_released": "Hippocampus, the published recipe with the spectrum of the released code",
    "msd_strong": "Hippocampus, a strong recipe",
    "msd_strong_released": "Hippocampus, a strong recipe with the spectrum of the released code",
}
MIDBRAIN_PARTS = {
    "midbrain_paper": "Midbrain, the published recipe",
    "midbrain_paper_shifted": "Midbrain, the published recipe, scans unlike those of training",
    "midbrain_released": "Midbrain, the published recipe with the spectrum of the released code",
    "midbrain_released_shifted": "Midbrain, the released spectrum, scans unlike those of training",
    "midbrain_whole": "Midbrain in whole volumes, the published recipe",
    "midbrain_whole_shifted": "Midbrain in whole volumes, scans unlike those of training",
    "midbrain_strong": "Midbrain, a strong recipe",
}


def main() -> None:
    """Write the page."""
    parts = [HEAD, SUMMARY, summary_table(), IN_WORDS]
    for text, names in ((MSD, MSD_PARTS), (MIDBRAIN, MIDBRAIN_PARTS)):
        parts.append(text)
        for name, title in names.items():
            # What is asked for and missing is told; an extra that was not run is left out.
            told = section(name)
            parts += [f"### {title}", *told] if told else []
            if name == "msd_strong":
                parts += warping()
    PAGE.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")
    print(PAGE)


def summary_table() -> str:
    """Count over each grid where a split is better, and set its mean difference beside theirs."""
    lines = []
    for name, title in (MSD_PARTS | MIDBRAIN_PARTS).items():
        known = {point(row): row for row in dice(read(f"{name}.tsv"))}
        differences = dice(read(f"{name}_differences.tsv"))
        for method, words in METHODS.items():
            ours = [row for row in differences if row["method"] == method]
            pairs = [(known[point(row)], known[point({**row, "method": "none"})]) for row in ours]
            theirs = [
                float(split["published"]) - float(none["published"])
                for split, none in pairs
                if published(split) and published(none)
            ]
            if ours:
                found = [str(len(kind)) for kind in by_verdict(ours)]
                here = f"{fmean(float(row['difference']) for row in ours):+.3f}"
                there = f"{fmean(theirs):+.3f} ({len(theirs)})" if theirs else ""
                lines.append((title, words, *found, here, there))
    return table(
        (
            "experiment",
            "method",
            "better",
            "worse",
            "interval holds zero",
            "mean difference, ours",
            "published (points)",
        ),
        lines,
    )


def section(name: str) -> list[str]:
    """Return the tables of one experiment and what they say; nothing where it was not run."""
    rows = read(f"{name}.tsv")
    if not rows:
        return []
    differences = read(f"{name}_differences.tsv")
    parts = [results_table(rows)]
    if len({row["n_train"] for row in rows}) > 1:
        parts.append(picture(name, rows))
    if differences:
        parts += ["Difference of the Dice from the network without a split:"]
        parts += [differences_table(differences), verdict(differences)]
    if any(axis in rows[0] for axis in TASK_AXES):
        parts += ["The same, averaged over the tasks that both networks were trained for:"]
        parts.append(pooled_table(name))
    if name in PAPERS_GRID:
        parts.append(lacking(rows, PAPERS_GRID[name]))
    return [*parts, origin(rows[0])]


def lacking(rows: Sequence[Row], grid: Mapping[str, Sequence[str]]) -> str:
    """Say which points of the papers' experiment were not run."""
    done = {tuple(row[axis] for axis in grid) for row in rows}
    missing: dict[tuple[str, ...], list[str]] = {}
    for values in product(*grid.values()):
        if values not in done:
            *where, method = point(dict(zip(grid, values, strict=True)))
            missing.setdefault(tuple(where), []).append(method)
    if not missing:
        return ""
    every = len(grid["method"])
    said = [
        ", ".join(where) + ("" if len(methods) == every else f" ({', '.join(methods)})")
        for where, methods in missing.items()
    ]
    return f"Not run, for want of processor time: {'; '.join(said)}."


def results_table(rows: Sequence[Row]) -> str:
    """Set ours beside the published values, one line for each point of the grid."""
    lines = []
    for row in dice(rows):
        same = {one["metric"]: one for one in rows if point(one) == point(row) and one is not row}
        hd95 = same.get("hd95")
        lines.append(
            (
                *point(row),
                f"{row['n_seeds']} ({row['n_cases']})",
                with_interval(row, "mean"),
                published(row),
                "" if hd95 is None else f"{float(hd95['mean']):.2f}",
                "" if hd95 is None else published(hd95),
            )
        )
    return table(
        (
            *point_names(rows),
            "seeds (cases)",
            "Dice, ours",
            "Dice, published",
            "HD95 in mm, ours",
            "HD95, published",
        ),
        lines,
    )


def differences_table(rows: Sequence[Row]) -> str:
    """Show the paired differences."""
    lines = [
        (*point(row), row["n_cases"], with_interval(row, "difference", sign="+"), row["p"])
        for row in dice(rows)
    ]
    return table((*point_names(rows), "cases", "difference", "p"), lines)


def pooled_table(name: str) -> str:
    """Show the differences of all structures and targets together."""
    cases = [
        # A task is averaged over as a seed is.
        {**row, "seed": tuple(row[axis] for axis in (*TASK_AXES, "seed"))}
        for row in read_cases(RESULTS / f"{name}_cases.tsv")
        if row["structure"] == MEAN
    ]
    rows = differences_of(cases, ("n_train", "method", "seed"))
    lines = [
        (*point(row), row["n_seeds"], with_interval(row, "difference", sign="+"), row["p"])
        for row in dice(rows)
    ]
    return table((*point_names(rows), "networks", "difference", "p"), lines)


def differences_of(cases: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[Row]:
    """Compare the methods in pairs; the rows are as those of a table of results."""
    return [{k: str(v) for k, v in row.items()} for row in method_differences(cases, axes)]


def warping() -> list[str]:
    """Set the strong recipe beside the same with all windows warped."""
    names = {"msd_warped": "none", "msd_strong": "half"}
    cases = [
        # Each method is a task here, and what is compared takes the place of the methods.
        {**row, "split": row["method"], "method": share}
        for name, share in names.items()
        for row in read_cases(RESULTS / f"{name}_cases.tsv")
        if row["structure"] == MEAN
    ]
    rows = differences_of(cases, ("n_train", "split", "method", "seed"))
    gains = {(row["n_train"], row["split"]): row for row in rows if row["metric"] == "dice"}
    warped = dice(read("msd_warped.tsv"))
    lines = []
    for row in warped:
        gain = gains[row["n_train"], row["method"]]
        shown = with_interval(gain, "difference", sign="+")
        lines.append((*point(row), with_interval(row, "mean"), shown, gain["p"]))
    columns = (*point_names(warped), "Dice, all warped", "half warped: gain", "p")
    return [WARPING, table(columns, lines), origin(warped[0])]


def origin(row: Row) -> str:
    """Say what made a table, and on what."""
    return f"Made by `{row['command']}`; {row['versions']}; {row['machine']}."


def picture(name: str, rows: Sequence[Row]) -> str:
    """Draw the Dice over the number of training cases, and return the link to it."""
    axes = [axis for axis in (*TASK_AXES, "n_train", "method") if axis in rows[0]]
    numbers = ("mean", "lower", "upper", *PUBLISHED_COLUMNS)
    results = [
        {
            key: value if key not in numbers else None if value == "n/a" else float(value)
            for key, value in {**row, "method": METHODS[row["method"]]}.items()
        }
        for row in dice(rows)
    ]
    # A method has one colour on the whole page, whichever were run for the first task.
    results.sort(key=lambda row: list(METHODS.values()).index(row["method"]))
    path = PAGE.parent / "images" / f"reproduction_{name}.png"
    draw_figure(results, axes, path)
    return f"![Dice over the number of training cases](images/{path.name})"


def verdict(rows: Sequence[Row]) -> str:
    """Say in words which differences are beyond chance."""
    better, worse, open_ = by_verdict(dice(rows))
    said = []
    for found, words in (
        (better, "The split is better, its interval above zero, at"),
        (worse, "It is worse, its interval below zero, at"),
    ):
        if found:
            said.append(f"{words} {'; '.join(', '.join(point(row)) for row in found)}.")
    if open_:
        others = "interval holds" if len(open_) == 1 else f"{len(open_)} intervals hold"
        said.append(f"The other {others} zero." if said else "Each interval holds zero.")
    return " ".join(said)


def by_verdict(rows: Sequence[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the differences with an interval above zero, below zero, and around zero."""
    better = [row for row in rows if float(row["lower"]) > 0]
    worse = [row for row in rows if float(row["upper"]) < 0]
    return better, worse, [row for row in rows if row not in better and row not in worse]


def dice(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of the Dice, by number of training cases, then method."""
    order = list(METHODS)
    return sorted(
        (row for row in rows if row["metric"] == "dice"),
        key=lambda row: (
            row.get("structures", ""),
            row.get("targets", ""),
            float(row.get("n_train", 0)),
            order.index(row["method"]),
        ),
    )


def point_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the names of the settings that vary."""
    names = {
        "structures": "structure",
        "targets": "target",
        "n_train": "training cases",
        "method": "method",
    }
    return tuple(text for key, text in names.items() if key in rows[0])


def point(row: Row) -> tuple[str, ...]:
    """Return the settings that vary."""
    values = [row[axis] for axis in ("structures", "targets") if axis in row]
    if "n_train" in row:
        values.append(f"n = {row['n_train']}")
    return (*values, METHODS[row["method"]])


def with_interval(row: Row, key: str, sign: str = "") -> str:
    """Write a value with its interval."""
    lower, upper = float(row["lower"]), float(row["upper"])
    return f"{float(row[key]):{sign}.3f} [{lower:{sign}.3f}, {upper:{sign}.3f}]"


def published(row: Row) -> str:
    """Write the published value with its interval, where there is one."""
    value = row.get("published", "n/a")
    if value == "n/a":
        return ""
    text = f"{float(value):.3f}"
    if row["published_lower"] != "n/a":
        text += f" [{float(row['published_lower']):.3f}, {float(row['published_upper']):.3f}]"
    return f"{text} (n = {row['published_n_train']})"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def read(name: str) -> list[Row]:
    """Read the means over structures in a table of results; none where it was not made yet."""
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return [row for row in rows if row["structure"] == MEAN]


if __name__ == "__main__":
    main()
