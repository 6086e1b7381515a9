"""Watch a command from outside: time, memory of all its processes, files in its work folder."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

EVERY_SECONDS = 0.25


@dataclass
class Watched:
    """What was seen of a command.

    Attributes
    ----------
    seconds
        From its start to its end.
    samples
        (seconds, memory in MB, count) at each look; the count is the caller's.
    peak_files, peak_bytes
        Most that the work folder held at once.
    files_after
        What it held at the end.
    """

    seconds: float = 0.0
    samples: list[tuple[float, float, int]] = field(default_factory=list)
    peak_files: int = 0
    peak_bytes: int = 0
    files_after: int = 0

    @property
    def peak_memory(self) -> float:
        """MB."""
        return max((memory for _, memory, _ in self.samples), default=float("nan"))


def watch(
    command: Sequence[object],
    *,
    cores: int | None = None,
    work: Path | None = None,
    count: Callable[[], int] = lambda: 0,
    environment: dict[str, str] | None = None,
    codes: Sequence[int] = (0,),
) -> Watched:
    """Run a command on some of the cores and look at it until it ends.

    Memory is the proportional share (PSS), so that what processes share counts once.
    """
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    seen = Watched()
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )
    while process.poll() is None:
        seen.samples.append((time.perf_counter() - start, _memory(process.pid), count()))
        if work:
            files = _sizes(work)
            seen.peak_files = max(seen.peak_files, len(files))
            seen.peak_bytes = max(seen.peak_bytes, sum(files))
        time.sleep(EVERY_SECONDS)
    seen.seconds = time.perf_counter() - start
    assert process.stderr is not None
    if process.returncode not in codes:
        raise SystemExit(f"{command} ended with {process.returncode}:\n{process.stderr.read()}")
    seen.files_after = len(_sizes(work)) if work else 0
    return seen


def _memory(pid: int) -> float:
    total = 0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has ended
    return total / 1e6


def _sizes(folder: Path) -> list[int]:
    sizes = []
    # Unlike Path.rglob it goes on where a folder vanishes under it.
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                sizes.append(Path(parent, name).stat().st_size)
    return sizes
