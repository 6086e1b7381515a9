from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fdl_bidsapp.errors import ModelError
from fdl_bidsapp.models.bundle import (
    FeatureBundle,
    load_bundle,
    load_features,
    load_model,
    save_bundle,
    save_features,
)
from fdl_bidsapp.models.cifl import (
    VARIED_SCALE,
    VARIED_SHIFT,
    FeatureNetwork,
    FeatureSpec,
    FrozenFeatures,
    cifl_loss,
    compute_features,
    standardise,
    unit_maps,
    unit_pixels,
    vary_channels,
)
from fdl_bidsapp.models.fdl import METHODS, ModelSpec, build_network
from fdl_bidsapp.models.inference import predict

CPU = torch.device("cpu")
SMALL = FeatureSpec("small", channels=4, width=6, provenance={"seed": 1})


def loss_by_hand(first, second, alpha, beta, gamma) -> float:
    """The formula in plain floats, for one pair of (C, N) lists."""

    def unit(row):
        length = math.sqrt(sum(x * x for x in row))
        return [x / length for x in row]

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    r1, r2 = [unit(row) for row in first], [unit(row) for row in second]
    channels = range(len(r1))
    match = sum(math.exp(dot(r1[c], r2[c]) / alpha) for c in channels)
    total = sum(math.exp(dot(r1[c], r2[c]) / beta) for c in channels)
    unlike = sum(math.exp(dot(r1[c], r1[d]) / gamma) for c in channels for d in channels if c != d)
    return -math.log(match / (total + unlike))


@pytest.mark.parametrize(
    "temperatures", [(1, 1, 1), (0.1, 0.1, 0.1), (0.2, 0.1, 0.05), (1, 1, 0.1)]
)
def test_loss_is_the_formula(temperatures):
    alpha, beta, gamma = temperatures
    first = [[1.0, 2.0, 0.0, -1.0], [0.5, 0.0, 1.0, 1.0], [-1.0, 1.0, 2.0, 0.0]]
    second = [[1.0, 1.5, 0.5, -1.0], [0.0, 0.5, 1.0, 0.5], [-2.0, 1.0, 1.0, 0.0]]
    loss = cifl_loss(
        torch.tensor(first).reshape(1, 3, 2, 2),
        torch.tensor(second).reshape(1, 3, 2, 2),
        tau_match=alpha,
        tau_total=beta,
        tau_channels=gamma,
    )
    assert float(loss) == pytest.approx(loss_by_hand(first, second, alpha, beta, gamma), rel=1e-4)


def test_loss_of_two_orthogonal_maps_by_pencil():
    maps = torch.eye(2).reshape(1, 2, 1, 2)
    # Match 1 twice, unlike 0 twice, all temperatures 1: log((2e + 2) / 2e) = log(1 + 1/e).
    loss = cifl_loss(maps, maps, tau_match=1, tau_total=1, tau_channels=1)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


def test_loss_and_gradient_stay_finite_at_the_lowest_temperature():
    features = torch.rand(2, 16, 12, 12, requires_grad=True)
    loss = cifl_loss(features, features.detach(), tau_channels=0.01)
    loss.backward()
    # exp(1 / 0.01) alone is beyond float32.
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


def test_loss_falls_with_likeness_of_views_and_unlikeness_of_channels():
    torch.manual_seed(0)
    varied, noise = torch.randn(2, 1, 8, 10, 10)
    one_map = varied[:, :1].expand(-1, 8, -1, -1) + 0.01 * noise
    assert cifl_loss(varied, varied) < cifl_loss(varied, varied + noise)
    assert cifl_loss(varied, varied) < cifl_loss(one_map, one_map)


def test_loss_knows_no_scale_and_centred_no_offset():
    torch.manual_seed(0)
    first, second = torch.randn(2, 1, 4, 8, 8)
    assert cifl_loss(5 * first, second) == pytest.approx(float(cifl_loss(first, second)), rel=1e-4)
    moved = cifl_loss(first + 3, second - 2, centred=True)
    assert float(moved) == pytest.approx(float(cifl_loss(first, second, centred=True)), rel=1e-4)
    assert cifl_loss(first + 3, second - 2) != pytest.approx(float(moved), rel=0.1)


