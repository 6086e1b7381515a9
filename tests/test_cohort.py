import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest

from fdl_bidsapp.cohort import collect, widen, write_group
from fdl_bidsapp.errors import DataError, InputMissingError
from fdl_bidsapp.imaging.measure import COLUMNS
from fdl_bidsapp.labels import by_abbreviation

PAIR = by_abbreviation(["RNL", "RNR"])


def write_scan(
    out: Path,
    subject: str,
    *,
    volumes: dict[str, float] | None = None,
    entities: dict[str, str] | None = None,
    **record: Any,
) -> Path:
    """Write a scan's record and, with volumes, its table; return the record's path."""
    entities = {"subject": subject, **(entities or {})}
    folder = out / f"sub-{subject}"
    if "session" in entities:
        folder /= f"ses-{entities['session']}"
    folder = folder / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    short = {"subject": "sub", "session": "ses", "acquisition": "acq", "run": "run"}
    name = "_".join(f"{short.get(key, 'rec')}-{value}" for key, value in entities.items())
    content = {
        "Status": "ok" if volumes else "failed",
        "Error": None,
        "Entities": entities,
        "AppVersion": "0.1.0",
        "ModelName": "late",
        "ModelSHA256": "ab" * 32,
        "Target": "qsm",
        "InputsUsed": {"qsm": [f"bids:raw:sub-{subject}/anat/sub-{subject}_Chimap.nii"]},
        "VoxelVolume": 0.5,
        "BrainVolume": 1_000_000,
        "BrainQSM": -0.004,
        "Notes": [],
    }
    if volumes:
        lines = ["\t".join(COLUMNS)]
        for label in by_abbreviation(volumes):
            row = dict.fromkeys(COLUMNS, "n/a") | {
                "index": str(label.index),
                "name": label.name,
                "abbreviation": label.abbreviation,
                "structure": label.structure,
                "hemisphere": label.hemisphere,
                "volume": f"{volumes[label.abbreviation]:g}",
                "qsm_mean": "0.123456",
                "qc_flag": "ok",
            }
            lines.append("\t".join(row.values()))
        (folder / f"{name}_morph.tsv").write_text("\n".join(lines) + "\n")
    path = folder / f"{name}_morph.json"
    path.write_text(json.dumps(content | record))
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def both(left: float = 200, right: float = 200) -> dict[str, float]:
    return {"RNL": left, "RNR": right}


def test_long_table_has_each_scan_and_structure(tmp_path: Path) -> None:
    write_scan(tmp_path, "02", volumes=both(), entities={"session": "1", "acquisition": "hr"})
    write_scan(tmp_path, "01", volumes=both(150, 250))
    write_group(tmp_path)
    rows = read(tmp_path / "group_morph.tsv")
    assert [(row["participant_id"], row["abbreviation"], row["volume"]) for row in rows] == [
        ("sub-01", "RNL", "150"),
        ("sub-01", "RNR", "250"),
        ("sub-02", "RNL", "200"),
        ("sub-02", "RNR", "200"),
    ]
    assert (rows[0]["session_id"], rows[0]["acquisition"], rows[0]["run"]) == ("n/a",) * 3
    assert (rows[2]["session_id"], rows[2]["acquisition"]) == ("ses-1", "hr")
    assert rows[0]["volume_fraction"] == "0.00015"
    assert rows[0]["qsm_brain_mean"] == "-0.004"
    assert rows[0]["qsm_mean"] == "0.123456"
    assert rows[0]["inputs_used"] == "qsm=bids:raw:sub-01/anat/sub-01_Chimap.nii"
    assert (rows[0]["model_name"], rows[0]["target"], rows[0]["voxel_volume"]) == (
        "late",
        "qsm",
        "0.5",
    )


