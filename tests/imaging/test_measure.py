from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fdl_bidsapp.imaging.confidence import INTERCEPT, SIGNS, Calibration
from fdl_bidsapp.imaging.measure import (
    COLUMNS,
    PLACES_MM,
    confidences,
    contrasts,
    expected_centre,
    guesses,
    label_map,
    largest_components,
    measure,
)
from fdl_bidsapp.labels import by_abbreviation, nuclei

LABELS = by_abbreviation(["RNL", "DNR"])
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
SHAPE = (40, 40, 30)


def scene():
    """RNL: 6 × 6 × 6 voxels = 432 mm³; DNR: 8 × 8 × 8 voxels = 1024 mm³."""
    probabilities = np.zeros((2, *SHAPE), "f4")
    probabilities[0, 5:11, 5:11, 5:11] = 0.9
    probabilities[1, 20:28, 20:28, 10:18] = 0.8
    return probabilities


def rows_of(probabilities, maps=None, target="", calibration=None, **options):
    cleaned, components = largest_components(label_map(probabilities, LABELS), LABELS)
    scan = (cleaned, probabilities, LABELS, AFFINE)
    plain = dict.fromkeys(("RNL", "DNR"), 3.0)
    rows = measure(
        *scan,
        maps or {},
        components=components,
        contrasts=plain,
        confidence=confidences(*scan, components, plain, target, calibration),
        threshold=calibration.threshold if calibration else 0.0,
        **options,
    )
    return {row["abbreviation"]: row for row in rows}


def test_label_map_holds_the_most_probable_of_structures_and_background():
    rng = np.random.default_rng(0)
    full = rng.dirichlet(np.ones(9), 500).T.reshape(9, 10, 10, 5)
    labels = nuclei()
    expected = np.array([0, *(label.index for label in labels)])[full.argmax(axis=0)]
    result = label_map(full[1:].astype("f4"), labels)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


def test_label_map_uses_label_indices_not_positions():
    assert set(np.unique(label_map(scene(), LABELS))) == {0, 1, 4}


def test_label_map_refuses_labels_that_do_not_match():
    with pytest.raises(ValueError, match="1 labels for 2"):
        label_map(scene(), LABELS[:1])


def ball(radius, spacing, shift):
    """A soft-edged ball in a cube of some 20 mm, as a (1, n, n, n) array."""
    n = round(20 / spacing)
    places = (np.arange(n) - (n - 1) / 2) * spacing
    x, y, z = (axis - s for axis, s in zip(np.ix_(places, places, places), shift, strict=True))
    distance = np.sqrt(x**2 + y**2 + z**2)
    return (1 / (1 + np.exp((distance - radius) / 0.6)))[None].astype("f4")


@pytest.mark.parametrize("wanted", [210, 268, 330])
def test_a_structure_has_as_many_voxels_as_are_known(wanted):
    probabilities = ball(4.0, 1.0, (0.2137, -0.1179, 0.3191))
    labels = label_map(probabilities, LABELS[:1], [wanted])
    assert np.count_nonzero(labels) == pytest.approx(wanted, abs=2)
    # The most probable ones.
    assert probabilities[0][labels > 0].min() >= probabilities[0][labels == 0].max()


def test_structures_are_changed_by_no_more_than_twofold_odds():
    doubtful = label_map(scene() * 0.45, LABELS, [216, 512])
    assert np.count_nonzero(doubtful == 1) == 216
    unlikely = label_map(scene() * 0.3, LABELS, [216, 512])
    assert np.count_nonzero(unlikely) == 0
    none = label_map(scene(), LABELS, [0, 0])
    np.testing.assert_array_equal(none, label_map(scene(), LABELS))


def test_known_numbers_of_voxels_change_nothing_where_they_are_right():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 400).T.reshape(3, 10, 8, 5)
    probabilities = probabilities[1:].astype("f4")
    plain = label_map(probabilities, LABELS)
    voxels = [np.count_nonzero(plain == label.index) for label in LABELS]
    np.testing.assert_array_equal(label_map(probabilities, LABELS, voxels), plain)


