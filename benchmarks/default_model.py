"""Train the default model: multimodal fusion on simulated scans of head label maps.

Two networks: a coarse one finds midbrain and cerebellum, the other segments their nuclei there.

    python benchmarks/default_model.py LABELS CACHE OUTPUT.safetensors [--minutes 264]

``LABELS`` is a folder of head label maps (see docs/simulation.md), of which the first ``--heads``
are used. Run it again after an interruption and it goes on. ``--draw-only`` fills the cache. A
finished phase leaves ``weights.safetensors`` and ``phase.json`` in its folder, which are all that
the next one needs: it may run on another machine, one with a GPU. ``--again MODEL`` goes on from a
finished model, with the last phase alone and for all of the minutes and steps; ``--locator-of
MODEL`` trains a finished model's locator anew, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fdl_bidsapp.bids.outputs import write_json
from fdl_bidsapp.imaging.grid import Grid, middle
from fdl_bidsapp.imaging.intensity import normalise
from fdl_bidsapp.labels import Label, mirrored, nuclei
from fdl_bidsapp.memory import kept_memory
from fdl_bidsapp.models.bundle import Bundle, load_bundle, save_bundle
from fdl_bidsapp.models.fdl import CONTRASTS, ModelSpec, build_network
from fdl_bidsapp.models.fourier import low_part
from fdl_bidsapp.models.inference import resolve_device
from fdl_bidsapp.simulation.labelmaps import find_label_maps, read_head_map
from fdl_bidsapp.training.data import (
    HEAD_STEP,
    SimulatedWindows,
    cache_head,
    cache_region,
    cache_template,
    cut_window,
)
from fdl_bidsapp.training.heads import FieldsOfView, cached_head
from fdl_bidsapp.training.loop import Draw, Loss, Schedule, drawing_processes, train
from fdl_bidsapp.training.losses import dice_cross_entropy_loss

Batch = tuple[torch.Tensor, ...]

SHARES = {"qsm": 0.35, "r2star": 0.25, "imag": 0.25, "swi": 0.15}
"""How often each contrast is the target."""

LATE_SHARES = {"qsm": 0.3, "r2star": 0.2, "imag": 0.3, "swi": 0.2}
"""The same in the last phase."""

GRID = Grid((72, 56, 48), (0.8, 0.8, 0.8))
"""Holds the nuclei of midbrain or cerebellum of a large, tilted head, with some 10 mm of room."""

REGION = Grid((96, 128, 116), (0.8, 0.8, 0.8))
"""Holds both of these grids, shifted and turned as they are drawn."""

SEVERITY = 0.5
"""Of what is done to the cached scans: the simulator has brought most of it already."""


REGIONS = (("RNL", "RNR", "SNL", "SNR", "STNL", "STNR"), ("DNL", "DNR"))
"""Midbrain and cerebellum."""

JITTER = (6.0, 6.0, 6.0)
"""Largest distance of a window's middle from its nuclei's along each axis, in voxels."""

REGION_SHARES = (0.65, 0.35)
"""How often a window lies around each: the midbrain's nuclei are smaller, and more."""

ASTRAY = 0.08
"""How many windows lie off their region."""

ABSENT = 0.2
"""Weight of the structures that a window does not hold: each holds one region's."""


@dataclass(frozen=True)
class Phase:
    """One of several trainings, each going on from the one before.

    Attributes
    ----------
    share
        Of the minutes and steps.
    rate
        Factor on the learning rate.
    weight, small_weight
        In the cross-entropy, of the structures' voxels and of the subthalamic nuclei's.
    targets
        How often each contrast is the target.
    cut_off
        How many windows reach beyond the field of view.
    """

    share: float
    rate: float
    weight: float
    small_weight: float
    targets: Mapping[str, float] = field(default_factory=lambda: SHARES)
    cut_off: float = 0.08

    def weights(self, labels: Sequence[Label]) -> list[float]:
        """Return the weight of each structure."""
        small = "subthalamic_nucleus"
        return [self.small_weight if label.structure == small else self.weight for label in labels]


