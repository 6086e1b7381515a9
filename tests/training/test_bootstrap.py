from __future__ import annotations

import math

import numpy as np
import pytest

from fdl_bidsapp.training.bootstrap import bootstrap_mean


def test_interval_and_sem_are_those_of_theory_for_many_participants():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    estimate = bootstrap_mean(values, [str(i) for i in range(400)])
    sem = values.std(ddof=1) / 20
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.sem == pytest.approx(sem)
    assert estimate.lower == pytest.approx(values.mean() - 1.96 * sem, abs=0.1 * sem)
    assert estimate.upper == pytest.approx(values.mean() + 1.96 * sem, abs=0.1 * sem)


def test_cases_of_one_participant_are_not_independent():
    values = list(np.random.default_rng(0).normal(0.8, 0.1, 20))
    once = bootstrap_mean(values, [str(i) for i in range(20)])
    fourfold = bootstrap_mean(values * 4, [str(i) for i in range(20)] * 4)
    assert (fourfold.n_cases, fourfold.n_participants) == (80, 20)
    assert fourfold.lower == pytest.approx(once.lower)
    assert fourfold.upper == pytest.approx(once.upper)
    assert fourfold.sem == pytest.approx(once.sem)


def test_missing_values_take_no_part():
    estimate = bootstrap_mean([0.5, math.nan, 0.7], ["a", "b", "c"])
    assert (estimate.n_cases, estimate.n_participants) == (2, 2)
    assert estimate.mean == pytest.approx(0.6)
    nothing = bootstrap_mean([math.nan], ["a"])
    assert nothing.n_cases == 0
    assert math.isnan(nothing.mean)


def test_p_tells_a_difference_from_none():
    rng = np.random.default_rng(1)
    names = [str(i) for i in range(30)]
    assert bootstrap_mean(rng.normal(0.05, 0.05, 30), names).p < 0.01
    assert bootstrap_mean(np.tile([0.1, -0.1], 15), names).p > 0.5
    assert bootstrap_mean([0.0] * 30, names).p == 1
