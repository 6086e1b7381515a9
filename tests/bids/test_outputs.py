"""Promises of writing derivatives."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fdl_bidsapp.bids.boilerplate import BIBLIOGRAPHY, methods
from fdl_bidsapp.bids.inputs import Scan, find_scans, io_spec
from fdl_bidsapp.bids.outputs import (
    atomic_write,
    dseg_sidecar,
    is_current,
    map_sidecar,
    mask_sidecar,
    output_path,
    prepare_output,
    probseg_sidecar,
    read_record,
    remove_scan_outputs,
    write_image,
    write_json,
    write_text,
    write_tsv,
)
from fdl_bidsapp.errors import OutputError, StorageError
from fdl_bidsapp.labels import nuclei

ALL_ENTITIES = {
    "subject": "01",
    "session": "2",
    "task": "rest",
    "acquisition": "hr",
    "ceagent": "gd",
    "reconstruction": "x",
    "run": "03",
    "chunk": "1",
}
SCAN = Scan((("subject", "01"), ("run", "2")))
MNI = "MNI152NLin2009aSym"


def image(*, volumes: int = 0, dtype: str = "uint8") -> nibabel.Nifti1Image:
    shape = (16, 16, 16, volumes) if volumes else (16, 16, 16)
    data = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    made = nibabel.Nifti1Image(data, np.eye(4))
    made.header.set_xyzt_units("mm", "sec")
    return made


def make_input(root: Path, *names: str) -> Path:
    anat = root / "sub-01" / "anat"
    anat.mkdir(parents=True)
    write_json(
        root / "dataset_description.json",
        {"Name": "test", "BIDSVersion": "1.10.0", "Authors": ["A. A.", "B. B."], "License": "CC0"},
    )
    for name in names:
        write_image(anat / name, image(dtype="float32"))
    return root


def write_scan(out: Path, entities: dict[str, str], *, key: str = "k") -> list[Path]:
    """Write all that one scan can have, the record last."""
    source = "bids:raw:sub-01/anat/sub-01_run-2_Chimap.nii.gz"
    labels = nuclei()
    mni = {"space": MNI, "res": "1"}
    maps = [
        ("dseg", {}, image(), dseg_sidecar([source], source)),
        ("dseg", mni, image(), dseg_sidecar([source], space=MNI, resolution="1 mm, isotropic")),
        (
            "probseg",
            {},
            image(volumes=8, dtype="float32"),
            probseg_sidecar(labels, [source], source),
        ),
        *(
            ("mask", {"label": la.abbreviation}, image(), mask_sidecar(la, [source], source))
            for la in labels
        ),
        *(
            (
                kind,
                {"desc": desc} if desc else {},
                image(),
                map_sidecar(kind, "x", [source], source),
            )
            for kind, desc in [
                ("Chimap", ""),
                ("R2starmap", ""),
                ("T2starmap", ""),
                ("T2starw", "echomean"),
                ("T2starw", "swi"),
                ("T2starw", "minip"),
            ]
        ),
    ]
    written = []
    for kind, extra, content, sidecar in maps:
        written += [
            output_path(out, entities, kind, **extra),
            output_path(out, entities, kind, **extra, extension=".json"),
        ]
        write_image(written[-2], content)
        write_json(written[-1], sidecar)
    written.append(output_path(out, entities, "xfm", to=MNI))
    write_text(written[-1], "transform")
    written.append(output_path(out, entities, "morph"))
    write_tsv(written[-1], [{"abbreviation": la.abbreviation} for la in labels], ["abbreviation"])
    written.append(output_path(out, entities, "morph", extension=".json"))
    made = [path.name for path in written if re.search(r"(map|T2starw)\.nii", path.name)]
    write_json(written[-1], {"Status": "ok", "Key": key, "MapsMade": made})
    return written


def validate(folder: Path) -> tuple[list[str], list[str]]:
    """Return errors and warnings of the BIDS validator as ``CODE location``."""
    command = Path(sys.executable).with_name("bids-validator-deno")
    if not command.exists():
        pytest.skip("bids-validator-deno is not installed")
    run = subprocess.run([command, folder, "--json"], capture_output=True, text=True, check=False)
    issues = json.loads(run.stdout)["issues"]["issues"]
    found: dict[str, list[str]] = {"error": [], "warning": []}
    for issue in issues:
        words = [issue["code"], issue.get("subCode", ""), issue.get("location", "")]
        found.setdefault(issue["severity"], []).append(" ".join(filter(None, words)))
    return found["error"], found["warning"]


@pytest.mark.real
def test_every_output_name_is_valid_bids(tmp_path: Path) -> None:
    source = make_input(tmp_path / "ds", "sub-01_run-2_Chimap.nii.gz")
    out = prepare_output(tmp_path / "out", source, container={"Type": "docker", "Tag": "x:1"})
    entities = [{"subject": "01", "run": "2"}, ALL_ENTITIES]
    written = [path for each in entities for path in write_scan(out, each)]
    kinds = {re.split(r"[_.]", path.name.split("_")[-1])[0] for path in written}
    assert kinds == set(io_spec()["outputs"]["kinds"])
    for name in ("group_morph.tsv", "group_morph.json", "group_morph_wide.tsv"):
        write_text(out / name, "{}\n" if name.endswith("json") else "index\n1\n")
    write_text(out / "sub-01.html", "<html></html>")
    write_text(out / "sub-01/figures/sub-01_seg-fdl_desc-overlay_dseg.svg", "<svg/>")
    errors, warnings = validate(out)
    assert errors == []
    # The validator asks of a table what only an image can have. A sidecar of the table would be
    # inherited by every label map, with a spatial reference that is not theirs.
    assert sorted(warnings) == [
        "SIDECAR_KEY_RECOMMENDED Description /seg-fdl_dseg.tsv",
        "SIDECAR_KEY_RECOMMENDED SpatialReference /seg-fdl_dseg.tsv",
    ]


@pytest.mark.real
def test_an_input_dataset_of_every_contrast_is_valid_bids(tmp_path: Path) -> None:
    maps = ["Chimap", "R2starmap", "part-mag_T2starw", "swi"]
    echoes = [f"echo-{n}_part-mag_MEGRE" for n in (1, 2)]
    root = make_input(tmp_path, *(f"sub-01_{name}.nii.gz" for name in maps + echoes))
    write_text(root / ".bidsignore", "*_swi.*\n")
    write_text(root / "README.md", "A dataset of one participant, for a test of names.\n")
    for number, name in enumerate(echoes, start=1):
        write_json(root / f"sub-01/anat/sub-01_{name}.json", {"EchoTime": 0.005 * number})
    errors, _ = validate(root)
    assert errors == []
    (scan,) = find_scans(root).scans
    assert [s.contrast for s in scan.sources] == ["qsm", "r2star", "imag", "swi"]


def test_names_keep_all_entities_in_the_order_of_bids(tmp_path: Path) -> None:
    names = {
        kind: output_path(tmp_path, ALL_ENTITIES, kind, **extra)
        for kind, extra in {
            "dseg": {"space": MNI, "res": "1"},
            "mask": {"label": "DNR"},
            "morph": {},
        }.items()
    }
    source = "sub-01_ses-2_task-rest_acq-hr_ce-gd_rec-x_run-03"
    assert {path.parent for path in names.values()} == {tmp_path / "sub-01/ses-2/anat"}
    assert names["dseg"].name == f"{source}_space-{MNI}_chunk-1_seg-fdl_res-1_dseg.nii.gz"
    assert names["mask"].name == f"{source}_space-orig_chunk-1_label-DNR_mask.nii.gz"
    assert names["morph"].name == f"{source}_chunk-1_morph.tsv"


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("mask", {}),
        ("dseg", {"label": "RNL"}),
        ("dseg", {"extension": ".txt"}),
        ("morph", {"a": "b"}),
    ],
)
def test_a_name_that_cannot_be_is_refused(kind: str, extra: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="do not make the name"):
        output_path("out", SCAN.entities, kind, **extra)


def test_a_space_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a spatial reference"):
        dseg_sidecar(["bids:raw:a"])


def test_a_failure_while_writing_keeps_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "sub-01_morph.json"
    path.write_text("old")
    program = f"""
        import time
        from fdl_bidsapp.bids.outputs import atomic_write
        with atomic_write({str(path)!r}) as temporary:
            temporary.write_text("half")
            print("writing", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    assert [other.name[0] for other in tmp_path.iterdir() if other != path] == ["."]


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("the system has no /dev/full")

    def fill() -> None:
        with atomic_write(tmp_path / "a.tsv"):
            full.write_text("x")

    with pytest.raises(StorageError, match="free some space") as caught:
        fill()
    assert caught.value.exit_code == 74
    assert caught.value.path == str(tmp_path / "a.tsv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StorageError),
        (errno.EDQUOT, StorageError),
        (errno.EIO, StorageError),
        (errno.ESTALE, StorageError),
        (errno.EACCES, OutputError),
        (errno.EROFS, OutputError),
    ],
)
def test_each_failure_of_the_disk_has_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(error, match=re.escape(os.strerror(number))):
        write_text(tmp_path / "a.txt", "a")
    assert list(tmp_path.iterdir()) == []


