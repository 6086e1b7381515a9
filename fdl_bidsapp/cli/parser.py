"""The command line of the BIDS App: from words to `Settings`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from fdl_bidsapp import __version__
from fdl_bidsapp.errors import UnknownLevelError, UsageError
from fdl_bidsapp.settings import (
    DEVICES,
    FLIPS,
    LEVELS,
    QSM_REFERENCES,
    RECONSTRUCTIONS,
    SPACES,
    TARGETS,
    Settings,
    named_folder,
    read_bids_filters,
    read_config,
)

_SEE_HELP = "see fdl-bidsapp --help"
_POSITIONALS = ("bids_dir", "output_dir", "analysis_level")
_PARTS = ("dry-run", "reports-only", "boilerplate-only")
_GB = {"": 1.0, "M": 1e-3, "G": 1.0, "T": 1e3}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse exits with 2; the BIDS Apps execution specification asks for 64.
        if "arguments are required" in message:
            raise UsageError(message, "give bids_dir, output_dir and analysis_level, in this order")
        raise UsageError(message, _SEE_HELP)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; options that are not given are absent from its namespace.

    The defaults are those of `Settings`, so that a configuration file can stand between them and
    the command line.

    Examples
    --------
    >>> namespace = build_parser().parse_args(["bids", "out", "group", "-v"])
    >>> sorted(vars(namespace))
    ['analysis_level', 'bids_dir', 'output_dir', 'verbose']
    """
    parser = _Parser(
        prog="fdl-bidsapp",
        usage="%(prog)s bids_dir output_dir {participant,group} [options]",
        description="Segment the red and dentate nuclei (and their neighbours) in QSM, R2*, "
        "magnitude and SWI maps of a BIDS dataset, and tabulate them.",
        epilog="Run the participant level first (once, or in parallel for different "
        "participants), then the group level, which gathers one table from the output folder.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
    )
    parser.add_argument("bids_dir", type=_path, help="input dataset, in BIDS; never written to")
    parser.add_argument("output_dir", type=_path, help="folder for the results; made if absent")
    parser.add_argument(
        "analysis_level",
        metavar="{participant,group}",
        help="participant: masks and a table for each scan; group: one table of all scans",
    )
    parser.add_argument("--version", action="version", version=f"fdl-bidsapp {__version__}")
    _add_options(parser)
    return parser


