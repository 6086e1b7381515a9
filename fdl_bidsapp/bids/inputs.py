"""Find scans: which file is which contrast of which scan, in raw and derivative datasets.

The file names looked for stand in ``io_spec.json``, in order of preference. Files are found with
pybids; only file names are indexed, and of the sidecars only those of multi-echo sets are read.
Which scanner a scan is of is read from its sidecars when it is asked for.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from fdl_bidsapp.errors import (
    AmbiguousInputError,
    FdlError,
    InputMissingError,
    NoMatchError,
    NotADatasetError,
    OutputError,
    StorageError,
    UsageError,
)

Entities = tuple[tuple[str, str], ...]

ECHO_DERIVATIONS = ("echo_mean", "echo_fit", "reconstruction")

_VALUES = {"str": "[a-zA-Z0-9+]+", "int": "[0-9]+"}

LARGEST_JSON = 50 * 10**6
"""Bytes; the longest sidecars, with a whole DICOM header, take some hundred kB."""

LONGEST_ECHO_TIME = 1.0
"""Seconds; T2* of tissue is tens of milliseconds, so a longer echo time is one given in ms."""

STRONGEST_FIELD = 30.0
"""Tesla; a larger number is in another unit, such as MHz."""

LONGEST_NAME = 80
"""Characters of a scanner's name that are kept."""


_DESCRIPTION = 'give it at least {"Name": "…", "BIDSVersion": "1.10.0"}, and GeneratedBy as a list'


@dataclass(frozen=True)
class Source:
    """One contrast of one scan.

    Attributes
    ----------
    contrast
        ``qsm``, ``r2star``, ``imag`` or ``swi``.
    paths
        One map, or the echoes in order of echo number.
    derivation
        How the contrast comes from the files: ``map``, ``inverse_t2star`` (R2* = 1 / T2*),
        ``echo_mean`` (mean of magnitudes), ``echo_fit`` (R2* fitted to magnitudes) or
        ``reconstruction`` (made from magnitude and phase).
    echo_times
        Seconds, strictly increasing, one for each echo; empty where not known or not needed.
    uris
        The BIDS URI of each path, ``bids:<dataset>:sub-01/…``.
    phase
        The phase of each echo, for a reconstruction; the paths are the magnitudes then.
    field_strength
        Tesla, for a reconstruction.
    phase_unit
        ``Units`` of the phase, empty where its sidecar does not say.
    """

    contrast: str
    paths: tuple[Path, ...]
    derivation: str
    echo_times: tuple[float, ...] = ()
    uris: tuple[str, ...] = ()
    phase: tuple[Path, ...] = ()
    field_strength: float = 0.0
    phase_unit: str = ""


@dataclass(frozen=True)
class Scan:
    """The maps that share all entities but those that name the contrast.

    Attributes
    ----------
    entities
        Pairs of pybids entity name and value, in the order of BIDS file names.
    sources
        At most one per contrast.
    brain_mask
        A brain mask of this scan, or else of its session or participant.
    error
        Why this scan cannot be processed; ``None`` where it can.
    notes
        What was decided on the way, for the record.
    files
        Everything that may be a contrast of this scan, each with the root of its dataset.
    """

    entities: Entities
    sources: tuple[Source, ...] = ()
    brain_mask: Path | None = None
    error: FdlError | None = None
    notes: tuple[str, ...] = ()
    files: tuple[tuple[Path, Path], ...] = ()

    @property
    def subject(self) -> str:
        """Participant label, without ``sub-``."""
        return dict(self.entities)["subject"]

    @property
    def session(self) -> str | None:
        """Session label, without ``ses-``."""
        return dict(self.entities).get("session")

    @property
    def acquisition(self) -> str | None:
        """Value of ``acq-``."""
        return dict(self.entities).get("acquisition")

    @property
    def run(self) -> str | None:
        """Value of ``run-``, with its leading zeros."""
        return dict(self.entities).get("run")

    @property
    def source_prefix(self) -> str:
        """Beginning of the names of all outputs of this scan.

        Examples
        --------
        >>> Scan((("subject", "01"), ("acquisition", "hr"), ("run", "02"))).source_prefix
        'sub-01_acq-hr_run-02'
        """
        return "_".join(f"{entity_keys()[name]}-{value}" for name, value in self.entities)

    def get(self, contrast: str) -> Source | None:
        """Return the source of a contrast, ``None`` where there is none."""
        return next((source for source in self.sources if source.contrast == contrast), None)


