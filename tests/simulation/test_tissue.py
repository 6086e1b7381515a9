from __future__ import annotations

import numpy as np
import pytest

from fdl_bidsapp.simulation.tissue import IRON_RICH, Person, draw_tissues, tissue_table


def draws(n, **options):
    return [draw_tissues(np.random.default_rng(seed), **options) for seed in range(n)]


def values(heads, tissue, name):
    return np.array([getattr(head[tissue], name) for head in heads])


def test_table_has_the_order_of_physics():
    table = tissue_table()
    chi = {name: row["chi"] for name, row in table.items()}
    inside = set(chi) - {"air", "skull", "scalp_fat", "soft_tissue"}
    assert max(inside, key=chi.__getitem__) == "venous_blood"
    assert chi["air"] > 9
    assert chi["white_matter"] < chi["csf"] == 0 < chi["cortical_grey"]
    for name in IRON_RICH:
        assert chi[name] > chi["thalamus"]
        assert table[name]["r2star"] > table["white_matter"]["r2star"]
    assert min(inside, key=lambda name: table[name]["r2star"]) == "csf"
    assert max(table, key=lambda name: table[name]["rho"]) == "csf"
    assert all(row["chi_sd"] >= 0 and row["r2star_sd"] >= 0 for row in table.values())


def test_iron_rises_with_age_steeply_first():
    iron = [Person(age=age).iron() for age in (5, 20, 40, 60, 90)]
    assert np.all(np.diff(iron) > 0)
    assert iron[3] == pytest.approx(1)
    assert iron[2] - iron[1] > iron[4] - iron[3]


def test_age_moves_the_iron_rich_nuclei_and_nothing_else():
    young, old = (
        draw_tissues(np.random.default_rng(0), Person(age=age), spread=0) for age in (15, 80)
    )
    for name in tissue_table():
        if name in IRON_RICH:
            assert old[name].chi > 1.3 * young[name].chi
            assert old[name].r2star > young[name].r2star
        else:
            assert old[name] == young[name]


def test_parkinson_raises_the_nigra_alone():
    healthy, patient = (
        draw_tissues(np.random.default_rng(3), Person(parkinson=diagnosis))
        for diagnosis in (False, True)
    )
    changed = {name for name in healthy if healthy[name] != patient[name]}
    assert changed == {"substantia_nigra"}
    assert patient["substantia_nigra"].chi > 1.1 * healthy["substantia_nigra"].chi
    assert patient["substantia_nigra"].r2star > healthy["substantia_nigra"].r2star


def test_draws_follow_the_table():
    heads = draws(600)
    for name, row in tissue_table().items():
        chi = values(heads, name, "chi")
        assert chi.mean() == pytest.approx(row["chi"], abs=0.15 * row["chi_sd"])
        assert chi.std() == pytest.approx(row["chi_sd"], rel=0.15)
    rho = values(heads, "white_matter", "rho")
    assert rho.mean() == pytest.approx(tissue_table()["white_matter"]["rho"], rel=0.01)


@pytest.mark.parametrize("name", IRON_RICH)
def test_susceptibility_and_r2star_rise_together_where_iron_makes_both(name):
    heads = draws(400)
    together = np.corrcoef(values(heads, name, "chi"), values(heads, name, "r2star"))[0, 1]
    assert 0.65 < together < 0.95


def test_other_tissues_vary_on_their_own():
    heads = draws(400)
    alone = np.corrcoef(
        [
            values(heads, "white_matter", "chi"),
            values(heads, "white_matter", "r2star"),
            values(heads, "red_nucleus", "chi"),
        ]
    )
    assert np.abs(alone[np.triu_indices(3, 1)]).max() < 0.15


def test_nuclei_of_one_head_share_half_of_their_variance():
    heads = draws(600)
    chi = [values(heads, name, "chi") for name in ("red_nucleus", "substantia_nigra", "putamen")]
    shared = np.corrcoef(chi)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(shared, 0.5, atol=0.12)


@pytest.mark.parametrize("field_strength", [1.5, 7.0])
def test_r2star_grows_with_the_field_and_susceptibility_does_not(field_strength):
    at_3t, there = (
        draw_tissues(np.random.default_rng(1), field_strength=b0) for b0 in (3.0, field_strength)
    )
    for name, tissue in at_3t.items():
        assert there[name].r2star == pytest.approx(tissue.r2star * field_strength / 3)
        assert there[name].chi == tissue.chi


def test_wide_draws_stay_physical():
    for head in draws(200, spread=2.5, person=Person(age=3)):
        assert all(tissue.r2star > 0 and tissue.rho >= 0 for tissue in head.values())
        assert all(head[name].chi > 0 for name in IRON_RICH)