def test_largest_component_stays_and_what_was_dropped_is_told():
    labels = label_map(scene(), LABELS)
    labels[0, 0, 0] = 1
    labels[30:33, 0, 0] = 1
    labels[11, 11, 11] = 1  # touches the nucleus by a corner only
    cleaned, dropped = largest_components(labels, LABELS)
    assert dropped == {"RNL": (3, 4), "DNR": (1, 0)}
    assert np.count_nonzero(cleaned == 1) == 217
    assert cleaned[11, 11, 11] == 1
    assert np.count_nonzero(labels == 1) == 221


def test_a_structure_without_a_side_keeps_both_sides():
    (left, right) = LABELS
    both = replace(left, abbreviation="RN", hemisphere="n/a")
    labels = np.zeros(SHAPE, np.uint8)
    labels[5:11, 5:11, 5:11] = labels[25:31, 5:11, 5:10] = left.index
    labels[15:17, 30:32, 5] = left.index
    cleaned, dropped = largest_components(labels, [both, right])
    assert dropped["RN"] == (3, 4)
    assert cleaned[25:31, 5:11, 5:10].all()
    alone, dropped = largest_components(labels, LABELS)
    assert dropped["RNL"] == (3, 184)
    assert not alone[25:31].any()
    labels[25:31, 5:11, 6:10] = 0
    assert largest_components(labels, [both])[1]["RN"] == (3, 40), "too small for a side"


def test_an_absent_structure_has_no_component():
    labels = np.zeros(SHAPE, np.uint8)
    assert largest_components(labels, LABELS)[1] == {"RNL": (0, 0), "DNR": (0, 0)}


def test_rows_have_exactly_the_described_columns():
    assert [list(row) for row in rows_of(scene()).values()] == [list(COLUMNS)] * 2
    assert all(column["Description"] for column in COLUMNS.values())
    assert COLUMNS["volume"]["Units"] == "mm^3"
    assert COLUMNS["qsm_p95"]["Units"] == "ppm"
    assert list(COLUMNS)[5:9] == ["volume", "n_voxels", "volume_soft", "qsm_mean"]


def test_volume_is_voxels_times_voxel_volume_whatever_the_orientation():
    row = rows_of(scene())["RNL"]
    assert (row["index"], row["n_voxels"], row["volume"]) == (1, 216, pytest.approx(432))
    flipped = np.diag([-1.0, 1.0, 2.0, 1.0])
    cleaned = label_map(scene(), LABELS)
    assert measure(cleaned, scene(), LABELS, flipped, {})[0]["volume"] == pytest.approx(432)


def test_soft_volume_adds_up_probability_near_the_structure_only():
    probabilities = scene()
    probabilities[0, 11, 5:11, 5:11] = 0.25
    probabilities[0, 35, 35, :] = 0.4
    expected = (216 * 0.9 + 36 * 0.25) * 2
    assert rows_of(probabilities)["RNL"]["volume_soft"] == pytest.approx(expected, rel=1e-5)


def test_statistics_are_those_of_the_map_within_the_mask():
    rng = np.random.default_rng(0)
    qsm = rng.normal(0.1, 0.02, SHAPE)
    row = rows_of(scene(), {"qsm": qsm})["DNR"]
    values = qsm[20:28, 20:28, 10:18]
    assert row["qsm_mean"] == pytest.approx(values.mean())
    assert row["qsm_median"] == pytest.approx(np.median(values))
    assert row["qsm_std"] == pytest.approx(values.std())
    assert row["qsm_p05"] == pytest.approx(np.percentile(values, 5))
    assert row["qsm_p95"] == pytest.approx(np.percentile(values, 95))
    assert row["r2star_mean"] is None


def test_statistics_leave_out_voxels_where_the_map_was_masked():
    r2star = np.full(SHAPE, 50.0)
    r2star[20:23] = 0
    row = rows_of(scene(), {"r2star": r2star})["DNR"]
    assert (row["r2star_mean"], row["r2star_std"]) == (50, 0)
    assert rows_of(scene(), {"r2star": np.zeros(SHAPE)})["DNR"]["r2star_mean"] is None


