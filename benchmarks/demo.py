"""Time and peak memory of the demonstration, as ``make demo`` runs it after the installation.

The memory is the largest sum of the resident sizes of all processes of a command, looked at ten
times a second; pages that processes share count once for each, so it is an upper limit. The targets
are 4 minutes and 6 GB for 4 participants on 2 cores without a GPU.

Run it with ``python benchmarks/demo.py [--participants 4]``.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil
from machine import machine

from fdl_bidsapp.bids.outputs import write_tsv

RESULTS = Path(__file__).parent / "results" / "demo.tsv"
COLUMNS = (
    "case",
    "participants",
    "seconds",
    "target_seconds",
    "peak_memory_gb",
    "target_memory_gb",
    "command",
    "machine",
    "versions",
)


def measure(tool: str, *words: object) -> tuple[float, float]:
    """Run a command; return its seconds and the peak memory of its processes in GB."""
    code = f"from fdl_bidsapp.cli.{tool} import main; main()"
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)])
    peak = 0
    while process.poll() is None:
        with suppress(psutil.Error):
            root = psutil.Process(process.pid)
            peak = max(peak, sum(map(_resident, [root, *root.children(recursive=True)])))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - start, peak / 1e9


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def main() -> None:
    """Measure the three commands and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--participants", type=int, default=4)
    n = parser.parse_args().participants
    with tempfile.TemporaryDirectory() as folder:
        bids, truth, out = (Path(folder) / name for name in ("bids", "truth", "out"))
        simulate = ("simulate", bids, "--truth", truth, "--participants", n, "--seed", 1)
        results = {
            "simulate": measure("toolbox", *simulate),
            "participant": measure("app", bids, out, "participant", "--device", "cpu"),
            "group": measure("app", bids, out, "group"),
        }
    seconds, memory = zip(*results.values(), strict=True)
    results["all"] = sum(seconds), max(memory)
    targets = {"target_seconds": 240, "target_memory_gb": 6} if n == 4 else {}
    rows = [
        {
            "case": case,
            "participants": n,
            "seconds": seconds,
            "peak_memory_gb": peak,
            **(targets if case == "all" else {}),
            "command": f"python benchmarks/demo.py --participants {n}",
            "machine": machine(),
            "versions": f"Python {platform.python_version()}, torch {version('torch')}, "
            f"nipype {version('nipype')}, fdl-bidsapp {version('fdl-bidsapp')}",
        }
        for case, (seconds, peak) in results.items()
    ]
    for row in rows:
        print(f"{row['case']}: {row['seconds']:.1f} s, {row['peak_memory_gb']:.2f} GB")
    write_tsv(RESULTS, rows, COLUMNS)


if __name__ == "__main__":
    main()
