"""The training loop: checkpoints, resumption, a time budget, averaged weights, a log."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fdl_bidsapp.errors import DataError
from fdl_bidsapp.models.inference import autocast_dtype

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes
    ----------
    steps
        Optimiser steps of the whole schedule.
    learning_rate
        Peak of the one-cycle schedule.
    weight_decay
        Of AdamW.
    average
        Decay of the exponential moving average of the weights, whose result is used.
    max_minutes
        The schedule is shortened to end within this time.
    checkpoint_minutes
        Time between checkpoints.
    """

    steps: int
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    average: float = 0.998
    max_minutes: float = float("inf")
    checkpoint_minutes: float = 3.0


def learning_rate_at(progress: float, peak: float) -> float:
    """Return the one-cycle learning rate: a linear rise over 5 %, then half a cosine to zero.

    Examples
    --------
    >>> learning_rate_at(0.05, 1.0), round(learning_rate_at(1.0, 1.0), 6)
    (1.0, 0.0)
    """
    import math

    if progress < 0.05:
        return peak * max(progress, 1e-4) / 0.05
    return peak * 0.5 * (1 + math.cos(math.pi * min((progress - 0.05) / 0.95, 1.0)))


def train(
    network: nn.Module,
    draw: Callable[[int, float], Batch],
    loss: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    folder: Path,
    device: torch.device,
) -> nn.Module:
    """Train a network, or go on with a training that was cut off.

    Parameters
    ----------
    network
        The network to train; its weights are changed.
    draw
        Gives the batch (image (B, 1, X, Y, Z), classes (B, X, Y, Z)) of a step, from the step's
        number and the progress from 0 to 1, so that a resumed training sees the same stream.
    loss
        Takes the first logits and the classes.
    schedule
        Length, learning rate, budget.
    folder
        Holds ``checkpoint.pt`` and ``log.tsv``.
    device
        Where to train.

    Returns
    -------
    nn.Module
        A copy of the network with the averaged weights, in evaluation mode.

    Raises
    ------
    DataError
        The checkpoint in ``folder`` belongs to another network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network.to(device).train()
    averaged = copy.deepcopy(network).eval()
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    checkpoint = folder / "checkpoint.pt"
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        try:
            network.load_state_dict(state["network"])
            averaged.load_state_dict(state["averaged"])
            optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, ValueError) as error:
            raise DataError(
                "the checkpoint belongs to another network", "choose another folder",
                path=checkpoint,
            ) from error
        step, spent = int(state["step"]), float(state["spent"])
    dtype = autocast_dtype(device)
    started = saved = time.monotonic() - spent
    log = folder / "log.tsv"
    if not log.exists():
        log.write_text("step\tminutes\tlearning_rate\tloss\n")
    running: list[float] = []
    while True:
        spent = time.monotonic() - started
        progress = max(step / schedule.steps, spent / 60 / schedule.max_minutes)
        finished = progress >= 1
        if finished or time.monotonic() - saved > 60 * schedule.checkpoint_minutes:
            saved = time.monotonic()
            _save(checkpoint, network, averaged, optimiser, step, spent)
        if finished:
            return averaged
        rate = learning_rate_at(progress, schedule.learning_rate)
        for group in optimiser.param_groups:
            group["lr"] = rate
        image, classes = (tensor.to(device) for tensor in draw(step, progress))
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = network(image)[0]
        value = loss(logits, classes)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        step += 1
        decay = min(schedule.average, step / (step + 10))
        with torch.no_grad():
            for mean, parameter in zip(averaged.parameters(), network.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        running.append(float(value.detach()))
        if len(running) == 25:
            with log.open("a") as file:
                mean_loss = sum(running) / len(running)
                minutes = (time.monotonic() - started) / 60
                file.write(f"{step}\t{minutes:.2f}\t{rate:.3g}\t{mean_loss:.4f}\n")
            running.clear()


def _save(
    path: Path,
    network: nn.Module,
    averaged: nn.Module,
    optimiser: torch.optim.Optimizer,
    step: int,
    spent: float,
) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "network": network.state_dict(),
            "averaged": averaged.state_dict(),
            "optimiser": optimiser.state_dict(),
            "step": step,
            "spent": spent,
        },
        temporary,
    )
    temporary.replace(path)
