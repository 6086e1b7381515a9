"""The demonstration: a simulated cohort as a BIDS dataset, with its truth beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.outputs import write_image, write_json, write_text, write_tsv
from fdl_bidsapp.errors import UsageError
from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.simulation.contrast import Protocol
from fdl_bidsapp.simulation.scan import SimulatedScan, simulate_scan
from fdl_bidsapp.simulation.tissue import Person

Array = np.ndarray

DIAGNOSES = ("control", "PD")

README = """# A simulated cohort

Nothing here was measured on a person. Each head is a deformation of the ICBM 2009a template with
nuclei placed as smooth shapes; its multi-echo gradient-echo signal follows from the physics, and
the maps were computed from that signal. Made by `fdl simulate`, version {version}, seed {seed}.
"""


@dataclass(frozen=True)
class Participant:
    """One row of ``participants.tsv``, and how the participant is scanned."""

    label: str
    person: Person
    sex: str
    sessions: tuple[str | None, ...]
    raw: bool
    spacing: tuple[float, float, float]
    angles: tuple[float, float, float]
    protocol: Protocol


def plan_cohort(participants: int, seed: int) -> list[Participant]:
    """Decide who is in the cohort: the first is scanned twice, the last has raw echoes only.

    Raises
    ------
    UsageError
        ``participants`` is not between 1 and 9999.

    Examples
    --------
    >>> [(p.label, p.sessions, p.raw) for p in plan_cohort(3, seed=0)]
    [('01', ('1', '2'), False), ('02', (None,), False), ('03', (None,), True)]
    """
    if not 1 <= participants <= 9999:
        raise UsageError(f"{participants} participants were asked for", "ask for 1 to 9999")
    width = max(2, len(str(participants)))
    cohort = []
    for i in range(participants):
        rng = np.random.default_rng([seed, i, 0])
        in_plane = float(rng.choice([0.9, 1.0, 1.0, 1.1]))
        slices = float(rng.choice([1.0, 1.0, 1.2, 1.5]))
        tilt = np.round(rng.normal(0, 4, 3), 1)
        cohort.append(
            Participant(
                label=f"{i + 1:0{width}d}",
                person=Person(
                    age=float(np.round(rng.uniform(45, 80))),
                    parkinson=bool((i + rng.integers(2)) % 2),
                ),
                sex=str(rng.choice(["F", "M"])),
                sessions=("1", "2") if i == 0 else (None,),
                raw=i == participants - 1 and participants > 1,
                spacing=(in_plane, in_plane, slices),
                angles=(float(tilt[0]), float(tilt[1]), float(tilt[2])),
                protocol=Protocol(snr=float(np.round(rng.uniform(45, 90)))),
            )
        )
    return cohort


def simulate_dataset(
    out: Path,
    truth: Path,
    *,
    participants: int = 4,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Write a simulated BIDS dataset, and its true label maps as a derivative dataset.

    Parameters
    ----------
    out
        Folder of the dataset; made if absent.
    truth
        Folder of the truth.
    participants, seed
        The same numbers give the same files.
    progress
        Called with the name of each scan when it is written.

    Raises
    ------
    UsageError
        The number of participants is out of range.
    OutputError, StorageError
        The folders cannot be written.
    """
    cohort = plan_cohort(participants, seed)
    _describe(out, truth, cohort, seed)
    for i, participant in enumerate(cohort):
        for j, session in enumerate(participant.sessions):
            # Sessions of one participant share head and tissue; position and noise are new.
            repositioned = np.random.default_rng([seed, i, 3, j]).normal(0, 2, 3) * (j > 0)
            angles = np.add(participant.angles, repositioned)
            scan = simulate_scan(
                np.random.default_rng([seed, i, 1]),
                np.random.default_rng([seed, i, 2]),
                np.random.default_rng([seed, i, 4, j]),
                person=participant.person,
                protocol=participant.protocol,
                spacing=participant.spacing,
                angles=angles,
            )
            prefix = f"sub-{participant.label}" + (f"_ses-{session}" if session else "")
            folder = Path(*prefix.split("_")) / "anat"
            if participant.raw:
                _write_echoes(out / folder / prefix, scan, participant.protocol)
            else:
                _write_maps(out / folder / prefix, scan, participant.protocol)
            _write_truth(truth / folder / prefix, scan)
            progress(prefix)


