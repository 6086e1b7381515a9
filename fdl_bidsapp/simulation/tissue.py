"""Susceptibility, R2* and proton density of the tissues, and how they vary between people."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

IRON_RICH = (
    "red_nucleus",
    "dentate_nucleus",
    "substantia_nigra",
    "subthalamic_nucleus",
    "globus_pallidus",
    "putamen",
    "caudate",
)


@dataclass(frozen=True)
class Tissue:
    """Properties of one tissue at 3 T.

    Attributes
    ----------
    chi
        Susceptibility in ppm, relative to CSF.
    r2star
        R2* in 1/s.
    rho
        Signal at echo time zero, CSF = 1.
    """

    chi: float
    r2star: float
    rho: float


@cache
def tissue_table() -> dict[str, dict[str, float]]:
    """Return the table of means and standard deviations, by tissue.

    Examples
    --------
    >>> tissue_table()["red_nucleus"]["chi"]
    0.102
    """
    lines = files("fdl_bidsapp.simulation").joinpath("tissue.tsv").read_text("utf-8").splitlines()
    header = lines[0].split("\t")
    table = {}
    for line in lines[1:]:
        row = dict(zip(header, line.split("\t"), strict=True))
        table[row["tissue"]] = {key: float(row[key]) for key in header[1:-1]}
    return table


@dataclass(frozen=True)
class Person:
    """Who is simulated: what moves the iron of the deep nuclei.

    Attributes
    ----------
    age
        Years.
    parkinson
        Raises iron in the substantia nigra.
    """

    age: float = 60.0
    parkinson: bool = False

    def iron(self) -> float:
        """Iron of the deep nuclei relative to a 60-year-old.

        Iron rises steeply until about 30 years and slowly afterwards (Hallgren and Sourander,
        J. Neurochem. 3 (1958) 41-51, whose exponential for the extrapyramidal nuclei this follows).
        """
        return (1 - 0.9 * float(np.exp(-0.05 * self.age))) / (1 - 0.9 * float(np.exp(-3.0)))


def draw_tissues(
    rng: np.random.Generator,
    person: Person | None = None,
    *,
    spread: float = 1.0,
    field_strength: float = 3.0,
) -> dict[str, Tissue]:
    """Draw one head's tissue properties around the table.

    Parameters
    ----------
    rng
        Source of randomness.
    person
        Age and diagnosis; 60 years and healthy by default.
    spread
        Factor on the table's standard deviations.
    field_strength
        Tesla; R2* grows linearly with it.

    Returns
    -------
    dict
        A tissue for each row of the table.

    Notes
    -----
    The iron-rich nuclei of one head share half of their variance, and in each the same deviation
    moves susceptibility and R2*, as both follow iron.
    """
    person = person or Person()
    shared = rng.standard_normal()
    tissues = {}
    for name, row in tissue_table().items():
        if name in IRON_RICH:
            iron = np.sqrt(0.5) * (shared + rng.standard_normal())
            deviation = np.array([iron, 0.8 * iron + 0.6 * rng.standard_normal()])
            level = person.iron()
            if person.parkinson and name == "substantia_nigra":
                level *= 1.35
        else:
            deviation = rng.standard_normal(2)
            level = 1.0
        deviation = np.clip(deviation * spread, -2.5 * max(spread, 1), 2.5 * max(spread, 1))
        chi = row["chi"] * level + row["chi_sd"] * deviation[0]
        # Iron adds about 12 1/s at 3 T to a red nucleus's R2* of 20 without it.
        r2star = row["r2star"] + (level - 1) * 0.4 * row["r2star"]
        r2star += row["r2star_sd"] * deviation[1]
        if name in IRON_RICH:
            chi = max(chi, 0.15 * row["chi"])
            r2star = max(r2star, 0.5 * row["r2star"])
        rho = row["rho"] * float(np.exp(0.04 * spread * rng.standard_normal()))
        tissues[name] = Tissue(float(chi), max(float(r2star), 0.5) * field_strength / 3.0, rho)
    return tissues
