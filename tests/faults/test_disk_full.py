"""A disk that fills up, on a small file system of its own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

SCANS = 8


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Give a maker of a folder that holds some kilobytes alone."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = []

    def make(kilobytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for each in mounted:
        subprocess.run(["umount", "--lazy", str(each)], check=True)


@pytest.mark.parametrize("nprocs", [1, 2])
def test_a_full_output_ends_the_run_with_folder_and_need(
    study, start, small_disk, unfinished, nprocs
):
    for k in range(SCANS):
        study.add(f"{k:02d}")
    options = ("--save-probabilities", "--participant-label", "00")
    assert study.run("participant", *options) == 0
    files = [path for path in study.out.rglob("*") if path.is_file()]
    study.out = small_disk(4 * sum(4 + path.stat().st_size // 1024 for path in files))
    words = study.arguments("participant", "--nprocs", nprocs, "--save-probabilities")
    run = start(words)
    assert run.finish() == 74
    line = run.said.splitlines()[-1]
    assert line.startswith(f"fdl-bidsapp: {study.out}: the disk or quota is full")
    assert re.search(r"make room there, up to \d+\.\d MB for each scan", line)
    assert unfinished(study.out) == []
    done = sorted(path for path in study.out.rglob("sub-*_morph.json"))
    assert 0 < len(done) < SCANS
    before = {path: path.stat().st_mtime_ns for path in done}
    subprocess.run(["mount", "-o", "remount,size=20m", str(study.out)], check=True)
    assert study.run("participant", "--save-probabilities") == 0
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert len(list(study.out.rglob("sub-*_morph.json"))) == SCANS


@pytest.mark.parametrize("kilobytes", [40, 200])
@pytest.mark.parametrize("given", [True, False])
def test_a_full_work_folder_ends_the_run_with_folder_and_need(
    study, start, small_disk, unfinished, kilobytes, given
):
    study.add("01")
    study.add("02")
    disk = small_disk(kilobytes)
    options = ("--work-dir", disk) if given else ()
    run = start(study.arguments("participant", *options), TMPDIR=str(disk))
    assert run.finish() == 74
    line = run.said.splitlines()[-1]
    assert line.startswith(f"fdl-bidsapp: {disk}: the disk or quota is full")
    assert re.search(r"make room there, \d+\.\d MB for 1 at once", line)
    assert "--work-dir" in line
    assert unfinished(study.out) == []
    assert list(disk.iterdir()) == []
