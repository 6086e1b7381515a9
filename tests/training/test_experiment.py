from __future__ import annotations

import math

import pytest

from fdl_bidsapp.errors import DataError, FdlError, UsageError
from fdl_bidsapp.imaging.overlap import METRICS
from fdl_bidsapp.training.evaluate import MEAN
from fdl_bidsapp.training.experiment import (
    add_published,
    aggregate,
    draw_figure,
    make_experiment,
    method_differences,
    read_cases,
    run_experiment,
)


@pytest.fixture
def grid(labelled_set, quick):
    labelled_set({"train": 3, "validation": 1, "test": 2})
    return {**quick, "grid": {"method": ["none", "late"], "n_train": [2], "seed": [0, 1]}}


def lines(path):
    return [line.split("\t") for line in path.read_text().splitlines()]


def test_a_grid_ends_in_one_table_and_one_figure(grid, tmp_path):
    seen = []
    experiment = make_experiment(grid)
    cases, results, figure, differences = run_experiment(
        experiment, tmp_path / "out", device="cpu", progress=seen.append
    )
    assert len(seen) == 4
    assert lines(cases)[0][:4] == ["method", "n_train", "seed", "model"]
    assert len(lines(cases)) == 1 + 4 * 2 * 3
    head, *rows = lines(results)
    assert len(rows) == 2 * 3 * len(METRICS)
    assert {row[head.index("n_seeds")] for row in rows} == {"2"}
    assert figure.stat().st_size > 1000
    head, *rows = lines(differences)
    assert len(rows) == 3 * len(METRICS)
    assert {row[head.index("reference_method")] for row in rows} == {"none"}


def test_each_task_has_a_panel_of_the_figure(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    results = [
        {
            "structures": structure,
            "method": method,
            "n_train": n,
            "structure": MEAN,
            "metric": "dice",
            "mean": 0.5,
            "lower": 0.4,
            "upper": 0.7,
            "published": 0.6 if method == "late" else None,
        }
        for structure in ("RN", "DN")
        for method in ("none", "late")
        for n in ("4", "16")
    ]
    draw_figure(results, ("structures", "method", "n_train"), tmp_path / "dice.png")
    (figure,) = figures
    assert [panel.get_title() for panel in figure.axes] == ["DN", "RN"]
    (legend,) = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert sorted(said) == ["late", "late (published)", "none"]


def test_finished_runs_are_not_done_again(grid, tmp_path, monkeypatch):
    run_experiment(make_experiment(grid), tmp_path / "out", device="cpu")
    monkeypatch.setattr("fdl_bidsapp.training.experiment.fit", None)
    run_experiment(make_experiment(grid), tmp_path / "out", device="cpu")
    changed = {**grid, "theta": 0.3}
    with pytest.raises(DataError, match="other settings"):
        run_experiment(make_experiment(changed), tmp_path / "out", device="cpu")


def test_one_failing_run_does_not_stop_the_others(grid, tmp_path):
    grid["grid"]["n_train"] = [2, 99]
    with pytest.raises(FdlError, match="n_train is 99"):
        run_experiment(make_experiment(grid), tmp_path / "out", device="cpu")
    done = {path.parent.name for path in (tmp_path / "out/runs").glob("*/cases.tsv")}
    assert done == {f"method={m},n_train=2,seed={s}" for m in ("none", "late") for s in (0, 1)}


def test_a_time_limit_leaves_tables_of_what_is_done(grid, tmp_path, monkeypatch):
    two = {**grid, "grid": {**grid["grid"], "method": ["late"]}}
    run_experiment(make_experiment(two), tmp_path / "out", device="cpu")
    monkeypatch.setattr("fdl_bidsapp.training.experiment.fit", None)
    seen = []
    cases, *_ = run_experiment(
        make_experiment(grid), tmp_path / "out", device="cpu", max_minutes=0, progress=seen.append
    )
    assert {line[0] for line in lines(cases)[1:]} == {"late"}
    assert "2 of 4 runs are done" in seen[-1]


@pytest.mark.real
def test_runs_may_go_on_side_by_side(grid, tmp_path):
    paths = run_experiment(make_experiment(grid), tmp_path / "out", device="cpu", jobs=2)
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, "has no grid"),
        ({"grid": {"method": "none"}}, "has no grid"),
        ({"grid": {"metod": ["none"]}}, "no setting metod"),
        ({"measure": {"split": "all"}}, "no split 'all'"),
        ({"measure": {"on": "test"}}, "other entries"),
    ],
)
def test_an_experiment_that_makes_no_sense_is_refused_at_once(changes, message):
    with pytest.raises(UsageError, match=message):
        make_experiment({"table": "cases.tsv", "grid": {"seed": [0]}, **changes})


