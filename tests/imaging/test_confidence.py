from __future__ import annotations

import math

import numpy as np
import pytest

from fdl_bidsapp.errors import ModelError
from fdl_bidsapp.imaging.confidence import (
    INTERCEPT,
    SIGNS,
    Calibration,
    choose_threshold,
    describe,
    expected,
    fit_weights,
)
from fdl_bidsapp.imaging.measure import label_map, largest_components
from fdl_bidsapp.labels import by_abbreviation

LABELS = by_abbreviation(["RNL", "RNR", "DNL"])
SHAPE = (30, 30, 20)
FLAT = {INTERCEPT: 0.0, **dict.fromkeys(SIGNS, 0.0)}


def scene():
    """RNL: 6 × 6 × 6 voxels at 0.9; RNR: 6 × 6 × 3 at 0.8; DNL: 8 × 8 × 8 at 0.99."""
    probabilities = np.zeros((3, *SHAPE), "f4")
    probabilities[0, 2:8, 2:8, 2:8] = 0.9
    probabilities[1, 20:26, 2:8, 2:5] = 0.8
    probabilities[2, 4:12, 20:28, 10:18] = 0.99
    return probabilities


CONTRASTS = {"RNL": 2.0, "RNR": 1.0, "DNL": None}


def described(probabilities, affine=None, contrasts=CONTRASTS):
    cleaned, components = largest_components(label_map(probabilities, LABELS), LABELS)
    affine = np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine
    return describe(cleaned, probabilities, LABELS, affine, components, contrasts)


def logit(share):
    return pytest.approx(math.log(share / (1 - share)), abs=1e-5)


def test_a_structure_is_described_by_its_probabilities_volume_and_company():
    left, right, dentate = described(scene())
    assert list(left) == list(SIGNS)
    assert left["soft_dice"] == logit(2 * 0.9 / 1.9)
    assert left["mean_probability"] == logit(0.9)
    assert left["lost"] == 0
    assert left["log_volume"] == pytest.approx(math.log(432))
    assert left["log_volume_squared"] == pytest.approx(math.log(432) ** 2)
    assert left["asymmetry"] == right["asymmetry"] == pytest.approx(math.log(2))
    assert dentate["asymmetry"] == 0  # the model has no other side
    assert left["others"] == pytest.approx((right["soft_dice"] + dentate["soft_dice"]) / 2)
    assert left["log_voxel"] == pytest.approx(math.log(2))
    assert left["log_contrast"] == pytest.approx(math.log(2))
    assert right["log_contrast"] == 0


def test_a_contrast_that_is_not_known_counts_as_none_and_an_extreme_one_as_no_more_than_plain():
    unknown = described(scene())[2]["log_contrast"]
    nothing, faint, wild = described(scene(), contrasts={"RNL": 0.0, "RNR": 0.2, "DNL": 1e6})
    assert nothing["log_contrast"] == unknown < faint["log_contrast"]
    assert wild["log_contrast"] == pytest.approx(math.log(20))


def test_probability_beyond_the_mask_lowers_the_soft_dice_but_faint_tails_do_not():
    plain = described(scene())[0]["soft_dice"]
    faint, doubtful = scene(), scene()
    faint[0, 15:, 15:] = 0.05
    doubtful[0, 15:, 15:] = 0.3
    assert described(faint)[0]["soft_dice"] == plain
    assert described(doubtful)[0]["soft_dice"] < plain - 0.5


def test_what_was_dropped_counts():
    probabilities = scene()
    probabilities[0, 20:24, 25, 0:6] = 0.9
    assert described(probabilities)[0]["lost"] == pytest.approx(24 / 240)


def test_orientation_of_the_axes_changes_nothing():
    turned = np.array([[0, 1.0, 0, 5], [-1.0, 0, 0, 3], [0, 0, 2.0, 1], [0, 0, 0, 1]])
    for a, b in zip(described(scene()), described(scene(), turned), strict=True):
        assert a == pytest.approx(b)


def test_nothing_found_has_no_features_and_shakes_the_confidence_in_the_others():
    probabilities = scene()
    probabilities[1] = 0
    left, right, dentate = described(probabilities)
    assert right is None
    assert left["asymmetry"] == 2
    assert dentate["others"] < described(scene())[2]["others"]


def test_a_perfect_structure_has_finite_features():
    probabilities = (scene() > 0).astype("f4")
    assert all(math.isfinite(value) for case in described(probabilities) for value in case.values())


def cases(n, seed=0):
    """Random structures, and the Dice that a known curve gives them."""
    rng = np.random.default_rng(seed)
    found, dice = [], []
    for _ in range(n):
        volume = rng.normal(5.5, 0.4)
        soft = rng.normal(2, 0.8)
        case = {
            "soft_dice": soft,
            "mean_probability": 0.8 * soft + rng.normal(0, 0.2),
            "lost": max(0.0, rng.normal(0, 0.05)),
            "log_volume": volume,
            "log_volume_squared": volume**2,
            "asymmetry": abs(rng.normal(0, 0.2)),
            "others": soft + rng.normal(0, 0.5),
            "log_contrast": rng.normal(0.5, 0.5),
            "log_voxel": rng.uniform(0, 1),
        }
        score = -0.2 + 0.8 * soft - 3 * (volume - 5.3) ** 2 - 1.5 * case["asymmetry"]
        found.append(case)
        dice.append(1 / (1 + math.exp(-score)))
    return found, dice


