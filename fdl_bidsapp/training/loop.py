"""The training loop: checkpoints, resumption, a time budget, averaged weights, a log."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fdl_bidsapp.errors import DataError, StorageError
from fdl_bidsapp.memory import kept_memory
from fdl_bidsapp.models.inference import autocast_dtype
from fdl_bidsapp.processor import available_cores

LOG_EVERY = 25
"""Steps over which the logged loss is averaged."""

LOG_COLUMNS = ("step", "minutes", "learning_rate", "loss", "validation_dice")

Draw = Callable[[int, float], tuple[Tensor, ...]]
Loss = Callable[[list[Tensor], Tensor], Tensor]
Validate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes
    ----------
    steps
        Optimiser steps of the whole schedule.
    learning_rate
        Peak of the one-cycle schedule, or the constant rate.
    one_cycle
        Whether the rate rises and falls; see :func:`learning_rate_at`.
    optimiser
        ``adamw`` or ``adam``.
    weight_decay
        Of AdamW.
    average
        Decay of the exponential moving average of the weights, whose result is used; with 0 it is
        the last step's weights.
    clip
        Largest norm of the gradient.
    mixed_precision
        Whether to compute in bfloat16 where the device is faster for it.
    validate_every
        Steps between validations.
    keep_best
        Whether the result are the weights of the best validation, rather than the last ones.
    max_minutes
        The schedule is shortened to end within this time.
    checkpoint_minutes
        Time between checkpoints.
    """

    steps: int
    learning_rate: float = 2e-3
    one_cycle: bool = True
    optimiser: str = "adamw"
    weight_decay: float = 1e-3
    average: float = 0.998
    clip: float = 5.0
    mixed_precision: bool = True
    validate_every: int = 500
    keep_best: bool = False
    max_minutes: float = math.inf
    checkpoint_minutes: float = 3.0


@dataclass(frozen=True)
class Trained:
    """What a training gives.

    Attributes
    ----------
    network
        A copy of the network with the weights to use, in evaluation mode.
    step
        The step these weights are from.
    steps
        Steps that were made.
    validation_dice
        Of these weights; ``None`` without validation.
    minutes
        That it took, all runs together.
    """

    network: nn.Module
    step: int
    steps: int
    validation_dice: float | None
    minutes: float


def learning_rate_at(progress: float, peak: float) -> float:
    """Return the one-cycle learning rate: a linear rise over 5 %, then half a cosine to zero.

    Examples
    --------
    >>> learning_rate_at(0.05, 1.0), round(learning_rate_at(1.0, 1.0), 6)
    (1.0, 0.0)
    """
    if progress < 0.05:
        return peak * max(progress, 1e-4) / 0.05
    return peak * 0.5 * (1 + math.cos(math.pi * min((progress - 0.05) / 0.95, 1.0)))