def row(n, seed, case, value, method="late"):
    values = dict.fromkeys(METRICS, value)
    return {
        "method": method,
        "n_train": n,
        "seed": seed,
        "id": case,
        "participant": case,
        "structure": MEAN,
        **values,
    }


def test_seeds_are_averaged_within_each_case():
    cases = [row("4", str(seed), str(i), 0.7 + 0.1 * seed) for seed in (0, 1) for i in range(3)]
    dice = aggregate(cases, ("method", "n_train", "seed"))[0]
    assert (dice["n_seeds"], dice["n_cases"], dice["n_participants"]) == (2, 3, 3)
    assert dice["mean"] == pytest.approx(0.75)
    # The seeds differ, the participants do not.
    assert dice["upper"] - dice["lower"] == pytest.approx(0, abs=1e-9)
    assert dice["seed_sd"] == pytest.approx(0.1 / math.sqrt(2))


def test_methods_are_compared_in_pairs_of_case_and_seed():
    cases = [row("4", s, c, 0.5 + int(c) / 10, "none") for s in "01" for c in "012"]
    cases += [row("4", s, c, 0.6 + int(c) / 10, "late") for s in "01" for c in "012"]
    # A seed that only one method has yet does not enter.
    cases += [row("4", "2", c, 0.0, "late") for c in "012"]
    one = method_differences(cases, ("method", "n_train", "seed"))[0]
    assert (one["method"], one["n_train"], one["n_seeds"], one["n_cases"]) == ("late", "4", 2, 3)
    assert one["difference"] == pytest.approx(0.1)
    # The cases differ much, the differences not at all.
    assert one["upper"] - one["lower"] == pytest.approx(0, abs=1e-9)


def test_published_values_stand_beside_ours(tmp_path):
    table = tmp_path / "published.tsv"
    table.write_text(
        "paper\ttask\ttarget\tn_train\tmethod\tmetric\tvalue\tlower\tupper\n"
        "FDL\tRN\tQSM\t4\tlate\tdice_percent\t64.46\t61.12\t67.43\n"
        "FDL\tDN\tQSM\t4\tlate\tdice_percent\t11.11\t\t\n"
        "FDL\tRN\tQSM\t166\tlate\thd95\t1.25\t\t\n"
        "other\tRN\tSWI\t4\tlate\tdice\t0.3\t\t\n"
    )
    cases = [
        {"targets": target, **row(n, "0", "a", 0.5)}
        for target in ("qsm", "swi", "imag")
        for n in ("4", "165")
    ]
    results = aggregate(cases, ("targets", "method", "n_train", "seed"))
    chosen = {"task": "RN", "target": "QSM", "n_train": {"165": 166}, "where": {"targets": ["qsm"]}}
    add_published(results, table, [chosen, {"paper": "other", "where": {"targets": "swi"}}])
    found = {
        (one["targets"], one["n_train"], one["metric"]): one["published"]
        for one in results
        if "published" in one
    }
    assert found == {
        ("qsm", "4", "dice"): pytest.approx(0.6446),
        ("qsm", "165", "hd95"): 1.25,
        ("swi", "4", "dice"): 0.3,
    }


@pytest.mark.parametrize(
    ("published", "said"),
    [
        ({"task": "RN"}, "no array of tables"),
        ([{"task": "RN", "where": "qsm"}], "no table"),
        ([{"task": "RN", "n_train": [166]}], "no table"),
    ],
)
def test_published_values_are_an_array_of_tables(published, said):
    values = {"grid": {"seed": [0]}, "table": "cases.tsv", "published": published}
    with pytest.raises(UsageError, match=said):
        make_experiment(values)


def test_gathered_cases_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "cases.tsv"
    path.write_text("method\tn_train\tid\tdice\thd95\nlate\t4\tcase-1\t0.5\tn/a\n")
    (row,) = read_cases(path)
    assert row["method"] == "late"
    assert row["n_train"] == "4"
    assert row["dice"] == 0.5
    assert math.isnan(row["hd95"])
