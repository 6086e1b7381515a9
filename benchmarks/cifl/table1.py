"""Table 1 of the CIFL abstract on mid-coronal OASIS slices: train on T1, test on other contrasts.

    python benchmarks/cifl/table1.py OASIS2D.npz OUT [--seeds 0 1 2] [--tau-channels 1 0.1 0.01]
        [--jobs 2] [--steps 1500] [--unseen OTHER.npz --results OTHER.tsv]

For each temperature and seed, features are trained on random shapes. On them, on the images
themselves as a baseline, and on the high band of the frequency split as the other idea of what
contrasts have in common, a U-Net learns to segment T1-weighted slices, and a small registration
network to align them with each other. Both are tested on slices of other subjects: in T1, in
inverted T1 (within the brain, and of the whole picture), and with intensities remapped so that grey
matter becomes the brightest. Run again, it goes on. Writes ``benchmarks/results/cifl_table1.tsv``.
With ``--unseen``, all slices are trained on and those of the other file are tested on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import permutations
from multiprocessing import get_context
from pathlib import Path
from types import EllipsisType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from machine import machine
from torch import Tensor, nn

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.imaging.overlap import METRICS, agreement
from fdl_bidsapp.models.backbones import UNet
from fdl_bidsapp.models.bundle import load_features
from fdl_bidsapp.models.cifl import FrozenFeatures, unit_pixels, vary_channels
from fdl_bidsapp.models.fourier import split
from fdl_bidsapp.models.inference import autocast_dtype, device_name, resolve_device
from fdl_bidsapp.models.registration import (
    RegistrationNetwork,
    folded_share,
    registration_loss,
    warp,
)
from fdl_bidsapp.simulation.random_shapes import smooth_noise
from fdl_bidsapp.training.cifl import fit_features, make_feature_settings
from fdl_bidsapp.training.evaluate import CASE_COLUMNS, MEAN
from fdl_bidsapp.training.experiment import RESULT_COLUMNS, aggregate, read_cases
from fdl_bidsapp.training.loop import Schedule, train
from fdl_bidsapp.training.losses import dice_cross_entropy_loss

RESULTS = Path(__file__).parents[1] / "results"
CLASSES = ("white_matter", "grey_matter", "csf", "thalamus")
TEST = ("1002", "1005", "1008", "1011", "1014", "1018")
"""Six of nineteen subjects; both scans of the one who has two are trained on."""

REMAPPED = ((0.0, 0.25, 0.5, 0.7, 0.85, 1.0), (0.1, 0.2, 0.95, 0.6, 0.35, 0.3))
"""Intensities of T1 and what becomes of them: no order is kept, grey matter is the brightest."""

SMOOTHNESS = 0.3
"""Weight of the smoothness in the loss of the registration."""

AXES = ("task", "features", "tau_channels", "contrast", "seed")
DEVICE = resolve_device()

Front = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Slices:
    """Slices of some subjects: (N, 1, X, Y) images by contrast, (N, X, Y) classes."""

    names: tuple[str, ...]
    subjects: tuple[str, ...]
    images: dict[str, Tensor]
    classes: Tensor


@dataclass(frozen=True)
class Job:
    """All that is done on one kind of input: ``cifl`` of one temperature, or one of ``FRONTS``."""

    data: Path
    unseen: Path | None
    folder: Path
    features: str
    tau: str
    seed: int
    steps: int
    threads: int


def main() -> None:
    """Do what is not done, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tau-channels", nargs="+", default=["1", "0.1", "0.01"])
    parser.add_argument("--steps", type=int, default=1500, help="of the features")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--unseen", type=Path, help="other slices to test on")
    parser.add_argument("--results", type=Path, default=RESULTS / "cifl_table1.tsv")
    options = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    inputs = [(name, "") for name in FRONTS] + [("cifl", tau) for tau in options.tau_channels]
    jobs = [
        Job(
            options.data,
            options.unseen,
            options.out / f"{features}{tau},seed={seed}",
            features,
            tau,
            seed,
            options.steps,
            threads,
        )
        for seed in options.seeds
        for features, tau in inputs
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, job) for job in jobs]):
            print(done.result(), file=sys.stderr)
    cases = [row for job in jobs for row in gathered(job)]
    rows = aggregate(cases, AXES)
    words = ["OUT" if word == str(options.out) else word for word in sys.argv[1:]]
    about = {
        "minutes_of_features": max(minutes(job) for job in jobs),
        "command": " ".join(["python benchmarks/cifl/table1.py", *words]),
        "machine": f"{places(jobs)}, app {__version__}, {time.strftime('%Y-%m-%d')}",
    }
    kept = [{**row, **about} for row in rows if row["metric"] in ("dice", "hd95")]
    columns = (*AXES[:-1], *RESULT_COLUMNS, *about)
    write_tsv(options.results, kept, columns)
    for row in kept:
        if row["structure"] == MEAN and row["metric"] == "dice":
            print(*(row[axis] for axis in AXES[:-1]), f"{row['mean']:.3f}", sep="\t")


