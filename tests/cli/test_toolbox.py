"""The toolbox: models listed, shown and checked, single images segmented, datasets simulated."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fdl_bidsapp.cli.toolbox import run
from fdl_bidsapp.errors import ModelError


@pytest.fixture
def images(tmp_path, blobs):
    """Give two images of the same balls, one of them compressed and left-handed."""
    folder = tmp_path / "images"
    folder.mkdir()
    first, second = folder / "first.nii", folder / "second.nii.gz"
    blobs().image().to_filename(first)
    affine = np.diag([-1.0, 1, 1, 1])
    affine[0, 3] = 31
    blobs().image("qsm", (32, 32, 32), affine).to_filename(second)
    return first, second


def words(*arguments: object) -> list[str]:
    return [str(argument) for argument in arguments]


@pytest.fixture
def segment(tmp_path, blob_model):
    """Give the sub-command with its model and output folder."""

    def command(*arguments: object) -> int:
        return run(
            words("segment", *arguments, "--model", blob_model, "--output", tmp_path / "out")
        )

    return command


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_who_leaves_is_no_fault_of_the_disk(buffered):
    program = "from fdl_bidsapp.cli.toolbox import main; main(['models', 'show', 'default'])"
    flags = [] if buffered else ["-u"]
    shown = subprocess.Popen(
        [sys.executable, *flags, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    shown.stdout.close()
    _, told = shown.communicate(timeout=60)
    assert (shown.returncode, told) == (128 + signal.SIGPIPE, b"")


def test_each_image_gets_a_label_map_of_its_name_on_its_grid(tmp_path, images, segment, blobs):
    assert segment(*images) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "first.nii",
        "second.nii.gz",
    ]
    for path in images:
        labels = nib.load(tmp_path / "out" / path.name)
        image = nib.load(path)
        assert labels.shape == image.shape
        np.testing.assert_allclose(labels.affine, image.affine)
        truth = blobs().truth(image.shape, image.affine)
        assert (np.asarray(labels.dataobj) == truth).mean() > 0.999
    assert (tmp_path / "out" / "second.nii.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert (tmp_path / "out" / "first.nii").read_bytes()[:2] != b"\x1f\x8b"


def test_one_bad_image_is_told_and_the_others_are_done(tmp_path, images, segment, capsys):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(gzip.compress(b"no image"))
    missing = tmp_path / "missing.nii"
    assert segment(bad, images[0], missing, images[1]) == 65
    assert len(list((tmp_path / "out").iterdir())) == 2
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if line.startswith("fdl: ")]
    assert len(told) == 2
    assert str(bad) in told[0]
    assert str(missing) in told[1]
    assert captured.out.count("all structures found") == 2


def test_a_contrast_is_told_to_the_model(tmp_path, segment, blobs, capsys):
    path = tmp_path / "r2star.nii"
    blobs().image("r2star").to_filename(path)
    assert segment(path, "--contrast", "r2star") == 0
    labels = np.asarray(nib.load(tmp_path / "out" / "r2star.nii").dataobj)
    assert (labels == blobs().truth()).mean() > 0.999


def test_images_without_structures_are_told(tmp_path, segment, blobs, capsys):
    path = tmp_path / "far.nii"
    blobs(bright=(500, 0, 0)).image().to_filename(path)
    assert segment(path) == 0
    assert "nothing found of RNL" in capsys.readouterr().out


def test_images_of_the_same_name_are_refused(tmp_path, images, segment, capsys):
    other = tmp_path / images[0].name
    other.write_bytes(images[0].read_bytes())
    assert segment(images[0], other) == 64
    assert "same name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_image_is_never_overwritten(images, blob_model, capsys):
    before = images[0].read_bytes()
    code = run(words("segment", images[0], "--model", blob_model, "--output", images[0].parent))
    assert code == 73
    assert images[0].read_bytes() == before


def test_an_output_that_cannot_be_made_is_told(tmp_path, images, blob_model, capsys):
    (tmp_path / "file").touch()
    code = run(
        words("segment", images[0], "--model", blob_model, "--output", tmp_path / "file" / "out")
    )
    assert code == 73
    assert "Remedy: " in capsys.readouterr().err


def test_a_model_that_is_missing_or_none_is_told(tmp_path, images, capsys):
    none = tmp_path / "none.safetensors"
    out = tmp_path / "out"
    assert run(words("segment", images[0], "--model", none, "--output", out)) == 66
    none.write_text("no model")
    assert run(words("segment", images[0], "--model", none, "--output", out)) == 65
    assert run(words("models", "show", none)) == 65
    assert run(words("models", "check", none)) == 65
    assert capsys.readouterr().err.count(str(none)) == 4


def test_models_are_listed_with_what_they_segment(blob_model, monkeypatch, capsys):
    from fdl_bidsapp.models import bundle

    monkeypatch.setattr(bundle, "shipped_models", lambda: {"blobs": blob_model})
    assert run(["models", "list"]) == 0
    name, method, contrasts, structures, size = capsys.readouterr().out.strip().split("\t")
    assert (name, method, structures) == ("blobs", "none", "RNL RNR")
    assert contrasts == "qsm r2star imag swi"
    assert size.endswith(" MB")
    assert run(["models", "check"]) == 0
    assert capsys.readouterr().out.startswith(f"{blob_model}\tok\t")


def test_a_model_is_shown_with_its_card(tmp_path, make_model, capsys):
    path = make_model(tmp_path / "m.safetensors", provenance={"data": "none"})
    path.with_suffix(".md").write_text("# Card\n")
    assert run(words("models", "show", path)) == 0
    text, card = capsys.readouterr().out.split("\n\n", 1)
    content = json.loads(text)
    assert content["labels"] == ["RNL", "RNR"]
    assert content["provenance"] == {"data": "none"}
    assert content["grid_shape"] == [32, 32, 32]
    assert card == "# Card\n"


def test_checking_goes_on_after_a_damaged_model(tmp_path, blob_model, capsys):
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(blob_model.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert run(words("models", "check", damaged, blob_model)) == ModelError.exit_code
    captured = capsys.readouterr()
    assert "SHA-256 does not match" in captured.err
    assert captured.out.startswith(f"{blob_model}\tok\t")


@pytest.mark.parametrize("occupied", ["bids", "truth"])
def test_simulating_into_an_occupied_folder_is_refused(tmp_path, capsys, occupied):
    (tmp_path / occupied).mkdir()
    (tmp_path / occupied / "mine").touch()
    code = run(words("simulate", tmp_path / "bids", "--truth", tmp_path / "truth"))
    assert code == 73
    assert str(tmp_path / occupied) in capsys.readouterr().err
    assert [path.name for path in Path(tmp_path / occupied).iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["models"],
        ["segment", "x.nii"],
        ["segment", "x.nii", "--output", "out", "--contrast", "t1"],
    ],
)
def test_wrong_usage_is_one_line(arguments, capsys):
    assert run(arguments) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert "--help" in line


def test_an_error_nobody_foresaw_is_one_line(monkeypatch, capsys):
    from fdl_bidsapp.models import bundle

    def broken() -> None:
        raise RuntimeError("a bug\nin two lines")

    monkeypatch.setattr(bundle, "shipped_models", broken)
    assert run(["models", "list"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "RuntimeError: a bug in two lines" in line
    assert "Remedy: " in line
