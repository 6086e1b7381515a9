from __future__ import annotations

import numpy as np
import pytest

from fdl_bidsapp.imaging.relaxometry import r2star_loglinear
from fdl_bidsapp.physics.signal import add_noise, multi_echo_signal

TIMES = (0.004, 0.010, 0.016, 0.022)
SHAPE = (6, 5, 4)


def draw(low, high, seed=0):
    return np.random.default_rng(seed).uniform(low, high, SHAPE).astype(np.float32)


def test_decay_is_that_of_r2star():
    r2star, density = draw(5, 120), draw(0.2, 2, 1)
    signal = multi_echo_signal(density, r2star, draw(-3, 3, 2), TIMES, 3.0)
    np.testing.assert_allclose(r2star_loglinear(np.abs(signal), TIMES), r2star, rtol=1e-3)
    at_zero = multi_echo_signal(density, r2star, draw(-3, 3, 2), (0.0,), 3.0)
    np.testing.assert_allclose(np.abs(at_zero[..., 0]), density, rtol=1e-5)


@pytest.mark.parametrize("field_strength", [1.5, 3.0, 7.0])
def test_phase_grows_by_gamma_b0_f(field_strength):
    field = draw(-0.2, 0.2)
    signal = multi_echo_signal(
        np.ones(SHAPE), np.zeros(SHAPE), field, TIMES, field_strength, initial_phase=0.4
    )
    slope = np.diff(np.unwrap(np.angle(signal), axis=-1), axis=-1) / np.diff(TIMES)
    # 42.577 Hz per tesla and ppm, counted anticlockwise.
    expected = 2 * np.pi * 42.577 * field_strength * field
    np.testing.assert_allclose(slope, np.repeat(expected[..., None], 3, -1), atol=0.02)
    start = np.angle(signal[..., 0]) - expected * TIMES[0]
    np.testing.assert_allclose(np.angle(np.exp(1j * (start - 0.4))), 0, atol=1e-4)


def test_noise_has_its_deviation_in_either_channel_and_no_mean():
    signal = np.full((40, 40, 40, 2), 3 - 1j, np.complex64)
    noise = add_noise(signal, 0.05, np.random.default_rng(0)) - signal
    assert noise.dtype == np.complex64
    for channel in (noise.real, noise.imag):
        assert abs(channel.std() - 0.05) < 5e-4
        assert abs(channel.mean()) < 5e-4
    assert abs(np.corrcoef(noise.real.ravel(), noise.imag.ravel())[0, 1]) < 0.01