def run(job: Job) -> str:
    """Train features, then segmentation and registration on them, and measure both."""
    torch.set_num_threads(job.threads)
    if job.features in FRONTS:
        front, channels = FRONTS[job.features], 1
    else:
        settings = make_feature_settings(
            {
                "name": f"cifl-2d-tau-{job.tau}-seed-{job.seed}",
                "dimensions": 2,
                "seed": job.seed,
                "recipe_options": {"steps": job.steps, "tau_channels": float(job.tau)},
            }
        )
        file = fit_features(settings, job.folder / "features.safetensors", device=DEVICE.type)
        bundle = load_features(file)
        front, channels = FrozenFeatures(bundle.network()).eval().to(DEVICE), bundle.spec.channels
    known, unseen = load(job.data, job.unseen)
    place = job.folder / "device.txt"
    if not place.exists():
        job.folder.mkdir(parents=True, exist_ok=True)
        place.write_text(device_name(DEVICE) if DEVICE.type == "cuda" else machine(), "utf-8")
    for task, measure in (("segmentation", segmentation), ("registration", registration)):
        table = job.folder / f"{task}.tsv"
        if not table.exists():
            rows = measure(known, unseen, front, channels, job.seed, job.folder / task)
            write_tsv(table, rows, CASE_COLUMNS)
    return f"{job.folder.name}: done"


def high_band(images: Tensor) -> Tensor:
    """Return the high part of the frequency split of slices, as the fusion models take it."""
    # Three equal slices are a volume whose third axis the window covers whole.
    volume = images[..., None].expand(*images.shape, 3).contiguous()
    return split(volume)[1][..., 0]


FRONTS: dict[str, Front] = {
    "none": nn.Identity(),
    "high": high_band,
    "high_magnitude": lambda images: high_band(images).abs(),
}
"""Inputs that need no training. Inversion turns the sign of the high band, and leaves its size."""


def load(path: Path, unseen: Path | None = None) -> tuple[Slices, Slices]:
    """Return the slices to train on and those to test on, in all contrasts."""
    data = np.load(path)
    if unseen is not None:
        other = np.load(unseen)
        return take(data), take(other)
    tested = np.isin(data["id"], TEST)
    return take(data, ~tested), take(data, tested)


def take(data: Mapping[str, np.ndarray], chosen: np.ndarray | EllipsisType = ...) -> Slices:
    """Take some slices of a file, and make their other contrasts."""
    t1 = data["image"][chosen].astype(np.float32)
    contrasts = {
        "t1": t1,
        "inverted": np.where(t1 > 0, 1 - t1, 0),
        "inverted_whole": 1 - t1,
        "remapped": np.where(t1 > 0, np.interp(t1, *REMAPPED), 0),
    }
    return Slices(
        tuple(data["id"][chosen]),
        tuple(data["subject"][chosen]),
        {
            name: torch.from_numpy(image.astype(np.float32))[:, None].to(DEVICE)
            for name, image in contrasts.items()
        },
        torch.from_numpy(data["label"][chosen].astype(np.int64)).to(DEVICE),
    )


