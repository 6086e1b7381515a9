"""Bad input, through the whole app: one clear line, a failed row, the other scans finished."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fdl_bidsapp.cli.app import run

pytestmark = pytest.mark.real


def write(path: Path, data: np.ndarray, affine: np.ndarray | None = None, code: int = 1) -> None:
    """Write an image whatever its header says."""
    matrix = np.eye(4) if affine is None else affine
    image = nib.Nifti1Image(data, None)
    image.header.set_sform(matrix, code)
    image.header["pixdim"][1:4] = 1
    content = image.to_bytes()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)


def truncated(path: Path, data: np.ndarray) -> None:
    write(path, data)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def text(path: Path, data: np.ndarray) -> None:
    path.write_text("this is no image\n" * 100)


def endless(path: Path, data: np.ndarray) -> None:
    write(path, np.tile(data, (3, 1, 1)), np.diag([8.0, 1.0, 1.0, 1.0]))


def empty(path: Path, data: np.ndarray) -> None:
    path.touch()


def dangling_link(path: Path, data: np.ndarray) -> None:
    path.symlink_to("../../.git/annex/objects/not-fetched")


def all_nan(path: Path, data: np.ndarray) -> None:
    write(path, np.full_like(data, np.nan))


def infinite(path: Path, data: np.ndarray) -> None:
    write(path, np.full_like(data, np.inf))


def all_zero(path: Path, data: np.ndarray) -> None:
    write(path, np.zeros_like(data))


def constant(path: Path, data: np.ndarray) -> None:
    write(path, np.full_like(data, 3))


def a_mask(path: Path, data: np.ndarray) -> None:
    write(path, (data > 0.1).astype(np.float32))


def four_axes(path: Path, data: np.ndarray) -> None:
    write(path, np.stack([data, data], -1))


def flat(path: Path, data: np.ndarray) -> None:
    write(path, data[:, :, :1])


def singular(path: Path, data: np.ndarray) -> None:
    write(path, data, np.diag([1.0, 1.0, 0.0, 1.0]))


def skewed(path: Path, data: np.ndarray) -> None:
    affine = np.eye(4)
    affine[:3, 1] = affine[:3, 0]
    write(path, data, affine)


def affine_of_nan(path: Path, data: np.ndarray) -> None:
    write(path, data, np.full((4, 4), np.nan))


def huge_voxels(path: Path, data: np.ndarray) -> None:
    write(path, data, np.diag([1.0, 1.0, 300.0, 1.0]))


BAD = {
    truncated: "cut short",
    text: "not a NIfTI image",
    empty: "the file is empty",
    dangling_link: "no such file",
    all_nan: "all values are NaN or infinite",
    infinite: "all values are NaN or infinite",
    all_zero: "every value is 0",
    constant: "every value is 3",
    a_mask: "has no contrast",
    four_axes: "4 axes (32 × 32 × 32 × 2) where 3 belong",
    flat: "fewer than 8 voxels",
    singular: "the affine is singular",
    skewed: "the affine is singular",
    affine_of_nan: "the affine is not finite",
    endless: "field of view of 768 × 32 × 32 mm",
    huge_voxels: "voxel size of 1 × 1 × 300 mm",
}


def label_of(make: Callable[..., None]) -> str:
    return make.__name__.replace("_", "")


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name != ".bidsignore"]


def lines_about(captured: str, word: str) -> list[str]:
    return [line for line in captured.splitlines() if word in line]


@pytest.fixture
def spoilt(study, blobs):
    """Give a study with a good participant and one for each kind of bad image."""
    study.add("good")
    for make in BAD:
        make(study.path(label_of(make)), blobs().data())
    return study


@pytest.mark.parametrize("nprocs", [1, 2])
def test_each_bad_image_fails_alone_with_file_cause_and_remedy(spoilt, capsys, nprocs):
    assert spoilt.run("participant", "--nprocs", nprocs) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert f"1 of {len(BAD) + 1} scans done, {len(BAD)} failed" in said
    for make, cause in BAD.items():
        subject = label_of(make)
        (line,) = lines_about(said, f"  sub-{subject}: ")
        assert str(spoilt.path(subject)) in line
        assert cause in line
        assert re.search(r"\. Remedy: \w.*\.$", line)
        assert spoilt.outputs(subject) == [f"sub-{subject}_morph.json"]
        assert spoilt.record(subject)["Status"] == "failed"
        assert cause in spoilt.record(subject)["Error"]["Cause"]
    assert len(spoilt.outputs("good")) == 13
    assert hidden(spoilt.out) == []
    rows = spoilt.group()
    status = {row["participant_id"]: row["status"] for row in rows}
    assert status == {
        "sub-good": "ok",
        **{f"sub-{label_of(make)}": "failed" for make in BAD},
    }
    for row in rows:
        if row["status"] == "failed":
            assert row["volume"] == "n/a"
            assert row["error"] != "n/a"


def test_the_log_holds_what_the_terminal_does_not(study, monkeypatch, capsys):
    from fdl_bidsapp import pipeline

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug\nin two lines")

    monkeypatch.setattr(pipeline, "to_canvas", broken)
    study.add("01")
    assert study.run() == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = lines_about(said, "  sub-01: ")
    assert "ZeroDivisionError: a bug in two lines" in line
    assert "Remedy: " in line
    (told,) = lines_about(said, "Log: ")
    log = Path(told.removeprefix("Log: ")).read_text()
    assert "Traceback" in log
    assert "in broken" in log


def test_scattered_nan_and_infinity_are_taken_as_zero_and_noted(study, blobs):
    data = blobs().data()
    data[:3] = np.nan
    data[3, 0, 0] = np.inf
    write(study.path("01"), data)
    assert study.run() == 0
    assert any("NaN or infinite" in note for note in study.record("01")["Notes"])
    assert (np.asarray(study.labels("01").dataobj) == 1).sum() == (blobs().truth() == 1).sum()


def test_a_broken_map_beside_the_target_is_left_out_with_a_note(study, capsys):
    study.add("01", ("qsm", "r2star"))
    path = study.path("01", "R2starmap.nii.gz")
    path.write_bytes(path.read_bytes()[:1000])
    assert study.run() == 0
    assert "1 scan with notes" in capsys.readouterr().err
    study.output("01", "morph.json").unlink()
    assert study.run("participant", "-v") == 0
    assert lines_about(capsys.readouterr().err, f"  sub-01: r2star was left out: {path}: ")
    record = study.record("01")
    assert list(record["InputsUsed"]) == ["qsm"]
    (note,) = [note for note in record["Notes"] if "left out" in note]
    assert str(path) in note
    sidecar = json.loads(study.output("01", "space-orig_seg-fdl_dseg.json").read_text())
    assert sidecar["Sources"] == ["bids:raw:sub-01/anat/sub-01_Chimap.nii.gz"]
    assert {row["r2star_mean"] for row in study.group()} == {"n/a"}


def test_contrasts_on_different_grids_are_brought_together_with_a_note(study):
    affine = np.diag([0.8, 0.8, 1.0, 1.0])
    study.add("01", ("qsm",))
    study.add("01", ("r2star",), shape=(40, 40, 32), affine=affine)
    assert study.run() == 0
    assert "r2star was resampled to the grid of qsm" in study.record("01")["Notes"]
    assert study.labels("01").shape == (32, 32, 32)
    bright = study.group()[0]
    assert bright["abbreviation"] == "RNL"
    assert float(bright["r2star_median"]) == pytest.approx(90, abs=3)


def test_a_contrast_that_says_not_where_it_lies_is_left_out(study, blobs):
    study.add("01", ("qsm",))
    data = blobs().data("r2star", (30, 30, 30))
    write(study.path("01", "R2starmap.nii.gz"), data, code=0)
    assert study.run() == 0
    assert any(
        "r2star was left out: its grid differs" in note for note in study.record("01")["Notes"]
    )


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_echoes_that_disagree_fail_the_scan(study, capsys, blobs, shift):
    study.add("02")
    study.add_echoes("01")
    second = study.path("01", "echo-2_part-mag_MEGRE.nii.gz")
    affine = np.eye(4)
    affine[0, 3] = shift
    write(second, blobs().data("imag", (32, 32, 32 if shift else 30)), affine)
    assert study.run() == 1
    (line,) = lines_about(capsys.readouterr().err, "  sub-01: ")
    assert str(second) in line
    assert "shape or affine differs" in line
    assert study.record("02")["Status"] == "ok"


def test_thick_slices_work(study, blobs):
    shape, affine = (64, 64, 12), np.diag([0.5, 0.5, 3.0, 1.0])
    study.add("01", shape=shape, affine=affine)
    assert study.run() == 0
    labels, truth = study.labels("01"), blobs().truth(shape, affine)
    assert labels.shape == shape
    for value in (1, 2):
        found, true = np.asarray(labels.dataobj) == value, truth == value
        assert 2 * (found & true).sum() / (found.sum() + true.sum()) >= 0.8


def test_a_field_of_view_without_the_nuclei_gives_empty_masks_and_a_flag(study, blobs):
    far = blobs(bright=(500.0, 0, 0), dark=(600.0, 0, 0))
    study.add("01", blobs=far)
    assert study.run() == 0
    assert not np.asarray(study.labels("01").dataobj).any()
    for row in study.group():
        assert (row["status"], row["qc_flag"], row["volume"]) == ("ok", "empty", "n/a")
        assert row["qsm_mean"] == "n/a"


def test_two_candidates_for_one_contrast_fail_the_scan_and_name_both(study, capsys):
    study.add("01")
    study.add("02")
    twin = study.path("01", "desc-again_Chimap.nii.gz")
    twin.write_bytes(study.path("01").read_bytes())
    assert study.run() == 1
    (line,) = lines_about(capsys.readouterr().err, "  sub-01: ")
    assert str(twin) in line
    assert str(study.path("01")) in line
    assert "--bids-filter-file" in line
    filters = study.bids.parent / "filters.json"
    filters.write_text('{"qsm": {"desc": "again"}}')
    # The other participant has no such file.
    assert study.run("participant", "--bids-filter-file", filters) == 1
    assert study.record("01")["Status"] == "ok"
    assert study.record("02")["Status"] == "ok"


# The whole run cannot begin


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run the app where it must refuse in one line, and return its code and that line."""
    capsys.readouterr()
    code = run(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fdl-bidsapp: ")
    assert "Remedy: " in line
    return code, line


def test_an_empty_dataset_is_no_match(study, capsys):
    code, line = refused(study.arguments(), capsys)
    assert code == 18
    assert str(study.bids) in line
    assert not study.out.exists()


def test_a_folder_without_description_is_no_dataset(study, capsys):
    study.add("01")
    (study.bids / "dataset_description.json").unlink()
    code, line = refused(study.arguments(), capsys)
    assert code == 16
    assert "dataset_description.json" in line
    assert not study.out.exists()


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"Name": ', "\x00\xff"])
def test_a_broken_description_is_no_dataset(study, capsys, content):
    study.add("01")
    (study.bids / "dataset_description.json").write_text(content)
    assert refused(study.arguments(), capsys)[0] == 16


def test_an_unknown_participant_is_no_match_and_the_known_are_named(study, capsys):
    study.add("01")
    arguments = study.arguments("participant", "--participant-label", "sub-99")
    code, line = refused(arguments, capsys)
    assert code == 18
    assert "99" in line
    assert "choose among 01" in line


def test_an_unknown_level_is_named(study, capsys):
    study.add("01")
    code, line = refused(study.arguments("subject"), capsys)
    assert code == 17
    assert "'subject'" in line


def test_an_output_below_a_file_cannot_be_created(study, capsys):
    study.add("01")
    blocking = study.out.parent / "file"
    blocking.write_text("")
    study.out = blocking / "out"
    code, line = refused(study.arguments(), capsys)
    assert code == 73
    assert str(study.out) in line


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_read_only_output_cannot_be_written(study, capsys):
    study.add("01")
    study.out.mkdir(mode=0o555)
    assert refused(study.arguments(), capsys)[0] == 73


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a pickle in a zip archive", b"\x10\0\0\0\0\0\0\0{}"]
)
def test_a_model_file_that_is_not_one_is_refused(study, capsys, content):
    study.add("01")
    study.model = study.bids.parent / "model.safetensors"
    study.model.write_bytes(content)
    code, line = refused(study.arguments(), capsys)
    assert code == 65
    assert str(study.model) in line
    assert not study.out.exists()


