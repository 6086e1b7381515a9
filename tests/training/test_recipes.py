from __future__ import annotations

import pytest

from fdl_bidsapp.errors import UsageError
from fdl_bidsapp.training.recipes import make_recipe


def test_the_paper_recipe_is_the_published_one():
    recipe = make_recipe("paper")
    assert (recipe.loss, recipe.batch, recipe.augment, recipe.intensity) == ("dice", 1, 0, "minmax")
    assert recipe.absent == 1
    schedule = recipe.schedule
    assert (schedule.optimiser, schedule.learning_rate) == ("adam", 1e-3)
    assert not schedule.one_cycle
    assert not schedule.mixed_precision
    assert schedule.average == 0
    assert schedule.keep_best


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 4},
        {"steps": 0},
        {"steps": 2.5},
        {"batch": True},
        {"loss": "focal"},
        {"average": 1.0},
        {"learning_rate": -1},
        {"one_cycle": 1},
        {"warped": 1.1},
        {"schedule": None},
    ],
)
def test_refuses_settings_that_make_no_sense(options):
    with pytest.raises(UsageError):
        make_recipe("strong", options)


def test_names_the_recipes_there_are():
    with pytest.raises(UsageError, match="paper, strong"):
        make_recipe("weak")