def test_the_fit_finds_the_curve_that_made_the_cases():
    found, dice = cases(400)
    weights = fit_weights(found, dice)
    fresh, truth = cases(200, seed=1)
    estimates = [expected(weights, case) for case in fresh]
    assert np.abs(np.subtract(estimates, truth)).max() < 0.03
    assert weights["asymmetry"] == pytest.approx(-1.5, abs=0.15)
    vertex = -weights["log_volume"] / (2 * weights["log_volume_squared"])
    assert vertex == pytest.approx(5.3, abs=0.05)


def test_no_weight_has_a_sign_against_reason():
    found, dice = cases(60)
    weights = fit_weights(found, [1 - value for value in dice])
    assert all(weights[name] * sign >= 0 for name, sign in SIGNS.items())
    Calibration({"qsm": {"red_nucleus": weights}}, 0.7)


def test_the_fit_takes_features_that_never_change():
    found, dice = cases(40)
    found = [{**case, "asymmetry": 0.0, "lost": 0.0} for case in found]
    weights = fit_weights(found, dice)
    assert weights["asymmetry"] == weights["lost"] == 0
    assert all(math.isfinite(weight) for weight in weights.values())


def test_the_fit_refuses_nothing_and_what_does_not_match():
    with pytest.raises(ValueError, match="no cases"):
        fit_weights([], [])
    with pytest.raises(ValueError, match="2 values of Dice for 3"):
        fit_weights(cases(3)[0], [0.5, 0.6])


def test_the_threshold_keeps_to_both_aims_where_it_can():
    rng = np.random.default_rng(0)
    dice = rng.beta(6, 1.5, 2000)
    confidence = dice + rng.normal(0, 0.03, 2000)
    threshold = choose_threshold(confidence, dice)
    bad = dice < 0.7
    assert (confidence[bad] < threshold).mean() > 0.9
    assert (confidence[~bad] < threshold).mean() < 0.1


@pytest.mark.parametrize("dice", [[0.8, 0.9], [0.5, 0.6]])
def test_without_good_and_bad_cases_the_threshold_is_that_of_a_bad_dice(dice):
    assert choose_threshold([0.6, 0.8], dice) == 0.7


def test_threshold_is_that_of_the_scans_that_count():
    rng = np.random.default_rng(0)
    dice = rng.beta(6, 1.5, 2000)
    confidence = dice + rng.normal(0, 0.03, 2000)
    others = np.clip(dice - 0.2, 0.01, 1)
    weights = np.repeat([1.0, 0.0], 2000)
    both = [*confidence, *others], [*dice, *dice]
    assert choose_threshold(*both, weights) == choose_threshold(confidence, dice)
    assert choose_threshold(*both) != choose_threshold(confidence, dice)
    doubled = choose_threshold([*confidence, *others, *others], [*dice, *dice, *dice])
    assert choose_threshold(*both, np.repeat([0.5, 1.0], 2000)) == doubled


def test_confidence_lies_between_0_and_1_whatever_the_features():
    wild = dict.fromkeys(SIGNS, 1e9)
    for weight in (-1e4, 1e4):
        assert 0 <= expected({**FLAT, "log_volume": weight}, wild) <= 1


def test_what_was_not_calibrated_has_no_expected_dice():
    calibration = Calibration({"qsm": {"red_nucleus": FLAT}}, 0.7)
    features = described(scene())[0]
    assert calibration.expected_dice("qsm", "red_nucleus", features) == 0.5
    assert calibration.expected_dice("qsm", "red_nucleus", None) == 0
    assert calibration.expected_dice("swi", "red_nucleus", features) is None
    assert calibration.expected_dice("qsm", "dentate_nucleus", None) is None


@pytest.mark.parametrize(
    ("weights", "threshold"),
    [
        ({}, 0.7),
        ({"t1w": {"red_nucleus": FLAT}}, 0.7),
        ({"qsm": {"red_nucleus": {INTERCEPT: 0.0}}}, 0.7),
        ({"qsm": {"red_nucleus": {**FLAT, "lost": 1.0}}}, 0.7),
        ({"qsm": {"red_nucleus": {**FLAT, "lost": math.nan}}}, 0.7),
        ({"qsm": {"red_nucleus": FLAT}}, 1.0),
        ({"qsm": {"red_nucleus": FLAT}}, math.nan),
    ],
)
def test_a_calibration_that_makes_no_sense_is_refused(weights, threshold):
    with pytest.raises(ModelError, match="calibration's") as caught:
        Calibration(weights, threshold)
    assert caught.value.remedy