PHASES = {
    # Weighted voxels find the structures soon, then their true size is learnt.
    "find": Phase(0.025, 1.0, 20.0, 20.0),
    "draw": Phase(0.125, 1.0, 1.0, 1.0),
    # The smallest come last, and would wait for longer than there is time.
    "small": Phase(0.045, 1.0, 1.0, 30.0),
    "settle": Phase(0.05, 0.5, 1.0, 15.0),
    "refine": Phase(0.255, 0.75, 1.0, 1.0),
    # More of what was still worst after that.
    "polish": Phase(0.5, 0.75, 1.0, 1.0, LATE_SHARES, 0.15),
}

OBLIQUE = 0.5
"""Share of the locator's turned fields of view that are turned as far as oblique slices are: where
a file does not say how its slices lie, they are not turned upright."""

LOCATOR_PHASES = {
    "locator": Phase(4 / 7, 1.0, 10.0, 10.0),
    # Weighted, a region is found soon and blurred; its middle is what is asked for.
    "sharpen": Phase(3 / 7, 0.5, 2.0, 2.0),
}


def main() -> None:
    """Fill the cache, train, write the bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--draws", type=int, default=384, help="cached regions of the label maps")
    parser.add_argument("--locator-draws", type=int, default=64, help="cached heads of them")
    parser.add_argument("--template-draws", type=int, default=32, help="scans of the template")
    parser.add_argument("--first-draw", type=int, default=0, help="number of the first of each")
    parser.add_argument("--with-echoes", type=float, default=0.2, metavar="SHARE",
                        help="cached regions whose maps are made from echoes")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=264)
    parser.add_argument("--steps", type=int, default=60000)
    parser.add_argument("--locator-steps", type=int, default=3500)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--again", metavar="MODEL", help="model to go on from, file or name")
    parser.add_argument("--locator-of", metavar="MODEL", help="model to train the locator of anew")
    parser.add_argument("--draw-only", action="store_true")
    parser.add_argument("--cached-only", action="store_true", help="train on what the cache holds")
    options = parser.parse_args()

    regions, heads = fill(options)
    if options.draw_only:
        return
    folder = options.output.with_suffix(".run")
    if options.again:
        go_on(load_bundle(options.again), regions, folder, options)
        return
    if options.locator_of:
        relocate(load_bundle(options.locator_of), heads, folder, options)
        return
    started = time.time()
    spec = specification(options.width)
    locator = train_locator(spec, heads, folder, options)
    parts = train_parts(spec, PHASES, regions, folder, options)
    phases = [read_phase(folder / name) for name in (*PHASES, *LOCATOR_PHASES)]
    parts_of = phases[: len(PHASES)]
    provenance = {
        "data": "; then ".join(dict.fromkeys(str(phase["data"]) for phase in parts_of)),
        "recipe": "Dice + cross-entropy, AdamW, one cycle, averaged weights; six phases",
        "steps": sum(phase["steps"] for phase in parts_of),
        "windows": sum(phase["steps"] * phase["batch"] for phase in parts_of),
        "steps_of_locator": sum(phase["steps"] for phase in phases[len(PHASES) :]),
        "minutes": sum(phase["minutes"] for phase in phases),
        "seed": options.seed,
        "trained_on": spent(phases),
        "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%d"),
    }
    final = replace(spec, provenance=provenance)
    network = build_network(final)
    assert network.locator is not None
    network.locator.load_state_dict(locator)
    network.load_state_dict(parts, strict=False)
    digest = save_bundle(options.output, network, final, bank(final, regions), dtype="float16")
    seconds = time.time() - started
    print(f"{options.output}: {provenance['steps']} steps, SHA-256 {digest}, {seconds:.0f} s")


def go_on(
    bundle: Bundle, regions: Sequence[Path], folder: Path, options: argparse.Namespace
) -> None:
    """Train a finished model on, and write it with what it was and is trained on."""
    name = list(PHASES)[-1]
    network, spec = bundle.network(), bundle.spec
    last = {name: replace(PHASES[name], share=1.0)}
    start = {key: x for key, x in network.state_dict().items() if not key.startswith("locator.")}
    network.load_state_dict(train_parts(spec, last, regions, folder, options, start), strict=False)
    before: Mapping[str, Any] = spec.provenance
    phase = read_phase(folder / name)
    provenance = {
        **trained_further(before, [phase], options.seed),
        "data": f"{before['data']}; then {phase['data']}",
        "steps": before["steps"] + phase["steps"],
        "windows": before["windows"] + phase["steps"] * phase["batch"],
        "gone_on_from": bundle.sha256[:12],
    }
    provenance.pop("calibration", None)
    final = replace(spec, calibration=None, provenance=provenance)
    digest = save_bundle(options.output, network, final, bundle.bank, dtype="float16")
    print(f"{options.output}: {phase['steps']} steps more, SHA-256 {digest}")


def fill(options: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """Fill the cache and return its files: regions, and whole heads."""
    if options.cached_only:
        regions, heads = (
            sorted(options.cache.glob(f"*{what}-*.npy")) for what in ("region", "head")
        )
        return regions, heads
    maps = find_label_maps(options.labels)[: options.heads]
    first = options.first_draw
    regions, heads, template_regions, template_heads = (
        {i: options.cache / f"{what}-{i:05d}.npy" for i in range(first, first + draws)}
        for what, draws in (
            ("region", options.draws),
            ("head", options.locator_draws),
            ("template-region", options.template_draws),
            ("template-head", options.template_draws),
        )
    )
    # A process that was forked could not use the GPU.
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        # In rounds over the heads, so that a cache that is not full yet holds them all.
        n = len(maps)
        rounds = 4
        jobs = [
            pool.submit(
                fill_head,
                path,
                options.with_echoes,
                dict(list(regions.items())[first_of_part :: n * rounds]),
                dict(list(heads.items())[first_of_part :: n * rounds]),
            )
            for first_of_part, path in enumerate(maps * rounds)
        ]
        jobs += [
            pool.submit(fill_template, region, template_heads[seed], seed)
            for seed, region in template_regions.items()
        ]
        for job in jobs:
            job.result()
    return (
        [*regions.values(), *template_regions.values()],
        [*heads.values(), *template_heads.values()],
    )


def fill_template(region: Path, head: Path, seed: int) -> None:
    """Simulate one scan of the template's head, which the demonstration is made of too."""
    torch.set_num_threads(1)
    with kept_memory():
        cache_template(region, head, seed, REGION)


