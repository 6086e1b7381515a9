"""Simulated scans as files of a BIDS dataset, and their truth as a derivative dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.outputs import write_image, write_json, write_text, write_tsv
from fdl_bidsapp.labels import nuclei

Array = np.ndarray

MAPS = {
    "qsm": "Chimap",
    "r2star": "R2starmap",
    "imag": "part-mag_T2starw",
    "swi": "rec-swi_T2starw",
}
"""How the map of each contrast is named after the prefix of its scan."""


@dataclass(frozen=True)
class Acquisition:
    """What the sidecars of a simulated scan tell.

    Attributes
    ----------
    echo_times
        Seconds.
    field_strength
        Tesla.
    swi_echo
        Position of the echo that SWI is made of.
    qsm, r2star
        How these maps were computed, in words.
    """

    echo_times: tuple[float, ...]
    field_strength: float
    swi_echo: int
    qsm: str
    r2star: str


def describe_datasets(out: Path, truth: Path, readme: str) -> None:
    """Write descriptions, README files and the label table of a dataset and its truth.

    Parameters
    ----------
    out, truth
        Folders of the two datasets.
    readme
        Text of both README files.
    """
    generated = [{"Name": "fdl simulate", "Version": __version__}]
    common = {"BIDSVersion": "1.10.0", "License": "CC0", "GeneratedBy": generated}
    write_json(
        out / "dataset_description.json",
        {"Name": "Simulated multi-echo GRE cohort", "DatasetType": "raw", **common},
    )
    write_json(
        truth / "dataset_description.json",
        {"Name": "Truth of the simulated cohort", "DatasetType": "derivative", **common},
    )
    for folder in (out, truth):
        write_text(folder / "README.md", readme)
    columns = ("index", "name", "abbreviation", "color", "mapping")
    write_tsv(truth / "dseg.tsv", [vars(label) for label in nuclei()], columns)


def write_maps(stem: Path, maps: Mapping[str, Array], affine: Array, how: Acquisition) -> None:
    """Write the four contrasts of a scan.

    Parameters
    ----------
    stem
        Folder and prefix of the files, such as ``sub-01/anat/sub-01``.
    maps
        ``qsm``, ``r2star``, ``imag`` and ``swi``, each (X, Y, Z).
    affine : (4, 4) array
        Voxel to scanner coordinates, mm.
    how
        For the sidecars.
    """
    times = list(how.echo_times)
    details: dict[str, dict[str, Any]] = {
        "qsm": {"EchoTime": times, "Units": "ppm", "EstimationAlgorithm": how.qsm},
        "r2star": {"EchoTime": times, "Units": "1/s", "EstimationAlgorithm": how.r2star},
        "imag": {"EchoTime": times, "Units": "arbitrary"},
        "swi": {"EchoTime": times[how.swi_echo], "Units": "arbitrary"},
    }
    for contrast, suffix in MAPS.items():
        _write_measured(_named(stem, suffix), maps[contrast], affine, how, details[contrast])


def write_echoes(stem: Path, signal: Array, affine: Array, how: Acquisition) -> None:
    """Write magnitude and phase of each echo of an (X, Y, Z, E) complex image."""
    for e, time in enumerate(how.echo_times):
        echo = signal[..., e]
        for part, data, unit in (
            ("mag", np.abs(echo), "arbitrary"),
            ("phase", np.angle(echo), "rad"),
        ):
            _write_measured(
                _named(stem, f"echo-{e + 1}_part-{part}_MEGRE"),
                data,
                affine,
                how,
                {"EchoTime": time, "Units": unit},
            )


def write_truth(
    stem: Path, labels: Array, affine: Array, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write the true (X, Y, Z) label map of a scan, and what else is known in its sidecar."""
    write_image(_named(stem, "dseg.nii.gz"), _in_scanner(nib.Nifti1Image(labels, affine)))
    write_json(
        _named(stem, "dseg.json"),
        {
            "Description": "Where the simulation put the nuclei",
            "Manual": False,
            **(metadata or {}),
        },
    )


def _named(stem: Path, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}_{suffix}")


def _write_measured(
    stem: Path, data: Array, affine: Array, how: Acquisition, metadata: dict[str, Any]
) -> None:
    """Write an image as scanners do, in 16-bit integers with a slope, and its sidecar."""
    image = nib.Nifti1Image(data.astype(np.float32), affine)
    image.set_data_dtype(np.int16)
    write_image(stem.with_name(f"{stem.name}.nii.gz"), _in_scanner(image))
    acquisition = {
        "Manufacturer": "simulated",
        "ManufacturersModelName": "fdl simulate",
        "SoftwareVersions": __version__,
        "MagneticFieldStrength": how.field_strength,
        "PulseSequenceType": "Spoiled multi-echo gradient echo",
        "ScanningSequence": "GR",
        "SequenceVariant": "SP",
        "MRAcquisitionType": "3D",
    }
    write_json(stem.with_name(f"{stem.name}.json"), {**acquisition, **metadata})


def _in_scanner(image: nib.Nifti1Image) -> nib.Nifti1Image:
    image.header.set_xyzt_units("mm")
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    return image