def test_a_missing_model_is_missing_input(study, capsys):
    study.add("01")
    study.model = study.bids.parent / "none.safetensors"
    code, line = refused(study.arguments(), capsys)
    assert code == 66
    assert str(study.model) in line


def test_a_gpu_that_is_not_there_is_an_error_and_no_silent_fall_back(study, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    study.add("01")
    code, line = refused(study.arguments("participant", "--device", "cuda"), capsys)
    assert code == 64
    assert "--device cpu" in line
    assert not study.out.exists()


def test_the_input_is_never_the_output(study, capsys):
    study.add("01")
    study.add("02")
    study.out = study.bids
    assert refused(study.arguments(), capsys)[0] == 64
    study.out = study.bids / "sub-01"
    assert refused(study.arguments(), capsys)[0] == 73


def test_a_folder_of_another_dataset_is_never_the_output(study, capsys):
    study.add("01")
    study.out.mkdir()
    (study.out / "dataset_description.json").write_text('{"Name": "mine"}')
    code, line = refused(study.arguments(), capsys)
    assert code == 73
    assert "another dataset" in line


def test_missing_derivatives_are_missing_input(study, capsys):
    study.add("01")
    nowhere = study.bids / "derivatives" / "none"
    code, line = refused(study.arguments("participant", "--derivatives", nowhere), capsys)
    assert code == 66
    assert str(nowhere) in line


def test_a_missing_dataset_is_missing_input(study, capsys):
    study.bids = study.bids / "none"
    assert refused(study.arguments(), capsys)[0] == 66


def test_a_work_folder_that_cannot_be_made_is_told(study, capsys):
    study.add("01")
    blocking = study.out.parent / "file"
    blocking.write_text("")
    code = study.run("participant", "--work-dir", blocking / "work")
    said = capsys.readouterr().err
    assert code == 73
    assert "Traceback" not in said
    (line,) = lines_about(said, "Remedy: ")
    assert str(blocking / "work") in line
    assert "--work-dir" in line


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, 66),
        ("{", 64),
        ("[]", 64),
        ('{"t1": {}}', 64),
        ('{"qsm": 1}', 64),
    ],
)
def test_a_bad_filter_file_is_named(study, capsys, content, code):
    study.add("01")
    path = study.bids.parent / "filters.json"
    if content is not None:
        path.write_text(content)
    told, line = refused(study.arguments("participant", "--bids-filter-file", path), capsys)
    assert told == code
    assert str(path) in line


