"""Recipes: everything about a training but the data and the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fdl_bidsapp.errors import UsageError
from fdl_bidsapp.training.loop import Schedule
from fdl_bidsapp.training.losses import dice_cross_entropy_loss, soft_dice_loss

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
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
    batch
        Cases in a step.
    augment
        How strongly to vary the cases: 0 not at all, 1 as a rule; few labels bear more.
    intensity
        Normalisation of all contrasts, ``None`` for the defaults of each; see
        :func:`fdl_bidsapp.imaging.intensity.limits`.
    schedule
        Steps, optimiser, averaging, validation.
    """

    loss: str
    batch: int
    augment: float
    intensity: str | None
    schedule: Schedule

    def total_loss(self, outputs: list[Tensor], classes: Tensor) -> Tensor:
        """Return the loss, summed over the contrasts' logits."""
        return torch.stack([LOSSES[self.loss](logits, classes) for logits in outputs]).sum()


RECIPES = {
    "paper": Recipe(
        loss="dice",
        batch=1,
        augment=0.0,
        intensity="minmax",
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
        batch=2,
        augment=1.0,
        intensity=None,
        schedule=Schedule(5000, learning_rate=3e-3, weight_decay=1e-2, average=0.998),
    ),
}
"""``paper``: as published (arXiv 2302.12980). ``strong``: what works today."""


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
    recipe, options = RECIPES[name], dict(options or {})
    own = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    del own["schedule"]
    scheduled = {
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
    elif key in _AT_LEAST_ONE:
        valid, wanted = type(value) is int and value >= 1, "a whole number from 1"
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        valid, wanted = number and value >= 0, "a number from 0"  # type: ignore[operator]
        if key == "average":
            valid, wanted = valid and value < 1, "a number from 0 to below 1"  # type: ignore[operator]
    if not valid:
        raise UsageError(f"the recipe's {key} is {value!r}", f"give {wanted}")
