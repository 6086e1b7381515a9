"""Put the measured time, memory and files of a scan into docs/hpc.md.

    python benchmarks/hpc_figures.py

It reads ``results/throughput.tsv`` and ``results/memory.tsv``, which ``throughput.py`` and
``memory.py`` write, and replaces what stands between the two marks in the document.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from memory import RESULTS, early_and_late
from page import replace_part

DOCUMENT = Path(__file__).parents[1] / "docs" / "hpc.md"
SCANS, PER_TASK = 50_000, 50


def main() -> None:
    """Rewrite the part of the document."""
    replace_part(DOCUMENT, "benchmarks/hpc_figures.py", figures())


def figures() -> str:
    """Return the measured figures as Markdown."""
    table = pd.read_csv(RESULTS / "throughput.tsv", sep="\t", na_values="n/a")
    app = table[(table["tool"] == "fdl-bidsapp") & (table["device"] == "cpu")]
    app = app.set_index("cores").sort_index()
    seconds = app["seconds"] / app["scans"]
    rows = {
        "seconds a scan": seconds.map("{:.1f}".format),
        "time beside a bare loop in one process": app["overhead"].map("{:+.0%}".format),
        "peak memory, GB": (app["peak_memory_mb"] / 1000).map("{:.1f}".format),
        "intermediate MB of a scan at work": app["work_mb_per_scan_at_work"].map("{:.0f}".format),
        "intermediate files of a scan at work": app["work_files_per_scan_at_work"].map(
            "{:.0f}".format
        ),
    }
    lines = [
        "| | " + " | ".join(f"{n} core{'s' * (n > 1)}" for n in app.index) + " |",
        "| --- |" + " ---: |" * len(app),
        *(f"| {name} | " + " | ".join(values) + " |" for name, values in rows.items()),
    ]
    alone = seconds.loc[1]
    first = app.iloc[0]
    memory = pd.read_csv(RESULTS / "memory.tsv", sep="\t")
    by_scan = dict(zip(memory["scans_done"], memory["memory_mb"], strict=True))
    early, late = early_and_late(by_scan)
    return (
        "\n".join(lines)
        + f"""

Measured on {first["machine"]}: {first["scans"]} simulated scans of the demonstration's size through
participant and group level (`benchmarks/results/throughput.tsv`).
At {alone:.1f} s of a core a scan, {PER_TASK} take {PER_TASK * alone / 60:.0f} core-minutes and
{SCANS:,} some {SCANS * alone / 3600:.0f} core-hours; scans of finer voxels take longer.
In one run of {max(by_scan)} scans the last twenty took {late / early - 1:+.1%} memory beside
scans 20 to 40 (`benchmarks/results/memory.tsv`).
"""
    )


if __name__ == "__main__":
    main()
