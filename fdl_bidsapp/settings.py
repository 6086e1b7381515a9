"""What one run was asked to do: made by the command line, passed on, kept beside the outputs."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fdl_bidsapp.errors import InputMissingError, UsageError

LEVELS = ("participant", "group")
CONTRASTS = ("qsm", "r2star", "imag", "swi")
BEST = "best"
"""Of a scan's contrasts, the one of which the model expects most."""

TARGETS = ("auto", BEST, *CONTRASTS)
DEVICES = ("auto", "cpu", "cuda")
FLIPS = ("auto", "yes", "no")
PAPER_MEASURES = ("volume", "qsm_mean", "r2star_mean")
QSM_REFERENCES = ("brain", "csf")
RECONSTRUCTIONS = ("auto", "never", "tv", "tikhonov", "tkd", "ndi", "pedqnet")
SPACES = ("MNI152NLin2009aSym",)

_NAMED = re.compile(r"([A-Za-z0-9]+)=(.+)", re.DOTALL)
_PATHS = frozenset(
    {
        "bids_dir",
        "output_dir",
        "bids_filter_file",
        "bids_database_dir",
        "use_plugin",
        "work_dir",
    }
)


@dataclass(frozen=True)
class Settings:
    """The options of one run, under the names they have on the command line.

    Attributes
    ----------
    bids_dir, output_dir
        Input dataset and output folder.
    analysis_level
        ``participant`` or ``group``.
    participant_label, session_label
        Labels without ``sub-`` and ``ses-``; empty for all.
    bids_filter_file
        JSON with one set of entity filters per contrast.
    derivatives
        ``(name or None, folder)`` of each derivative dataset to read as well.
    bids_database_dir
        Where the index of the dataset is kept between runs.
    skip_bids_validation
        Whether to read folders that have no ``dataset_description.json`` all the same.
    recon
        How susceptibility and SWI are made from raw echoes where a scan has no map of them:
        ``auto`` (total variation), ``never``, the name of a dipole inversion, or a reconstruction
        network: ``pedqnet`` or a model file.
    qsm_reference
        What has susceptibility 0 in maps made here: ``brain``, or ``csf``, the ventricles' fluid.
    target
        Contrast to segment; ``auto`` takes the best one a scan has.
    model
        Name of a model that comes with the package, or path of a model file.
    device
        ``auto``, ``cpu`` or ``cuda``.
    flips
        Whether to average the network's output over left-right flips: ``yes``, ``no``, or ``auto``
        for what the model was made for.
    output_spaces
        Standard spaces in which the label map is written as well.
    save_probabilities
        Whether to write the probability of each structure.
    nprocs
        CPUs used at once; ``None`` for all that the process may use.
    omp_nthreads
        Threads of one step; ``None`` to choose by `nprocs`.
    mem
        Upper limit of memory in GB; ``None`` for most of the machine's.
    use_plugin
        YAML file that names a Nipype plugin and its arguments.
    work_dir
        Folder of intermediate files; ``None`` for a temporary one.
    clean_workdir
        Whether to empty `work_dir` first.
    stop_on_first_crash, resource_monitor, random_seed, write_graph
        How the workflow is run.
    ratings
        Files of ratings that the group level takes up.
    controls
        ``COLUMN=VALUE`` of ``participants.tsv`` that marks controls; ``None`` to look for them.
    dry_run, reports_only, boilerplate_only
        Parts of the work to do alone.
    notrack
        Accepted for compatibility: nothing is ever tracked.
    verbose
        How much to say on the terminal, from 0.

    Examples
    --------
    >>> settings = Settings(Path("/data"), Path("/out"), "participant", participant_label=("01",))
    >>> Settings.from_toml(settings.to_toml()) == settings
    True
    """

    bids_dir: Path
    output_dir: Path
    analysis_level: str
    participant_label: tuple[str, ...] = ()
    session_label: tuple[str, ...] = ()
    bids_filter_file: Path | None = None
    derivatives: tuple[tuple[str | None, Path], ...] = ()
    bids_database_dir: Path | None = None
    skip_bids_validation: bool = False
    recon: str = "auto"
    qsm_reference: str = "brain"
    target: str = "auto"
    model: str = "default"
    device: str = "auto"
    flips: str = "auto"
    output_spaces: tuple[str, ...] = ()
    save_probabilities: bool = False
    nprocs: int | None = None
    omp_nthreads: int | None = None
    mem: float | None = None
    use_plugin: Path | None = None
    work_dir: Path | None = None
    clean_workdir: bool = False
    stop_on_first_crash: bool = False
    resource_monitor: bool = False
    random_seed: int = 0
    ratings: tuple[Path, ...] = ()
    controls: str | None = None
    dry_run: bool = False
    reports_only: bool = False
    boilerplate_only: bool = False
    write_graph: bool = False
    notrack: bool = False
    verbose: int = 0

    def to_toml(self) -> str:
        """Write the settings as TOML that ``--config-file`` takes back.

        Returns
        -------
        str
            One ``option-name = value`` a line; options that are ``None`` are left out.
        """
        import tomli_w

        table = {field.name: getattr(self, field.name) for field in fields(self)}
        return tomli_w.dumps(
            {
                name.replace("_", "-"): _plain(value)
                for name, value in table.items()
                if value is not None
            }
        )

    @classmethod
    def from_toml(cls, text: str) -> Settings:
        """Read what `to_toml` wrote.

        Raises
        ------
        UsageError
            The text is not TOML, or a key is no option or a required one is absent.
        """
        values: dict[str, Any] = {}
        known = {field.name for field in fields(cls)}
        for key, value in _read_toml(text).items():
            name = key.replace("-", "_")
            if name not in known:
                raise UsageError(f"'{key}' is not a setting", "remove it")
            if name == "derivatives":
                value = tuple(named_folder(item) for item in value)
            elif name in _PATHS:
                value = Path(value)
            elif name == "ratings":
                value = tuple(Path(item) for item in value)
            elif isinstance(value, list):
                value = tuple(value)
            values[name] = value
        try:
            return cls(**values)
        except TypeError as error:
            raise UsageError(
                f"a required setting is absent ({error})",
                "give bids-dir, output-dir and analysis-level",
            ) from None


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML file of options.

    Raises
    ------
    InputMissingError
        There is no such file, or it cannot be read.
    UsageError
        It is not TOML.
    """
    return _read_toml(_read_text(path, "--config-file"), path)


def read_bids_filters(path: Path | None) -> dict[str, dict[str, Any]]:
    """Read the entity filters of each contrast, e.g. ``{"qsm": {"acquisition": "hr"}}``.

    Parameters
    ----------
    path
        JSON file; ``None`` means no filters.

    Raises
    ------
    InputMissingError
        There is no such file, or it cannot be read.
    UsageError
        It is not JSON, or names a contrast that does not exist.
    """
    if path is None:
        return {}
    try:
        filters = json.loads(_read_text(path, "--bids-filter-file"))
    except ValueError as error:
        raise UsageError(f"this is not JSON ({error})", "correct the file", path=path) from None
    remedy = 'write one object per contrast, such as {"qsm": {"acquisition": "hr"}}'
    if not isinstance(filters, Mapping):
        raise UsageError("the filters are not a JSON object", remedy, path=path)
    for contrast, entities in filters.items():
        if contrast not in CONTRASTS:
            known = ", ".join(CONTRASTS)
            raise UsageError(f"'{contrast}' is not a contrast", f"use one of {known}", path=path)
        if not isinstance(entities, Mapping):
            raise UsageError(f"the filters of '{contrast}' are not an object", remedy, path=path)
    return {contrast: dict(entities) for contrast, entities in filters.items()}


def named_folder(text: str) -> tuple[str | None, Path]:
    """Split ``[NAME=]PATH``.

    Examples
    --------
    >>> named_folder("qsmxt=/data/derivatives/qsmxt")[0]
    'qsmxt'
    >>> named_folder("/data/a=b")
    (None, PosixPath('/data/a=b'))
    """
    match = _NAMED.fullmatch(text)
    name, folder = match.groups() if match else (None, text)
    return name, Path(folder).expanduser().absolute()


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [
            str(item)
            if isinstance(item, str | Path)
            else (f"{item[0]}={item[1]}" if item[0] else str(item[1]))
            for item in value
        ]
    return value


def _read_toml(text: str, path: Path | None = None) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"this is not TOML ({error})", "correct the file", path=path) from None


def _read_text(path: Path, option: str) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        raise InputMissingError(
            f"the file cannot be read ({reason})", f"check the path after {option}", path=path
        ) from None
    except UnicodeDecodeError:
        raise UsageError(
            "this is not a text file", f"check the path after {option}", path=path
        ) from None
