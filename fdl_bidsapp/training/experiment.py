"""A grid of trainings from one file, each measured, and all of them in one table and one figure."""

from __future__ import annotations

import csv
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdl_bidsapp.bids.outputs import read_record, write_json, write_tsv
from fdl_bidsapp.errors import (
    DataError,
    FdlError,
    InputMissingError,
    TemporaryError,
    UsageError,
)
from fdl_bidsapp.imaging.overlap import METRICS
from fdl_bidsapp.processor import available_cores
from fdl_bidsapp.training.bootstrap import bootstrap_mean
from fdl_bidsapp.training.cases import SPLITS, in_split
from fdl_bidsapp.training.evaluate import CASE_COLUMNS, MEAN, evaluate
from fdl_bidsapp.training.fit import PATHS, fit, labelled_scans, make_settings

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Row = dict[str, Any]

PUBLISHED_METRICS = {
    "dice_percent": ("dice", 0.01),
    "dice": ("dice", 1.0),
    "precision": ("precision", 1.0),
    "recall": ("recall", 1.0),
    "mver": ("volume_error", 1.0),
    "maver": ("absolute_volume_error", 1.0),
    "pearson_r": ("pearson_r", 1.0),
    "hd95": ("hd95", 1.0),
}
"""Measures of the table of published values: ours, and the factor to its unit."""

TASK_AXES = ("structures", "targets")
"""Settings that say what is asked of a model, not how it is made."""


@dataclass(frozen=True)
class Run:
    """One training of a grid.

    Attributes
    ----------
    name
        Its folder, from the grid's values.
    point
        Its place in the grid.
    values
        All of its settings.
    """

    name: str
    point: dict[str, Any]
    values: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """What to train and how to measure it.

    Attributes
    ----------
    runs
        The grid's points in order.
    axes
        Names of the settings that vary.
    split
        What to measure on.
    flips
        Whether to average over mirrored input when measuring.
    published
        Which published values to show beside. Each entry has ``task``, ``paper`` or ``target`` as
        in the table, ``n_train`` with the published number for each of ours that differs, and
        ``where`` with the grid's values that it is for.
    """

    runs: tuple[Run, ...]
    axes: tuple[str, ...]
    split: str = "test"
    flips: bool = False
    published: Sequence[Mapping[str, Any]] = ()


_TABLES = ("n_train", "where")
"""What of an entry of ``published`` is a table itself."""


def make_experiment(values: Mapping[str, Any]) -> Experiment:
    """Make an experiment from the values of a TOML file.

    Parameters
    ----------
    values
        Settings as for a training; the table ``grid``, with a list of values for each setting that
        varies; ``measure`` with ``split`` and ``flips``; the array of tables ``published``, see
        :class:`Experiment`.

    Raises
    ------
    UsageError
        There is no grid, or a point of it has settings that make no sense.

    Examples
    --------
    >>> experiment = make_experiment(
    ...     {"table": "cases.tsv", "grid": {"method": ["none", "late"], "seed": [0, 1]}}
    ... )
    >>> [run.name for run in experiment.runs][:2]
    ['method=none,seed=0', 'method=none,seed=1']
    """
    base = {k: v for k, v in values.items() if k not in ("grid", "measure", "published")}
    grid, measure = values.get("grid"), values.get("measure", {})
    if (
        not isinstance(grid, Mapping)
        or not grid
        or not all(isinstance(choices, list) and choices for choices in grid.values())
    ):
        raise UsageError(
            "the experiment has no grid", "add a table [grid] with a list for each setting"
        )
    if not isinstance(measure, Mapping) or not set(measure) <= {"split", "flips"}:
        raise UsageError("the table measure has other entries", "it takes split and flips")
    if measure.get("split", "test") not in SPLITS:
        raise UsageError(
            f"there is no split {measure['split']!r}", f"choose one of {', '.join(SPLITS)}"
        )
    published = values.get("published", [])
    if not isinstance(published, list) or not all(isinstance(each, Mapping) for each in published):
        raise UsageError(
            "published is no array of tables", "write [[published]], with double brackets"
        )
    if not all(isinstance(each.get(k, {}), Mapping) for each in published for k in _TABLES):
        raise UsageError(
            "n_train or where of a published entry is no table", "write them as {n = value}"
        )
    runs = []
    for choice in itertools.product(*grid.values()):
        point = dict(zip(grid, choice, strict=True))
        name = ",".join(f"{key}={plain(value)}" for key, value in point.items())
        settings = {**base, **point, "name": name}
        make_settings(settings)
        runs.append(Run(name, point, settings))
    return Experiment(
        tuple(runs),
        tuple(grid),
        measure.get("split", "test"),
        bool(measure.get("flips", False)),
        published,
    )