def test_an_empty_structure_is_a_row_without_statistics():
    probabilities = scene()
    probabilities[0] = 0
    row = rows_of(probabilities, {"qsm": np.ones(SHAPE)})["RNL"]
    assert (row["n_voxels"], row["volume"], row["volume_soft"]) == (0, None, None)
    assert (row["qsm_mean"], row["qc_mean_probability"]) == (None, None)
    assert (row["qc_n_components"], row["qc_touches_fov"], row["qc_flag"]) == (0, 0, "empty")


def test_a_sound_structure_is_ok():
    row = rows_of(scene())["DNR"]
    assert row["qc_mean_probability"] == pytest.approx(0.8)
    assert (row["qc_n_components"], row["qc_touches_fov"], row["qc_flag"]) == (1, 0, "ok")


@pytest.mark.parametrize(("axis", "end"), [(0, 0), (1, -1), (2, 0), (2, -1)])
def test_a_structure_at_the_end_of_the_image_is_flagged(axis, end):
    probabilities = np.zeros((2, *SHAPE), "f4")
    box = [slice(15, 21)] * 3
    box[axis] = slice(0, 6) if end == 0 else slice(-6, None)
    probabilities[(0, *box)] = 0.9
    row = rows_of(probabilities)["RNL"]
    assert (row["qc_touches_fov"], row["qc_flag"]) == (1, "touches_fov")


def test_a_structure_at_the_end_of_the_data_is_flagged():
    field_of_view = np.ones(SHAPE, bool)
    field_of_view[:5] = False
    rows = rows_of(scene(), field_of_view=field_of_view)
    assert rows["RNL"]["qc_flag"] == "touches_fov"
    assert rows["DNR"]["qc_flag"] == "ok"


def test_reasons_are_joined():
    probabilities = np.zeros((2, *SHAPE), "f4")
    probabilities[0, 5:8, 5:8, 5:8] = 0.55
    probabilities[0, 20, 20, 20:24] = 0.55
    row = rows_of(probabilities)["RNL"]
    assert row["qc_flag"] == "fragmented;low_probability;implausible_volume"


def test_a_few_lost_voxels_are_no_fragmentation():
    probabilities = scene()
    probabilities[0, 30, 0, 0:20] = 0.9
    assert rows_of(probabilities)["RNL"]["qc_flag"] == "ok"
    probabilities[0, 30, 0, 0:25] = 0.9
    assert rows_of(probabilities)["RNL"]["qc_flag"] == "fragmented"


@pytest.mark.parametrize("label", nuclei(), ids=lambda label: label.abbreviation)
def test_every_nucleus_has_a_plausible_volume(label):
    labels = np.zeros(SHAPE, np.uint8)
    labels[10, 10, 10] = label.index
    probabilities = np.ones((1, *SHAPE), "f4")
    (row,) = measure(labels, probabilities, (label,), AFFINE, {})
    assert row["qc_flag"] == "implausible_volume"


def calibration(threshold=0.7, structure="red_nucleus"):
    weights = {INTERCEPT: -1.0, **dict.fromkeys(SIGNS, 0.0), "mean_probability": 1.0}
    return Calibration({"qsm": {structure: weights}}, threshold)


def test_confidence_is_the_expected_dice_of_the_target():
    expected = 1 / (1 + np.exp(1) * 0.1 / 0.9)
    options = {"target": "qsm", "calibration": calibration()}
    rows = rows_of(scene(), **options)
    assert rows["RNL"]["confidence"] == pytest.approx(expected, abs=1e-4)
    assert rows["RNL"]["qc_flag"] == "ok"
    assert rows["DNR"]["confidence"] is None
    assert rows_of(scene(), **options | {"target": "swi"})["RNL"]["confidence"] is None
    assert rows_of(scene())["RNL"]["confidence"] is None


def test_low_confidence_is_flagged():
    options = {"target": "qsm", "calibration": calibration(threshold=0.8)}
    rows = rows_of(scene(), **options)
    assert rows["RNL"]["qc_flag"] == "low_confidence"
    assert rows["DNR"]["qc_flag"] == "ok"


