from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fdl_bidsapp.imaging.overlap import (
    METRICS,
    agreement,
    dice,
    hausdorff95,
    mean_surface_distance,
    pearson_r,
    precision,
    recall,
    volume_error,
)

masks = arrays(bool, (3, 4, 2), elements=st.booleans())

SPACING = (0.7, 1.0, 2.5)


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping lumps, one of them with a hole or an outlier."""
    rng = np.random.default_rng(seed)
    axes = np.stack(np.meshgrid(*[np.arange(n) for n in (19, 16, 13)], indexing="ij"), -1)
    first = ((axes - rng.uniform(6, 9, 3)) ** 2 / rng.uniform(6, 25, 3)).sum(-1) < 1
    second = ((axes - rng.uniform(6, 9, 3)) ** 2 / rng.uniform(6, 25, 3)).sum(-1) < 1
    second[tuple(rng.integers(0, 13, 3))] ^= True
    return first, second


@given(masks, masks)
def test_dice_is_symmetric_and_between_zero_and_one(a, b):
    value = dice(a, b)
    assert math.isnan(value) == (not (a | b).any())
    if not math.isnan(value):
        assert value == dice(b, a)
        assert value == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert (value == 1) == (a == b).all()


@given(masks, masks)
def test_dice_is_the_harmonic_mean_of_precision_and_recall(a, b):
    p, r = precision(a, b), recall(a, b)
    if not (a | b).any():
        assert math.isnan(p)
        assert math.isnan(r)
    elif p + r:
        assert dice(a, b) == pytest.approx(2 * p * r / (p + r))
    else:
        assert dice(a, b) == 0


@given(masks, masks)
def test_pearson_r_is_that_of_the_voxel_values(a, b):
    if len(np.unique(a)) == 2 and len(np.unique(b)) == 2:
        expected = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert pearson_r(a, b) == pytest.approx(expected, abs=1e-9)


def test_any_value_but_zero_is_inside():
    assert dice(np.array([0, 3, 3]), np.array([0, 1, 1])) == 1.0


def test_refuses_masks_of_different_shape():
    with pytest.raises(ValueError, match="one grid"):
        dice(np.ones((3, 3)), np.ones((3, 1)))


def test_volume_error_is_signed_and_relative_to_the_truth():
    small, large = np.zeros((2, 10), bool)
    small[:4] = large[:5] = True
    assert volume_error(large, small) == pytest.approx(0.25)
    assert volume_error(small, large) == pytest.approx(-0.2)


def test_a_missed_structure_scores_worst_and_one_that_never_was_scores_nothing():
    empty = np.zeros((8, 8, 8), bool)
    full = empty.copy()
    full[2:5, 2:5, 2:5] = True
    diagonal = math.hypot(8 * 0.7, 8 * 1.0, 8 * 2.5)
    missed = agreement(empty, full, SPACING)
    assert missed == pytest.approx(
        dict(zip(METRICS, (0, 0, 0, -1, 1, 0, diagonal, diagonal), strict=True))
    )
    invented = agreement(full, empty, SPACING)
    assert [invented[m] for m in ("dice", "precision", "recall", "pearson_r")] == [0, 0, 0, 0]
    assert math.isnan(invented["volume_error"])
    assert invented["hd95"] == pytest.approx(diagonal)
    assert all(math.isnan(value) for value in agreement(empty, empty, SPACING).values())


def test_distances_are_in_millimetres_on_anisotropic_voxels():
    a, b = np.zeros((2, 9, 9, 9), bool)
    a[4, 4, 2] = b[4, 4, 5] = True
    assert hausdorff95(a, b, SPACING) == pytest.approx(7.5)
    assert mean_surface_distance(a, b, SPACING) == pytest.approx(7.5)


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_monai(seed):
    monai = pytest.importorskip("monai.metrics")
    import torch

    a, b = blobs(seed)
    ours = agreement(a, b, SPACING)
    y_pred, y = (torch.from_numpy(mask)[None, None].float() for mask in (a, b))
    options = {"include_background": True, "spacing": SPACING}
    assert ours["hd95"] == pytest.approx(
        float(monai.compute_hausdorff_distance(y_pred, y, percentile=95, **options)), rel=1e-5
    )
    assert ours["mean_surface_distance"] == pytest.approx(
        float(monai.compute_average_surface_distance(y_pred, y, symmetric=True, **options)),
        rel=1e-5,
    )
    assert ours["dice"] == pytest.approx(float(monai.compute_dice(y_pred, y)), rel=1e-5)
    confusion = monai.get_confusion_matrix(y_pred, y)
    for name in ("precision", "recall"):
        theirs = float(monai.compute_confusion_matrix_metric(name, confusion))
        assert ours[name] == pytest.approx(theirs, rel=1e-5)