def relocate(
    bundle: Bundle, heads: Sequence[Path], folder: Path, options: argparse.Namespace
) -> None:
    """Train a finished model's locator anew, and write the model with it."""
    network, spec = bundle.network(), bundle.spec
    assert network.locator is not None
    network.locator.load_state_dict(train_locator(spec, heads, folder, options))
    phases = [read_phase(folder / name) for name in LOCATOR_PHASES]
    steps = sum(phase["steps"] for phase in phases)
    provenance = {
        **trained_further(spec.provenance, phases, options.seed, " for the locator"),
        "steps_of_locator": steps,
        "data_of_locator": phases[0]["data"],
        "locator_anew_of": bundle.sha256[:12],
    }
    final = replace(spec, provenance=provenance)
    digest = save_bundle(options.output, network, final, bundle.bank, dtype="float16")
    print(f"{options.output}: locator of {steps} steps, SHA-256 {digest}")


def trained_further(
    before: Mapping[str, Any], phases: Sequence[Mapping[str, Any]], seed: int, what: str = ""
) -> dict[str, Any]:
    """Return what a model was trained on, with what more phases took and their seed."""
    return {
        **before,
        "minutes": before["minutes"] + sum(phase["minutes"] for phase in phases),
        "trained_on": f"{before['trained_on']}, then {spent(phases)}{what}",
        "seed": f"{before['seed']}, then {seed}{what}",
        "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%d"),
    }


