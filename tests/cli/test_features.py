from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from fdl_bidsapp.cli import toolbox
from fdl_bidsapp.models.bundle import save_features
from fdl_bidsapp.models.cifl import FeatureNetwork, FeatureSpec


@pytest.fixture
def model(tmp_path):
    spec = FeatureSpec("small", channels=3, width=4)
    save_features(tmp_path / "f.safetensors", FeatureNetwork(spec), spec)
    return tmp_path / "f.safetensors"


@pytest.fixture
def image(tmp_path):
    affine = np.diag([-0.8, 1.0, 1.5, 1.0])
    data = np.random.default_rng(0).random((12, 14, 9), np.float32)
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "a_T1w.nii.gz")
    return tmp_path / "a_T1w.nii.gz"


def test_writes_channels_in_the_images_space_and_a_figure(model, image, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["features", str(image), "--model", str(model), "--output", str(out)]
    assert toolbox.run([*words, "--device", "cpu"]) == 0
    written = nib.load(out / "a_T1w_features.nii.gz")
    assert written.shape == (12, 14, 9, 3)
    assert np.allclose(np.linalg.norm(written.get_fdata(), axis=3), 1, atol=1e-4)
    # The image runs from right to left, its features as every output from left to right.
    corner = nib.load(image).affine @ [11, 0, 0, 1]
    assert np.allclose(written.affine @ [0, 0, 0, 1], corner)
    assert (out / "features.png").stat().st_size > 1000
    assert capsys.readouterr().out.split() == [
        str(out / "a_T1w_features.nii.gz"),
        str(out / "features.png"),
    ]


def test_a_bad_image_does_not_keep_the_others(model, image, tmp_path, capsys):
    out = tmp_path / "out"
    bad = tmp_path / "bad.nii"
    bad.write_text("no image")
    words = ["features", str(bad), str(image), "--model", str(model), "--output", str(out)]
    assert toolbox.run([*words, "--device", "cpu"]) == 65
    assert (out / "a_T1w_features.nii.gz").exists()
    assert "bad.nii" in capsys.readouterr().err


def test_a_model_that_segments_is_refused(blob_model, image, tmp_path, capsys):
    words = ["features", str(image), "--model", str(blob_model), "--output", str(tmp_path / "out")]
    assert toolbox.run(words) == 65
    assert "fdl train --recipe cifl" in capsys.readouterr().err


def test_models_are_shown_and_checked(model, capsys):
    assert toolbox.run(["models", "show", str(model)]) == 0
    assert '"channels": 3' in capsys.readouterr().out
    assert toolbox.run(["models", "check", str(model)]) == 0


def test_trains_features_from_the_command_line(tmp_path, capsys):
    config = tmp_path / "cifl.toml"
    config.write_text(
        'recipe = "cifl"\ndimensions = 2\nchannels = 3\nwidth = 4\ngrid_shape = [24, 24]\n'
        "recipe_options = {batch = 1, tau_channels = 0.1}\n"
    )
    output = tmp_path / "f.safetensors"
    words = ["train", str(config), "--output", str(output), "--steps", "2", "--device", "cpu"]
    assert toolbox.run(words) == 0
    assert output.exists()
    assert toolbox.run([*words, "--table", str(tmp_path / "cases.tsv")]) == 64
    assert "table" in capsys.readouterr().err
