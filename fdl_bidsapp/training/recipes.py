"""Recipes: everything about a training but the data and the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fdl_bidsapp.errors import UsageError
from fdl_bidsapp.training.loop import Schedule
from fdl_bidsapp.training.losses import dice_cross_entropy_loss, soft_dice_loss

LOSSES: dict[str, Callable[..., Tensor]] = {
    "dice": soft_dice_loss,
    "dice_cross_entropy": dice_cross_entropy_loss,
}
"""Losses of one contrast's logits, by name."""


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes
    ----------
    loss
        A name in :data:`LOSSES`; multimodal fusion sums it over the contrasts.
    absent
        Weight in the loss of structures that a window does not hold, beside 1 of those that it
        does. Where each region has windows of its own, most of a window's structures are absent,
        and at full weight the training is about keeping them away.
    batch
        Cases in a step.
    augment
        How strongly to vary the cases: 0 not at all, 1 as a rule; few labels bear more.
    warped
        Share of the windows that are turned, scaled and bent, where windows are varied. Sampled
        anew, an image is smoother and its labels are rougher than what the network is used on: the
        others are cut out as they are.
    intensity
        Normalisation of all contrasts, ``None`` for the defaults of each; see
        :func:`fdl_bidsapp.imaging.intensity.limits`.
    locator_steps
        Steps for the locator of a model to go on from, before all others; 0 leaves it as it is.
    schedule
        Steps, optimiser, averaging, validation.
    """

    loss: str
    absent: float
    batch: int
    augment: float
    warped: float
    intensity: str | None
    locator_steps: int
    schedule: Schedule

    @property
    def locator_schedule(self) -> Schedule:
        """How a locator goes on: not far from what it has learnt from many more heads."""
        return Schedule(self.locator_steps, learning_rate=5e-4, weight_decay=1e-2, average=0.99)

    def total_loss(self, outputs: list[Tensor], classes: Tensor) -> Tensor:
        """Return the loss, summed over the contrasts' logits."""
        loss = LOSSES[self.loss]
        return torch.stack([loss(each, classes, absent=self.absent) for each in outputs]).sum()


@dataclass(frozen=True)
class FeatureRecipe:
    """How to train a network of contrast-invariant features, which takes no labelled cases.

    Attributes
    ----------
    batch
        Label maps in a step, each seen in two contrasts.
    tau_match, tau_total, tau_channels, centred
        Of :func:`fdl_bidsapp.models.cifl.cifl_loss`.
    schedule
        Steps, optimiser, averaging.
    """

    batch: int
    tau_match: float
    tau_total: float
    tau_channels: float
    centred: bool
    schedule: Schedule


RECIPES = {
    "paper": Recipe(
        loss="dice",
        absent=1.0,
        batch=1,
        augment=0.0,
        warped=1.0,
        intensity="minmax",
        locator_steps=0,
        schedule=Schedule(
            5000,
            learning_rate=1e-3,
            one_cycle=False,
            optimiser="adam",
            average=0.0,
            clip=float("inf"),
            mixed_precision=False,
            validate_every=100,
            keep_best=True,
        ),
    ),
    "strong": Recipe(
        loss="dice_cross_entropy",
        absent=0.2,
        batch=2,
        augment=1.0,
        warped=0.5,
        intensity=None,
        locator_steps=300,
        schedule=Schedule(5000, learning_rate=3e-3, weight_decay=1e-2, average=0.998),
    ),
    "finetune": Recipe(
        loss="dice_cross_entropy",
        absent=0.2,
        batch=1,
        augment=1.0,
        warped=1.0,
        intensity=None,
        locator_steps=300,
        schedule=Schedule(
            500, learning_rate=5e-4, weight_decay=1e-2, average=0.99, validate_every=100
        ),
    ),
}
"""``paper``: as published (arXiv 2302.12980). ``strong``: what works today. ``finetune``: a short
one for a model that goes on from another."""

FEATURE_RECIPE = FeatureRecipe(
    batch=4,
    tau_match=0.1,
    tau_total=0.1,
    tau_channels=0.1,
    centred=True,
    schedule=Schedule(4000, learning_rate=2e-3, weight_decay=1e-4, average=0.99),
)
"""The recipe ``cifl``."""

AnyRecipe = TypeVar("AnyRecipe", Recipe, FeatureRecipe)


def make_recipe(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """Return a recipe, with some of its settings changed.

    Parameters
    ----------
    name
        A name in :data:`RECIPES`.
    options
        Fields of :class:`Recipe` or :class:`~fdl_bidsapp.training.loop.Schedule`.

    Raises
    ------
    UsageError
        There is no such recipe or setting, or a value is out of its range.

    Examples
    --------
    >>> recipe = make_recipe("strong", {"steps": 100, "batch": 4})
    >>> recipe.batch, recipe.schedule.steps, recipe.loss
    (4, 100, 'dice_cross_entropy')
    """
    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r}", f"choose one of {', '.join(RECIPES)}")
    return _changed(RECIPES[name], options or {})


def make_feature_recipe(options: Mapping[str, Any] | None = None) -> FeatureRecipe:
    """Return the recipe ``cifl``, with some of its settings changed.

    Raises
    ------
    UsageError
        There is no such setting, or a value is out of its range.

    Examples
    --------
    >>> make_feature_recipe({"tau_channels": 0.01}).tau_channels
    0.01
    """
    return _changed(FEATURE_RECIPE, options or {})


def _changed(recipe: AnyRecipe, options: Mapping[str, Any]) -> AnyRecipe:
    own: dict[str, Any] = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    del own["schedule"]
    scheduled: dict[str, Any] = {
        field.name: getattr(recipe.schedule, field.name) for field in fields(recipe.schedule)
    }
    for key, value in options.items():
        default = {**own, **scheduled}.get(key, _UNKNOWN)
        if default is _UNKNOWN:
            known = ", ".join(sorted([*own, *scheduled]))
            raise UsageError(f"a recipe has no setting {key!r}", f"it has {known}")
        _check_option(key, value, default)
    return replace(
        recipe,
        schedule=replace(
            recipe.schedule, **{key: options[key] for key in options.keys() & scheduled.keys()}
        ),
        **{key: options[key] for key in options.keys() & own.keys()},
    )


_UNKNOWN = object()
_CHOICES = {
    "loss": tuple(LOSSES),
    "optimiser": ("adam", "adamw"),
    "intensity": ("minmax", "robust", "rate"),
}
_AT_LEAST_ONE = ("steps", "batch", "validate_every")


def _check_option(key: str, value: object, default: object) -> None:
    if key in _CHOICES:
        valid, wanted = value in _CHOICES[key], f"one of {', '.join(_CHOICES[key])}"
    elif isinstance(default, bool):
        valid, wanted = isinstance(value, bool), "true or false"
    elif key == "locator_steps":
        valid, wanted = type(value) is int and value >= 0, "a whole number from 0"
    elif key in _AT_LEAST_ONE:
        valid, wanted = type(value) is int and value >= 1, "a whole number from 1"
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        valid, wanted = number and value >= 0, "a number from 0"  # type: ignore[operator]
        if key.startswith("tau_"):
            valid, wanted = valid and value != 0, "a number above 0"
        if key == "average":
            valid, wanted = valid and value < 1, "a number from 0 to below 1"  # type: ignore[operator]
        if key == "warped":
            valid, wanted = valid and value <= 1, "a number from 0 to 1"  # type: ignore[operator]
    if not valid:
        raise UsageError(f"the recipe's {key} is {value!r}", f"give {wanted}")
