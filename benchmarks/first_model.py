"""Train the first default model: late fusion on simulated heads, from nothing but this package.

Two networks: a coarse one finds the region of the nuclei, the other segments them there.

    python benchmarks/first_model.py CACHE OUTPUT.safetensors [--heads 56] [--minutes 125]

Run it again after an interruption and it goes on. Seeds from 0 up are for training;
`benchmarks/first_model_accuracy.py` measures on the demonstration's own stream of heads.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fdl_bidsapp.imaging.grid import Grid
from fdl_bidsapp.labels import Label, by_abbreviation, mirrored
from fdl_bidsapp.models.bundle import save_bundle
from fdl_bidsapp.models.fdl import ModelSpec, build_network
from fdl_bidsapp.models.inference import resolve_device
from fdl_bidsapp.training.data import SimulatedPatches, SimulatedRegions, cache_simulated_scan
from fdl_bidsapp.training.loop import Schedule, Trained, train
from fdl_bidsapp.training.losses import dice_cross_entropy_loss

Batch = tuple[torch.Tensor, torch.Tensor]

CONTRASTS = {"qsm": 0.4, "r2star": 0.25, "imag": 0.25, "swi": 0.1}


GRID = (88, 104, 96)
"""Holds the nuclei of a large head, with room for 8 mm of error of the centre."""
JITTER = (8.0, 8.0, 8.0)
"""Largest distance of a patch's centre from the nuclei's, in mm."""


@dataclass(frozen=True)
class Phase:
    """One of four trainings, each going on from the one before.

    Attributes
    ----------
    share
        Of the minutes and steps.
    rate
        Factor on the learning rate.
    structure_weight
        In the cross-entropy.
    patch
        Its shape.
    contrasts
        Share of each.
    """

    share: float
    rate: float
    structure_weight: float
    patch: tuple[int, int, int]
    contrasts: Mapping[str, float]


# Weighted voxels find the structures soon, then their true size is learnt, then on the model's own
# grid; the magnitude, in which the nuclei are seen worst, needs the longest.
PHASES = {
    "find": Phase(0.11, 1.0, 20.0, (64, 80, 64), CONTRASTS),
    "draw": Phase(0.36, 1.0, 1.0, (72, 88, 72), CONTRASTS),
    "whole": Phase(0.25, 0.6, 1.0, GRID, CONTRASTS),
    "magnitude": Phase(
        0.28, 0.4, 1.0, GRID, {"qsm": 0.2, "r2star": 0.15, "imag": 0.6, "swi": 0.05}
    ),
}


def main() -> None:
    """Make the cache, train, write the bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--heads", type=int, default=56)
    parser.add_argument("--minutes", type=float, default=125)
    parser.add_argument("--steps", type=int, default=40000)
    parser.add_argument("--locator-steps", type=int, default=3500)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    spec = specification(options.width)
    grid = Grid(spacing=spec.grid_spacing)
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [
            pool.submit(cache_simulated_scan, options.cache, seed, grid, len(spec.labels))
            for seed in range(options.heads)
        ]
        files = [job.result() for job in jobs]

    started = time.time()
    folder = options.output.with_suffix(".run")
    parts = train_parts(spec, files, folder, options)
    locator = train_locator(spec, files, folder, options)
    provenance = {
        "data": f"{len(files)} simulated heads, seeds 0 to {options.heads - 1}",
        "recipe": "Dice + cross-entropy, AdamW, one cycle, averaged weights; four phases",
        "steps": parts.steps,
        "steps_of_locator": locator.steps,
        "seed": options.seed,
        "trained_on": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%d"),
    }
    final = replace(spec, provenance=provenance)
    network = build_network(final)
    assert network.locator is not None
    network.locator.load_state_dict(locator.network.state_dict())
    network.load_state_dict(parts.network.state_dict(), strict=False)
    digest = save_bundle(options.output, network, final)
    seconds = time.time() - started
    print(f"{options.output}: {parts.steps} steps, SHA-256 {digest}, {seconds:.0f} s")


def specification(width: int) -> ModelSpec:
    """Return what is trained."""
    region = Label(1, "Region of the nuclei", "REGION", "region", "n/a", None, "#ffffff")
    locator = ModelSpec(
        "default-locator",
        method="none",
        backbone_options={"width": 8, "levels": 4},
        grid_shape=(40, 40, 32),
        grid_spacing=(4.0, 4.0, 4.0),
        contrasts=tuple(CONTRASTS),
        labels=(region,),
    )
    return ModelSpec(
        "default",
        method="late",
        backbone_options={"width": width, "levels": 4},
        fusion_channels=width,
        grid_shape=GRID,
        contrasts=tuple(CONTRASTS),
        labels=by_abbreviation(["RNL", "RNR", "DNL", "DNR"]),
        locator=locator,
    )


def train_parts(
    spec: ModelSpec, files: Sequence[Path], folder: Path, options: argparse.Namespace
) -> Trained:
    """Train the network that segments, phase by phase."""
    torch.manual_seed(options.seed)
    network: torch.nn.Module = build_network(replace(spec, locator=None))
    patches = SimulatedPatches(
        files, dict(spec.intensity), mirrored(spec.labels), CONTRASTS, severity=0.4
    )
    steps = 0
    for name, phase in PHASES.items():
        patches.contrasts = dict(phase.contrasts)

        def draw(step: int, _: float, phase: Phase = phase, first: int = steps) -> Batch:
            rng = np.random.default_rng([options.seed, first, step])
            return patches.draw(rng, phase.patch, JITTER)

        def loss(
            outputs: list[torch.Tensor], classes: torch.Tensor, phase: Phase = phase
        ) -> torch.Tensor:
            return dice_cross_entropy_loss(outputs[0], classes, phase.structure_weight)

        schedule = Schedule(
            round(options.steps * phase.share),
            learning_rate=options.learning_rate * phase.rate,
            max_minutes=options.minutes * phase.share,
        )
        trained = train(network, draw, loss, schedule, folder / name, resolve_device("auto"))
        network.load_state_dict(trained.network.state_dict())
        steps += trained.steps
    return replace(trained, steps=steps)


def train_locator(
    spec: ModelSpec, files: Sequence[Path], folder: Path, options: argparse.Namespace
) -> Trained:
    """Train the network that finds the region."""
    assert spec.locator is not None
    torch.manual_seed(options.seed)
    regions = SimulatedRegions(files, dict(spec.locator.intensity), CONTRASTS, severity=0.7)

    def draw(step: int, _: float) -> Batch:
        return regions.draw(np.random.default_rng([options.seed, 9, step]))

    def loss(outputs: list[torch.Tensor], classes: torch.Tensor) -> torch.Tensor:
        return dice_cross_entropy_loss(outputs[0], classes, structure_weight=10.0)

    return train(
        build_network(spec.locator),
        draw,
        loss,
        Schedule(options.locator_steps, learning_rate=options.learning_rate),
        folder / "locator",
        resolve_device("auto"),
    )


if __name__ == "__main__":
    main()
