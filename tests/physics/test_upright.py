from __future__ import annotations

import numpy as np
import pytest

from fdl_bidsapp.physics.dipole import field_from_susceptibility
from fdl_bidsapp.physics.upright import UprightGrid

ONE = (1.0, 1.0, 1.0)


def ball(shape, spacing, centre=(0, 0, 0), radius=6.0):
    places = np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape) - 1) / 2
    distance = np.linalg.norm(places * spacing - centre, axis=-1)
    # Smooth enough to be sampled.
    return (1 / (1 + np.exp(2 * (distance - radius)))).astype(np.float32)


def test_an_upright_scan_of_the_own_voxel_size_stays_as_it_is():
    volume = np.random.default_rng(0).normal(size=(7, 8, 9)).astype(np.float32)
    grid = UprightGrid(volume.shape, ONE, (0, 0, 1), ONE)
    assert grid.own_shape == volume.shape
    np.testing.assert_allclose(grid.take(volume, 3), volume, atol=1e-5)
    np.testing.assert_array_equal(grid.put_back(volume, 0), volume)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_of_any_orientation_are_only_reordered(axis, sign):
    direction = np.eye(3)[axis] * sign
    volume = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    grid = UprightGrid(volume.shape, ONE, direction, ONE)
    upright = grid.take(volume)
    assert upright.shape[2] == volume.shape[axis]
    assert sorted(upright.ravel()) == pytest.approx(sorted(volume.ravel()), abs=1e-5)
    np.testing.assert_allclose(grid.put_back(upright), volume, atol=1e-5)


@pytest.mark.parametrize("direction", [(0.3, -0.2, 0.93), (0.1, 0.9, -0.42), (0, 0, -1)])
def test_there_the_dipole_lies_along_the_third_axis(direction):
    direction = np.array(direction) / np.linalg.norm(direction)
    shape, spacing = (48, 44, 30), (0.8, 0.9, 1.6)
    chi = ball(shape, spacing, (3, -2, 4))
    field = field_from_susceptibility(chi, spacing, direction)
    grid = UprightGrid(shape, spacing, direction, ONE)
    expected = field_from_susceptibility(grid.take(chi, 3), ONE, (0, 0, 1))
    inside = grid.take(np.ones(shape, np.float32)) > 0.99
    wrong = np.abs(grid.take(field, 3) - expected)[inside]
    assert wrong.max() < 0.05 * np.abs(expected).max()


def test_there_and_back_again():
    shape, spacing = (40, 36, 24), (0.8, 0.9, 1.6)
    direction = np.array([0.3, -0.2, 0.93]) / np.linalg.norm([0.3, -0.2, 0.93])
    volume = ball(shape, spacing, (2, 3, -1))
    grid = UprightGrid(shape, spacing, direction, ONE)
    assert np.abs(grid.put_back(grid.take(volume, 3), 3) - volume).max() < 0.03
