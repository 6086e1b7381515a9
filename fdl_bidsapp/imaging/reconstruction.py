"""From raw multi-echo magnitude and phase to susceptibility, SWI and what goes with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.fft

from fdl_bidsapp.errors import DataError
from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.imaging.relaxometry import r2star_loglinear
from fdl_bidsapp.physics import GAMMA_BAR
from fdl_bidsapp.physics.background import LARGEST_RADIUS, SMALLEST_RADIUS, v_sharp
from fdl_bidsapp.physics.convention import phase_to_radians, sign_of_field
from fdl_bidsapp.physics.dipole import field_direction
from fdl_bidsapp.physics.inversion import thresholded_division
from fdl_bidsapp.physics.iterative import (
    nonlinear_inversion,
    penalty_of_noise,
    remaining_background,
    smooth_inversion,
    total_variation,
)
from fdl_bidsapp.physics.masking import brain_mask, reliable_phase, ventricular_fluid
from fdl_bidsapp.physics.swi import SLAB, minimum_intensity_projection, susceptibility_weighted
from fdl_bidsapp.physics.unwrapping import fit_unwrapped_field

Array = np.ndarray

INVERSIONS = {
    "tv": "total variation (ADMM)",
    "tikhonov": "Tikhonov regularisation of the gradient",
    "tkd": "thresholded k-space division",
    "ndi": "non-linear dipole inversion",
}
"""Dipole inversions by the name they have on the command line."""

SWI_PHASE_TIME = 0.060
"""Tesla seconds: B0 TE of the echo that SWI is made of, 20 ms at 3 T; the nearest is taken."""

WEAK_SIGN = 0.02
"""ppm; below it, the contrast that tells the sign of the phase may be chance."""

REFERENCES = {
    "brain": "mean over the mask",
    "csf": "mean of the cerebrospinal fluid of the ventricles",
}
"""What has susceptibility 0, by the name it has on the command line."""

LEAST_FLUID = 0.3
"""ml of cerebrospinal fluid that a reference needs."""

SMALLEST_BRAIN = 50.0
"""ml; a newborn's brain has some 300."""


@dataclass(frozen=True)
class RawEchoes:
    """Multi-echo images as acquired.

    Attributes
    ----------
    magnitude, phase
        (X, Y, Z, E) float32 arrays, in whatever unit the scanner gave.
    affine
        Voxel to scanner coordinates, mm.
    echo_times
        Seconds, increasing.
    field_strength
        Tesla.
    phase_unit
        ``Units`` of the phase's sidecar, empty if not given.
    """

    magnitude: Array
    phase: Array
    affine: Array
    echo_times: tuple[float, ...]
    field_strength: float
    phase_unit: str = ""


@dataclass(frozen=True)
class Reconstruction:
    """Maps made from raw echoes.

    Attributes
    ----------
    maps
        ``qsm`` (ppm, zero outside the mask), ``swi`` and ``mip`` (unit of the magnitude);
        (X, Y, Z) float32 arrays.
    mask : (X, Y, Z) bool array
        Where susceptibility is known.
    total_field, local_field : (X, Y, Z) float32 arrays
        ppm.
    parameters
        How the maps were made, as JSON values for their sidecars.
    notes
        What the user should know.
    """

    maps: dict[str, Array]
    mask: Array
    total_field: Array
    local_field: Array
    parameters: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Inversion = Callable[[Array, Array, Sequence[float], Array, Array, float], Array]
"""Local field (ppm), mask, voxel size (mm), field direction, weight, radians per ppm → ppm."""


def reconstruct(
    echoes: RawEchoes,
    inversion: str | Inversion = "tv",
    *,
    reference: str = "brain",
    brain: Array | None = None,
    threads: int = 1,
    device: str = "cpu",
) -> Reconstruction:
    """Make susceptibility and susceptibility-weighted maps from raw echoes.

    Parameters
    ----------
    echoes
        Magnitude and phase of one echo or more.
    inversion
        One of :data:`INVERSIONS`, or a function of local field, mask, voxel size, field direction,
        weight and radians per ppm.
    reference
        One of :data:`REFERENCES`. Where no fluid is found it is the brain, with a note.
    brain : (X, Y, Z) bool array
        Brain mask; found in the magnitude if not given.
    threads
        CPU threads of the Fourier transforms.
    device
        ``cpu`` or ``cuda``, for the iterative inversions.

    Raises
    ------
    DataError
        The phase's unit cannot be told, or there is no brain in the mask.
    """
    with scipy.fft.set_workers(threads):
        return _reconstruct(echoes, inversion, reference, brain, device)


