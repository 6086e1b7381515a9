from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage as ndi
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from fdl_bidsapp.physics.dipole import (
    dipole_kernel,
    field_direction,
    field_from_susceptibility,
    padded_shape,
)

DIRECTIONS = [(0, 0, 1), (0, 1, 0), (0.6, 0, 0.8), (-0.48, 0.6, 0.64)]


def offsets(shape, spacing, centre=None):
    """Distance of each voxel from a point in mm, by axis; the grid's middle by default."""
    axes = [
        (np.arange(n) - (n // 2)) * h - c
        for n, h, c in zip(shape, spacing, centre or (0, 0, 0), strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def sphere(shape, spacing, radius, parts=4):
    """A sphere with the partial volume of its surface voxels."""
    fine = [n * parts for n in shape]
    axes = [
        ((np.arange(m) + 0.5) / parts - 0.5 - n // 2) * h
        for m, n, h in zip(fine, shape, spacing, strict=True)
    ]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    inside = (x**2 + y**2 + z**2 <= radius**2).reshape(
        shape[0], parts, shape[1], parts, shape[2], parts
    )
    return inside.mean((1, 3, 5), dtype=np.float32)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("shape", "spacing"), [((48, 48, 48), (1, 1, 1)), ((41, 48, 25), (1, 0.8, 2))]
)
def test_sphere_has_the_closed_form_field(direction, shape, spacing):
    chi, radius = 2.0, 7.0
    field = field_from_susceptibility(chi * sphere(shape, spacing, radius), spacing, direction)
    r = offsets(shape, spacing)
    distance = np.sqrt((r**2).sum(0)) + 1e-9
    cosine = np.tensordot(np.array(direction), r, 1) / distance
    closed = chi / 3 * (radius / distance) ** 3 * (3 * cosine**2 - 1)
    edge = 1.5 * max(spacing)
    outside, inside = distance > radius + edge, distance < radius - edge
    scale = 2 * chi / 3
    assert np.abs(field - closed)[outside].max() < 0.06 * scale
    assert np.sqrt(np.mean((field - closed)[outside] ** 2)) < 0.005 * scale
    # The Lorentz-corrected field within a sphere vanishes.
    assert np.abs(field[inside]).mean() < 0.02 * scale


def test_field_is_proportional_to_susceptibility_against_its_surroundings():
    ball = sphere((24, 24, 24), (1, 1, 1), 5)
    field = field_from_susceptibility(ball, (1, 1, 1))
    in_air = field_from_susceptibility(9.4 - 3 * ball, (1, 1, 1), outside=9.4)
    np.testing.assert_allclose(in_air, -3 * field, atol=2e-5)


def test_padding_keeps_periodic_copies_away():
    # A source at one face would otherwise raise the field at the opposite one.
    chi = np.zeros((32, 32, 32), np.float32)
    chi[16, 16, 1:4] = 1.0
    field = field_from_susceptibility(chi, (1, 1, 1))
    assert field[16, 16, 6] > 0.01
    assert abs(field[16, 16, 31]) < 2e-4
    assert all(
        p >= 1.5 * n for p, n in zip(padded_shape((31, 64, 100)), (31, 64, 100), strict=True)
    )


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 14)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 4)] * 3),
    direction=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda b: np.linalg.norm(b) > 0.1),
)
def test_kernel_lies_between_minus_two_thirds_and_one_third(shape, spacing, direction):
    unit = np.array(direction) / np.linalg.norm(direction)
    kernel = dipole_kernel(shape, spacing, unit)
    assert kernel.shape == (*shape[:2], shape[2] // 2 + 1)
    assert kernel[0, 0, 0] == 0
    assert kernel.min() >= -2 / 3 - 1e-5
    assert kernel.max() <= 1 / 3 + 1e-5


def test_kernel_is_minus_two_thirds_along_the_field_and_one_third_across():
    kernel = dipole_kernel((8, 10, 12), (1, 2, 3), (0, 1, 0))
    np.testing.assert_allclose(kernel[0, 1:, 0], -2 / 3, atol=1e-6)
    np.testing.assert_allclose(kernel[1:, 0, 0], 1 / 3, atol=1e-6)
    np.testing.assert_allclose(kernel[0, 0, 1:], 1 / 3, atol=1e-6)


def test_kernel_knows_the_voxel_size():
    # At 45° in mm, not in voxels, the field along z vanishes up to 1/3 - 1/2.
    kernel = dipole_kernel((16, 16, 16), (1, 1, 2))
    np.testing.assert_allclose(kernel[1, 0, 2], 1 / 3 - 1 / 2, atol=1e-6)
    assert kernel[1, 0, 1] > 0


@settings(max_examples=40, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-60, 60)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 3)] * 3),
    flips=st.tuples(*[st.sampled_from([-1, 1])] * 3),
)
def test_field_direction_points_along_the_scanner_axis(angles, spacing, flips):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(
        np.multiply(spacing, flips)
    )
    affine[:3, 3] = (10, -20, 30)
    direction = field_direction(affine)
    np.testing.assert_allclose(np.linalg.norm(direction), 1, atol=1e-9)
    # A millimetre step along the direction moves along z in the scanner, and nowhere else.
    step = affine[:3, :3] @ (direction / spacing)
    np.testing.assert_allclose(step, [0, 0, 1], atol=1e-7)


def test_a_turned_grid_sees_the_same_field_at_the_same_place():
    def ellipsoid(points):
        scaled = (points - np.array([2, -3, 1])[:, None, None, None]) / np.array([9, 6, 5])[
            :, None, None, None
        ]
        return ndi.gaussian_filter((np.sqrt((scaled**2).sum(0)) < 1).astype(np.float32), 1.0)

    shape, half = (48, 48, 48), 23.5
    straight = np.eye(4)
    straight[:3, 3] = -half
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("xyz", (25, -15, 20), degrees=True).as_matrix()
    turned[:3, 3] = -turned[:3, :3] @ np.full(3, half)
    fields = {}
    index = np.stack(np.indices(shape)).reshape(3, -1)
    for name, affine in (("straight", straight), ("turned", turned)):
        points = (affine[:3, :3] @ index + affine[:3, 3:]).reshape(3, *shape)
        fields[name] = field_from_susceptibility(
            ellipsoid(points), (1, 1, 1), field_direction(affine)
        )
    # The turned grid's field, read at the straight grid's voxels.
    there = np.linalg.inv(turned) @ straight
    moved = ndi.affine_transform(fields["turned"], there[:3, :3], there[:3, 3], order=1)
    middle = (slice(10, -10),) * 3
    difference = (moved - fields["straight"])[middle]
    assert np.sqrt(np.mean(difference**2)) < 0.05 * fields["straight"][middle].std()
