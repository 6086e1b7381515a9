"""Calibrate a model's confidence, and check it on scans of other heads.

    python benchmarks/calibrate_confidence.py fit --model MODEL --output CALIBRATED \
        --labels-dir ../shared/data/headlabels --work WORK
    python benchmarks/default_model_accuracy.py --model CALIBRATED \
        --labels-dir ../shared/data/headlabels --work WORK2
    python benchmarks/calibrate_confidence.py check --model CALIBRATED --work WORK2

``fit`` simulates fresh scans of the heads that the model was trained on: ordinary ones, the full
range, the same with effects at their harsh end, slabs that hold some nuclei or none; and scans of
the template's head, whose nuclei are of other shapes. It segments them with the same functions as
the app, and fits the Dice of each structure to what describes it. Whether a structure has weights
of its own for each target, or the same for all, or the same but for the level, is chosen by what
foretells the Dice of heads that were left out; so is the threshold of the flag, for a cohort in
which three scans in four are ordinary and one is of the full range. The weights of the network stay
as they are. ``fit`` goes on where it was stopped.

``check`` takes the cases that ``default_model_accuracy.py`` has measured on the test heads, and
draws expected against true Dice, and counts how many of the bad ones were flagged.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from default_model_accuracy import RESULTS, Draw, simulated, workers
from machine import machine
from scipy.optimize import brentq

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.outputs import read_record, write_json
from fdl_bidsapp.imaging.confidence import (
    BAD_DICE,
    INTERCEPT,
    Calibration,
    choose_threshold,
    describe,
    expected,
    fit_weights,
)
from fdl_bidsapp.models.bundle import load_bundle, save_bundle
from fdl_bidsapp.settings import BEST
from fdl_bidsapp.simulation.parameters import Value, effects, generator, understood

TEMPLATE = "template"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "confidence.png"
HARSH = 3
"""Effects at their harsh end in one of four scans."""
SLABS, OFFSETS = (40.0, 70.0), (20.0, 80.0)
"""Thickness and displacement of slabs that lie too high, in one of eight scans, mm."""
MIX = {"ordinary": 3.0, "full": 1.0}
"""How many scans of each kind the cohort has for which the threshold is chosen. The others teach
what a bad mask looks like; few scans are like them, and they would set the threshold too low for
those that are usual."""
FOLDS = 4
BINS = 10
CAUGHT, WRONGLY = 0.9, 0.1
"""Aims: least share of bad structures flagged, largest share of the others."""
USELESS_DICE = 0.5
"""Below this a mask has less in common with the truth than apart from it."""


def main() -> None:
    """Fit or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("fit")
    command.add_argument("--model", default="default")
    command.add_argument("--output", type=Path, required=True, help="the calibrated model")
    command.add_argument("--labels-dir", type=Path, required=True)
    command.add_argument("--heads", nargs="+", default=[f"sub-{i:02d}" for i in range(1, 17)])
    command.add_argument("--scans", type=int, default=192)
    command.add_argument("--template-scans", type=int, default=24)
    command.add_argument("--seed", type=int, default=81_000)
    command.add_argument("--set", action="append", default=[], metavar="EFFECT=VALUE")
    command.add_argument("--work", type=Path, required=True, help="what was measured, kept")
    command.add_argument("--processes", type=int, default=2)
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    command.add_argument("--results", type=Path, default=RESULTS)
    command.set_defaults(run=fit)
    command = commands.add_parser("check")
    command.add_argument("--model", default="default", help="the calibrated one")
    command.add_argument("--work", type=Path, required=True, help="of default_model_accuracy.py")
    command.add_argument("--figure", type=Path, default=FIGURE)
    command.add_argument("--results", type=Path, default=RESULTS)
    command.set_defaults(run=check)
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    options.run(options)


def about(sha256: str) -> dict[str, str]:
    """Return what a table says of how it was made."""
    # Where they lie on this machine tells nobody anything.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "model_sha256": sha256[:12],
        "command": " ".join(["python benchmarks/calibrate_confidence.py", *words]),
        "machine": machine(),
        "versions": f"Python {platform.python_version()}, torch {version('torch')}, "
        f"fdl-bidsapp {__version__}",
    }


