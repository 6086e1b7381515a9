from __future__ import annotations

import json

import numpy as np
import pytest

from fdl_bidsapp.errors import (
    AmbiguousInputError,
    DataError,
    ImageError,
    InputMissingError,
    UsageError,
)
from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.models.fdl import ModelSpec
from fdl_bidsapp.training.cases import (
    in_split,
    known_labels,
    load_case,
    load_cases,
    read_bids,
    read_labels,
    read_table,
)

from .conftest import SHAPE, ball, save


def spec_of(labels, **changes):
    values = {"grid_shape": (16, 16, 16), "labels": labels, "contrasts": ("qsm",), **changes}
    return ModelSpec("test", **values)


@pytest.fixture
def table(labelled_set):
    return labelled_set()


@pytest.fixture
def balls(table):
    return read_labels(table.with_name("labels.tsv"))


KNOWN = frozenset({1, 2})


def test_a_table_gives_its_cases_in_order(table):
    scans = read_table(table)
    assert [one.name for one in scans] == [
        "train0",
        "train1",
        "train2",
        "validation0",
        "validation1",
    ]
    assert [one.name for one in in_split(scans, "validation", table)] == [
        "validation0",
        "validation1",
    ]
    assert scans[0].participant == "train0"


def test_a_case_lies_on_the_model_s_grid_with_its_labels(table, balls):
    case = load_case(read_table(table)[0], spec_of(balls), KNOWN)
    assert case.maps["qsm"].shape == case.classes.shape == (16, 16, 16)
    truth = ball((5, 6, 6), 3.2)
    assert np.count_nonzero(case.classes == 1) == truth.sum()
    assert case.maps["qsm"][case.classes == 1].mean() == pytest.approx(0.1, abs=0.01)


def test_values_that_are_known_but_not_segmented_are_background(table, balls):
    case = load_case(read_table(table)[0], spec_of(balls[1:]), KNOWN)
    assert np.count_nonzero(case.classes == 1) == ball((11, 7, 5), 2.5).sum()
    assert case.classes.max() == 1


