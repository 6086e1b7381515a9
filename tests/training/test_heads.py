from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from fdl_bidsapp.imaging.grid import middle
from fdl_bidsapp.imaging.intensity import normalise
from fdl_bidsapp.labels import by_abbreviation
from fdl_bidsapp.models.fdl import CONTRASTS, ModelSpec, build_network
from fdl_bidsapp.models.inference import locate
from fdl_bidsapp.simulation.geometry import rotation
from fdl_bidsapp.training.cases import read_table
from fdl_bidsapp.training.heads import (
    FieldsOfView,
    Head,
    cached_head,
    cut_patch,
    labelled_head,
    train_locator,
)
from fdl_bidsapp.training.loop import Schedule

SHAPE = (30, 34, 26)
INTENSITY = dict.fromkeys(CONTRASTS, "minmax")


def stack_of(image, labels):
    """A cached scan with the same image in every contrast."""
    return np.stack([*[image] * len(CONTRASTS), labels]).astype(np.float16)


def test_an_upright_patch_is_a_plain_crop():
    rng = np.random.default_rng(0)
    image, labels = rng.standard_normal(SHAPE), rng.integers(0, 5, SHAPE)
    scan = stack_of(image, labels)
    # The centre of voxels 5..14, 8..18 and 3..10.
    cut, classes = cut_patch(scan, [2, 0], np.array([9.5, 13.0, 6.5]), np.eye(3), (10, 11, 8))
    crop = (slice(5, 15), slice(8, 19), slice(3, 11))
    np.testing.assert_allclose(cut, scan[[2, 0]][:, *crop], atol=1e-3)
    np.testing.assert_array_equal(classes, labels[crop])


def test_the_channel_is_the_contrast_asked_for():
    scan = np.stack([np.full(SHAPE, value) for value in (1, 2, 3, 4, 0)]).astype(np.float16)
    cut, _ = cut_patch(scan, [3, 0, 1], np.array([15.0, 17.0, 13.0]), np.eye(3), (5, 5, 5))
    assert cut.mean((1, 2, 3)).tolist() == [4, 1, 2]


@pytest.mark.parametrize("axis", range(3))
def test_turning_keeps_image_and_labels_together(axis):
    # An image that is the coordinate along one axis, and labels that are its nearest integer.
    coordinate = np.broadcast_to(np.indices(SHAPE)[axis], SHAPE)
    scan = stack_of(coordinate, coordinate)
    linear = rotation((8, -11, 6)) @ np.diag([1.1, 0.9, 1.0])
    centre = np.array([14.3, 16.8, 12.4])
    shape = (12, 11, 10)
    (image,), labels = cut_patch(scan, [0], centre, linear, shape)
    expected = (linear @ (np.indices(shape).reshape(3, -1) - (np.array([shape]).T - 1) / 2))[axis]
    np.testing.assert_allclose(image.ravel(), expected + centre[axis], atol=0.01)
    assert np.abs(image - labels).max() <= 0.51


def test_beyond_the_scan_there_is_nothing():
    scan = stack_of(np.ones(SHAPE), np.ones(SHAPE))
    (image,), labels = cut_patch(scan, [0], np.array([0.0, 17.0, 13.0]), np.eye(3), (11, 9, 9))
    assert not image[:5].any()
    assert not labels[:5].any()
    np.testing.assert_allclose(image[5:], 1)
    assert labels[5:].all()


CENTRES = {1: (29.5, 21.5, 41.5), 2: (29.5, 51.5, 21.5)}


LEAST = (24, 24, 16)


def fields_of_view(tmp_path, n, bright=1):
    """Draws from a scan whose image is bright in one of its two regions."""
    shape = (60, 80, 64)
    labels = np.zeros(shape)
    labels[25:35, 20:24, 40:44], labels[25:35, 50:54, 20:24] = 1, 2
    places = np.indices(shape) - np.reshape(CENTRES[bright], (3, 1, 1, 1))
    image = np.linalg.norm(places, axis=0) <= 10
    file = tmp_path / "head.npy"
    np.save(file, stack_of(image.astype(float), labels))
    heads = [cached_head(file, ((1,), (2,)), radius=20)]
    coarse = FieldsOfView(heads, INTENSITY, {"qsm": 1.0}, LEAST, severity=0.0)
    return [coarse.draw(np.random.default_rng(seed)) for seed in range(n)]


@pytest.mark.parametrize("value", [1, 2])
def test_each_region_lies_around_its_nuclei_in_every_field_of_view(tmp_path, value):
    agreeing = []
    for image, classes in fields_of_view(tmp_path, 36, value):
        assert image.shape[2:] == classes.shape[1:]
        bright, region = image[0, 0] > 0.5, classes[0] == value
        if region.sum() > 200:
            both = 2 * (bright & region).sum() / (bright.sum() + region.sum())
            agreeing.append(float(both))
    assert len(agreeing) > 10
    # A shift by one voxel would give 0.85.
    assert np.median(agreeing) > 0.9


def test_fields_of_view_differ_and_some_miss_a_part_of_a_region(tmp_path):
    drawn = fields_of_view(tmp_path, 40)
    assert len({tuple(image.shape) for image, _ in drawn}) > 20
    sizes = [int((classes == 1).sum()) for _, classes in drawn]
    assert min(sizes) < 0.8 * np.median(sizes)


def test_slabs_hold_both_regions_or_one_or_none_and_are_padded_to_the_grid(tmp_path):
    drawn = fields_of_view(tmp_path, 60)
    assert all(n >= m for image, _ in drawn for n, m in zip(image.shape[2:], LEAST, strict=True))
    shown = {tuple(classes.unique().tolist()) for _, classes in drawn}
    assert shown == {(0,), (0, 1), (0, 2), (0, 1, 2)}


