from __future__ import annotations

import numpy as np
import pytest

from fdl_bidsapp.physics.dipole import field_from_susceptibility
from fdl_bidsapp.physics.inversion import thresholded_division, tikhonov

SETTINGS = [
    ((48, 48, 48), (1, 1, 1), (0, 0, 1)),
    ((48, 48, 32), (1, 1, 1.5), (0.28, 0, 0.96)),
    ((40, 48, 48), (1.2, 1, 1), (0, -0.6, 0.8)),
]
SOURCES = (((-9, -6, 3), 5, 0.20), ((9, 4, -4), 5, 0.10), ((2, 9, 9), 4.5, -0.15))


def phantom(shape, spacing):
    """Three balls of known susceptibility in a round mask; the balls' masks too."""
    axes = [(np.arange(n) - (n - 1) / 2) * h for n, h in zip(shape, spacing, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))

    def depth(centre, radius):
        offset = points - np.array(centre)[:, None, None, None]
        return radius - np.sqrt((offset**2).sum(0))

    balls = [(depth(centre, radius), value) for centre, radius, value in SOURCES]
    chi = sum(value * np.clip(0.5 + d, 0, 1) for d, value in balls).astype(np.float32)
    mask = depth((0, 0, 0), 21) > 0
    surround = mask & np.all([d < -2 for d, _ in balls], axis=0)
    return chi, mask, surround, [(d > 1, value) for d, value in balls]


@pytest.mark.parametrize(("shape", "spacing", "direction"), SETTINGS)
@pytest.mark.parametrize(
    ("invert", "low", "high"), [(tikhonov, 0.6, 1.0), (thresholded_division, 0.6, 1.05)]
)
def test_susceptibility_is_recovered_with_its_sign_and_scale(
    invert, low, high, shape, spacing, direction
):
    chi, mask, surround, balls = phantom(shape, spacing)
    field = field_from_susceptibility(chi, spacing, direction)
    estimate = invert(field, mask, spacing, direction)
    assert not estimate[~mask].any()
    reference = estimate[surround].mean()
    for inside, value in balls:
        assert low < (estimate[inside].mean() - reference) / value < high
    assert np.corrcoef(estimate[mask], chi[mask])[0, 1] > 0.85


def test_a_wrong_field_direction_is_noticed():
    chi, mask, _, _ = phantom(*SETTINGS[0][:2])
    field = field_from_susceptibility(chi, (1, 1, 1), (0, 0, 1))
    right = tikhonov(field, mask, (1, 1, 1), (0, 0, 1))
    wrong = tikhonov(field, mask, (1, 1, 1), (0, 1, 0))
    assert (
        np.corrcoef(wrong[mask], chi[mask])[0, 1] < 0.7 * np.corrcoef(right[mask], chi[mask])[0, 1]
    )


def test_stronger_regularisation_shrinks_susceptibility():
    chi, mask, surround, balls = phantom(*SETTINGS[0][:2])
    field = field_from_susceptibility(chi, (1, 1, 1))
    inside, _ = balls[0]
    contrasts = [
        estimate[inside].mean() - estimate[surround].mean()
        for estimate in (tikhonov(field, mask, (1, 1, 1), weight=w) for w in (0.002, 0.02, 0.2))
    ]
    assert contrasts[0] > 1.1 * contrasts[1] > 1.5 * contrasts[2]


def test_a_higher_threshold_tames_noise():
    noise = np.random.default_rng(0).standard_normal((32, 32, 32)).astype(np.float32)
    mask = np.ones(noise.shape, bool)
    loose = thresholded_division(noise, mask, (1, 1, 1), threshold=0.05)
    tight = thresholded_division(noise, mask, (1, 1, 1), threshold=0.25)
    assert loose.std() > 1.5 * tight.std()
    # Nothing is divided by less than the threshold.
    assert tight.std() <= noise.std() / 0.25
