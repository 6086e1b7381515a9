"""Train the first default model: late fusion on simulated heads, from nothing but this package.

    python benchmarks/first_model.py CACHE OUTPUT.safetensors [--heads 64] [--minutes 60]

Run it again after an interruption and it goes on. Seeds from 0 up are for training;
`benchmarks/first_model_accuracy.py` measures on the demonstration's own stream of heads.
"""

from __future__ import annotations

import argparse
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from fdl_bidsapp.imaging.grid import Grid
from fdl_bidsapp.labels import by_abbreviation, mirrored
from fdl_bidsapp.models.bundle import save_bundle
from fdl_bidsapp.models.fdl import ModelSpec, build_network
from fdl_bidsapp.models.inference import resolve_device
from fdl_bidsapp.training.data import SimulatedPatches, cache_simulated_scan
from fdl_bidsapp.training.loop import Schedule, train
from fdl_bidsapp.training.recipes import RECIPES

CONTRASTS = {"qsm": 0.4, "r2star": 0.25, "imag": 0.25, "swi": 0.1}

# (shape, jitter of its centre, share of the steps at the beginning and at the end)
PATCHES = (
    ((64, 80, 64), (8, 10, 10), 0.80, 0.60),
    ((96, 96, 80), (20, 20, 20), 0.18, 0.32),
    ((160, 160, 128), (15, 25, 30), 0.02, 0.08),
)


def main() -> None:
    """Make the cache, train, write the bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    labels = by_abbreviation(["RNL", "RNR", "DNL", "DNR"])
    spec = ModelSpec(
        "default",
        method="late",
        backbone_options={"width": options.width, "levels": 4},
        fusion_channels=options.width,
        contrasts=tuple(CONTRASTS),
        labels=labels,
    )
    grid = Grid(spec.grid_shape, spec.grid_spacing)
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [
            pool.submit(cache_simulated_scan, options.cache, seed, grid, len(labels))
            for seed in range(options.heads)
        ]
        files = [job.result() for job in jobs]

    torch.manual_seed(options.seed)
    network = build_network(spec)
    patches = SimulatedPatches(files, dict(spec.intensity), mirrored(labels), CONTRASTS)

    def draw(step: int, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng([options.seed, step])
        shares = [(1 - progress) * first + progress * last for *_, first, last in PATCHES]
        shape, jitter, *_ = PATCHES[int(rng.choice(len(PATCHES), p=shares))]
        return patches.draw(rng, shape, jitter)

    schedule = Schedule(
        options.steps, learning_rate=options.learning_rate, max_minutes=options.minutes
    )
    started = time.time()
    run = options.output.with_suffix(".run")
    device = resolve_device("auto")
    trained = train(network, draw, RECIPES["strong"].total_loss, schedule, run, device)
    provenance = {
        "data": f"{len(files)} heads of fdl simulate's training range, seeds 0 to {len(files) - 1}",
        "recipe": "Dice + cross-entropy, AdamW, one cycle, averaged weights",
        "steps": trained.steps,
        "seed": options.seed,
        "trained_on": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "finished": time.strftime("%Y-%m-%d"),
    }
    final = ModelSpec(**{**vars(spec), "provenance": provenance})
    digest = save_bundle(options.output, trained.network, final)
    seconds = time.time() - started
    print(f"{options.output}: {trained.steps} steps, SHA-256 {digest}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
