from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fdl_bidsapp.errors import UsageError
from fdl_bidsapp.models.bundle import load_volume
from fdl_bidsapp.models.pedqnet import VolumeSpec, predict_brain, predict_susceptibility
from fdl_bidsapp.physics.dipole import field_from_susceptibility
from fdl_bidsapp.physics.inversion import thresholded_division
from fdl_bidsapp.physics.iterative import smooth_inversion
from fdl_bidsapp.training.fields import FieldCase, draw_patch, upright_case
from fdl_bidsapp.training.pedqnet import (
    FieldPatches,
    MaskPatches,
    VolumeRecipe,
    fit_volume,
    make_volume_settings,
)

SIDE = 24
SMALL = {"width": 8, "levels": 3}


def place(centre: tuple[float, float, float]) -> np.ndarray:
    voxels = np.indices((SIDE,) * 3).reshape(3, -1).T - (SIDE - 1) / 2 - np.array(centre)
    return np.linalg.norm(voxels, axis=1).reshape((SIDE,) * 3)


@pytest.fixture(scope="module")
def case() -> FieldCase:
    """Two balls of iron in a round brain, at high signal."""
    mask = place((0, 0, 0)) < 10
    chi = np.where(place((4, 0, 0)) < 3.2, 0.15, 0.0) + np.where(place((-4, 1, 0)) < 2.6, 0.1, 0.0)
    chi = np.where(mask, chi - chi[mask].mean(), 0).astype(np.float32)
    direction = np.array([0.0, 0.2, 0.98]) / np.hypot(0.2, 0.98)
    field = field_from_susceptibility(chi, (1, 1, 1), direction)
    field += np.random.default_rng(0).normal(0, 0.002, field.shape).astype(np.float32)
    labels = np.where(chi > 0.05, 1, 0).astype(np.uint8)
    return FieldCase(
        np.where(mask, field, 0).astype(np.float32),
        mask,
        mask.astype(np.float32),
        mask + 0.02,
        (1.0, 1.0, 1.0),
        direction,
        16.0,
        labels,
        chi,
    )


def error(found: np.ndarray, case: FieldCase) -> float:
    found, truth = (
        data[case.mask] - data[case.mask].mean() for data in (found, case.susceptibility)
    )
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def settings(**values):
    options = {"batch": 1, "learning_rate": 5e-3, "average": 0.9, "segmentation_weight": 0.0}
    given = values.pop("recipe_options", {})
    return make_volume_settings(
        {
            "backbone": "unet",
            "backbone_options": SMALL,
            "grid_shape": [SIDE] * 3,
            "recipe_options": {**options, **given},
            **values,
        }
    )


def test_physics_alone_teaches_more_than_it_reads(tmp_path, case):
    clean = field_from_susceptibility(case.susceptibility, case.spacing, case.direction)
    noise = np.random.default_rng(1).normal(0, 0.002, clean.shape)
    again = np.where(case.mask, clean + noise, 0).astype(np.float32)
    # The grid holds the turned head.
    path = fit_volume(
        settings(recipe_options={"steps": 150}, grid_shape=[32, 32, 32]),
        tmp_path / "x.safetensors",
        cases=[replace(case, repeat=again)],
    )
    bundle = load_volume(path, "susceptibility")
    network = bundle.network()
    found = predict_susceptibility(
        network, bundle.spec, case.local_field, case.mask, case.spacing, case.direction
    )
    known = (case.local_field, case.mask, case.spacing, case.direction)
    assert error(found, case) < error(smooth_inversion(*known), case)
    assert error(found, case) < error(thresholded_division(*known), case)
    assert bundle.spec.provenance["steps"] == 150


def test_the_truth_and_the_labels_do_not_matter_to_physics_alone(tmp_path, case):
    results = []
    for name, one in (("a", case), ("b", replace(case, labels=None, susceptibility=None))):
        path = fit_volume(
            settings(recipe_options={"steps": 3}), tmp_path / f"{name}.safetensors", cases=[one]
        )
        results.append(load_volume(path, "susceptibility").state)
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], msg=name)


def test_the_segmentation_joins_in_the_last_phase(tmp_path, case):
    states = []
    for weight, start in ((0.0, 0.0), (0.5, 2.0), (0.5, 0.6)):
        options = {"steps": 6, "segmentation_weight": weight, "segmentation_from": start}
        path = fit_volume(
            settings(segmenter="unet", segmenter_options=SMALL, recipe_options=options),
            tmp_path / f"{weight}-{start}.safetensors",
            cases=[case],
        )
        states.append(load_volume(path, "susceptibility").state["last.weight"])
    alone, never, joined = states
    assert not torch.equal(never, joined)
    assert alone.shape == joined.shape


