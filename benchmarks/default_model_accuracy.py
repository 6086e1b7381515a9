"""Measure a model on simulated scans of heads that no training has seen, through the whole app.

    python benchmarks/default_model_accuracy.py --labels-dir ../shared/data/headlabels --work WORK

Groups of scans: ``ordinary`` and ``full``, as many of each head as ``--draws`` and ``--full-draws``
say; ``effects``, where each effect of the simulator in turn is off, mild, middle and harsh in the
same ordinary scan; ``absent``, slabs that end above all nuclei or above the dentate ones. Every
scan is simulated once, from its echoes, written as BIDS, and segmented by ``fdl-bidsapp`` once for
each target, and (but for ``effects``) once with the best of them. Masks are compared with the truth
on the scan's own grid; docs/metrics.md says what an empty mask gets. ``contrast`` is by how many
standard deviations of its surround a structure differs from it in the map that was segmented:
``seen`` is what reaches two.

It goes on where it was stopped, scan by scan. A run with another model finds the scans again that
are in the work folder (some 60 MB each); ``--discard`` deletes each once it is measured.
A small trial:

    python benchmarks/default_model_accuracy.py --labels-dir ../shared/data/headlabels --work WORK \
        --heads sub-17 --groups ordinary absent --draws 1 --results WORK/results \
        --set in_plane=1.2 --set slice_thickness=3 --set slab=80
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from machine import command_line, machine

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.outputs import read_record, write_json
from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.imaging.measure import contrasts
from fdl_bidsapp.imaging.overlap import dice, hausdorff95
from fdl_bidsapp.labels import Label, mirrored
from fdl_bidsapp.memory import kept_memory
from fdl_bidsapp.models.bundle import Bundle, load_bundle
from fdl_bidsapp.settings import BEST, CONTRASTS
from fdl_bidsapp.simulation.parameters import LEVELS, Value, draw_values, effects, understood
from fdl_bidsapp.simulation.writing import MAPS

RESULTS = Path(__file__).parent / "results"
HEADS = ("sub-17", "sub-18", "sub-19", "sub-20")
GROUPS = ("ordinary", "full", "effects", "absent")
STEPS = ("off", *LEVELS)
CLIFF = 0.1
"""Loss of Dice from one step of an effect to the next that is called a cliff."""

DEPENDS: dict[str, dict[str, Value]] = {"slab_offset": {"slab": 100.0}}
"""What an effect needs in order to be seen."""

ABSENT: tuple[dict[str, Value], ...] = (
    {"slab": 50.0, "slab_offset": 68.0},
    {"slab": 60.0, "slab_offset": 34.0},
)
"""Slabs above all nuclei, and above the dentate nuclei alone."""

DICE_BARS = {
    "red_nucleus": 0.92,
    "dentate_nucleus": 0.90,
    "substantia_nigra": 0.86,
    "subthalamic_nucleus": 0.78,
}

SEEN = 2.0
"""A structure is seen that differs from its surround by so many standard deviations of it."""

OTHER_TARGETS, FULL_RANGE = 0.05, 0.08
"""How far other targets than QSM, and the full range, may stay below."""


@dataclass(frozen=True)
class Draw:
    """One simulated scan.

    Attributes
    ----------
    name
        Label of the participant.
    group
        One of :data:`GROUPS`, or another folder of the work folder.
    head
        Name of the label map.
    seed, profile, forced
        As for :func:`~fdl_bidsapp.simulation.parameters.draw_values`.
    """

    name: str
    group: str
    head: str
    seed: tuple[int, ...]
    profile: str
    forced: dict[str, Value] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Value]:
        """Return the value of every effect."""
        return draw_values(self.seed, self.profile, self.forced)

    @property
    def record(self) -> dict[str, Any]:
        """Return what the scan follows from, as it is kept in a file beside it."""
        return {"LabelMap": self.head, "Seed": list(self.seed), "Effects": self.values}


def main() -> None:
    """Simulate, run the app, measure, write the tables."""
    options = parse()
    bundle = load_bundle(options.model)
    known = [*bundle.spec.contrasts, *([BEST] if bundle.spec.calibration else [])]
    targets = [target for target in options.targets if target in known]
    draws, steps = plan(options)
    for group in dict.fromkeys(draw.group for draw in draws):
        # What a single effect does is asked of one contrast at a time.
        wanted = [target for target in targets if target != BEST or group != "effects"]
        run_group([draw for draw in draws if draw.group == group], bundle, wanted, options)
    cases = read_cases(options.work, draws)
    about = {
        "model_sha256": bundle.sha256[:12],
        "command": command_line("benchmarks/default_model_accuracy.py", WORK=options.work),
        "machine": machine(),
        "versions": f"Python {platform.python_version()}, torch {version('torch')}, "
        f"fdl-bidsapp {__version__}",
    }
    options.results.mkdir(parents=True, exist_ok=True)
    write_tables(cases, steps, about, options.results)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="default", help="name or file; default: default")
    parser.add_argument("--labels-dir", type=Path, required=True, help="head label maps")
    parser.add_argument("--heads", nargs="+", default=list(HEADS))
    parser.add_argument("--work", type=Path, required=True, help="folder of the scans, kept")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--draws", type=int, default=13, help="ordinary scans of each head")
    parser.add_argument("--full-draws", type=int, default=13, help="of each head, over all ranges")
    parser.add_argument("--effect-draws", type=int, default=1, help="of each head and step")
    parser.add_argument("--effect-heads", nargs="+", help="heads of single effects; default: all")
    parser.add_argument("--effects", nargs="+", default=list(effects()), help="default: all")
    parser.add_argument("--targets", nargs="+", default=[*CONTRASTS, BEST])
    parser.add_argument("--seed", type=int, default=71_000)
    parser.add_argument(
        "--set", action="append", default=[], metavar="EFFECT=VALUE", help="in every scan"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="scans to one run of the app")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--discard", action="store_true", help="delete scans once measured")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.forced = understood(dict(word.split("=", 1) for word in options.set))
    return options


def plan(options: argparse.Namespace) -> tuple[list[Draw], list[dict[str, str]]]:
    """List the scans, and which of them show which step of which effect."""
    draws: dict[str, Draw] = {}
    steps = []
    for h, head in enumerate(options.heads):
        number = "".join(c for c in head.removeprefix("sub-") if c.isalnum())
        for group, count in (("ordinary", options.draws), ("full", options.full_draws)):
            for i in range(count if group in options.groups else 0):
                seed = (options.seed + (group == "full"), h, i)
                draw = Draw(
                    f"{number}{group[0]}{i:02d}", group, head, seed, group, dict(options.forced)
                )
                draws[f"{group} {draw.name}"] = draw
        seen = "effects" in options.groups and head in (options.effect_heads or options.heads)
        for i in range(options.effect_draws if seen else 0):
            seed = (options.seed + 2, h, i)
            for effect in options.effects:
                for step in STEPS:
                    forced = {**options.forced, **DEPENDS.get(effect, {}), effect: step}
                    # Steps that are alike, of one effect or of two, are one scan.
                    values = draw_values(seed, "ordinary", forced)
                    told = json.dumps([head, seed, values], sort_keys=True)
                    name = f"{number}e{hashlib.sha256(told.encode()).hexdigest()[:10]}"
                    draws.setdefault(name, Draw(name, "effects", head, seed, "ordinary", forced))
                    steps.append({"effect": effect, "step": step, "scan": name})
        for i, slab in enumerate(ABSENT if "absent" in options.groups else ()):
            seed = (options.seed + 3, h, i)
            draw = Draw(
                f"{number}a{i}", "absent", head, seed, "ordinary", {**options.forced, **slab}
            )
            draws[draw.name] = draw
    return list(draws.values()), steps


def run_group(
    draws: Sequence[Draw], bundle: Bundle, targets: Sequence[str], options: argparse.Namespace
) -> None:
    """Simulate, segment and measure what of a group is not measured yet."""
    from fdl_bidsapp.simulation.writing import describe_datasets

    folder = options.work / draws[0].group
    todo = [draw for draw in draws if not is_measured(draw, folder, bundle, targets)]
    print(f"{draws[0].group}: {len(todo)} of {len(draws)} scans to do", flush=True)
    describe_datasets(folder / "bids", folder / "truth", "# Simulated scans to measure a model on")
    start = time.monotonic()
    with workers(options.processes) as pool:
        for first in range(0, len(todo), options.batch):
            batch = todo[first : first + options.batch]
            simulate = partial(
                write_draw, labels_dir=options.labels_dir, folder=folder, device=options.device
            )
            for name in pool.map(simulate, batch):
                told(draws[0].group, f"simulated {name}", start)
            for target in targets:
                segment(batch, folder, target, bundle, options)
                told(draws[0].group, f"segmented {len(batch)} scans by {target}", start)
            measure = partial(measure_draw, folder=folder, bundle=bundle, targets=targets)
            for draw, rows in zip(batch, pool.map(measure, batch), strict=True):
                write_json(case_file(draw, folder), {**identity(draw, bundle), "Rows": rows})
                if options.discard:
                    for part in ("bids", *(f"out-{target}" for target in targets)):
                        shutil.rmtree(folder / part / f"sub-{draw.name}", ignore_errors=True)
            told(draws[0].group, f"measured {first + len(batch)} of {len(todo)}", start)


def told(group: str, what: str, start: float) -> None:
    """Print progress."""
    print(f"{group}: {what}, {(time.monotonic() - start) / 60:.1f} min", flush=True)


def workers(processes: int) -> ProcessPoolExecutor:
    """Return a pool of processes of one thread each."""
    return ProcessPoolExecutor(processes, get_context("spawn"), initializer=one_thread)


def one_thread() -> None:
    """Keep PyTorch of a worker to one thread."""
    import torch

    torch.set_num_threads(1)


def identity(draw: Draw, bundle: Bundle) -> dict[str, Any]:
    """Return what the rows of a scan follow from."""
    return {"Model": bundle.sha256, **draw.record}


def case_file(draw: Draw, folder: Path) -> Path:
    """Return where the rows of a scan are kept."""
    return folder / "cases" / f"{draw.name}.json"


def is_measured(draw: Draw, folder: Path, bundle: Bundle, targets: Iterable[str]) -> bool:
    """Tell whether a scan was measured with this model in all targets."""
    known = read_record(case_file(draw, folder)) or {}
    wanted = identity(draw, bundle)
    return {key: known.get(key) for key in wanted} == wanted and set(targets) <= {
        row["target"] for row in known["Rows"]
    }


@lru_cache(maxsize=2)
def head_map(path: Path, device: str) -> Any:
    """Read a head label map, once for scans that follow each other."""
    from fdl_bidsapp.simulation.labelmaps import read_head_map

    return read_head_map(path, device)


def simulated(draw: Draw, labels_dir: Path, device: str) -> Any:
    """Simulate a scan from its echoes."""
    from fdl_bidsapp.simulation.simulator import simulate_label_map

    head = head_map(labels_dir / f"{draw.head}_dseg.nii.gz", device)
    with kept_memory():
        return simulate_label_map(head, draw.seed, draw.values)


def write_draw(draw: Draw, labels_dir: Path, folder: Path, device: str) -> str:
    """Simulate and write a scan, unless it is there; the sidecar of its truth comes last."""
    from fdl_bidsapp.simulation.population import acquisition
    from fdl_bidsapp.simulation.writing import write_maps, write_truth

    stem = Path(f"sub-{draw.name}", "anat", f"sub-{draw.name}")
    wanted = draw.record
    known = read_record(folder / "truth" / f"{stem}_dseg.json") or {}
    written = (folder / "bids" / f"{stem}_Chimap.nii.gz").is_file()
    if written and {key: known.get(key) for key in wanted} == wanted:
        return draw.name
    (folder / "truth" / f"{stem}_dseg.json").unlink(missing_ok=True)
    scan = simulated(draw, labels_dir, device)
    maps = {contrast: image.cpu().numpy() for contrast, image in scan.maps.items()}
    write_maps(folder / "bids" / stem, maps, scan.affine, acquisition(scan.values))
    write_truth(folder / "truth" / stem, scan.labels.cpu().numpy(), scan.affine, wanted)
    return draw.name


def segment(
    batch: Sequence[Draw], folder: Path, target: str, bundle: Bundle, options: argparse.Namespace
) -> None:
    """Run the app on some scans; what it says goes to a log file."""
    words = [
        *(Path(sys.executable).parent / "fdl-bidsapp", folder / "bids", folder / f"out-{target}"),
        *("participant", "--target", target, "--model", bundle.path, "--device", options.device),
        *("--nprocs", options.processes, "--omp-nthreads", 1),
        *("--participant-label", *(draw.name for draw in batch)),
    ]
    with (folder / "app.log").open("a") as log:
        code = subprocess.run([str(word) for word in words], stdout=log, stderr=log).returncode
    if code not in (0, 1):
        raise SystemExit(f"fdl-bidsapp failed with exit code {code}: see {folder / 'app.log'}")


def measure_draw(
    draw: Draw, folder: Path, bundle: Bundle, targets: Sequence[str]
) -> list[dict[str, Any]]:
    """Compare a scan's masks with the truth: a row for each target and structure."""
    stem = Path(f"sub-{draw.name}", "anat", f"sub-{draw.name}")
    truth = nib.load(folder / "truth" / f"{stem}_dseg.nii.gz")
    true = np.asarray(truth.dataobj)
    maps = {
        contrast: np.asarray(
            nib.load(folder / "bids" / f"{stem}_{name}.nii.gz").dataobj, np.float32
        )
        for contrast, name in MAPS.items()
    }
    spacing = spacing_of(truth.affine)
    labels = bundle.spec.labels
    standing_out = {
        contrast: contrasts(true, labels, truth.affine, data) for contrast, data in maps.items()
    }
    rows = []
    for target in targets:
        out = folder / f"out-{target}" / stem
        record = read_record(out.with_name(f"{out.name}_morph.json")) or {}
        done = record.get("Status") == "ok"
        mine = np.zeros_like(true)
        table: dict[str, dict[str, Any]] = {}
        if done:
            assert record["ModelSHA256"] == bundle.sha256, f"{out} is of another model"
            found = nib.load(out.with_name(f"{out.name}_space-orig_seg-fdl_dseg.nii.gz"))
            mine = np.asarray(found.dataobj)
            morph = pd.read_csv(out.with_name(f"{out.name}_morph.tsv"), sep="\t", na_values=["n/a"])
            table = morph.set_index("abbreviation").to_dict("index")
        for label, other in zip(labels, mirrored(labels), strict=True):
            own = table.get(label.abbreviation, {"qc_flag": "failed", "confidence": 0.0})
            segmented = record.get("Target") or target
            rows.append(
                {
                    **{"scan": draw.name, "group": draw.group, "head": draw.head},
                    **{"profile": draw.profile, "target": target},
                    **{"structure": label.structure, "abbreviation": label.abbreviation},
                    **compare(mine, true, maps["qsm"], label, labels[other], spacing),
                    "segmented": segmented,
                    "contrast": standing_out.get(segmented, {}).get(label.abbreviation),
                    "confidence": None if pd.isna(own["confidence"]) else own["confidence"],
                    "flag": own["qc_flag"],
                }
            )
    return rows


