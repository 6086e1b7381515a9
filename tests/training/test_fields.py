from __future__ import annotations

import numpy as np
import pytest

from fdl_bidsapp.physics.dipole import field_from_susceptibility
from fdl_bidsapp.training.fields import SUBCORTICAL, simulate_field

COARSE = (5.0, 5.0, 5.0)


@pytest.fixture(scope="module")
def adult():
    return simulate_field([1, 0], spacing=COARSE)


@pytest.fixture(scope="module")
def infant():
    return simulate_field([1, 0], infant=True, spacing=COARSE)


def test_the_field_is_that_of_the_susceptibility_but_for_noise(adult):
    clean = field_from_susceptibility(adult.susceptibility, adult.spacing, adult.direction)
    error = (adult.local_field - clean)[adult.mask]
    assert np.std(error) < 0.5 * np.std(clean[adult.mask])
    assert abs(error.mean()) < 1e-3
    assert not adult.local_field[~adult.mask].any()
    assert not adult.weight[~adult.mask].any()


def test_infants_have_small_heads_with_little_iron(adult, infant):
    assert infant.mask.sum() < 0.75 * adult.mask.sum()

    def iron(case):
        pallidum = [2 * SUBCORTICAL.index("globus_pallidus") + side for side in (1, 2)]
        inside = np.isin(case.labels, pallidum)
        return case.susceptibility[inside].mean()

    assert iron(infant) < iron(adult) - 0.03


def test_both_sides_are_labelled_where_they_lie(adult):
    for number in range(len(SUBCORTICAL)):
        left, right = (np.argwhere(adult.labels == 2 * number + side) for side in (1, 2))
        assert len(left)
        assert len(right)
        assert left[:, 0].max() < right[:, 0].min()


def test_a_seed_decides_the_field(adult):
    again = simulate_field([1, 0], spacing=COARSE)
    np.testing.assert_array_equal(again.local_field, adult.local_field)
    other = simulate_field([1, 1], spacing=COARSE)
    assert not np.allclose(other.direction, adult.direction)