def test_only_the_contrasts_that_a_head_has_are_drawn():
    shape = (12, 12, 12)
    ramps = np.indices(shape).astype(np.float32) + 20
    images = {"imag": ramps[0], "swi": ramps[1]}
    heads = [Head({"imag": images["imag"]}, np.zeros(shape)), Head(images, np.zeros(shape))]
    shares = {"qsm": 0.8, "imag": 0.1, "swi": 0.1}
    views = FieldsOfView(heads, INTENSITY, shares, (4, 4, 4), severity=0.0)
    steeper = []
    for seed in range(80):
        image, _ = views.draw(np.random.default_rng(seed))
        along = [float(image[0, 0].diff(dim=axis).abs().median()) for axis in (0, 1)]
        steeper.append(along[0] > along[1])
    # A half of the heads has both, the other half one of them.
    assert 0.55 < np.mean(steeper) < 0.95


SPACING = 4.0


@pytest.fixture
def model():
    """Two structures, each with a window of its own."""
    labels = tuple(by_abbreviation(["RNL", "DNL"]))
    locator = ModelSpec(
        "locator",
        method="none",
        backbone_options={"width": 4, "levels": 2},
        grid_shape=(16, 16, 12),
        grid_spacing=(SPACING,) * 3,
        contrasts=("qsm", "imag"),
        labels=tuple(by_abbreviation(["RNL", "DNL"])),
    )
    return ModelSpec(
        "model",
        backbone_options={"width": 4, "levels": 2},
        grid_shape=(16, 16, 16),
        contrasts=("qsm",),
        labels=labels,
        locator=locator,
        regions=(("RNL",), ("DNL",)),
    )


PLACES = {1: (20.0, 20.0, 28.0), 3: (40.0, 42.0, 18.0)}
"""mm, of the middle of each structure's voxels."""


def labelled_scans(folder, shifts, spacing=(1.0, 2.0, 2.0)):
    """Scans with a bright and a dark ball, whose middles are labelled."""
    lines = ["id\tsplit\tqsm\tlabel"]
    shape = [round(n / size) for n, size in zip((64, 64, 48), spacing, strict=True)]
    affine = np.diag([*spacing, 1.0])
    # Sides are swapped in memory.
    affine[0, 0], affine[0, 3] = -spacing[0], 63.0
    places = np.einsum("ij,j...->i...", affine[:3, :3], np.indices(shape)).T + affine[:3, 3]
    names = {label.abbreviation: label.index for label in by_abbreviation(["RNL", "DNL"])}
    for number, shift in enumerate(shifts):
        rng = np.random.default_rng(number)
        image = rng.normal(0, 0.1, shape)
        labels = np.zeros(shape, np.uint8)
        for (at, sign), value in zip(
            zip(PLACES.values(), (1, -1), strict=True), names.values(), strict=True
        ):
            distance = np.linalg.norm(places - np.add(at, shift), axis=-1).T
            image[distance < 9] += sign
            labels[distance < 3] = value
        for name, data in (("qsm", image.astype(np.float32)), ("dseg", labels)):
            nib.save(nib.Nifti1Image(data, affine), folder / f"{number}_{name}.nii.gz")
        lines.append(f"{number}\ttrain\t{number}_qsm.nii.gz\t{number}_dseg.nii.gz")
    table = folder / "cases.tsv"
    table.write_text("\n".join(lines) + "\n")
    return read_table(table)


def test_a_labelled_scan_is_seen_at_the_locators_spacing(tmp_path, model):
    (scan,) = labelled_scans(tmp_path, [(0, 0, 0)])
    head = labelled_head(scan, model)
    assert list(head.images) == ["qsm"]
    assert head.images["qsm"].shape == head.regions.shape
    for region, sign in ((1, 1), (2, -1)):
        ball = head.regions == region
        # 16 mm around the middle, less what lies beyond the field of view.
        assert 100 < ball.sum() <= 300
        inside = sign * head.images["qsm"][ball]
        assert inside.mean() > 0.1
        brightest = np.unravel_index(np.argmax(sign * head.images["qsm"]), ball.shape)
        assert ball[brightest]


def test_a_locator_learns_where_the_nuclei_of_labelled_scans_lie(tmp_path, model):
    scans = labelled_scans(tmp_path, [(0, 0, 0), (4, -6, 3), (-3, 5, 0)])
    *seen, unseen = (labelled_head(scan, model) for scan in scans)
    torch.manual_seed(0)
    network = build_network(model.locator)
    cpu = torch.device("cpu")
    schedule = Schedule(200, learning_rate=1e-2, average=0.9)
    trained = train_locator(network, model, seen, schedule, tmp_path / "run", cpu, configuration={})
    image = normalise(unseen.images["qsm"], model.locator.intensity["qsm"])
    found = locate(trained.network, [image], model.locator.grid_spacing, cpu)
    for region, places in enumerate(found, start=1):
        centre = middle(unseen.regions == region)
        assert places, f"region {region} is not found"
        assert np.linalg.norm(np.subtract(places[0], centre)) * SPACING < 8


def test_a_structure_of_one_side_stays_on_its_side(tmp_path, model):
    scans = labelled_scans(tmp_path, [(0, 0, 0)])
    head = labelled_head(scans[0], model)
    options = (INTENSITY, {"qsm": 1.0}, (4, 4, 4))
    for flips, sides in ((False, {True}), (True, {False, True})):
        views = FieldsOfView([head], *options, severity=0.0, flips=flips)
        drawn = [views.draw(np.random.default_rng(seed))[1][0].numpy() for seed in range(30)]
        places = [(middle(view == 1), middle(view == 2)) for view in drawn]
        assert {bool(a[0] < b[0]) for a, b in places if a is not None and b is not None} == sides
