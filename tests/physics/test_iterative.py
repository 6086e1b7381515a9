from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage as ndi

from fdl_bidsapp.physics.dipole import field_from_susceptibility
from fdl_bidsapp.physics.inversion import thresholded_division
from fdl_bidsapp.physics.iterative import (
    field_noise,
    nonlinear_inversion,
    remaining_background,
    smooth_inversion,
    total_variation,
)

SHAPE, SPACING = (32, 30, 24), (1.5, 1.5, 2.0)
TILTED = np.array([0.2, 0.3, 0.9]) / np.linalg.norm([0.2, 0.3, 0.9])


def places():
    return np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * h for n, h in zip(SHAPE, SPACING, strict=True)),
        indexing="ij",
    )


def phantom():
    """Susceptibility (ppm) of three balls in a brain, and its mask."""
    x, y, z = places()
    chi = np.zeros(SHAPE, np.float32)
    for centre, radius, value in (
        ((-7, 0, 2), 5, 0.15),
        ((8, -5, 0), 5, 0.1),
        ((0, 9, -4), 4, -0.1),
    ):
        where = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2 < radius**2
        chi[where] = value
    return chi, x**2 + y**2 + z**2 < 20**2


def error(found, truth, mask):
    """NRMSE after taking out the means."""
    found, truth = (data[mask] - data[mask].mean() for data in (found, truth))
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("direction", [(0, 0, 1), TILTED], ids=["straight", "oblique"])
def test_total_variation_beats_thresholded_division(direction):
    chi, mask = phantom()
    field = field_from_susceptibility(chi, SPACING, direction)
    field += np.random.default_rng(0).normal(0, 0.0005, SHAPE).astype(np.float32)
    found = total_variation(field, mask, SPACING, direction)
    plain = thresholded_division(field, mask, SPACING, direction)
    assert error(found, chi, mask) < error(plain, chi, mask)
    assert not found[~mask].any()


@pytest.mark.parametrize("direction", [(0, 0, 1), TILTED], ids=["straight", "oblique"])
def test_the_nonlinear_inversion_finds_the_map(direction):
    chi, mask = phantom()
    field = field_from_susceptibility(chi, SPACING, direction)
    found = nonlinear_inversion(field, mask, SPACING, direction)
    assert np.corrcoef(found[mask], chi[mask])[0, 1] > 0.85
    assert not found[~mask].any()


@pytest.mark.parametrize("direction", [(0, 0, 1), TILTED], ids=["straight", "oblique"])
def test_the_smooth_inversion_knows_that_sources_lie_in_the_mask(direction):
    chi, mask = phantom()
    field = field_from_susceptibility(chi, SPACING, direction)
    field += np.random.default_rng(0).normal(0, 0.0005, SHAPE).astype(np.float32)
    found = smooth_inversion(field, mask, SPACING, direction)
    plain = thresholded_division(field, mask, SPACING, direction)
    assert not found[~mask].any()
    wide = [
        ndi.gaussian_filter(np.where(mask, one - one[mask].mean(), 0), 2)
        for one in (chi, found, plain)
    ]
    # What varies slowly is where a division, which takes the field outside for zero, goes wrong.
    assert error(wide[1], wide[0], mask) < 0.5 * error(wide[2], wide[0], mask)
    assert error(found, chi, mask) < error(plain, chi, mask)


def test_the_smooth_inversion_is_the_least_of_what_it_minimises():
    chi, mask = phantom()
    rng = np.random.default_rng(0)
    field = field_from_susceptibility(chi, SPACING) + rng.normal(0, 0.002, SHAPE)
    strength = 0.01

    def value(map_):
        misfit = (field_from_susceptibility(map_, SPACING) - field)[mask]
        slopes = sum(
            ((np.diff(map_, axis=axis) / size)[known] ** 2).sum()
            for axis, size in enumerate(SPACING)
            for known in [np.delete(mask, 0, axis) & np.delete(mask, -1, axis)]
        )
        return 0.5 * (misfit**2).sum() + 0.5 * strength * slopes

    found = smooth_inversion(field, mask, SPACING, strength=strength, iterations=200)
    least = value(found)
    for _ in range(5):
        step = np.where(mask, ndi.gaussian_filter(rng.normal(0, 0.02, SHAPE), 1), 0)
        assert value(found + step) > least
        assert value(found - step) > least


