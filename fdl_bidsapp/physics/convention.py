"""What the numbers of a phase image mean: their unit, and the sign of the field."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.ndimage as ndi

from fdl_bidsapp.errors import DataError

Array = np.ndarray

TOLERANCE = 0.01
"""Share of a turn by which rounding may carry phase beyond its range."""

FULL = 0.9
"""Share of a turn that phase has to fill to be believed to be in radians without being told so."""

OUTER_BAND = 1 / 32
"""Width of the outermost bands of the range, as a share of it."""

OUTER_SHARE = 0.002
"""Least share of voxels in either band of wrapped phase, of which some is everywhere."""

DEEP = 0.2
"""Share of a mask that counts as its depth: in an adult all 15 mm and more below its surface."""

LONGEST_RADIANS = 1000.0
"""Wider ranges are no radians, whatever a sidecar says."""


def phase_to_radians(phase: Array, unit: str = "") -> tuple[Array, str]:
    """Bring phase to radians, whatever the scanner or converter stored.

    Parameters
    ----------
    phase : (...) array
        All echoes of one scan together, as they share one scale.
    unit
        ``Units`` of the sidecar: ``rad``, ``arbitrary``, or empty where it is not given.

    Returns
    -------
    phase : (...) float32 array
        Radians, up to a constant and to whole turns.
    note : str
        What was done; empty where the phase was wrapped and in radians.

    Raises
    ------
    DataError
        There is no phase in it, or its unit cannot be told.

    Notes
    -----
    Vendors and converters write one turn as -π to π, 0 to 4095, -4096 to 4095, -3142 to 3142, or
    as any of these times the slope of the header. Wrapped phase gives its scale away: its range is
    one turn, and both ends of it are populated. Phase that is in radians and wider than a turn is
    unwrapped already, which does no harm, as only its sine and cosine are used.

    Examples
    --------
    >>> stored = np.linspace(0, 4095, 1000)
    >>> radians, note = phase_to_radians(stored)
    >>> round(float(np.ptp(radians)), 3)
    6.283
    """
    values = phase[np.isfinite(phase)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    span, turn = high - low, 2 * np.pi
    slack = TOLERANCE * turn
    if span == 0:
        raise DataError("the phase is the same everywhere", "give the phase as it was exported")
    in_one_turn = (low >= -np.pi - slack and high <= np.pi + slack) or (
        low >= -slack and high <= turn + slack
    )
    told = unit.lower().startswith("rad") and span <= LONGEST_RADIANS
    radians = np.nan_to_num(phase, nan=0.0, posinf=0.0, neginf=0.0).astype(np.float32)
    if in_one_turn and (told or span > FULL * turn):
        return radians, ""
    if told:
        return radians, "the phase was unwrapped already"
    # What lies outside the head is often filled with one value.
    filled = values[(values != 0) & (values != low)]
    outer = OUTER_BAND * span
    if filled.size and all(
        np.mean(end) >= OUTER_SHARE for end in (filled < low + outer, filled > high - outer)
    ):
        note = f"phase from {low:g} to {high:g} was scaled so that its range is one turn"
        return radians * np.float32(turn / span), note
    raise DataError(
        f"the unit of the phase cannot be told: it reaches from {low:g} to {high:g}, and its ends "
        "are not those of wrapped phase",
        'give "Units": "rad" in its JSON sidecar if it is in radians',
    )


def sign_of_field(
    susceptibility: Array, r2star: Array, mask: Array, spacing: Sequence[float]
) -> tuple[int, float]:
    """Tell from a first susceptibility map whether the field has to be turned round.

    Parameters
    ----------
    susceptibility, r2star : (X, Y, Z) arrays
        ppm and 1/s.
    mask : (X, Y, Z) bool array
        Where both are known.
    spacing
        Voxel size in mm.

    Returns
    -------
    sign : int
        1 where the map's sign is right, -1 where it is not.
    contrast : float
        Susceptibility of the voxels of fastest decay above that of the others, ppm, in the depth of
        the mask; its absolute value is the evidence.

    Notes
    -----
    Vendors differ in the sense in which phase turns. Iron and deoxygenated blood decide: where
    R2* is highest they are what the brain holds, and both are paramagnetic. Only the deepest part
    of the mask is asked: near its surface signal decays fast for other reasons, and what is left of
    the background's field, which has either sign, is larger than iron's.
    """
    depth = ndi.distance_transform_edt(np.pad(mask, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    deep = mask & (depth >= np.quantile(depth[mask], 1 - DEEP))
    fast = deep & (r2star > np.percentile(r2star[deep], 98))
    if not fast.any():
        return 1, 0.0
    contrast = float(susceptibility[fast].mean() - np.median(susceptibility[deep]))
    return (-1 if contrast < 0 else 1), contrast
