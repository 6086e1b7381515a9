"""Names and files that mean harm, or look as if they did: refused by name, in bounded memory."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytestmark = pytest.mark.real

MEGABYTE = 2**20
PEAK_MEGABYTES = 1500
"""A run of one small scan takes some 800, for the libraries."""


def header(shape: tuple[int, ...] = (32, 32, 32), offset: float = 352) -> bytearray:
    """Return a NIfTI header that claims this."""
    made = nib.Nifti1Image(np.zeros((32, 32, 32), np.float32), np.eye(4)).header
    made["magic"] = b"n+1"
    made["dim"][1:4] = shape
    made["vox_offset"] = offset
    return bytearray(made.binaryblock + bytes(4))


def bomb(start: bytes, megabytes: int) -> bytes:
    """Compress zeros so well that they take a thousandth."""
    member = gzip.compress(bytes(64 * MEGABYTE))
    return gzip.compress(bytes(start)) + member * (megabytes // 64)


def sparse(path: Path, start: bytes, size: int) -> None:
    """Write a file of any size that takes no room on disk."""
    with path.open("wb") as stream:
        stream.write(start)
        stream.truncate(size)


def ten_gigabytes(path: Path) -> None:
    sparse(path, header((1360, 1360, 1360)), 10 * 1024 * MEGABYTE)


def ten_gigabytes_zipped(path: Path) -> None:
    path.write_bytes(bomb(header((1360, 1360, 1360)), 10 * 1024))


def far_away(path: Path) -> None:
    path.write_bytes(bomb(header(offset=2.0**33), 10 * 1024))


def long_extension(path: Path) -> None:
    start = header(offset=2.0**31)
    start[348] = 1
    path.write_bytes(bomb(bytes(start) + struct.pack("<ii", 2**31 - 16, 6), 4 * 1024))


def endless_extension(path: Path) -> None:
    """Claim an extension of negative length, which some readers take for all that follows."""
    start = header(offset=4096)
    start[348] = 1
    path.write_bytes(bomb(bytes(start) + struct.pack("<ii", 0, 6), 4 * 1024))


HOSTILE: dict[Callable[[Path], None], str] = {
    ten_gigabytes: "absurd shape",
    ten_gigabytes_zipped: "absurd shape",
    far_away: "voxels begin at byte 8589934592",
    long_extension: "voxels begin at byte 2147483648",
    endless_extension: "every value is 0",
}


def test_images_that_claim_gigabytes_are_refused_in_bounded_memory(study, start, tmp_path):
    study.add("good")
    for make in HOSTILE:
        label = make.__name__.replace("_", "")
        zipped = make is not ten_gigabytes
        make(study.path(label, "Chimap.nii.gz" if zipped else "Chimap.nii"))
    peak = tmp_path / "peak"
    # The peak that getrusage gives begins with that of the process that started this one.
    before = (
        "import atexit, pathlib, re\n"
        f"peak = pathlib.Path({str(peak)!r})\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "usage = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1])\n"
        "atexit.register(lambda: peak.write_text(str(usage() // 1024)))\n"
    )
    run = start(study.arguments(), before=before)
    assert run.finish() == 1
    for make, cause in HOSTILE.items():
        label = make.__name__.replace("_", "")
        (line,) = [line for line in run.said.splitlines() if line.startswith(f"  sub-{label}: ")]
        assert str(study.path(label, "")) in line
        assert cause in line
        assert "Remedy: " in line
    assert study.record("good")["Status"] == "ok"
    assert int(peak.read_text()) < PEAK_MEGABYTES


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def a_pickle(path: Path, harm: Path) -> None:
    path.write_bytes(pickle.dumps(Harm(harm)))


def a_checkpoint(path: Path, harm: Path) -> None:
    import torch

    torch.save({"state_dict": Harm(harm)}, path)


def twenty_gigabytes(path: Path, harm: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[5000000000],"data_offsets":[0,20000000000]}}'
    sparse(path, struct.pack("<Q", len(text)) + text, 20 * 10**9)


def a_long_header(path: Path, harm: Path) -> None:
    sparse(path, struct.pack("<Q", 10**10), 2 * 10**10)


def a_deep_header(path: Path, harm: Path) -> None:
    text = b'{"__metadata__":' + b"[" * 100_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize(
    "make", [a_pickle, a_checkpoint, twenty_gigabytes, a_long_header, a_deep_header]
)
def test_a_model_file_that_is_none_is_refused_by_name_and_never_run(study, capsys, tmp_path, make):
    study.add("01")
    study.model = study.bids.parent / "model.safetensors"
    harm = tmp_path / "harm"
    make(study.model, harm)
    assert study.run() == 65
    (line,) = capsys.readouterr().err.splitlines()
    assert str(study.model) in line
    assert "Remedy: " in line
    assert not harm.exists()
    assert not study.out.exists()


@pytest.mark.parametrize(
    "label", ["sub-../../../evil", "sub-../01", "sub-a b", "sub-\x1b[31m", "sub-01/anat", "sub-"]
)
def test_a_participant_whose_label_is_none_is_named_and_nothing_is_written_for_it(
    study, capsys, label
):
    study.add("01")
    (study.bids / "participants.tsv").write_text(f"participant_id\nsub-01\n{label}\n")
    before = sorted(path for path in study.bids.parent.rglob("*"))
    assert study.run() == 0
    said = capsys.readouterr().err
    assert repr(label)[1:-1] in said.replace("\\\\", "\\")
    assert "\x1b" not in said
    written = {path for path in study.bids.parent.rglob("*")} - set(before)
    assert all(path.is_relative_to(study.out) for path in written)
    assert [path.name for path in study.out.glob("sub-*") if path.is_dir()] == ["sub-01"]


def test_a_line_end_in_a_name_makes_no_second_line(study, capsys):
    path = study.add("01")
    folder = path.parent
    (folder / "sub-01_acq-a\nfdl-bidsapp: all is well_Chimap.nii.gz").write_bytes(path.read_bytes())
    (folder / "sub-01_acq-\x1b[2J_Chimap.nii.gz").write_bytes(path.read_bytes())
    assert study.run() == 0
    said = capsys.readouterr().err
    assert not [line for line in said.splitlines() if line.startswith("fdl-bidsapp: all is well")]
    assert "\x1b" not in said
    assert [row["participant_id"] for row in study.group()] == ["sub-01"] * 2


@pytest.mark.parametrize("label", ["../01", "01/../../x", "01\n", "", "*", "."])
def test_a_label_that_is_a_path_matches_nothing(study, capsys, label):
    study.add("01")
    assert study.run("participant", "--participant-label", label) in (18, 64)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not study.out.exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"EchoTime": 1' + "0" * 400 + "}", "not a time in seconds"),
        ('{"EchoTime": 1e999}', "not a time in seconds"),
        ('{"EchoTime": 1' + "0" * 5000 + "}", "cannot be read as JSON"),
        ('{"EchoTime": NaN}', "no EchoTime"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"EchoTime": 0.004, "x": "' + "a" * 50 * MEGABYTE + '"}', "cannot be read as JSON"),
        ("\x00\x01", "cannot be read as JSON"),
        ('"EchoTime"', "is not a JSON object"),
    ],
    ids=["big", "infinite", "bigger", "nan", "deep", "long", "binary", "text"],
)
def test_a_sidecar_that_is_no_use_is_named_and_the_magnitude_used(study, text, why):
    study.add_echoes("01")
    sidecar = study.path("01", "echo-2_part-mag_MEGRE.json")
    sidecar.write_text(text)
    assert study.run() == 0
    record = study.record("01")
    assert record["Target"] == "imag"
    (note,) = [note for note in record["Notes"] if "R2* was not fitted" in note]
    assert why in note
    assert "echo-2_part-mag_MEGRE" in note


def test_descriptions_that_are_nested_without_end_are_told(study, capsys):
    study.add("01")
    (study.bids / "dataset_description.json").write_text('{"a":' * 100_000)
    assert study.run() == 16
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_records_that_were_tampered_with_fail_their_scan_in_the_table(study):
    for subject in ("01", "02", "03", "04"):
        study.add(subject)
    assert study.run() == 0
    record = study.record("01")
    tampered = {
        "01": "[" * 100_000,
        "02": json.dumps({**record, "Entities": {"subject": "../../evil"}}),
        "03": json.dumps({**record, "Entities": "sub-03"}),
    }
    for subject, text in tampered.items():
        study.output(subject, "morph.json").write_text(text)
    status = {row["participant_id"]: row["status"] for row in study.group()}
    assert status == {"sub-01": "failed", "sub-02": "failed", "sub-03": "failed", "sub-04": "ok"}


def test_a_folder_whose_name_is_no_text_is_refused_in_one_line(study, capsys):
    study.add("01")
    study.bids = study.bids.rename(study.bids.parent / "caf\udce9")
    assert study.run() in (64, 65)
    (line,) = capsys.readouterr().err.splitlines()
    assert "UTF-8" in line
