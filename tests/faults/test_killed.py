"""Processes that are killed: a worker costs its scan, the whole run costs nothing finished."""

from __future__ import annotations

import json
import signal
import time

import psutil
import pytest

pytestmark = pytest.mark.real


def records(study) -> list:
    return list(study.out.rglob("sub-*_morph.json"))


def test_a_killed_worker_fails_its_scan_alone_and_soon(study, start):
    subjects = [f"{k:02d}" for k in range(1, 7)]
    for subject in subjects:
        study.add(subject)
    run = start(study.arguments("participant", "--nprocs", 2))
    run.wait_for(lambda: len(records(study)) > 0)
    (worker, *_) = run.workers()
    worker.suspend()
    time.sleep(1)  # now it has been given a scan, if it had none
    worker.kill()
    killed = time.monotonic()
    assert run.finish() == 1
    assert time.monotonic() - killed < 30
    states = {subject: study.record(subject) for subject in subjects}
    (failed,) = [subject for subject, record in states.items() if record["Status"] != "ok"]
    (line,) = [line for line in run.said.splitlines() if line.startswith(f"  sub-{failed}: ")]
    assert "killed, most likely for lack of memory" in line
    assert "--mem" in line
    assert study.outputs(failed) == [f"sub-{failed}_morph.json"]
    assert study.run() == 0


def test_a_killed_run_leaves_no_worker_and_no_part_of_a_result(study, start, results_of):
    for k in range(1, 9):
        study.add(f"{k:02d}")
    run = start(study.arguments("participant", "--nprocs", 2))
    run.wait_for(lambda: len(records(study)) > 1)
    workers = run.workers()
    assert workers
    run.popen.send_signal(signal.SIGKILL)
    run.popen.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    before = {path: path.stat().st_mtime_ns for path in records(study)}
    assert 2 <= len(before) < 8
    assert all(json.loads(path.read_text())["Status"] == "ok" for path in before)
    assert study.run() == 0
    assert len(records(study)) == 8
    assert {path: path.stat().st_mtime_ns for path in before} == before
    resumed = results_of(study.out)
    study.out = study.out.with_name("again")
    assert study.run() == 0
    assert results_of(study.out) == resumed