def test_the_brain_mask_is_learnt(tmp_path, case):
    path = fit_volume(
        settings(recipe="brainmask", recipe_options={"steps": 40, "learning_rate": 1e-2}),
        tmp_path / "x.safetensors",
        cases=[case],
    )
    bundle = load_volume(path, "brain")
    found = predict_brain(
        bundle.network(), bundle.spec, 1000 * case.magnitude, case.spacing, case.direction
    )
    assert 2 * (found & case.mask).sum() / (found.sum() + case.mask.sum()) > 0.9


def test_the_brain_to_learn_has_its_rim_where_the_field_has_not(case):
    rimless = replace(case, mask=place((0, 0, 0)) < 8, brain=case.mask)
    given = settings(recipe="brainmask")
    _, classes = MaskPatches([rimless], given, VolumeRecipe(batch=1))(0, 0.0)
    assert int(classes.sum()) == case.mask.sum()
    upright = upright_case(rimless, given.grid_spacing)
    assert (upright.brain | ~upright.mask).all()
    assert upright.brain.sum() == pytest.approx(case.mask.sum(), rel=0.02)


def test_one_measurement_is_read_and_the_other_compared_with(case):
    given, recipe = settings(grid_shape=[SIDE] * 3), VolumeRecipe(batch=1)
    spec = VolumeSpec("x", patch=(SIDE,) * 3)
    other = np.where(case.mask, case.local_field + 0.02, 0).astype(np.float32)
    for repeat, apart in ((other, 0.02), (None, 0.0)):
        cases = [replace(case, direction=np.array([0, 0, 1.0]), repeat=repeat)]
        read, targets, masks, _, _ = FieldPatches(cases, given, recipe, spec)(0, 0.0)
        known = masks[0, 0].bool()
        difference = (targets[0, 0] / case.radians_per_ppm - read[0, 0])[known].abs()
        assert float(difference.mean()) == pytest.approx(apart, abs=1e-3)


def test_the_field_of_what_lies_beyond_a_patch_is_not_asked_of_it(case):
    """What is asked of a patch is what its own sources make."""
    shape = (56, 52, 48)
    voxels = np.indices(shape).reshape(3, -1).T

    def ball(centre, radius):
        return (np.linalg.norm(voxels - centre, axis=1) < radius).reshape(shape)

    mask = ball((28, 26, 24), 23)
    rng = np.random.default_rng(0)
    chi = sum(
        rng.uniform(-0.1, 0.15) * ball(rng.uniform(14, 36, 3), rng.uniform(3, 7)) for _ in range(12)
    ).astype(np.float32)
    chi = np.where(mask, chi - chi[mask].mean(), 0)
    field = np.where(mask, field_from_susceptibility(chi, (1, 1, 1)), 0)
    one = replace(case, local_field=field, mask=mask, weight=mask * 1.0, labels=None)
    given = (settings(), VolumeRecipe(batch=1), VolumeSpec("x", patch=(SIDE,) * 3))
    upright = replace(one, direction=np.array([0, 0, 1.0]))
    patches = FieldPatches([upright], *given)
    # The same patches of the map, in the place of the field.
    maps = FieldPatches([replace(upright, local_field=chi.astype(np.float32))], *given)
    shares = []
    for step in range(20):
        read, targets, *_ = patches(step, 0.0)
        inner = (targets[0, 1] > 0).numpy()
        own = field_from_susceptibility(maps(step, 0.0)[0][0, 0].numpy(), (1, 1, 1))
        asked = targets[0, 0].numpy() / case.radians_per_ppm
        beyond = np.abs(read[0, 0].numpy() - own)[inner].mean()
        shares.append(np.abs(asked - own)[inner].mean() / beyond)
    assert np.median(shares) < 0.5
    assert np.max(shares) < 1


def test_patches_hold_the_voxel_they_are_drawn_around(case):
    rng = np.random.default_rng(0)
    for _ in range(5):
        patch = draw_patch(case.mask, (16, 16, 32), rng)
        both = patch.cut(np.stack([case.mask, case.mask]))
        assert both.shape == (2, 16, 16, 32)
        assert both.any()
        # The grid has 24 voxels along its last axis.
        assert (patch.cut(case.labels.astype(int), -1) == -1).sum() == 8 * 16 * 16


@pytest.mark.parametrize(
    "wrong",
    [
        {"recipe": "other"},
        {"cases": 0},
        {"infants": 1.5},
        {"grid_spacing": [1.0]},
        {"grid_spacing": [1.0, 1.0, 0.0]},
        {"recipe_options": {"steps": 0}},
        {"recipe_options": {"magic": 1}},
        {"colour": "red"},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(UsageError):
        make_volume_settings(wrong)
