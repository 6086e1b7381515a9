from __future__ import annotations

import numpy as np
import pytest
import torch

from fdl_bidsapp.settings import CONTRASTS
from fdl_bidsapp.simulation.parameters import all_off
from fdl_bidsapp.simulation.simulator import reoriented, simulate_label_map
from fdl_bidsapp.simulation.stream import cut_region, draw_batch

SHAPE, SPACING = (30, 36, 30), (2.0, 2.0, 2.0)
COARSE = {"in_plane": 2.0, "slice_thickness": 2.0, "inversion": "tikhonov"}


@pytest.fixture(scope="module")
def scan(made_up_head):
    values = all_off({**COARSE, "echoes": 3})
    return simulate_label_map(made_up_head, 0, values, box=(60, 72, 60), shortcut=True)


def test_a_batch_is_whole_and_follows_from_its_seeds(made_up_head):
    images, labels = draw_batch(
        [made_up_head], [[0, 1], [0, 2]], SHAPE, SPACING, forced=COARSE, shortcut=0.5
    )
    assert images.shape == (2, 4, *SHAPE)
    assert labels.shape == (2, *SHAPE)
    assert torch.isfinite(images).all()
    assert all(set(one.unique().tolist()) >= {1, 2, 5, 6} for one in labels)
    again, _ = draw_batch([made_up_head], [[0, 2]], SHAPE, SPACING, forced=COARSE, shortcut=0.5)
    torch.testing.assert_close(again[0], images[1], rtol=0, atol=0)


def test_no_edge_tells_where_the_middle_of_the_nuclei_is(made_up_head):
    images, _ = draw_batch([made_up_head], [3, 4, 5], SHAPE, SPACING, forced=COARSE, shortcut=1.0)
    magnitude = images[:, CONTRASTS.index("imag")]
    for axis in (1, 2, 3):
        for face in (0, -1):
            outermost = magnitude.select(axis, face)
            assert (outermost != 0).float().mean() > 0.5


def test_the_scans_own_grid_gives_the_scan(scan):
    images, labels = cut_region(scan, tuple(scan.labels.shape), SPACING)
    torch.testing.assert_close(labels, scan.labels)
    torch.testing.assert_close(images[0], scan.maps["qsm"], atol=1e-5, rtol=1e-3)


def test_a_region_is_the_same_however_the_scan_is_stored(scan):
    one = cut_region(scan, SHAPE, SPACING, (3, -2, 1))
    other = cut_region(reoriented(scan, "PIR"), SHAPE, SPACING, (3, -2, 1))
    torch.testing.assert_close(one, other)
    # Left has the smaller index along the first axis.
    left = np.argwhere((one[1] == 1).numpy())[:, 0].mean()
    assert left < np.argwhere((one[1] == 2).numpy())[:, 0].mean()


def test_nothing_is_made_up_beyond_the_scan(scan):
    images, labels = cut_region(scan, SHAPE, SPACING, (200, 0, 0))
    assert not images.any()
    assert not labels.any()