def test_an_absent_structure_has_no_confidence_at_all_and_a_flag():
    probabilities = scene()
    probabilities[0] = 0
    row = rows_of(probabilities, target="qsm", calibration=calibration())["RNL"]
    assert (row["confidence"], row["qc_flag"]) == (0, "empty")


def head_of(centres, spacing=2.0, turn=0.0):
    """Balls of 4 mm at places in mm, in a scan that is turned about the left-right axis."""
    labels = by_abbreviation(list(centres))
    shape = (50, 60, 60)
    angle = np.deg2rad(turn)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    rotation = np.eye(4)
    rotation[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    voxels = np.stack(np.indices(shape), -1) @ affine[:3, :3].T + affine[:3, 3]
    probabilities = np.stack(
        [(np.linalg.norm(voxels - centre, axis=-1) < 4).astype("f4") for centre in centres.values()]
    )
    return labels, probabilities, rotation @ affine


def where_they_are():
    side = {"L": -1, "R": 1}
    return {
        label.abbreviation: np.array(PLACES_MM[label.structure]) * [side[label.hemisphere], 1, 1]
        for label in nuclei()
    }


def guessed_of(centres, turn=0.0):
    labels, probabilities, affine = head_of(centres, turn=turn)
    cleaned, _ = largest_components(label_map(probabilities, labels), labels)
    return guesses(cleaned, labels, affine, dict.fromkeys(centres))


@pytest.mark.parametrize("turn", [-30.0, 0.0, 30.0])
def test_structures_in_their_place_are_kept_in_heads_of_any_size_and_tilt(turn):
    for size in (0.8, 1.0, 1.25):
        assert not guessed_of({name: size * c for name, c in where_they_are().items()}, turn)


def test_what_lies_far_from_where_the_others_place_it_is_a_guess():
    centres = where_they_are()
    # Calcified plexus above the red nuclei, as in a slab that ends above the dentate nuclei.
    strays = {"DNL": np.array([-25.0, 20.0, 12.0]), "DNR": np.array([2.0, 22.0, 15.0])}
    astray = dict.fromkeys(strays, "implausible_position")
    assert guessed_of(centres | strays) == astray


def test_without_a_majority_nothing_is_told_by_its_position():
    centres = {name: c for name, c in where_they_are().items() if name[:2] in ("RN", "DN")}
    strays = {"DNL": np.array([-25.0, 20.0, 12.0]), "DNR": np.array([2.0, 22.0, 15.0])}
    assert not guessed_of(centres | strays)
    assert not guessed_of({"DNL": strays["DNL"]})


def test_a_low_expected_dice_is_a_guess():
    cleaned, components = largest_components(label_map(scene(), LABELS), LABELS)
    sure = calibration().weights["qsm"]["red_nucleus"]
    both = Calibration(
        {"qsm": {"red_nucleus": sure, "dentate_nucleus": {**sure, INTERCEPT: -9.0}}}, 0.7
    )
    for target, expected in (("qsm", {"DNR": "low_confidence"}), ("swi", {})):
        plain = dict.fromkeys(("RNL", "DNR"), 3.0)
        told = confidences(cleaned, scene(), LABELS, AFFINE, components, plain, target, both)
        assert guesses(cleaned, LABELS, AFFINE, told) == expected


@pytest.mark.parametrize(
    ("beside", "expected", "kept"), [(None, 0.4, False), (None, 0.6, True), (0.4, 0.4, True)]
)
def test_the_only_structure_that_is_found_has_to_be_surer(beside, expected, kept):
    cleaned, _ = largest_components(label_map(scene(), LABELS), LABELS)
    first, second, *others = (label.abbreviation for label in LABELS)
    told = {first: expected, second: beside, **dict.fromkeys(others)}
    for label in LABELS:
        if told[label.abbreviation] is None:
            cleaned[cleaned == label.index] = 0
    assert guesses(cleaned, LABELS, AFFINE, told) == ({} if kept else {first: "low_confidence"})


def surrounded():
    """Return labels and an image: 1 and 3 by turns around them, RNL at 7, DNR at 2."""
    image = np.indices(SHAPE).sum(0) % 2 * 2.0 + 1
    labelled = label_map(scene(), LABELS)
    image[labelled == 1], image[labelled == 4] = 7, 2
    return labelled, image.astype("f4")


def test_a_structure_stands_out_by_the_spread_of_what_is_around_it():
    labelled, image = surrounded()
    told = contrasts(labelled, LABELS, AFFINE, image)
    assert told == {"RNL": pytest.approx(5, abs=0.05), "DNR": pytest.approx(0, abs=0.05)}
    rows = rows_of(scene())
    assert rows["RNL"]["qc_contrast"] == 3


def test_where_an_image_is_masked_it_says_nothing_of_the_surround():
    labelled, image = surrounded()
    image[4] = 0
    image[8, 8, 8] = 0
    assert contrasts(labelled, LABELS, AFFINE, image)["RNL"] == pytest.approx(5, abs=0.05)


def test_what_lies_further_away_or_in_another_structure_is_no_surround():
    labelled, image = surrounded()
    told = contrasts(labelled, LABELS, AFFINE, image)
    far = image.copy()
    # 4 mm are four voxels along the first axis and two along the last one.
    far[15:], far[:, :, 13:] = 1000, 1000
    assert contrasts(labelled, LABELS, AFFINE, far)["RNL"] == told["RNL"]
    far[14] = 1000
    assert contrasts(labelled, LABELS, AFFINE, far)["RNL"] < 1
    labelled[14:20, 5:11, 5:11] = 4
    image[14:20, 5:11, 5:11] = 1000
    assert contrasts(labelled, LABELS, AFFINE, image)["RNL"] == pytest.approx(5, abs=0.05)


def test_without_structure_surround_or_spread_there_is_no_contrast():
    labelled, image = surrounded()
    labelled[labelled == 4] = 0
    assert contrasts(labelled, LABELS, AFFINE, image)["DNR"] is None
    assert contrasts(labelled, LABELS, AFFINE, np.where(labelled == 1, image, 0))["RNL"] is None
    assert contrasts(labelled, LABELS, AFFINE, np.where(labelled == 1, image, 2))["RNL"] is None
    assert contrasts(labelled, LABELS, AFFINE, np.zeros_like(image))["RNL"] is None


def test_what_was_not_kept_is_empty_with_the_reason():
    probabilities = scene()
    cleaned, components = largest_components(label_map(probabilities, LABELS), LABELS)
    cleaned[cleaned == LABELS[1].index] = 0
    rows = measure(
        cleaned,
        probabilities,
        LABELS,
        AFFINE,
        {},
        components=components,
        guessed={"DNR": "implausible_position"},
        confidence={"RNL": 0.9, "DNR": 0.8},
    )
    assert [row["qc_flag"] for row in rows] == ["ok", "empty;implausible_position"]
    assert (rows[1]["volume"], rows[1]["n_voxels"]) == (None, 0)
    assert [row["confidence"] for row in rows] == [0.9, 0]


def test_a_region_is_foretold_from_how_another_is_turned():
    where = where_they_are()
    labels = by_abbreviation(list(where))
    dentate = [label for label in labels if label.structure == "dentate_nucleus"]
    others = [label for label in labels if label not in dentate]
    true = np.mean([where[label.abbreviation] for label in dentate], 0)
    for turn, off in ((0.0, 0.1), (20.0, 10.0)):
        _, _, affine = head_of(where, turn=turn)
        rotated = affine[:3, :3] / 2.0
        to_voxel = np.linalg.inv(affine)
        found = [
            (label, to_voxel[:3, :3] @ (rotated @ where[label.abbreviation]) + to_voxel[:3, 3])
            for label in others
        ]
        place = expected_centre(dentate, found, affine)
        assert np.linalg.norm(affine[:3, :3] @ place + affine[:3, 3] - rotated @ true) < off
    assert expected_centre(dentate, [], affine) is None
