"""Time one training step: with and without the frequency split, in float32 and bfloat16.

    python benchmarks/step_time.py [--networks hippocampus whole] [--threads 2] [--seconds 10]

Appends to ``benchmarks/results/step_time.tsv``: the median over the steps made within ``--seconds``
(three at least, after one to warm up), the load of the machine before it, and the ratio to the same
step without a split. On a GPU, also with the network's kernels replayed, as ``fdl train`` does.

A method costs more than its split: it has convolutions of its own on the full grid. ``split_share``
is the part of a step that goes into splitting and placing, there and back, timed by itself call by
call.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from machine import machine
from torch import Tensor

from fdl_bidsapp.labels import by_abbreviation
from fdl_bidsapp.memory import kept_memory
from fdl_bidsapp.models import fdl
from fdl_bidsapp.models.fdl import ModelSpec, build_network
from fdl_bidsapp.models.inference import resolve_device
from fdl_bidsapp.training.loop import RecordedNetwork
from fdl_bidsapp.training.losses import dice_cross_entropy_loss

NETWORKS = {"hippocampus": ((64, 64, 48), 16), "whole": ((160, 160, 128), 16)}
"""Grid, and channels of the first layer."""

COLUMNS = (
    "network",
    "grid",
    "width",
    "method",
    "precision",
    "recorded",
    "seconds",
    "steps_per_second",
    "ratio_to_none",
    "split_share",
    "device",
    "threads",
    "load",
    "torch",
)


def main() -> None:
    """Time all combinations and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", default=["none", "early", "late"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else machine()
    path = Path(__file__).parent / "results" / "step_time.tsv"
    if not path.exists():
        path.write_text("\t".join(COLUMNS) + "\n")
    for network in options.networks:
        shape, width = NETWORKS[network]
        ways = (False, True) if device.type == "cuda" else (False,)
        for precision, recorded in product(("float32", "bfloat16"), ways):
            unsplit = None
            for method in options.methods:
                load = os.getloadavg()[0]
                seconds, split = step_seconds(
                    method, shape, width, precision, recorded, device, options.seconds
                )
                unsplit = seconds if method == "none" else unsplit
                row = (
                    network,
                    "x".join(map(str, shape)),
                    width,
                    method,
                    precision,
                    "yes" if recorded else "no",
                    f"{seconds:.4f}",
                    f"{1 / seconds:.3g}",
                    "n/a" if unsplit is None else f"{seconds / unsplit:.2f}",
                    f"{split / seconds:.3f}",
                    name or device.type,
                    options.threads,
                    f"{load:.1f}",
                    torch.__version__,
                )
                with path.open("a") as file:
                    file.write("\t".join(map(str, row)) + "\n")
                print(*row, sep="\t", flush=True)


def step_seconds(
    method: str,
    shape: tuple[int, int, int],
    width: int,
    precision: str,
    recorded: bool,
    device: torch.device,
    budget: float,
) -> tuple[float, float]:
    """Return the median time of a training step, and of its splitting and placing, in seconds."""
    spec = ModelSpec(
        "timed",
        method=method,
        backbone_options={"width": width, "levels": 4},
        grid_shape=shape,
        labels=by_abbreviation(["RNL", "RNR"]),
    )
    network = build_network(spec).to(device).train()
    run = RecordedNetwork(network) if recorded else network
    optimiser = torch.optim.AdamW(network.parameters(), fused=device.type == "cuda" or None)
    image = torch.rand(1, 1, *shape, device=device)
    classes = torch.randint(0, 3, (1, *shape), device=device)
    precise = partial(
        torch.autocast,
        device.type,
        torch.bfloat16,
        enabled=precision == "bfloat16",
        cache_enabled=not recorded,
    )

    def step() -> None:
        with precise():
            (logits,) = run(image, [])
        optimiser.zero_grad(set_to_none=True)
        dice_cross_entropy_loss(logits, classes).backward()
        optimiser.step()

    with kept_memory():  # as in a training
        seconds = median_seconds(step, device, budget)
        with precise():
            calls = split_calls(network, image)
        split = partial(there_and_back, calls)
        return seconds, median_seconds(split, device, budget / 4) if calls else 0.0


def median_seconds(work: Callable[[], None], device: torch.device, budget: float) -> float:
    """Return the median time of a piece of work, once it is warm."""
    times: list[float] = []
    while len(times) < 4 or sum(times) < budget:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


Call = tuple[Callable[..., Tensor | tuple[Tensor, Tensor]], list[object]]


def split_calls(network: torch.nn.Module, image: Tensor) -> list[Call]:
    """Return what a network splits and places in one run."""
    calls: list[Call] = []

    def told(function: Callable[..., Tensor], *values: object) -> Tensor:
        kept = [
            value.detach().clone().requires_grad_(value.requires_grad)
            if isinstance(value, Tensor)
            else value
            for value in values
        ]
        calls.append((function, kept))
        return function(*values)

    with (
        mock.patch.object(fdl, "split", partial(told, fdl.split)),
        mock.patch.object(fdl, "place", partial(told, fdl.place)),
    ):
        network(image, [])
    return calls


def there_and_back(calls: list[Call]) -> None:
    """Split and place, with the gradients that a training takes."""
    for function, values in calls:
        found = function(*values)
        for tensor in found if isinstance(found, tuple) else (found,):
            if tensor.requires_grad:
                torch.autograd.backward(tensor, torch.ones_like(tensor))


if __name__ == "__main__":
    main()
