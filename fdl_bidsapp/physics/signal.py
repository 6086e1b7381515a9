"""The complex signal of a spoiled multi-echo gradient echo."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fdl_bidsapp.physics import GAMMA_BAR

Array = np.ndarray


def multi_echo_signal(
    proton_density: Array,
    r2star: Array,
    field: Array,
    echo_times: Sequence[float],
    field_strength: float,
    *,
    initial_phase: Array | float = 0.0,
) -> Array:
    """Return ρ exp(-R2* TE) exp(i [φ0 + 2π γ̄ B0 f TE]) at each echo.

    Parameters
    ----------
    proton_density, r2star, field : (X, Y, Z) arrays
        Signal at echo time zero (arbitrary unit), R2* in 1/s, relative field in ppm.
    echo_times
        Echo times in seconds.
    field_strength
        B0 in tesla.
    initial_phase
        Phase at echo time zero in radians.

    Returns
    -------
    (X, Y, Z, E) complex64 array
    """
    signal = np.empty((*proton_density.shape, len(echo_times)), np.complex64)
    omega = np.float32(2 * np.pi * GAMMA_BAR * field_strength) * field.astype(np.float32)
    for e, time in enumerate(echo_times):
        magnitude = proton_density * np.exp(-r2star * np.float32(time))
        phase = initial_phase + omega * np.float32(time)
        signal.real[..., e] = magnitude * np.cos(phase)
        signal.imag[..., e] = magnitude * np.sin(phase)
    return signal


def add_noise(signal: Array, sigma: float, rng: np.random.Generator) -> Array:
    """Add complex Gaussian noise of standard deviation ``sigma`` a channel."""
    noise = rng.standard_normal((*signal.shape, 2), np.float32) * np.float32(sigma)
    return signal + noise.view(np.complex64)[..., 0]
