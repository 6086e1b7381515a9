from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fdl_bidsapp.errors import DataError, FdlError, InputMissingError, UsageError
from fdl_bidsapp.imaging.confidence import SIGNS, Calibration
from fdl_bidsapp.models.bundle import load_bundle, save_bundle
from fdl_bidsapp.models.fdl import ModelSpec, build_network
from fdl_bidsapp.training import fit as training
from fdl_bidsapp.training.cases import read_table
from fdl_bidsapp.training.evaluate import MEAN, evaluate
from fdl_bidsapp.training.fit import (
    OF_THE_NETWORK,
    continued_spec,
    continued_state,
    fit,
    make_settings,
    read_toml,
)

from .conftest import ball, save


def test_learns_to_segment_what_it_was_shown(labelled_set, quick, tmp_path):
    table = labelled_set({"train": 3, "validation": 1, "test": 2})
    options = {"steps": 100, "augment": 0.2, "learning_rate": 0.03, "average": 0.9}
    network = {"width": 8, "levels": 2}
    settings = make_settings({**quick, "recipe_options": options, "backbone_options": network})
    path = fit(settings, tmp_path / "model.safetensors", device="cpu")
    bundle = load_bundle(path)
    assert bundle.spec.provenance["n_train"] == 3
    assert bundle.spec.provenance["steps"] == 100
    assert bundle.spec.provenance["validation_dice"] > 0.7
    scans = [one for one in read_table(table) if one.split == "test"]
    rows = evaluate(bundle, scans, device="cpu")
    assert np.mean([row["dice"] for row in rows if row["structure"] == MEAN]) > 0.7
    assert (tmp_path / "model.run/training.png").stat().st_size > 1000


@pytest.mark.parametrize("method", ["early", "late", "multimodal"])
@pytest.mark.parametrize("recipe", ["paper", "strong"])
def test_every_method_and_recipe_ends_in_a_model_file(
    labelled_set, quick, tmp_path, method, recipe
):
    labelled_set(suffixes=("qsm", "imag"))
    values = {**quick, "method": method, "recipe": recipe}
    if method == "multimodal":
        values["modalities"] = ["imag"]
    bundle = load_bundle(fit(make_settings(values), tmp_path / "model.safetensors", device="cpu"))
    assert bundle.spec.method == method
    assert bundle.spec.flips == (recipe == "strong"), "only this one was shown mirrored images"
    assert set(bundle.bank) == ({"qsm", "imag"} if method == "multimodal" else set())


@pytest.mark.parametrize("backbone", ["unet", "dynunet", "segresnet", "unetr"])
def test_options_may_be_given_for_each_backbone_by_name(labelled_set, quick, tmp_path, backbone):
    if backbone != "unet":
        pytest.importorskip("monai")
    labelled_set()
    options = {
        "unet": {"width": 4, "levels": 2},
        "dynunet": {"width": 4, "levels": 3},
        "segresnet": {"width": 8, "levels": 2},
        "unetr": {"width": 4, "hidden_size": 12, "heads": 2},
    }
    # On 2 x 2 x 2 voxels, where a transformer of 16 ends, torch's bfloat16 gradient of a
    # convolution reads memory that was never written.
    changes = {"backbone": backbone, "backbone_options": options, "grid_shape": [32, 32, 32]}
    settings = make_settings({**quick, **changes, "method": "late"})
    bundle = load_bundle(fit(settings, tmp_path / "model.safetensors", device="cpu"))
    assert bundle.spec.backbone == backbone
    assert bundle.spec.backbone_options.items() >= options[backbone].items()


def test_the_same_seed_gives_the_same_model_and_another_one_another(labelled_set, quick, tmp_path):
    labelled_set()
    states = []
    for i, seed in enumerate((1, 1, 2)):
        settings = make_settings({**quick, "seed": seed})
        states.append(load_bundle(fit(settings, tmp_path / f"{i}.safetensors", device="cpu")).state)
    same = [all(bool((a[k] == b[k]).all()) for k in a) for a, b in (states[:2], states[1:])]
    assert same == [True, False]


def test_the_same_command_goes_on_and_another_configuration_is_refused(
    labelled_set, quick, tmp_path
):
    labelled_set()
    output = tmp_path / "model.safetensors"
    fit(make_settings(quick), output, device="cpu")
    log = (tmp_path / "model.run/log.tsv").read_text()
    output.unlink()
    fit(make_settings(quick), output, device="cpu")
    assert output.exists()
    assert (tmp_path / "model.run/log.tsv").read_text() == log
    with pytest.raises(DataError, match=r"theta was 0\.1 and is now 0\.2"):
        fit(make_settings({**quick, "theta": 0.2}), output, device="cpu")
    with pytest.raises(DataError, match="train cases was"):
        fit(make_settings({**quick, "n_train": 2}), output, device="cpu")