def fit(options: argparse.Namespace) -> None:
    """Measure scans, fit, and write the calibrated model."""
    bundle = load_bundle(options.model)
    draws = [
        calibration_draw(i, options.heads, options.seed, options.set) for i in range(options.scans)
    ]
    draws += [template_draw(i, options.seed) for i in range(options.template_scans)]
    measure = partial(
        measured,
        model=str(bundle.path),
        labels_dir=options.labels_dir,
        work=options.work,
        device=options.device,
    )
    rows, start = [], time.monotonic()
    with workers(options.processes) as pool:
        for i, (draw, found) in enumerate(zip(draws, pool.map(measure, draws), strict=True)):
            rows += [{**row, "group": draw.group} for row in found]
            minutes = (time.monotonic() - start) / 60
            print(f"{i + 1} of {len(draws)} scans, {minutes:.1f} min", flush=True)
    cases = pd.DataFrame(rows)
    calibration, table = calibrate(cases)
    provenance = {
        **bundle.spec.provenance,
        "calibration": {
            "heads": options.heads,
            "scans": options.scans,
            "template_scans": options.template_scans,
            "seed": options.seed,
            "forced": options.set,
            "app_version": __version__,
        },
    }
    spec = replace(bundle.spec, calibration=calibration, provenance=provenance)
    # As it was stored: in half precision, if that holds every weight exactly.
    half = all(tensor.equal(tensor.half().to(tensor.dtype)) for tensor in bundle.state.values())
    digest = save_bundle(
        options.output,
        bundle.network(),
        spec,
        bundle.bank,
        dtype="float16" if half else "float32",
    )
    path = options.results / "default_model_calibration.tsv"
    table.assign(**about(digest)).to_csv(
        path, sep="\t", index=False, na_rep="n/a", float_format="%.4g"
    )
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    print(f"threshold {calibration.threshold}; {options.output} {digest}")