def fill_head(
    label_map: Path, with_echoes: float, regions: Mapping[int, Path], heads: Mapping[int, Path]
) -> None:
    """Simulate scans of one head; a scan's number is its seed."""
    torch.set_num_threads(1)
    regions, heads = (
        {seed: file for seed, file in files.items() if not file.exists()}
        for files in (regions, heads)
    )
    if not regions and not heads:
        return
    with kept_memory():
        head = read_head_map(label_map, resolve_device("auto"))
        for seed, file in regions.items():
            rng = np.random.default_rng(seed)
            profile = "ordinary" if rng.random() < 0.5 else "full"
            shortcut = bool(rng.random() < 1 - with_echoes)
            cache_region(file, head, seed, REGION, profile=profile, shortcut=shortcut)
        for seed, file in heads.items():
            cache_head(file, head, seed)


def described(regions: Sequence[Path], heads: int) -> str:
    """Say in words what the network that segments was trained on."""
    templates = sum(path.name.startswith("template") for path in regions)
    text = f"{len(regions) - templates} simulated scans of {heads} head label maps"
    return f"{text} and {templates} of the template's head" if templates else text


def spent(phases: Sequence[Mapping[str, Any]]) -> str:
    """Say how long was trained on what."""
    minutes: dict[str, float] = {}
    for phase in phases:
        minutes[phase["hardware"]] = minutes.get(phase["hardware"], 0.0) + phase["minutes"]
    return ", then ".join(f"{spent:.0f} minutes on {where}" for where, spent in minutes.items())


def hardware(device: torch.device) -> str:
    """Name the GPU, or the processor."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    return f"{torch.get_num_threads()} processor cores"


def run_phase(
    network: torch.nn.Module,
    draw: Draw,
    loss: Loss,
    schedule: Schedule,
    folder: Path,
    data: str,
    batch: int,
) -> None:
    """Train for one phase, or take the weights of a finished one."""
    weights = folder / "weights.safetensors"
    if not weights.exists():
        device = resolve_device("auto")
        processes = drawing_processes(device)
        trained = train(network, draw, loss, schedule, folder, device, processes=processes)
        about = {
            "steps": trained.steps,
            "batch": batch,
            "minutes": round(trained.minutes, 2),
            "hardware": hardware(device),
            "data": data,
        }
        write_json(folder / "phase.json", about)
        # The last file of a phase to be written.
        state = trained.network.state_dict()
        save_file({name: each.cpu().contiguous() for name, each in state.items()}, weights)
    network.load_state_dict(load_file(weights))


def read_phase(folder: Path) -> dict[str, Any]:
    """Return what a finished phase tells of itself."""
    about: dict[str, Any] = json.loads((folder / "phase.json").read_text("utf-8"))
    return about


def specification(width: int) -> ModelSpec:
    """Return what is trained."""
    regions = tuple(
        Label(i, f"Region of the {name}", name.upper(), name, "n/a", None, color)
        for i, (name, color) in enumerate([("midbrain", "#d62728"), ("cerebellum", "#1f5fb4")], 1)
    )
    locator = ModelSpec(
        "default-locator",
        method="none",
        backbone_options={"width": 8, "levels": 4},
        grid_shape=(40, 40, 32),
        grid_spacing=(4.0, 4.0, 4.0),
        contrasts=tuple(SHARES),
        labels=regions,
    )
    return ModelSpec(
        "default",
        method="multimodal",
        backbone_options={"width": width, "levels": 4},
        fusion_channels=width,
        grid_shape=GRID.shape,
        grid_spacing=GRID.spacing,
        contrasts=tuple(SHARES),
        labels=nuclei(),
        locator=locator,
        regions=REGIONS,
        flips=True,
    )


def values(labels: Sequence[Label]) -> list[list[int]]:
    """Return the classes of each region's structures."""
    names = [label.abbreviation for label in labels]
    return [[1 + names.index(name) for name in region] for region in REGIONS]


