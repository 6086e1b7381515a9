"""Real acquisitions and the layouts of other tools, as they stand beside the repository."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.models.bundle import shipped_models

SHARED = Path(__file__).parents[3] / "shared" / "data"
MEGRE = SHARED / "megre" / "dcm_qa_philips_enh"
LAYOUTS = SHARED / "bids_layouts"

pytestmark = [
    pytest.mark.real,
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside the repository"),
]


DEFAULT = pytest.param(
    "default",
    marks=pytest.mark.skipif("default" not in shipped_models(), reason="no default model yet"),
)


@pytest.fixture
def raw_echoes(study):
    """Give a raw dataset of two real echoes, magnitude and phase, as links to the files."""
    for echo in (1, 2):
        for ending, part in (("", "mag"), ("_ph", "phase")):
            stem = MEGRE / f"2001_WIP_fcMRI_Field_Mapping_cl_e{echo}{ending}"
            name = f"echo-{echo}_part-{part}_MEGRE"
            study.path("01", f"{name}.nii.gz").symlink_to(f"{stem}.nii.gz")
            study.path("01", f"{name}.json").symlink_to(f"{stem}.json")
    return study


@pytest.mark.parametrize("model", ["tiny", DEFAULT])
def test_real_raw_echoes_go_through_participant_and_group(raw_echoes, make_model, model):
    study = raw_echoes
    study.model = model
    if model == "tiny":
        path = study.bids.parent / "tiny.safetensors"
        study.model = make_model(path, grid_shape=(80, 80, 56), grid_spacing=(3.0, 3.0, 3.0))
    assert study.run("participant", "--save-probabilities") == 0
    source = nib.load(study.path("01", "echo-1_part-mag_MEGRE.nii.gz"))
    labels = study.labels("01")
    assert labels.shape == source.shape == (80, 80, 53)
    np.testing.assert_allclose(labels.affine, source.affine, atol=1e-4)
    record = study.record("01")
    assert record["Target"] == "qsm"
    assert record["Derivations"] == {
        "qsm": "reconstruction",
        "r2star": "echo_fit",
        "imag": "echo_mean",
        "swi": "reconstruction",
    }
    assert {row["status"] for row in study.group()} == {"ok"}


@pytest.mark.skipif("default" not in shipped_models(), reason="no default model yet")
def test_the_default_model_finds_the_nuclei_of_the_real_head(raw_echoes):
    """A quality far below what it is for: 3 mm, two early echoes. Places are as seen by eye."""
    raw_echoes.model = "default"
    assert raw_echoes.run("participant") == 0
    labels = np.asarray(raw_echoes.labels("01").dataobj)
    for label in nuclei():
        x, y, z = np.argwhere(labels == label.index).mean(0)
        assert (x < 40) == (label.hemisphere == "L")
        if label.structure == "dentate_nucleus":
            assert 22 < y < 30
            assert 12 < z < 18
        else:
            assert 32 < y < 42
            assert 21 < z < 28


def test_iron_of_the_real_head_is_paramagnetic(raw_echoes):
    from fdl_bidsapp.imaging.reconstruction import RawEchoes, reconstruct

    files = [f"echo-{echo}_part-{part}_MEGRE" for part in ("mag", "phase") for echo in (1, 2)]
    images = [nib.load(raw_echoes.path("01", f"{file}.nii.gz")) for file in files]
    first, second, *phases = (image.get_fdata(dtype=np.float32) for image in images)
    magnitude, phase = np.stack([first, second], -1), np.stack(phases, -1)
    for turned in (1, -1):
        made = reconstruct(
            RawEchoes(magnitude, turned * phase, images[0].affine, (0.0023, 0.0046), 3.0), "tkd"
        )
        assert made.parameters["PhaseSign"] == turned
        # Putamen and pallidum of both sides, as they are seen in the picture.
        iron = np.concatenate(
            [made.maps["qsm"][part, 42:47, 28] for part in (slice(33, 37), slice(43, 47))]
        )
        assert iron.mean() > 0.03
        # Neither face nor neck: a brain of 1.3 to 1.7 litres, less its rim.
        assert 1100 < made.mask.sum() * 0.027 < 1700


def test_r2star_of_the_real_head_is_physiological(raw_echoes):
    from fdl_bidsapp.bids.inputs import find_scans
    from fdl_bidsapp.imaging.grid import foreground
    from fdl_bidsapp.pipeline import read_scan

    (scan,) = find_scans(raw_echoes.bids).scans
    source = scan.get("r2star")
    assert source is not None
    sidecar = json.loads(raw_echoes.path("01", "echo-2_part-mag_MEGRE.json").read_text())
    assert source.echo_times == (0.0023, sidecar["EchoTime"])
    images = read_scan(scan, "auto", ("r2star",))
    head = foreground(images.maps["imag"])
    assert 0.2 < head.mean() < 0.8
    assert 5 < np.median(images.maps["r2star"][head]) < 100


@pytest.mark.parametrize(
    ("layout", "derivatives", "subject", "status", "cause"),
    [
        ("qmri_megre", None, "01", "failed", "the file is empty"),
        ("qmri_qsm", "derivatives/qMRLab", "01", "failed", "the file is empty"),
        ("qmri_qsm", None, "01", "missing_input", "no usable contrast"),
        ("ds000001-fmriprep", None, "10", "missing_input", "no usable contrast"),
    ],
)
def test_layouts_of_empty_images_end_as_clean_failures(
    study, capsys, layout, derivatives, subject, status, cause
):
    study.bids = LAYOUTS / layout
    options = ("--derivatives", study.bids / derivatives) if derivatives else ()
    assert study.run("participant", *options) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith(f"  sub-{subject}: ")]
    assert cause in line
    assert study.outputs(subject) == [f"sub-{subject}_morph.json"]
    assert study.record(subject)["Status"] == status
    assert {row["status"] for row in study.group()} == {status}