def test_the_same_content_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    write_image(path, image())
    first = path.stat()
    time.sleep(1.1)
    write_image(path, image())
    assert path.stat().st_ino == first.st_ino
    assert path.stat().st_mtime_ns == first.st_mtime_ns
    write_image(path, image(dtype="int16"))
    assert path.stat().st_ino != first.st_ino
    assert nibabel.load(path).get_data_dtype() == np.int16


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_an_image_is_read_back_as_written(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / name, image())
    again = nibabel.load(tmp_path / name)
    np.testing.assert_array_equal(np.asanyarray(again.dataobj), np.asanyarray(image().dataobj))
    np.testing.assert_array_equal(again.affine, np.eye(4))


def test_a_table_marks_what_is_missing_and_keeps_its_shape(tmp_path: Path) -> None:
    row = {
        "none": None,
        "nan": float("nan"),
        "inf": np.float32("inf"),
        "empty": "",
        "text": "a\tb\nc",
        "yes": np.bool_(True),
        "count": np.int64(1234567),
        "value": 1 / 3,
        "small": 1.5e-9,
    }
    write_tsv(tmp_path / "a.tsv", [row], [*row, "absent"])
    cells = (tmp_path / "a.tsv").read_text().splitlines()[1].split("\t")
    assert cells == [
        *["n/a"] * 4, "a b c", "true", "1234567", "0.333333", "1.5e-09", "n/a"
    ]  # fmt: skip