@dataclass(frozen=True)
class Discovery:
    """All that was found in the datasets.

    Attributes
    ----------
    scans
        Sorted by participant, session and the other entities.
    missing
        (participant, session or ``None``) with no usable contrast.
    notes
        Remarks on the datasets as a whole.
    """

    scans: tuple[Scan, ...]
    missing: tuple[tuple[str, str | None], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """A dataset to read from: its name in BIDS URIs, its root folder and its description."""

    name: str
    root: Path
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_derivative(self) -> bool:
        """Whether the description says ``"DatasetType": "derivative"``."""
        return self.description.get("DatasetType") == "derivative"

    def uri(self, path: Path) -> str:
        """Return the BIDS URI of a file of this dataset."""
        return f"bids:{self.name}:{path.relative_to(self.root).as_posix()}"


def read_json(path: Path) -> Any:
    """Read a JSON file of anybody's, within limits.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It is not JSON, larger than `LARGEST_JSON`, or nested too deeply.
    """
    with path.open("rb") as stream:
        content = stream.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise ValueError(f"it is larger than {LARGEST_JSON / 1e6:.0f} MB")
    try:
        # NaN is no JSON, though Python writes and reads it.
        return json.loads(content.decode("utf-8-sig"), parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@cache
def io_spec() -> dict[str, Any]:
    """Return the input queries and output names (``io_spec.json``)."""
    text = files("fdl_bidsapp.bids").joinpath("io_spec.json").read_text("utf-8")
    spec: dict[str, Any] = json.loads(text)
    return spec


@cache
def entity_keys() -> dict[str, str]:
    """Return the key in file names of each pybids entity name, in the order of BIDS.

    Examples
    --------
    >>> list(entity_keys().items())[:2]
    [('subject', 'sub'), ('session', 'ses')]
    """
    return {entity["name"]: entity["key"] for entity in io_spec()["entities"]}


def parse_name(name: str) -> dict[str, str]:
    """Split a BIDS file name into entities, suffix and extension.

    Keys that are in no file this package reads are left out.

    Examples
    --------
    >>> parse_name("sub-01_echo-2_MEGRE.nii.gz")
    {'subject': '01', 'echo': '2', 'suffix': 'MEGRE', 'extension': '.nii.gz'}
    """
    stem, dot, extension = name.partition(".")
    *pairs, suffix = stem.split("_")
    values = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
    entities = {long: values[key] for long, key in entity_keys().items() if key in values}
    return {**entities, "suffix": suffix, "extension": dot + extension}


def open_datasets(
    bids_dir: str | Path,
    derivatives: Sequence[tuple[str | None, str | Path]] = (),
    *,
    validate: bool = True,
) -> tuple[Dataset, ...]:
    """Check and name the datasets to read from.

    The dataset itself is called ``raw`` (``input`` if it is a derivative dataset), a further one by
    its given name or else by its folder.

    Parameters
    ----------
    bids_dir
        The dataset.
    derivatives
        Pairs of name (or ``None``) and folder of derivative datasets.
    validate
        Whether a folder without a readable ``dataset_description.json`` is refused.

    Raises
    ------
    InputMissingError
        A folder is not there.
    NotADatasetError
        A folder has no readable ``dataset_description.json``.
    UsageError
        Two datasets have the same name.
    """
    root = _absolute(bids_dir)
    description = _read_description(
        root,
        "give the folder that holds dataset_description.json, or use --skip-bids-validation",
        validate,
    )
    first = "input" if description.get("DatasetType") == "derivative" else "raw"
    datasets = [Dataset(first, root, description)]
    for name, folder in derivatives:
        root = _absolute(folder)
        description = _read_description(
            root,
            "give the derivative dataset itself, as in --derivatives derivatives/qsmxt",
            validate,
        )
        # The name stands in BIDS URIs, whose alphabet is small.
        name = re.sub(r"[^0-9a-zA-Z_.-]", "-", name or root.name)
        if any(name == other.name for other in datasets):
            raise UsageError(
                f"two datasets are called {name}",
                "name one of them with --derivatives NAME=PATH",
                path=root,
            )
        datasets.append(Dataset(name, root, description))
    return tuple(datasets)


def find_scans(
    bids_dir: str | Path,
    *,
    derivatives: Sequence[tuple[str | None, str | Path]] = (),
    participant_labels: Sequence[str] = (),
    session_labels: Sequence[str] = (),
    bids_filters: Mapping[str, Mapping[str, Any]] | None = None,
    database_dir: str | Path | None = None,
    exclude: Sequence[str | Path] = (),
    validate: bool = True,
    reconstruct: bool = True,
) -> Discovery:
    """Find the scans of a dataset, and of derivative datasets given beside it.

    Parameters
    ----------
    bids_dir
        A raw or derivative dataset. Its ``derivatives`` folder is not looked into.
    derivatives
        Pairs of name (or ``None``) and folder of further datasets.
    participant_labels, session_labels
        What to look for, with or without ``sub-`` and ``ses-``; all if empty.
    bids_filters
        For each contrast, pybids entities its files must have; ``null`` stands for an absent
        entity and ``"*"`` for any value; ``"scope"`` chooses a dataset by name.
    database_dir
        Folder that keeps the index between runs. The index of a dataset is made anew when a file or
        folder has been added, removed or renamed, and then holds all participants.
    exclude
        Folders never taken for input unless they are among ``derivatives``.
    validate
        See `open_datasets`.
    reconstruct
        Whether a contrast may be made from raw magnitude and phase where there is no map of it.

    Returns
    -------
    Discovery
        Scans whose input is ambiguous are among them, with their ``error`` set.

    Raises
    ------
    InputMissingError, NotADatasetError, UsageError
        See `open_datasets`; also for a filter that names no contrast or no entity.
    NoMatchError
        A label that no dataset has, an empty dataset, or filters that leave nothing.
    OutputError, StorageError
        The index cannot be written or read.
    """
    datasets = open_datasets(bids_dir, derivatives, validate=validate)
    _sidecars.cache_clear()
    notes: list[str] = []
    filters = _checked_filters(bids_filters or {})
    subjects = {_bare(label, "sub") for label in participant_labels}
    sessions = {_bare(label, "ses") for label in session_labels}
    excluded = [_absolute(path) for path in exclude]

    known = _known_participants(datasets, excluded, notes)
    if not known:
        raise NoMatchError(
            "the dataset has no participant",
            "give a dataset with folders called sub-<label>",
            path=datasets[0].root,
        )

    _check_labels("participant", subjects, set(known), datasets[0].root)
    _check_labels("session", sessions, set().union(*known.values()), datasets[0].root)

    def wanted(entities: Mapping[str, str]) -> bool:
        return (not subjects or entities.get("subject") in subjects) and (
            not sessions or entities.get("session") in sessions
        )

    candidates = _Candidates(excluded, wanted, filters, reconstruct)
    for dataset in datasets:
        layout = _index(dataset, subjects, sessions, database_dir)
        candidates.add(dataset, layout)
    notes += candidates.notes

    scans = tuple(
        scan for key in sorted(candidates.scans) if (scan := candidates.resolve(key)) is not None
    )
    if not scans and filters:
        raise NoMatchError(
            "the filters leave no scan", "loosen the --bids-filter-file", path=datasets[0].root
        )

    asked = {label: folders for label, folders in known.items() if label in (subjects or known)}
    missing = _missing(asked, sessions, scans)
    unused = datasets[0].root / "derivatives"
    if missing and unused.is_dir() and not any(d.root.is_relative_to(unused) for d in datasets):
        notes.append(f"{unused} was not looked into: give its datasets with --derivatives")
    return Discovery(scans, missing, tuple(notes))


def _missing(
    known: Mapping[str, set[str]], sessions: set[str], scans: Sequence[Scan]
) -> tuple[tuple[str, str | None], ...]:
    """Return the sessions, or participants without sessions, that no scan belongs to."""
    found: dict[str, set[str | None]] = {}
    for scan in scans:
        found.setdefault(scan.subject, set()).add(scan.session)
    missing: list[tuple[str, str | None]] = []
    for subject, folders in sorted(known.items()):
        expected = sessions or folders
        if expected:
            absent = expected - found.get(subject, set())
            missing += [(subject, session) for session in sorted(absent)]
        elif subject not in found:
            missing.append((subject, None))
    return tuple(missing)


@dataclass(frozen=True)
class _File:
    path: Path
    dataset: Dataset
    entities: Mapping[str, str]

    @property
    def selectors(self) -> dict[str, str]:
        """What a filter can tell this file apart by."""
        return {**self.entities, "scope": self.dataset.name}


@dataclass
class _Candidates:
    """The files that may be a contrast of a scan, by scan, contrast and rank of preference."""

    excluded: Sequence[Path]
    wanted: Callable[[Mapping[str, str]], bool]
    filters: Mapping[str, Mapping[str, Any]]
    reconstruct: bool = True
    scans: dict[Entities, dict[tuple[str, int], list[_File]]] = field(default_factory=dict)
    masks: dict[str, list[_File]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, dataset: Dataset, layout: Any) -> None:
        """Sort the files of one dataset's index by what they may be."""
        spec = io_spec()["inputs"]
        allowed = {contrast: self._allowed(contrast, dataset, layout) for contrast in self.filters}
        for path in _get(layout, {}):
            file = self._accepted(Path(path), dataset)
            if file is None:
                continue
            if _matches(file.entities, spec["brain_mask"]):
                self.masks.setdefault(file.entities["subject"], []).append(file)
            for contrast, ranks in spec["contrasts"].items():
                if contrast in allowed and file.path not in allowed[contrast]:
                    continue
                for rank, rule in enumerate(ranks):
                    if rule["derivation"] == "reconstruction" and not self.reconstruct:
                        continue
                    if _matches(file.entities, rule["query"]) and not any(
                        file.entities.get(name) in values
                        for name, values in rule.get("reject", {}).items()
                    ):
                        key = _scan_key(file.entities, rule["query"])
                        self.scans.setdefault(key, {}).setdefault((contrast, rank), []).append(file)

    def _accepted(self, path: Path, dataset: Dataset) -> _File | None:
        entities = parse_name(path.name)
        native = entities.get("space") in io_spec()["inputs"]["native_spaces"]
        if not (native and self.wanted(entities)) or _is_excluded(path, dataset, self.excluded):
            return None
        if not _is_well_formed(entities):
            self.notes.append(f"{path} was left out: its name is not valid BIDS")
            return None
        if path.relative_to(dataset.root).parent != _folder(entities):
            self.notes.append(f"{path} was left out: its name and its folder disagree")
            return None
        return _File(path, dataset, entities)

    def _allowed(self, contrast: str, dataset: Dataset, layout: Any) -> set[Path]:
        query = dict(self.filters[contrast])
        scope = query.pop("scope", dataset.name)
        if dataset.name not in ([scope] if isinstance(scope, str) else scope):
            return set()
        try:
            return {Path(path) for path in _get(layout, query)}
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"the filter for {contrast} cannot be used: {error}",
                "use pybids entity names in the --bids-filter-file",
            ) from None

    def resolve(self, key: Entities) -> Scan | None:
        """Choose one source per contrast; ``None`` where no contrast is usable."""
        sources: list[Source] = []
        notes: list[str] = []
        error: FdlError | None = None
        for contrast, ranks in io_spec()["inputs"]["contrasts"].items():
            for rank, rule in enumerate(ranks):
                found = self.scans[key].get((contrast, rank))
                if not found:
                    continue
                try:
                    source = _make_source(contrast, rule["derivation"], found, notes)
                except AmbiguousInputError as problem:
                    error = error or problem
                    break
                if source is not None:
                    sources.append(source)
                    break
        if not sources and error is None:
            return None
        # Those that are read come first.
        used = {path: number for number, one in enumerate(sources) for path in one.paths}
        candidates = {
            file.path: file.dataset.root for found in self.scans[key].values() for file in found
        }
        ordered = sorted(candidates.items(), key=lambda each: used.get(each[0], len(used)))
        mask = self._brain_mask(key)
        return Scan(key, tuple(sources), mask, error, tuple(notes), tuple(ordered))

    def _brain_mask(self, key: Entities) -> Path | None:
        # The closest mask is the one that shares most entities with the scan, none in conflict.
        entities = dict(key)
        fitting = []
        for file in self.masks.get(entities["subject"], []):
            own = _scan_key(file.entities, {})
            if set(own) <= set(key):
                fitting.append((len(own), file.path))
        return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def _make_source(
    contrast: str, derivation: str, found: Sequence[_File], notes: list[str]
) -> Source | None:
    """Make the source of one rank; ``None``, with a note, where these files do not serve."""
    if derivation not in ECHO_DERIVATIONS:
        if len(found) > 1:
            raise _ambiguity((contrast,), found[0], found[1])
        return Source(
            contrast, (found[0].path,), derivation, uris=(found[0].dataset.uri(found[0].path),)
        )

    if derivation == "reconstruction":
        return _make_reconstruction(contrast, found, notes)
    echoes = sorted(found, key=lambda file: int(file.entities["echo"]))
    for one, other in pairwise(echoes):
        if int(one.entities["echo"]) == int(other.entities["echo"]):
            raise _ambiguity(("imag", "r2star"), one, other)
    times, problem = _echo_times(echoes)
    if derivation == "echo_fit" and len(echoes) < 2:
        problem = "there is only one echo"
    if problem and derivation == "echo_fit":
        notes.append(f"R2* was not fitted to {echoes[0].path.name}: {problem}")
        return None
    return Source(
        contrast,
        tuple(file.path for file in echoes),
        derivation,
        echo_times=() if problem else times,
        uris=tuple(file.dataset.uri(file.path) for file in echoes),
    )


def _make_reconstruction(contrast: str, found: Sequence[_File], notes: list[str]) -> Source | None:
    """Pair magnitude with phase; ``None`` where they do not serve, with a note for QSM alone."""
    magnitude, phase = (
        sorted(
            (file for file in found if (file.entities.get("part") == "phase") is is_phase),
            key=_echo_number,
        )
        for is_phase in (False, True)
    )
    if not phase and "echo" not in found[0].entities:
        return None
    for one, other in pairwise(phase):
        if _echo_number(one) == _echo_number(other):
            raise _ambiguity(("qsm", "swi"), one, other)
    times, problem = _echo_times(magnitude)
    field_strength, unit = 0.0, ""
    if not phase:
        problem = "there is no phase image"
    elif [*map(_echo_number, magnitude)] != [*map(_echo_number, phase)]:
        problem = "magnitude and phase are not of the same echoes"
    elif not problem:
        field_strength, unit, problem = _phase_metadata(magnitude[0], phase[0])
    if problem:
        if contrast == "qsm":
            notes.append(f"QSM and SWI were not made from {found[0].path.name}: {problem}")
        return None
    return Source(
        contrast,
        tuple(file.path for file in magnitude),
        "reconstruction",
        echo_times=times,
        uris=tuple(file.dataset.uri(file.path) for file in (*magnitude, *phase)),
        phase=tuple(file.path for file in phase),
        field_strength=field_strength,
        phase_unit=unit,
    )


def _echo_number(file: _File) -> int:
    return int(file.entities.get("echo", 1))


def _phase_metadata(magnitude: _File, phase: _File) -> tuple[float, str, str | None]:
    """Read B0 in tesla and the phase's unit; the third value says why they cannot be used."""
    try:
        about, theirs = (_metadata(file.path, file.dataset.root) for file in (magnitude, phase))
    except ValueError as error:
        return 0.0, "", str(error)
    value = about.get("MagneticFieldStrength", theirs.get("MagneticFieldStrength"))
    if not _is_number(value):
        return 0.0, "", f"{magnitude.path.name} has no MagneticFieldStrength in its JSON sidecar"
    if not 0 < value < STRONGEST_FIELD:
        return 0.0, "", f"MagneticFieldStrength of {magnitude.path.name} is {value:g}, not in tesla"
    unit = theirs.get("Units")
    return float(value), unit if isinstance(unit, str) else "", None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _echo_times(echoes: Sequence[_File]) -> tuple[tuple[float, ...], str | None]:
    """Read the echo times in seconds; the second value says why they cannot be used."""
    times: list[float] = []
    for file in echoes:
        try:
            value = _metadata(file.path, file.dataset.root).get("EchoTime")
        except ValueError as error:
            return (), str(error)
        if not _is_number(value):
            return (), f"{file.path.name} has no EchoTime in its JSON sidecar"
        if not 0 < value < LONGEST_ECHO_TIME:
            return (), f"EchoTime of {file.path.name} is {value!s:.20}, not a time in seconds"
        times.append(float(value))
    for (time, later), file in zip(pairwise(times), echoes[1:], strict=True):
        if later <= time:
            return (), f"EchoTime of {file.path.name} is not longer than that of the echo before"
    return tuple(times), None


def scanner_of(scan: Scan) -> dict[str, float | str | None]:
    """Tell which scanner a scan is of, as far as the sidecars of its files say.

    Returns
    -------
    dict
        A value for each name of `_SCANNER`, the field strength in tesla; ``None`` where no sidecar
        has one that makes sense.
    """
    found: dict[str, float | str | None] = dict.fromkeys(_SCANNER)
    for path, root in scan.files:
        # A sidecar that cannot be read says nothing; where it is needed, that is an error.
        with suppress(ValueError):
            about = _metadata(path, root)
            for name, understood in _SCANNER.items():
                if found[name] is None:
                    found[name] = understood(about.get(name))
        if None not in found.values():
            break
    return found


def _tesla(value: object) -> float | None:
    return float(value) if _is_number(value) and 0 < value < STRONGEST_FIELD else None


def _name(value: object) -> str | None:
    return " ".join(value.split())[:LONGEST_NAME] or None if isinstance(value, str) else None


_SCANNER: dict[str, Callable[[object], float | str | None]] = {
    "MagneticFieldStrength": _tesla,
    "Manufacturer": _name,
    "ManufacturersModelName": _name,
}
"""How what :func:`scanner_of` tells is understood, by its BIDS name."""


def _metadata(path: Path, root: Path) -> dict[str, Any]:
    """Merge the sidecars in a dataset that apply to a file by the inheritance principle.

    Raises
    ------
    ValueError
        A sidecar is not a JSON object, or cannot be read.
    """
    own = parse_name(path.name)
    del own["extension"]
    folders = [path.parent, *path.parent.parents]
    folders = folders[: folders.index(root) + 1]
    merged: dict[str, Any] = {}
    for folder in reversed(folders):
        applying = []
        for name in _sidecars(folder):
            theirs = parse_name(name)
            del theirs["extension"]
            if theirs.items() <= own.items():
                applying.append((len(theirs), name))
        for _, name in sorted(applying):
            try:
                content = read_json(folder / name)
            except (OSError, ValueError) as error:
                raise ValueError(f"{name} cannot be read as JSON") from error
            if not isinstance(content, dict):
                raise ValueError(f"{name} is not a JSON object")
            merged.update(content)
    return merged


# The root of a dataset may hold tens of thousands of folders, and is asked for each file.
@lru_cache(maxsize=16)
def _sidecars(folder: Path) -> tuple[str, ...]:
    return tuple(path.name for path in folder.glob("*.json"))


def _scan_key(entities: Mapping[str, str], query: Mapping[str, Any]) -> Entities:
    dropped = {*io_spec()["inputs"]["not_of_the_scan"], *query}
    return tuple(
        (name, entities[name]) for name in entity_keys() if name in entities and name not in dropped
    )


def _is_well_formed(entities: Mapping[str, str]) -> bool:
    return all(
        re.fullmatch(_VALUES[entity.get("dtype", "str")], entities.get(entity["name"], "0"))
        for entity in io_spec()["entities"]
    )


def _folder(entities: Mapping[str, str]) -> Path:
    parts = [f"sub-{entities.get('subject')}"]
    if "session" in entities:
        parts.append(f"ses-{entities['session']}")
    return Path(*parts, "anat")


def _ambiguity(contrasts: Sequence[str], one: _File, other: _File) -> AmbiguousInputError:
    """Name both files and a filter that chooses the first."""
    differing = next(
        (
            name
            for name in (*entity_keys(), "extension", "scope")
            if one.selectors.get(name) != other.selectors.get(name)
        ),
        None,
    )
    if differing is None:
        remedy = "keep one of the two"
    else:
        chosen = {differing: one.selectors.get(differing)}
        entry = json.dumps(dict.fromkeys(contrasts, chosen))
        remedy = f"choose with --bids-filter-file, for the first: {entry}"
    return AmbiguousInputError(
        f"two candidates for {' and '.join(contrasts)}, the other is {other.path}",
        remedy,
        path=one.path,
    )


def _matches(entities: Mapping[str, str], query: Mapping[str, Any]) -> bool:
    """Apply a query of ``io_spec.json``: ``null`` is an absent entity, ``"*"`` any value."""
    for name, wanted in query.items():
        value = entities.get(name)
        choices = wanted if isinstance(wanted, list) else [wanted]
        if value not in choices and (value is None or "*" not in choices):
            return False
    return True


def _get(layout: Any, query: Mapping[str, Any]) -> list[str]:
    """Query a layout, with ``"*"`` for any value and ``None`` for an absent entity."""
    from bids.layout import Query

    def meaning(value: Any) -> Any:
        if isinstance(value, list):
            return [meaning(item) for item in value]
        return {None: Query.NONE, "*": Query.ANY}.get(value, value)

    filters = {name: meaning(value) for name, value in query.items()}
    paths: list[str] = layout.get(return_type="filename", **filters)
    return paths


def _index(
    dataset: Dataset, subjects: set[str], sessions: set[str], database_dir: str | Path | None
) -> Any:
    """Index the file names of one dataset: images in ``anat`` whose suffix may be of use."""
    if database_dir is None:
        return _new_layout(dataset.root, _useful_paths(subjects, sessions), None)

    from bids.layout import BIDSLayout
    from sqlalchemy.exc import SQLAlchemyError

    keep = _useful_paths(set(), set())
    folder = _absolute(database_dir)
    dataset_hash = hashlib.sha256(os.fsencode(dataset.root)).hexdigest()[:12]
    state = _fingerprint(dataset.root, keep.pattern)
    final = folder / f"{dataset_hash}-{state}"
    try:
        if not final.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            # Jobs that share the folder each build their own; the first one renamed stays.
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
            try:
                _new_layout(dataset.root, keep, building).session.close()
                if not final.is_dir():
                    building.rename(final)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            for stale in folder.glob(f"{dataset_hash}-*"):
                if stale != final:
                    shutil.rmtree(stale, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"the index cannot be written ({error.strerror})",
            "give a folder that can be written to as --bids-database-dir",
            path=folder,
        ) from error
    try:
        return BIDSLayout(dataset.root, validate=False, database_path=final)
    except SQLAlchemyError as error:
        raise StorageError("the index is damaged", "delete this folder", path=final) from error


def _new_layout(root: Path, keep: re.Pattern[str], database: Path | None) -> Any:
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    # Called "bids" so that pybids accepts extensions with and without their first dot.
    config = {"name": "bids", "entities": _pybids_entities()}
    indexer = BIDSLayoutIndexer(
        validate=False, index_metadata=False, ignore=[re.compile(f"^(?!{keep.pattern})")]
    )
    return BIDSLayout(
        root, validate=False, config=[config], indexer=indexer, database_path=database
    )


def _pybids_entities() -> list[dict[str, Any]]:
    # Matched within the file name alone: pybids' own patterns also see the folders above the
    # dataset, so that a dataset below .../sub-99/ would be all of participant 99.
    entities = [
        {
            "name": entity["name"],
            "pattern": rf"[/_]{entity['key']}-({_VALUES[dtype]})[_.][^/]*$",
            "dtype": dtype,
        }
        for entity in io_spec()["entities"]
        for dtype in [entity.get("dtype", "str")]
    ]
    return [
        *entities,
        {"name": "suffix", "pattern": r"_([a-zA-Z0-9]+)\.[^/]+$"},
        {"name": "extension", "pattern": r"[^./](\.[^/]+)$"},
    ]


def _useful_paths(subjects: Iterable[str], sessions: Iterable[str]) -> re.Pattern[str]:
    """Match the folders to enter and the files to index, relative to the dataset (``/sub-…``)."""
    spec = io_spec()["inputs"]
    suffixes = {rule["query"]["suffix"] for ranks in spec["contrasts"].values() for rule in ranks}
    suffixes.add(spec["brain_mask"]["suffix"])
    subject = _either(subjects) or "[a-zA-Z0-9+]+"
    session = _either(sessions) or "[a-zA-Z0-9+]+"
    extension = _either(spec["extensions"])
    name = rf"/[^/]+_{_either(suffixes)}{extension}"
    return re.compile(rf"/sub-{subject}(/ses-{session})?(/anat({name})?)?$")


def _either(values: Iterable[str]) -> str:
    escaped = "|".join(re.escape(value) for value in sorted(values))
    return f"({escaped})" if escaped else ""


def _fingerprint(root: Path, *settings: str) -> str:
    """Hash the names and times of the folders that are indexed.

    A folder's time of modification changes with every file added, removed or renamed in it, and
    names are all that is indexed.
    """
    digest = hashlib.sha256(repr((settings, _pybids_entities())).encode())
    for subject in _folders(root, "sub"):
        for folder in (subject, *_folders(subject, "ses")):
            for level in (folder, folder / "anat"):
                if level.is_dir():
                    digest.update(f"{level}\0{level.stat().st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def _folders(parent: Path, key: str) -> list[Path]:
    pattern = re.compile(rf"{key}-[a-zA-Z0-9+]+")
    try:
        with os.scandir(parent) as entries:
            names = [e.name for e in entries if pattern.fullmatch(e.name) and e.is_dir()]
    except OSError:
        return []
    return [parent / name for name in sorted(names)]


def _known_participants(
    datasets: Sequence[Dataset], excluded: Sequence[Path], notes: list[str]
) -> dict[str, set[str]]:
    """Return all participants of folders and ``participants.tsv``, with their session folders."""
    known: dict[str, set[str]] = {}
    for dataset in datasets:
        for subject in _folders(dataset.root, "sub"):
            if not _is_excluded(subject, dataset, excluded):
                sessions = {_bare(folder.name, "ses") for folder in _folders(subject, "ses")}
                known.setdefault(_bare(subject.name, "sub"), set()).update(sessions)
        table = dataset.root / "participants.tsv"
        if table.is_file():
            try:
                with table.open(encoding="utf-8-sig", newline="") as lines:
                    rows = csv.DictReader(lines, delimiter="\t")
                    labels = [row.get("participant_id") or "" for row in rows]
            except (OSError, ValueError, csv.Error):
                notes.append(f"{table} was left out: it cannot be read as a table")
                continue
            for label in labels:
                if re.fullmatch(rf"sub-{_VALUES['str']}", label):
                    known.setdefault(_bare(label, "sub"), set())
                elif label.startswith("sub-"):
                    notes.append(f"{table}: {label!r} was left out, it is no label of BIDS")
    return known


def _check_labels(kind: str, asked: set[str], known: set[Any], root: Path) -> None:
    unknown = sorted(asked - known)
    if unknown:
        there = sorted(label for label in known if label)
        some = ", ".join(there[:5]) + (", …" if len(there) > 5 else "")
        raise NoMatchError(
            f"the dataset has no {kind} {', '.join(unknown)}",
            f"choose among {some}" if there else f"leave --{kind}-label out",
            path=root,
        )


def _checked_filters(filters: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    contrasts = list(io_spec()["inputs"]["contrasts"])
    for contrast, query in filters.items():
        if contrast not in contrasts or not isinstance(query, Mapping):
            raise UsageError(
                f"the filters have an entry {contrast} that names no contrast or is no object",
                f"write one JSON object of entities for any of {', '.join(contrasts)}",
            )
    return dict(filters)


def _is_excluded(path: Path, dataset: Dataset, excluded: Sequence[Path]) -> bool:
    return any(
        path.is_relative_to(folder) and not dataset.root.is_relative_to(folder)
        for folder in excluded
    )


def _read_description(root: Path, remedy: str, validate: bool) -> dict[str, Any]:
    if not root.is_dir():
        raise InputMissingError("there is no such folder", "check the path", path=root)
    try:
        return _checked_description(root, remedy)
    except NotADatasetError:
        if validate:
            raise
        return {}


def _checked_description(root: Path, remedy: str) -> dict[str, Any]:
    path = root / "dataset_description.json"
    try:
        description = read_json(path)
    except FileNotFoundError:
        raise NotADatasetError(
            "the folder is not a BIDS dataset, it has no dataset_description.json",
            remedy,
            path=root,
        ) from None
    except (OSError, ValueError) as error:
        raise NotADatasetError("it cannot be read as JSON", _DESCRIPTION, path=path) from error
    makers = description.get("GeneratedBy", []) if isinstance(description, dict) else None
    if not isinstance(makers, list) or not all(isinstance(maker, dict) for maker in makers):
        raise NotADatasetError("it does not describe a BIDS dataset", _DESCRIPTION, path=path)
    return description


def _absolute(path: str | Path) -> Path:
    # Not resolved: in git-annex and DataLad datasets a link's target has no BIDS name.
    return Path(os.path.abspath(path))  # noqa: PTH100


def _bare(label: str, key: str) -> str:
    return label.removeprefix(f"{key}-")
