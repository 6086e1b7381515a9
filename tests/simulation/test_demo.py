from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fdl_bidsapp.errors import UsageError
from fdl_bidsapp.imaging.relaxometry import r2star_loglinear
from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.simulation import demo, scan
from fdl_bidsapp.simulation.demo import plan_cohort, simulate_dataset

MAPS = ("Chimap", "R2starmap", "part-mag_T2starw", "rec-swi_T2starw")
ECHOES = tuple(f"echo-{e}_part-{part}_MEGRE" for e in range(1, 6) for part in ("mag", "phase"))


@pytest.fixture(scope="module")
def coarse():
    """Large voxels, so that a head takes well under a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            demo,
            "plan_cohort",
            lambda n, seed: [replace(p, spacing=(4.0, 4.0, 4.0)) for p in plan_cohort(n, seed)],
        )
        yield


@pytest.fixture(scope="module")
def folders(coarse, tmp_path_factory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("demo")
    simulate_dataset(base / "bids", base / "truth", participants=3, seed=5)
    return base / "bids", base / "truth"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def scans_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.nii.gz"))


def sidecar(image: Path) -> dict:
    return json.loads(image.with_name(image.name.replace(".nii.gz", ".json")).read_text())


def test_the_first_is_scanned_twice_and_the_last_has_only_echoes():
    cohort = plan_cohort(5, seed=1)
    assert [p.label for p in cohort] == ["01", "02", "03", "04", "05"]
    assert [p.sessions for p in cohort] == [("1", "2")] + [(None,)] * 4
    assert [p.raw for p in cohort] == [False] * 4 + [True]


def test_a_single_participant_has_maps():
    assert [(p.raw, p.sessions) for p in plan_cohort(1, seed=0)] == [(False, ("1", "2"))]


def test_the_cohort_is_mixed_and_follows_from_the_seed():
    cohort = plan_cohort(60, seed=0)
    assert cohort == plan_cohort(60, seed=0) != plan_cohort(60, seed=1)
    assert 20 <= sum(p.person.parkinson for p in cohort) <= 40
    assert {p.sex for p in cohort} == {"F", "M"}
    assert all(45 <= p.person.age <= 80 for p in cohort)
    assert len({p.person.age for p in cohort}) > 15
    # A larger cohort begins with the smaller one, but for who has only echoes.
    assert [p.person for p in plan_cohort(4, seed=0)] == [p.person for p in cohort[:4]]


@pytest.mark.parametrize("n", [0, -1, 10_000])
def test_refuses_an_impossible_number_of_participants(n):
    with pytest.raises(UsageError, match=str(n)):
        plan_cohort(n, seed=0)


def test_writes_exactly_the_files_of_the_plan(folders):
    stems = ["sub-01/ses-1/anat/sub-01_ses-1", "sub-01/ses-2/anat/sub-01_ses-2"]
    stems += ["sub-02/anat/sub-02", "sub-03/anat/sub-03"]
    expected = {"README.md", "dataset_description.json", "participants.tsv", "participants.json"}
    for stem in stems:
        for suffix in ECHOES if "sub-03" in stem else MAPS:
            expected |= {f"{stem}_{suffix}.nii.gz", f"{stem}_{suffix}.json"}
    assert names(folders[0]) == expected
    truth = {"README.md", "dataset_description.json", "dseg.tsv"}
    assert names(folders[1]) == truth | {
        f"{stem}_dseg{extension}" for stem in stems for extension in (".nii.gz", ".json")
    }


def test_participants_are_those_of_the_plan(folders):
    with (folders[0] / "participants.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for row, planned in zip(rows, plan_cohort(3, seed=5), strict=True):
        assert row == {
            "participant_id": f"sub-{planned.label}",
            "age": str(int(planned.person.age)),
            "sex": planned.sex,
            "diagnosis": "PD" if planned.person.parkinson else "control",
        }
    described = json.loads((folders[0] / "participants.json").read_text())
    assert set(described) == {"age", "sex", "diagnosis"}
    assert {row["diagnosis"] for row in rows} <= set(described["diagnosis"]["Levels"])


def test_sidecars_give_units_and_echo_times(folders):
    protocol = plan_cohort(1, seed=5)[0].protocol
    units = {"Chimap": "ppm", "R2starmap": "1/s", "T2starw": "arbitrary"}
    for image in scans_of(folders[0]):
        metadata = sidecar(image)
        assert metadata["MagneticFieldStrength"] == protocol.field_strength
        suffix = image.name.split("_")[-1].removesuffix(".nii.gz")
        if suffix == "MEGRE":
            echo = int(image.name.split("echo-")[1][0])
            assert metadata["EchoTime"] == protocol.echo_times[echo - 1]
            assert metadata["Units"] == ("rad" if "part-phase" in image.name else "arbitrary")
            continue
        assert metadata["Units"] == units[suffix]
        if "rec-swi" in image.name:
            assert metadata["EchoTime"] == protocol.echo_times[protocol.swi_echo]
        else:
            assert metadata["EchoTime"] == list(protocol.echo_times)


def test_truth_lies_on_the_grid_of_its_scan_and_holds_every_nucleus(folders):
    bids, truth = folders
    for dseg in scans_of(truth):
        labels = nib.load(dseg)
        assert labels.get_data_dtype() == np.uint8
        stem = dseg.name.removesuffix("dseg.nii.gz")
        images = list((bids / dseg.relative_to(truth).parent).glob(f"{stem}*.nii.gz"))
        assert images
        for image in map(nib.load, images):
            assert image.shape == labels.shape
            np.testing.assert_allclose(image.affine, labels.affine, atol=1e-4)
            assert image.header["qform_code"] == image.header["sform_code"] == 1
        present = set(np.unique(np.asarray(labels.dataobj))) - {0}
        assert {1, 2, 3, 4} <= present <= {label.index for label in nuclei()}
    with (truth / "dseg.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["abbreviation"] for row in rows] == [label.abbreviation for label in nuclei()]


def test_labels_lie_on_the_patients_side(folders):
    for dseg in map(nib.load, scans_of(folders[1])):
        labels = np.asarray(dseg.dataobj)
        left, right = (
            (dseg.affine[:3, :3] @ np.argwhere(labels == index).mean(0) + dseg.affine[:3, 3])[0]
            for index in (3, 4)
        )
        assert left < right - 15


def test_sixteen_bits_lose_nothing_that_matters(folders):
    image = nib.load(folders[0] / "sub-02/anat/sub-02_Chimap.nii.gz")
    assert image.get_data_dtype() == np.int16
    assert image.dataobj.slope < 2e-4
    image = nib.load(folders[0] / "sub-02/anat/sub-02_R2starmap.nii.gz")
    assert image.dataobj.slope < 0.02


def test_echoes_make_the_r2star_of_tissue(folders):
    stem = folders[0] / "sub-03/anat"
    echoes = [nib.load(stem / f"sub-03_{name}.nii.gz").get_fdata() for name in ECHOES[::2]]
    phase = nib.load(stem / f"sub-03_{ECHOES[1]}.nii.gz").get_fdata()
    assert np.abs(phase).max() == pytest.approx(np.pi, abs=0.01)
    times = plan_cohort(1, seed=5)[0].protocol.echo_times
    r2star = r2star_loglinear(np.stack(echoes, -1).astype(np.float32), times)
    truth = np.asarray(nib.load(folders[1] / "sub-03/anat/sub-03_dseg.nii.gz").dataobj)
    assert 15 < np.median(r2star[truth > 0]) < 50


def test_the_same_seed_gives_the_same_bytes(coarse, folders, tmp_path):
    written = []
    simulate_dataset(
        tmp_path / "bids", tmp_path / "truth", participants=3, seed=5, progress=written.append
    )
    assert written == ["sub-01_ses-1", "sub-01_ses-2", "sub-02", "sub-03"]
    for first, second in zip(folders, (tmp_path / "bids", tmp_path / "truth"), strict=True):
        assert names(first) == names(second)
        for name in names(first):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_another_seed_gives_another_head(coarse, folders, tmp_path):
    simulate_dataset(tmp_path / "bids", tmp_path / "truth", participants=1, seed=6)
    name = "sub-01/ses-1/anat/sub-01_ses-1_dseg.nii.gz"
    first, other = (
        nib.load(folder / name).get_fdata() for folder in (folders[1], tmp_path / "truth")
    )
    assert np.any(first != other)


def test_sessions_share_head_and_tissue_and_nothing_else(coarse, tmp_path, monkeypatch):
    drawn = []

    def draw(*arguments, **options):
        drawn.append(draw_tissues(*arguments, **options))
        return drawn[-1]

    draw_tissues = scan.draw_tissues
    monkeypatch.setattr(scan, "draw_tissues", draw)
    simulate_dataset(tmp_path / "bids", tmp_path / "truth", participants=2, seed=5)
    first, second, other = drawn
    assert first == second != other

    images = [nib.load(path) for path in sorted((tmp_path / "bids").rglob("*Chimap.nii.gz"))]
    assert np.any(images[0].affine != images[1].affine)
    truths = [nib.load(path) for path in scans_of(tmp_path / "truth")]
    places = [
        t.affine[:3, :3] @ np.argwhere(np.asarray(t.dataobj) == 3).mean(0) + t.affine[:3, 3]
        for t in truths
    ]
    assert np.linalg.norm(places[0] - places[1]) < 3
    assert np.linalg.norm(places[0] - places[1]) < np.linalg.norm(places[0] - places[2])


@pytest.mark.real
def test_the_app_finds_every_scan(folders):
    from fdl_bidsapp.bids.inputs import find_scans

    found = find_scans(folders[0])
    assert not found.missing
    derivations = {
        tuple(dict(s.entities).values()): {o.contrast: o.derivation for o in s.sources}
        for s in found.scans
    }
    maps = dict.fromkeys(("qsm", "r2star", "imag", "swi"), "map")
    assert derivations == {
        ("01", "1"): maps,
        ("01", "2"): maps,
        ("02",): maps,
        ("03",): {
            "qsm": "reconstruction",
            "r2star": "echo_fit",
            "imag": "echo_mean",
            "swi": "reconstruction",
        },
    }


@pytest.mark.real
def test_both_datasets_are_valid_bids(folders):
    command = Path(sys.executable).with_name("bids-validator-deno")
    if not command.exists():
        pytest.skip("bids-validator-deno is not installed")
    for folder in folders:
        run = subprocess.run([command, folder, "--json"], capture_output=True, text=True)
        issues = json.loads(run.stdout)["issues"]["issues"]
        assert [issue for issue in issues if issue["severity"] == "error"] == []
