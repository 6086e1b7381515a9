"""What is ordinary on people's disks: nothing special comes of it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fdl_bidsapp.bids.inputs import find_scans

pytestmark = pytest.mark.real


@pytest.fixture
def reference(study, blobs):
    """Give a study with two maps and echoes, which was done once, and its label map."""
    study.add("01", ("qsm", "r2star"))
    assert study.run() == 0
    expected = np.asarray(study.labels("01").dataobj)
    assert (expected == blobs().truth()).all()
    return study


def annex(root: Path) -> None:
    """Replace each image by a link to a read-only object, as git-annex does."""
    objects = root / ".git" / "annex" / "objects"
    for number, path in enumerate(sorted(root.rglob("*.nii*"))):
        key = objects / f"MD5E-s{number}--0123456789abcdef.nii.gz"
        content = key / key.name
        content.parent.mkdir(parents=True)
        shutil.move(path, content)
        content.chmod(0o444)
        path.symlink_to(
            Path(*[".."] * len(path.parent.relative_to(root).parts)) / content.relative_to(root)
        )


def test_input_through_links_is_named_as_the_links_are(reference, results_of):
    expected = results_of(reference.out)
    annex(reference.bids)
    reference.out = reference.out.with_name("linked")
    assert reference.run() == 0
    assert results_of(reference.out) == expected
    (scan,) = find_scans(reference.bids).scans
    assert scan.sources[0].paths[0].is_symlink()


def test_content_that_was_not_fetched_fails_its_scan_with_the_way_to_get_it(reference, capsys):
    annex(reference.bids)
    shutil.rmtree(reference.bids / ".git")
    reference.out = reference.out.with_name("linked")
    assert reference.run() == 1
    assert "datalad get" in capsys.readouterr().err


@pytest.fixture
def read_only(reference) -> Iterator[Path]:
    """Give the dataset on a file system that cannot be written to."""
    folder = str(reference.bids)
    for command in (
        ["mount", "--bind", folder, folder],
        ["mount", "-o", "remount,ro,bind", folder],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    yield reference.bids
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_dataset_that_cannot_be_written_to_is_enough(reference, read_only, results_of):
    with pytest.raises(OSError, match="Read-only"):
        (read_only / "new").touch()
    expected = results_of(reference.out)
    reference.out = reference.out.with_name("again")
    assert reference.run() == 0
    assert results_of(reference.out) == expected
    assert len(reference.group()) == 2


@pytest.mark.parametrize(
    "name", ["my study (final)", "étude de 鉄 №1", 'it\'s "quoted"', "a=b,c;d&e", "#1 %20 [x]"]
)
def test_any_name_of_a_folder_will_do(reference, results_of, name):
    expected = results_of(reference.out)
    root = reference.bids.parent / name
    root.mkdir()
    reference.bids = reference.bids.rename(root / "bids")
    reference.out = root / "out"
    reference.model = Path(shutil.copy(reference.model, root / f"{name}.safetensors"))
    assert reference.run("participant", "--work-dir", root / "work") == 0
    assert results_of(reference.out) == expected
    assert {row["status"] for row in reference.group()} == {"ok"}
