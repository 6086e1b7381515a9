from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdl_bidsapp.errors import DataError
from fdl_bidsapp.imaging.relaxometry import mean_magnitude, r2star_from_t2star, r2star_loglinear

TIMES = [0.004, 0.010, 0.016, 0.022, 0.028]


def decay(r2star, times=TIMES, amplitude=500.0):
    return (amplitude * np.exp(-np.multiply.outer(r2star, times))).astype("f4")


@given(
    r2star=st.floats(0.5, 300),
    amplitude=st.floats(1e-3, 1e5),
    times=st.lists(st.integers(1, 50), min_size=2, max_size=8, unique=True),
)
def test_recovers_the_decay_of_a_noiseless_signal(r2star, amplitude, times):
    seconds = [time / 1000 for time in sorted(times)]
    # Late echoes may underflow; as echoes that are not positive, they are left out.
    signal = decay(np.full((1, 1, 1), r2star), seconds, amplitude)
    if np.count_nonzero(signal > 1e-20) >= 2:
        np.testing.assert_allclose(r2star_loglinear(signal, seconds), r2star, rtol=0.02, atol=0.02)


def test_weights_hold_back_the_noise_of_late_echoes():
    rng = np.random.default_rng(0)
    truth = np.full((20, 20, 20), 80.0)
    noisy = np.abs(decay(truth, amplitude=100) + rng.normal(0, 3, (20, 20, 20, 5)))
    weighted = r2star_loglinear(noisy, TIMES)
    plain = -np.polyfit(TIMES, np.log(noisy.reshape(-1, 5)).T, 1)[0]
    assert np.abs(weighted - 80).mean() < 0.7 * np.abs(plain - 80).mean()
    assert abs(weighted.mean() - 80) < 3


def test_leaves_out_echoes_that_are_not_positive():
    signal = decay(np.full((1, 1, 3), 40.0))
    signal[0, 0, 0, 3:] = 0
    signal[0, 0, 1, 1:] = 0
    signal[0, 0, 2, :] = -1
    np.testing.assert_allclose(r2star_loglinear(signal, TIMES)[0, 0], [40, 0, 0], atol=0.01)


def test_a_growing_signal_has_no_decay():
    assert r2star_loglinear(decay(np.full((1, 1, 1), -10.0)), TIMES) == 0


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        (TIMES[:4], "5 echoes have 4 echo times"),
        ([4, 10, 16, 22, 28], "not in seconds"),
        ([0.004, 0.010, 0.010, 0.022, 0.028], "increasing"),
        ([0, 0.010, 0.016, 0.022, 0.028], "positive"),
        ([0.004, 0.010, 0.016, 0.022, float("nan")], "positive"),
    ],
)
def test_refuses_echo_times_that_cannot_be(times, reason):
    with pytest.raises(DataError, match=reason):
        r2star_loglinear(decay(np.ones((2, 2, 2))), times)


def test_refuses_a_single_echo():
    with pytest.raises(DataError, match="two echoes"):
        r2star_loglinear(np.ones((2, 2, 2, 1), "f4"), [0.01])


def test_mean_magnitude_is_the_mean_over_echoes():
    signal = decay(np.full((3, 3, 3), 30.0))
    mean = mean_magnitude(signal)
    assert mean.shape == (3, 3, 3)
    np.testing.assert_allclose(mean, 500 * np.exp(-30 * np.array(TIMES)).mean(), rtol=1e-5)


def test_r2star_is_the_inverse_of_t2star_and_zero_where_there_is_none():
    t2star = np.array([0.05, 0.0, -0.1, 1e-6, 0.002], "f4")
    np.testing.assert_allclose(r2star_from_t2star(t2star), [20, 0, 0, 0, 500], rtol=1e-5)