def test_a_time_budget_ends_with_a_usable_model(labelled_set, quick, tmp_path):
    labelled_set()
    options = {"steps": 10**6, "batch": 1}
    path = fit(
        make_settings({**quick, "recipe_options": options}),
        tmp_path / "model.safetensors",
        device="cpu",
        max_minutes=0.03,
    )
    assert 0 < load_bundle(path).spec.provenance["steps"] < 10**6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ""}, "what the label values mean"),
        ({"n_train": 9}, "there are 3 training cases"),
        ({"targets": ["r2star"]}, "lacks? the contrast"),
        ({"modalities": ["imag"]}, "takes no modalities"),
        ({"method": "multimodal", "modalities": ["imag"]}, "no training case has the modality"),
        ({"targets": ["t1"]}, "no contrast t1"),
        ({"backbone": "vgg"}, "no backbone 'vgg'"),
        ({"recipe": "weak"}, "no recipe 'weak'"),
        ({"method": "middle"}, "method is 'middle'"),
    ],
)
def test_bad_settings_are_told_before_training(
    labelled_set, quick, tmp_path, monkeypatch, changes, message
):
    labelled_set()
    monkeypatch.setattr("fdl_bidsapp.training.fit.train", None)
    with pytest.raises(FdlError, match=message):
        fit(make_settings({**quick, **changes}), tmp_path / "model.safetensors", device="cpu")