def parse(argv: Sequence[str] | None = None) -> Settings:
    """Turn command-line words into settings.

    Parameters
    ----------
    argv
        Words after the program's name; those of the process by default.

    Raises
    ------
    UnknownLevelError
        The analysis level is neither ``participant`` nor ``group``.
    UsageError
        An option is unknown, has no such value, or contradicts another.
    InputMissingError
        A file of options cannot be read.
    SystemExit
        After ``--help`` and ``--version``.

    Examples
    --------
    >>> parse(["bids", "out", "participant", "--participant-label", "sub-01"]).participant_label
    ('01',)
    """
    given = vars(build_parser().parse_args(argv))
    config = given.pop("config_file", None)
    values = {**(_from_config(config) if config else {}), **given}
    settings = Settings(**{name: _frozen(value) for name, value in values.items()})
    _check(settings)
    return settings


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Which scans")
    group.add_argument(
        "--participant-label",
        nargs="+",
        action="extend",
        type=_label("sub"),
        metavar="LABEL",
        help="participants to process, with or without 'sub-' (default: all)",
    )
    group.add_argument(
        "--session-label",
        nargs="+",
        action="extend",
        type=_label("ses"),
        metavar="LABEL",
        help="sessions to process, with or without 'ses-' (default: all)",
    )
    group.add_argument(
        "--bids-filter-file",
        type=_path,
        metavar="FILE",
        help="JSON file that chooses among several maps of one scan by their entities, one object "
        'per contrast: {"qsm": {"acquisition": "hr"}}',
    )
    group.add_argument(
        "-d",
        "--derivatives",
        nargs="+",
        action="extend",
        type=named_folder,
        metavar="[NAME=]PATH",
        help="derivative datasets to read maps from as well, such as the output of a QSM tool",
    )
    group.add_argument(
        "--bids-database-dir",
        type=_path,
        metavar="DIR",
        help="keep the index of a large dataset here and use it again in later runs",
    )
    group.add_argument(
        "--skip-bids-validation",
        action="store_true",
        help="read folders that have no dataset_description.json all the same",
    )

    group = parser.add_argument_group("Maps from raw echoes")
    group.add_argument(
        "--recon",
        type=_recon,
        metavar="METHOD|FILE",
        help="how to make QSM and SWI from magnitude and phase where a scan has no map of them: "
        "'auto' by total variation, 'never' not at all, or by one of tv (total variation), "
        "tikhonov, tkd (thresholded division), ndi (non-linear), pedqnet (a network), or a model "
        "file of 'fdl train --recipe pedqnet'" + _default("recon"),
    )
    group.add_argument(
        "--qsm-reference",
        choices=QSM_REFERENCES,
        help="what has susceptibility 0 in QSM made here: the mean over the 'brain', or 'csf', the "
        "cerebrospinal fluid of the ventricles where it is found" + _default("qsm_reference"),
    )

    group = parser.add_argument_group("Segmentation")
    group.add_argument(
        "--target",
        choices=TARGETS,
        help="contrast to segment; 'auto' takes the first that a scan has of qsm, r2star, imag and "
        "swi, 'best' segments them all and keeps the one of which the model expects the highest "
        "Dice" + _default("target"),
    )
    group.add_argument(
        "--model",
        type=_model,
        metavar="NAME|FILE",
        help="model to use: the name of one that comes with the package ('fdl models list' shows "
        "them), or a model file" + _default("model"),
    )
    group.add_argument(
        "--device",
        choices=DEVICES,
        help="where the network runs; 'auto' takes a GPU if there is one" + _default("device"),
    )
    group.add_argument(
        "--flips",
        choices=FLIPS,
        help="segment each image and its mirror image and average them, which takes twice the "
        "time; 'auto' does so with models that are made for it" + _default("flips"),
    )

    group = parser.add_argument_group("Output")
    group.add_argument(
        "--output-spaces",
        nargs="+",
        action="extend",
        type=_space,
        metavar="SPACE",
        help="standard spaces to write the label map in besides the scan's own space; available: "
        + ", ".join(SPACES),
    )
    group.add_argument(
        "--save-probabilities",
        action="store_true",
        help="write the probability map of each structure",
    )

    group = parser.add_argument_group("Resources")
    group.add_argument(
        "--nprocs",
        "--n-cpus",
        "--nthreads",
        dest="nprocs",
        type=_count,
        metavar="N",
        help="CPUs to use at once (default: all that this process may use)",
    )
    group.add_argument(
        "--omp-nthreads",
        type=_count,
        metavar="N",
        help="threads within one step (default: chosen by --nprocs)",
    )
    group.add_argument(
        "--mem",
        type=_gigabytes,
        metavar="SIZE",
        help="upper limit of memory, such as 8G or 8000M; a bare number is in GB "
        "(default: 90 %% of the machine's)",
    )
    group.add_argument(
        "--use-plugin",
        type=_path,
        metavar="FILE",
        help="YAML file with a Nipype 'plugin' and its 'plugin_args', e.g. for a cluster",
    )
    group.add_argument(
        "-w",
        "--work-dir",
        type=_path,
        metavar="DIR",
        help="folder for intermediate files (default: a temporary one, removed at the end)",
    )
    group.add_argument(
        "--clean-workdir", action="store_true", help="empty the work folder before starting"
    )

    group = parser.add_argument_group("Running")
    group.add_argument(
        "--config-file",
        type=_path,
        metavar="FILE",
        help='TOML file of options by their names (participant-label = ["01"]); the command '
        "line wins. The settings of each run are kept in this form in output_dir/logs",
    )
    group.add_argument(
        "--stop-on-first-crash",
        action="store_true",
        help="stop at the first scan that fails instead of finishing the others",
    )
    group.add_argument(
        "--resource-monitor", action="store_true", help="record memory and CPU use of each step"
    )
    group.add_argument(
        "--random-seed",
        type=_seed,
        metavar="N",
        help="seed of all that is random" + _default("random_seed"),
    )
    group.add_argument(
        "--write-graph", action="store_true", help="draw the workflow into output_dir/logs"
    )
    group.add_argument(
        "--notrack",
        action="store_true",
        help="accepted for compatibility: this program never sends anything",
    )
    group.add_argument("-v", "--verbose", action="count", help="say more; repeat for still more")

    group = parser.add_argument_group("Group level")
    group.add_argument(
        "--ratings",
        nargs="+",
        action="extend",
        type=_path,
        metavar="FILE",
        help="ratings of masks, as the participants' pages export them: they become columns of the "
        "table and a filter of the page",
    )
    group.add_argument(
        "--controls",
        type=_column_value,
        metavar="COLUMN=VALUE",
        help="who the controls are, by a column of participants.tsv, for groups and normal ranges "
        "(default: values such as control or HC in a column such as diagnosis or group)",
    )

    group = parser.add_argument_group("Parts of the work (one at most)")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="only show the inputs that were found and the outputs that would be written",
    )
    group.add_argument(
        "--reports-only",
        action="store_true",
        help="only make the HTML pages again, from what is in the output folder",
    )
    group.add_argument(
        "--boilerplate-only",
        action="store_true",
        help="only write the text for a methods section with its references",
    )


