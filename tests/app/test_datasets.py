"""Datasets as people have them: sessions, runs, maps of another tool beside the raw data."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_maps_of_a_qsm_tool_join_the_raw_echoes_of_their_scan(study, blobs):
    study.add_echoes("01")
    tool = study.bids / "derivatives" / "qsmtool"
    (tool / "sub-01" / "anat").mkdir(parents=True)
    (tool / "dataset_description.json").write_text(
        json.dumps(
            {
                "Name": "maps",
                "BIDSVersion": "1.10.0",
                "DatasetType": "derivative",
                "GeneratedBy": [{"Name": "qsmtool"}],
            }
        )
    )
    blobs().image().to_filename(tool / "sub-01" / "anat" / "sub-01_Chimap.nii")
    before = files_of(study.bids)
    assert study.run("participant", "--derivatives", tool) == 0
    assert files_of(study.bids) == before
    record = study.record("01")
    assert record["Target"] == "qsm"
    assert record["InputsUsed"]["qsm"] == ["bids:qsmtool:sub-01/anat/sub-01_Chimap.nii"]
    assert len(record["InputsUsed"]["r2star"]) == 3
    description = json.loads((study.out / "dataset_description.json").read_text())
    links = description["DatasetLinks"]
    assert (study.out / links["qsmtool"]).resolve() == tool.resolve()
    assert (study.out / links["raw"]).resolve() == study.bids.resolve()
    bright = study.group()[0]
    assert float(bright["qsm_median"]) == pytest.approx(0.2, abs=0.01)
    assert float(bright["r2star_median"]) == pytest.approx(90, abs=2)


def test_the_maps_of_a_tool_alone_are_a_dataset(study):
    study.add("01", ("qsm", "imag"))
    path = study.bids / "dataset_description.json"
    description = json.loads(path.read_text())
    made = {"DatasetType": "derivative", "GeneratedBy": [{"Name": "qsmtool"}]}
    path.write_text(json.dumps({**description, **made}))
    assert study.run() == 0
    assert study.record("01")["InputsUsed"]["qsm"] == [
        "bids:input:sub-01/anat/sub-01_Chimap.nii.gz"
    ]


def test_sessions_acquisitions_and_runs_each_have_their_masks_and_rows(study):
    source = study.add("01")
    made = []
    for session, name in (
        ("1", "acq-hr_run-1"),
        ("1", "acq-hr_run-2"),
        ("2", "acq-lr_run-1"),
    ):
        folder = study.bids / "sub-02" / f"ses-{session}" / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"sub-02_ses-{session}_{name}"
        shutil.copyfile(source, folder / f"{stem}_Chimap.nii.gz")
        made.append((f"ses-{session}", *(part.split("-")[1] for part in name.split("_"))))
    (study.bids / "participants.tsv").write_text(
        "participant_id\tage\tsex\nsub-01\t61\tF\nsub-02\t70\tM\n"
    )
    assert study.run() == 0
    rows = study.group()
    assert len(rows) == 2 * 4
    found = [
        (row["session_id"], row["acquisition"], row["run"])
        for row in rows
        if row["participant_id"] == "sub-02" and row["abbreviation"] == "RNL"
    ]
    assert found == made
    assert {row["age"] for row in rows if row["participant_id"] == "sub-02"} == {"70"}
    wide = (study.out / "group_morph_wide.tsv").read_text().splitlines()
    assert len(wide) == 1 + 4
    assert (
        study.out / "sub-02/ses-1/anat/sub-02_ses-1_acq-hr_run-2_space-orig_label-RNL_mask.nii.gz"
    ).is_file()
    command = Path(sys.executable).with_name("bids-validator-deno")
    validator = subprocess.run(
        [command, study.out, "--json"], capture_output=True, text=True, check=False
    )
    issues = json.loads(validator.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []


def test_only_what_is_asked_for_is_done_and_the_group_gathers_all(study):
    for subject in ("01", "02", "03"):
        study.add(subject)
    assert study.run("participant", "--participant-label", "sub-02") == 0
    assert sorted(path.name for path in study.out.glob("sub-*")) == ["sub-02", "sub-02.html"]
    assert study.run("participant", "--participant-label", "01", "03") == 0
    assert [row["participant_id"] for row in study.group()][::2] == ["sub-01", "sub-02", "sub-03"]


def test_the_output_may_lie_in_the_dataset_and_is_not_taken_for_input(study):
    study.add("01")
    study.out = study.bids / "derivatives" / "fdl-bidsapp"
    assert study.run() == 0
    assert study.run() == 0
    assert {row["participant_id"] for row in study.group()} == {"sub-01"}


def test_a_folder_without_description_is_read_when_validation_is_skipped(study, capsys):
    study.add("01")
    (study.bids / "dataset_description.json").unlink()
    assert study.run() == 16
    assert "--skip-bids-validation" in capsys.readouterr().err
    assert study.run("participant", "--skip-bids-validation") == 0
    assert study.record("01")["Status"] == "ok"