def _describe(out: Path, truth: Path, cohort: list[Participant], seed: int) -> None:
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
        write_text(folder / "README.md", README.format(version=__version__, seed=seed))
    rows = [
        {
            "participant_id": f"sub-{p.label}",
            "age": int(p.person.age),
            "sex": p.sex,
            "diagnosis": DIAGNOSES[p.person.parkinson],
        }
        for p in cohort
    ]
    write_tsv(out / "participants.tsv", rows, ["participant_id", "age", "sex", "diagnosis"])
    write_json(
        out / "participants.json",
        {
            "age": {"Description": "Age of the simulated person", "Units": "year"},
            "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
            "diagnosis": {
                "Description": "Diagnosis; it raises the iron of the substantia nigra",
                "Levels": {"control": "healthy", "PD": "Parkinson's disease"},
            },
        },
    )
    columns = ("index", "name", "abbreviation", "color", "mapping")
    write_tsv(truth / "dseg.tsv", [vars(label) for label in nuclei()], columns)


def _write_maps(stem: Path, scan: SimulatedScan, protocol: Protocol) -> None:
    times = list(protocol.echo_times)
    inversion = protocol.inversion.replace("_", " ")
    parts: dict[str, tuple[str, dict[str, Any]]] = {
        "Chimap": (
            "qsm",
            {
                "EchoTime": times,
                "Units": "ppm",
                "EstimationAlgorithm": f"weighted fit of phase differences, V-SHARP, {inversion}",
            },
        ),
        "R2starmap": (
            "r2star",
            {
                "EchoTime": times,
                "Units": "1/s",
                "EstimationAlgorithm": "mono-exponential, weighted log-linear least squares",
            },
        ),
        "part-mag_T2starw": ("imag", {"EchoTime": times, "Units": "arbitrary"}),
        "rec-swi_T2starw": ("swi", {"EchoTime": times[protocol.swi_echo], "Units": "arbitrary"}),
    }
    for suffix, (contrast, metadata) in parts.items():
        name = f"{stem.name}_{suffix}"
        _write_measured(stem.with_name(name), scan.maps[contrast], scan.affine, protocol, metadata)


def _write_truth(stem: Path, scan: SimulatedScan) -> None:
    labels = nib.Nifti1Image(scan.labels, scan.affine)
    write_image(stem.with_name(f"{stem.name}_dseg.nii.gz"), _in_scanner(labels))
    write_json(
        stem.with_name(f"{stem.name}_dseg.json"),
        {"Description": "Where the simulation put the nuclei", "Manual": False},
    )


def _write_echoes(stem: Path, scan: SimulatedScan, protocol: Protocol) -> None:
    for e, time in enumerate(protocol.echo_times):
        echo = scan.signal[..., e]
        for part, data, unit in (
            ("mag", np.abs(echo), "arbitrary"),
            ("phase", np.angle(echo), "rad"),
        ):
            _write_measured(
                stem.with_name(f"{stem.name}_echo-{e + 1}_part-{part}_MEGRE"),
                data,
                scan.affine,
                protocol,
                {"EchoTime": time, "Units": unit},
            )


def _write_measured(
    stem: Path, data: Array, affine: Array, protocol: Protocol, metadata: dict[str, Any]
) -> None:
    """Write an image as scanners do, in 16-bit integers with a slope, and its sidecar."""
    image = nib.Nifti1Image(data.astype(np.float32), affine)
    image.set_data_dtype(np.int16)
    write_image(stem.with_name(f"{stem.name}.nii.gz"), _in_scanner(image))
    acquisition = {
        "Manufacturer": "simulated",
        "ManufacturersModelName": "fdl simulate",
        "SoftwareVersions": __version__,
        "MagneticFieldStrength": protocol.field_strength,
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
