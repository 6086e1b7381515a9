"""What tests of the whole app share: a model that segments blobs, and small datasets of blobs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import settings

# A busy machine is no broken promise.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

SIDE = 32
BRIGHT, DARK = (8.0, 16.0, 16.0), (24.0, 16.0, 16.0)
"""Centres in mm, in scanner space, of what the model calls RNL and RNR."""

RADIUS = 5.0
CONTRAST = {"qsm": (0.0, 0.2), "r2star": (50.0, 40.0), "imag": (100.0, 50.0), "swi": (100.0, 50.0)}
"""Background and amplitude of the blobs in each contrast's unit."""


@dataclass(frozen=True)
class Blobs:
    """Images of a bright and a dark ball on grey, on any grid.

    Attributes
    ----------
    bright, dark
        Centres in mm.
    """

    bright: tuple[float, float, float] = BRIGHT
    dark: tuple[float, float, float] = DARK

    def truth(
        self, shape: tuple[int, int, int] = (SIDE,) * 3, affine: np.ndarray | None = None
    ) -> np.ndarray:
        """Return 1 in the bright ball, 2 in the dark one."""
        matrix = np.eye(4) if affine is None else np.asarray(affine, float)
        voxels = np.indices(shape).reshape(3, -1)
        places = (matrix[:3, :3] @ voxels + matrix[:3, 3:]).reshape(3, *shape)
        labels = np.zeros(shape, np.uint8)
        for value, centre in enumerate((self.bright, self.dark), 1):
            distance = np.linalg.norm(places - np.reshape(centre, (3, 1, 1, 1)), axis=0)
            labels[distance <= RADIUS] = value
        return labels

    def data(
        self,
        contrast: str = "qsm",
        shape: tuple[int, int, int] = (SIDE,) * 3,
        affine: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return float32 values in the contrast's unit, with a little uniform noise."""
        grey, amplitude = CONTRAST[contrast]
        truth = self.truth(shape, affine)
        noise = np.random.default_rng(0).uniform(-0.05, 0.05, shape)
        signs = (truth == 1).astype(float) - (truth == 2)
        return (grey + amplitude * (signs + noise)).astype(np.float32)

    def image(
        self,
        contrast: str = "qsm",
        shape: tuple[int, int, int] = (SIDE,) * 3,
        affine: np.ndarray | None = None,
    ) -> nib.Nifti1Image:
        """Return the same as an image in scanner space."""
        matrix = np.eye(4) if affine is None else np.asarray(affine, float)
        image = nib.Nifti1Image(self.data(contrast, shape, matrix), matrix)
        image.set_sform(matrix, 1)
        image.set_qform(matrix, 1)
        return image


class Study:
    """A small BIDS dataset and its output folder.

    Parameters
    ----------
    root
        An empty folder.
    model
        Model that the app is run with.
    """

    SUFFIX: Mapping[str, str] = {
        "qsm": "Chimap",
        "r2star": "R2starmap",
        "imag": "part-mag_T2starw",
        "swi": "swi",
    }

    def __init__(self, root: Path, model: Path) -> None:
        self.bids = root / "bids"
        self.out = root / "out"
        self.model = model
        self.bids.mkdir()
        description = {"Name": "blobs", "BIDSVersion": "1.10.0", "License": "CC0"}
        (self.bids / "dataset_description.json").write_text(json.dumps(description))

    def path(self, subject: str, name: str = "Chimap.nii.gz") -> Path:
        """Return where a file of a participant belongs; its folder is made."""
        folder = self.bids / f"sub-{subject}" / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"sub-{subject}_{name}"

    def add(
        self,
        subject: str,
        contrasts: Iterable[str] = ("qsm",),
        blobs: Blobs | None = None,
        **grid: object,
    ) -> Path:
        """Write maps of a participant, and return the path of the last one."""
        for contrast in contrasts:
            path = self.path(subject, f"{self.SUFFIX[contrast]}.nii.gz")
            (blobs or Blobs()).image(contrast, **grid).to_filename(path)  # type: ignore[arg-type]
        return path

    def add_echoes(self, subject: str, times: Iterable[float] = (0.004, 0.008, 0.012)) -> None:
        """Write a participant's raw magnitudes with their sidecars."""
        rate = Blobs().data("r2star")
        for number, time in enumerate(times, 1):
            path = self.path(subject, f"echo-{number}_part-mag_MEGRE.nii.gz")
            signal = (1000 * np.exp(-time * rate)).astype(np.float32)
            image = nib.Nifti1Image(signal, np.eye(4))
            image.set_sform(np.eye(4), 1)
            image.to_filename(path)
            sidecar = path.with_name(path.name.replace(".nii.gz", ".json"))
            sidecar.write_text(json.dumps({"EchoTime": time}))

    def arguments(self, level: str = "participant", *options: object) -> list[str]:
        """Return the words of the app's command line."""
        words = [self.bids, self.out, level]
        if level == "participant":
            given = [str(option) for option in options]
            if "--model" not in given:
                words += ["--model", self.model]
            if "--nprocs" not in given and "--use-plugin" not in given:
                words += ["--nprocs", "1"]
        return [str(word) for word in (*words, *options)]

    def run(self, level: str = "participant", *options: object) -> int:
        """Run the app in this process and return its exit code."""
        from fdl_bidsapp.cli.app import run

        return run(self.arguments(level, *options))

    def outputs(self, subject: str) -> list[str]:
        """Return the names of all files of a participant in the output folder."""
        folder = self.out / f"sub-{subject}"
        return sorted(path.name for path in folder.rglob("*") if path.is_file())

    def output(self, subject: str, name: str) -> Path:
        """Return the path of an output of a participant."""
        return self.out / f"sub-{subject}" / "anat" / f"sub-{subject}_{name}"

    def labels(self, subject: str) -> nib.Nifti1Image:
        """Return a participant's label map."""
        return nib.load(self.output(subject, "space-orig_seg-fdl_dseg.nii.gz"))

    def record(self, subject: str) -> dict[str, object]:
        """Return what the app recorded of a participant."""
        content: dict[str, object] = json.loads(self.output(subject, "morph.json").read_text())
        return content

    def group(self) -> list[dict[str, str]]:
        """Run the group level and return the rows of its table."""
        assert self.run("group") == 0
        header, *lines = (self.out / "group_morph.tsv").read_text().splitlines()
        names = header.split("\t")
        return [dict(zip(names, line.split("\t"), strict=True)) for line in lines]


def write_model(
    path: Path, abbreviations: tuple[str, str] = ("RNL", "RNR"), **values: object
) -> Path:
    """Write a model whose weights call bright balls the first label and dark ones the second.

    The instance normalisation of its one level makes standard scores of the window's values, the
    two channels carry them with either sign, and the head compares each with a threshold that is
    half a ball's score.
    """
    import torch

    from fdl_bidsapp.labels import by_abbreviation
    from fdl_bidsapp.models.bundle import save_bundle
    from fdl_bidsapp.models.fdl import ModelSpec, build_network

    labels = by_abbreviation(abbreviations)
    spec = ModelSpec(
        **{  # type: ignore[arg-type]
            "name": "blobs",
            "method": "none",
            "backbone_options": {"width": 2, "levels": 1},
            "grid_shape": (SIDE,) * 3,
            "contrasts": ("qsm", "r2star", "imag", "swi"),
            "intensity": {"qsm": "minmax", "r2star": "rate", "imag": "minmax", "swi": "minmax"},
            "labels": labels,
            **values,
        }
    )
    network = build_network(spec)
    threshold, steepness = 2.6, 3.0
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        first, second = network.backbone.encoders[0]  # type: ignore[index,union-attr]
        for block in (first, second):
            block[1].weight.fill_(1)
        first[0].weight[:, 0, 1, 1, 1] = torch.tensor([1.0, -1.0])
        second[0].weight[0, :, 1, 1, 1] = torch.tensor([1.0, -1.0])
        second[0].weight[1, :, 1, 1, 1] = torch.tensor([-1.0, 1.0])
        head = network.head
        head.weight[1, 0] = head.weight[2, 1] = steepness  # type: ignore[index,operator]
        head.bias[1:] = -steepness * threshold  # type: ignore[index,operator]
    save_bundle(path, network, spec)
    return path


@pytest.fixture(scope="session")
def blob_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the file of a model that segments blobs."""
    return write_model(tmp_path_factory.mktemp("model") / "blobs.safetensors")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """Give the maker of such models."""
    return write_model


@pytest.fixture
def study(tmp_path: Path, blob_model: Path) -> Study:
    """Give an empty dataset with its output folder."""
    return Study(tmp_path, blob_model)


@pytest.fixture(scope="session")
def blobs() -> type[Blobs]:
    """Give the maker of images."""
    return Blobs


@pytest.fixture(scope="session")
def made_up_head():
    """A small made-up head that stands for a label map."""
    from .made_up_heads import made_up_head_map

    return made_up_head_map()