def test_units_are_over_space_in_the_loss_and_over_channels_outside():
    features = torch.randn(2, 5, 6, 7)
    assert torch.allclose(unit_maps(features).norm(dim=2), torch.ones(2, 5))
    assert torch.allclose(unit_pixels(features).norm(dim=1), torch.ones(2, 6, 7))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_standardised_channels_have_mean_nought_and_deviation_one(dimensions):
    torch.manual_seed(0)
    network = FeatureNetwork(FeatureSpec("n", dimensions, channels=3, width=4))
    images = torch.rand(4, 1, *(12,) * dimensions)
    before = network(images)
    standardise(network, images)
    after = network(images).transpose(0, 1).flatten(1)
    assert torch.allclose(after.mean(1), torch.zeros(3), atol=1e-4)
    assert torch.allclose(after.std(1), torch.ones(3), atol=1e-3)
    # Nothing but scale and offset of each channel has changed.
    pair = torch.stack([before[:, 0].flatten(), after[0]]).detach()
    correlation = torch.corrcoef(pair)[0, 1]
    assert float(correlation) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_eight_convolutions_of_three_see_seventeen_pixels(dimensions):
    network = FeatureNetwork(FeatureSpec("n", dimensions, channels=3, width=4))
    assert len(network.layers) == 8
    shape = (21,) * dimensions
    base = torch.zeros(1, 1, *shape)
    spot = base.clone()
    spot[(0, 0, *(10,) * dimensions)] = 1
    changed = (network(spot) - network(base)).abs().amax((0, 1)) > 0
    where = changed.nonzero()
    assert where.amin(0).tolist() == [2] * dimensions
    assert where.amax(0).tolist() == [18] * dimensions


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_border_is_no_edge(dimensions):
    network = FeatureNetwork(FeatureSpec("n", dimensions, channels=3, width=4))
    features = network(torch.full((1, 1, *(9,) * dimensions), 0.7)).flatten(2)
    assert torch.allclose(features, features[..., :1].expand_as(features), atol=1e-6)


def test_channels_vary_while_something_is_trained_on_them_and_never_after():
    torch.manual_seed(0)
    front = FrozenFeatures(FeatureNetwork(SMALL))
    image = torch.rand(2, 1, 8, 8, 8)
    varied = front.train()(image)
    assert not torch.allclose(varied, front(image))
    assert torch.allclose(varied.norm(dim=1), torch.ones(2, 8, 8, 8))
    steady = front.eval()(image)
    assert torch.equal(steady, front(image))
    assert torch.equal(steady, unit_pixels(front.network(image)))


