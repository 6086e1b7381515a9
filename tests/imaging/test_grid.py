from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl_bidsapp.errors import ImageError, InputMissingError
from fdl_bidsapp.imaging.grid import (
    NUCLEI_EXTENT_MM,
    Grid,
    blend,
    canonical,
    canvas_geometry,
    complete,
    conform,
    crop_to,
    foreground,
    load_image,
    resample,
    restore,
    same_grid,
    windows,
)

SMALL = (12, 10, 9)


def noise(shape=SMALL, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


def save(path: Path, data, affine=None) -> Path:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def oblique(spacing=(1.0, 1.0, 1.0), angle=0.3, flip=(1, 1, 1)):
    turn = np.array(
        [
            [math.cos(angle), -math.sin(angle), 0],
            [math.sin(angle), math.cos(angle), 0],
            [0, 0, 1],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(np.multiply(spacing, flip))
    affine[:3, 3] = [-7, 11, 3]
    return affine


def refusal(path: Path, **options) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "Remedy: " in message
    assert "\n" not in message
    return message


# Reading


@pytest.mark.parametrize("name", ["map.nii", "map.nii.gz"])
def test_reads_values_and_affine(tmp_path, name):
    data, affine = noise(), oblique((0.8, 0.8, 2))
    loaded = load_image(save(tmp_path / name, data, affine))
    assert loaded.image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(loaded.image.dataobj, data)
    np.testing.assert_allclose(loaded.image.affine, affine, atol=1e-5)
    assert loaded.notes == ()


def test_applies_the_header_scaling(tmp_path):
    image = nib.Nifti1Image(np.arange(1000, dtype="i2").reshape(10, 10, 10), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "scaled.nii.gz")
    stored = nib.load(tmp_path / "scaled.nii.gz")
    loaded = load_image(tmp_path / "scaled.nii.gz").image
    np.testing.assert_allclose(loaded.dataobj, stored.get_fdata(), rtol=1e-6)
    again = tmp_path / "again.nii.gz"
    nib.save(loaded, again)
    np.testing.assert_allclose(nib.load(again).get_fdata(), stored.get_fdata(), rtol=1e-6)


def test_reads_nifti2_and_keeps_the_orientation_codes(tmp_path):
    image = nib.Nifti2Image(noise(), oblique())
    image.set_sform(oblique(), 1)
    nib.save(image, tmp_path / "two.nii.gz")
    loaded = load_image(tmp_path / "two.nii.gz").image
    assert loaded.header["sform_code"] == 1
    np.testing.assert_allclose(loaded.affine, oblique(), atol=1e-5)


def test_content_decides_not_the_name(tmp_path):
    plain = save(tmp_path / "map.nii", noise())
    named_gz = plain.rename(tmp_path / "plain.nii.gz")
    assert load_image(named_gz).image.shape == SMALL


def test_drops_trailing_axes_of_one(tmp_path):
    path = save(tmp_path / "map.nii", noise((*SMALL, 1)))
    assert load_image(path).image.shape == SMALL


def test_reads_echoes_where_four_axes_are_asked_for(tmp_path):
    path = save(tmp_path / "echoes.nii", noise((*SMALL, 3)))
    assert load_image(path, ndim=4).image.shape == (*SMALL, 3)
    assert "4 axes (12 × 10 × 9 × 3) where 3 belong" in refusal(path)
    assert "3 axes" in refusal(save(tmp_path / "map.nii", noise()), ndim=4)


def test_reads_through_links_and_read_only_files(tmp_path):
    path = save(tmp_path / "map.nii.gz", noise())
    path.chmod(0o444)
    link = tmp_path / "link.nii.gz"
    link.symlink_to(path)
    assert load_image(link).image.shape == SMALL


def test_missing_file_and_dangling_link_are_missing_input(tmp_path):
    with pytest.raises(InputMissingError, match="no such file"):
        load_image(tmp_path / "none.nii.gz")
    link = tmp_path / "link.nii.gz"
    link.symlink_to(tmp_path / "annexed")
    with pytest.raises(InputMissingError, match="datalad get"):
        load_image(link)


def test_refuses_what_is_no_image(tmp_path):
    empty = tmp_path / "empty.nii.gz"
    empty.touch()
    text = tmp_path / "text.nii.gz"
    text.write_text("participant_id\tage\n" * 100)
    zipped_text = tmp_path / "zipped.nii.gz"
    zipped_text.write_bytes(gzip.compress(b"participant_id\tage\n" * 100))
    folder = tmp_path / "folder.nii.gz"
    folder.mkdir()
    assert "empty" in refusal(empty)
    assert "not a NIfTI" in refusal(text)
    assert "not a NIfTI" in refusal(zipped_text)
    assert "folder" in refusal(folder)


@pytest.mark.parametrize("keep", [3, 40, 300, 0.5, 0.9, -5])
def test_refuses_a_truncated_gzip(tmp_path, keep):
    path = save(tmp_path / "map.nii.gz", noise())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else keep])
    refusal(path)


def test_refuses_a_corrupted_gzip(tmp_path):
    path = save(tmp_path / "map.nii.gz", noise())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert "damaged" in refusal(path)


def test_refuses_a_truncated_plain_file(tmp_path):
    path = save(tmp_path / "map.nii", noise())
    path.write_bytes(path.read_bytes()[:-4])
    assert "cut short" in refusal(path)


def with_dimensions(path: Path, *dim: int) -> Path:
    content = bytearray(save(path, noise()).read_bytes())
    content[40 : 40 + 2 * len(dim)] = struct.pack(f"<{len(dim)}h", *dim)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("dim", "reason"),
    [
        ((3, -12, 10, 9), "impossible"),
        ((3, 0, 10, 9), "impossible"),
        ((3, 32000, 32000, 32000), "absurd"),
        ((3, 700, 700, 700), "cut short"),
        ((2, 12, 90), "2 axes"),
        ((3, 12, 7, 9), "fewer than 8"),
        ((99, 12, 10, 9), "header"),
    ],
)
def test_refuses_bogus_dimensions_without_allocating_them(tmp_path, dim, reason):
    assert reason in refusal(with_dimensions(tmp_path / "map.nii", *dim))


