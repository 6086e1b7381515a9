from __future__ import annotations

import math
import os
import tempfile

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from fdl_bidsapp.errors import ImageError
from fdl_bidsapp.imaging.grid import Grid, canvas_geometry, conform
from fdl_bidsapp.imaging.overlap import dice
from fdl_bidsapp.imaging.registration import (
    from_ants,
    register_to_template,
    template,
    to_ants,
)

pytestmark = pytest.mark.real

# ITK reads it once, when ANTs is first used, which is after all test modules were imported.
os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"


TWO_MM_APART = 0.55
"""Dice of balls of 14 mm at 3 mm spacing; 0.1 or less before registration."""


def oblique(spacing, angle=0.25, origin=(0.0, 0.0, 0.0)):
    turn = [
        [1, 0, 0],
        [0, math.cos(angle), -math.sin(angle)],
        [0, math.sin(angle), math.cos(angle)],
    ]
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(turn) @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


def places_mm(shape, affine):
    return (
        np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(3, -1).T
        @ affine[:3, :3].T
        + affine[:3, 3]
    )


@pytest.fixture(scope="module")
def coarse_template():
    """The template at 3 mm, with labelled balls where the red and dentate nuclei lie."""
    full = template()
    shape, affine, _ = canvas_geometry(full, Grid((1, 1, 1), (3.0, 3.0, 3.0)))
    data = conform(full, shape, affine)
    data[data < 0.02] = 0
    labels = np.zeros(shape, np.uint8)
    centres = [(-6, -20, -8), (6, -20, -8), (-17, -58, -34), (17, -58, -34)]
    mm = places_mm(shape, affine)
    for index, centre in enumerate(centres, start=1):
        inside = np.linalg.norm(mm - centre, axis=1).reshape(shape) < 7
        labels[inside] = index
    return nib.Nifti1Image(data, affine), nib.Nifti1Image(labels, affine)


@pytest.fixture(scope="module")
def scan(coarse_template):
    """A head with dark skull and bright scalp: the template scaled, shifted, bent, inverted."""
    image, labels = coarse_template
    native = oblique((-2.5, 2.5, 3.0))
    shape = (88, 96, 76)
    native[:3, 3] -= native[:3] @ [*((np.array(shape) - 1) / 2), 1] - np.array([6, -18, 4])
    mm = places_mm(shape, native)
    bend = 3 * np.sin(mm[:, [1, 2, 0]] / 25)
    in_template = (mm - [8, 5, -6]) * [1.06, 0.95, 1.04] + bend
    to_voxel = np.linalg.inv(image.affine)
    voxel = (in_template @ to_voxel[:3, :3].T + to_voxel[:3, 3]).T

    def sampled(data, order):
        return ndimage.map_coordinates(data, voxel, order=order).reshape(shape)

    brain = sampled(image.get_fdata(), 1)
    from_brain = ndimage.distance_transform_edt(brain < 0.02, sampling=(2.5, 2.5, 3))
    tissue = np.where(from_brain == 0, 1.3 - 0.6 * brain, 0.02)
    tissue[(from_brain > 8) & (from_brain < 14)] = 1.2
    coil = 1 + 0.3 * np.linspace(-1, 1, shape[0])[:, None, None]
    noise = np.random.default_rng(0).normal(0, 0.01, shape)
    head = np.abs(tissue * coil + noise).astype("f4")
    return nib.Nifti1Image(head, native), nib.Nifti1Image(
        sampled(labels.get_fdata(), 0).astype(np.uint8), native
    )


@pytest.fixture(scope="module")
def registered(coarse_template, scan, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(elsewhere))
        result = register_to_template(
            scan[0], coarse_template[0], tmp_path_factory.mktemp("work") / "registration", seed=7
        )
    assert not list(elsewhere.iterdir())
    return result


def test_the_template_is_a_brain_at_1_mm_without_a_head():
    image = template()
    np.testing.assert_allclose(np.abs(np.diag(image.affine)), 1)
    data = np.asarray(image.dataobj)
    assert data.dtype == np.float32
    assert 1500e3 < np.count_nonzero(data) < 2200e3


def test_an_oblique_image_lies_at_the_same_place_in_ants(tmp_path):
    import ants

    affine = oblique((-0.8, 1.1, 2.5), 0.4, (12, -34, 56))
    data = np.random.default_rng(0).random((9, 10, 11)).astype("f4")
    image = nib.Nifti1Image(data, affine)
    nib.save(image, tmp_path / "oblique.nii.gz")
    crossed, read = to_ants(image), ants.image_read(str(tmp_path / "oblique.nii.gz"))
    np.testing.assert_allclose(crossed.origin, read.origin, atol=1e-4)
    np.testing.assert_allclose(crossed.spacing, read.spacing, atol=1e-5)
    np.testing.assert_allclose(crossed.direction, read.direction, atol=1e-5)
    np.testing.assert_array_equal(crossed.numpy(), read.numpy())
    back = from_ants(crossed)
    np.testing.assert_allclose(back.affine, affine, atol=1e-6)
    np.testing.assert_array_equal(back.dataobj, data)


def test_labels_of_a_bent_head_land_on_the_templates(registered, coarse_template, scan):
    expected = coarse_template[1].get_fdata()
    moved = registered.apply(scan[1], "genericLabel")
    np.testing.assert_allclose(moved.affine, coarse_template[0].affine, atol=1e-5)
    assert moved.get_data_dtype() == np.uint8
    found = np.asarray(moved.dataobj)
    assert set(np.unique(found)) == {0, 1, 2, 3, 4}
    for index in range(1, 5):
        assert dice(found == index, expected == index) > TWO_MM_APART


def test_labels_of_the_template_land_on_the_scan(registered, coarse_template, scan):
    moved = registered.apply(coarse_template[1], "genericLabel", inverse=True)
    np.testing.assert_allclose(moved.affine, scan[0].affine, atol=1e-5)
    assert moved.shape == scan[0].shape
    truth = scan[1].get_fdata()
    for index in range(1, 5):
        assert dice(moved.get_fdata() == index, truth == index) > TWO_MM_APART


def test_there_and_back_is_the_same_place(registered):
    assert registered.inverse_error() < 0.3


def test_the_saved_file_alone_carries_the_whole_way(registered, scan, tmp_path):
    import ants

    path = tmp_path / "sub-01_from-orig_to-MNI152NLin2009aSym_mode-image_xfm.h5"
    registered.save_composite(path)
    moved = ants.apply_transforms(
        fixed=to_ants(registered.template), moving=to_ants(scan[0]), transformlist=[str(path)]
    )
    np.testing.assert_array_equal(moved.numpy(), registered.apply(scan[0]).get_fdata())
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_the_same_seed_gives_the_same_way(registered, coarse_template, scan, tmp_path):
    again = register_to_template(scan[0], coarse_template[0], tmp_path, seed=7)
    np.testing.assert_allclose(
        again.apply(scan[0]).get_fdata(), registered.apply(scan[0]).get_fdata(), atol=1e-3
    )


def test_an_unknown_interpolation_is_refused(registered, scan):
    with pytest.raises(ValueError, match="cubic"):
        registered.apply(scan[0], "cubic")


def test_a_failure_of_ants_is_an_image_error(monkeypatch, coarse_template, scan, tmp_path):
    import ants

    def fail(**_):
        raise RuntimeError("Registration failed with error code 1")

    monkeypatch.setattr(ants, "registration", fail)
    signed = nib.Nifti1Image(scan[0].get_fdata() - 0.5, scan[0].affine)
    with pytest.raises(ImageError, match="could not be registered"):
        register_to_template(signed, coarse_template[0], tmp_path)
