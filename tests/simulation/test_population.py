from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from fdl_bidsapp.cli.toolbox import run
from fdl_bidsapp.simulation.labelmaps import head_map
from fdl_bidsapp.simulation.parameters import effects, table
from fdl_bidsapp.simulation.simulator import simulate_label_map

from ..made_up_heads import TABLE, made_up_labels

FAST = ["in_plane=4", "slice_thickness=4", "inversion=tikhonov", "echoes=3", "field_map=laplacian"]
SET = [word for value in FAST for word in ("--set", value)]


@pytest.fixture(scope="module")
def label_maps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    labels, affine = made_up_labels()
    rows = [f"{index}\t{name}\t{side}" for index, (name, side) in TABLE.items()]
    (folder / "dseg.tsv").write_text("\n".join(["index\tname\themisphere", *rows]) + "\n")
    nib.Nifti1Image(labels, affine).to_filename(folder / "sub-1_dseg.nii.gz")
    return folder


@pytest.fixture(scope="module")
def dataset(label_maps, tmp_path_factory):
    base = tmp_path_factory.mktemp("dataset")
    words = ["simulate", base / "bids", "--truth", base / "truth", "--labels-dir", label_maps]
    words += ["--participants", 2, "--echoes", "--seed", 3, "--device", "cpu", *SET]
    assert run([str(word) for word in words]) == 0
    return base


def test_every_scan_has_its_maps_echoes_and_truth(dataset):
    for name in ("sub-01", "sub-02"):
        found = {p.name for p in (dataset / "bids" / name / "anat").iterdir()}
        stems = ["Chimap", "R2starmap", "part-mag_T2starw", "rec-swi_T2starw"]
        stems += [f"echo-{e}_part-{part}_MEGRE" for e in (1, 2, 3) for part in ("mag", "phase")]
        assert found == {f"{name}_{s}.{e}" for s in stems for e in ("nii.gz", "json")}
        labels = nib.load(dataset / "truth" / name / "anat" / f"{name}_dseg.nii.gz")
        qsm = nib.load(dataset / "bids" / name / "anat" / f"{name}_Chimap.nii.gz")
        np.testing.assert_allclose(labels.affine, qsm.affine, atol=1e-5)
        assert labels.shape == qsm.shape
        assert len(np.unique(np.asarray(labels.dataobj))) > 4


def test_a_scan_can_be_made_again_from_its_sidecar(dataset):
    truth = json.loads((dataset / "truth/sub-02/anat/sub-02_dseg.json").read_text())
    assert set(truth["Effects"]) == set(effects())
    labels, affine = made_up_labels()
    head = head_map(truth["LabelMap"], labels, affine, TABLE)
    scan = simulate_label_map(head, truth["Seed"], truth["Effects"])
    qsm = nib.load(dataset / "bids/sub-02/anat/sub-02_Chimap.nii.gz").get_fdata()
    np.testing.assert_allclose(scan.maps["qsm"].numpy(), qsm, atol=1e-4)


def test_a_gallery_is_drawn(label_maps, tmp_path):
    figure = tmp_path / "gallery.png"
    words = ["simulate", "--gallery", figure, "--labels-dir", label_maps, "--participants", 1]
    assert run([str(word) for word in [*words, "--device", "cpu", *SET]]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size > 10_000


def test_the_effects_are_described(capsys):
    assert run(["simulate", "--describe"]) == 0
    assert capsys.readouterr().out == table()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["x"], "--truth"),
        (["x", "--truth", "y", "--set", "snr=3"], "--labels-dir"),
        (["--gallery", "z.png"], "--labels-dir"),
        (["x", "--truth", "y", "--labels-dir", "nowhere"], "no such folder"),
    ],
)
def test_what_is_missing_is_asked_for(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["simulate", *words]) > 0
    assert told in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "told"), [("snr", "EFFECT=VALUE"), ("snir=3", "snr is meant")])
def test_an_effect_that_is_none_is_refused_before_anything_is_written(
    value, told, label_maps, tmp_path, capsys
):
    out = tmp_path / "out"
    words = [str(out), "--truth", str(tmp_path / "t"), "--labels-dir", str(label_maps)]
    assert run(["simulate", *words, "--set", value]) == 64
    assert told in capsys.readouterr().err
    assert not out.exists()
