from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from fdl_bidsapp.imaging.grid import Grid, canvas_geometry
from fdl_bidsapp.models.fdl import CONTRASTS
from fdl_bidsapp.models.fourier import low_part
from fdl_bidsapp.simulation.contrast import Protocol
from fdl_bidsapp.simulation.geometry import rotation
from fdl_bidsapp.simulation.stream import draw_batch
from fdl_bidsapp.training import data
from fdl_bidsapp.training.data import (
    HEAD_STEP,
    REGION_JITTER,
    SimulatedPatches,
    SimulatedRegions,
    cache_head,
    cache_region,
    cache_simulated_scan,
    cut_patch,
    degrade,
)

SHAPE = (30, 34, 26)
GRID = Grid((40, 40, 32), (5.0, 5.0, 5.0))
INTENSITY = dict.fromkeys(CONTRASTS, "minmax")


@pytest.fixture
def coarse(monkeypatch):
    protocol = Protocol(echo_times=(0.004, 0.014, 0.024))
    monkeypatch.setattr(data, "draw_protocol", lambda _: (protocol, (5.0, 5.0, 5.0), np.zeros(3)))


def stack_of(image, labels):
    """A cached scan with the same image in every contrast."""
    return np.stack([*[image] * len(CONTRASTS), labels]).astype(np.float16)


def saved(folder: Path, *scans) -> list[Path]:
    files = []
    for i, scan in enumerate(scans):
        files.append(folder / f"scan-{i}.npy")
        np.save(files[-1], scan)
    return files


def two_sided():
    """Left a bright structure 1, right a dim structure 2, in mid-grey."""
    image = np.full(SHAPE, 0.5, np.float32)
    labels = np.zeros(SHAPE)
    image[6:11, 12:20, 8:16], labels[6:11, 12:20, 8:16] = 1.0, 1
    image[20:25, 12:20, 8:16], labels[20:25, 12:20, 8:16] = 0.0, 2
    return stack_of(image, labels)


def draws(files, n, *, shape=(28, 28, 24), jitter=(0, 0, 0), severity=1.0):
    patches = SimulatedPatches(files, INTENSITY, (1, 0), {"qsm": 1.0}, severity)
    return [patches.draw(np.random.default_rng(seed), shape, jitter) for seed in range(n)]


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


def test_a_patch_has_the_shapes_and_range_of_the_network(tmp_path):
    for image, classes in draws(saved(tmp_path, two_sided()), 20, shape=(20, 24, 16)):
        assert image.shape == (1, 1, 20, 24, 16)
        assert image.dtype == torch.float32
        assert classes.shape == (1, 20, 24, 16)
        assert classes.dtype == torch.int64
        assert float(image.min()) >= 0
        assert float(image.max()) <= 1
        assert set(classes.unique().tolist()) <= {0, 1, 2}


def test_a_flip_swaps_the_sides(tmp_path):
    bright_left = []
    for image, classes in draws(saved(tmp_path, two_sided()), 40):
        places = [torch.argwhere(classes[0] == index).float().mean(0)[0] for index in (1, 2)]
        # Label 1 is the left one, whichever structure of the head is now there.
        assert places[0] < places[1] - 5
        left, right = (float(image[0, 0][classes[0] == index].mean()) for index in (1, 2))
        bright_left.append(left > right)
    assert 8 < sum(bright_left) < 32


def test_labels_stay_on_their_structures(tmp_path):
    for image, classes in draws(saved(tmp_path, two_sided()), 30, severity=0.0):
        inside = [image[0, 0][classes[0] == index] for index in (1, 2)]
        means = sorted(float(values.mean()) for values in inside)
        background = float(image[0, 0][classes[0] == 0].median())
        assert means[0] < background + 0.02
        assert means[1] > background - 0.02
        assert means[1] - means[0] > 0.3


def test_patches_stay_around_the_nuclei(tmp_path):
    files = saved(tmp_path, two_sided())
    centres = np.array(
        [
            torch.argwhere(classes[0] > 0).float().mean(0).numpy()
            for _, classes in draws(files, 60, shape=(30, 30, 30), jitter=(0, 6, 2))
        ]
    )
    # The nuclei's box is centred, and moves by no more than the jitter and the turn's rounding.
    assert np.all(np.abs(centres - 14.5) <= [2, 8, 4])
    assert centres[:, 1].std() > 2 * centres[:, 0].std()