def test_output_is_prepared_as_a_derivative_dataset(tmp_path: Path) -> None:
    source = make_input(tmp_path / "my data" / "raw")
    maps = make_input(tmp_path / "qsmxt")
    out = tmp_path / "out" / "fdl"
    prepare_output(out, source, [(None, maps)], version="1.2.3")
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "fdl-bidsapp"
    assert description["GeneratedBy"][0]["Version"] == "1.2.3"
    assert "Container" not in description["GeneratedBy"][0]
    assert (description["License"], description["Authors"]) == ("CC0", ["A. A.", "B. B."])
    assert description["DatasetLinks"] == {"raw": "../../my%20data/raw", "qsmxt": "../../qsmxt"}
    table = [line.split("\t") for line in (out / "seg-fdl_dseg.tsv").read_text().splitlines()]
    assert [(int(row[0]), row[2]) for row in table[1:]] == [
        (label.index, label.abbreviation) for label in nuclei()
    ]
    assert (out / ".bidsignore").read_text().split() == io_spec()["outputs"]["bidsignore"]


def test_preparing_again_changes_nothing_and_keeps_links(tmp_path: Path) -> None:
    source, maps = make_input(tmp_path / "raw"), make_input(tmp_path / "qsmxt")
    out = prepare_output(tmp_path / "out", source, [(None, maps)])
    before = {path: path.stat().st_ino for path in out.rglob("*") if path.is_file()}
    prepare_output(out, source, [(None, maps)])
    prepare_output(out, source)
    assert set(before) == {path for path in out.rglob("*") if path.is_file()}
    for path, inode in before.items():
        if path.name != "dataset_description.json":
            assert path.stat().st_ino == inode
    links = json.loads((out / "dataset_description.json").read_text())["DatasetLinks"]
    assert links == {"raw": "../raw", "qsmxt": "../qsmxt"}


@pytest.mark.parametrize("inside", ["", "sub-01/anat", "sub-out", "sourcedata/fdl"])
def test_raw_data_are_no_output_folder(tmp_path: Path, inside: str) -> None:
    source = make_input(tmp_path / "raw")
    (tmp_path / "link").symlink_to(source)
    before = sorted(source.rglob("*"))
    for root in (source, tmp_path / "link"):
        with pytest.raises(OutputError):
            prepare_output(root / inside, source)
    assert sorted(source.rglob("*")) == before