def _from_config(path: Path) -> dict[str, Any]:
    parser = _Parser(prog="--config-file", argument_default=argparse.SUPPRESS, add_help=False)
    _add_options(parser)
    actions = {
        option.removeprefix("--").replace("-", "_"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest != "config_file"
    }
    words: list[str] = []
    for key, value in read_config(path).items():
        name = key.replace("-", "_")
        if name in _POSITIONALS:
            continue  # the command line always gives these
        if name not in actions:
            raise UsageError(f"'{key}' is not an option", _SEE_HELP, path=path)
        words += _words(key, actions[name], value, path)
    try:
        return vars(parser.parse_args(words))
    except UsageError as error:
        raise UsageError(error.cause, error.remedy, path=path) from None


def _words(key: str, action: argparse.Action, value: object, path: Path) -> list[str]:
    option = action.option_strings[-1]
    if action.dest == "verbose" and type(value) is int:
        return [option] * value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"'{key}' must be true or false", "correct the value", path=path)
        return [option] if value else []
    if isinstance(value, list) and action.nargs == "+":
        return [option, *map(str, value)] if value else []
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return [f"{option}={value}"]
    raise UsageError(f"'{key}' has a value of the wrong type", "correct the value", path=path)


def _check(settings: Settings) -> None:
    level = settings.analysis_level
    if level not in LEVELS:
        raise UnknownLevelError(f"'{level}' is not an analysis level", f"use {' or '.join(LEVELS)}")
    read_bids_filters(settings.bids_filter_file)
    if level == "group":
        for name in ("participant_label", "session_label", "bids_filter_file"):
            if getattr(settings, name):
                raise UsageError(
                    f"--{name.replace('_', '-')} has no meaning at the group level, which gathers "
                    "all that is in the output folder",
                    "leave it out",
                )
    else:
        for name in ("ratings", "controls"):
            if getattr(settings, name):
                raise UsageError(
                    f"--{name} has no meaning at the participant level",
                    "give it at the group level",
                )
    if settings.use_plugin and (settings.nprocs or settings.mem):
        raise UsageError(
            "--use-plugin and --nprocs or --mem both set the resources",
            "give n_procs and memory_gb in the plugin file, or leave out --use-plugin",
        )
    if settings.nprocs and settings.omp_nthreads and settings.omp_nthreads > settings.nprocs:
        raise UsageError(
            f"--omp-nthreads {settings.omp_nthreads} is more than --nprocs {settings.nprocs}",
            "lower the one or raise the other",
        )
    parts = [name for name in _PARTS if getattr(settings, name.replace("-", "_"))]
    if len(parts) > 1:
        raise UsageError(f"--{parts[0]} and --{parts[1]} exclude each other", "give one of them")
    if settings.clean_workdir and not settings.work_dir:
        raise UsageError("--clean-workdir is given without a work folder", "add --work-dir")
    _check_folders(settings)


def _check_folders(settings: Settings) -> None:
    bids, out = settings.bids_dir.resolve(), settings.output_dir.resolve()
    if out == bids:
        raise UsageError(
            "output_dir is the input dataset itself",
            "give another folder, such as derivatives/fdl-bidsapp inside it",
            path=settings.output_dir,
        )
    if settings.work_dir is None:
        return
    work = settings.work_dir.resolve()
    for name, folder in (("bids_dir", bids), ("output_dir", out)):
        if work == folder or work in folder.parents:
            raise UsageError(
                f"--work-dir holds {name}, which would be mixed with intermediate files",
                "give a folder of its own",
                path=settings.work_dir,
            )
    if bids in work.parents and out not in work.parents:
        raise UsageError(
            "--work-dir lies in the input dataset, which is never written to",
            "give a folder outside of it",
            path=settings.work_dir,
        )


def _default(name: str) -> str:
    value = next(field.default for field in fields(Settings) if field.name == name)
    return f" (default: {value})"


def _frozen(value: Any) -> Any:
    # Repeated labels must not make a scan run twice; the order is the user's.
    return tuple(dict.fromkeys(value)) if isinstance(value, list) else value


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _model(text: str) -> str:
    # The steps of the workflow run in folders of their own, so a path must not be relative.
    return str(_path(text)) if "/" in text or text.endswith(".safetensors") else text


def _recon(text: str) -> str:
    if text not in RECONSTRUCTIONS and not text.endswith(".safetensors"):
        known = ", ".join(RECONSTRUCTIONS)
        raise argparse.ArgumentTypeError(f"'{text}' is none of {known}, nor a .safetensors file")
    return text if text in RECONSTRUCTIONS else str(_path(text))


def _label(prefix: str) -> Callable[[str], str]:
    def label(text: str) -> str:
        value = text.removeprefix(f"{prefix}-")
        if not re.fullmatch(r"[A-Za-z0-9+]+", value):
            raise argparse.ArgumentTypeError(f"'{text}' is not a label (letters, digits and +)")
        return value

    return label


def _column_value(text: str) -> str:
    column, equals, value = text.partition("=")
    if not (column and equals and value):
        raise argparse.ArgumentTypeError(f"'{text}' is not COLUMN=VALUE, such as diagnosis=control")
    return text


def _space(text: str) -> str:
    if text not in SPACES:
        known = ", ".join(SPACES)
        raise argparse.ArgumentTypeError(f"'{text}' is not available; available: {known}")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to 4294967295")
    return int(text)


def _gigabytes(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT]?)(?:I?B)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * _GB[match[2].upper()] if match else 0.0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size such as 8G or 8000M")
    return size