class Segmenter(nn.Module):
    """A U-Net with a head, on what the front makes of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backbone = UNet(2, channels, width=12, levels=5)
        self.head = nn.Conv2d(self.backbone.feature_channels, 1 + len(CLASSES), 1)

    def forward(self, x: Tensor, others: Sequence[Tensor] = ()) -> list[Tensor]:
        """Return the logits."""
        features = self.backbone.features(x.contiguous(memory_format=torch.channels_last))
        return [self.head(features)]


def segmentation(
    known: Slices, unseen: Slices, front: Front, channels: int, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """Train a U-Net on T1, and measure it on each contrast."""

    def draw(step: int, _: float) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(seed * 2**32 + step)
        image, classes = varied(known, 2, generator)
        return vary(seen(front, image), generator), classes

    def loss(outputs: list[Tensor], classes: Tensor) -> Tensor:
        return dice_cross_entropy_loss(outputs[0][..., None], classes[..., None])

    torch.manual_seed(seed)
    schedule = Schedule(1500, learning_rate=5e-3, weight_decay=1e-2, average=0.98)
    network = Segmenter(channels).to(memory_format=torch.channels_last)
    trained = train(network, draw, loss, schedule, folder, DEVICE).network
    rows = []
    for contrast, images in unseen.images.items():
        with torch.inference_mode():
            found = trained(seen(front, images))[0].argmax(1)
        for i, name in enumerate(unseen.names):
            rows += compared(contrast, name, unseen.subjects[i], found[i], unseen.classes[i])
    return rows


def registration(
    known: Slices, unseen: Slices, front: Front, channels: int, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """Train the alignment of T1 slices with each other, and measure T1 to each contrast.

    The slices are registered affinely as they come. Each pair is measured as it is, and with the
    moving slice displaced, which is where a registration can show what it is worth.
    """

    def draw(step: int, _: float) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(seed * 2**32 + step)
        pair = [seen(front, varied(known, 2, generator)[0]) for _ in range(2)]
        moving, fixed = (vary(channels, generator) for channels in pair)
        return moving, torch.cat(pair, 1), fixed

    def loss(outputs: list[Tensor], pair: Tensor) -> Tensor:
        # What is compared is not varied, only what the network sees.
        moving, fixed = pair.chunk(2, 1)
        displacement = outputs[1]
        return registration_loss(warp(moving, displacement), fixed, displacement, SMOOTHNESS)

    torch.manual_seed(seed)
    schedule = Schedule(1500, learning_rate=4e-3, weight_decay=1e-4, average=0.99)
    network = RegistrationNetwork(2, channels, width=16, levels=4)
    trained = train(network, draw, loss, schedule, folder, DEVICE).network
    rows: list[dict[str, Any]] = []
    folded: list[float] = []
    # The same displacements for all networks.
    generator = torch.Generator(DEVICE).manual_seed(2**40)
    for i, j in permutations(range(len(unseen.names)), 2):
        pair, subject = f"{unseen.names[i]}-{unseen.names[j]}", unseen.subjects[j]
        true = unseen.classes[j]
        start = random_displacement(generator, 1, true.shape)
        for prefix, displacement in (("", torch.zeros_like(start)), ("displaced_", start)):
            image = warp(unseen.images["t1"][[i]], displacement)
            classes = warp(unseen.classes[i][None, None].float(), displacement, "nearest")
            rows += compared(f"{prefix}before", pair, subject, classes[0, 0], true)
            moving = seen(front, image)
            for contrast, images in unseen.images.items():
                with torch.inference_mode():
                    found = trained(moving, [seen(front, images[[j]])])[1]
                moved = warp(classes, found, "nearest")[0, 0]
                rows += compared(f"{prefix}{contrast}", pair, subject, moved, true)
                folded.append(float(folded_share(found)))
    print(f"{folder}: {100 * np.mean(folded):.2f} % of the pixels folded")
    return rows


@torch.no_grad()
def seen(front: Front, images: Tensor) -> Tensor:
    """Return what the front makes of images, in bfloat16 where the processor has it."""
    dtype = autocast_dtype(DEVICE)
    with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
        return front(images).float()


def vary(channels: Tensor, generator: torch.Generator) -> Tensor:
    """Vary what a network is trained on as ``fdl train`` varies features, also other inputs."""
    channels = vary_channels(channels, generator)
    return unit_pixels(channels) if channels.shape[1] > 1 else channels


def random_displacement(generator: torch.Generator, n: int, shape: Sequence[int]) -> Tensor:
    """Draw turns (to 14°), scalings (to 16 %), shifts (to 8 pixels) and smooth bends."""
    device = generator.device
    lines = [torch.arange(length, device=device) - (length - 1) / 2 for length in shape]
    places = torch.stack(torch.meshgrid(*lines, indexing="ij")).flatten(1)
    angle = 0.25 * around_zero(generator, n)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(n, 2, 2)
    linear = turn * torch.exp(0.15 * around_zero(generator, n, 1, 2))
    displacement = (linear @ places - places).reshape(n, 2, *shape)
    displacement += 8 * around_zero(generator, n, 2, 1, 1)
    return displacement + 2.5 * smooth_noise(generator, n, 2, shape, 24.0)


def around_zero(generator: torch.Generator, *size: int) -> Tensor:
    """Draw evenly from -1 to 1."""
    return 2 * torch.rand(size, generator=generator, device=generator.device) - 1


def varied(known: Slices, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw T1 slices, each turned, scaled, bent, mirrored and shaded a little at random."""
    chosen = torch.randint(len(known.names), (n,), generator=generator, device=DEVICE)
    image, classes = known.images["t1"][chosen], known.classes[chosen]
    shape = image.shape[2:]
    displacement = random_displacement(generator, n, shape)
    image = warp(image, displacement)
    classes = warp(classes[:, None].float(), displacement, "nearest")[:, 0].long()
    inside = image > 0
    image = image ** torch.exp(0.3 * around_zero(generator, n, 1, 1, 1))
    image = image * torch.exp(0.1 * smooth_noise(generator, n, 1, shape, 80.0))
    noise = torch.randn(image.shape, generator=generator, device=DEVICE)
    image = image + 0.02 * around_zero(generator, n, 1, 1, 1).abs() * noise
    image = torch.where(inside, image.clamp(0, 1), 0)
    if around_zero(generator, 1) < 0:
        image, classes = image.flip(-1), classes.flip(-1)
    return image, classes


