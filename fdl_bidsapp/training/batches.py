"""Batches from labelled cases that stay decoded in memory, on the device that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fdl_bidsapp.imaging.intensity import limits
from fdl_bidsapp.labels import may_flip, mirrored
from fdl_bidsapp.models.fdl import ModelSpec
from fdl_bidsapp.models.fourier import low_part
from fdl_bidsapp.models.inference import autocast_dtype, other_low_parts
from fdl_bidsapp.training.augment import random_warp, vary_intensity, warp
from fdl_bidsapp.training.cases import BLOCK_MARGIN, Case

Bank = Mapping[str, Sequence[Tensor]]
Front = Callable[[Tensor], Tensor]
IMAGE_ITSELF: Front = nn.Identity()
"""The front of a model that has no features."""


class CaseBatches:
    """Draws batches from cases.

    Parameters
    ----------
    cases
        All with at least one of the model's targets.
    spec
        The model: grid, targets, normalisation, labels.
    bank
        Low parts that stand in for contrasts that a case lacks; multimodal fusion only.
    device
        Where to keep the cases.
    batch
        Cases in a step.
    augment
        Strength of the variation; 0 for none.
    warped
        Share of the windows that are warped, where windows are varied.
    seed
        All batches follow from it.
    front
        The model's features of an image; multimodal fusion only.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        spec: ModelSpec,
        bank: Bank,
        device: torch.device,
        *,
        batch: int = 1,
        augment: float = 0.0,
        warped: float = 1.0,
        seed: int = 0,
        front: Front = IMAGE_ITSELF,
    ) -> None:
        self.spec = spec
        self.front = front
        self.bank = bank
        self.device = device
        self.batch = batch
        self.augment = augment
        self.warped = warped
        self.seed = seed
        self.flips = may_flip(spec.labels)
        self.swap = torch.tensor([0, *(p + 1 for p in mirrored(spec.labels))], device=device)
        self.cases = [resident for case in cases for resident in _residents(case, spec, device)]

    def draw(self, step: int, progress: float = 0.0) -> tuple[Tensor, ...]:
        """Return a step's batch, as :func:`fdl_bidsapp.training.loop.train` takes it.

        All cases, and all regions of each, are drawn once before any is drawn again.
        """
        n = len(self.cases)
        samples = []
        for i in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(i, n)
            order = np.random.default_rng([self.seed, 1, epoch]).permutation(n)
            rng = np.random.default_rng([self.seed, 2, i])
            samples.append(self._sample(self.cases[int(order[place])], rng))
        image, classes, *others = (torch.cat(parts) for parts in zip(*samples, strict=True))
        return image, classes, *others

    def _sample(self, case: _Resident, rng: np.random.Generator) -> tuple[Tensor, ...]:
        targets = [contrast for contrast in self.spec.contrasts if contrast in case.names]
        target = targets[int(rng.integers(len(targets)))]
        images, classes = case.window(rng if self.augment else None, self.augment, self.warped)
        if self.augment and self.flips and rng.random() < 0.5:
            images, classes = images.flip(2), self.swap[classes.flip(1)]
        volumes = {}
        for i, contrast in enumerate(case.names):
            volumes[contrast] = images[:, i : i + 1]
            if self.augment:
                volumes[contrast] = vary_intensity(volumes[contrast], rng, self.augment)
        return volumes[target], classes, *self._others(volumes, target, case.region)

    def _others(self, volumes: Mapping[str, Tensor], target: str, region: int) -> list[Tensor]:
        if self.spec.method != "multimodal":
            return []
        bank = {contrast: lows[region:] for contrast, lows in self.bank.items()}
        return other_low_parts(self.spec, volumes, target, bank, self.front)

    @torch.inference_mode()
    def mean_dice(self, network: nn.Module, mixed_precision: bool = True) -> float:
        """Return a network's mean Dice over cases and structures, on the unvaried windows.

        A structure absent from a window, or of another region, takes no part; on the first target
        of each case.
        """
        dtype = autocast_dtype(self.device) if mixed_precision else None
        values = []
        for case in self.cases:
            images, classes = case.window(None)
            target = next(c for c in self.spec.contrasts if c in case.names)
            image = images[:, [case.names.index(target)]]
            with torch.autocast(
                self.device.type, dtype or torch.bfloat16, enabled=dtype is not None
            ):
                found = network(image)[0].argmax(1)
            n = len(self.spec.labels) + 1
            sizes = torch.bincount(classes.flatten(), minlength=n) + torch.bincount(
                found.flatten(), minlength=n
            )
            both = torch.bincount(classes[found == classes].flatten(), minlength=n)
            values.append((2 * both / sizes)[case.wanted])
        return float(torch.cat(values).nanmean())


