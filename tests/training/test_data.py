from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fdl_bidsapp.imaging.grid import Grid
from fdl_bidsapp.models.fdl import CONTRASTS
from fdl_bidsapp.models.fourier import low_part
from fdl_bidsapp.simulation.contrast import Protocol
from fdl_bidsapp.simulation.stream import draw_batch
from fdl_bidsapp.training import data
from fdl_bidsapp.training.data import (
    HEAD_STEP,
    REGION_JITTER,
    SimulatedWindows,
    cache_head,
    cache_region,
    cache_template,
    cut_window,
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


def windows(files, shares=None, regions=((1, 2),), **options):
    return SimulatedWindows(files, INTENSITY, (1, 0), shares or {"qsm": 1.0}, regions, **options)


def draws(files, n, *, shape=(28, 28, 24), jitter=(0, 0, 0), severity=1.0, **options):
    drawn = windows(files, severity=severity, **options)
    return [drawn.draw(np.random.default_rng(seed), shape, jitter) for seed in range(n)]


def test_an_undeformed_window_is_a_plain_crop():
    rng = np.random.default_rng(0)
    image, labels = rng.standard_normal(SHAPE), rng.integers(0, 5, SHAPE)
    scan = stack_of(image, labels)
    # The centre of voxels 5..14, 8..18 and -2..5: the last axis begins beyond the scan.
    centre = np.array([9.5, 13.0, 1.5])
    cut, classes = cut_window(scan, [2, 0], centre, (10, 11, 8), rng, strength=0.0)
    crop = (slice(5, 15), slice(8, 19), slice(0, 6))
    np.testing.assert_allclose(cut[0, :, :, :, 2:], scan[[2, 0]][:, *crop], atol=2e-3)
    np.testing.assert_array_equal(classes[0, :, :, 2:], labels[crop])
    assert not cut[..., :2].any()
    assert not classes[..., :2].any()


def test_windows_lie_around_each_region_as_often_as_asked(tmp_path):
    files = saved(tmp_path, two_sided())
    options = {"shape": (12, 20, 16), "regions": ((1,), (2,)), "severity": 0.0}
    drawn = draws(files, 40, region_shares=(0.9, 0.1), **options)
    # Around the bright structure all else is the darkest, around the dim one the brightest.
    bright = [float(image.median()) < 0.5 for image, _ in drawn]
    assert 30 <= sum(bright) < 40


def test_a_window_astray_may_miss_its_region(tmp_path):
    files = saved(tmp_path, two_sided())
    options = {"shape": (12, 20, 16), "regions": ((1,),)}
    assert all(bool(classes.any()) for _, classes in draws(files, 20, **options))
    missed = [not classes.any() for _, classes in draws(files, 20, astray=1.0, **options)]
    assert 3 < sum(missed) < 20


def test_a_field_of_view_that_ends_in_a_window_takes_image_and_labels(tmp_path):
    files = saved(tmp_path, stack_of(np.ones(SHAPE), np.ones(SHAPE)))
    rng = np.random.default_rng(0)
    drawn = windows(files, regions=((1,),), cut_off=1.0, severity=0.0)
    ends = []
    for _ in range(20):
        _, classes = drawn.draw(rng, (10, 12, 16), (0, 0, 0))
        filled = (classes[0] > 0).float().mean((0, 1))
        # A window that is turned may leave the scan with its corners.
        seen = filled > 0.7
        assert not filled[~seen].any()
        assert not (seen[0] and seen[-1])
        ends.append(int(seen.sum()))
    assert len(set(ends)) > 6


def test_a_deformed_window_moves_image_and_labels_alike():
    scan = two_sided()
    for seed in range(10):
        cut, classes = cut_window(
            scan, [0], np.array([15.0, 16.0, 12.0]), (28, 30, 24), np.random.default_rng(seed)
        )
        # The image is 1 in structure 1, 0 in structure 2, and 0.5 around them in the scan.
        bright, dark = cut[0, 0] > 0.75, cut[0, 0] < 0.25
        assert float(bright[classes[0] == 1].float().mean()) > 0.7
        assert float(bright[classes[0] != 1].float().mean()) < 0.01
        assert float(dark[classes[0] == 2].float().mean()) > 0.7


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
    # The nuclei's box is centred, and moves by the jitter and a little by the deformation.
    assert np.all(np.abs(centres.mean(0) - 14.5) < [1, 2, 1])
    assert np.all(np.abs(centres - 14.5) <= [6, 12, 8])
    assert centres[:, 1].std() > 1.5 * centres[:, 0].std()


def test_a_draw_follows_from_its_seed(tmp_path):
    files = saved(tmp_path, two_sided())
    (first, labels), (other, _) = draws(files, 2)
    again, labels_again = draws(files, 1)[0]
    assert torch.equal(first, again)
    assert torch.equal(labels, labels_again)
    assert not torch.equal(first, other)


def test_contrasts_come_in_their_proportions(tmp_path):
    # Within the patch qsm is flat and swi has an edge.
    image = np.zeros((5, *SHAPE), np.float16)
    image[0, :, :, :3] = 1
    image[3, :, :, :13] = 1
    image[4, 10:20, 10:20, 8:18] = 1
    shares = {"qsm": 0.7, "swi": 0.3}
    patches = windows(saved(tmp_path, image), shares, ((1,),), severity=0.0)
    drawn = [patches.draw(np.random.default_rng(seed), (9, 9, 8), (0, 0, 0)) for seed in range(80)]
    edges = sum(float(patch.std()) > 0.15 for patch, _ in drawn)
    assert 14 <= edges <= 34


def test_the_low_part_of_another_contrast_comes_along(tmp_path):
    files = saved(tmp_path, two_sided())
    shares = {"qsm": 0.5, "imag": 0.5}
    patches = windows(files, shares, severity=0.0, theta=0.2)
    whole, labels, low = patches.draw(np.random.default_rng(1), (28, 28, 24), (0, 0, 0))
    assert low.shape == (1, 1, 5, 5, 5)
    assert labels.shape == whole.shape[1:]
    # Both contrasts hold the same image here, so their low parts differ in brightness alone.
    own = low_part(whole, 0.2).ravel()
    assert np.corrcoef(own, low.ravel())[0, 1] > 0.9
    seldom = windows(files, shares, theta=0.2, low_share=0.3)
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


def test_a_batch_holds_that_many_windows(tmp_path):
    files = saved(tmp_path, two_sided())
    shares = {"qsm": 0.5, "imag": 0.5}
    drawn = windows(files, shares, theta=0.2)
    image, classes, low = drawn.draw(np.random.default_rng(1), (28, 28, 24), (2, 2, 2), 3)
    assert image.shape == (3, 1, 28, 28, 24)
    assert classes.shape == (3, 28, 28, 24)
    assert low.shape == (3, 1, 5, 5, 5)
    assert not torch.equal(image[0], image[1])


def test_windows_lie_around_each_region_in_turn(tmp_path):
    seen = set()
    for _, classes in draws(
        saved(tmp_path, two_sided()), 30, shape=(9, 9, 9), regions=((1,), (2,))
    ):
        counts = torch.bincount(classes.flatten(), minlength=3)[1:]
        seen.add(int(counts.argmax()))
        assert int(counts.min()) == 0
    assert seen == {0, 1}


def test_a_scan_without_nuclei_gives_windows_without_them(tmp_path):
    scan = two_sided()
    scan[-1] = 0
    for image, classes in draws(saved(tmp_path, scan), 5, shape=(9, 9, 9)):
        assert not classes.any()
        assert image.shape == (1, 1, 9, 9, 9)


def test_a_scan_of_the_template_is_kept_as_region_and_head(coarse, tmp_path):
    grid = Grid((20, 24, 22), (4.0, 4.0, 4.0))
    paths = tmp_path / "new" / "region.npy", tmp_path / "new" / "head.npy"
    cache_template(*paths, 3, grid)
    region, head = (np.load(path) for path in paths)
    assert region.shape == (len(CONTRASTS) + 1, *grid.shape)
    assert set(np.unique(region[-1])) == set(np.unique(head[-1])) == set(range(9))
    # The nuclei are in the middle of the region, with all of them inside.
    places = np.argwhere(region[-1] > 0)
    middle = (places.min(0) + places.max(0)) / 2
    assert np.all(np.abs(middle - (np.array(grid.shape) - 1) / 2) <= 1)
    # Iron-rich on both.
    for stack in (region, head):
        nucleus, brain = stack[0][stack[-1] > 0], stack[0][stack[0] != 0]
        assert nucleus.astype(float).mean() > brain.astype(float).mean() + 0.02
    before = [path.read_bytes() for path in paths]
    cache_template(*paths, 4, grid)
    assert [path.read_bytes() for path in paths] == before
    cache_template(tmp_path / "again.npy", tmp_path / "head.npy", 3, grid)
    assert (tmp_path / "again.npy").read_bytes() == before[0]


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
