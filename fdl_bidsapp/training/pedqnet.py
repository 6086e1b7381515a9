"""Training of PedQ-NET and of its brain mask: ``fdl train --recipe pedqnet`` and ``brainmask``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fdl_bidsapp.errors import UsageError
from fdl_bidsapp.imaging.grid import box_around
from fdl_bidsapp.models.backbones import BACKBONES, Backbone
from fdl_bidsapp.models.bundle import save_volume
from fdl_bidsapp.models.inference import device_name, resolve_device
from fdl_bidsapp.models.layers import Convolution3d
from fdl_bidsapp.models.pedqnet import (
    VolumeNetwork,
    VolumeSpec,
    convolve_dipole,
    model_loss,
    scaled_magnitude,
    segmentation_loss,
)
from fdl_bidsapp.physics.dipole import field_from_susceptibility
from fdl_bidsapp.physics.iterative import smooth_inversion
from fdl_bidsapp.processor import available_cores
from fdl_bidsapp.training.fields import (
    INFANT_SPACING,
    SUBCORTICAL,
    FieldCase,
    draw_patch,
    simulate_field,
    upright_case,
)
from fdl_bidsapp.training.fit import draw_training_curve, run_folder, with_values
from fdl_bidsapp.training.loop import Draw, Schedule, drawing_processes, train

RECIPES = ("pedqnet", "brainmask")

IN_PLANE, SLICE_THICKNESS = (0.7, 1.1), (0.8, 2.0)
"""mm, of the adults' voxels."""

SNR = (20.0, 80.0)
"""Signal of white matter over the noise."""

CLASSES = 1 + 2 * len(SUBCORTICAL)

TYPICAL = 0.05
"""ppm, susceptibility of deep nuclei; the segmenter reads maps in this unit."""

Array = np.ndarray


@dataclass(frozen=True)
class VolumeRecipe:
    """How to train.

    Attributes
    ----------
    steps, batch
        Length of the schedule, patches in a step.
    learning_rate, weight_decay
        Of AdamW, one cycle.
    average
        Decay of the moving average of the weights.
    segmentation_weight
        λ: weight of the segmentation's loss against the physical model's; 0 leaves the
        segmentation network out.
    segmenter_from
        Share of the schedule after which the segmentation network is trained on what is
        reconstructed.
    segmentation_from
        Share of the schedule after which its loss also shapes the reconstruction: a network that
        segments nothing yet has nothing to teach.
    """

    steps: int = 20000
    batch: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    average: float = 0.998
    segmentation_weight: float = 0.1
    segmenter_from: float = 0.3
    segmentation_from: float = 0.7


@dataclass(frozen=True)
class VolumeSettings:
    """What to train, under the names of the TOML file.

    Attributes
    ----------
    name, backbone, backbone_options, smooth, grid_shape
        As in :class:`fdl_bidsapp.models.pedqnet.VolumeSpec`, whose ``patch`` the grid is.
    segmenter, segmenter_options
        Backbone of the network that segments what is reconstructed.
    cases
        Simulated heads to train on.
    infants
        Share of them that are infants' heads.
    grid_spacing
        The network's voxel size in mm. Heads are simulated in voxels of many sizes and brought to
        it.
    recipe
        ``pedqnet`` or ``brainmask``.
    recipe_options
        Fields of :class:`VolumeRecipe`.
    seed
        Of the first weights, the heads and the patches.
    """

    name: str = "pedqnet"
    backbone: str = "unet"
    backbone_options: Mapping[str, Any] = field(default_factory=lambda: {"width": 24, "levels": 5})
    smooth: bool = True
    grid_shape: tuple[int, ...] = (96, 96, 96)
    segmenter: str = "unetr"
    segmenter_options: Mapping[str, Any] = field(default_factory=dict)
    cases: int = 24
    infants: float = 0.5
    grid_spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    recipe: str = "pedqnet"
    recipe_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