def test_columns_stand_in_the_agreed_order(tmp_path: Path) -> None:
    write_scan(tmp_path, "01", volumes=both(), entities={"reconstruction": "sos"})
    assert list(collect(tmp_path).columns) == [
        *("participant_id", "session_id", "acquisition", "run", "reconstruction", "status"),
        *COLUMNS,
        *("brain_volume", "volume_fraction", "qsm_brain_mean", "qc_asymmetry", "qc_outlier"),
        *(
            "app_version",
            "model_name",
            "model_sha256",
            "target",
            "inputs_used",
            "voxel_volume",
            "field_strength",
            "scanner_manufacturer",
            "scanner_model",
            "error",
        ),
    ]


def test_every_column_is_described_in_the_dictionary(tmp_path: Path) -> None:
    write_scan(tmp_path, "01", volumes=both())
    write_group(tmp_path)
    for name in ("group_morph", "group_morph_wide"):
        described = json.loads((tmp_path / f"{name}.json").read_text())
        assert list(read(tmp_path / f"{name}.tsv")[0]) == list(described)
        assert all(about["Description"] for about in described.values())
    assert described["RNL_volume"]["Units"] == "mm^3"
    assert described["RNL_volume"]["Description"].startswith("Red nucleus left: ")


def test_failed_and_missing_scans_stay_as_rows(tmp_path: Path) -> None:
    error = {"Path": "sub-02_Chimap.nii", "Cause": "the file is\tcut short", "Remedy": "copy it"}
    write_scan(tmp_path, "01", volumes=both())
    write_scan(tmp_path, "02", Error=error)
    write_scan(tmp_path, "03", Status="missing_input")
    cohort = write_group(tmp_path)
    rows = read(tmp_path / "group_morph.tsv")
    assert [row["status"] for row in rows] == ["ok"] * 2 + ["failed"] * 2 + ["missing_input"] * 2
    assert [row["abbreviation"] for row in rows] == ["RNL", "RNR"] * 3
    assert (rows[2]["name"], rows[2]["volume"]) == ("Red nucleus left", "n/a")
    assert rows[2]["error"] == "the file is cut short"
    assert rows[0]["error"] == "n/a"
    assert cohort.scans == {"failed": 1, "missing_input": 1, "ok": 1}


def test_structure_that_a_scan_was_not_segmented_for_is_a_row_without_values(
    tmp_path: Path,
) -> None:
    write_scan(tmp_path, "01", volumes=both())
    write_scan(tmp_path, "02", volumes={"RNL": 180, "DNL": 700})
    rows = collect(tmp_path).rows
    assert [(row["abbreviation"], row["volume"]) for row in rows] == [
        *(("RNL", 200), ("RNR", 200), ("DNL", None)),
        *(("RNL", 180), ("RNR", None), ("DNL", 700)),
    ]


def test_label_table_gives_the_structures_where_no_scan_succeeded(tmp_path: Path) -> None:
    write_scan(tmp_path, "01")
    assert [row["abbreviation"] for row in collect(tmp_path).rows][:4] == [
        "RNL",
        "RNR",
        "DNL",
        "DNR",
    ]


@pytest.mark.parametrize(
    ("left", "right", "asymmetry"), [(300, 100, 100), (90, 110, -20), (0, 0, None)]
)
def test_asymmetry_is_the_difference_over_the_mean(
    tmp_path: Path, left: float, right: float, asymmetry: float | None
) -> None:
    write_scan(tmp_path, "01", volumes=both(left, right))
    assert [row["qc_asymmetry"] for row in collect(tmp_path).rows] == [asymmetry] * 2


def test_asymmetry_needs_both_sides(tmp_path: Path) -> None:
    write_scan(tmp_path, "01", volumes={"RNL": 100})
    assert collect(tmp_path).rows[0]["qc_asymmetry"] is None


def test_outliers_are_named_by_measure(tmp_path: Path) -> None:
    for number in range(12):
        volumes = both(200 + number, 200 + number if number else 900)
        write_scan(tmp_path, f"{number:02d}", volumes=volumes)
    write_scan(tmp_path, "99")
    rows = collect(tmp_path).rows
    assert [row["qc_outlier"] for row in rows[:4]] == ["none", "volume", "none", "none"]
    assert [row["qc_outlier"] for row in rows[-2:]] == [None, None]