def test_a_filter_on_no_entity_is_refused(study, capsys):
    study.add("01")
    path = study.bids.parent / "filters.json"
    path.write_text('{"qsm": {"nonsense": "1"}}')
    assert refused(study.arguments("participant", "--bids-filter-file", path), capsys)[0] in (
        18,
        64,
    )


def test_a_filter_that_leaves_nothing_is_no_match(study, capsys):
    study.add("01")
    path = study.bids.parent / "filters.json"
    path.write_text('{"qsm": {"acquisition": "hr"}}')
    assert refused(study.arguments("participant", "--bids-filter-file", path), capsys)[0] == 18


def test_a_target_that_the_model_does_not_take_fails_each_scan(study, capsys, make_model):
    study.model = make_model(study.bids.parent / "m.safetensors", contrasts=("qsm",))
    study.add("01", ("qsm", "r2star"))
    assert study.run("participant", "--target", "r2star") == 1
    (line,) = lines_about(capsys.readouterr().err, "  sub-01: ")
    assert "does not segment r2star" in line


def test_a_group_without_any_result_is_missing_input(study, capsys):
    study.add("01")
    code, line = refused(study.arguments("group"), capsys)
    assert code == 66
    assert str(study.out) in line


def test_participants_without_a_usable_map_are_told_and_stay_in_the_table(study, capsys):
    study.add("01")
    study.path("02", "T1w.nii.gz").touch()
    (study.bids / "participants.tsv").write_text("participant_id\tage\nsub-01\t60\nsub-03\t70\n")
    assert study.run() == 1
    said = capsys.readouterr().err
    assert lines_about(said, "sub-02: no usable contrast")
    assert lines_about(said, "sub-03: no usable contrast")
    status = {row["participant_id"]: (row["status"], row["age"]) for row in study.group()}
    assert status == {
        "sub-01": ("ok", "60"),
        "sub-02": ("missing_input", "n/a"),
        "sub-03": ("missing_input", "70"),
    }


