from __future__ import annotations

import numpy as np
import pytest
import torch

from fdl_bidsapp.training.augment import blur, random_warp, vary_intensity, warp

CPU = torch.device("cpu")
SHAPE = (20, 16, 18)


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    classes = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    classes[:, 4:12, 5:11, 3:14] = 1
    classes[:, 12:16, 5:11, 3:14] = 2
    return (classes == 1)[None].float(), classes


@pytest.mark.parametrize("seed", range(5))
def test_image_and_labels_move_together(seed):
    image, classes = scene()
    grid = random_warp(np.random.default_rng(seed), SHAPE, (0, 0, 0), SHAPE, 1.0, CPU)
    moved, labels = warp(image, classes, grid)
    assert labels.dtype == torch.int64
    assert set(labels.unique().tolist()) <= {0, 1, 2}
    disagree = ((moved[0, 0] > 0.5) != (labels[0] == 1)).float().mean()
    assert disagree < 0.01


def test_labels_keep_their_volume():
    places = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in SHAPE], indexing="ij"))
    middle = torch.tensor(SHAPE).view(3, 1, 1, 1) / 2
    ball = (places - middle).norm(dim=0) < 2.5
    classes = ball[None].to(torch.uint8)
    rng = np.random.default_rng(0)
    volumes = []
    for _ in range(200):
        start = tuple(rng.uniform(-1, 1, 3))
        grid = random_warp(rng, SHAPE, start, SHAPE, 0.0, CPU)
        volumes.append(float(warp(ball[None, None].float(), classes, grid)[1].sum()))
    assert np.mean(volumes) == pytest.approx(float(ball.sum()), rel=0.02)


def test_warps_differ_and_follow_from_the_seed():
    grids = [
        random_warp(np.random.default_rng(seed), SHAPE, (0, 0, 0), SHAPE, 1.0, CPU)
        for seed in (3, 3, 4)
    ]
    assert torch.equal(grids[0], grids[1])
    assert not torch.allclose(grids[0], grids[2], atol=0.01)


def test_a_window_is_cut_at_its_start():
    block = torch.rand(1, 1, *SHAPE)
    rng = np.random.default_rng(0)
    grid = random_warp(rng, (8, 6, 7), (3, 2, 5), SHAPE, 0.0, CPU)
    moved, _ = warp(block, torch.zeros(1, *SHAPE, dtype=torch.uint8), grid)
    torch.testing.assert_close(moved, block[..., 3:11, 2:8, 5:12], atol=1e-5, rtol=0)


def test_intensities_stay_in_range_and_keep_their_order():
    ramp = torch.linspace(0, 1, 16).view(1, 1, 16, 1, 1).expand(1, 1, 16, 12, 12).contiguous()
    for seed in range(30):
        varied = vary_intensity(ramp, np.random.default_rng(seed))
        assert varied.shape == ramp.shape
        assert 0 <= float(varied.min()) <= float(varied.max()) <= 1
        profile = varied.mean((0, 1, 3, 4))
        assert float(profile[12:].mean()) > float(profile[:4].mean())
        assert torch.equal(varied, vary_intensity(ramp, np.random.default_rng(seed)))


def test_blur_has_the_width_asked_for():
    image = torch.zeros(1, 1, 21, 21, 21)
    image[..., 10, 10, 10] = 1
    profile = blur(image, 1.5).sum((0, 1, 3, 4))
    x = torch.arange(21.0) - 10
    assert float((profile * x**2).sum()) == pytest.approx(1.5**2, rel=0.05)
