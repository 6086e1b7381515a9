"""Tissue properties of a label map's head, at the scan's field strength and timing."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from fdl_bidsapp.simulation.parameters import Values, generator, iron_of
from fdl_bidsapp.simulation.tissue import IRON_RICH, Person, Tissue, tissue_table

MYELINATED = ("white_matter", "cerebellar_white_matter", "brainstem", "cerebral_peduncle")
GREY = ("cortical_grey", "cerebellar_cortex", "thalamus")

FAMILIES = {
    **dict.fromkeys(IRON_RICH, ("iron", 0.5)),
    **dict.fromkeys(MYELINATED, ("myelin", 0.8)),
    **dict.fromkeys(GREY, ("grey matter", 0.6)),
}
"""What tissues of a kind share, and how much of their variance."""


@cache
def label_map_table() -> dict[str, Any]:
    """Return what the package knows of label maps: tissue by structure, further tissues, T1."""
    path = files("fdl_bidsapp.simulation").joinpath("labelmap.toml")
    return tomllib.loads(path.read_text("utf-8"))


@cache
def all_tissues() -> dict[str, dict[str, float]]:
    """Return the tissue table with the tissues that only label maps have.

    Examples
    --------
    >>> "white_matter_lesion" in all_tissues()
    True
    """
    return tissue_table() | label_map_table()["tissue"]


def draw_properties(seed: Sequence[int] | int, values: Values) -> dict[str, Tissue]:
    """Draw the tissues of one head.

    Parameters
    ----------
    seed
        The same gives the same head.
    values
        Value of each effect, as :func:`~fdl_bidsapp.simulation.parameters.draw_values` gives them.

    Returns
    -------
    dict
        Susceptibility (ppm), R2* (1/s) at the scan's field strength, and the signal of the spoiled
        steady state at echo time zero (white matter of the table at a small angle: 0.70).

    Notes
    -----
    The iron-rich nuclei of one head share half of their variance, and in each the same deviation
    moves susceptibility and R2*, as both follow iron; tissues of white matter share four fifths,
    those of grey matter three fifths. Iron moves R2* by 0.4 of its share, since a
    red nucleus without iron would decay at about 20 1/s. R2* grows linearly with field strength but
    for a constant share. T1 grows with the third root of field strength (Bottomley et al., Med.
    Phys. 11 (1984) 425-448). Myelin's share of R2* and susceptibility matures over the first years.
    """
    p = values
    spread = float(p["spread"])
    iron = Person(age=float(p["age"])).iron() * float(p["iron"])
    raised = iron_of(str(p["diagnosis"]))
    myelin = 1 - 0.35 * np.exp(-float(p["age"]) / 3)
    field = float(p["field_strength"])
    decay = float(p["static_decay"]) + (1 - float(p["static_decay"])) * field / 3
    tissues = {}
    for name, row in all_tissues().items():
        rng = generator(seed, f"tissue {name}")
        family, share = FAMILIES.get(name, (name, 0.0))
        deviation = np.sqrt(1 - share) * rng.standard_normal(3)
        deviation += np.sqrt(share) * generator(seed, family).standard_normal(3)
        level = 1.0
        if name in IRON_RICH:
            level = iron * raised.get(name, 1.0)
            deviation[1] = 0.8 * deviation[0] + 0.6 * deviation[1]
        first, second, density = np.clip(deviation, -2.5, 2.5)
        chi = row["chi"] * level + row["chi_sd"] * spread * first
        r2star = row["r2star"] * (1 + 0.4 * (level - 1)) + row["r2star_sd"] * spread * second
        if name in IRON_RICH:
            chi = max(chi, 0.1 * row["chi"])
        if name in MYELINATED:
            chi, r2star = chi * myelin, r2star * myelin
        rho = row["rho"] * np.exp(float(p["proton_density"]) * density)
        weight = steady_state(
            label_map_table()["t1"][name] * (field / 3) ** (1 / 3),
            max(float(p["repetition_time"]), echo_times(p)[-1] + 0.005),
            float(p["flip_angle"]),
        )
        tissues[name] = Tissue(float(chi), max(float(r2star), 0.5) * decay, float(rho * weight))
    return tissues


def steady_state(t1: float, repetition_time: float, flip_angle: float) -> float:
    """Return the signal of a spoiled gradient echo relative to a fully relaxed one.

    It is divided by the sine of the angle, so that a small angle gives one.

    Parameters
    ----------
    t1, repetition_time
        Seconds.
    flip_angle
        Degrees.

    Examples
    --------
    >>> round(steady_state(1.0, 5.0, 1.0), 2), round(steady_state(4.0, 0.04, 20.0), 2)
    (1.0, 0.14)
    """
    e1 = np.exp(-repetition_time / t1)
    return float((1 - e1) / (1 - e1 * np.cos(np.deg2rad(flip_angle))))


def echo_times(values: Values) -> tuple[float, ...]:
    """Return the echo times in seconds: evenly spaced, shorter at high field.

    Examples
    --------
    >>> from fdl_bidsapp.simulation.parameters import all_off
    >>> len(echo_times(all_off())), round(echo_times(all_off())[-1], 3)
    (12, 0.037)
    """
    times = np.linspace(
        float(values["first_echo"]), float(values["last_echo"]), int(values["echoes"])
    )
    return tuple(float(t) for t in times * field_factor(values))


def field_factor(values: Values) -> float:
    """Return by how much the scan's echo times differ from those at 3 T."""
    return float(np.sqrt(3 / float(values["field_strength"])))
