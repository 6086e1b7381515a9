"""``--target best``: each contrast is segmented, and the one kept of which most is expected."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fdl_bidsapp.imaging.confidence import INTERCEPT, SIGNS, Calibration
from fdl_bidsapp.imaging.overlap import dice

pytestmark = pytest.mark.real

SURE = {INTERCEPT: 0.0, **dict.fromkeys(SIGNS, 0.0), "mean_probability": 1.0}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, make_model) -> Path:
    weights = {name: {"red_nucleus": SURE} for name in ("qsm", "r2star", "imag")}
    path = tmp_path_factory.mktemp("calibrated") / "model.safetensors"
    return make_model(path, calibration=Calibration(weights, threshold=0.7))


def without_nuclei(study, contrast: str) -> None:
    """Write a map in which there is nothing to be found."""
    path = study.add("01", (contrast,))
    image = nib.load(path)
    noise = np.random.default_rng(0).normal(1, 0.1, image.shape).astype(np.float32)
    nib.Nifti1Image(noise, image.affine, image.header).to_filename(path)


def notes(study) -> str:
    return " ".join(study.record("01")["Notes"])


def test_the_contrast_that_shows_the_nuclei_is_kept(study, blobs, calibrated):
    without_nuclei(study, "qsm")
    study.add("01", ("r2star",))
    assert study.run("participant", "--target", "best", "--model", calibrated) == 0
    assert study.record("01")["Target"] == "r2star"
    assert "r2star was segmented, of which most was expected" in notes(study)
    assert re.search(r"r2star 1.00, qsm 0\.[0-8]", notes(study))
    labels, truth = np.asarray(study.labels("01").dataobj), blobs().truth()
    for value in (1, 2):
        assert dice(labels == value, truth == value) >= 0.9
    (left, *_) = study.group()
    assert left["target"] == "r2star"
    assert float(left["confidence"]) > 0.5


def test_of_contrasts_that_serve_alike_the_first_is_kept(study, calibrated):
    study.add("01", ("imag", "qsm"))
    assert study.run("participant", "--target", "best", "--model", calibrated) == 0
    assert study.record("01")["Target"] == "qsm"
    labels = np.asarray(study.labels("01").dataobj)
    assert study.run("participant", "--target", "qsm", "--model", calibrated) == 0
    np.testing.assert_array_equal(labels, study.labels("01").dataobj)


def test_a_single_contrast_needs_no_word(study, calibrated):
    study.add("01", ("r2star",))
    assert study.run("participant", "--target", "best", "--model", calibrated) == 0
    assert study.record("01")["Target"] == "r2star"
    assert "most was expected" not in notes(study)


def test_a_contrast_without_calibration_is_not_chosen(study, calibrated, capsys):
    study.add("01", ("swi",))
    assert study.run("participant", "--target", "best", "--model", calibrated) == 1
    assert "does not foretell how well it segments swi" in study.record("01")["Error"]["Cause"]
    study.add("01", ("imag",))
    assert study.run("participant", "--target", "best", "--model", calibrated) == 0
    assert study.record("01")["Target"] == "imag"


def test_a_contrast_that_is_broken_leaves_the_choice_to_the_others(study, calibrated):
    path = study.add("01", ("qsm",))
    path.write_bytes(path.read_bytes()[:200])
    words = ("participant", "--target", "best", "--model", calibrated)
    assert study.run(*words) == 1
    assert "Chimap" in study.record("01")["Error"]["Path"]
    study.add("01", ("imag",))
    assert study.run(*words) == 0
    assert study.record("01")["Target"] == "imag"
    assert "qsm was left out" in notes(study)
    assert set(study.record("01")["InputsUsed"]) == {"imag"}


def test_a_model_that_foretells_nothing_is_refused_before_anything_is_done(study, capsys):
    study.add("01")
    assert study.run("participant", "--target", "best") == 64
    told = capsys.readouterr().err
    assert "does not foretell its Dice" in told
    assert "--target" in told
    assert not study.out.exists()


def test_a_dry_run_shows_what_would_be_tried(study, calibrated, capsys):
    study.add("01", ("qsm", "imag"))
    words = ("--target", "best", "--model", calibrated, "--dry-run")
    assert study.run("participant", *words) == 0
    assert capsys.readouterr().out.count("<- segmented") == 2
