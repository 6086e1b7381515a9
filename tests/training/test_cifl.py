from __future__ import annotations

import numpy as np
import pytest
import torch

from fdl_bidsapp.errors import DataError, InputMissingError, ModelError, UsageError
from fdl_bidsapp.models.bundle import load_bundle, load_features, save_features
from fdl_bidsapp.models.cifl import FeatureNetwork, FeatureSpec, cifl_loss
from fdl_bidsapp.simulation.random_shapes import random_pair
from fdl_bidsapp.training.cifl import TwoViews, fit_features, make_feature_settings
from fdl_bidsapp.training.fit import fit, make_settings, read_toml
from fdl_bidsapp.training.recipes import make_feature_recipe


def settings(**values):
    quick = {"steps": 3, "batch": 2, "mixed_precision": False}
    options = {**quick, **values.pop("recipe_options", {})}
    base = {"dimensions": 2, "channels": 4, "width": 8, "layers": 4, "grid_shape": [24, 24]}
    return make_feature_settings({**base, "recipe_options": options, **values})


def loss_of_unseen(network) -> float:
    """The loss on shapes that no training has seen, off the border."""
    views = random_pair(torch.Generator().manual_seed(10**6), 8, (32, 32))[:2]
    with torch.inference_mode():
        first, second = (network(view)[..., 4:-4, 4:-4] for view in views)
        return float(cifl_loss(first, second, tau_channels=0.1, centred=True))


def test_training_makes_features_alike_in_two_contrasts_and_unlike_each_other(tmp_path):
    output = tmp_path / "f.safetensors"
    options = {"steps": 60, "batch": 4, "learning_rate": 5e-3}
    fit_features(settings(recipe_options=options), output, device="cpu")
    bundle = load_features(output)
    assert bundle.spec.provenance["steps"] == 60
    assert bundle.spec.provenance["recipe_options"]["tau_channels"] == 0.1
    assert (tmp_path / "f.run" / "training.png").exists()
    torch.manual_seed(0)
    assert loss_of_unseen(bundle.network()) < 0.7 * loss_of_unseen(FeatureNetwork(bundle.spec))


def test_nothing_is_learnt_from_the_border():
    torch.manual_seed(0)
    network = FeatureNetwork(FeatureSpec("n", 2, channels=3, width=4, layers=4))
    small = torch.rand(1, 1, 24, 24)
    wide = torch.nn.functional.pad(small, [9] * 4, value=0.7)
    (inner,) = TwoViews(network)(small, [])
    assert inner.shape[2:] == (16, 16)
    # What lies beyond the image, padding or more image, cannot be seen in what is left.
    assert torch.allclose(inner, network(wide)[..., 13:-13, 13:-13], atol=1e-5)


def test_volumes_are_trained_on_like_slices(tmp_path):
    output = tmp_path / "f.safetensors"
    fit_features(settings(dimensions=3, grid_shape=[14, 14, 14]), output, device="cpu")
    assert load_features(output).spec.dimensions == 3


def test_two_trainings_of_one_seed_agree(tmp_path):
    whole = fit_features(settings(), tmp_path / "whole.safetensors", device="cpu")
    again = fit_features(settings(), tmp_path / "again.safetensors", device="cpu")
    other = fit_features(settings(seed=1), tmp_path / "other.safetensors", device="cpu")
    weights = [load_features(path).state["layers.0.weight"] for path in (whole, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_another_training_is_not_gone_on_with(tmp_path):
    fit_features(settings(), tmp_path / "f.safetensors", device="cpu")
    with pytest.raises(DataError, match="another configuration"):
        fit_features(settings(channels=5), tmp_path / "f.safetensors", device="cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        {"dimensions": 4},
        {"grid_shape": [24]},
        {"grid_shape": [19, 24]},
        {"table": "cases.tsv"},
        {"channels": "many"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError):
        make_feature_settings({"dimensions": 2, **wrong})


@pytest.mark.parametrize("wrong", [{"tau_channels": 0}, {"centred": 1}, {"loss": "dice"}])
def test_recipe_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError):
        make_feature_recipe(wrong)


@pytest.fixture
def volume_features(tmp_path):
    torch.manual_seed(0)
    spec = FeatureSpec("small", channels=4, width=4, layers=3)
    network = FeatureNetwork(spec)
    save_features(tmp_path / "f.safetensors", network, spec)
    return tmp_path / "f.safetensors"


@pytest.mark.parametrize("method", ["none", "early", "late", "multimodal"])
def test_any_method_is_trained_on_features_that_stay_as_they_were(
    labelled_set, quick, tmp_path, volume_features, method
):
    suffixes = ("qsm", "imag") if method == "multimodal" else ("qsm",)
    labelled_set(suffixes=suffixes)
    extra = {"modalities": ["imag"]} if method == "multimodal" else {}
    values = {**quick, "method": method, "features": str(volume_features), **extra}
    bundle = load_bundle(fit(make_settings(values), tmp_path / "m.safetensors", device="cpu"))
    features = load_features(volume_features)
    assert bundle.spec.features == features.spec.options
    assert bundle.spec.provenance["features"] == features.sha256
    for name, weight in features.state.items():
        assert np.array_equal(bundle.state[f"front.network.{name}"], weight)
    if method == "multimodal":
        assert bundle.bank["imag"][0].shape[0] == 4


def test_other_features_do_not_go_on_with_a_training(
    labelled_set, quick, tmp_path, volume_features
):
    labelled_set()
    values = {**quick, "features": str(volume_features)}
    fit(make_settings(values), tmp_path / "m.safetensors", device="cpu")
    spec = FeatureSpec("other", channels=4, width=4, layers=3)
    save_features(volume_features, FeatureNetwork(spec), spec)
    with pytest.raises(DataError, match="features"):
        fit(make_settings(values), tmp_path / "m.safetensors", device="cpu")


def test_features_of_slices_are_refused_for_volumes(labelled_set, quick, tmp_path):
    labelled_set()
    spec = FeatureSpec("slices", dimensions=2, channels=4, width=4)
    save_features(tmp_path / "f.safetensors", FeatureNetwork(spec), spec)
    values = {**quick, "features": str(tmp_path / "f.safetensors")}
    with pytest.raises(ModelError, match="slices"):
        fit(make_settings(values), tmp_path / "m.safetensors", device="cpu")


def test_features_that_are_not_there_are_told_how_to_get(labelled_set, quick, tmp_path):
    labelled_set()
    values = {**quick, "features": str(tmp_path / "none.safetensors")}
    with pytest.raises(InputMissingError, match="fdl train --recipe cifl"):
        fit(make_settings(values), tmp_path / "m.safetensors", device="cpu")


def test_a_features_file_is_found_beside_the_settings(tmp_path):
    (tmp_path / "train.toml").write_text('features = "f.safetensors"\n')
    assert read_toml(tmp_path / "train.toml")["features"] == str(tmp_path / "f.safetensors")
    (tmp_path / "train.toml").write_text('features = "cifl"\n')
    assert read_toml(tmp_path / "train.toml")["features"] == "cifl"
