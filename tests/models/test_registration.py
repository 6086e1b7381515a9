from __future__ import annotations

import pytest
import torch

from fdl_bidsapp.models.registration import (
    RegistrationNetwork,
    folded_share,
    registration_loss,
    roughness,
    warp,
)


@pytest.mark.parametrize("shape", [(9, 12), (7, 9, 8)])
def test_no_displacement_changes_nothing(shape):
    image = torch.rand(2, 3, *shape)
    assert torch.allclose(warp(image, torch.zeros(2, len(shape), *shape)), image, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_displacement_points_to_where_a_pixel_comes_from_along_its_axis(axis):
    image = torch.rand(1, 1, 8, 7, 9)
    shift = torch.zeros(1, 3, 8, 7, 9)
    shift[:, axis] = 2
    kept = [slice(None)] * 5
    kept[2 + axis] = slice(0, -2)
    expected = image.roll(-2, 2 + axis)
    assert torch.allclose(warp(image, shift)[tuple(kept)], expected[tuple(kept)], atol=1e-5)


def test_labels_stay_labels():
    labels = torch.randint(0, 5, (1, 1, 10, 10)).float()
    moved = warp(labels, torch.randn(1, 2, 10, 10), "nearest")
    assert set(moved.unique().tolist()) <= set(labels.unique().tolist())


def test_roughness_counts_bends_and_not_shifts():
    shift = torch.full((1, 2, 6, 6), 4.0)
    stretch = torch.zeros(1, 2, 6, 6)
    stretch[:, 0] = torch.arange(6.0)[:, None]
    assert roughness(shift) == 0
    # A slope of 1 in one of two components along one of two axes.
    assert roughness(stretch) == pytest.approx(0.25)


def test_a_shift_beyond_the_detail_still_costs_less_than_a_larger_one():
    torch.manual_seed(0)
    wide = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 71, 71), 8, 1)
    fixed = wide + 0.3 * torch.rand(1, 1, 64, 64)
    none = torch.zeros(1, 2, 64, 64)

    def loss(shift: int, scales: tuple[int, ...]) -> float:
        moved = fixed.roll(shift, 3)[..., 12:]
        return float(registration_loss(moved, fixed[..., 12:], none[..., 12:], 0.0, scales))

    fine = loss(8, (1,)) - loss(4, (1,))
    coarse = loss(8, (1, 2, 4, 8)) - loss(4, (1, 2, 4, 8))
    assert coarse > 2 * fine
    assert coarse > 0.05


def test_loss_knows_no_scale_of_intensity():
    torch.manual_seed(0)
    moved, fixed = torch.rand(2, 1, 3, 16, 16)
    none = torch.zeros(1, 2, 16, 16)
    once = registration_loss(moved, fixed, none, 1.0)
    assert float(registration_loss(9 * moved, 9 * fixed, none, 1.0)) == pytest.approx(float(once))


def test_folds_are_found_where_they_are():
    displacement = torch.zeros(2, 2, 11, 11)
    displacement[1, 1, :, 5] = 3
    flat, folded = folded_share(displacement).tolist()
    assert flat == 0
    # From the pushed column to the next one, a tenth of the steps.
    assert folded == pytest.approx(0.1)


def test_training_finds_a_shift():
    torch.manual_seed(0)
    network = RegistrationNetwork(2, 1, width=8, levels=3)
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    lines = torch.arange(24.0)
    distance = (lines[:, None] - 12) ** 2 + (lines[None] - 12) ** 2
    fixed = torch.exp(-distance / 30)[None, None]
    moving = fixed.roll(2, 3)
    start = registration_loss(moving, fixed, torch.zeros(1, 2, 24, 24), 0.01)
    for _ in range(60):
        moved, displacement = network(moving, [fixed])
        loss = registration_loss(moved, fixed, displacement, 0.01)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.2 * start
    assert float(displacement[0, 1, 8:16, 8:16].detach().mean()) == pytest.approx(2, abs=0.7)


def test_it_starts_from_almost_no_displacement():
    torch.manual_seed(0)
    _, displacement = RegistrationNetwork(3, 2, width=4, levels=2)(
        torch.rand(1, 2, 8, 8, 8), [torch.rand(1, 2, 8, 8, 8)]
    )
    assert displacement.abs().max() < 0.2