def train(
    network: nn.Module,
    draw: Draw,
    loss: Loss,
    schedule: Schedule,
    folder: Path,
    device: torch.device,
    *,
    validate: Validate | None = None,
    configuration: Mapping[str, Any] | None = None,
    processes: int = 0,
    record: bool = False,
) -> Trained:
    """Train a network, or go on with a training that was cut off.

    Parameters
    ----------
    network
        The network to train; its weights are changed.
    draw
        Gives the batch of a step: image (B, 1, X, Y, Z), classes (B, X, Y, Z) and, for multimodal
        fusion, the low parts of the other contrasts; from the step's number and the progress from
        0 to 1, so that a resumed training sees the same stream. It is called in another thread, a
        step ahead.
    loss
        Takes the list of logits and the classes.
    schedule
        Length, learning rate, budget.
    folder
        Holds ``checkpoint.pt`` and ``log.tsv``.
    device
        Where to train.
    validate
        Gives the validation Dice of a network.
    configuration
        JSON values that a checkpoint has to share to be gone on with.
    processes
        In which batches are drawn ahead, on the processor, instead of that thread.
    record
        Whether a GPU may replay its kernels (:class:`RecordedNetwork`), which the network has to
        allow.

    Raises
    ------
    DataError
        The checkpoint in ``folder`` is of another configuration or network, or damaged; or the loss
        is not finite.
    StorageError
        The checkpoint cannot be written; the one before it is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network.to(device).train()
    state = _State(network, schedule, folder / "checkpoint.pt", dict(configuration or {}))
    state.resume(device)
    dtype = autocast_dtype(device) if schedule.mixed_precision else None
    log = _Log(folder / "log.tsv", state.step)
    started = saved = time.monotonic() - state.spent
    rate = schedule.learning_rate
    run = RecordedNetwork(network) if record and device.type == "cuda" else network
    batches = _drawn_ahead(draw, state.step, processes, lambda: progress)
    with kept_memory(), _progress_bar() as bar, closing(batches):
        while True:
            state.spent = time.monotonic() - started
            progress = max(state.step / schedule.steps, state.spent / 60 / schedule.max_minutes)
            finished = progress >= 1
            score = None
            if validate is not None and state.wants_validation(finished):
                score = validate(state.averaged)
                state.keep(score)
            if score is not None or (log.losses and state.step % LOG_EVERY == 0):
                mean = log.write(state, rate, score)
                bar.set_postfix_str(_postfix(mean, state.score), refresh=False)
            if finished or time.monotonic() - saved > 60 * schedule.checkpoint_minutes:
                state.save()
                saved = time.monotonic()
            bar.n = 100 * min(progress, 1.0)
            if finished:
                bar.refresh()
                return state.result()
            rate = schedule.learning_rate
            if schedule.one_cycle:
                rate = learning_rate_at(progress, rate)
            image, classes, *others = (t.to(device, non_blocking=True) for t in next(batches))
            # A recording keeps no copies of the weights that autocast made.
            with torch.autocast(
                device.type,
                dtype or torch.bfloat16,
                enabled=dtype is not None,
                cache_enabled=run is network,
            ):
                outputs = run(image, others)
            log.add(state.advance(loss(outputs, classes), rate))
            bar.update(0)


def drawing_processes(device: torch.device) -> int:
    """Return in how many processes to draw what a processor draws, for a network on a device.

    A GPU takes batches faster than one core draws them; a processor's cores all serve the network.

    Examples
    --------
    >>> drawing_processes(torch.device("cpu"))
    0
    """
    return 0 if device.type == "cpu" else min(available_cores(), 12)


def _drawn_ahead(
    draw: Draw, step: int, processes: int, progress: Callable[[], float]
) -> Generator[tuple[Tensor, ...]]:
    """Give the batches from a step on; the next ones are drawn while one is worked on."""
    if processes:
        # Forked: what is drawn from lies in memory once.
        yield from DataLoader(
            _Steps(draw),
            batch_size=None,
            sampler=((each, progress()) for each in count(step)),
            num_workers=processes,
            multiprocessing_context="fork",
            pin_memory=torch.cuda.is_available(),
        )
        return
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(draw, step, progress())
        for after in count(step + 1):
            batch = following.result()
            following = ahead.submit(draw, after, progress())
            yield batch


class _Steps(Dataset[tuple[Tensor, ...]]):
    """The batches of all steps, by the step and the progress that is known when it is asked for."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def __getitem__(self, at: tuple[int, float]) -> tuple[Tensor, ...]:
        torch.set_num_threads(1)
        return self.draw(*at)


class RecordedNetwork:
    """A network in training whose kernels a CUDA GPU replays, rather than being sent each anew.

    A small network's kernels are shorter than the time to send them. Forward and backward pass are
    recorded for the shapes of the first call; other shapes are computed as without.

    Parameters
    ----------
    network
        In training mode, on the GPU, and not trained yet since it was built or loaded; it must
        decide nothing by the values that it computes. Autocast must not cache what it casts.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.shapes: tuple[torch.Size, ...] = ()
        self.recording: Callable[..., tuple[Tensor, ...]] | None = None
        # Gradients are summed on another stream than they were recorded on, which is waited for;
        # PyTorch 2.11 warns of it.
        warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
        if warn is not None:
            warn(False)

    def __call__(self, image: Tensor, others: Sequence[Tensor] = ()) -> list[Tensor]:
        """Return what the network returns; it holds until the next call."""
        inputs = (image, *others)
        shapes = tuple(each.shape for each in inputs)
        if self.recording is None:
            self.shapes = shapes
            self.recording = cast(
                Callable[..., tuple[Tensor, ...]],
                torch.cuda.make_graphed_callables(
                    _Flat(self.network),
                    tuple(each.clone() for each in inputs),
                    allow_unused_input=True,
                ),
            )
        if shapes != self.shapes:
            return cast(list[Tensor], self.network(image, list(others)))
        return list(self.recording(*inputs))


class _Flat(nn.Module):
    """A network whose arguments and results are tensors, as recordings take them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(image, list(others)))


