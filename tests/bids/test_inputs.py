"""Promises of finding scans."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fdl_bidsapp.bids.inputs import Scan, find_scans, open_datasets, scanner_of
from fdl_bidsapp.errors import (
    AmbiguousInputError,
    InputMissingError,
    NoMatchError,
    NotADatasetError,
    OutputError,
    StorageError,
    UsageError,
)

LAYOUTS = Path(__file__).parents[2].parent / "shared" / "data" / "bids_layouts"


def make_dataset(root: Path, *names: str, derivative: bool = False) -> Path:
    """Write empty files into the folders their names ask for."""
    root.mkdir(parents=True, exist_ok=True)
    description = {"Name": "test", "BIDSVersion": "1.10.0"}
    if derivative:
        description["DatasetType"] = "derivative"
    (root / "dataset_description.json").write_text(json.dumps(description))
    for name in names:
        folder = root / "/".join(p for p in name.split("_") if p[:4] in ("sub-", "ses-")) / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return root


def make_echoes(root: Path, stem: str, times: list[float | None]) -> None:
    """Write echoes with one sidecar each."""
    for number, time in enumerate(times, start=1):
        name = f"sub-01_echo-{number}_{stem}"
        make_dataset(root, f"{name}.nii.gz")
        content = {} if time is None else {"EchoTime": time}
        (root / f"sub-01/anat/{name}.json").write_text(json.dumps(content))


def only_scan(*args: object, **kwargs: object) -> Scan:
    scans = find_scans(*args, **kwargs).scans  # type: ignore[arg-type]
    assert len(scans) == 1
    return scans[0]


@pytest.mark.parametrize(
    ("name", "contrast", "derivation"),
    [
        ("Chimap", "qsm", "map"),
        ("space-orig_Chimap", "qsm", "map"),
        ("desc-tgv_Chimap", "qsm", "map"),
        ("R2starmap", "r2star", "map"),
        ("T2starmap", "r2star", "inverse_t2star"),
        ("desc-echomean_T2starw", "imag", "map"),
        ("part-mag_T2starw", "imag", "map"),
        ("rec-mean_T2starw", "imag", "map"),
        ("echo-1_part-mag_MEGRE", "imag", "echo_mean"),
        ("echo-1_MEGRE", "imag", "echo_mean"),
        ("echo-1_part-mag_T2starw", "imag", "echo_mean"),
        ("echo-1_T2starw", "imag", "echo_mean"),
        ("swi", "swi", "map"),
        ("desc-swi_T2starw", "swi", "map"),
        ("rec-swi_T2starw", "swi", "map"),
        ("acq-swi_T2starw", "swi", "map"),
    ],
)
def test_knows_every_spelling(tmp_path: Path, name: str, contrast: str, derivation: str) -> None:
    root = make_dataset(tmp_path, f"sub-01_{name}.nii.gz")
    scan = only_scan(root)
    assert [(s.contrast, s.derivation) for s in scan.sources] == [(contrast, derivation)]
    assert scan.source_prefix == "sub-01"
    path = f"sub-01/anat/sub-01_{name}.nii.gz"
    assert scan.sources[0].paths == (root / path,)
    assert scan.sources[0].uris == (f"bids:raw:{path}",)


@pytest.mark.parametrize(
    "name",
    [
        "desc-paramagnetic_Chimap",
        "desc-diamagnetic_Chimap",
        "desc-total_Chimap",
        "space-MNI152NLin2009cAsym_Chimap",
        "space-MNI152NLin6Asym_res-2_R2starmap",
        "part-phase_T2starw",
        "echo-1_part-phase_MEGRE",
        "echo-1_part-real_MEGRE",
        "echo-1_part-imag_MEGRE",
        "acq-swi_part-phase_T2starw",
        "T2starw",
        "part-mag_T1w",
        "T1w",
    ],
)
def test_leaves_out_what_is_no_input(tmp_path: Path, name: str) -> None:
    discovery = find_scans(make_dataset(tmp_path, f"sub-01_{name}.nii.gz"))
    assert discovery.scans == ()
    assert discovery.missing == (("01", None),)


@pytest.mark.parametrize(
    ("contrast", "names"),
    [
        ("r2star", ["R2starmap", "T2starmap"]),
        ("imag", ["desc-echomean_T2starw", "part-mag_T2starw", "rec-mean_T2starw"]),
        ("imag", ["rec-mean_T2starw", "echo-1_MEGRE", "echo-1_T2starw"]),
        ("swi", ["swi", "desc-swi_T2starw", "rec-swi_T2starw", "acq-swi_T2starw"]),
    ],
)
def test_takes_the_preferred_of_several(tmp_path: Path, contrast: str, names: list[str]) -> None:
    while names:
        first, *rest = names
        root = make_dataset(tmp_path / first, *(f"sub-01_{n}.nii.gz" for n in [*rest, first]))
        source = only_scan(root).get(contrast)
        assert source is not None
        assert source.paths[0].name == f"sub-01_{first}.nii.gz"
        names = rest


def test_maps_of_one_scan_share_their_entities(tmp_path: Path) -> None:
    prefix = "sub-01_ses-2_acq-hr_run-02"
    maps = ["Chimap", "R2starmap", "part-mag_T2starw", "swi"]
    root = make_dataset(
        tmp_path,
        *(f"{prefix}_{m}.nii" for m in maps),
        "sub-01_ses-2_acq-hr_run-03_Chimap.nii",
        "sub-01_ses-1_Chimap.nii",
    )
    scans = find_scans(root).scans
    assert [scan.source_prefix for scan in scans] == [
        "sub-01_ses-1",
        prefix,
        "sub-01_ses-2_acq-hr_run-03",
    ]
    assert [s.contrast for s in scans[1].sources] == ["qsm", "r2star", "imag", "swi"]
    assert (scans[1].subject, scans[1].session) == ("01", "2")
    assert (scans[1].acquisition, scans[1].run) == ("hr", "02")


def test_echoes_give_magnitude_and_r2star(tmp_path: Path) -> None:
    make_echoes(tmp_path, "part-mag_MEGRE", [0.005, 0.010, 0.015])
    scan = only_scan(tmp_path)
    imag, r2star = scan.get("imag"), scan.get("r2star")
    assert imag is not None
    assert r2star is not None
    assert (imag.derivation, r2star.derivation) == ("echo_mean", "echo_fit")
    assert r2star.echo_times == (0.005, 0.010, 0.015)
    assert [path.name[7:13] for path in r2star.paths] == ["echo-1", "echo-2", "echo-3"]


def test_ten_echoes_are_in_order_of_number(tmp_path: Path) -> None:
    make_echoes(tmp_path, "MEGRE", [0.004 * n for n in range(1, 12)])
    source = only_scan(tmp_path).get("r2star")
    assert source is not None
    assert [path.name.split("_")[1] for path in source.paths][8:] == [
        "echo-9",
        "echo-10",
        "echo-11",
    ]


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ([0.005], "only one echo"),
        ([0.005, None], "echo-2_MEGRE.nii.gz has no EchoTime"),
        ([0.005, 0.005], "echo-2_MEGRE.nii.gz is not longer"),
        ([0.010, 0.005], "echo-2_MEGRE.nii.gz is not longer"),
        ([5.0, 10.0], "is 5.0, not a time in seconds"),
    ],
)
def test_echoes_that_cannot_be_fitted_still_give_magnitude(
    tmp_path: Path, times: list[float | None], reason: str
) -> None:
    make_echoes(tmp_path, "MEGRE", times)
    scan = only_scan(tmp_path)
    assert scan.error is None
    assert scan.get("r2star") is None
    assert scan.get("imag") is not None
    assert sum(reason in note for note in scan.notes) == 1


def test_the_sidecars_say_which_scanner_it_was(tmp_path: Path) -> None:
    raw, maps = tmp_path / "raw", tmp_path / "maps"
    make_echoes(raw, "MEGRE", [0.004, 0.008])
    (raw / "MEGRE.json").write_text('{"MagneticFieldStrength": 3, "Manufacturer": " Some\\tone "}')
    make_dataset(maps, "sub-01_Chimap.nii.gz", "sub-01_R2starmap.nii.gz", derivative=True)
    scan = only_scan(raw, derivatives=[("maps", maps)])
    said = {"MagneticFieldStrength": 3.0, "Manufacturer": "Some one"}
    assert scanner_of(scan) == said | {"ManufacturersModelName": None}
    # What is segmented comes before what is not.
    own = {"MagneticFieldStrength": 7, "ManufacturersModelName": "One", "Manufacturer": 5}
    (maps / "Chimap.json").write_text(json.dumps(own))
    scan = only_scan(raw, derivatives=[("maps", maps)])
    assert scanner_of(scan) == {**own, "Manufacturer": "Some one"}
    for wrong in ('"3T"', "true", "123.2", "-3", "null"):
        (maps / "Chimap.json").write_text(f'{{"MagneticFieldStrength": {wrong}}}')
        assert scanner_of(scan)["MagneticFieldStrength"] == 3
    (maps / "Chimap.json").write_text("{")
    assert scanner_of(scan)["MagneticFieldStrength"] == 3


def test_a_broken_sidecar_is_named_in_a_note(tmp_path: Path) -> None:
    make_echoes(tmp_path, "MEGRE", [0.005, 0.010])
    (tmp_path / "sub-01/anat/sub-01_echo-2_MEGRE.json").write_text("{")
    scan = only_scan(tmp_path)
    assert scan.get("r2star") is None
    assert any("sub-01_echo-2_MEGRE.json cannot be read" in note for note in scan.notes)


def make_raw(root: Path, *, numbers: tuple[int, ...] = (1, 2), **about: object) -> None:
    """Write magnitude and phase of echoes; ``about`` goes into every sidecar."""
    parts = ("mag", "phase")
    names = [f"sub-01_echo-{number}_part-{part}_MEGRE" for number in numbers for part in parts]
    make_dataset(root, *(f"{name}.nii.gz" for name in names))
    for name in names:
        time = 0.005 * int(name.split("echo-")[1][0])
        content = {"EchoTime": time, "MagneticFieldStrength": 3, **about}
        (root / "sub-01/anat" / f"{name}.json").write_text(
            json.dumps({key: value for key, value in content.items() if value is not None})
        )


def test_magnitude_and_phase_give_susceptibility_and_swi(tmp_path: Path) -> None:
    make_raw(tmp_path, Units="rad")
    scan = only_scan(tmp_path)
    assert [source.contrast for source in scan.sources] == ["qsm", "r2star", "imag", "swi"]
    source = scan.get("qsm")
    assert source is not None
    assert source.derivation == "reconstruction"
    assert [path.name for path in source.paths] == [
        "sub-01_echo-1_part-mag_MEGRE.nii.gz",
        "sub-01_echo-2_part-mag_MEGRE.nii.gz",
    ]
    assert [path.name for path in source.phase] == [
        "sub-01_echo-1_part-phase_MEGRE.nii.gz",
        "sub-01_echo-2_part-phase_MEGRE.nii.gz",
    ]
    assert len(source.uris) == 4
    assert (source.echo_times, source.field_strength) == ((0.005, 0.010), 3.0)
    assert source.phase_unit == "rad"
    assert not scan.notes


def test_a_map_is_preferred_to_one_that_has_to_be_made(tmp_path: Path) -> None:
    make_raw(tmp_path)
    make_dataset(tmp_path, "sub-01_Chimap.nii.gz")
    scan = only_scan(tmp_path)
    assert {s.contrast: s.derivation for s in scan.sources} == {
        "qsm": "map",
        "r2star": "echo_fit",
        "imag": "echo_mean",
        "swi": "reconstruction",
    }


def test_nothing_is_made_of_phase_where_that_is_not_wanted(tmp_path: Path) -> None:
    make_raw(tmp_path)
    scan = only_scan(tmp_path, reconstruct=False)
    assert [source.contrast for source in scan.sources] == ["r2star", "imag"]
    assert not scan.notes


def test_a_single_echo_without_a_number_is_enough_for_susceptibility(tmp_path: Path) -> None:
    make_dataset(tmp_path, "sub-01_part-mag_T2starw.nii", "sub-01_part-phase_T2starw.nii")
    (tmp_path / "T2starw.json").write_text('{"EchoTime": 0.02, "MagneticFieldStrength": 7}')
    scan = only_scan(tmp_path)
    assert {s.contrast: s.derivation for s in scan.sources} == {
        "qsm": "reconstruction",
        "imag": "map",
        "swi": "reconstruction",
    }


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"MagneticFieldStrength": None}, "no MagneticFieldStrength"),
        ({"MagneticFieldStrength": 123.2}, "is 123.2, not in tesla"),
        ({"EchoTime": None}, "no EchoTime"),
    ],
)
def test_phase_that_cannot_be_used_leaves_the_magnitude(
    tmp_path: Path, about: dict[str, object], reason: str
) -> None:
    make_raw(tmp_path, **about)
    scan = only_scan(tmp_path)
    assert scan.error is None
    assert scan.get("qsm") is None
    assert scan.get("imag") is not None
    (note,) = [note for note in scan.notes if "QSM and SWI were not made" in note]
    assert reason in note


def test_magnitude_without_its_phase_is_told(tmp_path: Path) -> None:
    make_raw(tmp_path)
    (tmp_path / "sub-01/anat/sub-01_echo-2_part-phase_MEGRE.nii.gz").unlink()
    scan = only_scan(tmp_path)
    assert scan.get("qsm") is None
    assert scan.get("r2star") is not None
    assert "not of the same echoes" in scan.notes[0]


def test_two_phases_of_one_echo_are_ambiguous(tmp_path: Path) -> None:
    make_raw(tmp_path)
    make_dataset(tmp_path, "sub-01_echo-1_part-phase_MEGRE.nii")
    error = only_scan(tmp_path).error
    assert isinstance(error, AmbiguousInputError)
    filters = json.loads(error.remedy[error.remedy.index("{") :])
    assert set(filters) == {"qsm", "swi"}


def test_echo_times_are_inherited(tmp_path: Path) -> None:
    make_dataset(tmp_path, "sub-01_echo-1_MEGRE.nii.gz", "sub-01_echo-2_MEGRE.nii.gz")
    (tmp_path / "echo-1_MEGRE.json").write_text('{"EchoTime": 0.004}')
    (tmp_path / "echo-2_MEGRE.json").write_text('{"EchoTime": 0.1}')
    (tmp_path / "sub-01/sub-01_echo-2_MEGRE.json").write_text('{"EchoTime": 0.008}')
    (tmp_path / "MEGRE.json").write_text('{"EchoTime": 0.3}')
    (tmp_path / "sub-01/sub-01_MEGRE.json").write_text('{"FlipAngle": 15}')
    (tmp_path / "sub-01/sub-01_echo-2_part-phase_MEGRE.json").write_text('{"EchoTime": 0.2}')
    source = only_scan(tmp_path).get("r2star")
    assert source is not None
    assert source.echo_times == (0.004, 0.008)


def test_a_map_in_two_compressions_is_ambiguous(tmp_path: Path) -> None:
    root = make_dataset(
        tmp_path, "sub-01_Chimap.nii", "sub-01_Chimap.nii.gz", "sub-02_Chimap.nii.gz"
    )
    first, second = find_scans(root).scans
    assert isinstance(first.error, AmbiguousInputError)
    assert second.error is None
    assert str(first.error).count("sub-01_Chimap.nii") == 2
    assert '{"qsm": {"extension": ".nii"}}' in first.error.remedy


@pytest.mark.parametrize(
    ("one", "other", "contrast"),
    [
        ("desc-tgv_Chimap.nii", "desc-rts_Chimap.nii", "qsm"),
        ("desc-tgv_Chimap.nii", "Chimap.nii", "qsm"),
        ("Chimap.nii", "space-orig_Chimap.nii", "qsm"),
        ("echo-1_MEGRE.nii", "echo-1_part-mag_MEGRE.nii", "imag"),
        ("echo-1_R2starmap.nii", "echo-2_R2starmap.nii", "r2star"),
    ],
)
def test_the_filter_an_ambiguity_shows_resolves_it(
    tmp_path: Path, one: str, other: str, contrast: str
) -> None:
    root = make_dataset(tmp_path, f"sub-01_{one}", f"sub-01_{other}")
    error = only_scan(root).error
    assert error is not None
    assert error.path is not None
    assert {Path(error.path).name} | {error.cause.rsplit("/", 1)[1]} == {
        f"sub-01_{one}",
        f"sub-01_{other}",
    }
    filters = json.loads(error.remedy[error.remedy.index("{") :])
    scan = only_scan(root, bids_filters=filters)
    source = scan.get(contrast)
    assert scan.error is None
    assert source is not None
    assert source.paths == (Path(error.path),)


def test_the_same_map_in_two_datasets_is_chosen_by_scope(tmp_path: Path) -> None:
    raw = make_dataset(tmp_path / "raw", "sub-01_Chimap.nii")
    other = make_dataset(tmp_path / "qsmxt", "sub-01_Chimap.nii", derivative=True)
    datasets = [(None, other)]
    assert isinstance(only_scan(raw, derivatives=datasets).error, AmbiguousInputError)
    scan = only_scan(raw, derivatives=datasets, bids_filters={"qsm": {"scope": "qsmxt"}})
    assert scan.sources[0].uris == ("bids:qsmxt:sub-01/anat/sub-01_Chimap.nii",)


def test_filters_know_numbers_absence_and_any_value(tmp_path: Path) -> None:
    names = ["sub-01_run-01_Chimap.nii", "sub-01_run-02_Chimap.nii", "sub-01_Chimap.nii"]
    root = make_dataset(tmp_path, *names)

    def found(value: object) -> list[str]:
        scans = find_scans(root, bids_filters={"qsm": {"run": value}}).scans
        return [scan.source_prefix for scan in scans]

    assert found(1) == found("01") == ["sub-01_run-01"]
    assert found(None) == ["sub-01"]
    assert found("*") == ["sub-01_run-01", "sub-01_run-02"]
    assert found([None, 2]) == ["sub-01", "sub-01_run-02"]


@pytest.mark.parametrize(
    ("filters", "error"),
    [
        ({"t1w": {"run": 1}}, UsageError),
        ({"qsm": {"colour": "red"}}, UsageError),
        ({"qsm": "run-1"}, UsageError),
        ({"qsm": {"run": {}}}, UsageError),
        ({"qsm": {"run": 7}}, NoMatchError),
    ],
)
def test_filters_that_cannot_be_or_leave_nothing_are_refused(
    tmp_path: Path, filters: dict[str, dict[str, object]], error: type[Exception]
) -> None:
    root = make_dataset(tmp_path, "sub-01_Chimap.nii")
    with pytest.raises(error):
        find_scans(root, bids_filters=filters)


def test_raw_and_derivative_maps_join_in_one_scan(tmp_path: Path) -> None:
    raw = make_dataset(tmp_path / "raw", "sub-01_run-1_part-mag_T2starw.nii")
    one = make_dataset(raw / "derivatives" / "a", "sub-01_run-1_Chimap.nii", derivative=True)
    two = make_dataset(tmp_path / "my maps", "sub-01_run-1_swi.nii", derivative=True)
    assert [s.contrast for s in only_scan(raw).sources] == ["imag"]
    scan = only_scan(raw, derivatives=[("chi", one), (None, two)])
    assert [uri.split(":")[1] for s in scan.sources for uri in s.uris] == ["chi", "raw", "my-maps"]


def test_the_dataset_may_be_a_derivative_one(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, "sub-01_Chimap.nii", derivative=True)
    assert only_scan(root).sources[0].uris == ("bids:input:sub-01/anat/sub-01_Chimap.nii",)


def test_excluded_folders_are_no_input_unless_given(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, "sub-01_Chimap.nii")
    out = make_dataset(root / "sub-out", "sub-01_R2starmap.nii", derivative=True)
    discovery = find_scans(root, exclude=[out])
    assert [s.contrast for s in discovery.scans[0].sources] == ["qsm"]
    assert discovery.missing == ()
    scan = only_scan(root, exclude=[out], derivatives=[("own", out)])
    assert [s.contrast for s in scan.sources] == ["qsm", "r2star"]


@pytest.mark.parametrize("label", ["02", "sub-02"])
def test_only_asked_participants_are_found(tmp_path: Path, label: str) -> None:
    root = make_dataset(tmp_path, *(f"sub-0{n}_Chimap.nii" for n in (1, 2, 3)))
    assert only_scan(root, participant_labels=[label]).subject == "02"


def test_only_asked_participants_are_indexed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bids.layout import BIDSLayoutIndexer

    seen: list[str] = []
    index_file = BIDSLayoutIndexer._index_file

    def spy(self: BIDSLayoutIndexer, path: Path, entities: object) -> object:
        seen.append(path.name)
        return index_file(self, path, entities)

    monkeypatch.setattr(BIDSLayoutIndexer, "_index_file", spy)
    root = make_dataset(
        tmp_path, "sub-01_Chimap.nii", "sub-02_Chimap.nii", "sub-02_T1w.nii", "sub-02_Chimap.json"
    )
    find_scans(root, participant_labels=["02"])
    assert seen == ["sub-02_Chimap.nii"]


def test_only_asked_sessions_are_found_and_their_absence_is_told(tmp_path: Path) -> None:
    root = make_dataset(
        tmp_path, "sub-01_ses-1_Chimap.nii", "sub-01_ses-2_Chimap.nii", "sub-02_ses-1_Chimap.nii"
    )
    discovery = find_scans(root, session_labels=["ses-2"])
    assert [scan.source_prefix for scan in discovery.scans] == ["sub-01_ses-2"]
    assert discovery.missing == (("02", "2"),)


def test_participants_and_sessions_without_maps_are_missing(tmp_path: Path) -> None:
    root = make_dataset(
        tmp_path,
        "sub-01_ses-1_Chimap.nii",
        "sub-01_ses-2_T1w.nii",
        "sub-02_T1w.nii",
        "sub-04_Chimap.nii",
    )
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t60\nsub-03\t61\n")
    discovery = find_scans(root)
    assert discovery.missing == (("01", "2"), ("02", None), ("03", None))


@pytest.mark.parametrize("option", ["participant_labels", "session_labels"])
def test_an_unknown_label_is_refused_by_name(tmp_path: Path, option: str) -> None:
    root = make_dataset(tmp_path, "sub-01_ses-a1_Chimap.nii")
    with pytest.raises(NoMatchError, match=r"99.*(01|a1)"):
        find_scans(root, **{option: ["99"]})  # type: ignore[arg-type]


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    root = make_dataset(tmp_path)
    for labels in ([], ["01"]):
        with pytest.raises(NoMatchError, match=r"no participant\."):
            find_scans(root, participant_labels=labels)


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "\udcff", '{"GeneratedBy": {"Name": "x"}}']
)
def test_a_folder_without_description_is_no_dataset(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        raw = content.encode(errors="surrogateescape")
        (tmp_path / "dataset_description.json").write_bytes(raw)
    with pytest.raises(NotADatasetError, match=r"dataset_description\.json") as caught:
        find_scans(tmp_path)
    assert caught.value.exit_code == 16
    assert caught.value.remedy


def test_a_description_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, "sub-01_Chimap.nii")
    description = root / "dataset_description.json"
    description.write_text(description.read_text(), encoding="utf-8-sig")
    assert only_scan(root).subject == "01"


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError):
        find_scans(tmp_path / "absent")
    root = make_dataset(tmp_path / "raw", "sub-01_Chimap.nii")
    with pytest.raises(InputMissingError, match="absent"):
        find_scans(root, derivatives=[(None, tmp_path / "absent")])
    with pytest.raises(NotADatasetError, match="derivative dataset itself"):
        find_scans(root, derivatives=[(None, tmp_path)])


def test_two_datasets_cannot_have_one_name(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "raw", "sub-01_Chimap.nii")
    with pytest.raises(UsageError, match="called raw"):
        open_datasets(root, [(None, root)])


def test_a_file_in_another_participants_folder_is_left_out(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, "sub-01_Chimap.nii", "sub-02_Chimap.nii")
    (root / "sub-01/anat/sub-01_Chimap.nii").rename(root / "sub-01/anat/sub-02_R2starmap.nii")
    discovery = find_scans(root)
    assert [s.contrast for scan in discovery.scans for s in scan.sources] == ["qsm"]
    assert discovery.missing == (("01", None),)
    assert "sub-02_R2starmap.nii was left out" in discovery.notes[0]


@pytest.mark.parametrize(
    "name", ["sub-01_echo-a_MEGRE.nii", "sub-01_run-b_Chimap.nii", "sub-01_acq-a-b_Chimap.nii"]
)
def test_a_name_that_is_not_bids_is_left_out(tmp_path: Path, name: str) -> None:
    discovery = find_scans(make_dataset(tmp_path, name))
    assert discovery.scans == ()
    assert name in discovery.notes[0]


def test_links_stay_as_they_are(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "ds", "sub-01_T1w.nii")
    present = tmp_path / "annex-key"
    present.touch()
    (root / "sub-01/anat/sub-01_Chimap.nii").symlink_to(present)
    (root / "sub-01/anat/sub-01_R2starmap.nii").symlink_to("../../.git/annex/absent")
    (root / "sub-02").symlink_to("sub-01")
    (tmp_path / "link").symlink_to(root)
    scan = only_scan(tmp_path / "link")
    assert [source.paths[0] for source in scan.sources] == [
        tmp_path / "link/sub-01/anat" / name
        for name in ("sub-01_Chimap.nii", "sub-01_R2starmap.nii")
    ]


@pytest.mark.parametrize("folder", ["my data", "Köln 北京", "sub-99/ses-9/anat", "a#b%20?c"])
def test_the_folder_above_the_dataset_may_have_any_name(tmp_path: Path, folder: str) -> None:
    root = make_dataset(tmp_path / folder, "sub-01_Chimap.nii")
    scan = only_scan(root)
    assert scan.source_prefix == "sub-01"
    assert scan.sources[0].paths == (root / "sub-01/anat/sub-01_Chimap.nii",)


def test_a_relative_dataset_gives_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path / "ds", "sub-01_Chimap.nii")
    monkeypatch.chdir(tmp_path)
    assert only_scan("ds").sources[0].paths[0].is_absolute()


def test_nothing_is_written_into_the_dataset(tmp_path: Path) -> None:
    root = make_dataset(tmp_path, "sub-01_Chimap.nii", "sub-01_echo-1_MEGRE.nii")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    find_scans(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_the_closest_brain_mask_is_taken(tmp_path: Path) -> None:
    root = make_dataset(
        tmp_path,
        "sub-01_run-1_Chimap.nii",
        "sub-01_run-2_Chimap.nii",
        "sub-01_run-1_desc-brain_mask.nii.gz",
        "sub-01_desc-brain_mask.nii.gz",
        "sub-01_space-MNI152NLin6Asym_desc-brain_mask.nii.gz",
        "sub-02_Chimap.nii",
    )
    names = [scan.brain_mask and scan.brain_mask.name for scan in find_scans(root).scans]
    assert names == ["sub-01_run-1_desc-brain_mask.nii.gz", "sub-01_desc-brain_mask.nii.gz", None]


def test_a_kept_index_is_used_again_and_follows_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bids.layout import BIDSLayoutIndexer

    indexed: list[object] = []
    call = BIDSLayoutIndexer.__call__

    def spy(self: BIDSLayoutIndexer, layout: object) -> None:
        indexed.append(layout)
        call(self, layout)

    monkeypatch.setattr(BIDSLayoutIndexer, "__call__", spy)
    root = make_dataset(tmp_path / "ds", "sub-01_Chimap.nii", "sub-02_Chimap.nii")
    database = tmp_path / "db"
    assert only_scan(root, database_dir=database, participant_labels=["01"]).subject == "01"
    assert len(find_scans(root, database_dir=database).scans) == 2
    assert len(indexed) == 1
    make_dataset(root, "sub-02_ses-1_Chimap.nii")
    os.utime(root / "sub-02")
    assert len(find_scans(root, database_dir=database).scans) == 3
    assert len(indexed) == 2
    assert len(list(database.iterdir())) == 1


def test_an_index_that_cannot_be_kept_or_read_is_told(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "ds", "sub-01_Chimap.nii")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="--bids-database-dir"):
        find_scans(root, database_dir=tmp_path / "file" / "db")
    find_scans(root, database_dir=tmp_path / "db")
    (index,) = (tmp_path / "db").rglob("*.sqlite")
    index.write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match="delete this folder"):
        find_scans(root, database_dir=tmp_path / "db")


@pytest.mark.shared
@pytest.mark.skipif(not LAYOUTS.is_dir(), reason="../shared is not there")
def test_the_published_layouts_are_indexed_as_they_stand() -> None:
    megre = only_scan(LAYOUTS / "qmri_megre")
    assert [(s.contrast, s.derivation, len(s.paths)) for s in megre.sources] == [
        ("r2star", "echo_fit", 8),
        ("imag", "echo_mean", 8),
    ]
    assert megre.sources[0].echo_times == (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16)

    qsm = LAYOUTS / "qmri_qsm"
    without = find_scans(qsm)
    assert (without.scans, without.missing) == ((), (("01", None),))
    assert "--derivatives" in without.notes[0]
    scan = only_scan(qsm, derivatives=[(None, qsm / "derivatives" / "qMRLab")])
    assert [s.uris for s in scan.sources] == [("bids:qMRLab:sub-01/anat/sub-01_Chimap.nii.gz",)]

    fmriprep = find_scans(LAYOUTS / "ds000001-fmriprep")
    assert (fmriprep.scans, fmriprep.missing) == ((), (("10", None),))
