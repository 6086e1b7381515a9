"""What a power cut leaves in the work folder, and what other versions and models have made."""

from __future__ import annotations

import signal

import pytest

pytestmark = pytest.mark.real


def test_no_file_of_an_interrupted_run_gets_into_a_result(study, start, results_of):
    for subject in ("01", "02", "03"):
        study.add(subject, ("qsm", "r2star"))
    assert study.run() == 0
    expected = results_of(study.out)
    study.out = study.out.with_name("cut")
    work = study.bids.parent / "work"
    options = ("--work-dir", work)
    run = start(study.arguments("participant", *options))
    # In the middle of a scan: its images are there, the masks are not yet.
    run.wait_for(lambda: list(work.glob("*/*/sub_0?/segment/probabilities.npz")))
    run.popen.send_signal(signal.SIGKILL)
    run.popen.wait()
    files = [path for path in work.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".npz", ".pklz", ".json"}
    for number, path in enumerate(files):
        content = path.read_bytes()
        half = len(content) // 2
        path.write_bytes(content[:half] if number % 2 else content[:half] + bytes(half))
    assert study.run("participant", *options) == 0
    assert results_of(study.out) == expected


def test_a_lost_work_folder_is_made_again(study, monkeypatch):
    import shutil

    from fdl_bidsapp.workflows.progress import Progress

    work = study.bids.parent / "work"
    for subject in ("01", "02", "03"):
        study.add(subject)
    done = Progress.scan_done

    def lose(self: Progress, failed: bool = False) -> None:
        shutil.rmtree(work)  # a cleaner of old files
        done(self, failed)

    monkeypatch.setattr(Progress, "scan_done", lose)
    assert study.run("participant", "--work-dir", work) == 0
    assert all(study.record(subject)["Status"] == "ok" for subject in ("01", "02", "03"))


@pytest.mark.parametrize("what", ["version", "model"])
def test_results_of_another_version_or_model_are_made_again(study, monkeypatch, make_model, what):
    from fdl_bidsapp import derivatives

    study.add("01")
    study.add("02")
    assert study.run() == 0
    if what == "version":
        monkeypatch.setattr(derivatives, "__version__", "99.0")
    else:
        study.model = make_model(study.bids.parent / "other.safetensors", name="other")
    key = {"version": "AppVersion", "model": "ModelName"}[what]
    new = {"version": "99.0", "model": "other"}[what]
    # One participant only, as when a cohort grows: the other keeps what it has, and it is told.
    assert study.run("participant", "--participant-label", "01") == 0
    assert study.record("01")[key] == new
    assert study.record("02")[key] != new
    assert study.run() == 0
    assert study.record("02")[key] == new


@pytest.mark.parametrize("what", ["versions of fdl-bidsapp", "models"])
def test_a_table_of_two_versions_or_models_says_so(study, monkeypatch, make_model, capsys, what):
    from fdl_bidsapp import derivatives

    study.add("01")
    study.add("02")
    assert study.run() == 0
    if what == "models":
        study.model = make_model(study.bids.parent / "other.safetensors", name="other")
    else:
        monkeypatch.setattr(derivatives, "__version__", "99.0")
    assert study.run("participant", "--participant-label", "01") == 0
    column = {"models": "model_name", "versions of fdl-bidsapp": "app_version"}[what]
    assert len({row[column] for row in study.group()}) == 2
    assert f"Warning: the table mixes 2 {what}" in capsys.readouterr().err