def test_refuses_a_small_gzip_that_claims_a_huge_image(tmp_path):
    path = with_dimensions(tmp_path / "map.nii", 3, 700, 700, 700)
    zipped = tmp_path / "map.nii.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert "cut short" in refusal(zipped)


def test_reads_no_more_of_a_gzip_than_the_header_claims(tmp_path):
    path = save(tmp_path / "map.nii", noise())
    bomb = tmp_path / "bomb.nii.gz"
    bomb.write_bytes(gzip.compress(path.read_bytes() + bytes(50_000_000)))
    assert load_image(bomb).image.shape == SMALL


def test_refuses_complex_and_colour_voxels(tmp_path):
    assert "complex" in refusal(save(tmp_path / "c.nii", noise().astype("c8")))
    colour = np.zeros(SMALL, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "colours" in refusal(save(tmp_path / "rgb.nii", colour))


def with_sform(path: Path, affine) -> Path:
    content = bytearray(save(path, noise()).read_bytes())
    content[252:256] = struct.pack("<2h", 0, 1)
    content[280:328] = np.asarray(affine, "<f4")[:3].tobytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        (np.diag([1, 1, 0, 1]), "singular"),
        ([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]], "singular"),
        (np.diag([1, np.nan, 1, 1]), "not finite"),
        (np.diag([1, np.inf, 1, 1]), "not finite"),
        (np.diag([0.05, 1, 1, 1]), "voxel size of 0.05 × 1 × 1 mm"),
        (np.diag([1, 1, 11, 1]), "voxel size"),
    ],
)
def test_refuses_an_unusable_affine(tmp_path, affine, reason):
    assert reason in refusal(with_sform(tmp_path / "map.nii", affine))


