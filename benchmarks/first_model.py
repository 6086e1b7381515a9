"""Train the first default model: late fusion on simulated heads, from nothing but this package.

    python benchmarks/first_model.py CACHE OUTPUT.safetensors [--heads 64] [--minutes 75]

Run it again after an interruption and it goes on. Seeds from 0 up are for training;
`benchmarks/first_model_accuracy.py` measures on the demonstration's own stream of heads.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fdl_bidsapp.imaging.grid import Grid
from fdl_bidsapp.labels import by_abbreviation, mirrored
from fdl_bidsapp.models.bundle import save_bundle
from fdl_bidsapp.models.fdl import ModelSpec, build_network
from fdl_bidsapp.models.inference import resolve_device
from fdl_bidsapp.simulation.scan import draw_protocol
from fdl_bidsapp.training.data import SimulatedPatches, cache_simulated_scan
from fdl_bidsapp.training.loop import Schedule, train
from fdl_bidsapp.training.losses import dice_cross_entropy_loss

Batch = tuple[torch.Tensor, torch.Tensor]

CONTRASTS = {"qsm": 0.4, "r2star": 0.25, "imag": 0.25, "swi": 0.1}


@dataclass(frozen=True)
class Phase:
    """One of three trainings, each going on from the one before.

    Attributes
    ----------
    share
        Of the minutes and steps.
    rate
        Factor on the learning rate.
    structure_weight
        In the cross-entropy.
    patches
        Shape, jitter of its centre, probability.
    """

    share: float
    rate: float
    structure_weight: float
    patches: tuple[tuple[tuple[int, int, int], tuple[int, int, int], float], ...]


# Weighted voxels find the structures soon; then their true size is learnt; last, on patches up to
# the whole grid, what is none of them though it looks alike. The patches lie far off the centre of
# the nuclei, most of all sideways: else the side is read from the patch's border, which a whole
# scan does not have.
PHASES = {
    "find": Phase(
        0.25, 1.0, 20.0, (((64, 72, 64), (20, 10, 10), 0.85), ((96, 96, 80), (25, 18, 18), 0.15))
    ),
    "draw": Phase(
        0.35, 1.0, 1.0, (((80, 88, 72), (25, 16, 14), 0.85), ((112, 128, 96), (25, 25, 25), 0.15))
    ),
    "reject": Phase(
        0.4, 0.6, 1.0, (((112, 128, 96), (25, 25, 25), 0.75), ((160, 160, 128), (15, 25, 30), 0.25))
    ),
}


def ordinary(seed: int) -> bool:
    """Tell whether the head of this seed was scanned by an ordinary protocol.

    The nuclei are hardly seen at the ends of the range, and so small a network trained for so
    short a time does better on what users have most without them.
    """
    protocol, spacing, _ = draw_protocol(np.random.default_rng([seed, 1]))
    late_enough = protocol.echo_times[-1] >= 0.020
    return protocol.field_strength == 3 and late_enough and protocol.snr >= 25 and spacing[2] <= 2


def main() -> None:
    """Make the cache, train, write the bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--steps", type=int, default=40000)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    labels = by_abbreviation(["RNL", "RNR", "DNL", "DNR"])
    spec = ModelSpec(
        "default",
        method="late",
        backbone_options={"width": options.width, "levels": 5},
        fusion_channels=options.width,
        contrasts=tuple(CONTRASTS),
        labels=labels,
    )
    grid = Grid(spec.grid_shape, spec.grid_spacing)
    seeds = list(itertools.islice(filter(ordinary, itertools.count()), options.heads))
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [
            pool.submit(cache_simulated_scan, options.cache, seed, grid, len(labels))
            for seed in seeds
        ]
        files = [job.result() for job in jobs]

    torch.manual_seed(options.seed)
    network = build_network(spec)
    patches = SimulatedPatches(
        files, dict(spec.intensity), mirrored(labels), CONTRASTS, severity=0.4
    )

    started = time.time()
    device = resolve_device("auto")
    steps = 0
    for name, phase in PHASES.items():

        def draw(step: int, _: float, phase: Phase = phase, first: int = steps) -> Batch:
            rng = np.random.default_rng([options.seed, first, step])
            which = int(rng.choice(len(phase.patches), p=[share for *_, share in phase.patches]))
            shape, jitter, _ = phase.patches[which]
            return patches.draw(rng, shape, jitter)

        def loss(
            outputs: list[torch.Tensor], classes: torch.Tensor, phase: Phase = phase
        ) -> torch.Tensor:
            return dice_cross_entropy_loss(outputs[0], classes, phase.structure_weight)

        schedule = Schedule(
            round(options.steps * phase.share),
            learning_rate=options.learning_rate * phase.rate,
            max_minutes=options.minutes * phase.share,
        )
        folder = options.output.with_suffix(".run") / name
        trained = train(network, draw, loss, schedule, folder, device)
        network.load_state_dict(trained.network.state_dict())
        steps += trained.steps
    provenance = {
        "data": f"{len(files)} simulated heads: those of ordinary protocols among seeds 0 to "
        f"{seeds[-1]}",
        "recipe": "Dice + cross-entropy, AdamW, one cycle, averaged weights; three phases",
        "steps": steps,
        "seed": options.seed,
        "trained_on": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%d"),
    }
    final = ModelSpec(**{**vars(spec), "provenance": provenance})
    digest = save_bundle(options.output, trained.network, final)
    seconds = time.time() - started
    print(f"{options.output}: {steps} steps, SHA-256 {digest}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
