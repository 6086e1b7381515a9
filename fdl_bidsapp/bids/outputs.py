"""Write derivatives: names, sidecars, the output dataset itself, each file in one stroke.

The patterns of the names stand in ``io_spec.json``.
"""

from __future__ import annotations

import errno
import fcntl
import filecmp
import gzip
import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.boilerplate import BIBLIOGRAPHY, README, methods
from fdl_bidsapp.bids.inputs import (
    Dataset,
    Entities,
    Scan,
    io_spec,
    open_datasets,
    parse_name,
    read_json,
)
from fdl_bidsapp.errors import FdlError, OutputError, StorageError
from fdl_bidsapp.labels import Label, nuclei

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

APP_NAME = "fdl-bidsapp"
BIDS_VERSION = "1.10.0"

STANDARD_SPACES = {
    "MNI152NLin2009aSym": "http://www.bic.mni.mcgill.ca/ServicesAtlases/ICBM152NLin2009",
}
"""Where each standard space is described, for ``SpatialReference``."""

LABEL_TABLE = "seg-fdl_dseg.tsv"

MAP_UNITS = {"Chimap": "ppm", "R2starmap": "1/s", "T2starmap": "s", "T2starw": "arbitrary"}
"""Unit of each kind of map that is made from raw echoes."""

GZIP_LEVEL = 4
"""Label maps shrink to almost nothing at any level; probabilities gain little above this one."""

_TEMPORARY = r"^\.[0-9a-f]{32}_"

_CANNOT_CREATE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


