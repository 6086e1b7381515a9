"""Backbones: features on any grid, options that are checked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdl_bidsapp.errors import ModelError
from fdl_bidsapp.models.backbones import UNet3d, make_backbone


@settings(max_examples=12, deadline=None)
@given(st.tuples(*(st.integers(1, 19) for _ in range(3))), st.integers(1, 4))
def test_features_come_at_the_input_s_resolution_on_any_grid(shape, levels):
    backbone = UNet3d(2, width=2, levels=levels)
    features = backbone.features(torch.rand(1, 2, *shape))
    assert features.shape == (1, backbone.feature_channels, *shape)
    assert features.isfinite().all()


def test_padding_does_not_change_a_grid_that_fits():
    backbone = UNet3d(1, width=2, levels=3)
    x = torch.rand(1, 1, 8, 12, 16)
    assert backbone._padded(x) is x
    padded = backbone._padded(x[..., :7, :, :14])
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


def test_unknown_backbone_lists_the_known_ones():
    with pytest.raises(ModelError, match="choose one of: unet"):
        make_backbone("resnet", 1)


@pytest.mark.parametrize(
    "options",
    [{"width": 0}, {"width": 10**9}, {"levels": 40}, {"width": 2.5}, {"width": True}, {"depth": 3}],
)
def test_refuses_options_out_of_range(options):
    with pytest.raises(ModelError):
        make_backbone("unet", 1, **options)