def test_varied_channels_keep_what_is_in_them_and_lose_what_they_are():
    images = torch.randn(400, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    one, again = (vary_channels(images, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(one, again)
    pairs = torch.stack([images.flatten(2), one.flatten(2)], 2).flatten(0, 1)
    assert all(float(torch.corrcoef(pair)[0, 1]) > 0.999 for pair in pairs)
    size = images.square().mean((1, 2, 3)).sqrt()
    factors = one.flatten(2).std(2) / images.flatten(2).std(2)
    shift = (one.mean((2, 3)) - factors * images.mean((2, 3))) / size[:, None]
    assert float(factors.log().std()) == pytest.approx(VARIED_SCALE, rel=0.1)
    assert float(shift.std()) == pytest.approx(VARIED_SHIFT, rel=0.1)


def test_last_layer_is_linear():
    network = FeatureNetwork(FeatureSpec("n", 2, channels=3, width=4, layers=1))
    a, b = torch.randn(2, 1, 1, 9, 9)
    bias = network.layers[0].bias.reshape(1, 3, 1, 1)
    assert torch.allclose(network(a + b), network(a) + network(b) - bias, atol=1e-5)


def test_slabs_change_nothing():
    torch.manual_seed(0)
    network = FeatureNetwork(SMALL).eval()
    volume = np.random.default_rng(0).random((9, 8, 30), np.float32)
    whole = compute_features(network, volume, CPU)
    assert np.allclose(compute_features(network, volume, CPU, slab=7), whole, atol=1e-5)
    assert np.allclose(np.linalg.norm(whole, axis=0), 1, atol=1e-5)


def test_a_network_for_slices_sees_each_slice_alone():
    torch.manual_seed(0)
    network = FeatureNetwork(FeatureSpec("slices", 2, channels=4, width=6)).eval()
    volume = np.random.default_rng(0).random((9, 8, 6), np.float32)
    whole = compute_features(network, volume, CPU, slab=4)
    assert whole.shape == (4, 9, 8, 6)
    alone = compute_features(network, volume[..., 2:3], CPU)
    assert np.allclose(alone[..., 0], whole[..., 2], atol=1e-5)


def test_features_are_stored_and_read_back(tmp_path):
    network = FeatureNetwork(SMALL)
    digest = save_features(tmp_path / "f.safetensors", network, SMALL)
    loaded = load_features(tmp_path / "f.safetensors")
    assert (loaded.spec, loaded.sha256) == (SMALL, digest)
    image = torch.rand(1, 1, 8, 8, 8)
    assert torch.equal(loaded.network()(image), network(image))
    assert isinstance(load_model(tmp_path / "f.safetensors"), FeatureBundle)


def test_one_kind_of_model_is_not_taken_for_the_other(tmp_path):
    features, model = tmp_path / "f.safetensors", tmp_path / "m.safetensors"
    save_features(features, FeatureNetwork(SMALL), SMALL)
    spec = ModelSpec("m", "none", backbone_options={"width": 2, "levels": 1})
    save_bundle(model, build_network(spec), spec)
    with pytest.raises(ModelError, match="segments nothing"):
        load_bundle(features)
    with pytest.raises(ModelError, match="no features"):
        load_features(model)


def test_weights_of_another_size_are_refused(tmp_path):
    wider = FeatureSpec("wider", channels=4, width=8)
    with pytest.raises(ModelError, match="do not fit"):
        save_features(tmp_path / "f.safetensors", FeatureNetwork(SMALL), wider)


@pytest.mark.parametrize(
    "wrong", [{"dimensions": 4}, {"channels": 1}, {"width": 0}, {"layers": 1.5}, {"name": ""}]
)
def test_a_specification_out_of_range_is_refused(wrong):
    with pytest.raises(ModelError):
        FeatureSpec(**{"name": "n", **wrong})


def with_features(method: str) -> ModelSpec:
    return ModelSpec(
        "with-features",
        method=method,
        backbone_options={"width": 4, "levels": 2},
        fusion_channels=3,
        theta=0.3,
        grid_shape=(12, 10, 8),
        contrasts=("qsm", "imag"),
        features=SMALL.options,
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_features_and_leaves_them_as_they_are(method):
    network = build_network(with_features(method))
    image = torch.rand(1, 1, 12, 10, 8)
    assert network.front(image).shape == (1, 4, 12, 10, 8)
    logits = network(image)[0]
    assert logits.shape == (1, 5, 12, 10, 8)
    logits.sum().backward()
    trained = {name for name, weight in network.named_parameters() if weight.grad is not None}
    assert trained
    assert not any(name.startswith("front.") for name in trained)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_with_features_is_one_file(tmp_path, method):
    spec = with_features(method)
    network = build_network(spec).eval()
    images = {c: np.random.default_rng(0).random((12, 10, 8), np.float32) for c in spec.contrasts}
    save_bundle(tmp_path / "m.safetensors", network, spec)
    loaded = load_bundle(tmp_path / "m.safetensors")
    assert loaded.spec == spec
    average = method == "multimodal"
    expected = predict(network, spec, images, "qsm", CPU, average=average)
    found = predict(loaded.network(), loaded.spec, images, "qsm", CPU, average=average)
    assert np.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"channels": 4}, {"channels": 4, "width": 6, "layers": 0}])
def test_a_model_with_half_a_front_is_refused(wrong):
    with pytest.raises(ModelError):
        ModelSpec("m", features=wrong)