def _reconstruct(
    echoes: RawEchoes,
    inversion: str | Inversion,
    reference: str,
    given: Array | None,
    device: str,
) -> Reconstruction:
    spacing = spacing_of(echoes.affine).tolist()
    direction = field_direction(echoes.affine)
    times, magnitude = np.asarray(echoes.echo_times), echoes.magnitude
    phase, note = phase_to_radians(echoes.phase, echoes.phase_unit)
    notes = [note] if note else []
    signal = (magnitude * np.exp(1j * phase)).astype(np.complex64)

    brain = brain_mask(magnitude.mean(-1), spacing) if given is None else given.astype(bool)
    _check_brain(brain, spacing, "the magnitude" if given is None else "the brain mask")
    followed = reliable_phase(brain, magnitude[..., -1])
    total, residual = fit_unwrapped_field(
        signal, followed, spacing, echoes.echo_times, echoes.field_strength
    )
    followed = reliable_phase(followed, magnitude[..., -1], residual)
    _check_brain(followed, spacing, "the phase that can be followed")
    local, inside = v_sharp(total, followed, spacing)
    _check_brain(inside, spacing, "the eroded mask")

    # The noise of the field is that of phase over echo time, weighted as the fit weights it.
    weight = np.sqrt((magnitude**2 * times.astype(np.float32) ** 2).sum(-1))
    decay = None if len(times) == 1 else r2star_loglinear(magnitude, echoes.echo_times)
    sign, evidence = _sign(echoes, decay, local, inside, spacing, direction)
    if abs(evidence) < WEAK_SIGN:
        sign = 1
        notes.append("the sign of the phase could not be told from iron and veins: taken as it is")
    elif sign < 0:
        notes.append("the phase was turned round: iron and veins were diamagnetic in it")
    local, total = sign * local, sign * total
    local -= remaining_background(local, inside, spacing, direction, weight=weight, device=device)

    radians_per_ppm = 2 * np.pi * GAMMA_BAR * echoes.field_strength * float(times.mean())
    invert = inversion if callable(inversion) else named_inversion(inversion, device)
    chi = invert(local, inside, spacing, direction, weight, radians_per_ppm)
    zero = inside
    if reference == "csf":
        fluid = np.zeros_like(inside)
        if decay is not None:
            fluid = ventricular_fluid(decay, inside, spacing)
        if np.count_nonzero(fluid) * np.prod(spacing) / 1000 >= LEAST_FLUID:
            zero = fluid
        else:
            reference = "brain"
            notes.append(
                "no cerebrospinal fluid was found to refer QSM to: it is referred to the brain"
            )
    chi = np.where(inside, chi - chi[zero].mean(), 0).astype(np.float32)

    late = int(np.argmin(np.abs(times * echoes.field_strength - SWI_PHASE_TIME)))
    swi = susceptibility_weighted(signal[..., late], spacing, sign)
    parameters = {
        "EchoTimes": [float(time) for time in times],
        "MagneticFieldStrength": echoes.field_strength,
        "FieldDirection": [round(float(part), 6) for part in direction],
        "PhaseScaling": note or "radians",
        "PhaseSign": sign,
        "BrainMask": "found in the magnitude" if given is None else "given",
        "Unwrapping": "path-based in space, then along the echoes",
        "BackgroundRemoval": f"V-SHARP, radii from {SMALLEST_RADIUS:g} to {LARGEST_RADIUS:g} mm; "
        "then what sources outside the mask explain beside those inside",
        "DipoleInversion": INVERSIONS[inversion] if isinstance(inversion, str) else "network",
        "SusceptibilityReference": REFERENCES[reference],
        "SWIEchoTime": float(times[late]),
        "ProjectionThickness": SLAB,
    }
    if inversion == "tv":
        parameters["TotalVariationWeight"] = float(f"{penalty_of_noise(local, inside):.3g}")
    maps = {"qsm": chi, "swi": swi, "mip": minimum_intensity_projection(swi, spacing)}
    return Reconstruction(maps, inside, total, local, parameters, tuple(notes))


def named_inversion(name: str, device: str = "cpu") -> Inversion:
    """Return one of :data:`INVERSIONS` in the form that :func:`reconstruct` uses.

    Parameters
    ----------
    name
        A key of :data:`INVERSIONS`.
    device
        ``cpu`` or ``cuda``, for the iterative ones.
    """

    def invert(
        local: Array,
        mask: Array,
        spacing: Sequence[float],
        direction: Array,
        weight: Array,
        radians_per_ppm: float,
    ) -> Array:
        if name == "tkd":
            return thresholded_division(local, mask, spacing, direction)
        if name == "tikhonov":
            return smooth_inversion(local, mask, spacing, direction, weight=weight, device=device)
        if name == "tv":
            return total_variation(local, mask, spacing, direction, weight=weight, device=device)
        return nonlinear_inversion(
            local,
            mask,
            spacing,
            direction,
            weight=weight,
            radians_per_ppm=radians_per_ppm,
            device=device,
        )

    return invert


def _sign(
    echoes: RawEchoes,
    decay: Array | None,
    local: Array,
    inside: Array,
    spacing: Sequence[float],
    direction: Array,
) -> tuple[int, float]:
    rough = thresholded_division(local, inside, spacing, direction)
    fast = -echoes.magnitude[..., 0] if decay is None else decay
    return sign_of_field(rough, fast, inside, spacing)


def _check_brain(mask: Array, spacing: Sequence[float], where: str) -> None:
    volume = float(np.count_nonzero(mask) * np.prod(spacing)) / 1000
    if volume < SMALLEST_BRAIN:
        raise DataError(
            f"no brain was found in {where} ({volume:.0f} ml)",
            "give a brain mask as _desc-brain_mask.nii.gz of this scan with --derivatives",
        )
