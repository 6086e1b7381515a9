"""Masks lie in the scan's own space, whatever its orientation, voxels and field of view."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytestmark = pytest.mark.real


def rotation(degrees: float) -> np.ndarray:
    """Rotate about z and, half as much, about x."""
    a, b = np.radians([degrees, degrees / 2])
    about_z = [[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]
    about_x = [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    return np.array(about_x) @ np.array(about_z)


def centred(axes: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the affine with these axes and its middle where the middle of the balls is."""
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = (16, 16, 16) - axes @ ((np.array(shape) - 1) / 2)
    return affine


PERMUTED = np.array([[0, 0, -1.0], [1, 0, 0], [0, -1, 0]])
GRIDS = {
    "RAS": (np.eye(3), (32, 32, 32)),
    "LAS": (np.diag([-1.0, 1, 1]), (34, 32, 32)),
    "LPI": (np.diag([-1.0, -1, -1]), (33, 31, 30)),
    "permuted": (PERMUTED, (30, 34, 32)),
    "oblique": (rotation(20), (32, 30, 34)),
    "oblique and permuted": (rotation(-25) @ PERMUTED, (34, 34, 34)),
    "0.7 × 0.7 × 2 mm": (np.diag([-0.7, 0.7, 2]), (46, 44, 16)),
    "0.7 × 0.7 × 2 mm, oblique": (rotation(12) @ np.diag([0.7, 0.7, 2]), (46, 46, 16)),
    "2 mm": (np.diag([2.0, 2, 2]), (16, 16, 16)),
}


@pytest.fixture(scope="module")
def dice():
    def overlap(a: np.ndarray, b: np.ndarray) -> float:
        return float(2 * (a & b).sum() / (a.sum() + b.sum()))

    return overlap


@pytest.mark.parametrize("case", GRIDS)
def test_masks_have_the_scan_s_grid_and_cover_the_structures_in_the_scanner(
    study, blobs, dice, case
):
    axes, shape = GRIDS[case]
    affine = centred(axes, shape)
    source = study.add("01", shape=shape, affine=affine)
    assert study.run() == 0
    labels = study.labels("01")
    assert labels.shape == shape
    np.testing.assert_allclose(labels.affine, nib.load(source).affine, atol=1e-5)
    assert labels.get_data_dtype() == np.uint8
    assert int(labels.header["sform_code"]) == 1
    truth = blobs().truth(shape, affine)
    for value, name in enumerate(("RNL", "RNR"), 1):
        found = np.asarray(labels.dataobj) == value
        assert dice(found, truth == value) >= 0.8
        mask = nib.load(study.output("01", f"space-orig_label-{name}_mask.nii.gz"))
        assert (np.asarray(mask.dataobj).astype(bool) == found).all()
        np.testing.assert_array_equal(mask.affine, labels.affine)
    voxel = abs(np.linalg.det(axes))
    for row in study.group():
        true = float((truth == int(row["index"])).sum() * voxel)
        assert float(row["volume"]) == pytest.approx(true, rel=0.35)


@pytest.mark.parametrize(
    ("bright", "dark"),
    [
        ((8.0, 16, 16), (24.0, 16, 16)),
        ((66.0, 16, 16), (24.0, 16, 16)),
        ((66.0, 33, 20), (6.0, 6, 26)),
        ((70.0, 16, 2), (2.0, 38, 30)),
    ],
)
def test_structures_near_the_end_of_a_large_field_of_view_are_found(
    study, blobs, dice, bright, dark
):
    shape = (72, 40, 32)
    where = blobs(bright=bright, dark=dark)
    study.add("01", blobs=where, shape=shape)
    assert study.run() == 0
    labels, truth = np.asarray(study.labels("01").dataobj), where.truth(shape)
    for value in (1, 2):
        assert dice(labels == value, truth == value) >= 0.8