def test_few_scans_have_no_outliers(tmp_path: Path) -> None:
    for number in range(9):
        write_scan(tmp_path, f"{number}", volumes=both(200 + number if number else 900))
    assert {row["qc_outlier"] for row in collect(tmp_path).rows} == {None}


def test_participants_are_joined_with_their_descriptions(tmp_path: Path) -> None:
    out, bids = tmp_path / "out", tmp_path / "bids"
    bids.mkdir()
    (bids / "participants.tsv").write_text(
        "participant_id\tage\tstatus\nsub-01\t63\tcontrol\nsub-02\tn/a\tPD\nsub-03\t70\tPD\n"
    )
    (bids / "participants.json").write_text('{"age": {"Description": "Age", "Units": "year"}}')
    write_scan(out, "01", volumes=both())
    write_scan(out, "02", volumes=both())
    write_scan(out, "07", volumes=both())
    write_group(out, bids)
    rows = read(out / "group_morph.tsv")[::2]
    assert [(row["participant_id"], row["age"], row["status_participants"]) for row in rows] == [
        ("sub-01", "63", "control"),
        ("sub-02", "n/a", "PD"),
        ("sub-03", "70", "PD"),
        ("sub-07", "n/a", "n/a"),
    ]
    assert rows[2]["status"] == "missing_input"
    assert rows[2]["error"] == "no output found: run the participant level"
    described = json.loads((out / "group_morph.json").read_text())
    assert described["age"] == {"Description": "Age", "Units": "year"}
    assert "status_participants" in described


def test_what_a_session_says_comes_before_what_is_said_of_the_participant(tmp_path: Path) -> None:
    out, bids = tmp_path / "out", tmp_path / "bids"
    (bids / "sub-01").mkdir(parents=True)
    (bids / "participants.tsv").write_text(
        "participant_id\tage\tsex\nsub-01\t63\tF\nsub-02\t70\tM\n"
    )
    (bids / "sub-01" / "sub-01_sessions.tsv").write_text(
        "session_id\tage\tupdrs\nses-1\tn/a\t12\nses-2\t65.5\t19\n"
    )
    (bids / "sessions.json").write_text('{"updrs": {"Description": "MDS-UPDRS III"}}')
    write_scan(out, "01", volumes=both(), entities={"session": "1"})
    write_scan(out, "01", volumes=both(), entities={"session": "2"})
    write_scan(out, "02", volumes=both())
    cohort = write_group(out, bids)
    assert not cohort.warnings
    rows = read(out / "group_morph.tsv")[::2]
    assert [(row["age"], row["sex"], row["updrs"]) for row in rows] == [
        ("63", "F", "12"),
        ("65.5", "F", "19"),
        ("70", "M", "n/a"),
    ]
    described = json.loads((out / "group_morph.json").read_text())
    assert described["updrs"] == {"Description": "MDS-UPDRS III"}


def test_unusable_tables_of_sessions_are_one_warning(tmp_path: Path) -> None:
    out, bids = tmp_path / "out", tmp_path / "bids"
    for label in ("01", "02"):
        (bids / f"sub-{label}").mkdir(parents=True)
        (bids / f"sub-{label}" / f"sub-{label}_sessions.tsv").write_text("visit\tage\n1\t60\n")
        write_scan(out, label, volumes=both(), entities={"session": "1"})
    (warning,) = collect(out, bids).warnings
    assert "sub-01_sessions.tsv: not joined" in warning
    assert "1 more" in warning


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (b"name\tage\n01\t3\n", "no column participant_id"),
        (b"", "no rows"),
        (b"participant_id\tage\nsub-01\t\xff\n", "cannot be read"),
        (b"participant_id\tage\nsub-01\t3\nsub-01\t4\n", "sub-01 is listed twice"),
    ],
)
def test_unusable_participants_table_is_a_warning(
    tmp_path: Path, text: bytes, warning: str
) -> None:
    (tmp_path / "participants.tsv").write_bytes(text)
    write_scan(tmp_path / "out", "01", volumes=both())
    cohort = collect(tmp_path / "out", tmp_path)
    assert warning in cohort.warnings[0]
    assert cohort.scans == {"ok": 1}


