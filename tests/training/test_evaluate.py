from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fdl_bidsapp.errors import DataError, UsageError
from fdl_bidsapp.imaging.overlap import METRICS
from fdl_bidsapp.models.bundle import Bundle, load_bundle, save_bundle
from fdl_bidsapp.models.fdl import ModelSpec, build_network
from fdl_bidsapp.training import evaluate as module
from fdl_bidsapp.training.cases import read_labels, read_table
from fdl_bidsapp.training.evaluate import MEAN, compare, evaluate, summarise, write_evaluation

from .conftest import ball


@pytest.fixture
def bundle(labelled_set, tmp_path) -> Bundle:
    table = labelled_set({"test": 2})
    spec = ModelSpec(
        "small",
        method="none",
        backbone_options={"width": 2, "levels": 2},
        grid_shape=(16, 16, 12),
        labels=read_labels(table.with_name("labels.tsv")),
    )
    save_bundle(tmp_path / "small.safetensors", build_network(spec), spec)
    return load_bundle(tmp_path / "small.safetensors")


@pytest.fixture
def right(monkeypatch):
    """A network that finds the bright ball, and the dark one a voxel off."""

    def found(canvas, bundle, network, device, *, flips="auto"):
        truth = np.stack([ball((5, 6, 6), 3.2), ball((12, 7, 5), 2.5)]).astype(np.float32)
        return truth, np.eye(4)

    monkeypatch.setattr(module, "segment_canvas", found)


def test_measures_each_structure_and_their_mean_on_the_native_grid(bundle, right, tmp_path):
    rows = evaluate(bundle, read_table(tmp_path / "cases.tsv"), device="cpu")
    assert [(row["id"], row["structure"]) for row in rows] == [
        (case, structure)
        for case in ("test0", "test1")
        for structure in ("Brightball", "Darkball", MEAN)
    ]
    bright, dim, mean = rows[:3]
    assert bright["dice"] == 1
    assert bright["hd95"] == 0
    assert bright["volume"] == bright["reference_volume"] == ball((5, 6, 6), 3.2).sum()
    assert 0.4 < dim["dice"] < 0.9
    assert dim["hd95"] == 1
    for metric in METRICS:
        assert mean[metric] == pytest.approx((bright[metric] + dim[metric]) / 2)


def test_structures_are_matched_by_abbreviation_where_there_is_a_table(bundle, right, tmp_path):
    scans = read_table(tmp_path / "cases.tsv")
    table = tmp_path / "swapped.tsv"
    table.write_text("index\tname\n2\tBright ball\n1\tDark ball\n")
    rows = evaluate(bundle, scans, device="cpu", reference_labels=read_labels(table))
    assert rows[0]["structure"] == "Brightball"
    assert rows[0]["dice"] == 0
    table.write_text("index\tname\n2\tBright ball\n")
    with pytest.raises(DataError, match="lacks Darkball"):
        evaluate(bundle, scans, device="cpu", reference_labels=read_labels(table))


def row(model, case, value, participant=None):
    values = dict.fromkeys(METRICS, value)
    who = {"id": case, "participant": participant or case}
    return {"model": model, "structure": MEAN, **who, **values}


def test_summary_has_a_row_for_each_model_structure_and_measure():
    rows = [row("a", str(i), 0.8 + 0.01 * i) for i in range(5)]
    summary = summarise(rows)
    assert [one["metric"] for one in summary] == list(METRICS)
    assert summary[0]["mean"] == pytest.approx(0.82)
    assert summary[0]["lower"] < 0.82 < summary[0]["upper"]


def test_comparison_is_paired():
    rng = np.random.default_rng(0)
    values = rng.uniform(0.2, 0.9, 12)
    rows = [row("a", str(i), v) for i, v in enumerate(values)]
    rows += [row("b", str(i), v + 0.02) for i, v in enumerate(values)]
    (dice, *_) = compare(rows, "b", "a")
    assert dice["difference"] == pytest.approx(0.02)
    assert dice["lower"] == pytest.approx(0.02)
    assert dice["p"] == pytest.approx(1e-4)
    with pytest.raises(UsageError, match="share no case"):
        compare([*rows, row("c", "another", 0.5)], "c", "a")


def test_tables_are_written_with_what_is_missing_as_n_a(tmp_path):
    rows = [row("a", "1", math.nan), row("a", "2", 0.5), row("b", "1", 0.5), row("b", "2", 0.6)]
    paths = write_evaluation(rows, ["a", "b"], tmp_path / "out")
    assert [Path(path).name for path in paths] == ["cases.tsv", "summary.tsv", "differences.tsv"]
    assert paths[0].read_text().splitlines()[1].split("\t")[4] == "n/a"
    assert len(paths[2].read_text().splitlines()) == 1 + len(METRICS)
