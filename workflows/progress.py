"""One line on the terminal: scans done of all, failures so far, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO


class Progress:
    """A progress line, rewritten in place on a terminal and appended now and then elsewhere.

    Parameters
    ----------
    total
        Number of scans.
    stream
        Where the line goes; standard error at the time of construction by default.
    interval
        Shortest time between two lines where they cannot be rewritten, in seconds.
    clock
        Current time in seconds.

    Examples
    --------
    >>> with Progress(2, stream=sys.stdout) as progress:
    ...     progress.scan_done()
    ...     progress.scan_done(failed=True)
    1/2 scans, 0 failed, less than a minute left
    2/2 scans, 1 failed, in less than a minute
    """

    def __init__(
        self,
        total: int,
        *,
        stream: TextIO | None = None,
        interval: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.done = 0
        self.failed = 0
        self._stream = stream or sys.stderr
        self._interval = interval
        self._clock = clock
        self._start = clock()
        self._last = float("-inf")
        self._rewrites = self._stream.isatty()

    def __enter__(self) -> Self:
        if self._rewrites:
            self._show()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._rewrites:
            self._stream.write("\n")
            self._stream.flush()

    def scan_done(self, failed: bool = False) -> None:
        """Count one scan more."""
        self.done += 1
        self.failed += failed
        due = self._clock() - self._last >= self._interval
        if self._rewrites or due or self.done == self.total:
            self._show()

    def line(self) -> str:
        """Return the line as it stands."""
        text = f"{self.done}/{self.total} scans, {self.failed} failed"
        elapsed = self._clock() - self._start
        if self.done == self.total:
            return f"{text}, in {_duration(elapsed)}"
        if not self.done:
            return text
        return f"{text}, {_duration(elapsed / self.done * (self.total - self.done))} left"

    def _show(self) -> None:
        self._last = self._clock()
        line = self.line()
        self._stream.write(f"\r{line}\x1b[K" if self._rewrites else f"{line}\n")
        self._stream.flush()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return "less than a minute"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