def test_ragged_participants_rows_are_filled(tmp_path: Path) -> None:
    table = "\ufeffparticipant_id\tage\tsex\nsub-01\t3\nsub-02\t4\tF\textra\n"
    (tmp_path / "participants.tsv").write_text(table, encoding="utf-8")
    (tmp_path / "participants.json").write_text("{")
    write_scan(tmp_path / "out", "01", volumes=both())
    cohort = write_group(tmp_path / "out", tmp_path)
    assert [(row["age"], row["sex"]) for row in cohort.rows[::2]] == [("3", None), ("4", "F")]
    assert "participants.json" in cohort.warnings[0]


@pytest.mark.parametrize(
    "text",
    ["", '{"Status": "ok"', "[]", '{"Status": "fine", "Entities": {"subject": "02"}}', "{}"],
)
def test_broken_record_is_a_failed_scan(tmp_path: Path, text: str) -> None:
    write_scan(tmp_path, "01", volumes=both())
    broken = write_scan(tmp_path, "02", volumes=both(), entities={"session": "1", "run": "3"})
    broken.write_text(text)
    rows = collect(tmp_path).rows
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "failed"]
    assert (rows[2]["participant_id"], rows[2]["session_id"], rows[2]["run"]) == (
        "sub-02",
        "ses-1",
        "3",
    )
    assert "sub-02_ses-1_run-3_morph.json cannot be read" in rows[2]["error"]


@pytest.mark.parametrize("text", [None, "", "index\tname\n1\n", "\t".join(COLUMNS) + "\n1\tRed"])
def test_broken_table_is_a_failed_scan(tmp_path: Path, text: str | None) -> None:
    write_scan(tmp_path, "01", volumes=both())
    table = write_scan(tmp_path, "02", volumes=both()).with_suffix(".tsv")
    table.unlink()
    if text is not None:
        table.write_text(text)
    rows = collect(tmp_path).rows
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "failed"]
    assert "sub-02_morph.tsv cannot be read" in rows[2]["error"]


def test_words_where_a_number_belongs_are_a_failed_scan(tmp_path: Path) -> None:
    table = write_scan(tmp_path, "01", volumes=both(123)).with_suffix(".tsv")
    table.write_text(table.read_text().replace("\t123\t", "\tmany\t"))
    assert collect(tmp_path).scans == {"failed": 1}


def test_table_without_record_is_a_failed_scan(tmp_path: Path) -> None:
    write_scan(tmp_path, "01", volumes=both()).unlink()
    (row, *_) = collect(tmp_path).rows
    assert (row["participant_id"], row["status"]) == ("sub-01", "failed")
    assert "sub-01_morph.json is missing" in row["error"]


def test_wide_table_has_one_row_a_scan_with_the_same_values(tmp_path: Path) -> None:
    write_scan(tmp_path, "01", volumes=both(150, 250))
    write_scan(tmp_path, "01", volumes=both(160, 260), entities={"session": "2"})
    write_scan(tmp_path, "02")
    cohort = collect(tmp_path)
    rows, columns = widen(cohort)
    assert [(row["participant_id"], row["session_id"], row["status"]) for row in rows] == [
        ("sub-01", None, "ok"),
        ("sub-01", "ses-2", "ok"),
        ("sub-02", None, "failed"),
    ]
    assert [(row["RNL_volume"], row["RNR_volume"]) for row in rows] == [
        (150, 250),
        (160, 260),
        (None, None),
    ]
    assert set(rows[0]) == set(columns)
    assert list(columns)[:6] == [
        *("participant_id", "session_id", "acquisition", "run", "status", "RNL_volume")
    ]
    assert not {"index", "name", "abbreviation"} & set(columns)