def train_parts(
    spec: ModelSpec,
    phases: Mapping[str, Phase],
    files: Sequence[Path],
    folder: Path,
    options: argparse.Namespace,
    start: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Train the network that segments, phase by phase, and return its weights."""
    torch.manual_seed(options.seed)
    network: torch.nn.Module = build_network(replace(spec, locator=None, regions=()))
    if start is not None:
        network.load_state_dict(start)
    windows = SimulatedWindows(
        files,
        dict(spec.intensity),
        mirrored(spec.labels),
        SHARES,
        values(spec.labels),
        SEVERITY,
        theta=spec.theta,
        low_share=0.3,
        region_shares=REGION_SHARES,
        astray=ASTRAY,
    )
    for name, phase in phases.items():
        # All scans were read once to find their regions.
        windows.contrasts, windows.cut_off = dict(phase.targets), phase.cut_off

        def draw(step: int, _: float, name: str = name) -> Batch:
            rng = np.random.default_rng([options.seed, list(PHASES).index(name), step])
            return windows.draw(rng, GRID.shape, JITTER, options.batch)

        def loss(
            outputs: list[torch.Tensor], classes: torch.Tensor, phase: Phase = phase
        ) -> torch.Tensor:
            weights = phase.weights(spec.labels)
            each = [dice_cross_entropy_loss(o, classes, weights, ABSENT) for o in outputs]
            return torch.stack(each).mean()

        schedule = Schedule(
            round(options.steps * phase.share),
            learning_rate=options.learning_rate * phase.rate,
            max_minutes=options.minutes * phase.share,
        )
        data = described(files, options.heads)
        run_phase(network, draw, loss, schedule, folder / name, data, options.batch)
    return network.state_dict()


def train_locator(
    spec: ModelSpec, files: Sequence[Path], folder: Path, options: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """Train the network that finds the regions, and return its weights."""
    assert spec.locator is not None
    torch.manual_seed(options.seed)
    step = round(spec.locator.grid_spacing[0] / HEAD_STEP)
    regions = values(spec.labels)
    heads = FieldsOfView(
        [cached_head(file, regions, step=step) for file in files],
        spec.locator.intensity,
        SHARES,
        spec.locator.grid_shape,
        oblique=OBLIQUE,
    )

    network = build_network(spec.locator)
    for n, (name, phase) in enumerate(LOCATOR_PHASES.items()):

        def draw(step: int, _: float, n: int = n) -> Batch:
            return heads.draw(np.random.default_rng([options.seed, 9 + n, step]))

        def loss(
            outputs: list[torch.Tensor], classes: torch.Tensor, phase: Phase = phase
        ) -> torch.Tensor:
            return dice_cross_entropy_loss(outputs[0], classes, phase.weight)

        schedule = Schedule(
            round(options.locator_steps * phase.share),
            learning_rate=options.learning_rate * phase.rate,
        )
        data = described(files, options.heads)
        run_phase(network, draw, loss, schedule, folder / name, data, 1)
    return network.state_dict()


def bank(spec: ModelSpec, files: Sequence[Path]) -> Mapping[str, list[torch.Tensor]]:
    """Return the low parts of one training scan's contrasts, region by region."""
    scan = np.load(files[0], mmap_mode="r")
    parts: dict[str, list[torch.Tensor]] = {contrast: [] for contrast in CONTRASTS}
    for region in values(spec.labels):
        centre = middle(np.isin(scan[-1], region))
        assert centre is not None
        rng = np.random.default_rng(0)
        images, _ = cut_window(scan, range(len(CONTRASTS)), centre, spec.grid_shape, rng, 0.0)
        for contrast, image in zip(CONTRASTS, images[0].numpy(), strict=True):
            image = normalise(image, spec.intensity[contrast])
            low = low_part(torch.from_numpy(image), spec.theta, spec.spectrum)
            parts[contrast].append(low)
    return parts


if __name__ == "__main__":
    main()