def test_notes_a_header_without_orientation(tmp_path):
    path = tmp_path / "map.nii"
    image = nib.Nifti1Image(noise(), None)
    nib.save(image, path)
    assert "left and right are assumed" in load_image(path).notes[0]


def test_takes_nan_and_infinity_as_zero_with_a_note(tmp_path):
    data = noise()
    data[6:] = np.nan
    data[5, 0, 0] = np.inf
    loaded = load_image(save(tmp_path / "masked.nii", data))
    kept = np.asarray(loaded.image.dataobj)
    assert not kept[6:].any()
    assert kept[5, 0, 0] == 0
    np.testing.assert_array_equal(kept[:5], data[:5])
    assert "50.09%" in loaded.notes[0]


def test_refuses_values_without_content(tmp_path):
    assert "all values are NaN" in refusal(save(tmp_path / "n.nii", np.full(SMALL, np.nan, "f4")))
    assert "every value is 0" in refusal(save(tmp_path / "z.nii", np.zeros(SMALL, "f4")))
    assert "every value is 7" in refusal(save(tmp_path / "c.nii", np.full(SMALL, 7, "i2")))
    few = np.full(SMALL, np.nan, "f4")
    few[0, 0] = 1
    assert "NaN" in refusal(save(tmp_path / "few.nii", few))


# Canvas


def ball(shape, affine, centre_mm, radius_mm):
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    mm = places @ affine[:3, :3].T + affine[:3, 3]
    return (np.linalg.norm(mm - centre_mm, axis=-1) <= radius_mm).astype("f4")


def centroid_mm(weights, affine):
    places = np.argwhere(weights > 0)
    w = weights[weights > 0]
    return affine[:3, :3] @ (w @ places / w.sum()) + affine[:3, 3]


def test_canonical_changes_axes_but_no_place():
    affine = oblique(flip=(-1, 1, -1))
    image = nib.Nifti1Image(ball((20, 20, 20), affine, affine[:3] @ [5, 6, 7, 1], 3), affine)
    turned = canonical(image)
    assert nib.aff2axcodes(turned.affine) == ("R", "A", "S")
    np.testing.assert_allclose(
        centroid_mm(turned.get_fdata(), turned.affine),
        centroid_mm(image.get_fdata(), affine),
        atol=1e-6,
    )


def test_an_image_on_the_models_grid_is_its_own_canvas():
    affine = oblique(angle=0.1)
    image = nib.Nifti1Image(noise((20, 24, 16)), affine)
    shape, canvas, box = canvas_geometry(image, Grid((20, 24, 16)))
    assert shape == (20, 24, 16)
    np.testing.assert_allclose(canvas, affine, atol=1e-9)
    assert box == (slice(0, 20), slice(0, 24), slice(0, 16))
    np.testing.assert_array_equal(conform(image, shape, canvas), image.dataobj)


def test_canvas_pads_alike_on_both_sides_and_leaves_zeros_there():
    image = nib.Nifti1Image(np.ones((20, 24, 16), "f4"), oblique(angle=0.1, flip=(-1, -1, 1)))
    shape, canvas, box = canvas_geometry(image, Grid((32, 24, 20)))
    assert shape == (32, 24, 20)
    assert box == (slice(6, 26), slice(0, 24), slice(2, 18))
    data = conform(image, shape, canvas)
    np.testing.assert_allclose(data[box], 1, atol=1e-5)
    data[box] = 0
    assert not data.any()