def test_bad_data_are_told_before_training(labelled_set, quick, tmp_path, monkeypatch):
    labelled_set({"train": 2})
    monkeypatch.setattr("fdl_bidsapp.training.fit.train", None)
    with pytest.raises(DataError, match="'validation' is empty"):
        fit(make_settings(quick), tmp_path / "model.safetensors", device="cpu")
    labelled_set()
    save(tmp_path / "data/train1_label.nii.gz", 7 * ball((5, 6, 6), 3).astype(np.uint8))
    with pytest.raises(DataError, match="does not know: 7"):
        fit(make_settings(quick), tmp_path / "model.safetensors", device="cpu")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"table": "a", "metod": "none"}, "no setting metod"),
        ({"table": "a", "seed": "1"}, "setting seed is '1'"),
        ({"table": "a", "targets": "qsm"}, "setting targets is 'qsm'"),
        ({"table": "a", "grid_shape": [16.0, 16, 16]}, "setting grid_shape"),
        ({}, "either from a table or from two"),
        ({"bids_dir": "a"}, "either from a table or from two"),
        ({"table": "t", "bids_dir": "a", "labels_dir": "b"}, "either from a table or from two"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(UsageError, match=message):
        make_settings(values)


def test_paths_in_a_toml_file_are_relative_to_it(tmp_path):
    path = tmp_path / "train.toml"
    path.write_text('table = "cases.tsv"\nlabels = "/abs/labels.tsv"\nseed = 3\n')
    assert read_toml(path) == {
        "table": str(tmp_path / "cases.tsv"),
        "labels": "/abs/labels.tsv",
        "seed": 3,
    }
    path.write_text("table = \n")
    with pytest.raises(UsageError, match="no TOML file"):
        read_toml(path)
    with pytest.raises(InputMissingError):
        read_toml(tmp_path / "none.toml")


@pytest.fixture
def base(labelled_set, quick, tmp_path):
    """A model of two structures with a locator and a bank, and settings to go on from it."""
    labelled_set(suffixes=("qsm", "imag"))
    values = {**quick, "method": "multimodal", "modalities": ["imag"], "targets": ["qsm"]}
    path = fit(make_settings(values), tmp_path / "plain.safetensors", device="cpu")
    bundle = load_bundle(path)
    locator = ModelSpec(
        "locator",
        method="none",
        backbone_options={"width": 4, "levels": 2},
        grid_shape=(8, 8, 8),
        grid_spacing=(4.0, 4.0, 4.0),
        contrasts=("qsm", "imag"),
        labels=bundle.spec.labels[:1],
    )
    flat = {"intercept": 0.5, **dict.fromkeys(SIGNS, 0.0)}
    calibration = Calibration(
        {"qsm": {label.structure: flat for label in bundle.spec.labels}}, threshold=0.5
    )
    spec = replace(
        bundle.spec,
        name="base",
        contrasts=("qsm", "imag"),
        locator=locator,
        calibration=calibration,
    )
    network = build_network(spec)
    network.load_state_dict(bundle.state, strict=False)
    path = tmp_path / "base.safetensors"
    save_bundle(path, network, spec, bundle.bank)
    rest = {key: value for key, value in quick.items() if key not in OF_THE_NETWORK}
    options = {**quick["recipe_options"], "locator_steps": 2}
    return load_bundle(path), {**rest, "init": str(path), "recipe_options": options}


def test_a_training_goes_on_from_a_model(base, tmp_path):
    before, values = base
    still = {**values["recipe_options"], "learning_rate": 1e-12, "weight_decay": 0.0}
    still["locator_steps"] = 0
    settings = make_settings({**values, "recipe_options": still})
    after = load_bundle(fit(settings, tmp_path / "same.safetensors", device="cpu"))
    for name, tensor in before.state.items():
        np.testing.assert_allclose(after.state[name], tensor, atol=1e-6, err_msg=name)
    assert after.spec.locator == before.spec.locator
    assert after.spec.contrasts == ("qsm",)
    assert after.spec.calibration is None
    assert after.bank.keys() == before.bank.keys()
    assert after.spec.provenance["init"] == before.sha256
    assert after.spec.provenance["before"] == before.spec.provenance
    moving = make_settings({**values, "recipe": "finetune"})
    moved = load_bundle(fit(moving, tmp_path / "moved.safetensors", device="cpu"))
    assert not torch.equal(moved.state["head.1.weight"], before.state["head.1.weight"])
    assert not torch.equal(moved.state["locator.head.weight"], before.state["locator.head.weight"])


def test_a_budget_that_the_locator_outlasts_still_ends(base, tmp_path, monkeypatch):
    _, values = base
    slow = training.train_locator
    monkeypatch.setattr(
        training, "train_locator", lambda *a, **kw: replace(slow(*a, **kw), minutes=2.0)
    )
    options = {**values["recipe_options"], "steps": 10**6}
    settings = make_settings({**values, "recipe_options": options})
    path = fit(settings, tmp_path / "model.safetensors", device="cpu", max_minutes=1.0)
    assert load_bundle(path).spec.provenance["steps"] < 5


def test_of_a_models_structures_only_the_wanted_ones_stay(base):
    before, values = base
    settings = make_settings({**values, "structures": ["Darkball"]})
    spec, known = continued_spec(settings, before)
    assert [label.abbreviation for label in spec.labels] == ["Darkball"]
    assert known == {1, 2}
    network = build_network(spec)
    network.load_state_dict(continued_state(before, spec))
    image = torch.rand(1, 1, 16, 16, 12)
    with torch.inference_mode():
        (wanted,) = before.network()(image)
        (found,) = network.eval()(image)
    torch.testing.assert_close(found, wanted[:, [0, 2]])


def test_of_a_models_regions_the_wanted_structures_stay(base):
    before, values = base
    names = [label.abbreviation for label in before.spec.labels]
    labels = tuple(replace(label, mapping=None) for label in before.spec.labels)
    locator = replace(before.spec.locator, labels=labels)
    spec = replace(before.spec, locator=locator, regions=tuple((name,) for name in names))
    located = replace(before, spec=spec)
    settings = make_settings({**values, "structures": ["Darkball"]})
    continued, _ = continued_spec(settings, located)
    # The locator still finds both regions, and nothing is looked for in one of them.
    assert continued.regions == ((), ("Darkball",))
    assert continued.windows == ((), (0,))


def test_a_table_that_happens_to_lie_here_says_nothing(base, tmp_path, monkeypatch):
    before, values = base
    (tmp_path / "dseg.tsv").write_text("index\tname\n7\tSomething else\n")
    monkeypatch.chdir(tmp_path)
    spec, known = continued_spec(make_settings({**values, "labels": ""}), before)
    assert spec.labels == before.spec.labels
    assert known == {1, 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "early"}, "method cannot be chosen"),
        ({"grid_shape": [24, 24, 24]}, "grid_shape cannot be chosen"),
        ({"targets": ["swi"]}, "does not segment swi"),
        ({"labels": "", "structures": ["RNL"]}, "does not segment RNL"),
        ({"init": "no such model"}, "no such model"),
    ],
)
def test_what_a_model_cannot_give_is_refused(base, tmp_path, change, said):
    settings = make_settings({**base[1], **change})
    with pytest.raises(FdlError, match=said):
        fit(settings, tmp_path / "model.safetensors", device="cpu")
