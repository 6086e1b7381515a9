"""The effects of the simulator: their values, how they are drawn, and their table for the docs."""

from __future__ import annotations

import difflib
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from fdl_bidsapp.errors import UsageError

Value = float | int | str
Values = dict[str, Value]

PROFILES = ("ordinary", "full")
LEVELS = ("mild", "middle", "harsh")
DIAGNOSES = "diagnosis"
"""The table of the file that holds no effects but factors on iron."""


@dataclass(frozen=True)
class Effect:
    """One named effect, as the file of parameters describes it.

    Attributes
    ----------
    name, group
        Its name, and the part of the simulation that it belongs to.
    text, unit, source
        What it is, in which unit, where its values come from.
    draw
        ``uniform``, ``log-uniform``, ``skewed``, ``integer`` or ``choice``.
    ordinary, full
        Ends of the range, or the values to choose among, of the two profiles.
    levels
        Its mild, middle and harsh value.
    off
        The value at which it is absent.
    chance
        How often it is present at all, in the two profiles.
    """

    name: str
    group: str
    text: str
    unit: str
    draw: str
    ordinary: tuple[Value, ...]
    full: tuple[Value, ...]
    levels: tuple[Value, ...]
    off: Value
    source: str
    chance: tuple[float, float] = (1.0, 1.0)

    def drawn(self, rng: np.random.Generator, profile: str) -> Value:
        """Draw a value of a profile."""
        values = self.full if profile == "full" else self.ordinary
        present = rng.random() < self.chance[PROFILES.index(profile)]
        if self.draw == "choice":
            value: Value = values[int(rng.integers(len(values)))]
        elif self.draw == "integer":
            value = int(rng.integers(int(values[0]), int(values[1]) + 1))
        elif self.draw == "log-uniform":
            value = float(np.exp(rng.uniform(np.log(float(values[0])), np.log(float(values[1])))))
        else:
            share = rng.random() ** (2 if self.draw == "skewed" else 1)
            value = float(values[0]) + share * (float(values[1]) - float(values[0]))
        return value if present else self.off

    def understood(self, text: Value) -> Value:
        """Turn a level's name, a number or a choice into a value of this effect.

        Raises
        ------
        UsageError
            It is none of them.
        """
        if text in LEVELS:
            return self.levels[LEVELS.index(str(text))]
        if text == "off":
            return self.off
        try:
            if isinstance(self.off, str):
                if text in {*self.full, *self.ordinary}:
                    return text
            elif isinstance(self.off, int):
                return int(text)
            elif np.isfinite(float(text)):
                return float(text)
        except ValueError:
            pass
        known = sorted({str(v) for v in self.full}) if isinstance(self.off, str) else ["a number"]
        raise UsageError(
            f"the effect {self.name} cannot be {text!r}",
            f"give {', '.join(known)}, or one of off, {', '.join(LEVELS)}",
        )


@cache
def _file() -> dict[str, Any]:
    path = files("fdl_bidsapp.simulation").joinpath("parameters.toml")
    return tomllib.loads(path.read_text("utf-8"))


@cache
def effects() -> dict[str, Effect]:
    """Return all effects by name, in the order of the file.

    Examples
    --------
    >>> effects()["snr"].levels
    (40.0, 22.0, 12.0)
    """

    def fields(row: dict[str, Any]) -> dict[str, Any]:
        return {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}

    return {
        name: Effect(name, group, **fields(row))
        for group, rows in _file().items()
        if group != DIAGNOSES
        for name, row in rows.items()
    }


def iron_of(diagnosis: str) -> dict[str, float]:
    """Return the factors on iron that a diagnosis brings, by structure.

    Examples
    --------
    >>> iron_of("control"), iron_of("parkinson")
    ({}, {'substantia_nigra': 1.4})
    """
    rows = _file()[DIAGNOSES].get(diagnosis, {})
    return {structure: factor for structure, factor in rows.items() if structure != "source"}