@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, -1, 1)])
def test_a_canvas_is_upright_where_slices_are_oblique(flip):
    angle = math.radians(25)
    image = nib.Nifti1Image(np.ones((20, 24, 16), "f4"), oblique((1, 1, 2), angle, flip))
    shape, canvas, box = canvas_geometry(image, Grid((8, 8, 8)))
    np.testing.assert_allclose(canvas[:3, :3], np.eye(3), atol=1e-9)
    data = conform(image, shape, canvas)
    # The whole field of view is there, and the canvas no larger than that.
    assert data.sum() == pytest.approx(20 * 24 * 32, rel=0.05)
    assert box == tuple(slice(0, n) for n in shape)
    reached = np.ptp(np.argwhere(data), axis=0) + 1
    assert (reached >= np.array(shape) - 2).all()


def test_a_canvas_keeps_slices_that_are_nearly_straight():
    image = nib.Nifti1Image(noise((20, 24, 16)), oblique((1, 1, 2), math.radians(5)))
    shape, canvas, _ = canvas_geometry(image, Grid((8, 8, 8), (1, 1, 2)))
    np.testing.assert_array_equal(conform(image, shape, canvas), image.dataobj)


@settings(max_examples=25, deadline=None)
@given(
    spacing=st.tuples(*[st.floats(0.5, 3.0)] * 3),
    angle=st.floats(-0.6, 0.6),
    flip=st.tuples(*[st.sampled_from([-1, 1])] * 3),
)
def test_a_place_in_the_head_keeps_its_scanner_coordinates(spacing, angle, flip):
    shape = tuple(math.ceil(40 / s) for s in spacing)
    affine = oblique(spacing, angle, flip)
    centre = affine[:3] @ [*(np.array(shape) * 0.45), 1]
    image = nib.Nifti1Image(ball(shape, affine, centre, 8), affine)
    canvas_shape, canvas, box = canvas_geometry(image, Grid((48, 48, 48)))
    data = conform(image, canvas_shape, canvas)
    np.testing.assert_allclose(
        centroid_mm(data, canvas), centroid_mm(image.get_fdata(), affine), atol=0.25
    )
    ratio = data.sum() / (image.get_fdata().sum() * np.prod(spacing))
    assert 0.93 < ratio < 1.07
    outside = data.copy()
    outside[box] = 0
    assert not outside.any()


def test_conform_smooths_before_it_thins_out():
    checker = np.indices((32, 32, 32)).sum(axis=0) % 2
    image = nib.Nifti1Image(checker.astype("f4"), np.eye(4))
    coarse = resample(image, (8, 8, 8), np.diag([4.0, 4, 4, 1]))
    np.testing.assert_allclose(coarse.get_fdata()[1:-1, 1:-1, 1:-1], 0.5, atol=0.02)


def test_conform_of_labels_invents_no_label():
    labels = np.zeros((16, 16, 16), "f4")
    labels[4:12, 4:12, 4:12] = 6
    out = conform(nib.Nifti1Image(labels, np.eye(4)), (20, 20, 20), np.diag([0.8, 0.8, 0.8, 1]), 0)
    assert set(np.unique(out)) == {0.0, 6.0}


def test_same_grid_is_a_matter_of_micrometres():
    a = nib.Nifti1Image(noise(), oblique())
    moved = oblique()
    moved[0, 3] += 5e-4
    assert same_grid(a, nib.Nifti1Image(noise(), moved))
    moved[0, 3] += 1e-3
    assert not same_grid(a, nib.Nifti1Image(noise(), moved))
    assert not same_grid(a, nib.Nifti1Image(noise((12, 10, 10)), oblique()))


# Foreground


