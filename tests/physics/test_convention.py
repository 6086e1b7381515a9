from __future__ import annotations

import numpy as np
import pytest

from fdl_bidsapp.errors import DataError
from fdl_bidsapp.physics.convention import phase_to_radians, sign_of_field


@pytest.fixture
def phase() -> np.ndarray:
    """Wrapped phase in radians, of which some is at either end."""
    return np.random.default_rng(0).uniform(-np.pi, np.pi, (20, 20, 20)).astype(np.float32)


@pytest.mark.parametrize(
    ("to_stored", "unit"),
    [
        (lambda p: p, ""),
        (lambda p: p + np.pi, ""),
        (lambda p: np.round((p + np.pi) / (2 * np.pi) * 4095), "arbitrary"),
        (lambda p: np.round(p / np.pi * 4096), ""),
        (lambda p: p * 1000, ""),
        (lambda p: p * 0.0011695906, ""),
        (lambda p: p * 1000, "rad"),
    ],
    ids=["radians", "from 0", "12 bits", "signed", "milliradians", "slope", "told wrong"],
)
def test_wrapped_phase_in_any_scale_becomes_radians(phase, to_stored, unit):
    radians, _ = phase_to_radians(to_stored(phase), unit)
    turned = np.exp(1j * (radians - phase))
    assert np.abs(turned / turned.mean() - 1).max() < 0.01


def test_phase_that_was_scaled_is_told_and_phase_in_radians_is_not(phase):
    assert phase_to_radians(phase)[1] == ""
    assert (
        "from -4096 to 4096 was scaled"
        in phase_to_radians(np.clip(np.round(phase / np.pi * 4100), -4096, 4096))[1]
    )


def test_unwrapped_phase_in_radians_is_kept():
    ramp = np.linspace(-20, 31, 1000).reshape(10, 10, 10)
    radians, note = phase_to_radians(ramp, "rad")
    np.testing.assert_allclose(radians, ramp, rtol=1e-6)
    assert "unwrapped" in note


def test_what_is_beyond_the_head_may_be_one_value(phase):
    phase = phase.copy()
    phase[:8] = -np.pi
    radians, _ = phase_to_radians(phase * 100)
    assert np.ptp(radians) == pytest.approx(2 * np.pi, rel=1e-3)


@pytest.mark.parametrize("unit", ["", "arbitrary"])
def test_unwrapped_phase_of_unknown_unit_is_refused(unit):
    values = np.random.default_rng(0).normal(0, 8, (20, 20, 20))
    with pytest.raises(DataError, match=r"unit of the phase cannot be told.*Units"):
        phase_to_radians(values, unit)


def test_constant_phase_is_refused():
    with pytest.raises(DataError, match="the same everywhere"):
        phase_to_radians(np.zeros((4, 4, 4)))


@pytest.mark.parametrize("sign", [1, -1])
def test_iron_tells_the_sign(sign):
    r2star = np.full((20, 20, 20), 20.0)
    r2star[9:11, 9:11, 9:11] = 60.0
    chi = sign * np.where(r2star > 30, 0.1, 0.0)
    found, contrast = sign_of_field(chi, r2star, np.ones(chi.shape, bool), (1.0, 1.0, 1.0))
    assert found == sign
    assert abs(contrast) == pytest.approx(0.1)


def test_what_the_background_leaves_at_the_surface_does_not_tell_the_sign():
    r2star = np.full((30, 30, 30), 20.0)
    chi = np.zeros(r2star.shape)
    r2star[13:17, 13:17, 13:17], chi[13:17, 13:17, 13:17] = 60.0, 0.1
    # Beside air signal decays fast, and the field is not what tissue made.
    r2star[:, :3], chi[:, :3] = 200.0, -1.0
    assert sign_of_field(chi, r2star, np.ones(chi.shape, bool), (1.0, 1.0, 1.0))[0] == 1


def test_a_brain_without_contrast_gives_no_evidence():
    flat = np.zeros((6, 6, 6))
    assert sign_of_field(flat, flat, np.ones(flat.shape, bool), (1.0, 1.0, 1.0)) == (1, 0.0)
