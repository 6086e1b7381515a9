from __future__ import annotations

import numpy as np
import pytest

from fdl_bidsapp.simulation.shapes import SHAPES, Shape, paint

SHAPE = (60, 60, 60)


def place(centre):
    """A 1 mm grid around a point of the template: coordinates of its voxels, and the inverse."""
    affine = np.eye(4)
    affine[:3, 3] = np.round(centre) - 30
    points = [axis + affine[a, 3] for a, axis in enumerate(np.indices(SHAPE, np.float32))]
    return points, np.linalg.inv(affine)


def draw(spec, side=-1, seed=0, variation=0.0):
    points, inverse = place(np.multiply(spec.centre, [-side, 1, 1]))
    painted = paint(np.random.default_rng(seed), spec, side, points, inverse, variation)
    full = np.zeros((2, *SHAPE))
    if painted:
        full[0][painted.region] = painted.outlined
        full[1][painted.region] = painted.filled
    return full[0], full[1], points


@pytest.mark.parametrize("spec", SHAPES[:-1], ids=lambda spec: spec.tissue)
def test_an_ellipsoid_has_its_volume_and_place(spec):
    outlined, filled, points = draw(spec)
    assert outlined.sum() == pytest.approx(4 / 3 * np.pi * np.prod(spec.radii), rel=0.08)
    centroid = [(p * outlined).sum() / outlined.sum() for p in points]
    np.testing.assert_allclose(centroid, spec.centre, atol=0.1)
    np.testing.assert_array_equal(outlined, filled)


def test_angles_turn_an_ellipsoid_as_they_say():
    # 30° about z, from x towards y.
    outlined, _, (x, y, _) = draw(Shape("putamen", (-20.0, 0.0, 0.0), (12.0, 4.0, 4.0), (0, 0, 30)))
    x, y = x + 20, y
    tilt = 0.5 * np.arctan2(2 * (outlined * x * y).sum(), (outlined * (x**2 - y**2)).sum())
    assert np.rad2deg(tilt) == pytest.approx(30, abs=1)


@pytest.mark.parametrize("spec", SHAPES, ids=lambda spec: spec.tissue)
def test_sides_mirror_each_other_without_variation(spec):
    # The folds of the dentate are drawn for each side.
    left, right = draw(spec, -1)[0], draw(spec, 1)[0]
    offset = int(2 * (np.round(spec.centre[0]) + np.round(-spec.centre[0])))
    assert offset == 0
    np.testing.assert_allclose(left[1:], right[::-1][:-1], atol=1e-4)


def test_individuals_differ_in_size_and_place():
    spec = SHAPES[-2]
    drawn = [draw(spec, seed=seed, variation=1.0) for seed in range(30)]
    volumes = np.array([outlined.sum() for outlined, _, _ in drawn])
    heights = np.array([(o * p[2]).sum() / o.sum() for o, _, p in drawn])
    assert 0.08 < volumes.std() / volumes.mean() < 0.4
    assert 0.4 < heights.std() < 1.3


def test_a_dentate_is_a_plate_around_a_hilum_with_white_matter_in_its_folds():
    spec = SHAPES[-1]
    assert spec.tissue == "dentate_nucleus"
    outlined, filled, points = draw(spec)
    assert np.all(filled <= outlined + 1e-6)
    assert 0.5 < filled.sum() / outlined.sum() < 0.97
    assert outlined.sum() < 0.92 * 4 / 3 * np.pi * np.prod(spec.radii)
    # The hilum lies on the side of the midline, so the outline's centroid moves away from it.
    assert (points[0] * outlined).sum() / outlined.sum() < spec.centre[0] - 0.3


def test_nothing_is_painted_beyond_the_field_of_view():
    points, inverse = place((-5, -20, -8))
    far = Shape("putamen", (80.0, 80.0, 80.0), (4.0, 4.0, 4.0))
    assert paint(np.random.default_rng(0), far, -1, points, inverse, 1.0) is None


def test_as_much_randomness_is_taken_wherever_a_structure_lies():
    # Otherwise a head would depend on what its field of view happens to cut.
    points, inverse = place((-5, -20, -8))
    states = []
    for centre in ((-5.0, -20.0, -8.0), (80.0, 80.0, 80.0)):
        rng = np.random.default_rng(0)
        paint(rng, Shape("putamen", centre, (4.0, 4.0, 4.0)), -1, points, inverse, 1.0)
        states.append(rng.random())
    assert states[0] == states[1]