def head(kind):
    """An ellipsoid head in air, 2 mm voxels; returns the map and the true head."""
    rng = np.random.default_rng(1)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in (96, 112, 80)], indexing="ij")
    inside = (axes[0] / 0.75) ** 2 + (axes[1] / 0.8) ** 2 + ((axes[2] + 0.3) / 1.1) ** 2 < 1
    tissue = rng.normal(0, 0.05, inside.shape)
    air = rng.normal(0, 1.0, inside.shape)
    data = {
        "masked QSM": np.where(inside, tissue, 0),
        "unmasked QSM, noise in air": np.where(inside, tissue, air),
        "unmasked QSM, quiet air": np.where(inside, tissue, 0.01 * air),
        "iMag": np.where(inside, 300 + 2000 * tissue + 200 * axes[0], 20 * np.abs(air)),
        "masked iMag": np.where(inside, 300 + 1000 * tissue, 0),
    }[kind]
    return data.astype("f4"), inside


@pytest.mark.parametrize(
    "kind",
    [
        "masked QSM",
        "unmasked QSM, noise in air",
        "unmasked QSM, quiet air",
        "iMag",
        "masked iMag",
    ],
)
def test_foreground_is_the_head(kind):
    data, inside = head(kind)
    found = foreground(data)
    both = 2 * np.count_nonzero(found & inside) / (found.sum() + inside.sum())
    assert both > 0.95
    for axis in range(3):
        others = tuple({0, 1, 2} - {axis})
        ends = [np.flatnonzero(m.any(axis=others))[[0, -1]] for m in (found, inside)]
        assert np.abs(ends[0] - ends[1]).max() <= 3


def test_foreground_of_a_field_of_view_without_air_is_everything():
    data = 100 + noise((40, 40, 40))
    assert foreground(data).all()


# Windows


def solid(shape, box):
    mask = np.zeros(shape, bool)
    mask[box] = True
    return mask


