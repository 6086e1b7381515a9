from __future__ import annotations

import numpy as np
import pytest

from fdl_bidsapp.physics.background import project_onto_dipoles, v_sharp
from fdl_bidsapp.physics.dipole import field_from_susceptibility, field_of_distant_sources

SHAPE, SPACING = (44, 44, 36), (1.5, 1.5, 2.0)
TILTED = np.array([0.0, 0.35, 0.94]) / np.linalg.norm([0.0, 0.35, 0.94])


def distance(centre):
    axes = [
        (np.arange(n) - (n - 1) / 2) * h - c for n, h, c in zip(SHAPE, SPACING, centre, strict=True)
    ]
    return np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij", sparse=True)))


def ball(centre, radius):
    return np.clip(0.5 + (radius - distance(centre)) / 1.5, 0, 1).astype(np.float32)


MASK = distance((0, 0, 0)) < 24


def fields(direction):
    """Fields in ppm of nuclei inside and of air outside."""
    nuclei = (((-8, -6, 2), 4, 0.15), ((8, -6, 2), 5, 0.1), ((2, 10, -6), 4, -0.1))
    chi = sum(value * ball(centre, r) for centre, r, value in nuclei)
    air = 9.4 * (ball((0, 14, -32), 5) + ball((29, -15, 0), 4)) * ~MASK
    local = field_from_susceptibility(chi, SPACING, direction)
    return local, field_of_distant_sources(air, SPACING, direction)


@pytest.mark.parametrize("direction", [(0, 0, 1), TILTED], ids=["straight", "oblique"])
def test_v_sharp_leaves_the_local_field(direction):
    local, background = fields(direction)
    found, inside = v_sharp(local + background, MASK, SPACING)
    assert inside.sum() > 0.5 * MASK.sum()
    assert not found[~inside].any()
    assert np.std(background[inside]) > 2 * np.std(local[inside])
    assert np.corrcoef(found[inside], local[inside])[0, 1] > 0.9


def test_v_sharp_removes_a_harmonic_field():
    x, y, z = (
        a * h
        for a, h in zip(
            np.meshgrid(*(np.arange(n) - n / 2 for n in SHAPE), indexing="ij"), SPACING, strict=True
        )
    )
    harmonic = 0.1 * x + 0.002 * (x * y + y * z) + 0.001 * (x**2 - y**2)
    found, inside = v_sharp(harmonic.astype(np.float32), MASK, SPACING)
    assert np.std(found[inside]) < 0.01 * np.std(harmonic[inside])


def test_v_sharp_keeps_only_voxels_around_which_a_sphere_fits():
    _, inside = v_sharp(
        np.zeros(SHAPE, np.float32), MASK, SPACING, largest_radius=6, smallest_radius=0
    )
    depth = 24 - distance((0, 0, 0))
    assert inside[MASK & (depth > 4.5)].all()
    assert not inside[depth < 0.5].any()


def test_v_sharp_of_an_empty_mask_is_empty():
    found, inside = v_sharp(np.ones(SHAPE, np.float32), np.zeros(SHAPE, bool), SPACING)
    assert not inside.any()
    assert not found.any()


@pytest.mark.parametrize("direction", [(0, 0, 1), TILTED], ids=["straight", "oblique"])
def test_projection_onto_dipoles_leaves_the_local_field_up_to_the_edge(direction):
    local, background = fields(direction)
    found, inside = project_onto_dipoles(local + background, MASK, SPACING, direction)
    assert (inside == MASK).all()
    assert np.corrcoef(found[MASK], local[MASK])[0, 1] > 0.8