def test_a_case_on_another_orientation_is_brought_to_ras(table, balls, tmp_path):
    one = read_table(table)[0]
    expected = load_case(one, spec_of(balls), KNOWN)
    import nibabel as nib

    for path in (one.scan.sources[0].paths[0], one.label):
        image = nib.load(path)
        data = np.asarray(image.dataobj)[::-1].swapaxes(1, 2)
        affine = np.array([[-1, 0, 0, 15], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
        save(path, np.ascontiguousarray(data), affine)
    turned = load_case(one, spec_of(balls), KNOWN)
    np.testing.assert_array_equal(turned.classes, expected.classes)
    np.testing.assert_allclose(turned.maps["qsm"], expected.maps["qsm"], atol=1e-6)


def edit(table, old, new):
    table.write_text(table.read_text().replace(old, new))


def test_one_case_in_two_splits_is_an_error(table):
    edit(table, "validation0\tvalidation\tdata/validation0_qsm", "v\tvalidation\tdata/train1_qsm")
    with pytest.raises(DataError, match="in two splits, train and validation"):
        read_table(table)


def test_one_participant_in_two_splits_is_an_error(table):
    lines = table.read_text().splitlines()
    people = ["participant", "a", "b", "c", "c", "d"]
    table.write_text("".join(f"{line}\t{who}\n" for line, who in zip(lines, people, strict=True)))
    with pytest.raises(DataError, match="participant c is in two splits"):
        read_table(table)


def test_an_empty_split_is_an_error(table):
    with pytest.raises(DataError, match="'test' is empty"):
        in_split(read_table(table), "test", table)


@pytest.mark.parametrize(
    ("old", "new", "kind", "message"),
    [
        ("split\tqsm", "split\tchi", DataError, "no column any of qsm"),
        ("qsm\tlabel", "qsm\tmask", DataError, "no column label"),
        ("train1\ttrain", "train0\ttrain", DataError, "train0 is there twice"),
        ("train1\ttrain", "train1\ttraining", DataError, "split of train1 is 'training'"),
        ("data/train1_qsm", "data/nothing", InputMissingError, "no such file"),
        ("data/train1_qsm.nii.gz", "n/a", DataError, "no id, label or image"),
    ],
)
def test_tells_what_is_wrong_with_a_table(table, old, new, kind, message):
    edit(table, old, new)
    with pytest.raises(kind, match=message):
        read_table(table)


def test_unknown_label_values_are_listed(table, balls):
    one = read_table(table)[0]
    with pytest.raises(ImageError, match="does not know: 2"):
        load_case(one, spec_of(balls), frozenset({1}))


def test_a_label_map_of_another_shape_is_an_error(table, balls):
    one = read_table(table)[0]
    save(one.label, ball((5, 6, 6), 3)[:-1].astype(np.uint8))
    with pytest.raises(ImageError, match="15 × 14 × 12 and its image 16 × 14 × 12"):
        load_case(one, spec_of(balls), KNOWN)


def test_a_label_map_at_another_place_is_an_error(table, balls):
    one = read_table(table)[0]
    save(one.label, ball((5, 6, 6), 3).astype(np.uint8), np.diag([1, 1, 1.2, 1]))
    with pytest.raises(ImageError, match="affines differ"):
        load_case(one, spec_of(balls), KNOWN)


def test_a_probability_map_is_no_label_map(table, balls):
    one = read_table(table)[0]
    save(one.label, np.random.default_rng(0).random(SHAPE).astype(np.float32))
    with pytest.raises(ImageError, match="no whole numbers"):
        load_case(one, spec_of(balls), KNOWN)


def test_a_case_without_the_target_is_an_error(table, balls):
    with pytest.raises(InputMissingError, match="train0 lacks the contrast to segment, r2star"):
        load_case(read_table(table)[0], spec_of(balls, contrasts=("r2star",)), KNOWN)


def test_a_label_map_without_the_structures_is_an_error(table, balls):
    one = read_table(table)[0]
    save(one.label, ball((5, 6, 6), 3).astype(np.uint8))
    with pytest.raises(ImageError, match="none of the structures"):
        load_case(one, spec_of(balls[1:]), KNOWN)


def test_all_bad_cases_are_told_of_at_once(table, balls):
    scans = read_table(table)
    for one in scans[:2]:
        save(one.label, ball((5, 6, 6), 3)[:-1].astype(np.uint8))
    with pytest.raises(DataError, match=r"2 of 5 cases cannot be used: .*train0.*train1"):
        load_cases(scans, spec_of(balls), KNOWN)


def test_a_label_table_may_give_index_and_name_alone(tmp_path):
    path = tmp_path / "dseg.tsv"
    path.write_text(
        "index\tname\n0\tBackground\n3\tRed nucleus left\n4\tRed nucleus right\n9\tPons\n"
    )
    labels = read_labels(path)
    assert [label.index for label in labels] == [3, 4, 9]
    assert [label.hemisphere for label in labels] == ["L", "R", "n/a"]
    assert [label.structure for label in labels] == ["red_nucleus", "red_nucleus", "pons"]
    assert [label.abbreviation for label in labels] == ["Rednucleusleft", "Rednucleusright", "Pons"]


def test_refuses_a_table_that_is_no_label_table(tmp_path):
    path = tmp_path / "dseg.tsv"
    path.write_text("index\tname\none\tPons\n")
    with pytest.raises(DataError, match="no whole number"):
        read_labels(path)
    path.write_text("value\tname\n1\tPons\n")
    with pytest.raises(DataError, match="no index and name"):
        read_labels(path)


def test_structures_are_chosen_from_the_table_and_all_its_values_stay_known():
    labels, known = known_labels(None, None, ("DNL", "RNR"))
    assert [label.abbreviation for label in labels] == ["DNL", "RNR"]
    assert known == frozenset(label.index for label in nuclei())
    with pytest.raises(UsageError, match="no structure XX"):
        known_labels(None, None, ("XX",))
    with pytest.raises(UsageError, match="what the label values mean"):
        known_labels(None, None, ())


class TestBids:
    @pytest.fixture
    def datasets(self, tmp_path):
        raw, truth = tmp_path / "raw", tmp_path / "truth"
        for root, kind in ((raw, "raw"), (truth, "derivative")):
            root.mkdir()
            description = {"Name": "x", "BIDSVersion": "1.10.0", "DatasetType": kind}
            description["GeneratedBy"] = [{"Name": "hand"}]
            (root / "dataset_description.json").write_text(json.dumps(description))
        image = np.random.default_rng(0).normal(0, 0.1, SHAPE).astype(np.float32)
        labels = ball((5, 6, 6), 3).astype(np.uint8)
        for subject in ("01", "02", "03", "04"):
            save(raw / f"sub-{subject}/anat/sub-{subject}_Chimap.nii.gz", image)
            if subject != "04":
                save(truth / f"sub-{subject}/anat/sub-{subject}_dseg.nii.gz", labels)
        return raw, truth

    def test_scans_with_a_label_map_are_found_and_split_by_participant(self, datasets):
        scans = read_bids(*datasets, validation_share=0.3)
        assert [one.participant for one in scans] == ["01", "02", "03"]
        assert [one.split for one in scans] == ["train", "validation", "train"]
        assert all(one.label.name == f"sub-{one.participant}_dseg.nii.gz" for one in scans)

    def test_participants_tsv_may_give_the_splits(self, datasets):
        (datasets[0] / "participants.tsv").write_text(
            "participant_id\tsplit\nsub-01\ttest\nsub-02\ttrain\nsub-03\tvalidation\nsub-04\t\n"
        )
        scans = read_bids(*datasets, validation_share=0.3)
        assert [one.split for one in scans] == ["test", "train", "validation"]

    def test_a_label_map_belongs_to_the_scan_of_its_own_entities(self, datasets):
        raw, truth = datasets
        image = np.random.default_rng(0).normal(0, 0.1, SHAPE).astype(np.float32)
        for run in ("1", "2"):
            save(raw / f"sub-05/anat/sub-05_run-{run}_Chimap.nii.gz", image)
        save(truth / "sub-05/anat/sub-05_run-2_dseg.nii.gz", ball((5, 6, 6), 3).astype(np.uint8))
        names = [one.name for one in read_bids(raw, truth) if one.participant == "05"]
        assert names == ["sub-05_run-2"]

    def test_two_label_maps_of_one_scan_are_an_error(self, datasets):
        raw, truth = datasets
        path = truth / "sub-01/anat/sub-01_desc-second_dseg.nii.gz"
        save(path, ball((5, 6, 6), 3).astype(np.uint8))
        with pytest.raises(AmbiguousInputError, match="two label maps"):
            read_bids(raw, truth)

    def test_no_label_map_at_all_is_an_error(self, datasets):
        raw, truth = datasets
        for path in truth.rglob("*_dseg.nii.gz"):
            path.unlink()
        with pytest.raises(InputMissingError, match="no scan of the dataset has a label map"):
            read_bids(raw, truth)