def _residents(case: Case, spec: ModelSpec, device: torch.device) -> list[_Resident]:
    return [
        _Resident(case, spec, region, start, device)
        for region, start in enumerate(case.starts)
        if start is not None
    ]


class _Resident:
    """One region of a case on the device, cut to the windows that hold its structures."""

    def __init__(
        self,
        case: Case,
        spec: ModelSpec,
        region: int,
        start: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        self.region = region
        self.wanted = [position + 1 for position in spec.windows[region]]
        self.shape = spec.grid_shape
        self.names = [contrast for contrast in case.maps if contrast in spec.intensity]
        inside = np.argwhere(np.isin(case.classes, self.wanted))
        canvas = case.classes.shape
        self.starts: list[tuple[int, int]] = []
        block = []
        self.first: list[int] = []
        for axis, length in enumerate(self.shape):
            last = canvas[axis] - length
            low, high = 0, last
            if len(inside):
                # Every structure in the window, where it is large enough for that.
                low = max(int(inside[:, axis].max()) + 1 - length, 0)
                high = min(int(inside[:, axis].min()), last)
                low, high = min(low, high), max(low, high)
            margin = math.ceil(BLOCK_MARGIN * length)
            begin = max(low - margin, 0)
            block.append(slice(begin, min(high + length + margin, canvas[axis])))
            self.first.append(min(max(start[axis], low), high) - begin)
            self.starts.append((low - begin, high - begin))
        where = tuple(block)
        window = tuple(
            slice(side.start + first, side.start + first + length)
            for side, first, length in zip(block, self.first, self.shape, strict=True)
        )
        images = np.empty((1, len(self.names), *case.classes[where].shape), np.float32)
        nothing = np.zeros((1, len(self.names), 1, 1, 1), np.float32)
        for i, name in enumerate(self.names):
            low_end, high_end = limits(case.maps[name][window], spec.intensity[name])
            width = max(high_end - low_end, 1e-12)
            images[0, i] = np.clip((case.maps[name][where] - low_end) / width, 0, 1)
            nothing[0, i] = np.clip(-low_end / width, 0, 1)
        # Kept as the distance from a map's 0, which is what a warp finds beyond the block.
        self.images = torch.from_numpy(images - nothing).to(device)
        self.nothing = torch.from_numpy(nothing).to(device)
        self.classes = torch.from_numpy(np.ascontiguousarray(case.classes[where])).to(device)[None]

    def window(
        self, rng: np.random.Generator | None, strength: float = 0.0, warped: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Cut a window; somewhere, and warped or not, where a source of randomness is given."""
        i, j, k = self.first
        if rng is not None:
            i, j, k = (int(rng.integers(low, high + 1)) for low, high in self.starts)
        if rng is None or (warped < 1 and rng.random() >= warped):
            x, y, z = (slice(s, s + n) for s, n in zip((i, j, k), self.shape, strict=True))
            return self.images[..., x, y, z] + self.nothing, self.classes[..., x, y, z].long()
        a, b, c = self.classes.shape[1:]
        grid = random_warp(rng, self.shape, (i, j, k), (a, b, c), strength, self.images.device)
        images, classes = warp(self.images, self.classes, grid)
        return images + self.nothing, classes


@torch.no_grad()
def make_bank(
    cases: Sequence[Case],
    spec: ModelSpec,
    modalities: Sequence[str],
    front: Front = IMAGE_ITSELF,
) -> dict[str, list]:
    """Take each contrast's low part from the first case that has it.

    Parameters
    ----------
    cases
        Training cases.
    spec
        A multimodal model.
    modalities
        Contrasts beside the targets.
    front
        The model's features of an image, on the processor; the identity where it has none.

    Returns
    -------
    contrast → [(n1, n2, n3) tensor, or (C, n1, n2, n3) of features]
        Contrasts that no case has are left out.
    """
    bank: dict[str, list[Tensor]] = {}
    for case in cases:
        missing = [c for c in (*spec.contrasts, *modalities) if c in case.maps and c not in bank]
        if missing:
            resident = _residents(case, spec, torch.device("cpu"))[0]
            images, _ = resident.window(None, 0.0)
            for contrast in missing:
                volume = images[:, [resident.names.index(contrast)]]
                low = low_part(front(volume), spec.theta, spec.spectrum)[0]
                bank[contrast] = [low if spec.features else low[0]]
    return bank
