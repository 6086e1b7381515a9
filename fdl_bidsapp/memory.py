"""What the C library does with the memory of arrays that are no longer used."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``; see its manual page."""


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory for the next array, and give it back to the system at the end.

    By itself glibc maps every large array anew, and the system clears each of its pages: in chains
    of operations on volumes this takes as long as the arithmetic. The price is that memory comes
    back at the end only. Without glibc nothing changes.

    Examples
    --------
    >>> with kept_memory():
    ...     total = sum(range(10))
    """
    library = ctypes.CDLL(None)
    # Other C libraries have neither, and other systems are not slow in this.
    known = hasattr(library, "mallopt") and hasattr(library, "malloc_trim")
    if known:
        library.mallopt(_MMAP_THRESHOLD, 2**30)
        library.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        if known:
            library.malloc_trim(0)
