"""Backbones: features on any grid, options that are checked."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl_bidsapp.errors import ModelError
from fdl_bidsapp.models.backbones import UNet3d, make_backbone, pad_to_multiple
from fdl_bidsapp.models.fdl import ModelSpec, build_network


@settings(max_examples=12, deadline=None)
@given(st.tuples(*(st.integers(1, 19) for _ in range(3))), st.integers(1, 4))
def test_features_come_at_the_input_s_resolution_on_any_grid(shape, levels):
    backbone = UNet3d(2, width=2, levels=levels)
    features = backbone.features(torch.rand(1, 2, *shape))
    assert features.shape == (1, backbone.feature_channels, *shape)
    assert features.isfinite().all()


def test_padding_does_not_change_a_grid_that_fits():
    x = torch.rand(1, 1, 8, 12, 16)
    assert pad_to_multiple(x, 4) is x
    padded = pad_to_multiple(x[..., :7, :, :14], 4)
    assert padded.shape == x.shape
    torch.testing.assert_close(padded[..., :7, :, :14], x[..., :7, :, :14])


def test_widths_double_down_to_the_largest():
    encoders = UNet3d(1, width=6, levels=4, max_width=20).encoders
    assert [encoder[0][0].out_channels for encoder in encoders] == [6, 12, 20, 20]


def test_every_weight_takes_part():
    backbone = UNet3d(1, width=3, levels=3)
    x = torch.rand(1, 1, 8, 8, 8)
    (backbone.features(x) * torch.rand(1, 3, 8, 8, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("dynunet", {"width": 4, "levels": 3}, (9, 12, 7)),
        ("segresnet", {"width": 8, "levels": 2}, (9, 12, 7)),
        ("unetr", {"grid": "32x16x16", "width": 2, "hidden_size": 12, "heads": 2}, (32, 16, 16)),
    ],
)
@pytest.mark.parametrize("method", ["none", "early", "late", "multimodal"])
def test_monai_s_networks_serve_every_method(name, options, shape, method):
    pytest.importorskip("monai")
    spec = ModelSpec(
        "test",
        method=method,
        backbone=name,
        backbone_options=options,
        fusion_channels=2,
        grid_shape=shape,
    )
    network = build_network(spec)
    (logits,) = network(torch.rand(1, 1, *shape))
    assert logits.shape == (1, 5, *shape)
    (logits * torch.rand_like(logits)).sum().backward()
    tensors = network.state_dict().values()
    assert len({tensor.data_ptr() for tensor in tensors if tensor.numel()}) == len(tensors)
    idle = [name for name, p in network.named_parameters() if p.grad is None]
    assert not idle
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in build_network(spec).state_dict().items()}
    assert shapes == {key: value.shape for key, value in network.state_dict().items()}


def test_a_transformer_refuses_another_grid_than_its_own():
    pytest.importorskip("monai")
    backbone = make_backbone("unetr", 1, grid="16x16x16", hidden_size=12, heads=2)
    with pytest.raises(ModelError, match="made for a grid"):
        backbone.features(torch.rand(1, 1, 16, 16, 32))
    with pytest.raises(ModelError, match="multiples of 16"):
        make_backbone("unetr", 1, grid="20x16x16")


def test_tells_how_to_install_monai(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(ModelError, match=r"fdl-bidsapp\[monai\]"):
        make_backbone("dynunet", 1)


def test_unknown_backbone_lists_the_known_ones():
    with pytest.raises(ModelError, match="choose one of: dynunet, segresnet, unet"):
        make_backbone("resnet", 1)


@pytest.mark.parametrize(
    "options",
    [{"width": 0}, {"width": 10**9}, {"levels": 40}, {"width": 2.5}, {"width": True}, {"depth": 3}],
)
def test_refuses_options_out_of_range(options):
    with pytest.raises(ModelError):
        make_backbone("unet", 1, **options)