def test_a_masked_map_with_windows_of_nothing_is_segmented(study, blobs, dice):
    shape = (80, 40, 32)
    where = blobs(bright=(50.0, 20, 16), dark=(66.0, 20, 16))
    data = where.data("qsm", shape)
    data[:36] = 0
    data[5, 5, 5] = 0.01
    image = where.image("qsm", shape)
    nib.Nifti1Image(data, None, image.header).to_filename(study.path("01"))
    assert study.run() == 0
    labels, truth = np.asarray(study.labels("01").dataobj), where.truth(shape)
    for value in (1, 2):
        assert dice(labels == value, truth == value) >= 0.8


def test_uncompressed_maps_and_links_serve_as_they_are(study, blobs):
    elsewhere = study.bids.parent / "annex"
    elsewhere.mkdir()
    target = elsewhere / "SHA256E-s1--abc.nii"
    blobs().image().to_filename(target)
    target.chmod(0o444)
    study.path("01", "Chimap.nii").symlink_to(target)
    assert study.run() == 0
    assert study.record("01")["InputsUsed"]["qsm"] == ["bids:raw:sub-01/anat/sub-01_Chimap.nii"]


@pytest.mark.parametrize("contrast", ["qsm", "r2star", "imag", "swi"])
def test_any_one_contrast_is_enough(study, blobs, dice, contrast):
    study.add("01", (contrast,))
    assert study.run() == 0
    assert study.record("01")["Target"] == contrast
    labels, truth = np.asarray(study.labels("01").dataobj), blobs().truth()
    assert dice(labels == 1, truth == 1) >= 0.9
    assert dice(labels == 2, truth == 2) >= 0.9


def test_raw_echoes_give_r2star_and_magnitude_and_are_named_once(study, blobs, dice):
    study.add_echoes("01")
    assert study.run() == 0
    record = study.record("01")
    assert record["Target"] == "r2star"
    echoes = [f"bids:raw:sub-01/anat/sub-01_echo-{k}_part-mag_MEGRE.nii.gz" for k in (1, 2, 3)]
    assert record["InputsUsed"] == {"r2star": echoes, "imag": echoes}
    for name in ("space-orig_seg-fdl_dseg.json", "space-orig_label-RNL_mask.json"):
        sidecar = json.loads(study.output("01", name).read_text())
        assert sidecar["Sources"] == echoes
        assert sidecar["SpatialReference"] == echoes[0]
    bright, dark = study.group()
    assert float(bright["r2star_median"]) == pytest.approx(90, abs=2)
    assert float(dark["r2star_median"]) == pytest.approx(10, abs=2)
    labels = np.asarray(study.labels("01").dataobj)
    assert dice(labels == 1, blobs().truth() == 1) >= 0.9


def test_units_are_converted_with_a_note(study, blobs):
    image = blobs().image()
    nib.Nifti1Image(image.get_fdata() * 1000, None, image.header).to_filename(study.path("01"))
    t2star = (1000 / blobs().data("r2star")).astype(np.float32)
    nib.Nifti1Image(t2star, None, image.header).to_filename(study.path("01", "T2starmap.nii.gz"))
    assert study.run() == 0
    bright = study.group()[0]
    assert float(bright["qsm_median"]) == pytest.approx(0.2, abs=0.01)
    assert float(bright["r2star_median"]) == pytest.approx(90, abs=2)
    notes = " ".join(study.record("01")["Notes"])
    assert "QSM in ppb was converted to ppm" in notes
    assert "T2* in ms was converted to s" in notes


def test_several_workers_give_the_same_as_one(study):
    for subject in ("01", "02", "03"):
        study.add(subject, ("qsm", "r2star"))
    assert study.run() == 0
    alone = {path: path.read_bytes() for path in study.out.rglob("sub-*.*") if path.is_file()}
    assert len(alone) == 3 * (13 + 1)
    study.out = study.bids.parent / "other"
    assert study.run("participant", "--nprocs", 2) == 0
    for path, content in alone.items():
        other = study.out / path.relative_to(study.bids.parent / "out")
        assert other.read_bytes() == content


def test_flips_and_probabilities_are_options(study):
    study.add("01")
    assert study.run("participant", "--flips", "yes", "--save-probabilities") == 0
    image = nib.load(study.output("01", "space-orig_seg-fdl_probseg.nii.gz"))
    data = image.get_fdata()
    assert 0 <= data.min() <= data.max() <= 1
    sidecar = json.loads(study.output("01", "space-orig_seg-fdl_probseg.json").read_text())
    assert sidecar["LabelMap"] == ["RNL", "RNR"]


