"""Whether memory grows with the number of scans: many scans in one run, watched.

Writes ``results/memory.tsv`` (memory of all processes when each scan was finished) and a figure of
it. Memory is called flat if the last twenty scans take at most 5 % more than scans 20 to 40 did.

Run it with ``python benchmarks/memory.py [--scans 200] [--cores 2] [--model default]``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median

from cohort import make_cohort
from machine import machine
from watch import watch

from fdl_bidsapp.bids.outputs import write_tsv

RESULTS = Path(__file__).parent / "results"
FROM = 20
LIMIT = 1.05


def main() -> None:
    """Measure, draw and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=200)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--model", default="default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bids, out = make_cohort(Path(folder, "bids"), options.scans), Path(folder, "out")
        command = [sys.executable, "-c", "from fdl_bidsapp.cli.app import main; main()"]
        seen = watch(
            [*command, bids, out, "participant", "--model", options.model, "--device", "cpu"],
            cores=options.cores,
            count=lambda: sum(1 for _ in out.glob("sub-*/anat/*_morph.json")),
        )
    # Several looks between two scans: the highest of them is what a job has to be given.
    by_scan: dict[int, float] = {}
    for _, memory, done in seen.samples:
        by_scan[done] = max(memory, by_scan.get(done, 0.0))
    about = {
        "command": f"python benchmarks/memory.py --scans {options.scans} --cores {options.cores} "
        f"--model {options.model}",
        "machine": machine(),
        "versions": f"torch {version('torch')}, nipype {version('nipype')}, "
        f"fdl-bidsapp {version('fdl-bidsapp')}",
    }
    rows = [{"scans_done": done, "memory_mb": memory} | about for done, memory in by_scan.items()]
    options.results.mkdir(parents=True, exist_ok=True)
    write_tsv(options.results / "memory.tsv", rows, list(rows[0]))
    draw(by_scan, options.results / "memory.svg")
    if options.scans < 4 * FROM:
        print(f"{seen.peak_memory:.0f} MB at most; too few scans to say whether it grows")
        return
    early, late = early_and_late(by_scan)
    print(f"scans 20 to 40: {early:.0f} MB, the last 20: {late:.0f} MB")
    growth = late / early
    print("flat" if growth <= LIMIT else f"not flat: {growth:.2f} times as much")


def early_and_late(by_scan: Mapping[int, float]) -> tuple[float, float]:
    """Return the median memory of scans 20 to 40 and of the last twenty, by scans done."""
    early = [memory for done, memory in by_scan.items() if FROM <= done < 2 * FROM]
    late = [memory for done, memory in by_scan.items() if done >= max(by_scan) - FROM]
    return median(early), median(late)


def draw(by_scan: dict[int, float], path: Path) -> None:
    """Plot memory against scans done."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(list(by_scan), list(by_scan.values()), color="#1f5fb4")
    axes.axvline(FROM, color="0.7", linestyle=":")
    axes.set(xlabel="scans done", ylabel="memory of all processes (MB)", ylim=(0, None))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
