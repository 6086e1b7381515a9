from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from fdl_bidsapp.imaging.measure import PLAUSIBLE_VOLUME_MM3
from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.simulation.geometry import rotation
from fdl_bidsapp.simulation.head import Head, build_head
from fdl_bidsapp.simulation.tissue import tissue_table

# MNI, mm, of the right side; the substantia nigra and the dentate are extended.
COORDINATES = {
    "red_nucleus": (5, -20, -8),
    "substantia_nigra": (11, -19, -12),
    "subthalamic_nucleus": (11, -13, -7),
    "dentate_nucleus": (15, -57, -34),
}


def box(spacing=1.0, low=(-40, -85, -60), high=(40, 5, 10), flips=(1, 1, 1), angles=(0, 0, 0)):
    """A grid around the nuclei."""
    middle = np.add(low, high) / 2
    shape = tuple(int(n) for n in np.ceil(np.subtract(high, low) / spacing))
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) @ np.diag(np.multiply(flips, spacing))
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return shape, affine


WHOLE = box(4.0, (-92, -128, -80), (92, 92, 92))


@cache
def whole_head(seed=0) -> Head:
    return build_head(np.random.default_rng(seed), *WHOLE)


@cache
def region(seed=0, spacing=1.5) -> Head:
    return build_head(np.random.default_rng(seed), *box(spacing))


def centroid(head, index, affine):
    return affine[:3, :3] @ np.argwhere(head.labels == index).mean(0) + affine[:3, 3]


def test_tissues_fill_every_voxel_exactly():
    for head in (whole_head(), region()):
        assert sum(head.weights.values()).min() == pytest.approx(1, abs=1e-5)
        assert sum(head.weights.values()).max() == pytest.approx(1, abs=1e-5)
        assert min(weight.min() for weight in head.weights.values()) >= -1e-6


def test_tissues_are_those_of_the_table():
    assert set(whole_head().weights) | {"choroid_plexus"} == set(tissue_table())


def test_a_head_has_the_make_up_of_a_head():
    head = whole_head()
    litres = {name: float(w.sum()) * 64e-6 for name, w in head.weights.items()}
    assert 1.1 < np.count_nonzero(head.brain) * 64e-6 < 2.3
    white = litres["white_matter"] + litres["cerebellar_white_matter"] + litres["brainstem"]
    grey = litres["cortical_grey"] + litres["cerebellar_cortex"]
    assert 0.3 < white < 0.9
    assert 0.4 < grey < 1.2
    assert 0.1 < litres["csf"] < 0.7
    # Air around the head, and nothing but air at the upper corners.
    assert head.weights["air"][:3, :, -3:].min() > 0.99


def test_the_brain_mask_holds_the_nuclei_and_no_air():
    for head in (whole_head(), region()):
        assert head.brain[head.labels > 0].all()
        assert head.weights["air"][head.brain].max() < 0.51


@pytest.mark.parametrize(
    "grid", [box(2.0), box(2.0, flips=(-1, -1, 1)), box(2.0, angles=(10, -12, 15))]
)
def test_left_is_the_smaller_scanner_x_on_any_grid(grid):
    for seed in range(2):
        head = build_head(np.random.default_rng(seed), *grid)
        for left, right in zip(nuclei()[::2], nuclei()[1::2], strict=True):
            assert (left.hemisphere, right.hemisphere) == ("L", "R")
            assert (
                centroid(head, left.index, grid[1])[0] < centroid(head, right.index, grid[1])[0] - 4
            )


@pytest.mark.parametrize("seed", range(4))
def test_volumes_are_those_of_nuclei(seed):
    for label in nuclei():
        low, high = PLAUSIBLE_VOLUME_MM3[label.structure]
        assert low < np.count_nonzero(region(seed).labels == label.index) * 1.5**3 < high


def test_the_same_seed_gives_the_same_head_and_another_seed_another():
    first, other = region(0), region(1)
    again = build_head(np.random.default_rng(0), *box(1.5))
    np.testing.assert_array_equal(first.labels, again.labels)
    for name, weight in first.weights.items():
        np.testing.assert_array_equal(weight, again.weights[name])
    both = np.count_nonzero((first.labels == other.labels) & (first.labels > 0))
    assert both < 0.7 * np.count_nonzero(first.labels)


def test_nuclei_lie_at_their_known_coordinates_without_variation():
    shape, affine = box(1.0)
    head = build_head(np.random.default_rng(0), shape, affine, variation=0)
    for label in nuclei():
        expected = np.multiply(
            COORDINATES[label.structure], [-1 if label.hemisphere == "L" else 1, 1, 1]
        )
        distance = np.linalg.norm(centroid(head, label.index, affine) - expected)
        assert distance < 1.8, label.name


def test_variation_moves_the_nuclei_by_millimetres():
    _, affine = box(1.5)
    places = np.array([centroid(region(seed), 1, affine) for seed in range(4)])
    assert 1 < places.std(0).mean() < 8


def test_a_structure_at_the_end_of_the_field_of_view_is_cut_there():
    shape, affine = box(1.0)
    whole = build_head(np.random.default_rng(0), shape, affine, variation=0)
    # Ends within the red nuclei.
    start = int(np.round(-8 - affine[2, 3]))
    cut_affine = affine.copy()
    cut_affine[2, 3] += start
    cut = build_head(
        np.random.default_rng(0), (*shape[:2], shape[2] - start), cut_affine, variation=0
    )
    np.testing.assert_array_equal(cut.labels, whole.labels[:, :, start:])
    assert 0 < np.count_nonzero(cut.labels == 1) < np.count_nonzero(whole.labels == 1)
    assert not np.any(cut.labels == 3)


def test_a_field_of_view_without_nuclei_has_no_labels():
    head = build_head(np.random.default_rng(0), *box(3.0, (-60, -60, 40), (60, 40, 80)))
    assert not head.labels.any()
    assert head.brain.any()


def test_labels_mark_the_tissue_of_their_structure():
    head = region()
    for label in nuclei():
        share = head.weights[label.structure][head.labels == label.index]
        # White matter lies in the folds within a dentate's outline.
        assert share.mean() > (0.6 if label.structure == "dentate_nucleus" else 0.8)
        assert share.min() > 0.2


def test_veins_run_beside_nuclei():
    head = region()
    assert head.weights["venous_blood"].max() > 0.5
    for label in nuclei():
        inside = head.labels == label.index
        assert head.weights["venous_blood"][inside].mean() < 0.05