def run_experiment(
    experiment: Experiment,
    output: Path,
    *,
    jobs: int = 1,
    device: str = "auto",
    published: Path | None = None,
    max_minutes: float = math.inf,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Do the runs that are not done, and gather all.

    Parameters
    ----------
    experiment
        From :func:`make_experiment`.
    output
        Gets a folder ``runs`` with one folder each, ``cases.tsv`` with every run and case,
        ``results.tsv`` with means over cases and seeds, ``differences.tsv`` with the paired
        differences of the methods, and ``dice.png``.
    jobs
        Runs at a time, each in a process of its own.
    device
        ``auto``, ``cpu`` or ``cuda``.
    published
        Table of published values.
    max_minutes
        No run is begun later than this; the tables then hold the runs that are done.
    progress
        Called with a line for each run that is done.

    Returns
    -------
    list of Path
        The tables and the figure.

    Raises
    ------
    FdlError
        The first run's that failed, after all others are done; or a finished run is of other
        settings.
    """
    waiting = [run for run in experiment.runs if not _is_done(run, experiment, output)]
    if len(waiting) < len(experiment.runs):
        progress(f"{len(experiment.runs) - len(waiting)} of {len(experiment.runs)} runs were done")
    errors: list[FdlError] = []
    until = time.monotonic() + 60 * max_minutes
    for run, error in _each(waiting, experiment, output, jobs, device, until):
        progress(f"{run.name}: {'done' if error is None else error}")
        if error is not None:
            errors.append(error)
    done = [run for run in experiment.runs if _is_done(run, experiment, output)]
    if len(done) + len(errors) < len(experiment.runs):
        progress(
            f"{len(done)} of {len(experiment.runs)} runs are done;"
            " the same command goes on with the others"
        )
    paths = _write_tables(experiment, done, output, published) if done else []
    if errors:
        raise errors[0]
    return paths


def _write_tables(
    experiment: Experiment, done: Sequence[Run], output: Path, published: Path | None
) -> list[Path]:
    axes = experiment.axes
    cases = gather(done, output)
    results = aggregate(cases, axes)
    columns: tuple[str, ...] = (*_group_axes(axes), *RESULT_COLUMNS)
    if published is not None:
        add_published(results, published, experiment.published)
        columns = (*columns, *PUBLISHED_COLUMNS)
    write_tsv(output / "cases.tsv", cases, (*axes, *CASE_COLUMNS))
    write_tsv(output / "results.tsv", results, columns)
    draw_figure(results, _group_axes(axes), output / "dice.png")
    names = ["cases.tsv", "results.tsv", "dice.png"]
    if "method" in axes:
        columns = (*_group_axes(axes), "reference_method", *DIFFERENCE_COLUMNS)
        write_tsv(output / "differences.tsv", method_differences(cases, axes), columns)
        names.append("differences.tsv")
    return [output / name for name in names]


RESULT_COLUMNS = (
    "structure",
    "metric",
    "n_seeds",
    "n_cases",
    "n_participants",
    "mean",
    "lower",
    "upper",
    "sem",
    "seed_sd",
)
DIFFERENCE_COLUMNS = (
    "structure",
    "metric",
    "n_seeds",
    "n_cases",
    "n_participants",
    "difference",
    "lower",
    "upper",
    "p",
)
PUBLISHED_COLUMNS = ("published_n_train", "published", "published_lower", "published_upper")


def gather(runs: Sequence[Run], output: Path) -> list[Row]:
    """Read the measured cases of finished runs, each with its place in the grid."""
    rows: list[Row] = []
    for run in runs:
        point = {key: plain(value) for key, value in run.point.items()}
        rows += [{**point, **row} for row in read_cases(_folder(run, output) / "cases.tsv")]
    return rows


def read_cases(path: Path) -> list[Row]:
    """Read a ``cases.tsv``, with its measures as numbers and NaN for ``n/a``."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {
                key: value if key not in METRICS else math.nan if value == "n/a" else float(value)
                for key, value in row.items()
            }
            for row in csv.DictReader(file, delimiter="\t")
        ]