def test_the_output_is_valid_bids(study):
    study.add("01", ("qsm", "r2star", "imag"))
    study.add_echoes("02")
    study.path("03").write_text("no image")
    assert study.run("participant", "--save-probabilities") == 1
    study.group()
    command = Path(sys.executable).with_name("bids-validator-deno")
    validator = subprocess.run(
        [command, study.out, "--json"], capture_output=True, text=True, check=False
    )
    issues = json.loads(validator.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_a_dry_run_tells_the_plan_and_writes_nothing(study, capsys):
    study.add("01", ("qsm", "imag"))
    study.add_echoes("02")
    assert study.run("participant", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "qsm (map)  <- segmented" in said
    assert str(study.path("01")) in said
    assert "r2star (echo_fit)  <- segmented" in said
    assert str(study.output("02", "space-orig_seg-fdl_dseg.nii.gz")) in said
    assert not study.out.exists()


def test_a_reader_who_leaves_a_dry_run_is_no_fault_of_the_disk(study):
    study.add("01", ("qsm",))
    app = Path(sys.executable).with_name("fdl-bidsapp")
    shown = subprocess.Popen(
        [app, study.bids, study.out, "participant", "--dry-run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    shown.stdout.close()
    _, told = shown.communicate(timeout=120)
    assert (shown.returncode, told) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("installed", [False, True])
def test_the_graph_is_written_with_or_without_graphviz(study, monkeypatch, capsys, installed):
    import shutil

    if installed and shutil.which("dot") is None:
        pytest.skip("Graphviz is not installed")
    if not installed:
        monkeypatch.setattr(shutil, "which", lambda *_: None)
    study.add("01")
    assert study.run("participant", "--write-graph") == 0
    assert "normalise" in (study.out / "logs" / "graph.dot").read_text()
    assert (study.out / "logs" / "graph.svg").exists() == installed
    assert ("Graphviz is not installed" in capsys.readouterr().err) != installed


def test_a_model_of_other_structures_brings_its_own_label_table(study, make_model):
    from dataclasses import replace

    from fdl_bidsapp.labels import by_abbreviation

    study.add("01")
    left, right = by_abbreviation(("RNL", "RNR"))
    pallidum = {"structure": "pallidum", "mapping": None, "color": "#00ff00"}
    others = (
        replace(left, index=7, name="Pallidum left", abbreviation="GPL", **pallidum),
        replace(right, index=9, name="Pallidum right", abbreviation="GPR", **pallidum),
    )
    ordinary = study.model
    study.model = make_model(study.bids.parent / "pallidum.safetensors", labels=others)
    assert study.run() == 0
    table = (study.out / "seg-fdl_dseg.tsv").read_text().splitlines()
    assert table == [
        "index\tname\tabbreviation\tcolor\tmapping",
        "7\tPallidum left\tGPL\t#00ff00\tn/a",
        "9\tPallidum right\tGPR\t#00ff00\tn/a",
    ]
    assert set(np.unique(study.labels("01").dataobj)) == {0, 7, 9}
    assert [row["abbreviation"] for row in study.group()] == ["GPL", "GPR"]
    before = (study.out / "dataset_description.json").read_bytes()
    study.model = ordinary
    assert study.run() == 73
    assert (study.out / "seg-fdl_dseg.tsv").read_text().splitlines() == table
    assert (study.out / "dataset_description.json").read_bytes() == before


def test_a_model_of_some_nuclei_brings_the_table_of_all(study, make_model):
    study.add("01")
    assert study.run() == 0
    table = (study.out / "seg-fdl_dseg.tsv").read_text()
    assert len(table.splitlines()) == 9
    study.model = make_model(study.bids.parent / "dentate.safetensors", ("DNL", "DNR"))
    assert study.run() == 0
    assert (study.out / "seg-fdl_dseg.tsv").read_text() == table