def test_the_smooth_inversion_of_nothing_is_nothing():
    _, mask = phantom()
    assert not smooth_inversion(np.zeros(SHAPE), mask, SPACING).any()
    assert not smooth_inversion(np.ones(SHAPE), np.zeros(SHAPE, bool), SPACING).any()
    assert not remaining_background(np.zeros(SHAPE), mask, SPACING).any()
    assert not remaining_background(np.ones(SHAPE), np.zeros(SHAPE, bool), SPACING).any()


@pytest.mark.parametrize("direction", [(0, 0, 1), TILTED], ids=["straight", "oblique"])
def test_what_a_background_removal_has_left_is_told_from_the_field_inside(direction):
    chi, mask = phantom()
    x, y, z = places()
    sinus = (x - 2) ** 2 + (y - 3) ** 2 + (z + 24) ** 2 < 3**2
    assert not (sinus & mask).any()
    inside = field_from_susceptibility(chi, SPACING, direction)
    outside = field_from_susceptibility(np.where(sinus, 2.0, 0.0), SPACING, direction)
    noise = np.random.default_rng(0).normal(0, 0.0005, SHAPE)
    field = np.where(mask, inside + outside + noise, 0).astype(np.float32)
    assert outside[mask].std() > 0.5 * inside[mask].std()
    found = remaining_background(field, mask, SPACING, direction)
    assert not found[~mask].any()
    assert error(found, outside, mask) < 0.7
    # What is not there is not found.
    clean = np.where(mask, inside + noise, 0).astype(np.float32)
    nothing = remaining_background(clean, mask, SPACING, direction)
    assert nothing[mask].std() < 0.25 * inside[mask].std()
    before, after = (smooth_inversion(f, mask, SPACING, direction) for f in (field, field - found))
    assert error(after, chi, mask) < 0.6 * error(before, chi, mask)


def test_total_variation_restores_a_piecewise_constant_map():
    chi, mask = phantom()
    field = field_from_susceptibility(chi, SPACING, TILTED)
    found = total_variation(field, mask, SPACING, TILTED, strength=5e-5, iterations=80)
    assert error(found, chi, mask) < 0.25


@pytest.mark.parametrize("noise", [0.0005, 0.002, 0.006])
def test_the_penalty_follows_the_noise_of_the_field(noise):
    chi, mask = phantom()
    field = field_from_susceptibility(chi, SPACING)
    field += np.random.default_rng(1).normal(0, noise, SHAPE).astype(np.float32)
    assert field_noise(np.where(mask, field, 0), mask) == pytest.approx(noise, rel=0.25)
    found = error(total_variation(field, mask, SPACING), chi, mask)
    others = [
        error(total_variation(field, mask, SPACING, strength=factor * noise), chi, mask)
        for factor in (0.01, 1.0)
    ]
    assert found < min(others)


def test_the_noise_of_a_mask_without_room_is_unknown():
    mask = np.zeros(SHAPE, bool)
    mask[10, 10, 10] = True
    assert field_noise(np.ones(SHAPE), mask) == 0
    assert np.isfinite(total_variation(np.ones(SHAPE, np.float32), mask, SPACING)).all()


def test_what_is_not_trusted_does_not_count():
    chi, mask = phantom()
    field = field_from_susceptibility(chi, SPACING)
    weight = np.ones(SHAPE, np.float32)
    # Wrong by half a ppm where the weight says so.
    spoilt = field.copy()
    spoilt[15:17, 20:22, 12:14] += 0.5
    weight[15:17, 20:22, 12:14] = 0.0
    trusted = total_variation(spoilt, mask, SPACING, weight=weight)
    blind = total_variation(spoilt, mask, SPACING)
    assert error(trusted, chi, mask) < 0.5 * error(blind, chi, mask)


def test_the_nonlinear_inversion_does_not_see_whole_turns():
    chi, mask = phantom()
    field = field_from_susceptibility(chi, SPACING)
    turned = field.copy()
    radians_per_ppm = 16.0
    turned[14:17, 14:17, 10:12] += 2 * np.pi / radians_per_ppm
    options = {"radians_per_ppm": radians_per_ppm, "iterations": 30}
    one = nonlinear_inversion(field, mask, SPACING, **options)
    other = nonlinear_inversion(turned, mask, SPACING, **options)
    np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("invert", [total_variation, nonlinear_inversion])
def test_an_empty_mask_gives_an_empty_map(invert):
    nothing = np.zeros(SHAPE, np.float32)
    assert not invert(nothing, nothing.astype(bool), SPACING, iterations=2).any()
