"""Store features of volumes in the package, with their card.

    fdl train --recipe cifl --output cifl.safetensors
    python benchmarks/cifl/ship.py cifl.safetensors
    python benchmarks/cifl/midbrain.py COHORT OUT
    python benchmarks/cifl/ship.py

The first of these stores the weights in half precision, ``midbrain.py`` measures what is stored,
the last one writes the card again with what was measured.
"""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

sys.path.insert(0, str(Path(__file__).parents[1]))
import pandas as pd
from shipping import ship

from fdl_bidsapp.models.bundle import FeatureBundle, load_features, save_features

RESULTS = Path(__file__).parents[1] / "results" / "cifl_midbrain.tsv"
NAME = "cifl"


def main() -> None:
    """Store what is given, and write the card."""
    ship(NAME, __doc__, load_features, save_features, card)


def card(bundle: FeatureBundle) -> str:
    """Return the model card as Markdown."""
    spec, made = bundle.spec, bundle.spec.provenance
    options = made["recipe_options"]
    assert isinstance(options, dict)
    grid = made["grid_shape"]
    assert isinstance(grid, list)
    return dedent(
        f"""\
        # Model card: {NAME}

        **What it is.** Contrast-invariant features of volumes after Chua and Dalca: {spec.layers}
        convolutions of {spec.width} channels, from one image to {spec.channels} channels of unit
        length at each voxel, in which images of one anatomy in different contrasts look alike. For
        `fdl features` and `fdl train --features {NAME}`; docs/cifl.md tells how and how well. It
        sees {1 + 2 * spec.layers} voxels across, whatever their size.

        **State.** {state(bundle)}

        **What it was trained on.** Random shapes in random contrasts alone, drawn on grids of
        {" × ".join(map(str, grid))} voxels; no image of a person. {made["steps"]} steps of
        {options["batch"]} shapes, each in two contrasts, τγ = {options["tau_channels"]}, seed
        {made["seed"]}: {made["minutes"]:.0f} minutes on one {made["trained_on"]}. The recipe is
        `fdl train --recipe cifl`.

        **What was not checked.** Real scans. Features of two contrasts are alike, not equal; what
        is trained on them has to be looked at in each new contrast.

        **Use.** Research only; not a medical device, and no clinical claim is made.

        **Licence.** Apache-2.0, as the package.
        """
    )


def state(bundle: FeatureBundle) -> str:
    """Tell what was measured of this very file."""
    table = pd.read_csv(RESULTS, sep="\t") if RESULTS.exists() else None
    if table is None or bundle.sha256[:12] not in set(table["features_sha256"]):
        return "Not measured."
    means = table[table["structure"] == "mean"].pivot(
        index="target", columns="model", values="mean"
    )
    told = [
        f"{target} {row['QSM alone, CIFL']:.2f} ({row['QSM alone']:.2f} on the image itself)"
        for target, row in means.iterrows()
    ]
    return (
        "A network for red and dentate nuclei that was trained on QSM alone, on these features;"
        f" Dice on other contrasts of unseen simulated heads: {', '.join(told)}."
    )


if __name__ == "__main__":
    main()
