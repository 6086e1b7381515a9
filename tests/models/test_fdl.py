"""The fusion networks against their formulas composed by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fdl_bidsapp.errors import ModelError
from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.models.fdl import METHODS, ModelSpec, build_network
from fdl_bidsapp.models.fourier import SPECTRA, low_part, place, split

SMALL = {"width": 4, "levels": 2}


def specification(method: str, **values: object) -> ModelSpec:
    values = {"theta": 0.3, "fusion_channels": 3, "backbone_options": SMALL, **values}
    return ModelSpec("test", method=method, **values)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", METHODS)
def test_logits_cover_background_and_labels_on_an_odd_grid(method, spectrum):
    network = build_network(specification(method, spectrum=spectrum, labels=nuclei()))
    (logits,) = network(torch.rand(2, 1, 11, 13, 9))
    assert logits.shape == (2, 9, 11, 13, 9)
    assert logits.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_weight_under_autocast(method):
    network = build_network(specification(method))
    with torch.autocast("cpu", torch.bfloat16):
        (logits,) = network(torch.rand(1, 1, 12, 10, 14))
    (logits.float() * torch.rand_like(logits, dtype=torch.float32)).sum().backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    assert [name for name, g in grads.items() if g is None or not g.abs().sum() > 0] == []


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_early_fusion_joins_the_parts_before_the_backbone(spectrum):
    network = build_network(specification("early", spectrum=spectrum)).eval()
    x = torch.rand(1, 1, 12, 14, 10)
    low, high = split(x, 0.3, spectrum)
    y = place(network.conv_h(high), network.conv_l(low), spectrum)
    torch.testing.assert_close(network(x)[0], network.head(network.backbone.features(y)))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_late_fusion_joins_the_low_part_to_the_last_features(spectrum):
    network = build_network(specification("late", spectrum=spectrum)).eval()
    x = torch.rand(1, 1, 12, 14, 10)
    low, high = split(x, 0.3, spectrum)
    u = network.backbone.features(network.conv_h(high))
    expected = network.head(torch.cat([place(u, network.conv_l(low), spectrum), u], 1))
    torch.testing.assert_close(network(x)[0], expected)


def test_multimodal_fusion_is_late_fusion_with_each_low_part():
    spec = specification("multimodal", contrasts=("qsm", "imag"))
    network = build_network(spec).eval()
    late = build_network(dataclasses.replace(spec, method="late")).eval()
    late.load_state_dict(network.state_dict())
    x, other = torch.rand(2, 1, 1, 12, 14, 10)

    own, joint = network(x, [low_part(other, 0.3)])

    torch.testing.assert_close(own, late(x)[0])
    _, high = split(x, 0.3)
    u = network.backbone.features(network.conv_h(high))
    torch.testing.assert_close(joint, network.fuse(u, low_part(other, 0.3)))
    assert (own - joint).abs().max() > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_fusion_does_see_the_low_part_where_the_method_says_so(method):
    network = build_network(specification(method)).eval()
    x = torch.rand(1, 1, 12, 12, 12)
    low, high = split(x, 0.3)
    changed = place(high, low.square())
    assert (network(x)[0] - network(changed)[0]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "values",
    [
        {"method": "middle"},
        {"theta": 1.0},
        {"theta": float("nan")},
        {"spectrum": "shifted"},
        {"fusion_channels": 0},
        {"grid_shape": (160, 160)},
        {"grid_shape": (1000, 1000, 1000)},
        {"grid_spacing": (1.0, 1.0, 0.0)},
        {"contrasts": ()},
        {"contrasts": ("t1w",)},
        {"intensity": {"qsm": "zscore"}},
        {"intensity": {}},
        {"labels": ()},
        {"labels": nuclei()[:1] * 2},
        {"labels": (dataclasses.replace(nuclei()[0], abbreviation="../RN"),)},
        {"labels": (dataclasses.replace(nuclei()[0], index=0),)},
        {"labels": (dataclasses.replace(nuclei()[0], index=256),)},
    ],
)
def test_refuses_a_setting_out_of_range(values):
    with pytest.raises(ModelError):
        ModelSpec("test", **values)


def test_refuses_a_backbone_too_wide_for_the_grid():
    spec = ModelSpec("test", backbone_options={"width": 128}, grid_shape=(200, 200, 200))
    with pytest.raises(ModelError, match="memory"), torch.device("meta"):
        build_network(spec)
