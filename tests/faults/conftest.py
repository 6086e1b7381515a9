"""The app as a process of its own, to be killed, starved and crowded."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

settings.register_profile("long", max_examples=3400)

COMMAND = (sys.executable, "-c", "from fdl_bidsapp.cli.app import main; main()")


@dataclass
class Process:
    """A run of the app, to be looked at while it works."""

    popen: subprocess.Popen[str]
    said: str = field(default="")

    def wait_for(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait until something has come about, while the run is still at work."""
        deadline = time.monotonic() + seconds

        def come_about() -> object:
            try:
                return condition()
            except FileNotFoundError:
                # The run took a folder away that was just being listed.
                return False

        while not come_about():
            assert self.popen.poll() is None, self.finish()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def workers(self) -> list[psutil.Process]:
        """Return the processes that work for it."""
        children = psutil.Process(self.popen.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def finish(self, seconds: float = 560) -> int:
        """Wait for the end and return the exit code; what it said is in `said`."""
        self.said = self.popen.communicate(timeout=seconds)[1]
        assert "Traceback" not in self.said
        return self.popen.returncode


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """Give a function that starts the app with these words; what still runs is killed."""
    begun: list[subprocess.Popen[str]] = []

    def begin(
        arguments: Sequence[str],
        *,
        before: str = "",
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> Process:
        command = list(COMMAND)
        command[-1] = before + command[-1]
        popen = subprocess.Popen(
            [*prefix, *command, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        begun.append(popen)
        return Process(popen)

    yield begin
    for popen in begun:
        if popen.poll() is None:
            popen.kill()
        popen.communicate()


@pytest.fixture(scope="session")
def results_of() -> Callable[[Path], dict[str, str]]:
    """Give a function that hashes all of an output folder but the logs."""

    def hashes(out: Path) -> dict[str, str]:
        return {
            str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*"))
            if path.is_file() and "logs" not in path.relative_to(out).parts
        }

    return hashes


@pytest.fixture(scope="session")
def unfinished() -> Callable[[Path], list[str]]:
    """Give a function that lists temporary files, and scans with masks but without a record."""

    def leftovers(out: Path) -> list[str]:
        hidden = [str(path) for path in out.rglob(".*") if path.name != ".bidsignore"]
        folders = [f for f in out.glob("sub-*") if any(f.rglob("*.nii.gz"))]
        return hidden + [f.name for f in folders if not any(f.rglob("sub-*_morph.json"))]

    return leftovers
