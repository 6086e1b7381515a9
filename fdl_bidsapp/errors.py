"""One hierarchy of errors, each with the exit code of the BIDS Apps execution specification.

Every message names the file (or option), the cause and the remedy, so that it can be shown to the
user as it is.
"""

from __future__ import annotations

from os import PathLike, fspath


class FdlError(Exception):
    """Base of every error that is the user's to read.

    Parameters
    ----------
    cause
        What is wrong, in one sentence without a full stop.
    remedy
        What to do about it.
    path
        The file or folder concerned.

    Examples
    --------
    >>> print(ImageError("the file is cut short", "copy it again", path="sub-01_Chimap.nii.gz"))
    sub-01_Chimap.nii.gz: the file is cut short. Remedy: copy it again.
    """

    exit_code = 1

    def __init__(
        self, cause: str, remedy: str = "", *, path: str | PathLike[str] | None = None
    ) -> None:
        super().__init__(cause, remedy, path)
        self.cause = cause
        self.remedy = remedy
        self.path = None if path is None else fspath(path)

    def __str__(self) -> str:
        text = f"{self.path}: {self.cause}." if self.path else f"{self.cause}."
        return f"{text} Remedy: {self.remedy}." if self.remedy else text

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (Nipype workers): keyword arguments must survive pickling.
        return (_rebuild, (type(self), self.cause, self.remedy, self.path))


def _rebuild(kind: type[FdlError], cause: str, remedy: str, path: str | None) -> FdlError:
    return kind(cause, remedy, path=path)


class ScanFailedError(FdlError):
    """One scan or more did not finish; the others did."""

    exit_code = 1


class NotADatasetError(FdlError):
    """The input folder is not a BIDS dataset."""

    exit_code = 16


class UnknownLevelError(FdlError):
    """The analysis level is neither ``participant`` nor ``group``."""

    exit_code = 17


class NoMatchError(FdlError):
    """The filters left no scan."""

    exit_code = 18


class UsageError(FdlError):
    """Options that make no sense, alone or together."""

    exit_code = 64


class DataError(FdlError):
    """Input that exists but cannot be used."""

    exit_code = 65


class ImageError(DataError):
    """An image that cannot be read, or whose grid or values are unusable."""


class AmbiguousInputError(DataError):
    """Two candidates for one contrast."""


class ModelError(DataError):
    """A model file that is not one, is damaged, or does not fit."""


class InputMissingError(FdlError):
    """Input that is not there."""

    exit_code = 66


class OutputError(FdlError):
    """The output cannot be created."""

    exit_code = 73


class StorageError(FdlError):
    """Reading or writing failed half-way: disk full, quota, network share gone."""

    exit_code = 74


class TemporaryError(FdlError):
    """A failure that may pass: worker killed, device busy."""

    exit_code = 75
