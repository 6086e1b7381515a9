"""Maps made from raw echoes, as plain functions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from torch import nn

from fdl_bidsapp.bids.inputs import Scan, Source
from fdl_bidsapp.errors import ImageError, InputMissingError, ModelError
from fdl_bidsapp.making import make_maps, needs_making, network_inversion, recon_identity
from fdl_bidsapp.models.bundle import save_volume
from fdl_bidsapp.models.pedqnet import VolumeNetwork, VolumeSpec

SHAPE, TIMES = (34, 34, 34), (0.005, 0.015)
AFFINE = np.diag([3.0, 3.0, 3.0, 1.0])


def images() -> dict[str, np.ndarray]:
    """Two echoes of a ball that decays at 30 1/s."""
    places = np.indices(SHAPE).reshape(3, -1).T - 16.5
    inside = np.linalg.norm(places, axis=1).reshape(SHAPE) < 14
    noise = np.random.default_rng(0).uniform(-np.pi, np.pi, SHAPE)
    made = {}
    for echo, time in enumerate(TIMES):
        made[f"mag{echo}"] = np.where(inside, 100 * np.exp(-30 * time), 0.5)
        made[f"phase{echo}"] = np.where(
            inside, 20 * time * np.cos(places[:, 0] / 9).reshape(SHAPE), noise
        )
    return made


@pytest.fixture
def scan(tmp_path: Path) -> Scan:
    for name, data in images().items():
        image = nib.Nifti1Image(data.astype(np.float32), AFFINE)
        image.set_sform(AFFINE, 1)
        image.to_filename(tmp_path / f"{name}.nii")
    magnitudes, phases = (
        tuple(tmp_path / f"{part}{echo}.nii" for echo in range(2)) for part in ("mag", "phase")
    )
    uris = tuple(f"bids:raw:{path.name}" for path in (*magnitudes, *phases))
    raw = {"echo_times": TIMES, "uris": uris}
    phased = {"phase": phases, "field_strength": 3.0, **raw}
    return Scan(
        (("subject", "01"),),
        (
            Source("qsm", magnitudes, "reconstruction", **phased),
            Source("r2star", magnitudes, "echo_fit", **raw),
            Source("imag", magnitudes, "echo_mean", **raw),
            Source("swi", magnitudes, "reconstruction", **phased),
        ),
    )


def test_made_maps_take_the_place_of_the_echoes(scan, tmp_path):
    made = make_maps(scan, "tkd", tmp_path)
    assert {s.contrast: s.derivation for s in made.scan.sources} == dict.fromkeys(
        ("qsm", "r2star", "imag", "swi"), "map"
    )
    assert not needs_making(made.scan)
    names = [(each.kind, each.entities.get("desc")) for each in made.maps]
    assert names == [
        ("T2starw", "echomean"),
        ("R2starmap", None),
        ("T2starmap", None),
        ("Chimap", None),
        ("T2starw", "swi"),
        ("T2starw", "minip"),
    ]
    rate = nib.load(made.scan.get("r2star").paths[0])
    assert float(rate.dataobj[17, 17, 17]) == pytest.approx(30, abs=0.01)
    np.testing.assert_array_equal(rate.affine, AFFINE)


def test_only_what_is_lacking_is_made(scan, tmp_path):
    have = Source("qsm", (tmp_path / "Chimap.nii",), "map")
    some = replace(scan, sources=(have, *scan.sources[1:]))
    made = make_maps(some, "tkd", tmp_path)
    assert made.scan.get("qsm") == have
    assert "Chimap" not in [each.kind for each in made.maps]
    assert "swi" in [each.entities.get("desc") for each in made.maps]


def spoil(path: Path, data: np.ndarray) -> None:
    nib.Nifti1Image(data.astype(np.float32), AFFINE).to_filename(path)


@pytest.mark.parametrize(
    ("phase", "reason"),
    [
        (np.zeros(SHAPE), "every value is 0"),
        (np.random.default_rng(0).normal(0, 8, SHAPE), "unit of the phase cannot be told"),
        (np.indices((8, 8, 8))[0], "shape or affine differs"),
    ],
    ids=["constant", "unknown unit", "other shape"],
)
def test_phase_that_cannot_be_used_leaves_the_magnitudes_maps(scan, tmp_path, phase, reason):
    for echo in range(2):
        spoil(tmp_path / f"phase{echo}.nii", phase)
    made = make_maps(scan, "auto", tmp_path)
    assert [s.contrast for s in made.scan.sources] == ["r2star", "imag"]
    (note,) = [note for note in made.scan.notes if "not made" in note]
    assert reason in note


def test_echoes_of_different_shapes_are_refused(scan, tmp_path):
    spoil(tmp_path / "mag1.nii", np.indices((8, 8, 8))[0])
    with pytest.raises(ImageError, match="differs from the first echo's"):
        make_maps(scan, "auto", tmp_path)


def test_an_empty_brain_mask_is_told_and_the_brain_looked_for(scan, tmp_path):
    spoil(tmp_path / "empty.nii", np.zeros(SHAPE))
    made = make_maps(replace(scan, brain_mask=tmp_path / "empty.nii"), "tkd", tmp_path)
    assert made.scan.get("qsm") is not None
    assert any("empty.nii" in note for note in made.scan.notes)


def test_a_brain_mask_that_lies_nobody_knows_where_is_not_used(scan, tmp_path):
    mask = nib.Nifti1Image(np.pad(np.ones((6, 6, 6), np.uint8), 1), np.eye(4))
    mask.set_sform(None, 0)
    mask.to_filename(tmp_path / "elsewhere.nii")
    made = make_maps(replace(scan, brain_mask=tmp_path / "elsewhere.nii"), "tkd", tmp_path)
    assert made.scan.get("qsm") is not None
    assert any("elsewhere.nii" in note and "headers" in note for note in made.scan.notes)


def test_a_network_reconstructs_and_is_named_in_the_sidecar(scan, tmp_path):
    spec = VolumeSpec("tiny", backbone_options={"width": 4, "levels": 2}, patch=(32, 32, 32))
    network = VolumeNetwork(spec)
    nn.init.normal_(network.last.weight)
    sha256 = save_volume(tmp_path / "tiny.safetensors", network, spec)
    recon = str(tmp_path / "tiny.safetensors")
    made = make_maps(scan, recon, tmp_path)
    (chi,) = [each for each in made.maps if each.kind == "Chimap"]
    assert chi.sidecar["DipoleInversion"] == f"network tiny, SHA-256 {sha256}"
    assert recon_identity(recon) == sha256


def test_a_network_sees_every_scan_upright(tmp_path):
    spec = VolumeSpec("tiny", backbone_options={"width": 4, "levels": 2}, patch=(16, 16, 16))
    network = VolumeNetwork(spec)
    nn.init.normal_(network.last.weight)
    save_volume(tmp_path / "tiny.safetensors", network, spec)
    invert, _ = network_inversion(str(tmp_path / "tiny.safetensors"))
    field = np.random.default_rng(0).normal(0, 0.01, (16, 18, 20)).astype(np.float32)
    mask = np.ones(field.shape, bool)
    upright = invert(field, mask, (1, 1, 2), np.array([0.0, 0.0, 1.0]), mask, 16.0)
    # The same scan lying on its side, as sagittal slices do.
    turned, inside = (data.swapaxes(0, 2)[::-1] for data in (field, mask))
    found = invert(turned, inside, (2, 1, 1), np.array([-1.0, 0.0, 0.0]), inside, 16.0)
    np.testing.assert_allclose(found, upright.swapaxes(0, 2)[::-1], atol=1e-6)
    assert np.ptp(upright) > 0


def test_what_is_no_reconstruction_is_told_before_anything_is_done(tmp_path):
    assert recon_identity("auto") == "tv"
    assert recon_identity("never") == "never"
    with pytest.raises(ModelError, match="task is not susceptibility"):
        recon_identity("default")
    with pytest.raises(InputMissingError):
        recon_identity(str(tmp_path / "absent.safetensors"))
