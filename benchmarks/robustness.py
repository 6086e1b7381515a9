"""Put what single effects do to the default model into docs/robustness.md, with a picture.

    python benchmarks/robustness.py

It reads ``results/default_model_effects.tsv``, which ``default_model_accuracy.py`` writes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from default_model_accuracy import CLIFF, RESULTS, STEPS
from page import replace_part

from fdl_bidsapp.reports.palette import CONTRASTS

DOCUMENT = Path(__file__).parents[1] / "docs" / "robustness.md"
FIGURE = DOCUMENT.parent / "images" / "robustness.png"
WORST = 0.3
"""Change of Dice at the end of the colours."""


def main() -> None:
    """Draw the picture and rewrite the part of the document."""
    effects = pd.read_csv(RESULTS / "default_model_effects.tsv", sep="\t", na_values=["n/a"])
    means = effects.groupby(["part", "effect", "values", "target"], sort=False)[list(STEPS)].mean()
    draw(means, FIGURE)
    replace_part(DOCUMENT, "benchmarks/robustness.py", figures(effects, means))
    print(f"{DOCUMENT}\n{FIGURE}")


def draw(means: pd.DataFrame, path: Path) -> None:
    """Draw the change of the Dice from an effect's absence: a panel for each target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    change = means[list(STEPS[1:])].sub(means[STEPS[0]], axis=0)
    targets = list(dict.fromkeys(change.index.get_level_values("target")))
    names = list(dict.fromkeys(change.index.get_level_values("effect")))
    figure, axes = plt.subplots(
        1, len(targets), figsize=(2.6 + 1.7 * len(targets), 0.9 + 0.19 * len(names)), sharey=True
    )
    for axis, target in zip(np.atleast_1d(axes), targets, strict=True):
        values = change.xs(target, level="target").droplevel(["part", "values"]).loc[names]
        picture = axis.imshow(
            values.to_numpy(), cmap="RdBu", vmin=-WORST, vmax=WORST, aspect="auto"
        )
        for (i, j), value in np.ndenumerate(values.to_numpy()):
            colour = "white" if abs(value) > 0.6 * WORST else "0.25"
            axis.text(j, i, f"{value:+.2f}", ha="center", va="center", fontsize=6.5, color=colour)
        axis.set_xticks(range(len(STEPS) - 1), STEPS[1:], fontsize=8)
        axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
        axis.set_title(CONTRASTS[target][0], fontsize=10)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    bar = figure.colorbar(
        picture, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.03, extend="both"
    )
    bar.set_label("Change of the Dice from the effect's absence, mean over structures", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def figures(effects: pd.DataFrame, means: pd.DataFrame) -> str:
    """Return the table as Markdown, and what falls off a cliff."""
    shown = means.unstack("target")
    targets = list(dict.fromkeys(effects["target"]))
    first = targets[0]
    steps = ", ".join(STEPS)
    lines = [
        f"| part | effect | {steps} | {' | '.join(f'{CONTRASTS[first][0]}, {s}' for s in STEPS)} | "
        + " | ".join(f"{CONTRASTS[target][0]}, off → harsh" for target in targets[1:])
        + " |",
        "| --- | --- | --- |" + " ---: |" * (len(STEPS) + len(targets) - 1),
    ]
    for (part, effect, values), row in shown.iterrows():
        cells = [f"{row[step, first]:.2f}" for step in STEPS]
        cells += [f"{row[STEPS[0], t]:.2f} → {row[STEPS[-1], t]:.2f}" for t in targets[1:]]
        name = effect.replace("_", " ")
        lines.append(f"| {part} | {name} | {values} | {' | '.join(cells)} |")
    cliffs = effects[effects["cliff"] == "yes"]
    words = [
        f"- {effect.replace('_', ' ')}: "
        + "; ".join(
            f"{row.structure.replace('_', ' ')} in {CONTRASTS[row.target][0]}"
            f" ({row.off:.2f}, {row.mild:.2f}, {row.middle:.2f}, {row.harsh:.2f})"
            for row in rows.itertuples()
        )
        for effect, rows in cliffs.groupby("effect", sort=False)
    ]
    fallen = f"Before the harsh end, nothing falls by more than {CLIFF:g} from a step to the next."
    if words:
        fallen = (
            f"Before the harsh end, by more than {CLIFF:g} from one step to the next fall (off,"
            " mild, middle, harsh):\n\n" + "\n".join(words)
        )
    return "\n".join(lines) + (
        f"\n\n{fallen}\n\nMean Dice over the structures; of each step"
        f" {effects['scans_each'].max()} scan(s), made by `{effects['command'].iloc[0]}` with the"
        f" default model {effects['model_sha256'].iloc[0]}. Each structure by itself:"
        " `benchmarks/results/default_model_effects.tsv`."
    )


if __name__ == "__main__":
    main()