class PhysicsTraining(nn.Module):
    """Reconstruction and segmentation as the training loop calls a network.

    Parameters
    ----------
    reconstruction
        Field in, susceptibility out.
    segmenter
        Susceptibility in, structures out; ``None`` to train by physics alone.
    spacing
        Voxel size of the network's own grid in mm, which stands upright.
    """

    def __init__(
        self,
        reconstruction: VolumeNetwork,
        segmenter: nn.Module | None,
        spacing: Sequence[float],
    ) -> None:
        super().__init__()
        self.reconstruction = reconstruction
        self.segmenter = segmenter
        self.spacing = tuple(spacing)

    def forward(self, image: Tensor, others: list[Tensor]) -> list[Tensor]:
        """Return the modelled phase and, where it takes part, the segmentation's logits.

        Parameters
        ----------
        image : (B, 1, X, Y, Z) tensor
            Local field in ppm, and its inversion where the network reads it.
        others
            Mask, (B, 1, X, Y, Z); then radians per ppm, (B,); then whether to segment, and whether
            that shapes the reconstruction, (2,).
        """
        mask, turn, part = others
        chi = self.reconstruction(image) * mask
        with torch.autocast(image.device.type, enabled=False):
            phase = convolve_dipole(chi, self.spacing) * turn[:, None, None, None, None]
        segment, attached = (bool(each) for each in part)
        if self.segmenter is None or not segment:
            return [phase]
        seen = chi if attached else chi.detach()
        return [phase, self.segmenter(seen / TYPICAL)]


