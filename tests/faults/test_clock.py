"""A clock that is set back, or ticks coarsely: what has changed is seen all the same."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

pytestmark = pytest.mark.real

YEAR = 365 * 24 * 3600


@pytest.fixture
def done(study):
    """Give a study of one participant after a first run."""
    study.add("01")
    assert study.run() == 0
    return study


def test_an_input_that_is_older_than_the_result_is_segmented_again(done, blobs):
    moved = blobs(bright=(8.0, 20.0, 16.0))
    path = done.add("01", blobs=moved)
    before = time.time() - YEAR
    os.utime(path, (before, before))
    assert done.run() == 0
    assert (np.asarray(done.labels("01").dataobj) == moved.truth()).all()


def test_results_from_the_future_are_neither_redone_nor_trusted_more(done, blobs, capsys):
    later = time.time() + YEAR
    for path in done.out.rglob("*"):
        os.utime(path, (later, later))
    assert done.run() == 0
    assert "nothing is done again" in capsys.readouterr().err
    moved = blobs(bright=(8.0, 20.0, 16.0))
    done.add("01", blobs=moved)
    assert done.run() == 0
    assert (np.asarray(done.labels("01").dataobj) == moved.truth()).all()


def test_a_run_whose_clock_jumps_back_finishes(study, monkeypatch):
    clock = time.time
    start = clock()
    monkeypatch.setattr(time, "time", lambda: start - YEAR - (clock() - start))
    for subject in ("01", "02"):
        study.add(subject)
    assert study.run() == 0
    assert {row["status"] for row in study.group()} == {"ok"}


def test_no_step_takes_the_intermediate_files_of_another_run(study, blobs, monkeypatch):
    from nipype.utils import filemanip

    # As on a file system that keeps whole minutes: files of one size look alike.
    monkeypatch.setattr(filemanip, "hash_timestamp", lambda _: "0" * 32)
    work = study.bids.parent / "work"
    for place in ((8.0, 16.0, 16.0), (8.0, 20.0, 16.0)):
        blob = blobs(bright=place)
        study.add("01", blobs=blob)
        assert study.run("participant", "--work-dir", work) == 0
        assert (np.asarray(study.labels("01").dataobj) == blob.truth()).all()