@pytest.mark.parametrize("prepared", [False, True])
def test_an_error_nobody_foresaw_is_one_line_that_says_where_the_traceback_is(
    study, capsys, monkeypatch, tmp_path_factory, prepared
):
    from fdl_bidsapp.bids import inputs

    study.add("01")
    if prepared:
        assert study.run() == 0
    elsewhere = tmp_path_factory.mktemp("tmp")
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug\nin two lines")

    monkeypatch.setattr(inputs, "find_scans", broken)
    code, line = refused(study.arguments(), capsys)
    assert code == 1
    assert "RuntimeError: a bug in two lines" in line
    folder = study.out / "logs" if prepared else elsewhere
    (log,) = folder.glob("*_crash.log")
    assert str(log) in line
    assert "Traceback" in log.read_text()


def test_a_disk_that_is_full_ends_the_run_and_leaves_none_of_the_masks(study, capsys, monkeypatch):
    write_bytes = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if "sub-02" in self.name and "RNR" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write_bytes(self, content)

    study.add("01")
    study.add("02")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert study.run() == 74
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"fdl-bidsapp: {study.out}: the disk or quota is full")
    assert "Remedy: make room there" in line
    assert study.outputs("02") == []
    assert len(study.outputs("01")) == 13


def test_a_disk_that_fails_is_one_line(study, capsys, monkeypatch):
    from fdl_bidsapp.bids import inputs

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", str(study.bids))

    monkeypatch.setattr(inputs, "find_scans", broken)
    assert refused(study.arguments(), capsys)[0] == 74
