from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from fdl_bidsapp.simulation.geometry import rotation, smooth_noise


@given(st.tuples(*[st.floats(-180, 180)] * 3))
def test_rotation_turns_about_the_fixed_axes_in_order(angles):
    expected = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    np.testing.assert_allclose(rotation(angles), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 30, 20), (2, 5, 60)])
def test_noise_has_unit_deviation_and_the_grid_asked_for(shape):
    noise = smooth_noise(np.random.default_rng(0), shape, (1, 1, 1.5), 8)
    assert noise.shape == shape
    assert noise.dtype == np.float32
    assert noise.std() == pytest.approx(1, abs=1e-3)


def test_noise_is_as_smooth_as_its_scale_in_millimetres():
    def roughness(spacing, scale):
        noise = smooth_noise(np.random.default_rng(1), (64, 64, 64), spacing, scale)
        return np.mean([np.diff(noise, axis=axis).std() for axis in range(3)])

    assert roughness((1, 1, 1), 20) < 0.65 * roughness((1, 1, 1), 10)
    # Twice the voxel at twice the scale is the same image.
    assert roughness((2, 2, 2), 20) == pytest.approx(roughness((1, 1, 1), 10))
