"""Many runs into one output folder, at once."""

from __future__ import annotations

import os

import numpy as np
import pytest

pytestmark = pytest.mark.real

SUBJECTS = ("01", "02")

SLOW_RENAME = """
import pathlib, time
rename = pathlib.Path.replace
def slow(self, target):
    time.sleep(0.05)
    done = rename(self, target)
    time.sleep(0.05)
    return done
pathlib.Path.replace = slow
"""
"""As on a network file system under load."""


def test_eight_runs_at_once_leave_what_one_leaves(study, start, results_of, unfinished):
    for subject in SUBJECTS:
        study.add(subject, ("qsm", "r2star"))
    assert study.run() == 0
    expected = results_of(study.out)
    study.out = study.out.with_name("crowded")
    runs = [start(study.arguments(), before=SLOW_RENAME) for _ in range(8)]
    for run in runs:
        assert run.finish() == 0, run.said
    crowded = results_of(study.out)
    # It says where the inputs are as seen from the output: the same for both.
    assert crowded == expected
    assert unfinished(study.out) == []


def test_runs_with_two_models_at_once_leave_no_mixture(study, start, make_model):
    swapped = make_model(study.bids.parent / "swapped.safetensors", ("RNR", "RNL"), name="swapped")
    for subject in SUBJECTS:
        study.add(subject)
    models = [study.model, swapped] * 2
    runs = [
        start(study.arguments("participant", "--model", model), before=SLOW_RENAME)
        for model in models
    ]
    for run in runs:
        assert run.finish() == 0, run.said
    for subject in SUBJECTS:
        name = study.record(subject)["ModelName"]
        labels = np.asarray(study.labels(subject).dataobj)
        bright = labels[8, 16, 16]
        assert bright == {"blobs": 1, "swapped": 2}[str(name)]
        for abbreviation, value in (("RNL", 1), ("RNR", 2)):
            path = study.output(subject, f"space-orig_label-{abbreviation}_mask.nii.gz")
            mask = np.asarray(type(study.labels(subject)).from_filename(path).dataobj)
            assert ((labels == value) == mask).all()


def test_a_task_waits_while_another_writes_the_same_scan(tmp_path):
    from fdl_bidsapp.bids.outputs import alone

    order = tmp_path / "order"
    with alone(tmp_path, "sub-01"):
        child = os.fork()
        if not child:
            with alone(tmp_path, "sub-02"), order.open("a") as stream:
                stream.write("other ")
            with alone(tmp_path, "sub-01"), order.open("a") as stream:
                stream.write("same ")
            os._exit(0)
        while not order.exists() or order.read_text() != "other ":
            pass
        with order.open("a") as stream:
            stream.write("first ")
    os.waitpid(child, 0)
    assert order.read_text() == "other first same "
