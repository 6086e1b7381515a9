"""Raw magnitude and phase, and nothing else: maps are made, delivered and segmented."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from fdl_bidsapp.physics.dipole import field_from_susceptibility
from fdl_bidsapp.physics.signal import multi_echo_signal

pytestmark = pytest.mark.real

TIMES = (0.004, 0.012, 0.020)
SHAPE, SPACING = (40, 40, 40), (3.0, 3.0, 3.0)


@pytest.fixture(scope="module")
def signal() -> np.ndarray:
    """Multi-echo signal of a ball of tissue with an iron-rich ball in it."""
    places = np.indices(SHAPE).reshape(3, -1).T * 3.0 - 60.0
    radius = np.linalg.norm(places, axis=1).reshape(SHAPE)
    inner = np.linalg.norm(places - [9, 0, 0], axis=1).reshape(SHAPE) < 8
    chi = np.where(inner, 0.2, 0.0)
    field = field_from_susceptibility(chi, SPACING)
    r2star = np.where(inner, 60.0, 20.0)
    density = np.where(radius < 50, 1.0, 0.0)
    clean = multi_echo_signal(density, r2star, field, TIMES, 3.0, initial_phase=0.3)
    noise = np.random.default_rng(0).normal(0, 0.01, (*clean.shape, 2))
    return clean + noise[..., 0] + 1j * noise[..., 1]


@pytest.fixture
def raw(study, signal):
    """Write a participant's echoes; keyword arguments change what is written."""

    def write(
        *, field_strength: float | None = 3.0, phase: bool = True, scale: float = 1.0, cut: int = 0
    ) -> None:
        folder = study.bids / "sub-01" / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        affine = np.diag([*SPACING, 1.0])
        for echo, time in enumerate(TIMES):
            images = {"mag": 1000 * np.abs(signal[..., echo])}
            if phase:
                images["phase"] = scale * np.angle(signal[..., echo])[: SHAPE[0] - cut]
            for part, data in images.items():
                image = nib.Nifti1Image(data.astype(np.float32), affine)
                image.set_sform(affine, 1)
                stem = folder / f"sub-01_echo-{echo + 1}_part-{part}_MEGRE"
                image.to_filename(f"{stem}.nii.gz")
                about = {"EchoTime": time}
                if field_strength:
                    about["MagneticFieldStrength"] = field_strength
                stem.with_suffix(".json").write_text(json.dumps(about))

    return write


def made(study) -> dict[str, np.ndarray]:
    folder = study.out / "sub-01" / "anat"
    return {
        path.name.removeprefix("sub-01_space-orig_").removesuffix(".nii.gz"): np.asarray(
            nib.load(path).dataobj
        )
        for path in folder.glob("*.nii.gz")
    }


def test_all_maps_are_made_from_magnitude_and_phase_and_delivered(study, raw, signal):
    raw()
    assert study.run("participant") == 0
    maps = made(study)
    for name in (
        "Chimap",
        "R2starmap",
        "T2starmap",
        "desc-echomean_T2starw",
        "desc-swi_T2starw",
        "desc-minip_T2starw",
    ):
        assert maps[name].shape == SHAPE, name
    iron, tissue = (23, 20, 20), (12, 20, 20)
    assert maps["Chimap"][iron] - maps["Chimap"][tissue] == pytest.approx(0.2, abs=0.06)
    assert maps["R2starmap"][iron] == pytest.approx(60, abs=5)
    assert maps["T2starmap"][iron] == pytest.approx(1 / 60, abs=0.002)
    sidecar = json.loads((study.out / "sub-01/anat/sub-01_space-orig_Chimap.json").read_text())
    assert sidecar["Units"] == "ppm"
    assert sidecar["MagneticFieldStrength"] == 3.0
    assert sidecar["DipoleInversion"].startswith("total variation")
    assert 0 < sidecar["TotalVariationWeight"] < 0.01
    assert len(sidecar["Sources"]) == 6
    record = study.record("01")
    assert record["Target"] == "qsm"
    assert record["Derivations"]["qsm"] == "reconstruction"


def test_what_is_made_is_not_made_again(study, raw):
    raw()
    assert study.run("participant", "--recon", "tkd") == 0
    path = study.out / "sub-01/anat/sub-01_space-orig_Chimap.nii.gz"
    before = path.stat().st_mtime_ns
    assert study.run("participant", "--recon", "tkd") == 0
    assert path.stat().st_mtime_ns == before
    path.unlink()
    assert study.run("participant", "--recon", "tkd") == 0
    assert path.exists()


def test_another_reference_is_another_result(study, raw):
    raw()
    sidecar = study.out / "sub-01/anat/sub-01_space-orig_Chimap.json"
    assert study.run("participant", "--recon", "tkd") == 0
    before = sidecar.stat().st_mtime_ns
    assert study.run("participant", "--recon", "tkd", "--qsm-reference", "csf") == 0
    assert sidecar.stat().st_mtime_ns != before
    # There is no fluid in this head.
    assert json.loads(sidecar.read_text())["SusceptibilityReference"] == "mean over the mask"
    assert any("no cerebrospinal fluid" in note for note in study.record("01")["Notes"])


def test_never_leaves_phase_alone(study, raw):
    raw()
    assert study.run("participant", "--recon", "never") == 0
    assert study.record("01")["Target"] == "r2star"
    assert not any("map" in name for name in made(study))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"field_strength": None}, "no MagneticFieldStrength"),
        ({"phase": False}, "there is no phase image"),
        ({"cut": 3}, "shape or affine differs from the magnitude's"),
    ],
)
def test_without_usable_phase_the_rest_goes_on(study, raw, wrong, reason):
    raw(**wrong)
    assert study.run("participant") == 0
    record = study.record("01")
    assert record["Target"] == "r2star"
    assert any("not made" in note and reason in note for note in record["Notes"])
    assert "R2starmap" in made(study)
    assert "Chimap" not in made(study)
