"""Time and peak memory of finding the scans of a large dataset.

A dataset of empty maps (four a participant) is made in a temporary folder; each case runs in its
own process, imports included. The results, with the command, machine and versions, are written to
``benchmarks/results/indexing.tsv``.

Run it with ``python benchmarks/indexing.py [--participants 1000]``.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from machine import machine

from fdl_bidsapp.bids.outputs import write_tsv

MAPS = ("Chimap", "R2starmap", "part-mag_T2starw", "swi")
RESULTS = Path(__file__).parent / "results" / "indexing.tsv"
COLUMNS = (
    "case",
    "participants",
    "files",
    "scans_found",
    "seconds",
    "peak_memory_mib",
    "command",
    "machine",
    "versions",
)

MEASURED = """
import json, resource, sys, time
start = time.perf_counter()
from fdl_bidsapp.bids.inputs import find_scans
root, options = sys.argv[1], json.loads(sys.argv[2])
scans = find_scans(root, **options).scans
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"scans_found": len(scans), "seconds": seconds, "peak_memory_mib": peak}))
"""


def make_dataset(root: Path, participants: int) -> None:
    """Write a raw dataset of empty maps."""
    root.mkdir()
    description = {"Name": "empty maps", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    for number in range(1, participants + 1):
        subject = f"sub-{number:05d}"
        anat = root / subject / "anat"
        anat.mkdir(parents=True)
        for name in MAPS:
            (anat / f"{subject}_{name}.nii.gz").touch()


def measure(root: Path, options: dict[str, object]) -> dict[str, float]:
    """Find scans in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(root), json.dumps(options)],
        check=True,
        capture_output=True,
        text=True,
    )
    result: dict[str, float] = json.loads(run.stdout)
    return result


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--participants", type=int, default=1000)
    participants = parser.parse_args().participants

    with tempfile.TemporaryDirectory() as folder:
        root, database = Path(folder) / "bids", Path(folder) / "database"
        make_dataset(root, participants)
        one = {"participant_labels": ["00001"]}
        kept = {"database_dir": str(database)}
        cases = {
            "all participants": {},
            "one participant asked for": one,
            "all, index written to --bids-database-dir": kept,
            "all, index read from --bids-database-dir": kept,
            "one, index read from --bids-database-dir": {**one, **kept},
        }
        rows = [
            {
                "case": case,
                "participants": participants,
                "files": participants * len(MAPS),
                "command": f"python benchmarks/indexing.py --participants {participants}",
                "machine": machine(),
                "versions": f"Python {platform.python_version()}, pybids {version('pybids')}, "
                f"fdl-bidsapp {version('fdl-bidsapp')}",
                **measure(root, options),
            }
            for case, options in cases.items()
        ]
    for row in rows:
        print(f"{row['case']}: {row['seconds']:.2f} s, {row['peak_memory_mib']:.0f} MiB")
    write_tsv(RESULTS, rows, COLUMNS)


if __name__ == "__main__":
    main()
