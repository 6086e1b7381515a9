"""What the commands say of errors that nothing was prepared for."""

from __future__ import annotations

import os
import select
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from traceback import format_exception

from fdl_bidsapp import __version__
from fdl_bidsapp.errors import DataError, FdlError, StorageError, TemporaryError


def explain(error: Exception, log_dir: Path | None = None) -> FdlError:
    """Turn any error into one that is the user's to read.

    Parameters
    ----------
    error
        Whatever went wrong; an `FdlError` is returned as it is.
    log_dir
        Folder for the traceback of an error that is a fault of this program; the system's
        temporary folder by default.

    Examples
    --------
    >>> print(explain(OSError(5, "Input/output error", "sub-01_Chimap.nii")).cause)
    reading or writing failed (Input/output error)
    """
    if isinstance(error, FdlError):
        return error
    if isinstance(error, OSError):
        return StorageError(
            f"reading or writing failed ({error.strerror or error})",
            "look after the disk or network share and run again, finished scans are kept",
            path=error.filename,
        )
    if isinstance(error, UnicodeEncodeError):
        return DataError("the name of a file or folder is not UTF-8", "rename it")
    if isinstance(error, MemoryError):
        return TemporaryError("the memory is full", "run again with more memory")
    stamp = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    log = (log_dir or Path(tempfile.gettempdir())) / f"{stamp}_crash.log"
    with suppress(OSError):
        lines = [f"fdl-bidsapp {__version__}: {sys.argv}\n\n", *format_exception(error)]
        log.write_text("".join(lines), "utf-8", "backslashreplace")
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return FdlError(
        f"an error that should not happen: {text}", f"run again; if it stays, report it with {log}"
    )


def visible(text: str) -> str:
    """Spell out what a terminal would obey, such as a line end in the name of a file.

    Examples
    --------
    >>> print(visible("sub-01_\\n_Chimap.nii"))
    sub-01_\\n_Chimap.nii
    """
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


def reader_left(error: Exception) -> bool:
    """Tell whether an error is no more than that nobody reads our output on, as after ``| head``.

    What else is written to standard output, also by Python at its end, then goes nowhere.
    """
    if not isinstance(error, BrokenPipeError):
        return False
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in pipe.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return True
