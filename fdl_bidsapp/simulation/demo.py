"""The demonstration: a simulated cohort as a BIDS dataset, with its truth beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.outputs import write_json, write_tsv
from fdl_bidsapp.errors import UsageError
from fdl_bidsapp.simulation.contrast import Protocol
from fdl_bidsapp.simulation.scan import simulate_scan
from fdl_bidsapp.simulation.tissue import Person
from fdl_bidsapp.simulation.writing import (
    Acquisition,
    describe_datasets,
    write_echoes,
    write_maps,
    write_truth,
)

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
            how = _acquisition(participant.protocol)
            if participant.raw:
                write_echoes(out / folder / prefix, scan.signal, scan.affine, how)
            else:
                write_maps(out / folder / prefix, scan.maps, scan.affine, how)
            write_truth(truth / folder / prefix, scan.labels, scan.affine)
            progress(prefix)


def _describe(out: Path, truth: Path, cohort: list[Participant], seed: int) -> None:
    describe_datasets(out, truth, README.format(version=__version__, seed=seed))
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


def _acquisition(protocol: Protocol) -> Acquisition:
    inversion = protocol.inversion.replace("_", " ")
    return Acquisition(
        protocol.echo_times,
        protocol.field_strength,
        protocol.swi_echo,
        f"weighted fit of phase differences, V-SHARP, {inversion}",
        "mono-exponential, weighted log-linear least squares",
    )
