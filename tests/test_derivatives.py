"""What a scan leaves behind: files, record, and the key that says whether it is up to date."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fdl_bidsapp.bids.inputs import Scan, Source
from fdl_bidsapp.bids.outputs import output_path, read_record
from fdl_bidsapp.derivatives import (
    Provenance,
    remove_missing,
    remove_partial,
    result_key,
    write_failure,
    write_missing,
    write_scan,
)
from fdl_bidsapp.errors import ImageError
from fdl_bidsapp.imaging.confidence import INTERCEPT, SIGNS, Calibration
from fdl_bidsapp.imaging.measure import COLUMNS
from fdl_bidsapp.labels import by_abbreviation
from fdl_bidsapp.pipeline import ScanImages, Segmentation, StandardSpace

LABELS = by_abbreviation(["RNL", "RNR"])
PROVENANCE = Provenance("model", "abc", "key")
AFFINE = np.diag([2.0, 1.0, 1.0, 1.0])


@pytest.fixture
def scan(tmp_path: Path) -> Scan:
    """Give a scan of one map and two echoes that serve two contrasts."""
    paths = [tmp_path / name for name in ("Chimap.nii", "echo-1.nii", "echo-2.nii")]
    for path in paths:
        path.write_text(path.name)
    chi, *echoes = paths
    uris = tuple(f"bids:raw:{path.name}" for path in echoes)
    return Scan(
        (("subject", "01"), ("run", "2")),
        (
            Source("qsm", (chi,), "map", uris=("bids:raw:Chimap.nii",)),
            Source("r2star", tuple(echoes), "echo_fit", (0.004, 0.008), uris),
            Source("imag", tuple(echoes), "echo_mean", (0.004, 0.008), uris),
        ),
    )


@pytest.fixture
def images() -> ScanImages:
    data = np.random.default_rng(0).random((10, 12, 14), dtype=np.float32)
    maps = {"qsm": data, "r2star": data * 50, "imag": data}
    return ScanImages("qsm", maps, AFFINE, ("a note",), 1234.5)


@pytest.fixture
def segmentation() -> Segmentation:
    labels = np.zeros((10, 12, 14), np.uint8)
    labels[2:4, 2:6, 2:6] = 1
    labels[6:8, 2:6, 2:6] = 2
    probabilities = np.stack([labels == 1, labels == 2]).astype(np.float32)
    return Segmentation(labels, probabilities, {"RNL": (1, 0), "RNR": (1, 0)})


def names(out: Path) -> list[str]:
    found = (path.name for path in out.rglob("*") if path.is_file())
    return sorted(name for name in found if name != "lock")


def record(out: Path, scan: Scan) -> dict[str, object]:
    content = read_record(output_path(out, scan.entities, "morph", extension=".json"))
    assert content is not None
    return content


def test_the_record_says_what_was_used_and_measured(tmp_path, scan, images, segmentation):
    out = tmp_path / "out"
    write_scan(out, scan, images, segmentation, LABELS, PROVENANCE)
    content = record(out, scan)
    assert content["Status"] == "ok"
    assert content["Error"] is None
    assert content["Entities"] == {"subject": "01", "run": "2"}
    assert (content["ModelName"], content["ModelSHA256"], content["Key"]) == ("model", "abc", "key")
    assert content["Target"] == "qsm"
    assert content["VoxelVolume"] == 2
    assert content["BrainVolume"] == 1234.5
    assert content["MagneticFieldStrength"] is None
    assert content["Notes"] == ["a note"]
    assert set(COLUMNS) <= set(content)
    header, *rows = output_path(out, scan.entities, "morph").read_text().splitlines()
    assert header.split("\t") == list(COLUMNS)
    assert [row.split("\t")[2] for row in rows] == ["RNL", "RNR"]
    assert float(rows[0].split("\t")[header.split("\t").index("volume")]) == 64


def test_a_calibrated_model_gives_confidence(tmp_path, scan, images, segmentation):
    weights = {INTERCEPT: 1.5, **dict.fromkeys(SIGNS, 0.0)}
    calibration = Calibration({"qsm": {"red_nucleus": weights}}, threshold=0.9)
    for given, expected, shown in ((calibration, 0.817574, "0.817574"), (None, None, "n/a")):
        out = tmp_path / shown.replace("/", "")
        told = replace(segmentation, confidence={"RNL": expected})
        write_scan(out, scan, images, told, LABELS, PROVENANCE, None, {}, (), calibration=given)
        header, row, _ = output_path(out, scan.entities, "morph").read_text().splitlines()
        cells = dict(zip(header.split("\t"), row.split("\t"), strict=True))
        assert cells["confidence"] == shown
        assert ("low_confidence" in cells["qc_flag"]) == (given is not None)


def test_sources_are_named_once_and_only_those_used(tmp_path, scan, images, segmentation):
    out = tmp_path / "out"
    write_scan(out, scan, images, segmentation, LABELS, PROVENANCE)
    path = output_path(out, scan.entities, "dseg", extension=".json")
    every = ["bids:raw:Chimap.nii", "bids:raw:echo-1.nii", "bids:raw:echo-2.nii"]
    assert json.loads(path.read_text())["Sources"] == every
    only = replace(images, maps={"qsm": images.maps["qsm"]})
    write_scan(out, scan, only, segmentation, LABELS, PROVENANCE)
    assert json.loads(path.read_text())["Sources"] == every[:1]
    assert record(out, scan)["InputsUsed"] == {"qsm": every[:1]}


def test_masks_are_parts_of_the_label_map(tmp_path, scan, images, segmentation):
    out = tmp_path / "out"
    write_scan(out, scan, images, segmentation, LABELS, PROVENANCE)
    for label in LABELS:
        path = output_path(out, scan.entities, "mask", label=label.abbreviation)
        mask = nib.load(path)
        np.testing.assert_array_equal(mask.affine, AFFINE)
        assert (np.asarray(mask.dataobj) == (segmentation.labels == label.index)).all()


def test_optional_outputs_go_when_they_are_no_longer_asked_for(
    tmp_path, scan, images, segmentation
):
    out, transform = tmp_path / "out", tmp_path / "transform.h5"
    transform.write_bytes(b"transform")
    marked = segmentation.labels
    image = marked.astype(np.float32)
    standard = StandardSpace("MNI152NLin2009aSym", marked, np.eye(4), transform, image, image)
    asked = replace(PROVENANCE, save_probabilities=True)
    write_scan(out, scan, images, segmentation, LABELS, asked, standard)
    optional = [name for name in names(out) if "probseg" in name or "MNI" in name]
    assert len(optional) == 5
    moved = output_path(out, scan.entities, "dseg", space="MNI152NLin2009aSym", res="1")
    assert int(nib.load(moved).header["sform_code"]) == 4
    assert output_path(out, scan.entities, "xfm", to=standard.space).read_bytes() == b"transform"
    write_scan(out, scan, images, segmentation, LABELS, PROVENANCE)
    assert not [name for name in names(out) if name in optional]


def test_figures_lie_beside_the_masks_and_go_with_them(tmp_path, scan, images, segmentation):
    out = tmp_path / "out"
    figures = {("overview", ""): "<svg/>", ("overlay", "RNL"): "<svg>1</svg>"}
    write_scan(out, scan, images, segmentation, LABELS, PROVENANCE, figures=figures)
    folder = out / "sub-01" / "figures"
    assert sorted(path.name for path in folder.iterdir()) == [
        "sub-01_run-2_seg-fdl_desc-overview_dseg.svg",
        "sub-01_run-2_seg-fdl_label-RNL_desc-overlay_dseg.svg",
    ]
    assert (folder / "sub-01_run-2_seg-fdl_label-RNL_desc-overlay_dseg.svg").read_text() == (
        "<svg>1</svg>"
    )
    other = folder / "sub-01_run-3_seg-fdl_desc-overview_dseg.svg"
    other.touch()
    write_scan(out, scan, images, segmentation, LABELS, PROVENANCE)
    assert list(folder.iterdir()) == [other]


def test_a_failure_leaves_the_record_alone(tmp_path, scan, images, segmentation):
    out = tmp_path / "out"
    write_scan(out, scan, images, segmentation, LABELS, PROVENANCE)
    error = ImageError("it is cut short", "copy it again", path="a.nii")
    write_failure(out, scan, error, PROVENANCE)
    assert names(out) == ["sub-01_run-2_morph.json"]
    content = record(out, scan)
    assert content["Status"] == "failed"
    assert content["Error"] == {
        "Path": "a.nii",
        "Cause": "it is cut short",
        "Remedy": "copy it again",
    }
    assert content["Target"] is None


def test_missing_input_is_recorded_unless_there_are_results(tmp_path, scan, images, segmentation):
    out = tmp_path / "out"
    write_missing(out, "02", "1", PROVENANCE)
    place = Scan((("subject", "02"), ("session", "1")))
    assert record(out, place)["Status"] == "missing_input"
    done = replace(scan, entities=place.entities)
    write_scan(out, done, images, segmentation, LABELS, PROVENANCE)
    write_missing(out, "02", "1", PROVENANCE)
    assert record(out, place)["Status"] == "ok"


def test_the_record_of_missing_input_goes_when_a_scan_is_found(tmp_path, scan):
    out = tmp_path / "out"
    write_missing(out, "01", None, PROVENANCE)
    write_missing(out, "02", None, PROVENANCE)
    remove_missing(out, scan)
    assert names(out) == ["sub-02_morph.json"]


def test_only_files_without_a_record_are_partial(tmp_path, scan, images, segmentation):
    out = tmp_path / "out"
    write_scan(out, scan, images, segmentation, LABELS, PROVENANCE)
    whole = names(out)
    remove_partial(out, scan)
    assert names(out) == whole
    output_path(out, scan.entities, "morph", extension=".json").unlink()
    remove_partial(out, scan)
    assert names(out) == []


def test_the_key_follows_inputs_and_options_and_nothing_else(scan):
    options = {"model": "abc", "target": "auto"}
    key = result_key(scan, options)
    assert result_key(scan, dict(reversed(options.items()))) == key
    assert result_key(scan, {**options, "target": "qsm"}) != key
    path = scan.sources[0].paths[0]
    status = path.stat()
    path.write_text("another content")
    assert result_key(scan, options) != key
    path.write_text(path.name)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert result_key(scan, options) == key
    path.unlink()
    assert result_key(scan, options) != key
    first, *others = scan.sources
    times = replace(others[0], echo_times=(0.005, 0.010))
    changed = replace(scan, sources=(first, times, *others[1:]))
    assert result_key(changed, options) != result_key(scan, options)
    assert result_key(replace(scan, brain_mask=path), options) != result_key(scan, options)
