from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl_bidsapp.errors import UsageError
from fdl_bidsapp.simulation.parameters import (
    LEVELS,
    PROFILES,
    all_off,
    draw_values,
    effects,
    generator,
    iron_of,
    table,
)
from fdl_bidsapp.simulation.physiology import all_tissues
from fdl_bidsapp.simulation.tissue import IRON_RICH


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(PROFILES))
def test_values_lie_in_the_range_of_their_profile(seed, profile):
    for name, value in draw_values(seed, profile).items():
        effect = effects()[name]
        ends = effect.full if profile == "full" else effect.ordinary
        if effect.draw == "choice":
            assert value in ends or value == effect.off
        else:
            assert value == effect.off or ends[0] <= value <= ends[1]


@pytest.mark.parametrize("name", list(effects()))
def test_an_effect_is_described_in_full(name):
    effect = effects()[name]
    assert effect.text
    assert effect.source
    assert len(effect.levels) == 3
    assert all(type(v) is type(effect.off) for v in (*effect.levels, *effect.full))
    assert all(0 <= chance <= 1 for chance in effect.chance)
    if effect.draw != "choice":
        assert effect.full[1] >= effect.ordinary[1] >= effect.ordinary[0]
        assert all(effect.full[0] <= value <= effect.full[1] for value in effect.levels)


def test_levels_go_one_way_from_mild_to_harsh():
    for effect in effects().values():
        if effect.draw != "choice" and effect.name not in ("sharp_radius", "swi_echo"):
            steps = np.diff(np.array(effect.levels, float))
            assert np.all(steps >= 0) or np.all(steps <= 0), effect.name


def test_a_forced_effect_leaves_all_others_as_they_were():
    free = draw_values(5, "full")
    forced = draw_values(5, "full", {"bias": "harsh", "inversion": "tikhonov"})
    assert forced["bias"] == effects()["bias"].levels[2]
    assert forced["inversion"] == "tikhonov"
    for name in free:
        if name not in ("bias", "inversion"):
            assert forced[name] == free[name]


def test_chance_decides_how_often_an_effect_is_there():
    there = [draw_values(seed, "full")["microbleeds"] > 0 for seed in range(400)]
    assert np.mean(there) == pytest.approx(effects()["microbleeds"].chance[1], abs=0.06)
    assert not any(draw_values(seed, "ordinary")["microbleeds"] for seed in range(50))


def test_off_and_levels_by_name():
    values = all_off(
        {name: level for name, level in zip(("snr", "motion", "blur"), LEVELS, strict=True)}
    )
    for position, name in enumerate(("snr", "motion", "blur")):
        assert values[name] == effects()[name].levels[position]
    assert values["texture"] == 0
    assert all_off({"snr": "off"})["snr"] == effects()["snr"].off


@pytest.mark.parametrize(
    ("forced", "told"),
    [
        ({"bais": 1}, "bias"),
        ({"bias": "much"}, "a number"),
        ({"bias": "nan"}, "a number"),
        ({"inversion": "magic"}, "tikhonov"),
        ({"echoes": "3.5"}, "a number"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_does(forced, told):
    with pytest.raises(UsageError, match=told):
        draw_values(0, "full", forced)


def test_an_unknown_profile_is_refused():
    with pytest.raises(UsageError, match="ordinary or full"):
        draw_values(0, "easy")


def test_purposes_do_not_share_random_numbers():
    one, other = generator([1, 2], "noise"), generator([1, 2], "veins")
    again = generator([1, 2], "noise")
    first = one.standard_normal(5)
    assert np.all(first != other.standard_normal(5))
    np.testing.assert_array_equal(first, again.standard_normal(5))


def test_diagnoses_raise_iron_of_structures_that_exist():
    for diagnosis in set(effects()["diagnosis"].full) - {"control"}:
        raised = iron_of(diagnosis)
        assert raised
        assert set(raised) <= set(IRON_RICH) <= set(all_tissues())
        assert all(1 < factor < 3 for factor in raised.values())


def test_the_table_lists_every_effect_and_diagnosis():
    text = table()
    for name in effects():
        assert text.count(f"| `{name}` |") == 1
    assert "`psp`" in text


def test_the_documentation_holds_the_table_of_today():
    text = (Path(__file__).parents[2] / "docs" / "simulation.md").read_text("utf-8")
    told = text.split("<!-- effects -->\n\n")[1]
    assert told == table(), "docs/simulation.md is out of date: paste fdl simulate --describe"
