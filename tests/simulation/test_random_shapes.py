from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fdl_bidsapp.simulation.random_shapes import (
    ShapeStyle,
    random_contrast,
    random_labels,
    random_pair,
    smooth_noise,
)

SHAPES = [(40, 32), (20, 18, 16)]
CLEAN = ShapeStyle(bias=0, blur=0, noise=0, texture=0, gamma=0, coarsen=1, clip=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_seed_gives_one_batch_and_another_gives_another(shape):
    first, again, other = (random_pair(seeded(seed), 3, shape) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_images_are_finite_and_span_nought_to_one(shape):
    for image in random_pair(seeded(), 4, shape)[:2]:
        assert image.shape == (4, 1, *shape)
        assert image.isfinite().all()
        assert torch.allclose(image.flatten(1).amin(1), torch.zeros(4))
        assert torch.allclose(image.flatten(1).amax(1), torch.ones(4))


def test_maps_of_a_batch_differ_in_number_and_size_of_shapes():
    labels = random_labels(seeded(), 12, (64, 64))
    counts = {len(one.unique()) for one in labels}
    edges = [(one[1:] != one[:-1]).float().mean() for one in labels]
    assert len(counts) > 3
    assert max(edges) > 2 * min(edges)


def test_shapes_are_connected_regions_not_noise():
    labels = random_labels(seeded(), 8, (64, 64))
    same = (labels[:, 1:] == labels[:, :-1]).float().mean()
    assert same > 0.75


def test_two_views_share_the_shapes_and_not_the_contrast():
    first, second, labels = random_pair(seeded(3), 16, (48, 48), CLEAN)
    signs = set()
    for one, other, shapes in zip(first[:, 0], second[:, 0], labels, strict=True):
        inner = torch.zeros_like(shapes, dtype=torch.bool)
        inner[1:-1, 1:-1] = True
        for axis in (0, 1):
            for step in (-1, 1):
                inner &= shapes.roll(step, axis) == shapes
        for value in shapes[inner].unique():
            # The least blur reaches one pixel only a little.
            assert one[inner & (shapes == value)].std(correction=0) < 0.05
        signs.add(bool(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0))
    assert signs == {True, False}


def test_every_part_of_the_style_shows():
    labels = random_labels(seeded(), 4, (48, 48))
    clean = random_contrast(seeded(1), labels, CLEAN)
    for name, value in {
        "bias": 0.5, "blur": 2.0, "noise": 0.1, "texture": 0.1, "gamma": 0.8, "coarsen": 4.0,
        "clip": 0.4,
    }.items():  # fmt: skip
        varied = random_contrast(seeded(1), labels, replace(CLEAN, **{name: value}))
        assert (varied - clean).abs().mean() > 1e-3, name


def test_cut_ends_of_the_range_are_flat_in_spite_of_noise():
    labels = random_labels(seeded(), 16, (48, 48))
    style = replace(CLEAN, noise=0.05, clip=0.4)
    flat = [
        float(((one == 0) | (one == 1)).float().mean())
        for one in random_contrast(seeded(1), labels, style)
    ]
    assert max(flat) > 0.2
    assert min(flat) < 0.05


def test_a_larger_scale_is_smoother():
    def roughness(scale: float) -> float:
        noise = smooth_noise(seeded(), 2, 4, (64, 64), scale)
        return float(noise.diff(dim=2).std() / noise.std())

    assert roughness(4) > 2 * roughness(16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_there():
    generator = torch.Generator("cuda").manual_seed(0)
    assert all(part.is_cuda for part in random_pair(generator, 2, (16, 16, 16)))
