from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdl_bidsapp.physics.dipole import field_from_susceptibility
from fdl_bidsapp.physics.phase import fit_field, high_pass_phase, remove_background, wrap
from fdl_bidsapp.physics.signal import add_noise, multi_echo_signal

TIMES = (0.004, 0.010, 0.016, 0.022, 0.028)


def ball(shape, spacing, centre, radius):
    axes = [
        (np.arange(n) - (n - 1) / 2) * h - c for n, h, c in zip(shape, spacing, centre, strict=True)
    ]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    return np.clip(0.5 + radius - np.sqrt(x**2 + y**2 + z**2), 0, 1).astype(np.float32)


def head(shape, spacing, direction=(0, 0, 1)):
    """A round brain with nuclei inside and air outside: mask, local field, total field in ppm."""
    mask = ball(shape, spacing, (0, 0, 0), 24) > 0.5
    nuclei = (((-8, -6, 2), 4, 0.15), ((8, -6, 2), 5, 0.1), ((2, 10, -6), 4, -0.1))
    chi = sum(value * ball(shape, spacing, centre, r) for centre, r, value in nuclei)
    air = ball(shape, spacing, (0, 16, -29), 6) + ball(shape, spacing, (26, -19, 0), 5)
    local = field_from_susceptibility(chi, spacing, direction)
    background = field_from_susceptibility(9.4 * air * ~mask, spacing, direction)
    return mask, local, local + background


def signal_of(field, field_strength=3.0, r2star=20.0):
    ones = np.ones(field.shape, np.float32)
    return multi_echo_signal(ones, r2star * ones, field, TIMES, field_strength)


def slope_and_correlation(estimate, truth):
    """The factor between an estimate and the truth, and their correlation."""
    slope = np.polyfit(truth, estimate, 1)[0]
    return float(slope), float(np.corrcoef(truth, estimate)[0, 1])


@given(st.floats(-1000, 1000))
def test_wrap_takes_away_whole_turns(phase):
    wrapped = wrap(np.array([phase]))[0]
    assert abs(wrapped) <= np.pi + 1e-9
    assert abs((phase - wrapped) / (2 * np.pi) - round((phase - wrapped) / (2 * np.pi))) < 1e-6


@pytest.mark.parametrize("field_strength", [1.5, 3.0, 7.0])
def test_fit_recovers_a_field_without_a_mask_up_to_a_constant(field_strength):
    shape = (24, 20, 16)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    field = (0.8 * x - 0.3 * y * z + 0.2 * np.cos(3 * z)).astype(np.float32)
    signal = signal_of(field, field_strength)
    fitted = fit_field(signal, np.ones(shape, bool), (1, 1.3, 2), TIMES, field_strength)
    error = fitted - field
    assert np.abs(error - error.mean()).max() < 1e-3


@pytest.mark.parametrize(
    ("shape", "spacing", "direction", "agreement"),
    [
        ((64, 64, 64), (1, 1, 1), (0, 0, 1), 0.96),
        # Small spheres of long voxels are rough, which costs the background removal.
        ((64, 64, 44), (1, 1, 1.5), (0.28, 0, 0.96), 0.88),
    ],
)
def test_local_field_is_recovered_under_a_strong_background_that_wraps(
    shape, spacing, direction, agreement
):
    mask, local, total = head(shape, spacing, direction)
    steps = [np.diff(np.where(mask, total, np.nan), axis=axis) for axis in range(3)]
    turns = max(np.nanmax(np.abs(step)) for step in steps) * 42.577 * 3.0
    # The case is as hard as it says: at the last echo neighbours differ by more than half a turn.
    assert turns * TIMES[0] < 0.5 < 0.8 < turns * TIMES[-1]
    assert total[mask].std() > 5 * local[mask].std()

    fitted = fit_field(signal_of(total), mask, spacing, TIMES, 3.0)
    estimate, eroded = remove_background(fitted, mask, spacing)
    assert not np.any(eroded & ~mask)
    assert np.count_nonzero(eroded) > 0.6 * np.count_nonzero(mask)
    assert not estimate[~eroded].any()
    inner = eroded & (ball(shape, spacing, (0, 0, 0), 19) > 0.5)
    slope, correlation = slope_and_correlation(estimate[inner], local[inner])
    assert correlation > agreement
    assert 0.85 < slope < 1.05
    # Fitting the field costs nothing: what it gets wrong is background, on any voxel size.
    unwrapped, _ = remove_background(total, mask, spacing)
    slope, correlation = slope_and_correlation(estimate[inner], unwrapped[inner])
    assert correlation > 0.999
    assert abs(slope - 1) < 0.01


def test_noise_moves_the_local_field_by_little():
    shape, spacing = (48, 48, 48), (1.2, 1.2, 1.2)
    mask, _, total = head(shape, spacing)
    clean = signal_of(total)
    noisy = add_noise(clean, 1 / 60, np.random.default_rng(0))
    local, eroded = remove_background(fit_field(clean, mask, spacing, TIMES, 3.0), mask, spacing)
    disturbed, _ = remove_background(fit_field(noisy, mask, spacing, TIMES, 3.0), mask, spacing)
    assert (disturbed - local)[eroded].std() < 0.01


def test_background_removal_takes_away_a_harmonic_field_and_keeps_nothing_of_it():
    shape, spacing = (48, 48, 36), (1.0, 1.0, 1.4)
    mask = ball(shape, spacing, (0, 0, 0), 20) > 0.5
    x, y, z = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * h for n, h in zip(shape, spacing, strict=True)),
        indexing="ij",
    )
    harmonic = 0.05 * z - 0.03 * x + 0.002 * (x**2 + y**2 - 2 * z**2) + 0.4
    local, eroded = remove_background(harmonic, mask, spacing)
    assert np.abs(local[eroded]).max() < 0.02 * harmonic[eroded].std()


def test_high_pass_phase_keeps_a_vein_and_drops_a_slow_ramp():
    shape = (48, 48, 24)
    x = np.arange(48)[:, None, None] * np.ones(shape)
    vein = np.zeros(shape)
    vein[24, 24] = 0.5
    phase = high_pass_phase(np.exp(1j * (0.08 * x + vein)), (1, 1, 1))
    assert 0.4 < phase[24, 24, 12] < 0.55
    away = phase[12:20, 12:36, 6:18]
    assert np.abs(away).max() < 0.1