def compare(
    mine: np.ndarray,
    true: np.ndarray,
    qsm: np.ndarray,
    label: Label,
    other: Label,
    spacing: Sequence[float],
) -> dict[str, float | None]:
    """Compare one structure's mask with the truth."""
    a, b = mine == label.index, true == label.index
    volume = float(np.prod(spacing))
    crossed = np.count_nonzero(a & (true == other.index)) if other != label else 0

    def mean(mask: np.ndarray) -> float:
        values = qsm[mask]
        values = values[values != 0]
        return float(values.mean()) if values.size else np.nan

    numbers = {
        "dice": dice(a, b),
        "hd95": hausdorff95(a, b, spacing),
        "volume": np.count_nonzero(a) * volume,
        "true_volume": np.count_nonzero(b) * volume,
        "qsm": mean(a),
        "true_qsm": mean(b),
        # Left for right: more of the mask lies in the other side's truth than in its own.
        "swapped": int(crossed > np.count_nonzero(a & b)),
    }
    return {key: None if np.isnan(value) else value for key, value in numbers.items()}


def read_cases(work: Path, draws: Iterable[Draw]) -> pd.DataFrame:
    """Read the rows of scans that were measured."""
    files = [case_file(draw, work / draw.group) for draw in draws]
    rows = [row for file in files for row in (read_record(file) or {})["Rows"]]
    table = pd.DataFrame(rows)
    numbers = ["dice", "hd95", "volume", "true_volume", "qsm", "true_qsm"]
    numbers += ["confidence", "contrast"]
    return table.astype(dict.fromkeys(numbers, float))


