"""The forward model on a device: against closed forms, and against the NumPy twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl_bidsapp.physics import GAMMA_BAR
from fdl_bidsapp.physics.dipole import dipole_kernel, field_from_susceptibility
from fdl_bidsapp.physics.forward import (
    average_slices,
    dipole_field,
    echo,
    smooth,
    steps_and_waves,
)
from fdl_bidsapp.physics.signal import multi_echo_signal

from .test_dipole import DIRECTIONS, offsets, sphere


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_sphere_has_the_closed_form_field(direction):
    shape, spacing, chi, radius = (48, 48, 40), (1.0, 1.0, 1.2), 2.0, 7.0
    ball = torch.from_numpy(chi * sphere(shape, spacing, radius))
    field = dipole_field(ball, spacing, direction).numpy()
    r = offsets(shape, spacing)
    distance = np.sqrt((r**2).sum(0)) + 1e-9
    cosine = np.tensordot(np.array(direction), r, 1) / distance
    closed = chi / 3 * (radius / distance) ** 3 * (3 * cosine**2 - 1)
    outside, inside = distance > radius + 1.8, distance < radius - 1.8
    assert np.abs(field - closed)[outside].max() < 0.06 * 2 * chi / 3
    assert np.abs(field[inside]).mean() < 0.02 * 2 * chi / 3


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(*[st.integers(4, 12)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 3)] * 3),
    direction=st.sampled_from(DIRECTIONS),
    seed=st.integers(0, 99),
)
def test_many_maps_at_once_give_what_numpy_gives_for_each(shape, spacing, direction, seed):
    chi = np.random.default_rng(seed).normal(0, 1, (2, *shape)).astype(np.float32)
    fields = dipole_field(torch.from_numpy(chi), spacing, direction, outside=0.3)
    for one, field in zip(chi, fields, strict=True):
        expected = field_from_susceptibility(one, spacing, direction, outside=0.3)
        np.testing.assert_allclose(field.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_kernel_is_the_same_on_a_device(direction):
    kernel = dipole_kernel((12, 9, 10), (1, 0.7, 2), direction, "cpu")
    np.testing.assert_allclose(
        kernel.numpy(), dipole_kernel((12, 9, 10), (1, 0.7, 2), direction), atol=1e-6
    )


def test_an_echo_in_an_even_field_is_the_closed_form():
    rho, r2star = torch.rand(4, 5, 6) + 0.5, 40 * torch.rand(4, 5, 6)
    field = torch.full((4, 5, 6), 0.07)
    found = echo(rho, r2star, field, 0.02, 3.0, initial_phase=0.4)
    expected = multi_echo_signal(
        rho.numpy(), r2star.numpy(), field.numpy(), [0.02], 3.0, initial_phase=0.4
    )[..., 0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_steep_field_spreads_phase_across_a_voxel(axis):
    n, slope, time = 12, 0.2, 0.02
    steps = torch.arange(n, dtype=torch.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    field = (slope * steps).expand([n] * 3).contiguous()
    ones = torch.ones(n, n, n)
    found = echo(ones, 0 * ones, field, time, 3.0).abs()
    # Against the sum over a hundred parts of the voxel.
    parts = (np.arange(100) + 0.5) / 100 - 0.5
    expected = abs(np.exp(2j * np.pi * GAMMA_BAR * 3.0 * time * slope * parts).mean())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_slices_are_averaged_in_order():
    image = torch.arange(12.0).reshape(1, 2, 6)
    assert average_slices(image, 3).tolist() == [[[1.0, 4.0], [7.0, 10.0]]]


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(size=(2, 16, 20, 3)) + 1j).to(torch.complex64)


def test_nothing_asked_leaves_the_image(picture):
    torch.testing.assert_close(steps_and_waves(picture, (1, 1, 1)), picture, atol=1e-5, rtol=0)


def test_a_head_that_lies_elsewhere_is_shifted_whole(picture):
    away = torch.tensor([[2.0, -3.0]]).expand(20, 2)
    moved = steps_and_waves(picture, (1.0, 1.5, 1.0), displacement=away)
    torch.testing.assert_close(moved, picture.roll((2, -2), (-3, -2)), atol=1e-4, rtol=0)


def test_phase_that_waves_makes_ghosts_as_far_away_as_it_turns():
    image = torch.zeros(8, 32, 1, dtype=torch.complex64)
    image[4, 16] = 1
    turns = 4
    wave = 0.3 * torch.sin(2 * np.pi * turns * torch.arange(32) / 32)
    ghosts = steps_and_waves(image, (1, 1, 1), phase=wave)[4, :, 0].abs()
    # Bessel functions of the amplitude: the image, and the first ghosts on either side.
    assert ghosts[16] == pytest.approx(0.978, abs=0.01)
    assert ghosts[12] == pytest.approx(0.148, abs=0.01)
    assert ghosts[20] == pytest.approx(0.148, abs=0.01)


def test_less_of_k_space_blurs(picture):
    edge = torch.zeros(32, 32, 1, dtype=torch.complex64)
    edge[16:] = 1
    full = steps_and_waves(edge, (1, 1, 1)).abs()
    part = steps_and_waves(edge, (1, 1, 1), acquired=0.5).abs()
    assert (full[17] - full[15]).mean() > 1.15 * (part[17] - part[15]).mean()
    assert part.max() > 1.05


@settings(max_examples=20, deadline=None)
@given(fwhm=st.floats(0, 6), spacing=st.tuples(*[st.floats(0.5, 3)] * 3))
def test_smoothing_keeps_what_is_even(fwhm, spacing):
    image = torch.full((2, 7, 8, 9), 3.5)
    torch.testing.assert_close(smooth(image, spacing, fwhm), image, atol=1e-5, rtol=0)


def test_smoothing_has_the_width_asked_for():
    image = torch.zeros(41, 41, 41)
    image[20, 20, 20] = 1
    found = smooth(image, (1.0, 0.5, 1.0), 6.0)
    for axis, size in enumerate((1.0, 0.5, 1.0)):
        line = found.sum([a for a in range(3) if a != axis]).numpy()
        x = (np.arange(41) - 20) * size
        # Cut at three standard deviations.
        assert np.sqrt((line * x**2).sum() / line.sum()) == pytest.approx(6 / 2.3548, rel=0.03)
