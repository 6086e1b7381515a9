"""Store the reconstruction network in the package, with its card.

    python benchmarks/pedqnet/ship.py pedqnet.safetensors
    python benchmarks/pedqnet/compare.py pedqnet physics.safetensors --field field.safetensors
    python benchmarks/pedqnet/ship.py

The first command stores the weights in half precision, the second one measures what is stored, the
third one writes the card again with what was measured.
"""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

sys.path.insert(0, str(Path(__file__).parents[1]))
import pandas as pd
from compare import DIVISION, JOINT, RESULTS, SMOOTH, VARIATION, values
from shipping import ship

from fdl_bidsapp.models.bundle import VolumeBundle, load_volume, save_volume

NAME = "pedqnet"


def main() -> None:
    """Store what is given, and write the card."""
    ship(NAME, __doc__, reconstruction, save_volume, card)


def reconstruction(name_or_path: str | Path) -> VolumeBundle:
    """Load a network for susceptibility."""
    return load_volume(name_or_path, "susceptibility")


def card(bundle: VolumeBundle) -> str:
    """Return the model card as Markdown."""
    made = bundle.spec.provenance
    return dedent(
        f"""\
        # Model card: {NAME}

        **What it is.** A 3-D U-Net that reconstructs susceptibility from a local field and its
        smooth inversion, after PedQ-NET, for `fdl-bidsapp --recon {NAME}`. It works on voxels
        of 1 mm, upright in the magnet; scans are brought there and back. docs/pedqnet.md tells how
        and how well.

        **State.** {state(bundle)}

        **What it was trained on.** Simulation alone: {made["cases"]} simulated heads of the ICBM
        template, {made["infants"]:.0%} of them infants' heads, at 3 T, with local fields as after
        an ideal background removal. {made["steps"]} steps of one patch on a processor core, seed
        {made["seed"]}; the recipe is `benchmarks/pedqnet/joint.toml`. The loss knows no
        susceptibility; in the last phase it knows the outlines of the subcortical nuclei.

        **What was not checked.** Any real scan of an infant or an adult with a reference
        susceptibility; other field strengths; lesions, haemorrhage, calcification.

        **Use.** Research only; not a medical device, and no clinical claim is made.

        **Licence.** Apache-2.0, as the package. The template is ICBM 2009a symmetric, which comes
        with nilearn (Fonov et al., NeuroImage 54 (2011) 313-327).
        """
    )


def state(bundle: VolumeBundle) -> str:
    """Tell what was measured of this very file."""
    table = pd.read_csv(RESULTS, sep="\t") if RESULTS.exists() else None
    if table is None or bundle.sha256[:12] not in str(table["networks"].iloc[0]).split():
        return "Not measured."
    told = []
    for kind in ("infant", "adult"):
        figures = [
            f"{name} {values(table, kind, name, 'nrmse').mean():.1f} %"
            for name in (JOINT, VARIATION, SMOOTH, DIVISION)
        ]
        told.append(f"{kind}s: {', '.join(figures)}")
    return (
        f"NRMSE on simulated heads that no training has seen, {'; '.join(told)}. Total variation is"
        " what the app takes unless told otherwise."
    )


if __name__ == "__main__":
    main()
