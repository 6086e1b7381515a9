"""The label table: the one source of structure indices, names, abbreviations and colours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

COLUMNS = ("index", "name", "abbreviation", "structure", "hemisphere", "mapping", "color")


@dataclass(frozen=True)
class Label:
    """One row of a segmentation's label table.

    Attributes
    ----------
    index
        Value in the label map; 0 is background and never listed.
    name
        Full name with its side, e.g. ``Red nucleus left``.
    abbreviation
        BIDS ``label-`` value, e.g. ``RNL``.
    structure
        Side-less name, e.g. ``red_nucleus``.
    hemisphere
        ``L``, ``R`` or ``n/a``.
    mapping
        Index in the BIDS standard label table; ``None`` where it has none.
    color
        ``#rrggbb``.
    """

    index: int
    name: str
    abbreviation: str
    structure: str
    hemisphere: str
    mapping: int | None
    color: str


@cache
def nuclei() -> tuple[Label, ...]:
    """Return the eight deep nuclei in the order of their indices.

    Examples
    --------
    >>> [label.abbreviation for label in nuclei()]
    ['RNL', 'RNR', 'DNL', 'DNR', 'SNL', 'SNR', 'STNL', 'STNR']
    """
    lines = files("fdl_bidsapp").joinpath("labels.tsv").read_text("utf-8").splitlines()
    rows = [dict(zip(COLUMNS, line.split("\t"), strict=True)) for line in lines[1:]]
    return tuple(label_from_row(row) for row in rows)


def label_from_row(row: dict[str, str]) -> Label:
    """Make a label from one table row of strings.

    Raises
    ------
    KeyError, ValueError
        A column is missing, or ``index`` is not a whole number.
    """
    mapping = row.get("mapping", "n/a")
    return Label(
        index=int(row["index"]),
        name=row["name"],
        abbreviation=row["abbreviation"],
        structure=row["structure"],
        hemisphere=row["hemisphere"],
        mapping=None if mapping in ("", "n/a") else int(mapping),
        color=row["color"],
    )


def by_abbreviation(abbreviations: Iterable[str]) -> tuple[Label, ...]:
    """Pick nuclei by abbreviation, in the order asked for.

    Raises
    ------
    KeyError
        The table has no such abbreviation.

    Examples
    --------
    >>> [label.index for label in by_abbreviation(["DNR", "RNL"])]
    [4, 1]
    """
    table = {label.abbreviation: label for label in nuclei()}
    return tuple(table[abbreviation] for abbreviation in abbreviations)


def mirrored(labels: tuple[Label, ...]) -> tuple[int, ...]:
    """Return, for each label, the position of its partner on the other side (itself if none).

    Examples
    --------
    >>> mirrored(nuclei()[:4])
    (1, 0, 3, 2)
    """
    other = {"L": "R", "R": "L"}
    position = {(label.structure, label.hemisphere): i for i, label in enumerate(labels)}
    return tuple(
        position.get((label.structure, other.get(label.hemisphere, "")), i)
        for i, label in enumerate(labels)
    )


def may_flip(labels: tuple[Label, ...]) -> bool:
    """Tell whether a mirrored scan is a valid one: every sided structure has its partner.

    Examples
    --------
    >>> may_flip(by_abbreviation(["RNL", "RNR"])), may_flip(by_abbreviation(["RNL"]))
    (True, False)
    """
    return all(
        label.hemisphere not in ("L", "R") or partner != i
        for i, (label, partner) in enumerate(zip(labels, mirrored(labels), strict=True))
    )
