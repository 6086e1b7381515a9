"""How threads wait for each other on a processor that others use too."""

from __future__ import annotations

import os

_SPINS = "10000"
"""Turns of a loop before a thread sleeps; the library's own are 300,000."""


def available_cores() -> int:
    """Return how many cores this process may use, which a scheduler may have limited.

    Examples
    --------
    >>> available_cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0))


def wait_politely() -> None:
    """Let waiting threads give up their core soon, unless the user has chosen how they wait.

    PyTorch's threads (GNU OpenMP) meet at the end of every operation, and whoever comes first
    waits at full load. Where another program has the core that the last one needs, nearly all of
    the time goes by in waiting. It has to be called before PyTorch is imported; processes that are
    started later inherit it.

    Examples
    --------
    >>> wait_politely()
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
