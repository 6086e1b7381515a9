from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fdl_bidsapp.labels import by_abbreviation
from fdl_bidsapp.models.fdl import ModelSpec
from fdl_bidsapp.models.fourier import window_halfwidths
from fdl_bidsapp.training.batches import CaseBatches, make_bank
from fdl_bidsapp.training.cases import Case

CPU = torch.device("cpu")
GRID = (16, 12, 12)
SIDES = by_abbreviation(["RNL", "RNR"])


def spec_of(**changes):
    return ModelSpec(
        "test", **{"grid_shape": GRID, "labels": SIDES, "contrasts": ("qsm",), **changes}
    )


def case_of(seed, shape=GRID, contrasts=("qsm",)):
    """Left nucleus bright on the low side of the first axis, right one half as bright."""
    rng = np.random.default_rng(seed)
    classes = np.zeros(shape, np.uint8)
    middle = [n // 2 for n in shape]
    classes[middle[0] - 5 : middle[0] - 1, 4:8, 4:8] = 1
    classes[middle[0] + 1 : middle[0] + 5, 4:8, 4:8] = 2
    image = np.where(classes == 1, 1.0, np.where(classes == 2, 0.5, 0.1))
    image = (image + rng.normal(0, 0.01, shape)).astype(np.float32)
    return Case(f"case{seed}", str(seed), dict.fromkeys(contrasts, image), classes, ((0, 0, 0),))


def test_every_case_is_drawn_once_before_any_is_drawn_again():
    cases = [case_of(seed) for seed in range(5)]
    batches = CaseBatches(cases, spec_of(), {}, CPU, seed=3)
    shades = {float(batches.cases[i].images.sum()): i for i in range(5)}
    order = [shades[float(batches.draw(step)[0].sum())] for step in range(10)]
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5))
    assert order[:5] != order[5:]


def test_batches_follow_from_seed_and_step():
    cases = [case_of(seed) for seed in range(3)]
    make = [CaseBatches(cases, spec_of(), {}, CPU, batch=2, augment=1.0, seed=s) for s in (1, 1, 2)]
    image, classes = make[0].draw(7)
    assert image.shape == (2, 1, *GRID)
    assert classes.shape == (2, *GRID)
    assert torch.equal(image, make[1].draw(7)[0])
    assert not torch.equal(image, make[2].draw(7)[0])
    assert not torch.equal(image, make[0].draw(8)[0])


def test_flips_swap_the_sides():
    batches = CaseBatches([case_of(0)], spec_of(), {}, CPU, augment=1e-6, seed=0)
    left_first = set()
    for step in range(20):
        image, classes = batches.draw(step)
        x = [float((classes[0] == k).nonzero()[:, 0].float().mean()) for k in (1, 2)]
        bright = float(image[0, 0][classes[0] == 1].mean() - image[0, 0][classes[0] == 2].mean())
        # Mirrored, the bright nucleus lies right, and is called so.
        assert x[0] < x[1]
        left_first.add(bright > 0)
    assert left_first == {True, False}


def test_a_lone_side_is_never_mirrored():
    labels = by_abbreviation(["RNL"])
    case = case_of(0)
    case.classes[case.classes == 2] = 0
    batches = CaseBatches([case], spec_of(labels=labels), {}, CPU, augment=1e-6, seed=0)
    for step in range(20):
        _, classes = batches.draw(step)
        assert float((classes[0] == 1).nonzero()[:, 0].float().mean()) < GRID[0] / 2


def test_windows_of_a_large_canvas_hold_every_structure():
    case = case_of(0, shape=(40, 30, 20))
    for augment in (0.0, 1e-6):
        batches = CaseBatches([case], spec_of(), {}, CPU, augment=augment, seed=1)
        starts = set()
        for step in range(10):
            image, classes = batches.draw(step)
            assert image.shape[2:] == GRID
            assert [int((classes == k).sum()) for k in (1, 2)] == [64, 64]
            starts.add(int((classes[0] > 0).nonzero()[:, 0].min()))
        assert (len(starts) > 1) == bool(augment)


def test_a_share_of_the_windows_is_cut_out_as_it_is(monkeypatch):
    monkeypatch.setattr("fdl_bidsapp.training.batches.vary_intensity", lambda image, *_: image)
    monkeypatch.setattr("fdl_bidsapp.training.batches.may_flip", lambda _: False)
    case = case_of(0)
    (plain, _) = CaseBatches([case], spec_of(), {}, CPU).draw(0)
    for share in (0.0, 0.3, 1.0):
        batches = CaseBatches([case], spec_of(), {}, CPU, augment=1.0, warped=share)
        warped = [not torch.equal(batches.draw(step)[0], plain) for step in range(200)]
        assert sum(warped) / 200 == pytest.approx(share, abs=0.1)