def generator(seed: Sequence[int] | int, name: str) -> np.random.Generator:
    """Return the source of randomness that a seed has for one purpose.

    Purposes do not disturb each other: an effect that is switched off, or a new one, leaves the
    random numbers of all others as they are.
    """
    parts = [seed] if isinstance(seed, int) else list(seed)
    return np.random.default_rng([*parts, zlib.crc32(name.encode())])


def draw_values(
    seed: Sequence[int] | int,
    profile: str = "full",
    forced: Mapping[str, Value] | None = None,
) -> Values:
    """Draw the value of every effect.

    Parameters
    ----------
    seed
        One whole number or several; the same give the same values.
    profile
        ``ordinary`` or ``full``.
    forced
        Values to use instead, by effect: a number, a choice, ``off``, ``mild``, ``middle`` or
        ``harsh``. The others are drawn as if nothing had been forced.

    Returns
    -------
    dict
        A value for each effect.

    Raises
    ------
    UsageError
        No such profile or effect, or no such value of it.

    Examples
    --------
    >>> draw_values(7, "ordinary", {"snr": "harsh"})["snr"]
    12.0
    """
    if profile not in PROFILES:
        raise UsageError(f"there is no profile {profile!r}", f"choose {' or '.join(PROFILES)}")
    values = {
        name: effect.drawn(generator(seed, f"value of {name}"), profile)
        for name, effect in effects().items()
    }
    return values | understood(forced or {})


def all_off(forced: Mapping[str, Value] | None = None) -> Values:
    """Return every effect switched off but those that are forced.

    Examples
    --------
    >>> all_off({"bias": 0.3})["bias"], all_off()["head_rotation"]
    (0.3, 0.0)
    """
    return {name: effect.off for name, effect in effects().items()} | understood(forced or {})


def understood(forced: Mapping[str, Value]) -> Values:
    """Check values that a user asks for, and turn the names of levels into numbers.

    Raises
    ------
    UsageError
        No such effect, or no such value of it.
    """
    known = effects()
    result: Values = {}
    for name, text in forced.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"{near[0]} is meant, or see" if near else "see"
            raise UsageError(f"there is no effect {name!r}", f"{hint} fdl simulate --describe")
        result[name] = known[name].understood(text)
    return result


def table() -> str:
    """Write all effects as Markdown tables, for the documentation."""
    lines = []
    for group in dict.fromkeys(effect.group for effect in effects().values()):
        lines += [
            f"### {group.capitalize()}",
            "",
            "| effect | what it is | unit | ordinary | full range | mild, middle, harsh | source |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for effect in effects().values():
            if effect.group == group:
                ranges = [
                    _range(effect, values, chance)
                    for values, chance in zip(
                        (effect.ordinary, effect.full), effect.chance, strict=True
                    )
                ]
                cells = [
                    f"`{effect.name}`",
                    effect.text,
                    effect.unit,
                    *ranges,
                    ", ".join(_number(v) for v in effect.levels),
                    effect.source,
                ]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "### Diagnoses",
        "",
        "| diagnosis | factor on iron | structures found raised by |",
        "| --- | --- | --- |",
    ]
    for name, row in _file()[DIAGNOSES].items():
        factors = ", ".join(f"{s.replace('_', ' ')} {f:g}" for s, f in iron_of(name).items())
        lines.append(f"| `{name}` | {factors} | {row['source']} |")
    return "\n".join(lines) + "\n"


def _number(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _range(effect: Effect, values: Sequence[Value], chance: float) -> str:
    if chance == 0:
        return f"{_number(effect.off)}"
    if effect.draw == "choice":
        counts = {value: values.count(value) for value in dict.fromkeys(values)}
        text = ", ".join(_number(v) + (f" ({n}×)" if n > 1 else "") for v, n in counts.items())
    elif values[0] == values[1]:
        text = _number(values[0])
    else:
        text = f"{_number(values[0])} to {_number(values[1])}"
    return text if chance == 1 else f"{text} in {100 * chance:g} %"
