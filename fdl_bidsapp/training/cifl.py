"""Training of contrast-invariant features on random shapes: ``fdl train --recipe cifl``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fdl_bidsapp.errors import UsageError
from fdl_bidsapp.models.bundle import save_features
from fdl_bidsapp.models.cifl import FeatureNetwork, FeatureSpec, cifl_loss, standardise
from fdl_bidsapp.models.inference import device_name, resolve_device
from fdl_bidsapp.simulation.random_shapes import random_pair
from fdl_bidsapp.training.fit import draw_training_curve, run_folder, with_values
from fdl_bidsapp.training.loop import train
from fdl_bidsapp.training.recipes import make_feature_recipe

CROPS = {2: (96, 96), 3: (64, 64, 64)}
"""Grids that are trained on, by dimensions, unless another one is given."""

STANDARD_IMAGES = 16
"""Random images over which the finished channels are standardised."""


@dataclass(frozen=True)
class FeatureSettings:
    """What to train, under the names of the TOML file.

    Attributes
    ----------
    name, dimensions, channels, width, layers
        As in :class:`fdl_bidsapp.models.cifl.FeatureSpec`.
    grid_shape
        Grid of the random images; that of :data:`CROPS` if empty.
    recipe
        ``cifl``.
    recipe_options
        See :func:`fdl_bidsapp.training.recipes.make_feature_recipe`.
    seed
        Of the first weights and of the shapes.
    """

    name: str = "cifl"
    dimensions: int = 3
    channels: int = 16
    width: int = 32
    layers: int = 8
    grid_shape: tuple[int, ...] = ()
    recipe: str = "cifl"
    recipe_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


class TwoViews(nn.Module):
    """The features of one anatomy in two contrasts, called as the training loop calls a network.

    The border is cut off as far as a feature can see beyond it: what a convolution's padding leaves
    there is the same in every contrast, and would be all that is learnt.
    """

    def __init__(self, features: FeatureNetwork) -> None:
        super().__init__()
        self.features = features
        margin = slice(len(features.layers), -len(features.layers))
        self.inner = (slice(None), slice(None), *[margin] * features.dimensions)

    def forward(self, first: Tensor, others: list[Tensor]) -> list[Tensor]:
        """Return the features of each view, without their border."""
        return [self.features(view)[self.inner] for view in (first, *others)]


def make_feature_settings(values: Mapping[str, Any]) -> FeatureSettings:
    """Make settings from the values of a TOML file and of flags.

    Raises
    ------
    UsageError
        An unknown setting, or a value of a wrong type or out of its range.

    Examples
    --------
    >>> make_feature_settings({"dimensions": 2}).grid_shape
    (96, 96)
    """
    settings = with_values(FeatureSettings(), values)
    if settings.dimensions not in CROPS:
        raise UsageError(f"the number of dimensions is {settings.dimensions}", "give 2 or 3")
    if not settings.grid_shape:
        settings = replace(settings, grid_shape=CROPS[settings.dimensions])
    least = 2 * settings.layers + 4
    if len(settings.grid_shape) != settings.dimensions or not all(
        least <= n <= 512 for n in settings.grid_shape
    ):
        raise UsageError(
            f"the grid of the random images is {list(settings.grid_shape)}",
            f"give {settings.dimensions} lengths from {least} to 512 (the border is cut off)",
        )
    return settings


def fit_features(
    settings: FeatureSettings,
    output: Path,
    *,
    device: str = "auto",
    max_minutes: float = float("inf"),
) -> Path:
    """Train features, or go on with a training that was cut off, and write the model file.

    Parameters
    ----------
    settings
        What to train.
    output
        The model file, ``.safetensors``; checkpoint, ``log.tsv`` and ``training.png`` lie beside it
        in a folder of the same name with ``.run``.
    device
        ``auto``, ``cpu`` or ``cuda``.
    max_minutes
        The schedule is shortened to end within this time, all runs together.

    Returns
    -------
    Path
        The model file.

    Raises
    ------
    FdlError
        Whatever is wrong with the settings is told before the training starts.
    """
    recipe = make_feature_recipe(settings.recipe_options)
    spec = FeatureSpec(
        settings.name,
        dimensions=settings.dimensions,
        channels=settings.channels,
        width=settings.width,
        layers=settings.layers,
    )
    where = resolve_device(device)
    folder = run_folder(output)
    torch.manual_seed(settings.seed)

    def draw(step: int, _: float) -> tuple[Tensor, ...]:
        generator = torch.Generator(where).manual_seed(settings.seed * 2**32 + step)
        first, second, labels = random_pair(generator, recipe.batch, settings.grid_shape)
        return first, labels, second

    def loss(views: list[Tensor], _: Tensor) -> Tensor:
        first, second = views
        return cifl_loss(
            first,
            second,
            tau_match=recipe.tau_match,
            tau_total=recipe.tau_total,
            tau_channels=recipe.tau_channels,
            centred=recipe.centred,
        )

    configuration = {key: value for key, value in asdict(settings).items() if key != "name"}
    trained = train(
        TwoViews(FeatureNetwork(spec)),
        draw,
        loss,
        replace(recipe.schedule, max_minutes=max_minutes),
        folder,
        where,
        configuration=configuration,
        record=True,
    )
    draw_training_curve(folder / "log.tsv", folder / "training.png")
    provenance = {
        "data": "random shapes in random contrasts, no real image",
        **configuration,
        "recipe_options": {
            **{key: value for key, value in asdict(recipe).items() if key != "schedule"},
            **settings.recipe_options,
        },
        "steps": trained.steps,
        "minutes": round(trained.minutes, 2),
        "trained_on": device_name(where),
        "torch": str(torch.__version__),
        "finished": time.strftime("%Y-%m-%d"),
    }
    network = cast(TwoViews, trained.network).features
    # Shapes that no step has seen.
    generator = torch.Generator(where).manual_seed(settings.seed * 2**32 + 2**31)
    standardise(network, random_pair(generator, STANDARD_IMAGES, settings.grid_shape)[0])
    save_features(output, network, replace(spec, provenance=provenance))
    return output