def compared(
    contrast: str, name: str, subject: str, found: Tensor, true: Tensor
) -> list[dict[str, Any]]:
    """Return a row of measures for each class, and their mean."""
    head = {"model": contrast, "id": name, "participant": subject}
    rows = [
        {
            "structure": structure,
            **agreement((found == value).cpu().numpy(), (true == value).cpu().numpy(), (1.0, 1.0)),
            "volume": float((found == value).sum()),
            "reference_volume": float((true == value).sum()),
        }
        for value, structure in enumerate(CLASSES, 1)
    ]
    columns = (*METRICS, "volume", "reference_volume")
    means = {key: float(np.nanmean([row[key] for row in rows])) for key in columns}
    return [{**head, **row} for row in (*rows, {"structure": MEAN, **means})]


def gathered(job: Job) -> list[dict[str, Any]]:
    """Read what a job measured."""
    place = {"features": job.features, "tau_channels": job.tau, "seed": job.seed}
    return [
        {"task": task, **place, "contrast": row["model"], **row}
        for task in ("segmentation", "registration")
        for row in read_cases(job.folder / f"{task}.tsv")
    ]


def places(jobs: Sequence[Job]) -> str:
    """Name where the jobs were run."""
    found = dict.fromkeys((job.folder / "device.txt").read_text("utf-8") for job in jobs)
    return "; ".join(found)


def minutes(job: Job) -> float:
    """Return how long the features took to train."""
    log = job.folder / "features.run" / "log.tsv"
    rows = log.read_text().splitlines()[1:] if log.exists() else []
    return float(rows[-1].split("\t")[1]) if rows else 0.0


if __name__ == "__main__":
    main()