def holds(start, length, low, high, margin, end):
    below = start == 0 or low - start >= margin
    above = start + length == end or start + length - high >= margin
    return start <= low and high <= start + length and below and above


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_region_of_60_mm_keeps_its_margin_in_one_window(data):
    spacing = data.draw(st.tuples(*[st.sampled_from([0.8, 1.0, 1.3])] * 3))
    grid = Grid(
        tuple(data.draw(st.integers(math.ceil(82 / s) + 1, math.ceil(170 / s))) for s in spacing),
        spacing,
    )
    inside = [data.draw(st.integers(60, 260)) for _ in range(3)]
    shape = tuple(max(n, g) for n, g in zip(inside, grid.shape, strict=True))
    box = tuple(slice((s - n) // 2, (s - n) // 2 + n) for s, n in zip(shape, inside, strict=True))
    low = [data.draw(st.integers(side.start, side.stop - 1)) for side in box]
    high = [data.draw(st.integers(a + 1, side.stop)) for a, side in zip(low, box, strict=True)]
    # Three lines stand for the box: windows looks at its extent alone.
    mask = np.zeros(shape, bool)
    for axis in range(3):
        line = [slice(a, a + 1) for a in low]
        line[axis] = slice(low[axis], high[axis])
        mask[tuple(line)] = True
    margin = data.draw(st.sampled_from([5.0, 10.0]))
    starts = windows(mask, box, grid, margin)
    assert len(set(starts)) == len(starts)
    for axis in range(3):
        n, length = shape[axis], grid.shape[axis]
        extent = min(int(NUCLEI_EXTENT_MM / spacing[axis]), high[axis] - low[axis])
        voxels = math.ceil(margin / spacing[axis])
        on_axis = {start[axis] for start in starts}
        assert all(0 <= start <= n - length for start in on_axis)
        for first in range(low[axis], high[axis] - extent + 1):
            assert any(holds(s, length, first, first + extent, voxels, n) for s in on_axis)
    # The axes combine freely, so what holds on each axis holds in one window.
    rest = starts if len(starts) == 1 else starts[1:]
    axes = [{start[axis] for start in rest} for axis in range(3)]
    combined = set(starts)
    assert len(combined) <= 1 + math.prod(map(len, axes))
    assert all((i, j, k) in combined for i in axes[0] for j in axes[1] for k in axes[2])


def test_one_window_does_where_the_canvas_is_the_models_grid():
    shape = (160, 160, 128)
    full = tuple(slice(0, n) for n in shape)
    assert windows(np.ones(shape, bool), full, Grid()) == [(0, 0, 0)]


def test_the_first_window_lies_below_the_vertex():
    shape = (200, 240, 256)
    full = tuple(slice(0, n) for n in shape)
    mask = solid(shape, (slice(30, 180), slice(40, 230), slice(0, 230)))
    assert windows(mask, full, Grid())[0] == (25, 55, 230 - 30 - 128)


def test_the_first_window_ends_with_a_field_of_view_that_cuts_the_vertex():
    shape = (160, 160, 150)
    full = tuple(slice(0, n) for n in shape)
    assert windows(np.ones(shape, bool), full, Grid())[0] == (0, 0, 22)


def test_an_empty_foreground_still_covers_the_field_of_view():
    shape = (160, 160, 200)
    full = tuple(slice(0, n) for n in shape)
    starts = windows(np.zeros(shape, bool), full, Grid())
    assert {s[2] for s in starts} >= {0, 72}


def test_complete_asks_for_every_structure_and_its_margin():
    grid = Grid((40, 40, 40))
    box = (slice(0, 60), slice(0, 40), slice(0, 40))
    found = np.zeros((2, 40, 40, 40), bool)
    found[:, 12:28, 0:40, 0:40] = True
    assert complete(found, (10, 0, 0), box, grid)
    found[1] = False
    assert not complete(found, (10, 0, 0), box, grid)
    found[1, 9:20, 5, 5] = True
    assert not complete(found, (10, 0, 0), box, grid)
    assert complete(found, (0, 0, 0), box, grid)
    found[1, 31, 5, 5] = True
    assert not complete(found, (0, 0, 0), box, grid)
    assert not complete(found, (10, 0, 0), box, grid)


def test_blend_of_agreeing_windows_is_the_whole():
    whole = np.random.default_rng(0).random((3, 20, 16, 30), dtype="f4")
    starts = [(0, 0, 0), (4, 0, 5), (4, 0, 14), (0, 0, 14), (4, 0, 0)]
    pieces = (whole[:, i : i + 16, j : j + 16, k : k + 16] for i, j, k in starts)
    np.testing.assert_allclose(blend(pieces, starts, (20, 16, 30)), whole, atol=1e-6)


def test_blend_trusts_a_window_less_towards_its_faces():
    ones, zeros = np.ones((1, 8, 8, 8), "f4"), np.zeros((1, 8, 8, 8), "f4")
    line = blend([ones, zeros], [(0, 0, 0), (0, 0, 4)], (8, 8, 14))[0, 4, 4]
    assert (np.diff(line[3:8]) < 0).all()
    assert line[3] == 1
    assert not line[8:].any()


# The way back


def smooth_probability(shape, affine, centre_mm, radius_mm):
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    mm = places @ affine[:3, :3].T + affine[:3, 3]
    distance = np.linalg.norm(mm - centre_mm, axis=-1) - radius_mm
    return (1 / (1 + np.exp(np.minimum(2 * distance, 50)))).astype("f4")


def test_restore_is_exact_where_the_grids_coincide():
    probabilities = np.random.default_rng(0).random((2, 20, 18, 16), dtype="f4")
    affine = oblique((0.9, 0.9, 1.1))
    np.testing.assert_array_equal(
        restore(probabilities, affine, (20, 18, 16), affine), probabilities
    )


def test_restore_of_a_crop_is_exact_on_its_own_grid_and_on_a_flipped_one():
    whole = np.zeros((2, 30, 30, 30), "f4")
    whole[:, 8:15, 9:20, 11:14] = np.random.default_rng(0).random((2, 7, 11, 3), dtype="f4") + 0.02
    affine = oblique()
    cropped, moved = crop_to(whole, affine)
    assert cropped.shape == (2, 11, 15, 7)
    np.testing.assert_array_equal(restore(cropped, moved, whole.shape[1:], affine), whole)
    flipped = affine @ np.array([[-1, 0, 0, 29], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(
        restore(cropped, moved, (30, 30, 30), flipped), whole[:, ::-1].transpose(0, 1, 3, 2)
    )


@pytest.mark.parametrize(
    "spacing", [(0.7, 0.7, 0.7), (0.5, 0.5, 3.0), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0)]
)
def test_restores_place_and_volume_to_the_native_grid(spacing):
    canvas = np.eye(4)
    canvas[:3, 3] = -24
    native = oblique(spacing, 0.2, (-1, 1, 1))
    shape = tuple(math.ceil(60 / s) for s in spacing)
    native[:3, 3] -= native[:3] @ [*((np.array(shape) - 1) / 2), 1]
    source = smooth_probability((48, 48, 48), canvas, [2.3, -3.1, 1.7], 6)[None]
    restored = restore(*crop_to(source, canvas), shape, native)
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored.sum() * np.prod(spacing), source.sum(), rtol=0.02)
    np.testing.assert_allclose(centroid_mm(restored[0], native), [2.3, -3.1, 1.7], atol=0.1)


def test_restore_averages_over_thick_slices():
    source = np.zeros((1, 12, 12, 12), "f4")
    source[0, :, :, 4] = 1
    thick = np.diag([1.0, 1, 3, 1])
    thick[2, 3] = 1
    restored = restore(source, np.eye(4), (12, 12, 4), thick)
    np.testing.assert_allclose(restored[0, 5, 5], [0, 1 / 3, 0, 0], atol=1e-6)


def test_restore_keeps_the_sum_of_probabilities_within_one():
    source = np.random.default_rng(0).dirichlet([1, 1, 1], (10, 10, 10)).astype("f4")
    source = np.moveaxis(source, -1, 0)[:2]
    restored = restore(source, np.eye(4), (20, 20, 20), oblique((0.6, 0.6, 0.6)) * 1.0)
    assert restored.sum(axis=0).max() <= 1 + 1e-5
    assert restored.min() >= 0


def test_restore_of_something_elsewhere_is_empty():
    far = np.eye(4)
    far[:3, 3] = 500
    assert not restore(np.ones((1, 4, 4, 4), "f4"), np.eye(4), (8, 8, 8), far).any()


def test_crop_of_nothing_is_one_voxel():
    cropped, affine = crop_to(np.zeros((4, 9, 9, 9), "f4"), oblique())
    assert cropped.shape == (4, 1, 1, 1)
    assert not restore(cropped, affine, (9, 9, 9), oblique()).any()


def test_a_small_grid_in_a_large_image_sees_what_all_of_it_would_show():
    rng = np.random.default_rng(0)
    image = nib.Nifti1Image(rng.random((40, 44, 36), dtype=np.float32), np.diag([1, 1, 1, 1.0]))
    # Coarser than the image, so that it is smoothed first.
    affine = np.diag([2.5, 2.0, 3.0, 1.0])
    whole = conform(image, (16, 22, 12), affine)
    for corner, shape in (((5, 6, 4), (4, 5, 3)), ((0, 0, 0), (3, 3, 3)), ((12, 18, 9), (6, 6, 5))):
        moved = affine.copy()
        moved[:3, 3] = affine[:3, :3] @ corner
        part = conform(image, shape, moved)
        place = tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))
        expected = np.zeros(shape, np.float32)
        held = whole[place]
        expected[tuple(slice(n) for n in held.shape)] = held
        np.testing.assert_allclose(part, expected, atol=1e-6)


def test_a_grid_beside_the_image_is_empty():
    image = nib.Nifti1Image(np.ones((10, 10, 10), np.float32), np.eye(4))
    affine = np.eye(4)
    affine[:3, 3] = 200
    assert not conform(image, (4, 4, 4), affine).any()
