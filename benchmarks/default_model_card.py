"""Write the card of the default model from the tables of results and the model file.

    python benchmarks/default_model_card.py

Every figure on the card comes from ``benchmarks/results/default_model*.tsv``, which
``default_model_accuracy.py`` wrote for the very weights in the package, from
``template_accuracy.tsv`` and ``finetune.tsv`` beside it, or from the file itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import Any

import pandas as pd
from calibrate_confidence import USELESS_DICE
from default_model_accuracy import CLIFF, RESULTS, STEPS

from fdl_bidsapp.imaging.confidence import Calibration
from fdl_bidsapp.imaging.grid import OBLIQUE_DEGREES
from fdl_bidsapp.models.bundle import Bundle, load_bundle
from fdl_bidsapp.models.fdl import ModelSpec
from fdl_bidsapp.training.evaluate import MEAN

CARD = """# Model card: default

**What it is.** {method} with a plain 3-D U-Net of {width} first-layer channels, on grids of {grid}
voxels of {spacing} mm. A second, small network finds midbrain and cerebellum in the whole field of
view at {coarse} mm, all contrasts of a scan together; each gives a grid of its own. A scan that is
tilted by more than {oblique:g}° is seen upright. The target is QSM, R2*, mean magnitude or SWI; the
structures are the red and dentate nuclei, the substantia nigra and the subthalamic nuclei, left and
right. Unless `--flips no` is given, each window and its mirror image are segmented, and the mean is
taken. A region that is not found is looked for where the structures of the other one foretell it.
What is not found, or is no more than a guess, has an empty mask and a flag.

**State.** {state}

{table}

Mean over both sides and all scans after the whole app, in the scans' own grids; `ordinary` is a
usual 3 T protocol in an adult, `full` the whole range of the simulator. A structure is `seen` where
it differs from its surround by two standard deviations of that in the map that is segmented; of the
others little is to be seen there. `the best` is `--target best`, which takes the contrast of which
the model expects most. Tables with all cases: `benchmarks/results/default_model*.tsv`, made by
`{command}`.

{elsewhere}

{others}

**What harms it.** {robust}

**Whether it knows.** {trusted}

**What it was trained on.** Simulation alone: {data}, seed {seed}. {steps} steps over
{windows} windows, {steps_of_locator} steps of the locator: {trained_on}. The label maps are
`sub-01` to `sub-16` of a set of twenty whole-head label maps, the training label maps of SynthSeg
(Billot et al., Med. Image Anal. 86 (2023) 102789; Apache-2.0) with nuclei added from the CIT168
atlas (Pauli et al., Sci. Data 5 (2018) 180063; CC BY 4.0) and the Allen Human Reference Atlas (Ding
et al., J. Comp. Neurol. 524 (2016) 3127-3481; CC BY 4.0); the other four were not trained on and
are those measured above. The template is ICBM 2009a symmetric, which comes with nilearn (Fonov et
al., NeuroImage 54 (2011) 313-327), with ellipsoids and folded plates for nuclei. No image of a
person was used, and no expert drew a label. The recipe is `benchmarks/default_model.py`, but for
its early phases, which were run on a part of these scans before it drew stray windows, ends of the
field of view and slabs; docs/simulation.md lists every effect of the simulator with its range and
source. A phase on label maps alone then forgot the template's heads: on one of the demonstration's
it took left for right. So the weights were averaged with those before it
(`benchmarks/average_weights.py`) and trained on with both kinds of heads
(`benchmarks/default_model.py --again`), three times: the last two with seeds 1 and 2, on scans
drawn for that (`--first-draw 1000` and `1200`), of which six in ten went through their echoes
(`--with-echoes 0.6`), where two in ten had before.

**What was not checked.** Any real scan with experts' labels. The nuclei of the label maps are one
template's shapes, deformed; white matter has no fibres, lesions and atrophy are missing. Expect it
to be worse on real data than on simulated, and look at every mask.

**On your own labels.** `fdl train --init default --recipe finetune --table CASES.tsv --output
MODEL.safetensors` goes on from these weights with a few labelled scans (docs/training.md); the
result is run with `--model MODEL.safetensors`.
{tuned}

**Use.** Research only; not a medical device, and no clinical claim is made.

