"""From a head to its multi-echo images and to the maps that a site would compute from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.ndimage as ndi

from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.imaging.relaxometry import mean_magnitude, r2star_loglinear
from fdl_bidsapp.physics import GAMMA_BAR
from fdl_bidsapp.physics.dipole import field_direction, field_from_susceptibility
from fdl_bidsapp.physics.inversion import thresholded_division, tikhonov
from fdl_bidsapp.physics.phase import fit_field, high_pass_phase, remove_background
from fdl_bidsapp.physics.signal import add_noise, multi_echo_signal
from fdl_bidsapp.simulation.geometry import smooth_noise
from fdl_bidsapp.simulation.head import Head
from fdl_bidsapp.simulation.tissue import Tissue

Array = np.ndarray

SWI_ECHO_TIME = 0.020
"""Seconds; the nearest echo is taken."""

LASTING_SIGNAL = 0.3
"""Share of the brain's median signal at the last echo below which phase is not trusted."""


@dataclass(frozen=True)
class Protocol:
    """How a head is scanned and its maps are made.

    Attributes
    ----------
    echo_times
        Seconds.
    field_strength
        Tesla.
    snr
        White-matter signal at the first echo over the noise of one channel.
    bias
        Relative standard deviation of the receive sensitivity.
    texture
        Factor on the tissues' inner variation.
    inversion
        ``tikhonov`` or ``thresholded_division``.
    """

    echo_times: tuple[float, ...] = (0.004, 0.010, 0.016, 0.022, 0.028)
    field_strength: float = 3.0
    snr: float = 60.0
    bias: float = 0.15
    texture: float = 1.0
    inversion: Literal["tikhonov", "thresholded_division"] = "tikhonov"

    @property
    def swi_echo(self) -> int:
        """Position of the echo that the susceptibility-weighted image is made of."""
        return int(np.argmin(np.abs(np.array(self.echo_times) - SWI_ECHO_TIME)))


def susceptibility_map(
    head: Head, tissues: dict[str, Tissue], rng: np.random.Generator, texture: float = 1.0
) -> Array:
    """Return the head's susceptibility in ppm, air being 9.4 ppm above tissue."""
    return _mixture(head, tissues, "chi") + _texture(head, rng, 0.006 * texture)


def _mixture(head: Head, tissues: dict[str, Tissue], name: str) -> Array:
    total = np.zeros(head.labels.shape, np.float32)
    for tissue, weight in head.weights.items():
        total += weight * np.float32(getattr(tissues[tissue], name))
    return total


def _texture(head: Head, rng: np.random.Generator, amplitude: float) -> Array:
    """Inner variation of tissue: fine grain, and slow gradients through each region."""
    fine = ndi.gaussian_filter(rng.standard_normal(head.labels.shape, np.float32), 0.8)
    fine /= fine.std()
    slow = smooth_noise(rng, head.labels.shape, head.spacing, 20)
    return np.float32(amplitude) * (0.7 * fine + 0.7 * slow) * head.brain


def simulate_signal(
    head: Head,
    tissues: dict[str, Tissue],
    affine: Array,
    protocol: Protocol,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """Simulate the complex multi-echo image of a head.

    Parameters
    ----------
    head, tissues
        Anatomy and its properties.
    affine : (4, 4) array
        Voxel to scanner coordinates; its third row says where B0 points.
    protocol
        Echo times, field strength, noise.
    rng
        Source of randomness.

    Returns
    -------
    signal : (X, Y, Z, E) complex64 array
    susceptibility : (X, Y, Z) float32 array
        The true map in ppm.
    """
    chi = susceptibility_map(head, tissues, rng, protocol.texture)
    field = field_from_susceptibility(
        chi, head.spacing, field_direction(affine), outside=tissues["air"].chi
    )
    # A shim takes the mean field out of the brain.
    field -= np.float32(np.median(field[head.brain]))
    r2star = _mixture(head, tissues, "r2star") * (1 + _texture(head, rng, 0.06 * protocol.texture))
    # Spins across a voxel lose phase where the field is steep.
    gradient = np.sqrt(sum(g**2 for g in np.gradient(field)))
    r2star += np.float32(0.3 * 2 * np.pi * GAMMA_BAR * protocol.field_strength) * gradient
    rho = _mixture(head, tissues, "rho") * (1 + _texture(head, rng, 0.03 * protocol.texture))
    sensitivity = np.exp(protocol.bias * smooth_noise(rng, rho.shape, head.spacing, 90))
    phase0 = np.pi * smooth_noise(rng, rho.shape, head.spacing, 120)
    signal = multi_echo_signal(
        np.maximum(rho, 0) * sensitivity,
        np.maximum(r2star, 0.5),
        field,
        protocol.echo_times,
        protocol.field_strength,
        initial_phase=phase0.astype(np.float32),
    )
    return add_noise(signal, 0.65 / protocol.snr, rng), chi


def compute_maps(
    signal: Array, brain: Array, affine: Array, protocol: Protocol
) -> dict[str, Array]:
    """Compute the four contrasts as a site would.

    Parameters
    ----------
    signal : (X, Y, Z, E) complex array
        Multi-echo image.
    brain : (X, Y, Z) bool array
        Mask for the field and susceptibility.
    affine : (4, 4) array
        Voxel to scanner coordinates.
    protocol
        Echo times, field strength, inversion.

    Returns
    -------
    dict
        ``qsm`` (ppm, zero outside the mask), ``r2star`` (1/s), ``imag`` and ``swi`` (arbitrary),
        each (X, Y, Z) float32.

    Notes
    -----
    SWI: magnitude of a late echo times the fourth power of a mask that falls from 1 at zero
    phase to 0 at the paramagnetic extreme (Haacke et al., Magn. Reson. Med. 52 (2004) 612-618).
    """
    spacing = spacing_of(affine).tolist()
    magnitude = np.abs(signal)
    mask = trusted_phase(magnitude[..., -1], brain)
    field = fit_field(signal, mask, spacing, protocol.echo_times, protocol.field_strength)
    local, inside = remove_background(field, mask, spacing)
    invert = tikhonov if protocol.inversion == "tikhonov" else thresholded_division
    chi = invert(local, inside, spacing, field_direction(affine))
    chi -= np.where(inside, chi[inside].mean(), 0).astype(np.float32)
    late = protocol.swi_echo
    phase = high_pass_phase(signal[..., late], spacing)
    phase_mask = np.clip(1 - np.maximum(phase, 0) / np.pi, 0, 1)
    return {
        "qsm": chi,
        "r2star": np.clip(r2star_loglinear(magnitude, protocol.echo_times), 0, 400),
        "imag": mean_magnitude(magnitude),
        "swi": (magnitude[..., late] * phase_mask**4).astype(np.float32),
    }


def trusted_phase(late_magnitude: Array, brain: Array) -> Array:
    """Leave out of a brain mask what lies so near to air that its phase cannot be followed.

    Parameters
    ----------
    late_magnitude : (X, Y, Z) array
        Magnitude of the last echo, arbitrary unit.
    brain : (X, Y, Z) bool array

    Returns
    -------
    (X, Y, Z) bool array
        The largest connected part of the brain whose signal lasts, with its holes filled; the whole
        brain if it lasts nowhere.
    """
    typical = np.median(late_magnitude[brain])
    lasting = brain & (ndi.uniform_filter(late_magnitude, 3) > LASTING_SIGNAL * typical)
    parts, n = ndi.label(ndi.binary_opening(lasting))
    if n == 0:
        return brain
    largest = 1 + np.argmax(np.bincount(parts.ravel())[1:])
    return ndi.binary_fill_holes(parts == largest)
