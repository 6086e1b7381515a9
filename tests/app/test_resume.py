"""A second run does what is needed and nothing else; a stopped one leaves nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytestmark = pytest.mark.real

COMMAND = "from fdl_bidsapp.cli.app import main; main()"


def stamps(study, *subjects: str) -> dict[Path, int]:
    """Return when each output of these participants was written."""
    return {
        path: path.stat().st_mtime_ns
        for subject in subjects
        for path in (study.out / f"sub-{subject}").rglob("*")
        if path.is_file()
    }


@pytest.fixture
def done(study):
    """Give a study of two participants after a first run."""
    study.add("01", ("qsm", "r2star"))
    study.add("02")
    assert study.run() == 0
    return study


def test_nothing_is_done_again_and_it_says_so(done, capsys):
    before = stamps(done, "01", "02")
    assert before
    capsys.readouterr()
    assert done.run() == 0
    assert stamps(done, "01", "02") == before
    said = capsys.readouterr().err
    assert "2 scans up to date already: nothing is done again" in said
    assert "2 of 2 scans done" in said


def test_a_changed_input_is_segmented_again_and_no_other(done, blobs):
    untouched = stamps(done, "02")
    moved = blobs(bright=(8.0, 20.0, 16.0))
    done.add("01", ("qsm",), blobs=moved)
    assert done.run() == 0
    assert stamps(done, "02") == untouched
    bright = np.asarray(done.labels("01").dataobj) == 1
    assert (bright == (moved.truth() == 1)).all()


@pytest.mark.parametrize(
    "name",
    [
        "space-orig_label-RNL_mask.nii.gz",
        "space-orig_label-RNR_mask.json",
        "space-orig_seg-fdl_dseg.nii.gz",
        "morph.tsv",
        "morph.json",
    ],
)
def test_a_deleted_output_is_made_again(done, name):
    complete = done.outputs("01")
    done.output("01", name).unlink()
    untouched = stamps(done, "02")
    assert done.run() == 0
    assert done.outputs("01") == complete
    assert stamps(done, "02") == untouched


def test_the_work_folder_keeps_the_files_of_failed_scans_alone(study, capsys):
    work = study.bids.parent / "work"
    study.add("0+1")
    whole = study.add("02").read_bytes()
    study.path("02").write_bytes(whole[:500])
    assert study.run("participant", "--work-dir", work) == 1
    (folder,) = work.iterdir()
    assert str(folder) in capsys.readouterr().err
    assert {path.parent.name for path in folder.rglob("normalise")} == {"sub_02"}
    study.path("02").write_bytes(whole)
    assert study.run("participant", "--work-dir", work, "--clean-workdir") == 0
    assert list(work.iterdir()) == []


def test_jobs_share_a_work_folder(study, blobs):
    work = study.bids.parent / "work"
    places = {"01": blobs(), "02": blobs(bright=(8.0, 20.0, 16.0)), "0+3": blobs()}
    for subject, where in places.items():
        study.add(subject, blobs=where)
        options = ("--participant-label", subject) if "+" not in subject else ()
        assert study.run("participant", "--work-dir", work, *options) == 0
    for subject, where in places.items():
        found = np.asarray(study.labels(subject).dataobj)
        assert (found == where.truth()).all()


def test_outputs_of_other_settings_do_not_linger(done):
    assert done.run("participant", "--save-probabilities") == 0
    name = "space-orig_seg-fdl_probseg.nii.gz"
    assert nib.load(done.output("01", name)).shape == (32, 32, 32, 2)
    assert done.run() == 0
    assert not [each for each in done.outputs("01") if "probseg" in each]
    assert len(done.outputs("01")) == 13


def test_another_target_is_segmented_anew(done):
    assert done.record("01")["Target"] == "qsm"
    assert done.run("participant", "--target", "r2star", "--participant-label", "01") == 0
    assert done.record("01")["Target"] == "r2star"
    assert done.record("02")["Target"] == "qsm"


def test_another_model_segments_anew(done, make_model):
    done.model = make_model(done.bids.parent / "other.safetensors", name="other")
    assert done.run() == 0
    assert done.record("01")["ModelName"] == "other"


def test_a_failed_scan_is_tried_again_and_a_done_one_that_now_fails_leaves_nothing(done, capsys):
    path = done.path("01")
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    assert done.run() == 1
    assert done.outputs("01") == ["sub-01_morph.json"]
    capsys.readouterr()
    assert done.run() == 1
    assert "1 scan up to date already" in capsys.readouterr().err
    path.write_bytes(whole)
    assert done.run() == 0
    assert len(done.outputs("01")) == 13


def test_a_scan_that_has_become_ambiguous_is_not_up_to_date(done):
    done.path("01", "desc-again_Chimap.nii.gz").write_bytes(done.path("01").read_bytes())
    assert done.run() == 1
    assert done.record("01")["Status"] == "failed"


def test_a_participant_whose_maps_arrive_later_loses_the_record_of_missing_ones(study):
    study.add("01")
    (study.bids / "sub-02").mkdir()
    assert study.run() == 1
    assert study.record("02")["Status"] == "missing_input"
    study.path("02", "acq-hr_Chimap.nii.gz").write_bytes(study.path("01").read_bytes())
    assert study.run() == 0
    assert study.outputs("02")[0] == "sub-02_acq-hr_morph.json"
    assert {row["status"] for row in study.group()} == {"ok"}


def test_results_survive_a_run_that_does_not_look_at_their_input(done):
    before = stamps(done, "02")
    path = done.path("01", "acq-hr_Chimap.nii.gz")
    path.write_bytes(done.path("01").read_bytes())
    filters = done.bids.parent / "filters.json"
    filters.write_text('{"qsm": {"acquisition": "hr"}, "r2star": {"acquisition": "hr"}}')
    assert done.run("participant", "--bids-filter-file", filters) == 1
    assert stamps(done, "02") == before


def test_a_temporary_work_folder_shrinks_as_scans_are_done(study, monkeypatch):
    from fdl_bidsapp.workflows.progress import Progress

    sizes = []
    folder = study.bids.parent / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    done = Progress.scan_done

    def look(self: Progress, failed: bool = False) -> None:
        sizes.append(len(list(folder.rglob("*.npz"))))
        done(self, failed)

    monkeypatch.setattr(Progress, "scan_done", look)
    for subject in ("01", "02", "03"):
        study.add(subject)
    assert study.run() == 0
    assert sizes == [0, 0, 0]
    assert list(folder.iterdir()) == []


# Interruption


def partial(study) -> list[str]:
    """Return temporary files, and scans that have files but no record."""
    hidden = [str(path) for path in study.out.rglob(".*") if path.name != ".bidsignore"]
    unrecorded = [
        folder.name
        for folder in study.out.glob("sub-*")
        if list(folder.rglob("*.*")) and not list(folder.rglob("sub-*_morph.json"))
    ]
    return hidden + unrecorded


@pytest.mark.parametrize("at", ["fdl_bidsapp.pipeline.to_canvas", "gzip.compress"])
def test_an_interrupt_within_a_step_stops_the_run_and_leaves_nothing_partial(
    study, capsys, monkeypatch, at
):
    for subject in ("01", "02"):
        study.add(subject)
    calls = []
    module, name = at.rsplit(".", 1)
    original = getattr(__import__(module, fromlist=[name]), name)

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(1)
        # In the second of two scans where images are written: three a scan.
        if len(calls) == (2 if name == "to_canvas" else 5):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(at, interrupted)
    assert study.run() == 130
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "fdl-bidsapp: stopped; run it again to go on"
    assert "Traceback" not in said
    assert partial(study) == []
    assert study.record("01")["Status"] == "ok"
    assert study.outputs("02") == []
    assert study.run() == 0
    assert "1 scan up to date already" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("nprocs", [1, 2])
def test_a_signal_stops_the_app_and_the_next_run_goes_on(study, number, nprocs):
    subjects = [f"{k:02d}" for k in range(1, 41)]
    for subject in subjects:
        study.add(subject)
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *study.arguments("participant", "--nprocs", nprocs)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while len(list(study.out.rglob("sub-*_morph.json"))) < 2:
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as the terminal does
    else:
        process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] == "fdl-bidsapp: stopped; run it again to go on"
    assert "Traceback" not in said
    assert partial(study) == []
    records = list(study.out.rglob("sub-*_morph.json"))
    assert 2 <= len(records) < len(subjects)
    assert all('"Status": "ok"' in record.read_text() for record in records)
    before = {record: record.stat().st_mtime_ns for record in records}
    assert study.run() == 0
    assert len(list(study.out.rglob("sub-*_morph.json"))) == len(subjects)
    assert {record: record.stat().st_mtime_ns for record in records} == before


def test_a_stop_that_other_code_swallowed_takes_effect_all_the_same(study):
    from fdl_bidsapp.cli.app import _Stop

    study.add("01")
    stop = _Stop()
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGTERM, None)
    stop(signal.SIGTERM, None)  # the second one does not disturb the tidying up
    before = signal.signal(signal.SIGTERM, stop)
    try:
        assert study.run() == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert study.outputs("01") == []
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT, None)