def aggregate(cases: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[Row]:
    """Average over seeds within each case, then over cases with an interval over participants.

    Parameters
    ----------
    cases
        From :func:`gather`.
    axes
        Settings that vary; ``seed`` is averaged over.

    Returns
    -------
    list of rows
        One for each point of the grid (seeds together), structure and measure.
    """
    group_axes = _group_axes(axes)
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in cases:
        key = (*(str(row[axis]) for axis in group_axes), row["structure"])
        groups.setdefault(key, []).append(row)
    results = []
    for key, group in groups.items():
        for metric in METRICS:
            by_case: dict[tuple[str, str], list[float]] = {}
            by_seed: dict[str, list[float]] = {}
            for row in group:
                if not math.isnan(row[metric]):
                    by_case.setdefault((row["id"], row["participant"]), []).append(row[metric])
                    by_seed.setdefault(str(row.get("seed", "")), []).append(row[metric])
            estimate = bootstrap_mean(
                [statistics.fmean(values) for values in by_case.values()],
                [participant for _, participant in by_case],
            )
            means = [statistics.fmean(values) for values in by_seed.values()]
            results.append(
                {
                    **dict(zip((*group_axes, "structure"), key, strict=True)),
                    "metric": metric,
                    "n_seeds": len({str(row.get("seed", "")) for row in group}),
                    "seed_sd": statistics.stdev(means) if len(means) > 1 else math.nan,
                    **vars(estimate),
                }
            )
    return results


def method_differences(cases: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[Row]:
    """Compare the methods with the one without a split, in pairs of case and seed.

    Parameters
    ----------
    cases
        From :func:`gather`.
    axes
        Settings that vary, ``method`` among them; ``seed`` is averaged over.

    Returns
    -------
    list of rows
        One for each other method, point of the rest of the grid, structure and measure, over the
        cases and seeds that both methods have. Without ``none`` among the methods there are none.
    """
    others = [axis for axis in axes if axis != "method"]
    reference = {
        (*(str(row[axis]) for axis in others), row["structure"], row["id"]): row
        for row in cases
        if row["method"] == "none"
    }
    groups: dict[tuple[str, ...], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    group_axes = _group_axes(axes)
    for row in cases:
        same = (*(str(row[axis]) for axis in others), row["structure"], row["id"])
        if row["method"] != "none" and same in reference:
            key = (*(str(row[axis]) for axis in group_axes), row["structure"])
            groups.setdefault(key, []).append((row, reference[same]))
    rows = []
    for key, pairs in groups.items():
        for metric in METRICS:
            by_case: dict[tuple[str, str], list[float]] = {}
            for ours, theirs in pairs:
                difference = ours[metric] - theirs[metric]
                if not math.isnan(difference):
                    by_case.setdefault((ours["id"], ours["participant"]), []).append(difference)
            estimate = bootstrap_mean(
                [statistics.fmean(values) for values in by_case.values()],
                [participant for _, participant in by_case],
            )
            rows.append(
                {
                    **dict(zip((*group_axes, "structure"), key, strict=True)),
                    "reference_method": "none",
                    "metric": metric,
                    "n_seeds": len({str(ours.get("seed", "")) for ours, _ in pairs}),
                    "difference": estimate.mean,
                    **vars(estimate),
                }
            )
    return rows


def add_published(results: Sequence[Row], table: Path, chosen: Sequence[Mapping[str, Any]]) -> None:
    """Put the published value beside each result of the same method and number of cases.

    Parameters
    ----------
    results
        From :func:`aggregate`; changed.
    table
        With the columns ``paper``, ``task``, ``n_train``, ``method``, ``metric``, ``value``,
        ``lower`` and ``upper``, and ``target`` where an entry names one. Of two values of one point
        the later one counts.
    chosen
        See :class:`Experiment`.

    Raises
    ------
    InputMissingError, DataError
        No such table, or not such a table.
    """
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        for each in chosen:
            _add_published(results, rows, each)
    except FileNotFoundError as error:
        raise InputMissingError("there is no such table", "check the path", path=table) from error
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            "this is no table of published values", "give its columns as documented", path=table
        ) from error


def _add_published(
    results: Sequence[Row], rows: Sequence[Mapping[str, str]], chosen: Mapping[str, Any]
) -> None:
    found = {
        (row["method"], row["n_train"], PUBLISHED_METRICS[row["metric"]][0]): row
        for row in rows
        if all(row[key] == chosen[key] for key in ("task", "paper", "target") if key in chosen)
        and row["metric"] in PUBLISHED_METRICS
    }
    renamed, where = chosen.get("n_train", {}), chosen.get("where", {})
    for result in results:
        n = str(renamed.get(str(result.get("n_train")), result.get("n_train")))
        row = found.get((str(result.get("method")), n, result["metric"]))
        meant = all(result.get(axis) == plain(value) for axis, value in where.items())
        if row is None or result["structure"] != MEAN or not meant:
            continue
        factor = PUBLISHED_METRICS[row["metric"]][1]
        result["published_n_train"] = n
        for ours, theirs in zip(PUBLISHED_COLUMNS[1:], ("value", "lower", "upper"), strict=True):
            result[ours] = float(row[theirs]) * factor if row[theirs] else None


def draw_figure(results: Sequence[Mapping[str, Any]], axes: Sequence[str], path: Path) -> None:
    """Draw the mean Dice over the number of training cases, with intervals, task by task.

    Parameters
    ----------
    results
        From :func:`aggregate`, with published values where :func:`add_published` found them. The
        lines have their colours and places in the order in which they are first met here.
    axes
        Settings that vary. The structures and targets are the task, with a panel for each of its
        values; any other but ``n_train`` makes a line.
    path
        PNG file.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    panels: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    names: dict[str, int] = {}
    for row in results:
        if row["metric"] == "dice" and row["structure"] == MEAN:
            task = ", ".join(row[axis] for axis in axes if axis in TASK_AXES)
            name = ", ".join(row[axis] for axis in axes if axis not in (*TASK_AXES, "n_train"))
            panels.setdefault(task, {}).setdefault(name or "model", []).append(row)
            names.setdefault(name or "model", len(names))
    panels = dict(sorted(panels.items()))
    columns = min(len(panels), 3)
    grid = (-(-len(panels) // columns), columns)
    width, height = (7, 4.5) if len(panels) == 1 else (3.6 * grid[1], 2.9 * grid[0])
    fig, plots = plt.subplots(
        *grid,
        figsize=(width, height),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for plot in plots.flat[len(panels) :]:
        plot.set_axis_off()
    for plot in plots.flat[max(len(panels) - columns, 0) : len(panels)]:
        # The lowest of its column, also where the last row is not full.
        plot.tick_params(labelbottom=True)
    for (task, lines), plot in zip(panels.items(), plots.flat, strict=False):
        plot.set_title(task, fontsize="medium")
        for name, rows in lines.items():
            _draw_line(plot, rows, name, names[name])
        if "n_train" in axes:
            plot.set_xscale("log")
            numbers = sorted({int(float(row["n_train"])) for row in results})
            plot.set_xticks(numbers, [str(n) for n in numbers])
            plot.minorticks_off()
    fig.supxlabel("training cases", fontsize="medium")
    fig.supylabel("Dice", fontsize="medium")
    keys: dict[str, Artist] = {}
    for plot in plots.flat:
        handles, labels = plot.get_legend_handles_labels()
        keys |= dict(zip(labels, handles, strict=True))
    keys = dict(sorted(keys.items(), key=lambda key: names.get(key[0], len(names))))
    fig.legend(
        handles=list(keys.values()),
        labels=list(keys),
        loc="outside right center",
        fontsize="small",
    )
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _draw_line(plot: Axes, rows: Sequence[Mapping[str, Any]], name: str, place: int) -> None:
    """Draw what one model reaches, and what is published of it."""
    rows = sorted(rows, key=lambda row: float(row.get("n_train", 0)))
    # Beside each other, so that no interval hides another.
    n = [float(row.get("n_train", 0)) * 1.03**place for row in rows]
    mean = [row["mean"] for row in rows]
    below = [row["mean"] - row["lower"] for row in rows]
    above = [row["upper"] - row["mean"] for row in rows]
    colour = f"C{place % 10}"
    plot.errorbar(
        n, mean, [below, above], marker="o", markersize=4, capsize=3, color=colour, label=name
    )
    known = [
        (x, row["published"])
        for x, row in zip(n, rows, strict=True)
        if row.get("published") is not None
    ]
    if known:
        x, y = zip(*known, strict=True)
        plot.plot(x, y, marker="x", linestyle=":", color=colour, label=f"{name} (published)")


def _each(
    waiting: Sequence[Run],
    experiment: Experiment,
    output: Path,
    jobs: int,
    device: str,
    until: float,
) -> Iterator[tuple[Run, FdlError | None]]:
    """Do the runs, beginning none after the time ``until``."""
    if jobs <= 1:
        for run in waiting:
            if time.monotonic() >= until:
                return
            yield run, _do(run, experiment, output, device, None)
        return
    threads = max(1, available_cores() // jobs)
    rest = iter(waiting)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures: dict[Future[FdlError | None], Run] = {}
        broken = False
        while True:
            while len(futures) < jobs and not broken and time.monotonic() < until:
                following = next(rest, None)
                if following is None:
                    break
                task = pool.submit(_do, following, experiment, output, device, threads)
                futures[task] = following
            if not futures:
                return
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                run = futures.pop(future)
                try:
                    yield run, future.result()
                except BrokenProcessPool:
                    broken = True
                    yield (
                        run,
                        TemporaryError(
                            "a process was killed, perhaps for want of memory",
                            "run the same command again with fewer --jobs; finished runs are kept",
                        ),
                    )


def _do(
    run: Run, experiment: Experiment, output: Path, device: str, threads: int | None
) -> FdlError | None:
    """Train and measure; an error is returned, so that the other runs go on."""
    import torch

    from fdl_bidsapp.models.bundle import load_bundle

    if threads is not None:
        torch.set_num_threads(threads)
    folder = _folder(run, output)
    try:
        settings = make_settings(run.values)
        scans = in_split(
            labelled_scans(settings), experiment.split, Path(settings.table or settings.bids_dir)
        )
        model = fit(settings, folder / "model.safetensors", device=device)
        flips = "yes" if experiment.flips else "no"
        rows = evaluate(load_bundle(model), scans, device=device, flips=flips)
        write_json(folder / "settings.json", recorded(run, experiment))
        write_tsv(folder / "cases.tsv", rows, CASE_COLUMNS)
    except FdlError as error:
        return error
    return None


def _is_done(run: Run, experiment: Experiment, output: Path) -> bool:
    folder = _folder(run, output)
    if not (folder / "cases.tsv").is_file():
        return False
    if read_record(folder / "settings.json") != recorded(run, experiment):
        raise DataError(
            "this run was done with other settings",
            "choose another output, or remove its folder to do it again",
            path=folder,
        )
    return True


def recorded(run: Run, experiment: Experiment) -> dict[str, Any]:
    """Return what a finished run was made with, as its ``settings.json`` holds it."""
    settings = {key: value for key, value in run.values.items() if key not in PATHS}
    content = {"settings": settings, "split": experiment.split, "flips": experiment.flips}
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _folder(run: Run, output: Path) -> Path:
    return output / "runs" / run.name


def _group_axes(axes: Sequence[str]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis != "seed")


def plain(value: object) -> str:
    """Write a setting for the name of a run.

    Examples
    --------
    >>> plain(["qsm", "imag"]), plain(4)
    ('qsm----imag', '4')
    """
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text).strip("-")