def test_another_dataset_is_no_output_folder(tmp_path: Path) -> None:
    source, other = make_input(tmp_path / "raw"), make_input(tmp_path / "other")
    with pytest.raises(OutputError, match="holds another dataset"):
        prepare_output(other, source)


def test_derivatives_inside_the_dataset_are_an_output_folder(tmp_path: Path) -> None:
    source = make_input(tmp_path / "raw")
    out = prepare_output(source / "derivatives" / "fdl", source)
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetLinks"] == {"raw": "../.."}


def test_an_output_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    source = make_input(tmp_path / "raw")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file") as caught:
        prepare_output(tmp_path / "file" / "out", source)
    assert caught.value.exit_code == 73
    assert caught.value.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_read_only_output_is_told_even_if_it_is_complete(tmp_path: Path) -> None:
    source = make_input(tmp_path / "raw")
    out = prepare_output(tmp_path / "out", source)
    out.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="out"):
            prepare_output(out, source)
    finally:
        out.chmod(0o755)


def test_a_finished_scan_is_current_until_a_file_or_the_key_is_gone(tmp_path: Path) -> None:
    assert not is_current(tmp_path, SCAN, "k")
    written = write_scan(tmp_path, dict(SCAN.entities))
    assert is_current(tmp_path, SCAN, "k", promised=written)
    assert not is_current(tmp_path, SCAN, "other")
    assert not is_current(tmp_path, SCAN, "k", promised=[tmp_path / "absent"])
    assert not is_current(tmp_path, Scan((("subject", "01"),)), "k")
    always = [path for path in written if not re.search(f"{MNI}|probseg", path.name)]
    for path in always:
        path.rename(tmp_path / "away")
        assert not is_current(tmp_path, SCAN, "k"), path.name
        (tmp_path / "away").rename(path)
    assert is_current(tmp_path, SCAN, "k")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"Key": "k", "Status": "failed"}'])
def test_a_failed_or_broken_record_is_not_current(tmp_path: Path, content: str) -> None:
    record = write_scan(tmp_path, dict(SCAN.entities))[-1]
    record.write_text(content)
    assert not is_current(tmp_path, SCAN, "k")


def test_a_record_is_read_or_none(tmp_path: Path) -> None:
    assert read_record(tmp_path / "absent.json") is None
    write_json(tmp_path / "a.json", {"Key": "k"})
    assert read_record(tmp_path / "a.json") == {"Key": "k"}


def test_removing_a_scan_leaves_its_neighbours(tmp_path: Path) -> None:
    neighbours = [{"subject": "01"}, {"subject": "01", "run": "2", "chunk": "1"}, ALL_ENTITIES]
    kept = [path for each in neighbours for path in write_scan(tmp_path, each)]
    foreign = tmp_path / "sub-01/anat/sub-01_run-2_desc-mine_mask.nii.gz"
    foreign.touch()
    own = write_scan(tmp_path, dict(SCAN.entities))
    with atomic_write(own[0]) as temporary:
        temporary.touch()
        left = temporary.rename(temporary.with_name(f".{'0' * 32}_{own[0].name}"))
        shutil.copy(own[0], temporary)
    removed = remove_scan_outputs(tmp_path, SCAN)
    assert sorted(removed) == sorted([*own, left])
    assert removed[0].name == "sub-01_run-2_morph.json"
    assert not any(path.exists() for path in own)
    assert all(path.exists() for path in [*kept, foreign])
    assert remove_scan_outputs(tmp_path, SCAN) == ()


@pytest.mark.parametrize("registration", [True, False])
def test_all_that_is_cited_is_in_the_bibliography(registration: bool) -> None:
    cited = set(re.findall(r"@(\w+)", methods("1.0", registration=registration)))
    listed = set(re.findall(r"^@\w+\{(\w+),", BIBLIOGRAPHY, re.MULTILINE))
    assert cited <= listed
    assert ("syn" in cited) is registration


@pytest.mark.real
def test_a_file_left_by_a_killed_writer_is_no_part_of_the_dataset(tmp_path: Path) -> None:
    source = make_input(tmp_path / "ds", "sub-01_run-2_Chimap.nii.gz")
    out = prepare_output(tmp_path / "out", source)
    written = write_scan(out, dict(SCAN.entities))
    with atomic_write(written[0]) as temporary:
        shutil.copy(written[0], temporary)
        left = temporary.with_name(temporary.name.replace(".", ".0", 1))
        left.write_bytes(b"half")
    errors, _ = validate(out)
    assert errors == []
