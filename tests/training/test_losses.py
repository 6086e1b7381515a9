from __future__ import annotations

import pytest
import torch

from fdl_bidsapp.training.losses import dice_cross_entropy_loss, soft_dice_loss
from fdl_bidsapp.training.recipes import make_recipe


def test_dice_loss_is_that_of_the_formula():
    probabilities = torch.tensor([0.2, 0.8, 0.6, 0.4])
    logits = torch.stack([(1 - probabilities).log(), probabilities.log()]).view(1, 2, 4, 1, 1)
    target = torch.tensor([0, 1, 1, 0]).view(1, 4, 1, 1)
    expected = 1 - (2 * (0.8 + 0.6) + 1) / (2.0 + 2 + 1)
    assert float(soft_dice_loss(logits, target)) == pytest.approx(expected, abs=1e-6)


def test_an_absent_structure_costs_nothing_when_it_is_not_predicted():
    target = torch.zeros(1, 4, 4, 4, dtype=torch.long)
    logits = torch.zeros(1, 2, 4, 4, 4)
    logits[:, 0] = 50
    assert float(soft_dice_loss(logits, target)) == pytest.approx(0, abs=1e-6)


def test_a_recipe_sums_its_loss_over_the_contrasts():
    logits, target = torch.randn(1, 3, 4, 4, 4), torch.randint(0, 3, (1, 4, 4, 4))
    for name, loss in (("paper", soft_dice_loss), ("strong", dice_cross_entropy_loss)):
        total = make_recipe(name).total_loss([logits, logits], target)
        assert float(total) == pytest.approx(2 * float(loss(logits, target)), rel=1e-6)


def test_each_structure_may_have_a_weight_of_its_own():
    target = torch.zeros(1, 4, 4, 4, dtype=torch.long)
    target[0, 0], target[0, 1] = 1, 2
    logits = torch.zeros(1, 3, 4, 4, 4)
    # Structure 2 is called background; so much the worse, the more it weighs.
    logits[0, 1, 0] = logits[0, 0, 1:] = 4.0
    losses = [float(dice_cross_entropy_loss(logits, target, [1.0, w])) for w in (0.5, 1.0, 5.0)]
    assert losses == sorted(losses)
    assert losses[1] == pytest.approx(float(dice_cross_entropy_loss(logits, target)))


def test_absent_structures_count_less_where_that_is_asked_for():
    target = torch.zeros(1, 4, 4, 4, dtype=torch.long)
    target[0, 0] = 1
    logits = torch.zeros(1, 3, 4, 4, 4)
    # Structure 1 is found, structure 2 is not there and found all the same.
    logits[0, 1, 0] = logits[0, 2, 3] = logits[0, 0, 1:3] = 20.0
    alike, less = (float(soft_dice_loss(logits, target, absent=w)) for w in (1.0, 0.2))
    assert alike == pytest.approx((1 - 1 / 17) / 2, abs=1e-3)
    assert less == pytest.approx(0.2 / 1.2 * (1 - 1 / 17), abs=1e-3)
    assert float(soft_dice_loss(logits, target * 0, absent=0.0)) == 0
    found = [
        float(make_recipe("finetune", {"absent": w, "loss": "dice"}).total_loss([logits], target))
        for w in (1.0, 0.2)
    ]
    assert found == pytest.approx([alike, less])
