import numpy as np
import pytest

from fdl_bidsapp.descriptive import (
    FEWEST_CONTROLS,
    Design,
    choose_design,
    normal_curves,
    quantile_curves,
    summarise,
)
from fdl_bidsapp.errors import UsageError


def row(subject: int, volume: float | None = 200.0, **more: object) -> dict[str, object]:
    return {
        "participant_id": f"sub-{subject}",
        "abbreviation": "RNL",
        "name": "Red nucleus left",
        "volume": volume,
        **more,
    }


def test_each_participant_counts_once_with_the_first_value() -> None:
    rows = [row(1, None), row(1, 100), row(1, 900), row(2, 300)]
    (everybody,) = summarise(rows, Design())
    assert (everybody["n"], everybody["mean"]) == (2, 200)


def test_structures_rated_bad_are_left_out_and_counted() -> None:
    rows = [row(1, 100, dx="HC"), row(2, 900, rating="bad", dx="HC"), row(3, 300, rating="good")]
    everybody, controls = summarise(rows, Design("dx", "HC"))
    assert (everybody["n"], everybody["mean"], everybody["n_rated_bad"]) == (2, 200, 1)
    assert (controls["n"], controls["n_rated_bad"]) == (1, 1)


def test_controls_come_first_and_those_without_a_group_count_to_all() -> None:
    rows = [row(1, dx="AD"), row(2, dx="HC"), row(3, dx=None)]
    found = summarise(rows, Design("dx", "HC"))
    assert [(one["group"], one["n"]) for one in found] == [("all", 3), ("HC", 1), ("AD", 1)]


def test_measures_without_any_value_are_not_summarised() -> None:
    assert {one["measure"] for one in summarise([row(1)], Design())} == {"volume"}
    assert summarise([row(1, None)], Design()) == []


@pytest.mark.parametrize(
    ("columns", "values", "expected"),
    [
        ({"Diagnosis": {}}, {"Diagnosis": ["Healthy Control", "PD"]}, "Healthy Control"),
        ({"group": {"Levels": {"0": "healthy", "1": "patient"}}}, {"group": ["1", "0"]}, "0"),
        ({"group": {}}, {"group": ["1", "0"]}, None),
        ({"sex": {}}, {"sex": ["F", "M"]}, None),
    ],
)
def test_controls_are_found_by_name_or_description(columns, values, expected) -> None:
    (name,) = columns
    rows = [row(k, **{name: value}) for k, value in enumerate(values[name])]
    assert choose_design(rows, columns).controls == expected


def test_controls_are_who_the_user_says() -> None:
    rows = [row(1, group="1"), row(2, group="0")]
    assert choose_design(rows, {"group": {}}, "group=0") == Design("group", "0")
    with pytest.raises(UsageError, match="no column 'dx'"):
        choose_design(rows, {"group": {}}, "dx=0")
    with pytest.raises(UsageError, match="nobody has the value '2'"):
        choose_design(rows, {"group": {}}, "group=2")


def test_curves_find_the_quantiles_that_data_were_drawn_from() -> None:
    rng = np.random.default_rng(0)
    ages = np.sort(rng.uniform(20, 80, 2000))
    values = 200 + ages + (5 + ages / 8) * rng.standard_normal(2000)
    grid, quantiles = quantile_curves(ages, values)
    for name, z in {"p05": -1.645, "p50": 0, "p95": 1.645}.items():
        truth = 200 + grid + z * (5 + grid / 8)
        assert np.abs(quantiles[name] - truth).max() < 4, name
    ordered = np.stack(list(quantiles.values()))
    assert (np.diff(ordered, axis=0) > 0).all()


def test_no_curve_under_twenty_controls_nor_of_others() -> None:
    design = Design("dx", "HC", "age")
    rows = [row(k, 200 + k % 7, dx="HC", age=str(40 + k)) for k in range(FEWEST_CONTROLS)]
    (curve,) = normal_curves(rows, design)
    assert curve.n == FEWEST_CONTROLS
    assert curve.at(45) is not None
    assert curve.at(39) is None
    assert curve.at(60) is None
    assert normal_curves(rows[1:], design) == []
    assert normal_curves([*rows[1:], row(0, dx="PD", age="41")], design) == []
    assert normal_curves([*rows[1:], row(0, dx="HC", age="n/a")], design) == []
    assert normal_curves(rows, Design("dx", None, "age")) == []


def test_controls_of_few_ages_have_finite_curves() -> None:
    ages = np.array([20.0] * 30 + [21.0] * 2)
    _, quantiles = quantile_curves(ages, np.linspace(1, 2, 32))
    assert all(np.isfinite(values).all() for values in quantiles.values())
    _, quantiles = quantile_curves(np.linspace(20, 30, 25), np.full(25, 3.0))
    assert all(values == pytest.approx(np.full(len(values), 3.0)) for values in quantiles.values())
