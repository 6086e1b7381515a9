"""Many simulated scans of head label maps, as a BIDS dataset with its truth beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.outputs import write_json, write_tsv
from fdl_bidsapp.errors import UsageError
from fdl_bidsapp.simulation.labelmaps import HeadMap, find_label_maps, read_head_map
from fdl_bidsapp.simulation.maps import swi_echo
from fdl_bidsapp.simulation.parameters import Value, Values, draw_values
from fdl_bidsapp.simulation.physiology import echo_times
from fdl_bidsapp.simulation.simulator import LabelMapScan, simulate_label_map
from fdl_bidsapp.simulation.writing import (
    Acquisition,
    describe_datasets,
    write_echoes,
    write_maps,
    write_truth,
)

README = """# A simulated cohort

Nothing here was measured on a person. Each head is a deformed label map; its multi-echo
gradient-echo signal follows from the physics, and the maps were computed from that signal. Made by
`fdl simulate`, version {version}, seed {seed}, profile {profile}, from the label maps {names}. The
sidecar of each true label map holds the value of every effect.
"""

DIAGNOSES = {
    "control": "healthy",
    "parkinson": "Parkinson's disease",
    "psp": "progressive supranuclear palsy",
    "msa": "multiple system atrophy",
}


def draw_scans(
    labels_dir: Path,
    participants: int,
    seed: int,
    profile: str = "full",
    forced: Mapping[str, Value] | None = None,
    *,
    box: tuple[float, float, float] | None = None,
    shortcut: bool = False,
    device: str = "cpu",
) -> Iterator[tuple[HeadMap, LabelMapScan]]:
    """Simulate scans of the label maps of a folder, which take turns.

    Parameters
    ----------
    labels_dir
        Folder of head label maps.
    participants, seed
        The same numbers give the same scans; more participants begin with fewer.
    profile, forced
        As for :func:`~fdl_bidsapp.simulation.parameters.draw_values`.
    box, shortcut
        As for :func:`~fdl_bidsapp.simulation.simulator.simulate_label_map`.
    device
        ``cpu`` or ``cuda``.

    Yields
    ------
    HeadMap, LabelMapScan

    Raises
    ------
    InputMissingError, ImageError
        The label maps are not there or cannot be used.
    UsageError
        Values that make no sense.
    """
    files = find_label_maps(labels_dir)
    draw_values(seed, profile, forced)
    read = lru_cache(maxsize=2)(read_head_map)
    for i in range(participants):
        head = read(files[i % len(files)], device)
        values = draw_values([seed, i], profile, forced)
        yield head, simulate_label_map(head, [seed, i], values, box=box, shortcut=shortcut)


def simulate_population(
    out: Path,
    truth: Path,
    labels_dir: Path,
    *,
    participants: int = 4,
    seed: int = 0,
    profile: str = "ordinary",
    forced: Mapping[str, Value] | None = None,
    echoes: bool = False,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Write simulated scans of label maps as a BIDS dataset, and their true label maps.

    Parameters
    ----------
    out, truth
        Folders of the dataset and of the truth; made if absent.
    labels_dir, participants, seed, profile, forced, device
        As for :func:`draw_scans`.
    echoes
        Whether the complex echoes are written too.
    progress
        Called with the name of each scan when it is written.

    Raises
    ------
    UsageError
        The number of participants is out of range, or values make no sense.
    InputMissingError, ImageError
        The label maps are not there or cannot be used.
    OutputError, StorageError
        The folders cannot be written.
    """
    if not 1 <= participants <= 9999:
        raise UsageError(f"{participants} participants were asked for", "ask for 1 to 9999")
    files = find_label_maps(labels_dir)
    drawn = [draw_values([seed, i], profile, forced) for i in range(participants)]
    names = [f"{i + 1:0{max(2, len(str(participants)))}d}" for i in range(participants)]
    used = ", ".join(file.name.split(".")[0] for file in files[:participants])
    readme = README.format(version=__version__, seed=seed, profile=profile, names=used)
    describe_datasets(out, truth, readme)
    _write_participants(out, names, drawn)
    scans = draw_scans(labels_dir, participants, seed, profile, forced, device=device)
    for i, (name, (head, scan)) in enumerate(zip(names, scans, strict=True)):
        stem = Path(f"sub-{name}", "anat", f"sub-{name}")
        how = acquisition(scan.values)
        maps = {contrast: image.cpu().numpy() for contrast, image in scan.maps.items()}
        write_maps(out / stem, maps, scan.affine, how)
        if echoes and scan.signal is not None:
            signal = np.moveaxis(scan.signal.cpu().numpy(), 0, -1)
            write_echoes(out / stem, signal, scan.affine, how)
        write_truth(
            truth / stem,
            scan.labels.cpu().numpy(),
            scan.affine,
            {"LabelMap": head.name, "Seed": [seed, i], "Effects": scan.values},
        )
        progress(f"sub-{name}")


def acquisition(values: Values) -> Acquisition:
    """Return what the sidecars tell of a scan with these values."""
    p = values
    field_map = {"laplacian": "phase differences", "path": "phase unwrapped along paths"}
    background = {"v_sharp": "V-SHARP", "pdf": "projection onto dipole fields"}
    return Acquisition(
        echo_times(p),
        float(p["field_strength"]),
        swi_echo(p),
        f"weighted fit of {field_map[str(p['field_map'])]}, {background[str(p['background'])]}, "
        + str(p["inversion"]).replace("_", " "),
        {
            "weighted": "mono-exponential, weighted log-linear least squares",
            "unweighted": "mono-exponential, log-linear least squares",
            "arlo": "mono-exponential, ARLO",
        }[str(p["r2star_fit"])],
    )


def _write_participants(out: Path, names: list[str], drawn: list[Values]) -> None:
    rows = [
        {
            "participant_id": f"sub-{name}",
            "age": round(float(values["age"])),
            "diagnosis": values["diagnosis"],
        }
        for name, values in zip(names, drawn, strict=True)
    ]
    write_tsv(out / "participants.tsv", rows, ["participant_id", "age", "diagnosis"])
    write_json(
        out / "participants.json",
        {
            "age": {"Description": "Age of the simulated person", "Units": "year"},
            "diagnosis": {
                "Description": "Diagnosis; it raises the iron of single nuclei",
                "Levels": DIAGNOSES,
            },
        },
    )