def test_a_draw_follows_from_its_seed(tmp_path):
    files = saved(tmp_path, two_sided())
    (first, labels), (other, _) = draws(files, 2)
    again, labels_again = draws(files, 1)[0]
    assert torch.equal(first, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(first, other)


def test_contrasts_come_in_their_proportions(tmp_path):
    # Within the patch qsm is flat and swi has an edge, whatever is done to them.
    image = np.zeros((5, *SHAPE), np.float16)
    image[0, :, :, :3] = 1
    image[3, :, :, :13] = 1
    image[4, 10:20, 10:20, 8:18] = 1
    shares = {"qsm": 0.7, "swi": 0.3}
    patches = SimulatedPatches(saved(tmp_path, image), INTENSITY, (0,), shares)
    drawn = [patches.draw(np.random.default_rng(seed), (9, 9, 8), (0, 0, 0)) for seed in range(80)]
    edges = sum(float(patch.std()) > 0.15 for patch, _ in drawn)
    assert 14 <= edges <= 34


def test_the_low_part_of_another_contrast_comes_along(tmp_path):
    files = saved(tmp_path, two_sided())
    shares = {"qsm": 0.5, "imag": 0.5}
    patches = SimulatedPatches(files, INTENSITY, (1, 0), shares, severity=0.0, theta=0.2)
    whole, labels, low = patches.draw(np.random.default_rng(1), (28, 28, 24), (0, 0, 0))
    assert low.shape == (1, 1, 5, 5, 5)
    assert labels.shape == whole.shape[1:]
    # Both contrasts hold the same image here, so their low parts differ in brightness alone.
    own = low_part(whole, 0.2).ravel()
    assert np.corrcoef(own, low.ravel())[0, 1] > 0.9
    seldom = SimulatedPatches(files, INTENSITY, (1, 0), shares, theta=0.2, low_share=0.3)
    drawn = [seldom.draw(np.random.default_rng(i), (9, 9, 8), (0, 0, 0)) for i in range(60)]
    assert 8 <= sum(len(each) == 3 for each in drawn) <= 30


def test_some_patches_have_a_contrast_that_no_site_has(tmp_path):
    def grey_is_between(image, classes):
        inside = [float(image[0, 0][classes[0] == index].mean()) for index in (1, 2)]
        return min(inside) < float(image[0, 0][classes[0] == 0].median()) < max(inside)

    files = saved(tmp_path, two_sided())
    usual = [grey_is_between(*drawn) for drawn in draws(files, 40)]
    assert 20 < sum(usual) < 40
    assert all(grey_is_between(*drawn) for drawn in draws(files, 40, severity=0.0))


def test_degrading_keeps_the_image_recognisable():
    x, y, z = np.indices(SHAPE)
    image = (np.sin(x / 4) + np.cos(y / 5) * np.sin(z / 4)).astype(np.float32)
    results = [degrade(image.copy(), np.random.default_rng(seed)) for seed in range(40)]
    likeness = [np.corrcoef(image.ravel(), result.ravel())[0, 1] for result in results]
    assert min(likeness) > 0.75
    assert any(np.array_equal(image, result) for result in results)
    assert sum(not np.array_equal(image, result) for result in results) > 15
    assert all(result.dtype == np.float32 and result.shape == SHAPE for result in results)


def test_a_cached_scan_holds_the_contrasts_and_the_labels(coarse, tmp_path, monkeypatch):
    simulated = []

    def simulate(*arguments, **options):
        simulated.append(simulate_scan(*arguments, **options))
        return simulated[-1]

    simulate_scan = data.simulate_scan
    monkeypatch.setattr(data, "simulate_scan", simulate)
    path = cache_simulated_scan(tmp_path / "cache", 3, GRID, 4)
    stack = np.load(path)
    scan = simulated[0]
    assert stack.dtype == np.float16
    # Voxels of the model's size: the canvas is the scan's own grid, with room around it.
    reference = nib.Nifti1Image(scan.maps["imag"], scan.affine)
    shape, _, box = canvas_geometry(reference, GRID)
    assert stack.shape == (len(CONTRASTS) + 1, *shape)
    for channel, contrast in enumerate(CONTRASTS):
        np.testing.assert_allclose(
            stack[channel][box], scan.maps[contrast], rtol=1e-3, atol=1e-4, err_msg=contrast
        )
    kept = np.where(scan.labels <= 4, scan.labels, 0)
    assert kept.any()
    np.testing.assert_array_equal(stack[-1][box], kept)


def test_a_cached_scan_follows_from_its_seed_and_is_kept(coarse, tmp_path):
    first = cache_simulated_scan(tmp_path / "a", 1, GRID, 4)
    second = cache_simulated_scan(tmp_path / "b", 1, GRID, 4)
    other = cache_simulated_scan(tmp_path / "b", 2, GRID, 4)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [second.name, other.name]
    first.write_bytes(b"kept")
    assert cache_simulated_scan(tmp_path / "a", 1, GRID, 4).read_bytes() == b"kept"


def regions(tmp_path, n):
    """Draws from a scan whose image is bright in the region itself."""
    shape = (90, 100, 84)
    labels = np.zeros(shape)
    labels[40:50, 40:60, 30:40] = 1
    x, y, z = np.ogrid[:90, :100, :84]
    ball = (x - 44.5) ** 2 + (y - 49.5) ** 2 + (z - 34.5) ** 2 <= 20**2
    files = saved(tmp_path, stack_of(ball.astype(float), labels))
    coarse = SimulatedRegions(files, INTENSITY, {"qsm": 1.0}, severity=0.0)
    return [coarse.draw(np.random.default_rng(seed)) for seed in range(n)]


def test_the_region_lies_around_the_nuclei_in_every_field_of_view(tmp_path):
    agreeing = []
    for image, classes in regions(tmp_path, 20):
        assert image.shape[2:] == classes.shape[1:]
        bright, region = image[0, 0] > 0.5, classes[0] > 0
        if region.sum() > 50:
            both = 2 * (bright & region).sum() / (bright.sum() + region.sum())
            agreeing.append(float(both))
    assert len(agreeing) > 10
    # A shift by one of its voxels would give 0.85 of what the coarse grid leaves, 0.84.
    assert np.median(agreeing) > 0.8


def test_fields_of_view_differ_and_some_miss_a_part_of_the_region(tmp_path):
    drawn = regions(tmp_path, 40)
    assert len({tuple(image.shape) for image, _ in drawn}) > 20
    sizes = [int((classes > 0).sum()) for _, classes in drawn]
    assert min(sizes) < 0.8 * np.median(sizes)


HEAD_SCAN = {"echoes": 3, "inversion": "tikhonov"}


@pytest.mark.parametrize("shortcut", [True, False])
def test_a_cached_region_is_a_draw_of_its_seed(made_up_head, tmp_path, shortcut):
    grid = Grid((36, 44, 40), (2.0, 2.0, 2.0))
    path = tmp_path / "new" / "region.npy"
    cache_region(path, made_up_head, 5, grid, profile="ordinary", shortcut=shortcut)
    images, labels = draw_batch(
        [made_up_head],
        [5],
        grid.shape,
        grid.spacing,
        profile="ordinary",
        shortcut=float(shortcut),
        jitter=REGION_JITTER,
    )
    stack = np.load(path)
    assert stack.dtype == np.float16
    np.testing.assert_allclose(stack[:-1], images[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(stack[-1], labels[0])
    assert set(np.unique(stack[-1])) == set(range(9))
    path.write_bytes(b"kept")
    cache_region(path, made_up_head, 6, grid, profile="ordinary", shortcut=shortcut)
    assert path.read_bytes() == b"kept"


def test_a_cached_head_holds_the_brain_with_the_nuclei_inside(made_up_head, tmp_path):
    path = tmp_path / "head.npy"
    cache_head(path, made_up_head, 5)
    stack = np.load(path)
    extent = np.array(stack.shape[1:]) * HEAD_STEP
    assert np.all(extent > 0.8 * made_up_head.brain_size)
    inside = np.argwhere(stack[-1] > 0) * HEAD_STEP
    assert np.all(np.ptp(inside, axis=0) < extent / 2)
    assert np.abs(stack[CONTRASTS.index("imag")]).max() > 0
