from __future__ import annotations

import numpy as np
import pytest

from fdl_bidsapp.physics import GAMMA_BAR
from fdl_bidsapp.physics.phase import wrap
from fdl_bidsapp.physics.signal import add_noise, multi_echo_signal
from fdl_bidsapp.physics.unwrapping import fit_unwrapped_field, unwrap_path

SHAPE, SPACING = (26, 24, 22), (1.0, 1.2, 1.5)


def places():
    return np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")


def ball():
    x, y, z = places()
    return x**2 + y**2 + z**2 < 0.9


def steep_field():
    """Ppm; several turns across the grid at the echo times below."""
    x, y, z = places()
    return (0.8 * x - 0.5 * y * z + 0.3 * np.exp(-8 * (x**2 + y**2 + z**2))).astype(np.float32)


def test_path_unwrapping_restores_phase_up_to_whole_turns():
    phase = 25 * steep_field()
    mask = ball()
    turns = (unwrap_path(wrap(phase), mask) - phase)[mask] / (2 * np.pi)
    assert np.ptp(turns) < 1e-4
    assert abs(turns[0] - np.round(turns[0])) < 1e-4


def test_path_unwrapping_is_zero_outside_the_mask_and_takes_an_empty_one():
    mask = ball()
    assert not unwrap_path(steep_field(), mask)[~mask].any()
    assert not unwrap_path(steep_field(), np.zeros(SHAPE, bool)).any()


@pytest.mark.parametrize("field_strength", [1.5, 3.0, 7.0])
@pytest.mark.parametrize(
    "times",
    [(0.002, 0.004), (0.004, 0.010, 0.016, 0.022), (0.003, 0.005, 0.011, 0.021)],
    ids=["two echoes", "even", "uneven"],
)
def test_the_field_is_found_whatever_the_echoes_and_the_coils_phase(field_strength, times):
    field = steep_field() / field_strength
    x, y, z = places()
    signal = multi_echo_signal(
        np.ones(SHAPE),
        np.full(SHAPE, 20.0),
        field,
        times,
        field_strength,
        initial_phase=(2 + x + 0.8 * y - 0.5 * z).astype(np.float32),
    )
    mask = ball()
    fitted, residual = fit_unwrapped_field(signal, mask, SPACING, times, field_strength)
    # Whole turns between echoes cannot be told from a constant field.
    constant = 1 / (GAMMA_BAR * field_strength * min(np.diff(times)))
    error = (fitted - field)[mask]
    assert abs(np.median(error) / constant - round(np.median(error) / constant)) < 0.03
    radians_per_ppm = 2 * np.pi * GAMMA_BAR * field_strength * np.mean(times)
    assert np.abs(error - np.median(error)).max() * radians_per_ppm < 0.1
    assert residual[mask].max() < 0.1


def test_one_echo_is_enough_where_the_coils_phase_is_known():
    field = steep_field()
    signal = multi_echo_signal(np.ones(SHAPE), np.zeros(SHAPE), field, [0.02], 3.0)
    fitted, _ = fit_unwrapped_field(signal, ball(), SPACING, [0.02], 3.0)
    error = (fitted - field)[ball()]
    assert np.ptp(error) < 1e-3


def test_taking_out_the_coils_phase_lowers_the_noise():
    times = (0.004, 0.010, 0.016, 0.022)
    field = steep_field()
    clean = multi_echo_signal(np.ones(SHAPE), np.full(SHAPE, 20.0), field, times, 3.0)
    signal = add_noise(clean, 0.02, np.random.default_rng(0))
    mask = ball()
    fitted, _ = fit_unwrapped_field(signal, mask, SPACING, times, 3.0)
    noise = np.std((fitted - field)[mask])
    weights = np.exp(-2 * 20.0 * np.array(times))
    through_origin = 0.02 / np.sqrt(np.sum(weights * np.square(times)))
    expected = through_origin / (2 * np.pi * GAMMA_BAR * 3.0)
    assert noise == pytest.approx(expected, rel=0.25)