def test_second_run_writes_the_same_bytes(tmp_path: Path) -> None:
    tables = ("group_morph", "group_morph_wide", "group_summary")
    names = [f"{name}.{kind}" for name in tables for kind in ("tsv", "json")]
    write_scan(tmp_path, "01", volumes=both())
    write_group(tmp_path)
    first = [(tmp_path / name).read_bytes() for name in names]
    write_group(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == first
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "sub-01"])


def test_rows_are_in_natural_order(tmp_path: Path) -> None:
    for label in ("10", "2", "A1"):
        write_scan(tmp_path, label, volumes=both())
    write_scan(tmp_path, "2", volumes=both(), entities={"run": "10"})
    write_scan(tmp_path, "2", volumes=both(), entities={"run": "9"})
    rows = collect(tmp_path).rows[::2]
    assert [(row["participant_id"], row["run"]) for row in rows] == [
        *(("sub-2", None), ("sub-2", "9"), ("sub-2", "10"), ("sub-10", None), ("sub-A1", None))
    ]


def test_mixed_models_and_versions_are_warned_of(tmp_path: Path) -> None:
    write_scan(tmp_path, "01", volumes=both())
    assert collect(tmp_path).warnings == ()
    write_scan(tmp_path, "02", volumes=both(), ModelSHA256="cd" * 32, AppVersion="0.2.0")
    write_scan(tmp_path, "03", volumes=both(), Target="r2star")
    warnings = collect(tmp_path).warnings
    assert [warning.split("(")[0] for warning in warnings] == [
        "the table mixes 2 versions of fdl-bidsapp ",
        "the table mixes 2 models ",
        "the table mixes 2 target contrasts ",
    ]


def test_different_field_strengths_are_told_and_warned_of(tmp_path: Path) -> None:
    write_scan(tmp_path, "01", volumes=both(), MagneticFieldStrength=3, Manufacturer="A")
    write_scan(tmp_path, "02", volumes=both(), MagneticFieldStrength=2.89)
    write_scan(tmp_path, "03", volumes=both())
    assert collect(tmp_path).warnings == ()
    write_scan(tmp_path, "04", volumes=both(), MagneticFieldStrength=7.0)
    cohort = collect(tmp_path)
    assert [row["field_strength"] for row in cohort.rows[::2]] == [3, 2.89, None, 7]
    assert [row["scanner_manufacturer"] for row in cohort.rows[:4:2]] == ["A", None]
    (warning,) = cohort.warnings
    assert "different field strengths (2.89 to 7 T)" in warning


def test_folder_without_results_says_what_to_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputMissingError, match="run the participant level first"):
            write_group(folder)
    assert list(tmp_path.iterdir()) == []


def test_five_thousand_scans_take_seconds(tmp_path: Path) -> None:
    structures = ("RNL", "RNR", "DNL", "DNR")
    for number in range(5000):
        volumes = dict.fromkeys(structures, 200 + number % 7)
        write_scan(tmp_path, f"{number:04d}", volumes=volumes)
    start = time.perf_counter()
    cohort = write_group(tmp_path)
    assert time.perf_counter() - start < 30
    assert len(cohort.rows) == 5000 * len(structures)


def ratings(path: Path, *lines: str) -> Path:
    heading = "scan,abbreviation,rating,comment,rater"
    path.write_text("\n".join(line.replace(",", "\t") for line in (heading, *lines)) + "\n")
    return path