class _State:
    """The weights and all that a checkpoint keeps."""

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        path: Path,
        configuration: dict[str, Any],
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.path = path
        self.configuration = json.loads(json.dumps(configuration))
        self.averaged = copy.deepcopy(network).eval()
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[schedule.optimiser]
        decay = schedule.weight_decay if schedule.optimiser == "adamw" else 0.0
        on_gpu = next(network.parameters()).device.type == "cuda"
        self.optimiser = kind(
            network.parameters(),
            lr=schedule.learning_rate,
            weight_decay=decay,
            fused=on_gpu or None,
        )
        self.step = 0
        self.spent = 0.0
        self.score: float | None = None
        self.validated = 0
        self.best: dict[str, Any] | None = None

    def advance(self, value: Tensor, rate: float) -> Tensor:
        """Make one step down the loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.schedule.clip)
        self.optimiser.step()
        self.step += 1
        decay = min(self.schedule.average, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.averaged.parameters()), list(self.network.parameters()), 1 - decay
            )
            for mean, buffer in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
                mean.copy_(buffer)
        return value.detach()

    def wants_validation(self, finished: bool) -> bool:
        due = finished or self.step % self.schedule.validate_every == 0
        return due and self.step > self.validated

    def keep(self, score: float) -> None:
        """Note a validation, and keep the weights if they are the best so far."""
        self.score, self.validated = score, self.step
        if self.schedule.keep_best and (self.best is None or score > self.best["score"]):
            weights = {name: t.detach().clone() for name, t in self.averaged.state_dict().items()}
            self.best = {"score": score, "step": self.step, "weights": weights}

    def result(self) -> Trained:
        if self.best is None:
            return Trained(self.averaged, self.step, self.step, self.score, self.spent / 60)
        self.averaged.load_state_dict(self.best["weights"])
        step, score = self.best["step"], self.best["score"]
        return Trained(self.averaged, step, self.step, score, self.spent / 60)

    def resume(self, device: torch.device) -> None:
        if not self.path.exists():
            return
        remedy = "choose another output, or remove this folder to start afresh"
        try:
            state = torch.load(self.path, map_location=device, weights_only=True)
            theirs = state["configuration"]
        except Exception as error:
            # torch.load raises whatever its zip reader and unpickler happen to raise.
            raise DataError("the checkpoint is damaged", remedy, path=self.path) from error
        ours = self.configuration
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                raise DataError(
                    f"the checkpoint is from another configuration: {key} was"
                    f" {_short(theirs.get(key))} and is now {_short(ours.get(key))}",
                    remedy,
                    path=self.path,
                )
        try:
            self.network.load_state_dict(state["network"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, ValueError) as error:
            raise DataError(
                "the checkpoint belongs to another network", remedy, path=self.path
            ) from error
        self.step, self.spent = int(state["step"]), float(state["spent"])
        self.score, self.validated = state["score"], state["validated"]
        self.best = state["best"]

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        temporary = self.path.with_suffix(".tmp")
        content = {
            "configuration": self.configuration,
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "spent": self.spent,
            "score": self.score,
            "validated": self.validated,
            "best": self.best,
        }
        try:
            with temporary.open("wb") as file:
                torch.save(content, file)
            temporary.replace(self.path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(
                f"the checkpoint cannot be written ({' '.join(str(error).split())})",
                "make space and run the same command again; it goes on from the last checkpoint",
                path=self.path,
            ) from error


class _Log:
    """The table of the training, one row every few steps."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.losses: list[Tensor] = []
        rows = path.read_text("utf-8").splitlines()[1:] if path.exists() else []
        # What came after the checkpoint is done again.
        rows = [row for row in rows if int(row.split("\t")[0]) <= step]
        path.write_text("\n".join(["\t".join(LOG_COLUMNS), *rows, ""]), "utf-8")

    def add(self, value: Tensor) -> None:
        # Kept on the device: asking for the number would make a GPU wait at every step.
        self.losses.append(value)

    def write(self, state: _State, rate: float, score: float | None) -> float:
        """Append a row, and return the mean loss since the last one."""
        mean = float(torch.stack(self.losses).mean()) if self.losses else math.nan
        if self.losses and not math.isfinite(mean):
            raise DataError(
                f"the loss is no longer finite at step {state.step}",
                "lower the learning rate, or look for damaged images",
                path=self.path,
            )
        self.losses.clear()
        values = (
            str(state.step),
            f"{state.spent / 60:.2f}",
            f"{rate:.3g}",
            "n/a" if math.isnan(mean) else f"{mean:.4f}",
            "n/a" if score is None else f"{score:.4f}",
        )
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\t".join(values) + "\n")
        except OSError as error:
            raise StorageError(
                f"the log cannot be written ({error.strerror})",
                "make space and run the same command again; it goes on from the last checkpoint",
                path=self.path,
            ) from error
        return mean


def _progress_bar() -> Any:
    from tqdm import tqdm

    layout = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    # disable=None: quiet where standard error is no terminal.
    return tqdm(total=100, bar_format=layout, disable=None)


def _postfix(loss: float, score: float | None) -> str:
    text = f"loss {loss:.3f}"
    return text if score is None else f"{text}, validation Dice {score:.3f}"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}…"