def calibration_draw(i: int, heads: Sequence[str], seed: int, words: Sequence[str]) -> Draw:
    """Return the i-th scan; of eight, two are ordinary, four of the full range."""
    given = understood(dict(word.split("=", 1) for word in words))
    forced: dict[str, Value] = {}
    rng = generator([seed, i], "kind of scan")
    if i % 8 == 7:
        forced = {"slab": rng.uniform(*SLABS), "slab_offset": rng.uniform(*OFFSETS)}
    elif i % 4 == 3:
        forced = {str(name): "harsh" for name in rng.permutation(list(effects()))[:HARSH]}
    # Each head comes in each kind.
    head = heads[(i + i // len(heads)) % len(heads)]
    profile = "ordinary" if i % 4 == 0 else "full"
    group = "harsh" if forced else profile
    return Draw(f"calibration{i:04d}", group, head, (seed, i), profile, {**given, **forced})


def template_draw(i: int, seed: int) -> Draw:
    """Return the i-th scan of the template's head, of which each seed makes another one."""
    name = f"{TEMPLATE}{i:04d}"
    return Draw(name, TEMPLATE, name, (seed + i,), "ordinary")


def scanned(
    draw: Draw, labels_dir: Path, device: str
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Simulate a scan; return its maps, label map and affine."""
    if draw.head.startswith(TEMPLATE):
        from fdl_bidsapp.training.data import simulate_template

        template = simulate_template(draw.seed[0])
        return template.maps, template.labels, template.affine
    scan = simulated(draw, labels_dir, device)
    maps = {name: image.cpu().numpy() for name, image in scan.maps.items()}
    return maps, scan.labels.cpu().numpy(), scan.affine


@lru_cache(maxsize=1)
def loaded(model: str, device: str) -> Any:
    """Load a model once a process."""
    import torch

    bundle = load_bundle(model)
    return bundle, bundle.network(device), torch.device(device)


def measured(
    draw: Draw, model: str, labels_dir: Path, work: Path, device: str
) -> list[dict[str, Any]]:
    """Return features and Dice of a scan's structures in every target; keep them in a file."""
    from fdl_bidsapp.imaging.overlap import dice
    from fdl_bidsapp.pipeline import ScanImages, segment_canvas, to_canvas, to_native

    bundle, network, place = loaded(model, device)
    spec = bundle.spec
    # Their digest changes with the calibration, which changes none of these figures.
    uncalibrated = replace(spec, calibration=None, provenance={})
    wanted = {
        "Network": _fingerprint(bundle.state, repr(uncalibrated)),
        **draw.record,
    }
    path = work / f"{draw.name}.json"
    known = read_record(path) or {}
    if {key: known.get(key) for key in wanted} == wanted:
        return list(known["Rows"])
    maps, true, scan_affine = scanned(draw, labels_dir, device)
    rows = []
    for target in spec.contrasts:
        images = ScanImages(target, maps, scan_affine)
        probabilities, affine = segment_canvas(to_canvas(images, spec), bundle, network, place)
        result = to_native(probabilities, affine, images, uncalibrated)
        described = describe(
            *(result.labels, result.probabilities, spec.labels, scan_affine),
            *(result.components, result.contrasts),
        )
        for label, features in zip(spec.labels, described, strict=True):
            found, there = result.labels == label.index, true == label.index
            overlap = dice(found, there)
            rows.append(
                {
                    **{"scan": draw.name, "head": draw.head, "target": target},
                    **{"structure": label.structure, "abbreviation": label.abbreviation},
                    "dice": None if np.isnan(overlap) else overlap,
                    **{"voxels": int(found.sum()), "true_voxels": int(there.sum())},
                    "features": features,
                }
            )
    write_json(path, {**wanted, "Rows": rows})
    return rows


def _fingerprint(state: dict[str, Any], spec: str) -> str:
    import hashlib

    digest = hashlib.sha256(spec.encode())
    for name in sorted(state):
        digest.update(state[name].numpy().tobytes())
    return digest.hexdigest()


def calibrate(cases: pd.DataFrame) -> tuple[Calibration, pd.DataFrame]:
    """Fit each structure, per target where that foretells better; choose the threshold.

    Returns
    -------
    Calibration
    table
        How well it foretells heads that were left out.
    """
    # What was not found has no features, and no confidence whatever the weights.
    nothing = cases[cases["features"].isna() & (cases["dice"] == 0)]
    cases = cases[cases["features"].notna() & cases["dice"].notna()].reset_index(drop=True)
    heads = sorted(cases["head"].unique())
    cases["fold"] = [heads.index(head) % min(FOLDS, len(heads)) for head in cases["head"]]
    weights: dict[str, dict[str, dict[str, float]]] = {target: {} for target in set(cases.target)}
    foretold = pd.Series(np.nan, cases.index)
    rows = []
    for structure, own in cases.groupby("structure", sort=False):
        guesses = {way: cross_validated(own, fitted) for way, fitted in WAYS.items()}
        way = min(guesses, key=lambda way: float(((guesses[way] - own["dice"]) ** 2).mean()))
        foretold.loc[own.index] = guesses[way]
        found = WAYS[way](own)
        for target, part in own.groupby("target", sort=False):
            weights[target][structure] = found[target]
            guess = foretold[part.index]
            rows.append(
                {
                    **{"target": target, "structure": structure, "masks": len(part)},
                    "weights": way,
                    "dice": part["dice"].mean(),
                    "expected": guess.mean(),
                    "absolute_error": (guess - part["dice"]).abs().mean(),
                    "without_features": (part["dice"] - part["dice"].mean()).abs().mean(),
                    "r": guess.corr(part["dice"]),
                }
            )
    # A mask that is empty where it should not be is bad, and flagged for that.
    every = pd.concat([cases.assign(foretold=foretold), nothing.assign(foretold=0.0)])
    counts = every["group"].value_counts()
    weight = every["group"].map(lambda group: MIX.get(group, 0.0) / counts[group])
    threshold = choose_threshold(*(each.tolist() for each in (every.foretold, every.dice, weight)))
    for group, part in every.groupby("group", sort=False):
        bad, flagged = part["dice"] < BAD_DICE, part["foretold"] < threshold
        print(
            f"left-out heads, {group}: {bad.sum()} of {len(part)} masks below {BAD_DICE}; flagged "
            f"{flagged[bad].mean():.3f} of these and {flagged[~bad].mean():.3f} of the others"
        )
    return Calibration(weights, threshold), pd.DataFrame(rows)


Fitted = dict[str, dict[str, float]]
"""Weights by target."""


def together(cases: pd.DataFrame) -> Fitted:
    """Fit all targets of a structure with the same weights."""
    weights = fit_weights(list(cases["features"]), list(cases["dice"]))
    return {target: weights for target in cases["target"].unique()}


def levelled(cases: pd.DataFrame) -> Fitted:
    """Fit them with the same weights but for the intercept, which gives each its mean Dice."""
    found = {}
    for target, weights in together(cases).items():
        own = cases[cases["target"] == target]

        def excess(shift: float, own: pd.DataFrame = own, weights: Any = weights) -> float:
            moved = {**weights, INTERCEPT: weights[INTERCEPT] + shift}
            return float(
                np.mean([expected(moved, f) for f in own["features"]]) - own["dice"].mean()
            )

        shift = brentq(excess, -6, 6) if excess(-6) < 0 < excess(6) else 0.0
        found[target] = {**weights, INTERCEPT: weights[INTERCEPT] + float(shift)}
    return found


def apart(cases: pd.DataFrame) -> Fitted:
    """Fit each target by itself."""
    return {
        target: fit_weights(list(own["features"]), list(own["dice"]))
        for target, own in cases.groupby("target", sort=False)
    }


WAYS: dict[str, Callable[[pd.DataFrame], Fitted]] = {
    "of all targets": together,
    "of all targets, levels of each": levelled,
    "of this target": apart,
}


def cross_validated(cases: pd.DataFrame, fitted: Callable[[pd.DataFrame], Fitted]) -> pd.Series:
    """Return the Dice foretold for each case by a fit to the other heads."""
    foretold = pd.Series(np.nan, cases.index)
    for fold in sorted(set(cases["fold"])):
        left_out = cases["fold"] == fold
        # With a single fold there is nothing else to fit to.
        known = cases[~left_out] if not left_out.all() else cases
        weights = fitted(known)
        # A target that no other head has is taken as all others are.
        others = next(iter(weights.values()))
        foretold[left_out] = [
            expected(weights.get(target, others), features)
            for target, features in cases.loc[left_out, ["target", "features"]].to_numpy()
        ]
    return foretold


def check(options: argparse.Namespace) -> None:
    """Draw the reliability figure and count the flags."""
    bundle = load_bundle(options.model)
    if bundle.spec.calibration is None:
        raise SystemExit("the model has no calibration: run fit first")
    files = sorted(options.work.glob("*/cases/*.json"))
    contents = [json.loads(path.read_text("utf-8")) for path in files]
    rows = [row for one in contents if one["Model"] == bundle.sha256 for row in one["Rows"]]
    if not rows:
        raise SystemExit(
            f"{options.work} has no cases of this model: run default_model_accuracy.py"
        )
    cases = pd.DataFrame(rows)
    cases["confidence"] = cases["confidence"].astype(float)
    table = flag_rates(cases[cases["confidence"].notna()]).assign(**about(bundle.sha256))
    path = options.results / "default_model_flags.tsv"
    table.to_csv(path, sep="\t", index=False, na_rep="n/a", float_format="%.4g")
    shown = table[(table["target"] == "all") | (table["structure"] == "all")]
    shown = shown.drop(columns=["model_sha256", "command", "machine", "versions"])
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    # Single effects are one scan over and over.
    shown = cases[cases["group"].isin(["ordinary", "full"]) & (cases["target"] != BEST)]
    draw_reliability(shown, bundle.spec.calibration.threshold, options.figure)
    print(f"{path}\n{options.figure}")


def flag_rates(cases: pd.DataFrame) -> pd.DataFrame:
    """Count bad masks and flags by group of scans, target and structure.

    A mask counts where there was something to find, or something was found. The aims are for masks;
    the rows of whole scans take one as bad where one of its masks is, and as flagged likewise.
    """
    cases = cases[cases["dice"].notna()]
    own = cases["flag"].str.contains("low_confidence|empty|failed")
    cases = cases.assign(
        bad=cases["dice"] < BAD_DICE,
        useless=cases["dice"] < USELESS_DICE,
        confident_flag=own,
        any_flag=cases["flag"] != "ok",
        error=(cases["confidence"] - cases["dice"]).abs(),
    )
    main = cases[cases["group"].isin(["ordinary", "full"])].assign(group="ordinary and full")
    rows = []
    for group, part in pd.concat([main, cases]).groupby("group", sort=False):
        for target in ("all", *part["target"].unique()):
            # The best contrast of a scan is one of the others once more.
            some = part[part["target"] != BEST if target == "all" else part["target"] == target]
            for structure in ("all", *some["structure"].unique()):
                chosen = some if structure == "all" else some[some["structure"] == structure]
                rows.append({"group": group, "target": target, "structure": structure}
                            | {"unit": "mask"} | _rates(chosen))  # fmt: skip
            scans = some.groupby(["target", "scan"]).agg(
                {name: "any" for name in ("bad", "useless", "confident_flag", "any_flag")}
                | {"error": "mean"}
            )
            rows.append({"group": group, "target": target, "structure": "all"}
                        | {"unit": "scan"} | _rates(scans))  # fmt: skip
    table = pd.DataFrame(rows)
    fine = (table["caught"] >= CAUGHT) & (table["wrongly_flagged"] <= WRONGLY)
    known = table["caught"].notna() & table["wrongly_flagged"].notna() & (table["unit"] == "mask")
    return table.assign(met=np.where(known, np.where(fine, "met", "missed"), "n/a"))


def _rates(cases: pd.DataFrame) -> dict[str, Any]:
    bad, good, useless = cases[cases["bad"]], cases[~cases["bad"]], cases[cases["useless"]]
    return {
        "n": len(cases),
        "n_bad": len(bad),
        "caught": bad["confident_flag"].mean(),
        "wrongly_flagged": good["confident_flag"].mean(),
        "caught_by_any_flag": bad["any_flag"].mean(),
        "wrongly_flagged_by_any": good["any_flag"].mean(),
        "n_useless": len(useless),
        "useless_caught": useless["confident_flag"].mean(),
        "absolute_error": cases["error"].mean(),
    }


def draw_reliability(cases: pd.DataFrame, threshold: float, path: Path) -> None:
    """Draw true against expected Dice, a panel for each structure, a colour for each target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from fdl_bidsapp.reports.palette import CONTRASTS, OKABE_ITO

    cases = cases[cases["dice"].notna() & cases["confidence"].gt(0)]
    structures = list(dict.fromkeys(cases["structure"]))
    columns = min(2, len(structures))
    lines = -(-len(structures) // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(4.2 * columns, 4.0 * lines),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axis, structure in zip(axes.flat, structures, strict=False):
        own = cases[cases["structure"] == structure]
        for colour, (target, part) in zip(
            OKABE_ITO, own.groupby("target", sort=False), strict=False
        ):
            axis.plot(part["confidence"], part["dice"], ".", ms=2.5, alpha=0.35, color=colour)
            # Equal numbers of masks in each bin.
            order = np.array_split(np.argsort(part["confidence"].to_numpy()), BINS)
            points = [part.iloc[chosen][["confidence", "dice"]].mean() for chosen in order
                      if len(chosen)]  # fmt: skip
            x, y = np.array(points).T
            axis.plot(x, y, "o-", ms=5, lw=1.5, color=colour, label=CONTRASTS[target][0])
        axis.plot([0, 1], [0, 1], "--", lw=1, color="0.4")
        axis.axhline(BAD_DICE, lw=0.8, color="0.75", zorder=0)
        axis.axvspan(0, threshold, color="0.94", zorder=-1)
        axis.set(
            xlim=(0, 1), ylim=(0, 1), aspect="equal", title=structure.replace("_", " ").capitalize()
        )
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(structures) :]:
        axis.set_visible(False)
    axes[0, 0].text(0.02, 0.96, "flagged", color="0.35", fontsize=9)
    axes[0, 0].legend(frameon=False, loc="lower right", fontsize=9)
    figure.supxlabel("Confidence (expected Dice)")
    figure.supylabel("Dice with the truth")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