def test_ratings_become_columns_of_both_tables(tmp_path: Path) -> None:
    write_scan(tmp_path, "01", volumes=both(), entities={"session": "1"})
    write_scan(tmp_path, "02", volumes=both())
    file = ratings(tmp_path / "r.tsv", "sub-01_ses-1,RNL,bad,a vein,A", "sub-02,RNR,good,n/a,n/a")
    write_group(tmp_path, ratings=[file])
    rows = read(tmp_path / "group_morph.tsv")
    assert [(row["rating"], row["rating_comment"]) for row in rows] == [
        ("bad", "A: a vein"),
        ("n/a", "n/a"),
        ("n/a", "n/a"),
        ("good", "n/a"),
    ]
    assert read(tmp_path / "group_morph_wide.tsv")[0]["RNL_rating"] == "bad"
    described = json.loads((tmp_path / "group_morph.json").read_text())
    assert set(described["rating"]["Levels"]) == {"good", "needs editing", "bad"}
    (everybody,) = [
        row
        for row in read(tmp_path / "group_summary.tsv")
        if (row["measure"], row["abbreviation"]) == ("volume", "RNL")
    ]
    assert (everybody["n"], everybody["n_rated_bad"]) == ("1", "1")


def test_of_several_ratings_the_worst_counts_and_all_comments_stay(tmp_path: Path) -> None:
    write_scan(tmp_path, "01", volumes=both())
    first = ratings(tmp_path / "a.tsv", "sub-01,RNL,good,fine,A")
    second = ratings(tmp_path / "b.tsv", "sub-01,RNL,needs editing,top,B")
    cohort = collect(tmp_path, ratings=[first, second])
    assert cohort.rows[0]["rating"] == "needs editing"
    assert cohort.rows[0]["rating_comment"] == "A: fine; B: top"
    assert cohort.warnings == ("1 structures are rated differently: the worst rating counts",)


def test_ratings_that_fit_nothing_are_told(tmp_path: Path) -> None:
    write_scan(tmp_path, "01", volumes=both())
    file = ratings(tmp_path / "r.tsv", "sub-09,RNL,good", "sub-01,RNL,splendid", "sub-01")
    unreadable, unmatched = collect(tmp_path, ratings=[file]).warnings
    assert "line 3 is left out" in unreadable
    assert unmatched == "1 ratings are of no scan in the output folder (sub-09 RNL)"


def test_a_file_that_holds_no_ratings_is_refused(tmp_path: Path) -> None:
    write_scan(tmp_path, "01", volumes=both())
    with pytest.raises(InputMissingError, match="ratings is not there"):
        collect(tmp_path, ratings=[tmp_path / "absent.tsv"])
    other = tmp_path / "other.tsv"
    other.write_text("participant_id\tage\nsub-01\t60\n")
    with pytest.raises(DataError, match="this is no file of ratings"):
        collect(tmp_path, ratings=[other])


def test_normal_ranges_are_written_while_there_are_controls_enough(tmp_path: Path) -> None:
    bids = tmp_path / "bids"
    bids.mkdir()
    lines = ["participant_id\tage\tdx"]
    for k in range(20):
        write_scan(tmp_path, f"{k:02d}", volumes=both(200 + k % 7))
        lines.append(f"sub-{k:02d}\t{40 + k}\tHC")
    (bids / "participants.tsv").write_text("\n".join(lines) + "\n")
    write_group(tmp_path, bids)
    rows = read(tmp_path / "group_norms.tsv")
    assert {row["n_controls"] for row in rows} == {"20"}
    assert all(float(row["p05"]) <= float(row["p50"]) <= float(row["p95"]) for row in rows)
    (bids / "participants.tsv").write_text("\n".join(lines[:-1]) + "\n")
    write_group(tmp_path, bids)
    assert not list(tmp_path.glob("group_norms.*"))


def test_a_record_of_another_participant_is_a_failure(tmp_path: Path) -> None:
    path = write_scan(tmp_path, "01", volumes=both())
    path.write_text(path.read_text().replace('"subject": "01"', '"subject": "../02"'))
    row = collect(tmp_path).rows[0]
    assert (row["participant_id"], row["status"]) == ("sub-01", "failed")
    assert "another participant" in row["error"]