**Licence.** Apache-2.0, as the package.
"""

WORDS = {"qsm": "QSM", "r2star": "R2*", "imag": "iMag", "swi": "SWI", "best": "the best"}


def main() -> None:
    """Write the card beside the weights."""
    bundle = load_bundle("default")
    path = bundle.path.with_suffix(".md")
    path.write_text(card(bundle), encoding="utf-8")
    print(path)


def measured(name: str, bundle: Bundle) -> pd.DataFrame:
    """Read a table of results, which has to be of these weights."""
    path = RESULTS / f"{name}.tsv"
    found = pd.read_csv(path, sep="\t", na_values=["n/a"])
    if set(found["model_sha256"]) != {bundle.sha256[:12]}:
        raise SystemExit(f"{path} is of {', '.join(set(found['model_sha256']))}: measure it again")
    return found


def card(bundle: Bundle) -> str:
    """Return the text of the card."""
    figures, effects = (measured(f"default_model{part}", bundle) for part in ("", "_effects"))
    spec = bundle.spec
    about: Mapping[str, Any] = spec.provenance
    assert isinstance(spec.locator, ModelSpec)
    return CARD.format(
        method={"multimodal": "Multimodal prior-knowledge fusion (arXiv 2211.01353)"}.get(
            spec.method, f"{spec.method.capitalize()} fusion (arXiv 2302.12980)"
        ),
        width=spec.backbone_options["width"],
        grid=" × ".join(map(str, spec.grid_shape)),
        spacing=f"{spec.grid_spacing[0]:g}",
        coarse=f"{spec.locator.grid_spacing[0]:g}",
        oblique=OBLIQUE_DEGREES,
        state=state(figures, effects, measured("default_model_absent", bundle), spec.calibration),
        table=table(figures),
        command=figures["command"].iloc[0],
        elsewhere=elsewhere(bundle),
        others=others(bundle),
        robust=robust(effects),
        trusted=trusted(measured("default_model_flags", bundle)),
        tuned=tuned(bundle),
        **{
            key: about[key]
            for key in ("data", "seed", "steps", "windows", "steps_of_locator", "trained_on")
        },
    )


def state(
    figures: pd.DataFrame,
    effects: pd.DataFrame,
    absent: pd.DataFrame,
    calibration: Calibration | None,
) -> str:
    """Say how many of the aims are met, and which are not."""
    judged = figures[figures["met"].isin(["met", "missed"]) & (figures["measure"] == "dice")]
    words = {"ordinary": "in ordinary scans", "full": "over the whole range of the simulator"}
    parts = []
    for profile, dice in judged.groupby("profile", sort=False):
        missed = dice[dice["met"] == "missed"]
        part = f"{len(dice) - len(missed)} of {len(dice)} {words[str(profile)]}"
        if len(missed):
            worst = missed.assign(gap=missed["bar"] - missed["value"]).sort_values("gap").iloc[-1]
            part += (
                f" (the furthest from it is the {worst['structure'].replace('_', ' ')} in "
                f"{WORDS[worst['target']]}, {worst['value']:.2f} against {worst['bar']:.2f})"
            )
        parts.append(part)
    text = f"The aim for the Dice is met by {' and '.join(parts)}. {measurement(figures)}"
    swapped = figures.loc[figures["measure"] == "swapped", "value"].sum() + effects["swapped"].sum()
    text += f". Left and right were exchanged {int(swapped)} times."
    masks, empty, flagged = (int(absent[name].sum()) for name in ("masks", "empty", "flagged"))
    text += (
        f" Of {masks} structures outside the field of view {empty} were left empty and"
        f" {flagged} flagged."
    )
    calibrated = "is calibrated" if calibration else "is not calibrated: its results have no value"
    return f"{text} The confidence {calibrated}."


MEASURES = {
    "hd95": "HD95",
    "volume_bias": "bias of the volume",
    "volume_r": "correlation of volumes",
    "qsm_bias": "bias of the mean QSM",
}


def measurement(figures: pd.DataFrame) -> str:
    """Say which aims for distances, volumes and iron are missed in ordinary scans."""
    judged = figures[figures["met"].isin(["met", "missed"]) & (figures["profile"] == "ordinary")]
    judged = judged[judged["measure"].isin(MEASURES)]
    missed = [
        f"{MEASURES[row['measure']]} of the {row['structure'].replace('_', ' ')} in"
        f" {WORDS[row['target']]}, {row['value']:.3f} against {row['bar']:g}"
        for row in judged[judged["met"] == "missed"].to_dict("records")
    ]
    told = f" (missed: {'; '.join(missed)})" if missed else ""
    return (
        f"Of {len(judged)} aims for distance, volume and iron in ordinary scans"
        f" {len(judged) - len(missed)} are met{told}"
    )


def elsewhere(bundle: Bundle) -> str:
    """Say how well the heads of the demonstration are segmented, which hold other shapes."""
    found = measured("template_accuracy", bundle)
    structures = {label.abbreviation: label.structure for label in bundle.spec.labels}
    found["structure"] = found["structure"].map(structures)
    sentences = []
    for target, rows in found.groupby("target", sort=False):
        means = rows.groupby("structure", sort=False)["dice_mean"].mean()
        told = ", ".join(f"{name.replace('_', ' ')} {mean:.2f}" for name, mean in means.items())
        sentences.append(f"{WORDS[str(target)]}: {told}.")
    return paragraph(
        f"Dice on {found['scans'].iloc[0]} scans of other heads like the demonstration's, whose"
        f" nuclei are ellipsoids that may touch (`{found['command'].iloc[0]}`). "
        + " ".join(sentences)
    )


def others(bundle: Bundle) -> str:
    """Say what becomes of images that the simulator did not make."""
    plain, real = measured("plain_images", bundle), measured("real_head", bundle)
    kinds = {
        "clean": "QSM without noise",
        "noisy": "with noise",
        "divided": "with streaks",
        "unmasked": "and without a mask of the brain",
        "r2star": "R2*",
        "imag": "iMag",
    }
    told = "; ".join(
        f"{words} "
        + ", ".join(f"{mean:.2f}" for mean in plain.loc[plain["images"] == kind, "dice_mean"])
        for kind, words in kinds.items()
    )
    off = (plain["dice_mean"] - plain["confidence_mean"]).abs().max()
    found = real[real["volume"].notna()].groupby("target", sort=False).size()
    flagged = real["qc_flag"].notna()
    return paragraph(
        "Plain images of the four unseen heads, made without the simulator: each tissue with one"
        " value, soft borders and noise. Mean Dice of red and dentate nucleus, substantia nigra and"
        f" subthalamic nucleus: {told}. The mean confidence is off by {off:.2f} at most. In the one"
        " real head at hand (two echoes of 2.3 and 4.6 ms, voxels of 3 mm, without labels; the app"
        f" made the maps), of {len(bundle.spec.labels)} structures it finds"
        f" {', '.join(f'{n} in {WORDS[str(t)]}' for t, n in found.items())}. Those in QSM lie on"
        f" what looks like the nuclei. {flagged.sum()} of all {len(real)} are flagged"
        " (`benchmarks/other_images.py`)."
    )


HARM, NAMED = 0.05, 6
"""Loss of Dice from which an effect is named, and how many of them are."""


def robust(effects: pd.DataFrame) -> str:
    """Say what single effects of the simulator do to the Dice."""
    means = effects.groupby(["target", "effect"], sort=False)[list(STEPS)].mean()
    sentences = []
    for target, rows in means.groupby("target", sort=False):
        lost = (rows["off"] - rows["harsh"]).droplevel("target").sort_values(ascending=False)
        worst = [
            f"{effect.replace('_', ' ')} ({rows.loc[(target, effect), 'off']:.2f} to"
            f" {rows.loc[(target, effect), 'harsh']:.2f})"
            for effect in lost.index[lost > HARM][:NAMED]
        ]
        count = int((lost > HARM).sum())
        what = f"most by {', '.join(worst)}" if worst else "none"
        sentences.append(f"{WORDS[str(target)]}, {count} of {len(lost)}, {what}.")
    scans = int(effects["scans_each"].max())
    fallen = effects[effects["cliff"] == "yes"]
    cliffs = fallen["effect"].str.replace("_", " ") + " in " + fallen["target"].map(WORDS)
    return paragraph(
        f"In {scans} ordinary scan{'s' * (scans > 1)}, each effect of the simulator was set to its"
        " mild, middle and harsh end. At the harsh end the mean Dice over the"
        f" structures is lower by more than {HARM:g} with: {' '.join(sentences)} Before the harsh"
        f" end that of a structure falls by more than {CLIFF:g} from one step to the next in"
        f" {len(cliffs)} of {len(effects)} cases ({', '.join(dict.fromkeys(cliffs)) or 'none'}):"
        " `benchmarks/results/default_model_effects.tsv`, docs/robustness.md."
    )


def trusted(flags: pd.DataFrame) -> str:
    """Say how well bad masks are flagged, and scans with any bad mask by any flag."""
    flags = flags[(flags["group"] == "ordinary and full") & (flags["structure"] == "all")]
    flags = flags.set_index(["unit", "target"])
    row, scans, scans_in_qsm = (
        flags.loc[which] for which in (("mask", "all"), ("scan", "all"), ("scan", "qsm"))
    )
    return paragraph(
        f"Of the masks with a Dice below 0.7 {row['caught']:.0%} were flagged, and"
        f" {row['wrongly_flagged']:.0%} of the others (aims: 90 and 10 %; {row['n_bad']:.0f} and"
        f" {row['n'] - row['n_bad']:.0f} masks in all targets; the expected Dice is off by"
        f" {row['absolute_error']:.2f} on average). Of the {row['n_useless']:.0f} with a Dice below"
        f" {USELESS_DICE:g}, {row['useless_caught']:.1%} were flagged. Of the scans in which any of"
        f" the masks is below 0.7, {scans['caught']:.0%} had a flag (in QSM"
        f" {scans_in_qsm['caught']:.0%}), of the other scans {scans['wrongly_flagged']:.0%} (in QSM"
        f" {scans_in_qsm['wrongly_flagged']:.0%}): `benchmarks/results/default_model_flags.tsv`,"
        " docs/confidence.md."
    )


def tuned(bundle: Bundle) -> str:
    """Say what a few labels of another site bring, to these weights or to earlier ones."""
    found = pd.read_csv(RESULTS / "finetune.tsv", sep="\t")
    began = set(found.get("model_sha256", ["unknown"]))
    found = found[(found["structure"] == MEAN) & (found["metric"] == "dice")]
    sentences = []
    for site, rows in found.groupby("site", sort=False):
        before, after, gain = (rows.iloc[i] for i in range(3))
        sentences.append(
            f"{before['mean']:.3f} to {after['mean']:.3f}, by {gain['mean']:+.3f}"
            f" [{gain['lower']:+.3f}, {gain['upper']:+.3f}] ({site})"
        )
    return paragraph(
        "With four labelled scans of another simulated site, whose rater draws wider borders, the"
        f" mean Dice on {found['n_cases'].iloc[0]} other scans of that site went from"
        f" {'; '.join(sentences)} (`benchmarks/finetune.py`)."
        + ("" if began == {bundle.sha256[:12]} else " That was measured with weights before these.")
    )


def paragraph(text: str) -> str:
    """Break a text into lines."""
    return fill(text, 100, break_long_words=False, break_on_hyphens=False)


def table(figures: pd.DataFrame) -> str:
    """Set the figures out, one line for each structure and target."""
    rows = [
        (
            *("scans", "target", "structure", "Dice", "aim", "seen", "Dice of those"),
            *("HD95 (mm)", "volume bias"),
        ),
        ("---",) * 9,
    ]
    shown = figures[figures["structure"] != "all"]
    for (profile, target, structure), group in shown.groupby(
        ["profile", "target", "structure"], sort=False
    ):
        found = group.set_index("measure")
        rows.append(
            (
                f"{found['scans'].iloc[0]} {profile}",
                WORDS[str(target)],
                str(structure).replace("_", " "),
                f"{found.loc['dice', 'value']:.3f}",
                f"{found.loc['dice', 'bar']:.2f}",
                f"{found.loc['share_seen', 'value']:.0%}",
                f"{found.loc['dice_seen', 'value']:.3f}",
                f"{found.loc['hd95', 'value']:.2f}",
                f"{found.loc['volume_bias', 'value']:+.1%}",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