def write_tables(
    cases: pd.DataFrame, steps: Sequence[dict[str, str]], about: dict[str, str], results: Path
) -> None:
    """Write the tables of cases, of figures beside their bars, of effects and of absence."""

    def write(name: str, table: pd.DataFrame, digits: int = 4) -> None:
        path = results / f"{name}.tsv"
        table.to_csv(path, sep="\t", index=False, na_rep="n/a", float_format=f"%.{digits}g")
        print(f"{path}: {len(table)} rows")

    # The many cases of single effects are in the work folder. A run of these alone leaves the rest.
    if steps:
        write("default_model_effects", robustness(cases, steps).assign(**about))
    cases = cases[cases["group"] != "effects"]
    if not len(cases):
        return
    write("default_model_cases", cases)
    summary = pd.DataFrame(summarise(cases)).assign(**about)
    write("default_model", summary)
    absent = cases[cases["true_volume"] == 0]
    if len(absent):
        write("default_model_absent", absence(absent).assign(**about))
    shown = summary[["profile", "target", "structure", "measure", "scans", "value", "bar", "met"]]
    print(shown[shown["bar"].notna()].to_string(index=False, float_format=lambda v: f"{v:.3f}"))


def summarise(cases: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Give a row for each figure, beside the bar where there is one."""
    main = cases[cases["group"].isin(["ordinary", "full"])]
    for (profile, target, structure), group in main.groupby(
        ["profile", "target", "structure"], sort=False
    ):
        bars = bars_of(profile, target, structure)
        for measure, value in figures(group).items():
            yield {
                **{"profile": profile, "target": target, "structure": structure},
                **{"measure": measure, "scans": group["scan"].nunique(), "value": value},
                **judged(value, *bars.get(measure, (None, True))),
            }
    for (group_name, target), group in cases.groupby(["group", "target"], sort=False):
        value = int(group["swapped"].sum())
        yield {
            **{"profile": group_name, "target": target, "structure": "all"},
            **{"measure": "swapped", "scans": group["scan"].nunique(), "value": value},
            **judged(value, 0, False),
        }


def figures(group: pd.DataFrame) -> dict[str, float]:
    """Measure one structure, both sides of it together, in one target and profile."""
    present = group[group["true_volume"] > 0]
    both = present[present["qsm"].notna() & present["true_qsm"].notna()]
    true = present["true_volume"]
    seen = present["contrast"] >= SEEN
    return {
        "dice": present["dice"].mean(),
        "dice_p05": present["dice"].quantile(0.05),
        "share_dice_below_0.7": (present["dice"] < 0.7).mean(),
        "share_seen": seen.mean(),
        "dice_seen": present.loc[seen, "dice"].mean(),
        "dice_unseen": present.loc[~seen, "dice"].mean(),
        "hd95": present["hd95"].mean(),
        "hd95_median": present["hd95"].median(),
        "volume_bias": present["volume"].sum() / true.sum() - 1,
        "volume_r": present["volume"].corr(true) if len(present) > 2 else np.nan,
        "qsm_bias": both["qsm"].sum() / both["true_qsm"].sum() - 1,
        "qsm_error_median": ((both["qsm"] - both["true_qsm"]) / both["true_qsm"]).abs().median(),
    }


def bars_of(profile: str, target: str, structure: str) -> dict[str, tuple[float, bool]]:
    """Return what is aimed at, and whether more is better (else, less in absolute value)."""
    bars: dict[str, tuple[float, bool]] = {}
    if structure in DICE_BARS:
        bar = DICE_BARS[structure] - OTHER_TARGETS * (target not in ("qsm", BEST))
        bars["dice"] = (round(bar - FULL_RANGE * (profile == "full"), 2), True)
    if target == "qsm":
        bars |= {"volume_bias": (0.03, False), "qsm_bias": (0.05, False)}
        if structure in ("red_nucleus", "dentate_nucleus"):
            bars["volume_r"] = (0.95, True)
            if profile == "ordinary":
                bars["hd95"] = (1.5, False)
    return bars


def judged(value: float, bar: float | None, more: bool) -> dict[str, Any]:
    """Say whether a figure meets its bar."""
    if bar is None:
        return {"bar": None, "met": None}
    if np.isnan(value):
        return {"bar": bar, "met": "n/a"}
    met = value >= bar if more else abs(value) <= bar
    return {"bar": bar, "met": "met" if met else "missed"}


def robustness(cases: pd.DataFrame, steps: Sequence[dict[str, str]]) -> pd.DataFrame:
    """Give the mean Dice at each step of each effect, and mark cliffs before the harsh end."""
    shown = cases[(cases["group"] == "effects") & (cases["true_volume"] > 0)]
    joined = pd.DataFrame(steps).merge(shown, on="scan")
    keys = ["effect", "target", "structure"]
    table = joined.pivot_table("dice", keys, "step", sort=False)[list(STEPS)].reset_index()
    fall = -table[list(STEPS[:3])].diff(axis=1).min(axis=1)
    table["largest_fall_before_harsh"] = fall.clip(lower=0)
    table["cliff"] = np.where(fall > CLIFF, "yes", "no")
    known = effects()
    table.insert(1, "part", [known[name].group for name in table["effect"]])
    table.insert(2, "values", [_values(name) for name in table["effect"]])
    scans = joined[joined["step"] == "off"].groupby(keys, sort=False)["scan"].nunique()
    table.insert(5, "scans_each", [scans[tuple(row)] for row in table[keys].to_numpy()])
    swapped = joined.groupby(keys, sort=False)["swapped"].sum()
    table["swapped"] = [swapped[tuple(row)] for row in table[keys].to_numpy()]
    return table


def _values(name: str) -> str:
    effect = effects()[name]
    return f"{', '.join(map(str, (effect.off, *effect.levels)))} {effect.unit}".strip()


def absence(absent: pd.DataFrame) -> pd.DataFrame:
    """Count what became of structures that are not in the field of view."""
    absent = absent.assign(empty=absent["volume"] == 0, flagged=absent["flag"] != "ok")
    counted = absent.groupby(["target", "structure"], sort=False).agg(
        masks=("scan", "size"), empty=("empty", "sum"), flagged=("flagged", "sum")
    )
    counted = counted.reset_index()
    fine = (counted["empty"] == counted["masks"]) & (counted["flagged"] == counted["masks"])
    return counted.assign(met=np.where(fine, "met", "missed"))


if __name__ == "__main__":
    main()
