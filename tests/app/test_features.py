"""A model with contrast-invariant features goes through the app like any other."""

from __future__ import annotations

import pytest
import torch

from fdl_bidsapp.labels import by_abbreviation
from fdl_bidsapp.models.bundle import save_bundle
from fdl_bidsapp.models.fdl import ModelSpec, build_network

pytestmark = pytest.mark.real


@pytest.mark.parametrize("method", ["none", "late"])
def test_a_scan_is_segmented_by_a_model_with_features(study, tmp_path, method):
    torch.manual_seed(0)
    spec = ModelSpec(
        "featured",
        method=method,
        backbone_options={"width": 2, "levels": 1},
        fusion_channels=2,
        grid_shape=(32, 32, 32),
        labels=by_abbreviation(["RNL", "RNR"]),
        features={"channels": 4, "width": 4, "layers": 8},
    )
    network = build_network(spec)
    with torch.no_grad():
        # Something of each structure wherever it is asked for.
        head = network.head if method == "none" else network.head[-1]
        head.bias.copy_(torch.tensor([0.0, 0.2, 0.1]))
    model = tmp_path / "featured.safetensors"
    save_bundle(model, network, spec)
    study.add("01")
    assert study.run("participant", "--model", model) == 0
    labels = study.labels("01").get_fdata()
    assert labels.shape == (32, 32, 32)
    assert set(labels.ravel()) <= {0, 1, 2}
    assert labels.any()
    assert study.record("01")
