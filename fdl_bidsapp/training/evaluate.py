"""Measure models on labelled sets, by the way that the app itself takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.errors import DataError, UsageError
from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.imaging.overlap import METRICS, agreement
from fdl_bidsapp.labels import Label
from fdl_bidsapp.models.bundle import Bundle
from fdl_bidsapp.models.inference import resolve_device
from fdl_bidsapp.pipeline import segment_canvas, to_canvas, to_native
from fdl_bidsapp.training.bootstrap import bootstrap_mean
from fdl_bidsapp.training.cases import LabelledScan, read_case

Array = np.ndarray
Row = dict[str, Any]

MEAN = "mean"
"""Name, among the structures, of the mean over them."""

CASE_COLUMNS = (
    "model",
    "id",
    "participant",
    "structure",
    *METRICS,
    "volume",
    "reference_volume",
)
SUMMARY_COLUMNS = (
    "model",
    "structure",
    "metric",
    "n_cases",
    "n_participants",
    "mean",
    "lower",
    "upper",
    "sem",
)
DIFFERENCE_COLUMNS = (
    "model",
    "reference_model",
    "structure",
    "metric",
    "n_cases",
    "n_participants",
    "difference",
    "lower",
    "upper",
    "p",
)


def evaluate(
    bundle: Bundle,
    scans: Sequence[LabelledScan],
    *,
    target: str | None = None,
    device: str = "auto",
    flips: str = "auto",
    reference_labels: Sequence[Label] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Segment labelled scans and compare with their label maps on the native grid.

    Parameters
    ----------
    bundle
        The model.
    scans
        What to segment.
    target
        The contrast to segment; ``None`` for the first of the model's that a scan has.
    device
        ``auto``, ``cpu`` or ``cuda``.
    flips
        Whether to average over left-right mirrored input: ``yes``, ``no``, or ``auto`` for the
        model's own way.
    reference_labels
        The label maps' table; structures are matched by abbreviation. Without it, by index.
    progress
        Called with the id of each scan when it is done.

    Returns
    -------
    list of rows
        One for each case and structure, and one for the mean over the structures.

    Raises
    ------
    FdlError
        A case cannot be read, or the table lacks a structure of the model.
    """
    indices = _reference_indices(bundle.spec.labels, reference_labels)
    targets = (target,) if target else bundle.spec.contrasts
    others = tuple(bundle.spec.intensity) if bundle.spec.method == "multimodal" else ()
    where = resolve_device(device)
    network = bundle.network(where)
    rows = []
    for one in scans:
        images, labels = read_case(one, targets, others)
        probabilities, affine = segment_canvas(
            to_canvas(images, bundle.spec), bundle, network, where, flips=flips
        )
        found = to_native(probabilities, affine, images, bundle.spec).labels
        spacing = spacing_of(images.affine)
        scored = [
            (label.abbreviation, found == label.index, labels == index)
            for label, index in zip(bundle.spec.labels, indices, strict=True)
        ]
        rows += _case_rows(bundle.spec.name, one, scored, spacing)
        progress(one.name)
    return rows


def summarise(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return mean, interval and standard error for each model, structure and measure."""
    summary = []
    for (model, structure), group in _grouped(rows).items():
        for metric in METRICS:
            estimate = bootstrap_mean(
                [row[metric] for row in group], [row["participant"] for row in group]
            )
            summary.append(
                {"model": model, "structure": structure, "metric": metric, **vars(estimate)}
            )
    return summary


def compare(rows: Iterable[Mapping[str, Any]], model: str, reference: str) -> list[Row]:
    """Return the paired differences of one model and another, on the cases that both have.

    Raises
    ------
    UsageError
        They share no case.
    """
    groups = _grouped(rows)
    differences = []
    for structure in dict.fromkeys(structure for _, structure in groups):
        ours = {row["id"]: row for row in groups.get((model, structure), [])}
        theirs = {row["id"]: row for row in groups.get((reference, structure), [])}
        shared = [name for name in ours if name in theirs]
        for metric in METRICS if shared else ():
            estimate = bootstrap_mean(
                [ours[name][metric] - theirs[name][metric] for name in shared],
                [ours[name]["participant"] for name in shared],
            )
            differences.append(
                {
                    "model": model,
                    "reference_model": reference,
                    "structure": structure,
                    "metric": metric,
                    "difference": estimate.mean,
                    **vars(estimate),
                }
            )
    if not differences:
        raise UsageError(
            f"the models {model} and {reference} share no case and structure",
            "evaluate models of the same structures together",
        )
    return differences


def write_evaluation(rows: Sequence[Row], models: Sequence[str], folder: Path) -> list[Path]:
    """Write ``cases.tsv``, ``summary.tsv`` and, for several models, ``differences.tsv``.

    Differences are those of each model and the one before it.

    Returns
    -------
    list of Path
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[str, tuple[Sequence[Row], Sequence[str]]] = {
        "cases.tsv": (rows, CASE_COLUMNS),
        "summary.tsv": (summarise(rows), SUMMARY_COLUMNS),
    }
    if len(models) > 1:
        differences = [
            row for first, second in pairwise(models) for row in compare(rows, second, first)
        ]
        tables["differences.tsv"] = (differences, DIFFERENCE_COLUMNS)
    for name, (content, columns) in tables.items():
        write_tsv(folder / name, content, columns)
    return [folder / name for name in tables]


def _reference_indices(labels: Sequence[Label], reference: Sequence[Label]) -> list[int]:
    if not reference:
        return [label.index for label in labels]
    table = {label.abbreviation: label.index for label in reference}
    missing = [label.abbreviation for label in labels if label.abbreviation not in table]
    if missing:
        raise DataError(
            f"the label table lacks {', '.join(missing)}, which the model segments",
            "give the table of the label maps, with the model's abbreviations",
        )
    return [table[label.abbreviation] for label in labels]


def _case_rows(
    model: str,
    one: LabelledScan,
    scored: Sequence[tuple[str, Array, Array]],
    spacing: Array,
) -> list[Row]:
    voxel = float(np.prod(spacing))
    size = [float(length) for length in spacing]
    rows: list[Row] = []
    for structure, found, true in scored:
        rows.append(
            {
                "structure": structure,
                **agreement(found, true, size),
                "volume": np.count_nonzero(found) * voxel,
                "reference_volume": np.count_nonzero(true) * voxel,
            }
        )
    columns = (*METRICS, "volume", "reference_volume")
    means = {column: _mean([row[column] for row in rows]) for column in columns}
    head = {"model": model, "id": one.name, "participant": one.participant}
    return [{**head, **row} for row in (*rows, {"structure": MEAN, **means})]


def _mean(values: Sequence[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


def _grouped(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["structure"]), []).append(row)
    return groups
