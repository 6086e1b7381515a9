from __future__ import annotations

import numpy as np
import pytest

from fdl_bidsapp.physics.masking import brain_mask, reliable_phase


def head(shape, spacing):
    """Magnitude of a brain in dark bone and bright scalp, unevenly received; and the brain."""
    x, y, z = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * h for n, h in zip(shape, spacing, strict=True)),
        indexing="ij",
    )
    radius = np.sqrt(x**2 + (y / 1.2) ** 2 + z**2)
    brain = radius < 50
    magnitude = np.where(brain, 1.0, 0.03) + np.where((radius > 58) & (radius < 66), 1.5, 0)
    # A nerve from the brain to the scalp.
    magnitude[(np.hypot(x, z + 10) < 2.5) & (y > 40) & (y < 75)] = 0.9
    magnitude *= 1 + 0.5 * x / 70
    return noisy(magnitude), brain


def noisy(magnitude):
    noise = np.random.default_rng(0).normal(0, 0.02, (2, *magnitude.shape))
    return np.hypot(magnitude + noise[0], noise[1]).astype(np.float32)


@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (2.0, 2.0, 5.0)])
def test_the_brain_is_found_in_the_magnitude(spacing):
    shape = [round(150 / size) for size in spacing]
    magnitude, brain = head(shape, spacing)
    found = brain_mask(magnitude, spacing)
    assert 2 * (found & brain).sum() / (found.sum() + brain.sum()) > 0.95


def test_muscle_that_hangs_on_the_brain_is_no_brain():
    # It is bright, and joined to the brain more widely than any nerve.
    spacing = (3.0, 3.0, 3.0)
    x, y, z = np.meshgrid(*((np.arange(n) - 30.0) * 3 for n in (60, 60, 76)), indexing="ij")
    brain = np.sqrt(x**2 + (y / 1.2) ** 2 + z**2) < 66
    neck = (np.hypot(x, y) < 65) & (z > 75) & (z < 125)
    joined = (np.hypot(x, y) < 15) & (z > 0) & (z < 90)
    assert (brain | neck).sum() * 0.027 > 1900
    found = brain_mask(noisy(np.where(brain | neck | joined, 1.0, 0.0)), spacing)
    assert (found & neck).sum() < 0.1 * neck.sum()
    assert (found & brain).sum() > 0.97 * brain.sum()


def test_a_large_brain_stays_whole():
    x, y, z = np.meshgrid(*((np.arange(n) - n / 2) * 3 for n in (60, 66, 60)), indexing="ij")
    brain = np.sqrt(x**2 + (y / 1.2) ** 2 + z**2) < 74
    # The tips of its temporal lobes.
    brain |= (np.hypot(x - 40, z + 50) < 18) & (np.abs(y) < 40)
    assert brain.sum() * 0.027 > 1900
    found = brain_mask(noisy(np.where(brain, 1.0, 0.0)), (3.0, 3.0, 3.0))
    assert 0.99 * brain.sum() < (found & brain).sum() <= found.sum() < 1.02 * brain.sum()


def test_the_unit_of_the_magnitude_does_not_matter():
    spacing = (4.0, 4.0, 4.0)
    magnitude, _ = head((38, 38, 38), spacing)
    assert (brain_mask(magnitude, spacing) == brain_mask(4096 * magnitude, spacing)).all()


def test_nothing_gives_an_empty_mask():
    assert not brain_mask(np.zeros((10, 10, 10)), (3, 3, 3)).any()


def test_phase_that_has_decayed_at_the_edge_is_left_out_but_not_inside():
    mask = np.zeros((20, 20, 20), bool)
    mask[2:18, 2:18, 2:18] = True
    late = np.ones(mask.shape)
    late[2:6] = 0.01
    late[12, 10, 10] = 0.0
    kept = reliable_phase(mask, late)
    assert not kept[:4].any()
    assert kept[12, 10, 10]
    assert not (kept & ~mask).any()


def test_phase_that_no_line_fits_is_left_out():
    mask = np.ones((16, 16, 16), bool)
    residual = np.zeros(mask.shape, np.float32)
    residual[:, :, :4] = 1.5
    kept = reliable_phase(mask, np.ones(mask.shape), residual)
    assert not kept[:, :, :3].any()
    assert kept[2:-2, 2:-2, 6:-2].all()


def test_an_empty_mask_stays_empty():
    nothing = np.zeros((5, 5, 5), bool)
    assert not reliable_phase(nothing, np.ones(nothing.shape)).any()
