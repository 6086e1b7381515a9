from __future__ import annotations

import numpy as np

from fdl_bidsapp.simulation.veins import paint_veins

SHAPE = (90, 108, 84)
SPACING = (2.0, 2.0, 2.0)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
AFFINE[:3, 3] = (-90, -126, -76)
INVERSE = np.linalg.inv(AFFINE)


def veins(seed=0, room=None):
    room = np.ones(SHAPE, np.float32) if room is None else room
    return paint_veins(np.random.default_rng(seed), room, INVERSE, SPACING)


def test_veins_fill_a_small_share_of_the_head():
    share = veins()
    assert share.min() == 0
    assert share.max() == 1
    # Cerebral venous blood: tens of millilitres.
    assert 5 < share.sum() * 8e-3 < 60


def test_the_straight_sinus_runs_in_the_midline_behind_the_midbrain():
    near = np.round(INVERSE[:3, :3] @ [0, -60, 0] + INVERSE[:3, 3]).astype(int)
    region = tuple(slice(n - 3, n + 4) for n in near)
    assert veins()[region].max() > 0.9


def test_veins_keep_to_the_room_they_are_given():
    room = np.ones(SHAPE, np.float32)
    room[:, :50] = 0
    room[:, 50:70] = 0.25
    share = veins(room=room)
    assert not share[:, :50].any()
    assert 0 < share[:, 50:70].max() <= 0.25
    assert share[:, 70:].max() > 0.9


def test_cortical_veins_differ_from_head_to_head():
    first, again, other = veins(0), veins(0), veins(1)
    np.testing.assert_array_equal(first, again)
    assert np.minimum(first, other).sum() < 0.8 * first.sum()
