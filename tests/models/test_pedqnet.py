from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fdl_bidsapp.errors import InputMissingError, ModelError
from fdl_bidsapp.models.bundle import load_bundle, load_volume, save_volume
from fdl_bidsapp.models.pedqnet import (
    VolumeNetwork,
    VolumeSpec,
    convolve_dipole,
    model_loss,
    predict_susceptibility,
    predict_volume,
    segmentation_loss,
)
from fdl_bidsapp.physics.dipole import field_from_susceptibility
from fdl_bidsapp.physics.inversion import thresholded_division

SMALL = {"width": 4, "levels": 2}


def test_the_dipole_is_that_of_the_voxels_and_the_direction():
    rng = np.random.default_rng(0)
    chi = rng.normal(0, 0.1, (2, 12, 10, 8)).astype(np.float32)
    for spacing, direction in (((1.0, 1.0, 1.0), (0, 0, 1)), ((0.8, 0.8, 2.0), (0, 0.6, 0.8))):
        fields = convolve_dipole(torch.from_numpy(chi)[:, None], spacing, direction)
        for one, field in zip(chi, fields, strict=True):
            expected = field_from_susceptibility(one, spacing, direction)
            np.testing.assert_allclose(field[0], expected, atol=1e-6)


def test_the_loss_is_the_weighted_distance_on_the_circle():
    rng = torch.Generator().manual_seed(0)
    one, other = (6 * torch.rand(1, 1, 4, 4, 4, generator=rng) for _ in range(2))
    weight = torch.rand(1, 1, 4, 4, 4, generator=rng)
    weight[..., 0] = 0
    expected = (weight * (torch.exp(1j * one) - torch.exp(1j * other)).abs()).sum() / 48
    assert float(model_loss(one, other, weight)) == pytest.approx(float(expected), rel=1e-5)
    assert float(model_loss(one + 2 * torch.pi, one, weight)) == pytest.approx(0, abs=1e-5)


def test_windows_blend_to_what_the_network_gives():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    volume = np.random.default_rng(0).normal(size=(21, 17, 40)).astype(np.float32)
    found = predict_volume(Double(), volume[None], (16, 16, 16))
    np.testing.assert_allclose(found, 2 * volume, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smooth", [False, True])
def test_susceptibility_grows_with_the_field_and_is_zero_outside_the_mask(smooth):
    torch.manual_seed(0)
    spec = VolumeSpec("x", backbone_options=SMALL, patch=(16, 16, 16), smooth=smooth)
    network = VolumeNetwork(spec).eval()
    nn.init.normal_(network.last.weight)
    where = ((0.9, 0.9, 2.0), (0.1, 0.0, 0.995))
    field = np.random.default_rng(0).normal(0, 0.02, (20, 18, 16)).astype(np.float32)
    mask = np.zeros(field.shape, bool)
    mask[3:-3, 3:-3, 3:-3] = True
    one = predict_susceptibility(network, spec, field, mask, *where)
    three = predict_susceptibility(network, spec, 3 * field, mask, *where)
    assert one[mask].std() > 0
    assert not one[~mask].any()
    np.testing.assert_allclose(three, 3 * one, rtol=1e-3, atol=1e-5)


def test_segmentation_ignores_what_is_not_known():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 6, 6, 6)
    classes = torch.randint(0, 3, (1, 6, 6, 6))
    classes[..., :3] = -1
    changed = logits.clone()
    changed[..., :3] = 9.0
    assert float(segmentation_loss(logits, classes)) == pytest.approx(
        float(segmentation_loss(changed, classes))
    )
    assert float(segmentation_loss(logits, torch.full_like(classes, -1))) == 0
    right = 20 * torch.nn.functional.one_hot(classes.clamp(min=0), 3).movedim(-1, 1).float()
    assert float(segmentation_loss(right, classes)) < 0.01


def test_a_model_file_gives_the_network_back(tmp_path):
    torch.manual_seed(0)
    spec = VolumeSpec("x", backbone_options=SMALL, patch=(16, 16, 16), provenance={"steps": 3})
    network = VolumeNetwork(spec).eval()
    nn.init.normal_(network.last.weight)
    sha256 = save_volume(tmp_path / "x.safetensors", network, spec)
    bundle = load_volume(tmp_path / "x.safetensors", "susceptibility")
    assert bundle.spec == spec
    assert bundle.sha256 == sha256
    image = torch.rand(1, 1, 16, 16, 16)
    torch.testing.assert_close(bundle.network()(image), network(image))


def test_a_network_of_another_task_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    spec = VolumeSpec("x", "brain", backbone_options=SMALL)
    save_volume(path, VolumeNetwork(spec), spec)
    with pytest.raises(ModelError, match="task is not susceptibility"):
        load_volume(path, "susceptibility")
    with pytest.raises(ModelError, match="segments no nuclei"):
        load_bundle(path)
    with pytest.raises(ModelError, match="task is not susceptibility"):
        load_volume("default", "susceptibility")
    with pytest.raises(InputMissingError):
        load_volume(tmp_path / "absent.safetensors", "brain")


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"task": "colour"},
        {"backbone": "none"},
        {"task": "brain", "smooth": True},
        {"patch": (8, 96, 96)},
        {"patch": (96, 96)},
        {"spacing": (1.0, 1.0)},
        {"spacing": (1.0, 1.0, 0.0)},
    ],
)
def test_specifications_that_cannot_be_are_refused(wrong):
    with pytest.raises(ModelError):
        VolumeSpec(**{"name": "x", **wrong})


def test_the_shipped_network_tells_more_than_thresholded_division():
    """Balls of iron in an egg-shaped brain, in oblique and anisotropic voxels with noise."""
    spacing, direction = (1.0, 0.9, 1.5), np.array([0.1, 0.15, 0.98])
    direction /= np.linalg.norm(direction)
    shape = (56, 64, 36)
    voxels = np.indices(shape).reshape(3, -1).T - (np.array(shape) - 1) / 2
    places = voxels * spacing

    def ball(centre, radius):
        return (np.linalg.norm(places - centre, axis=1) < radius).reshape(shape)

    mask = (np.linalg.norm(places / (24, 25, 23), axis=1) < 1).reshape(shape)
    chi = 0.12 * ball((8, 0, 0), 5) + 0.08 * ball((-8, 3, 2), 4) - 0.04 * ball((0, -10, -4), 6)
    chi = np.where(mask, chi - chi[mask].mean(), 0).astype(np.float32)
    field = field_from_susceptibility(chi, spacing, direction)
    field += np.random.default_rng(0).normal(0, 0.0015, shape).astype(np.float32)
    bundle = load_volume("pedqnet", "susceptibility")
    found = predict_susceptibility(bundle.network(), bundle.spec, field, mask, spacing, direction)
    divided = thresholded_division(field, mask, spacing, direction)
    alike, alike_divided = (np.corrcoef(chi[mask], one[mask])[0, 1] for one in (found, divided))
    assert alike > alike_divided + 0.05
    # Balls in a void are not what it was trained on.
    slope, _ = np.polyfit(chi[mask], found[mask], 1)
    assert 0.85 < slope < 1.15