def output_path(
    out: str | Path, entities: Entities | Mapping[str, str], kind: str, **extra: str
) -> Path:
    """Return where an output of a scan belongs.

    Parameters
    ----------
    out
        The output dataset.
    entities
        The scan's (`Scan.entities`).
    kind
        ``dseg``, ``mask``, ``probseg``, ``morph``, ``xfm``, ``figure``, or the suffix of a map:
        ``Chimap``, ``R2starmap``, ``T2starmap``, ``T2starw``.
    extra
        Further pybids entities: ``space`` (``orig`` if not given), ``res``, ``label``, ``desc``,
        ``from``, ``to``, and ``extension``.

    Raises
    ------
    ValueError
        The entities do not make a name of this kind.

    Examples
    --------
    >>> entities = {"subject": "01", "run": "2"}
    >>> output_path("out", entities, "mask", label="RNL").as_posix()
    'out/sub-01/anat/sub-01_run-2_space-orig_label-RNL_mask.nii.gz'
    >>> output_path("out", entities, "dseg", space="MNI152NLin2009aSym", res="1").name
    'sub-01_run-2_space-MNI152NLin2009aSym_seg-fdl_res-1_dseg.nii.gz'
    >>> output_path("out", entities, "xfm", to="MNI152NLin2009aSym").name
    'sub-01_run-2_from-orig_to-MNI152NLin2009aSym_mode-image_xfm.h5'
    >>> output_path("out", entities, "figure", desc="overlay", label="RNL").as_posix()
    'out/sub-01/figures/sub-01_run-2_seg-fdl_label-RNL_desc-overlay_dseg.svg'
    """
    from bids.layout.writing import build_path

    spec = io_spec()["outputs"]
    values = {**dict(entities), **extra}
    if kind == "figure":
        pattern = spec["figures_folder"] + spec["source"] + spec["figure"]
    else:
        pattern = spec["folder"] + spec["source"] + spec["kinds"][kind]
    path = build_path(values, [pattern], strict=True)
    if not isinstance(path, str):
        raise ValueError(f"{values} do not make the name of a {kind}")
    return Path(out) / path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file in one stroke: other processes see the old content or the new, never a part.

    The block gets a temporary path in the same folder, hidden from BIDS tools and with the same
    extension, and writes to it. The file at `path` is left alone if it has the same bytes already.

    Raises
    ------
    OutputError
        The folder or file cannot be created.
    StorageError
        Writing failed: disk full, quota, input or output error.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "sub-01" / "note.txt"
    >>> with atomic_write(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}_{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if not path.is_file() or not filecmp.cmp(temporary, path, shallow=False):
            _flush_to_disk(temporary)
            temporary.replace(path)
    except OSError as error:
        raise _write_error(error, path) from error
    finally:
        # Where it could not even be made, unlinking has nothing to add.
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def alone(out: str | Path, what: str) -> Iterator[None]:
    """Keep other runs that share an output folder from what this one is at.

    Parameters
    ----------
    out
        The output dataset; all runs lock bytes of its ``logs/lock``, a file that stays empty.
    what
        Name of the thing that one run at a time may write, such as a scan.

    Raises
    ------
    OutputError, StorageError
        The lock file cannot be made.

    Notes
    -----
    A lock ends with its process, however that ends. Where the file system has no locks, or the file
    is another user's, this does nothing.
    """
    path = Path(out) / "logs" / "lock"
    place = int.from_bytes(hashlib.sha256(what.encode()).digest()[:7], "little")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("ab")
    except PermissionError:
        yield
        return
    except OSError as error:
        raise _write_error(error, path) from error
    with stream:
        with suppress(OSError):
            fcntl.lockf(stream, fcntl.LOCK_EX, 1, place)
        yield


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(error: OSError, path: Path) -> FdlError:
    reason = error.strerror or type(error).__name__
    if error.errno in _CANNOT_CREATE:
        return OutputError(
            f"it cannot be created or written to ({reason})",
            "choose an output folder that you may write to",
            path=path,
        )
    remedy = "look after the disk or network share and run again, finished scans are kept"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space and run again, finished scans are kept"
    return StorageError(f"writing failed ({reason})", remedy, path=path)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text; see `atomic_write` for the errors."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object; see `atomic_write` for the errors.

    Raises
    ------
    ValueError
        A number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_tsv(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a BIDS table: tabs, floats in six digits, ``n/a`` for what is missing.

    Parameters
    ----------
    path
        The file.
    rows
        One mapping a row; ``None``, NaN, infinite and absent values become ``n/a``.
    columns
        The columns, in order.

    Examples
    --------
    >>> import tempfile
    >>> table = Path(tempfile.mkdtemp()) / "sub-01_morph.tsv"
    >>> write_tsv(table, [{"name": "RNL", "volume": 201.23456789}, {"name": "RNR"}],
    ...           ["name", "volume"])
    >>> table.read_text().splitlines()
    ['name\\tvolume', 'RNL\\t201.235', 'RNR\\tn/a']
    """
    write_text(path, _tsv_text(rows, columns))


def _tsv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    lines = [list(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "".join("\t".join(line) + "\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "n/a"
    # A tab or line end inside a cell would shift all that follows.
    return " ".join(str(value).split()) or "n/a"


def write_image(path: str | Path, image: Nifti1Image) -> None:
    """Write a NIfTI image, with the same bytes for the same image at any time.

    See `atomic_write` for the errors.
    """
    content = image.to_bytes()
    if Path(path).name.endswith(".gz"):
        content = gzip.compress(content, GZIP_LEVEL, mtime=0)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def dseg_sidecar(
    sources: Sequence[str],
    spatial_reference: str | None = None,
    *,
    space: str = "orig",
    resolution: str | None = None,
) -> dict[str, Any]:
    """Describe a label map.

    Parameters
    ----------
    sources
        BIDS URIs of the files it was made from.
    spatial_reference
        BIDS URI of the map whose grid it has; needed unless `space` is a standard one.
    space
        Value of ``space-``.
    resolution
        The voxel size in words, needed with ``res-``.

    Raises
    ------
    ValueError
        No reference is given, and the space is not a standard one.

    Examples
    --------
    >>> dseg_sidecar(["bids:raw:sub-01/anat/sub-01_Chimap.nii"],
    ...              "bids:raw:sub-01/anat/sub-01_Chimap.nii")["Manual"]
    False
    """
    return {
        "Description": "Deep nuclei; the values are the index column of seg-fdl_dseg.tsv",
        **_segmentation(sources, spatial_reference, space, resolution),
    }


def mask_sidecar(
    label: Label,
    sources: Sequence[str],
    spatial_reference: str | None = None,
    *,
    space: str = "orig",
    resolution: str | None = None,
) -> dict[str, Any]:
    """Describe the mask of one structure; see `dseg_sidecar`."""
    return {
        "Description": f"{label.name}, 1 inside and 0 outside",
        "Type": "ROI",
        **_segmentation(sources, spatial_reference, space, resolution),
    }


def probseg_sidecar(
    labels: Sequence[Label],
    sources: Sequence[str],
    spatial_reference: str | None = None,
    *,
    space: str = "orig",
    resolution: str | None = None,
) -> dict[str, Any]:
    """Describe the probabilities, one volume a structure; see `dseg_sidecar`."""
    return {
        "Description": "Probability of each structure; that of the background is 1 minus their sum",
        "LabelMap": [label.abbreviation for label in labels],
        **_segmentation(sources, spatial_reference, space, resolution),
    }


def map_sidecar(
    kind: str, description: str, sources: Sequence[str], reference: str, **parameters: Any
) -> dict[str, Any]:
    """Describe a map that was made from raw echoes.

    Parameters
    ----------
    kind
        Suffix of its name.
    description
        What it shows.
    sources
        BIDS URIs of the files it was made from.
    reference
        BIDS URI of the image whose grid it has.
    parameters
        JSON values: how it was made.

    Examples
    --------
    >>> map_sidecar("R2starmap", "Decay", ["bids:raw:a.nii"], "bids:raw:a.nii")["Units"]
    '1/s'
    """
    return {
        "Description": description,
        "Units": MAP_UNITS[kind],
        "SkullStripped": kind == "Chimap",
        **parameters,
        "Sources": list(sources),
        "SpatialReference": reference,
    }


def _segmentation(
    sources: Sequence[str], reference: str | None, space: str, resolution: str | None
) -> dict[str, Any]:
    reference = reference or STANDARD_SPACES.get(space)
    if reference is None:
        raise ValueError(f"the space {space} needs a spatial reference")
    sidecar: dict[str, Any] = {
        "Manual": False,
        "Sources": list(sources),
        "SpatialReference": reference,
    }
    if resolution is not None:
        sidecar["Resolution"] = resolution
    return sidecar


def prepare_output(
    out: str | Path,
    bids_dir: str | Path,
    derivatives: Sequence[tuple[str | None, str | Path]] = (),
    *,
    labels: Sequence[Label] = (),
    version: str = __version__,
    container: Mapping[str, str] | None = None,
    registration: bool = False,
    validate: bool = True,
) -> Path:
    """Make the output folder a BIDS derivative dataset, before any work is done.

    Jobs that share the folder may all call this at once.

    Parameters
    ----------
    out
        The output folder; made if it is not there.
    bids_dir, derivatives
        The inputs, as for `find_scans`.
    labels
        The structures of the model; all nuclei are listed where it has no other ones.
    version
        Of this app.
    container
        ``Type``, ``Tag`` and ``URI`` of the container it runs in, where known.
    registration
        Whether standard-space output is made, for the citations.
    validate
        See `open_datasets`.

    Returns
    -------
    Path
        The output folder, absolute.

    Raises
    ------
    OutputError
        The folder is an input, lies among raw data, holds another dataset or results of another
        label table, or cannot be written.
    StorageError
        The disk is full or fails.
    InputMissingError, NotADatasetError, UsageError
        See `open_datasets`.
    """
    datasets = open_datasets(bids_dir, derivatives, validate=validate)
    out = Path(out).absolute()
    _refuse_inputs(out, datasets)
    _own_description(out)
    label_table = _label_table(out, labels)
    # Also where all below is up to date, a folder that cannot be written to is told at once.
    probe = out / f".{uuid.uuid4().hex}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _write_error(error, out) from error

    with alone(out, "dataset_description.json"):
        known = _own_description(out)
        description = _dataset_description(out, datasets, version, container, known)
        write_json(out / "dataset_description.json", description)
    write_text(out / ".bidsignore", "\n".join(io_spec()["outputs"]["bidsignore"]) + "\n")
    write_text(out / "README.md", README)
    write_text(out / LABEL_TABLE, label_table)
    write_text(out / "logs" / "CITATION.md", methods(version, registration=registration))
    write_text(out / "logs" / "CITATION.bib", BIBLIOGRAPHY)
    return out


def _label_table(out: Path, labels: Sequence[Label]) -> str:
    """Return the text of the label table; refuse a folder that has another one."""
    table = nuclei() if set(labels) <= set(nuclei()) else labels
    columns = ("index", "name", "abbreviation", "color", "mapping")
    text = _tsv_text([vars(label) for label in table], columns)
    path = out / LABEL_TABLE
    try:
        known = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return text
    except (OSError, UnicodeDecodeError):
        known = ""
    if known != text:
        raise OutputError(
            "the output folder holds results of another label table",
            "choose another output folder for this model",
            path=path,
        )
    return text


def _refuse_inputs(out: Path, datasets: Sequence[Dataset]) -> None:
    remedy = "choose another output folder, such as derivatives/fdl-bidsapp inside the dataset"
    real = out.resolve()
    for dataset in datasets:
        root = dataset.root.resolve()
        if real == root:
            raise OutputError("the output folder is an input dataset", remedy, path=out)
        if real.is_relative_to(root):
            first = real.relative_to(root).parts[0]
            if first.startswith("sub-") or first == "sourcedata":
                raise OutputError("the output folder lies among raw data", remedy, path=out)


def _own_description(out: Path) -> dict[str, Any]:
    """Read the description that an earlier run has left; refuse that of another dataset."""
    path = out / "dataset_description.json"
    try:
        description = read_json(path)
        makers = [maker.get("Name") for maker in description.get("GeneratedBy", [])]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise _write_error(error, path) from error
    except (ValueError, AttributeError, TypeError):
        makers = []
    if APP_NAME not in makers:
        raise OutputError(
            "the output folder holds another dataset",
            "choose another output folder, or delete this one",
            path=out,
        )
    return dict(description)


def _dataset_description(
    out: Path,
    datasets: Sequence[Dataset],
    version: str,
    container: Mapping[str, str] | None,
    known: Mapping[str, Any],
) -> dict[str, Any]:
    source = datasets[0].description
    maker: dict[str, Any] = {
        "Name": APP_NAME,
        "Version": version,
        "Description": "Segmentation of iron-rich deep nuclei with frequency-disentangled networks",
    }
    if container:
        maker["Container"] = dict(container)
    # Relative, so that they hold when the project is moved as a whole.
    links = {d.name: quote(Path(os.path.relpath(d.root, out)).as_posix()) for d in datasets}
    source_datasets = []
    for dataset in datasets:
        entry = {"URL": links[dataset.name]}
        if doi := dataset.description.get("DatasetDOI"):
            entry["DOI"] = doi
        source_datasets.append(entry)
    description = {
        "Name": f"Deep nuclei of {source.get('Name') or datasets[0].root.name}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "License": source.get("License") or "Not stated by the source dataset",
        "HowToAcknowledge": "Cite the works in logs/CITATION.md and the source dataset",
        "GeneratedBy": [maker],
        "SourceDatasets": source_datasets,
        # URIs written by earlier runs on other derivatives keep their meaning.
        "DatasetLinks": {**known.get("DatasetLinks", {}), **links},
    }
    if authors := source.get("Authors"):
        description["Authors"] = authors
    return description


def read_record(path: str | Path) -> dict[str, Any] | None:
    """Read what became of a scan (``_morph.json``); ``None`` where there is no whole record."""
    try:
        record = read_json(Path(path))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def is_current(
    out: str | Path, scan: Scan, key: str, *, promised: Iterable[str | Path] = ()
) -> bool:
    """Tell whether a scan is done: same key, no error, and all its files there.

    Parameters
    ----------
    out
        The output dataset.
    scan
        The scan.
    key
        Hash of all that the result depends on.
    promised
        Further files there must be, such as those in standard space. The table, the label map, one
        mask for each row of the table, their sidecars, and the maps that the record says were made
        are looked for in any case.
    """
    record = read_record(output_path(out, scan.entities, "morph", extension=".json"))
    if record is None or record.get("Key") != key or record.get("Status") != "ok":
        return False
    table = output_path(out, scan.entities, "morph")
    try:
        header, *lines = table.read_text("utf-8").splitlines()
        column = header.split("\t").index("abbreviation")
        labels = [line.split("\t")[column] for line in lines]
    except (OSError, ValueError, IndexError):
        return False
    files = [Path(path) for path in promised]
    for name in record.get("MapsMade", []):
        files += [table.with_name(name), table.with_name(name.replace(".nii.gz", ".json"))]
    for extension in (".nii.gz", ".json"):
        files.append(output_path(out, scan.entities, "dseg", extension=extension))
        files += [
            output_path(out, scan.entities, "mask", label=label, extension=extension)
            for label in labels
        ]
    return all(path.is_file() for path in files)


def remove_scan_outputs(out: str | Path, scan: Scan) -> tuple[Path, ...]:
    """Delete all files of one scan, the record first, and return them.

    What a killed process has left of them is among them.

    Raises
    ------
    OutputError, StorageError
        A file cannot be deleted.
    """
    record = output_path(out, scan.entities, "morph", extension=".json")
    spec = io_spec()["outputs"]
    own = []
    for path in sorted(record.parent.glob(f"*sub-{scan.subject}_*")):
        name = re.sub(_TEMPORARY, "", path.name)
        values = parse_name(name)
        kind = values["suffix"]
        if kind not in spec["kinds"]:
            continue
        extra = {key: values[key] for key in spec["own_entities"] if key in values}
        # Ours if, and only if, it has a name that this scan would write.
        try:
            if output_path(out, scan.entities, kind, **extra) == path.with_name(name):
                own.append(path)
        except ValueError:
            continue
    own += _figures(Path(out), scan)
    own.sort(key=lambda path: path != record)
    for path in own:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _write_error(error, path) from error
    return tuple(own)


def _figures(out: Path, scan: Scan) -> list[Path]:
    """Return the figures of one scan, among them what a killed process has left of them."""
    own = []
    for path in sorted((out / f"sub-{scan.subject}" / "figures").glob("*_dseg.svg")):
        name = re.sub(_TEMPORARY, "", path.name)
        values = parse_name(name)
        extra = {key: values[key] for key in ("desc", "label") if key in values}
        with suppress(ValueError):
            if output_path(out, scan.entities, "figure", **extra) == path.with_name(name):
                own.append(path)
    return own