class Segmenter(nn.Module):
    """A backbone with one channel for each structure and the background."""

    def __init__(self, settings: VolumeSettings) -> None:
        super().__init__()
        options = dict(settings.segmenter_options)
        if settings.segmenter == "unetr":
            options.setdefault("grid", "x".join(map(str, settings.grid_shape)))
        self.backbone = BACKBONES[settings.segmenter](1, **options)
        self.last = Convolution3d(cast(Backbone, self.backbone).feature_channels, CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Take ``(B, 1, X, Y, Z)`` to ``(B, classes, X, Y, Z)``."""
        logits: Tensor = self.last(cast(Backbone, self.backbone).features(image))
        return logits


class MaskTraining(nn.Module):
    """The brain mask as the training loop calls a network."""

    def __init__(self, network: VolumeNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, _: list[Tensor]) -> list[Tensor]:
        """Return the logits of background and brain."""
        logit = self.network(image)
        return [torch.cat([torch.zeros_like(logit), logit], 1)]


def make_volume_settings(values: Mapping[str, Any]) -> VolumeSettings:
    """Make settings from the values of a TOML file and of flags.

    Raises
    ------
    UsageError
        An unknown setting, or a value of a wrong type or out of its range.

    Examples
    --------
    >>> make_volume_settings({"recipe": "brainmask"}).backbone
    'unetr'
    """
    default = VolumeSettings()
    if values.get("recipe") == "brainmask":
        default = VolumeSettings("brainmask", "unetr", {}, smooth=False)
    settings = with_values(default, values)
    if settings.backbone == "unetr" and "grid" not in settings.backbone_options:
        grid = "x".join(map(str, settings.grid_shape))
        settings = replace(settings, backbone_options={**settings.backbone_options, "grid": grid})
    recipe = with_values(VolumeRecipe(), settings.recipe_options)
    for what, value, good, wanted in (
        ("recipe", settings.recipe, settings.recipe in RECIPES, " or ".join(RECIPES)),
        ("number of cases", settings.cases, settings.cases >= 1, "a whole number from 1"),
        ("share of infants", settings.infants, 0 <= settings.infants <= 1, "a share from 0 to 1"),
        (
            "spacing",
            settings.grid_spacing,
            len(settings.grid_spacing) == 3 and all(0.1 <= n <= 10 for n in settings.grid_spacing),
            "three lengths of 0.1 to 10 mm",
        ),
        ("number of steps", recipe.steps, recipe.steps >= 1, "a whole number from 1"),
        ("batch", recipe.batch, recipe.batch >= 1, "a whole number from 1"),
    ):
        if not good:
            raise UsageError(f"the {what} is {value}", f"give {wanted}")
    return settings


def fit_volume(
    settings: VolumeSettings,
    output: Path,
    *,
    device: str = "auto",
    max_minutes: float = float("inf"),
    cases: Iterable[FieldCase] | None = None,
) -> Path:
    """Train a reconstruction or a brain mask, and write the model file.

    Parameters
    ----------
    settings
        What to train.
    output
        The model file, ``.safetensors``; checkpoint and log lie beside it in a folder of the same
        name with ``.run``.
    device
        ``auto``, ``cpu`` or ``cuda``.
    max_minutes
        The schedule is shortened to end within this time, all runs together.
    cases
        What to train on, instead of simulated heads; of any voxel sizes and directions.

    Returns
    -------
    Path
        The model file.

    Raises
    ------
    FdlError
        Whatever is wrong with the settings is told before the training starts.
    """
    recipe = with_values(VolumeRecipe(), settings.recipe_options)
    spec = VolumeSpec(
        settings.name,
        {"pedqnet": "susceptibility", "brainmask": "brain"}[settings.recipe],
        settings.backbone,
        dict(settings.backbone_options),
        settings.smooth,
        cast(tuple[int, int, int], settings.grid_shape),
        cast(tuple[float, float, float], settings.grid_spacing),
    )
    where = resolve_device(device)
    folder = run_folder(output)
    torch.manual_seed(settings.seed)
    network = VolumeNetwork(spec)
    physical = settings.recipe == "pedqnet"
    whole: nn.Module
    if physical:
        joint = recipe.segmentation_weight > 0
        segmenter = Segmenter(settings) if joint else None
        whole = PhysicsTraining(network, segmenter, spec.spacing)
    else:
        whole = MaskTraining(network)
    if cases is None:
        data = simulate_cases(settings)
    else:
        data = (upright_case(case, settings.grid_spacing) for case in cases)
    draw: Draw
    if physical:
        draw = FieldPatches(data, settings, recipe, spec)
    else:
        draw = MaskPatches(data, settings, recipe)

    def loss(outputs: list[Tensor], targets: Tensor) -> Tensor:
        if not physical:
            return segmentation_loss(outputs[0], targets[:, 0])
        total = model_loss(outputs[0].float(), targets[:, :1], targets[:, 1:2])
        if len(outputs) > 1:
            labels = targets[:, 2].round()
            total = total + recipe.segmentation_weight * segmentation_loss(outputs[1], labels)
        return total

    schedule = Schedule(
        recipe.steps,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        average=recipe.average,
        max_minutes=max_minutes,
    )
    configuration = {key: value for key, value in asdict(settings).items() if key != "name"}
    trained = train(
        whole,
        draw,
        loss,
        schedule,
        folder,
        where,
        configuration=configuration,
        processes=drawing_processes(where),
    )
    draw_training_curve(folder / "log.tsv", folder / "training.png")
    provenance = {
        "data": "simulated heads" if cases is None else "fields given",
        **configuration,
        "recipe_options": asdict(recipe),
        "steps": trained.steps,
        "minutes": round(trained.minutes, 2),
        "trained_on": device_name(where),
        "torch": str(torch.__version__),
        "finished": time.strftime("%Y-%m-%d"),
    }
    best = trained.network
    result = cast(PhysicsTraining, best).reconstruction if physical else best.network
    save_volume(output, cast(VolumeNetwork, result), replace(spec, provenance=provenance))
    return output


def simulate_cases(settings: VolumeSettings) -> Iterator[FieldCase]:
    """Simulate the heads that settings ask for, infants first, with more noise and less.

    Each is brought to the network's grid. They come from as many processes as there are cores, to
    eight.
    """
    processes = min(available_cores(), settings.cases, 8)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_simulate_case, repeat(settings), range(settings.cases))


def _simulate_case(settings: VolumeSettings, number: int) -> FieldCase:
    torch.set_num_threads(1)
    rng = np.random.default_rng([settings.seed, number, 1])
    infant = number < round(settings.cases * settings.infants)
    spacing = INFANT_SPACING
    if not infant:
        in_plane = rng.uniform(*IN_PLANE)
        spacing = (in_plane, in_plane, max(in_plane, rng.uniform(*SLICE_THICKNESS)))
    snr = float(np.exp(rng.uniform(*np.log(SNR))))
    seed = [settings.seed, number]
    case = simulate_field(seed, infant=infant, spacing=spacing, snr=snr)
    return upright_case(case, settings.grid_spacing)


class FieldPatches:
    """Patches of local fields for :func:`fdl_bidsapp.training.loop.train`.

    Where a field was measured twice, one measurement is read and the other one is compared with:
    a network cannot learn the noise of what it does not see (Lehtinen et al., Noise2Noise, ICML
    2018).
    """

    def __init__(
        self,
        cases: Iterable[FieldCase],
        settings: VolumeSettings,
        recipe: VolumeRecipe,
        spec: VolumeSpec,
    ) -> None:
        with ThreadPoolExecutor(min(available_cores(), 8)) as pool:
            self.measured = list(pool.map(_Measured, cases, repeat(spec)))
        self.settings, self.recipe, self.spec = settings, recipe, spec
        # The field of sources beyond the patch is known roughly; it is strongest at the border.
        self.margin = [n // 12 for n in settings.grid_shape]

    def __call__(self, step: int, progress: float) -> tuple[Tensor, ...]:
        """Return what is read, targets (phase, weight, labels), masks, and radians per ppm."""
        rng = np.random.default_rng([self.settings.seed, 1, step])
        images, targets, masks, turns = [], [], [], []
        for _ in range(self.recipe.batch):
            case = self.measured[int(rng.integers(len(self.measured)))]
            read = int(rng.integers(2))
            patch = draw_patch(case.mask, self.settings.grid_shape, rng)
            both, weight = patch.cut(case.channels[read]), patch.cut(case.weight)
            # No map in the patch makes the field of sources beyond it: that is taken away.
            within = field_from_susceptibility(both[1], self.spec.spacing)
            beyond = patch.cut(case.inverted_field[read]) - within
            phase = case.radians_per_ppm * (patch.cut(case.channels[1 - read, 0]) - beyond)
            inner = np.zeros_like(weight)
            place = tuple(slice(m, n - m) for m, n in zip(self.margin, inner.shape, strict=True))
            inner[place] = weight[place]
            images.append(both[: 1 + self.spec.smooth])
            masks.append(weight > 0)
            targets.append(np.stack([phase, inner, patch.cut(case.labels, -1)]))
            turns.append(case.radians_per_ppm)
        recipe = self.recipe
        part = [progress >= from_ for from_ in (recipe.segmenter_from, recipe.segmentation_from)]
        return (
            _tensor(images),
            _tensor(targets),
            _tensor(masks)[:, None],
            _tensor(turns),
            torch.tensor(part),
        )


class _Measured:
    """Both measurements of an upright field, cut to the mask's box, and their inversions."""

    def __init__(self, case: FieldCase, spec: VolumeSpec) -> None:
        box = box_around(case.mask)
        if box is None:
            raise UsageError("the mask of a field is empty", "train on fields that are known")
        self.mask, self.weight = case.mask[box], case.weight[box]
        unknown = np.full(self.mask.shape, -1)
        self.labels = (unknown if case.labels is None else case.labels[box]).astype(np.int16)
        self.radians_per_ppm = case.radians_per_ppm
        fields = [f[box] for f in (case.local_field, case.repeat) if f is not None]
        inverted = [smooth_inversion(f, self.mask, spec.spacing) for f in fields]
        made = [field_from_susceptibility(chi, spec.spacing) for chi in inverted]
        # A field that was measured once is read and compared with as well.
        read = [np.stack(one) for one in zip(fields, inverted, strict=True)]
        self.channels = np.stack((read * 2)[:2])
        self.inverted_field = np.stack((made * 2)[:2])


class MaskPatches:
    """Patches of magnitude images for :func:`fdl_bidsapp.training.loop.train`."""

    def __init__(
        self, cases: Iterable[FieldCase], settings: VolumeSettings, recipe: VolumeRecipe
    ) -> None:
        self.cases = [
            (scaled_magnitude(case.magnitude), case.mask if case.brain is None else case.brain)
            for case in cases
        ]
        self.settings, self.recipe = settings, recipe

    def __call__(self, step: int, progress: float) -> tuple[Tensor, ...]:
        """Return magnitudes, noisy and unevenly bright, and brain masks."""
        rng = np.random.default_rng([self.settings.seed, 2, step])
        images, targets = [], []
        for _ in range(self.recipe.batch):
            image, brain = self.cases[int(rng.integers(len(self.cases)))]
            patch = draw_patch(np.ones_like(brain), self.settings.grid_shape, rng)
            magnitude = patch.cut(image)
            ramps = np.meshgrid(*(np.linspace(-1, 1, n) for n in magnitude.shape), indexing="ij")
            uneven = np.exp(np.tensordot(rng.normal(0, 0.3, 3), np.stack(ramps), 1))
            noise = rng.normal(0, rng.uniform(0.01, 0.08), (2, *magnitude.shape))
            images.append(np.hypot(magnitude * uneven + noise[0], noise[1]))
            targets.append(patch.cut(brain.astype(np.int16), -1)[None])
        return _tensor(images)[:, None], _tensor(targets)


def _tensor(arrays: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(a, np.float32) for a in arrays]))