def test_beyond_the_field_of_view_a_warp_finds_what_the_app_finds_there(monkeypatch):
    monkeypatch.setattr("fdl_bidsapp.training.batches.vary_intensity", lambda image, *_: image)
    case = case_of(0)
    case.maps["qsm"] -= 0.55
    batches = CaseBatches([case], spec_of(), {}, CPU, augment=3.0, seed=0)
    low, high = np.percentile(case.maps["qsm"], [0.5, 99.5])
    shares = []
    for step in range(8):
        image, _ = batches.draw(step)
        shares.append(float(((image - -low / (high - low)).abs() < 1e-5).float().mean()))
    assert max(shares) > 0.05


def test_several_targets_are_drawn_in_turn():
    case = case_of(0, contrasts=("qsm", "imag"))
    case.maps["imag"] = 1 - case.maps["qsm"]
    batches = CaseBatches([case], spec_of(contrasts=("qsm", "imag")), {}, CPU, seed=1)
    bright = {
        bool(image[classes[:, None] == 1].mean() > 0.5)
        for image, classes in (batches.draw(step) for step in range(20))
    }
    assert bright == {True, False}


def test_multimodal_batches_bring_low_parts_from_the_case_or_the_bank():
    spec = spec_of(method="multimodal")
    cases = [case_of(0, contrasts=("qsm", "r2star")), case_of(1)]
    bank = make_bank(cases, spec, ("r2star",))
    size = tuple(2 * m + 1 for m in window_halfwidths(GRID, spec.theta))
    assert {name: tuple(images[0].shape) for name, images in bank.items()} == {
        "qsm": size,
        "r2star": size,
    }
    batches = CaseBatches(cases, spec, bank, CPU, batch=2, seed=0)
    image, classes, low = batches.draw(0)
    assert image.shape[0] == classes.shape[0] == low.shape[0] == 2
    assert low.shape[2:] == size


class Threshold(nn.Module):
    def forward(self, image, others=()):
        levels = torch.tensor([0.1, 1.0, 0.5]).view(1, 3, 1, 1, 1)
        return [-((image - levels) ** 2)]


def test_mean_dice_is_one_for_a_network_that_is_right():
    case = case_of(0)
    spec = spec_of(intensity={"qsm": "minmax"})
    batches = CaseBatches([case], spec, {}, CPU)
    assert batches.mean_dice(Threshold()) == pytest.approx(1.0)
    case.classes[case.classes == 2] = 0
    half = CaseBatches([case], spec, {}, CPU).mean_dice(Threshold())
    assert half == pytest.approx(0.5)


def located_spec(**changes):
    """Two structures, each in a region of its own."""
    coarse = ModelSpec("coarse", method="none", labels=SIDES, contrasts=("qsm", "imag"))
    regions = (("RNL",), ("RNR",))
    return spec_of(grid_shape=(8, 12, 12), locator=coarse, regions=regions, **changes)


def test_each_region_of_a_case_is_a_window_of_its_own():
    case = case_of(0, (32, 12, 12))
    both = Case(case.name, "0", case.maps, case.classes, ((9, 0, 0), (15, 0, 0)))
    batches = CaseBatches([both], located_spec(), {}, CPU, batch=2)
    image, classes = batches.draw(0)
    assert image.shape == (2, 1, 8, 12, 12)
    largest = sorted(int(torch.bincount(each.flatten())[1:].argmax()) for each in classes)
    assert largest == [0, 1]
    one = Case(case.name, "0", case.maps, case.classes, (None, (15, 0, 0)))
    assert len(CaseBatches([one], located_spec(), {}, CPU).cases) == 1


class Alike(nn.Module):
    """Calls everything structure 1."""

    def forward(self, image, others=()):
        return [torch.cat([image * 0, image * 0 + 1, image * 0], 1)]


def test_a_region_is_measured_by_its_own_structures():
    case = case_of(0, (32, 12, 12))
    only_right = Case(case.name, "0", case.maps, case.classes, (None, (15, 0, 0)))
    # Its window holds structure 2, none of which is found; structure 1 is not asked for there.
    assert CaseBatches([only_right], located_spec(), {}, CPU).mean_dice(Alike()) == 0.0


def test_each_region_has_low_parts_of_its_own():
    case = case_of(0, (32, 12, 12))
    both = Case(case.name, "0", case.maps, case.classes, ((9, 0, 0), (15, 0, 0)))
    spec = located_spec(method="multimodal", contrasts=("qsm",))
    low = [
        torch.full([2 * m + 1 for m in window_halfwidths(spec.grid_shape, spec.theta)], v)
        for v in (1.0, 2.0)
    ]
    batches = CaseBatches([both], spec, {"imag": low}, CPU, batch=2)
    _, classes, others = batches.draw(0)
    for each, other in zip(classes, others, strict=True):
        region = int(torch.bincount(each.flatten(), minlength=3)[1:].argmax())
        assert float(other.mean()) == region + 1
