"""The four contrasts as sites make them: from the echoes, or by a short cut from the tissue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fdl_bidsapp.imaging.relaxometry import mean_magnitude, r2star_arlo, r2star_loglinear
from fdl_bidsapp.physics import GAMMA_BAR
from fdl_bidsapp.physics.background import project_onto_dipoles, v_sharp
from fdl_bidsapp.physics.dipole import dipole_kernel, padded_shape
from fdl_bidsapp.physics.forward import average_slices, dipole_field, smooth
from fdl_bidsapp.physics.inversion import thresholded_division, tikhonov
from fdl_bidsapp.physics.iterative import nonlinear_inversion, total_variation
from fdl_bidsapp.physics.phase import fit_field, high_pass_phase
from fdl_bidsapp.physics.unwrapping import fit_unwrapped_field
from fdl_bidsapp.simulation.acquisition import ScanGrid, noise_level, sensitivity
from fdl_bidsapp.simulation.anatomy import Body, smooth_field
from fdl_bidsapp.simulation.contrast import trusted_phase
from fdl_bidsapp.simulation.parameters import Values, generator
from fdl_bidsapp.simulation.physiology import echo_times, field_factor
from fdl_bidsapp.simulation.tissue import Tissue

Array = np.ndarray
Tensor = torch.Tensor

FASTEST = 400.0
"""1/s: R2* maps are cut here, as sites do."""


def strength_of(inversion: str, regularisation: float) -> float:
    """Return what the strength from 0 to 1 means for an inversion.

    Examples
    --------
    >>> round(strength_of("thresholded_division", 0.5), 2)
    0.13
    """
    low, high = {
        "thresholded_division": (0.06, 0.28),
        "tikhonov": (0.002, 0.06),
        "total_variation": (5e-5, 3e-3),
        # Of steps: fewer make the map smoother.
        "nonlinear": (200.0, 20.0),
    }[inversion]
    return float(low * (high / low) ** regularisation)


def site_mask(depth: Tensor, grid: ScanGrid, seed: Sequence[int] | int, values: Values) -> Tensor:
    """Return the (X, Y, Z) bool mask of the brain with an edge that is eroded and uneven."""
    rng = generator(seed, "mask")
    edge = float(values["mask_erosion"]) + float(values["mask_unevenness"]) * smooth_field(
        rng, grid.shape, grid.spacing, 25, depth.device
    )
    return depth > edge


def site_maps(
    signal: Tensor,
    depth: Tensor,
    grid: ScanGrid,
    seed: Sequence[int] | int,
    values: Values,
) -> dict[str, Tensor]:
    """Compute the four contrasts from a complex multi-echo image, as a site would.

    Parameters
    ----------
    signal : (E, X, Y, Z) complex tensor
    depth : (X, Y, Z) tensor
        Distance from the brain's surface in mm, positive inside.
    grid
        The scan's grid.
    seed
        The same gives the same mask, streaks and reference.
    values
        Value of each effect.

    Returns
    -------
    dict
        ``qsm`` (ppm, zero outside its mask), ``r2star`` (1/s), ``imag`` and ``swi`` (arbitrary
        unit), each (X, Y, Z).
    """
    p, device = values, signal.device
    times, b0 = echo_times(p), float(p["field_strength"])
    spacing, direction = grid.spacing, grid.direction
    echoes = np.moveaxis(signal.cpu().numpy(), 0, -1)
    magnitude = np.abs(echoes)
    brain = (depth > 0).cpu().numpy()
    if p["mask"] == "head":
        typical = np.median(magnitude[..., 0][brain])
        mask = trusted_phase(magnitude[..., -1], magnitude[..., 0] > 0.2 * typical)
    else:
        mask = site_mask(depth, grid, seed, p).cpu().numpy()
        mask = trusted_phase(magnitude[..., -1], mask)
    if p["field_map"] == "path":
        field, _ = fit_unwrapped_field(echoes, mask, spacing, times, b0)
    else:
        field = fit_field(echoes, mask, spacing, times, b0)
    if p["background"] == "pdf":
        local, inside = project_onto_dipoles(
            field, mask, spacing, direction, weight=magnitude[..., 0]
        )
    else:
        local, inside = v_sharp(field, mask, spacing, largest_radius=float(p["sharp_radius"]))
    chi = _inverted(local, inside, magnitude, grid, p, str(device))
    qsm = _finished_qsm(torch.from_numpy(chi).to(device), torch.from_numpy(inside), grid, seed, p)

    if p["r2star_fit"] == "arlo":
        r2star = r2star_arlo(magnitude, times)
    else:
        r2star = r2star_loglinear(magnitude, times, weighted=p["r2star_fit"] == "weighted")
    late = swi_echo(p)
    phase = high_pass_phase(echoes[..., late], spacing, float(p["swi_width"]))
    maps = {
        "r2star": torch.from_numpy(np.clip(r2star, 0, FASTEST)).to(device),
        "imag": torch.from_numpy(_combined(magnitude, str(p["imag"]))).to(device),
        "swi": _swi(
            torch.from_numpy(magnitude[..., late]), torch.from_numpy(phase), int(p["swi_power"])
        ).to(device),
    }
    return _finished(qsm, maps, depth, grid, seed, p)


def shortcut_maps(
    body: Body,
    tissues: dict[str, Tissue],
    grid: ScanGrid,
    seed: Sequence[int] | int,
    values: Values,
) -> dict[str, Tensor]:
    """Make the four contrasts from the tissue itself: fast, for a part of a training stream.

    The inversion acts on the true local field with the noise that the echoes would leave in it;
    R2* has the noise of its fit. There is no background field, no phase to unwrap, no ghost.

    Parameters
    ----------
    body
        The head on the finer grid.
    tissues
        Its tissues; the signal of white matter sets the noise.
    grid, seed, values
        As for :func:`site_maps`.

    Returns
    -------
    dict
        As for :func:`site_maps`.
    """
    p, device = values, body.chi.device
    times, b0 = echo_times(p), float(p["field_strength"])
    rho = average_slices(body.rho, grid.parts)
    r2star = average_slices(body.rho * body.r2star, grid.parts) / rho.clamp(min=1e-3)
    depth = average_slices(body.depth, grid.parts)
    inside = site_mask(depth, grid, seed, p)
    source = torch.Generator(device).manual_seed(int(generator(seed, "noise").integers(2**62)))

    def noise(amount: Tensor | float) -> Tensor:
        return amount * torch.randn(grid.shape, generator=source, device=device)

    coil = sensitivity(grid, seed, p, str(device))
    sigma = noise_level(tissues, p)
    echoes = [rho * coil * torch.exp(-r2star * time) for time in times]
    noisy = [torch.hypot(s + noise(sigma), noise(sigma)) for s in echoes]
    weights = torch.stack([s.square() + sigma**2 for s in echoes])
    t = torch.tensor(times, device=device).reshape(-1, 1, 1, 1)
    mean = (weights * t).sum(0) / weights.sum(0)
    leverage = (weights * (t - mean).square()).sum(0)
    fitted = (r2star + noise(sigma / leverage.sqrt())).clamp(0, FASTEST)

    # Phase is fitted through the origin; its noise is that of the signal over the magnitude.
    power = (weights * t.square()).sum(0)
    field_noise = sigma / power.sqrt() / (2 * np.pi * GAMMA_BAR * b0)
    # Air and bone have no place in a map, nor has the step to them.
    shown = torch.where(body.brain > 0.95, body.chi, 0)
    chi = torch.where(inside, average_slices(shown, grid.parts), 0)
    local = dipole_field(chi, grid.spacing, grid.direction, padding=1.25)
    measured = torch.where(inside, local + noise(field_noise.clamp(max=0.2)), 0)
    inverted = _closed_form(measured, grid, str(p["inversion"]), float(p["regularisation"]))
    qsm = _finished_qsm(torch.where(inside, inverted, 0), inside, grid, seed, p)

    late = swi_echo(p)
    turns = 2 * np.pi * GAMMA_BAR * b0 * times[late]
    phase = turns * (local - smooth(local, grid.spacing, float(p["swi_width"])))
    maps = {
        "r2star": fitted,
        "imag": _combined_torch(noisy, str(p["imag"])),
        "swi": _swi(noisy[late], phase, int(p["swi_power"])),
    }
    return _finished(qsm, maps, depth, grid, seed, p)


def swi_echo(values: Values) -> int:
    """Return the position of the echo that SWI is made of."""
    wanted = float(values["swi_echo"]) * field_factor(values)
    return int(np.argmin(np.abs(np.array(echo_times(values)) - wanted)))


def _inverted(
    local: Array, inside: Array, magnitude: Array, grid: ScanGrid, values: Values, device: str
) -> Array:
    kind = str(values["inversion"])
    strength = strength_of(kind, float(values["regularisation"]))
    direction = grid.direction
    if kind == "thresholded_division":
        return thresholded_division(local, inside, grid.spacing, direction, threshold=strength)
    if kind == "tikhonov":
        return tikhonov(local, inside, grid.spacing, direction, weight=strength)
    weight = mean_magnitude(magnitude)
    if kind == "total_variation":
        return total_variation(
            local,
            inside,
            grid.spacing,
            direction,
            weight=weight,
            strength=strength,
            device=device,
        )
    times = echo_times(values)
    radians = 2 * np.pi * GAMMA_BAR * float(values["field_strength"]) * float(np.mean(times))
    return nonlinear_inversion(
        local,
        inside,
        grid.spacing,
        direction,
        weight=weight,
        radians_per_ppm=radians,
        iterations=round(strength),
        device=device,
    )


def _closed_form(field: Tensor, grid: ScanGrid, inversion: str, regularisation: float) -> Tensor:
    """Invert the dipole in one step; a light quadratic penalty stands for the iterative ones."""
    padded = padded_shape(grid.shape, 1.25)
    dipole = dipole_kernel(padded, grid.spacing, grid.direction, field.device)
    if inversion == "thresholded_division":
        threshold = strength_of(inversion, regularisation)
        inverse = torch.where(dipole.abs() > threshold, 1 / dipole, torch.sign(dipole) / threshold)
    else:
        weight = strength_of("tikhonov", regularisation * (1 if inversion == "tikhonov" else 0.6))
        inverse = dipole / (dipole.square() + weight)
    spectrum = torch.fft.rfftn(field, s=padded) * inverse
    x, y, z = grid.shape
    return torch.fft.irfftn(spectrum, s=padded)[:x, :y, :z]


def _finished_qsm(
    chi: Tensor, inside: Tensor, grid: ScanGrid, seed: Sequence[int] | int, values: Values
) -> Tensor:
    """Reference, scale and streak a susceptibility map inside its mask."""
    p = values
    inside = inside.to(chi.device)
    if not bool(inside.any()):
        return torch.zeros_like(chi)
    rng = generator(seed, "reference")
    shift = float(p["reference_shift"]) * rng.standard_normal()
    result = float(p["qsm_gain"]) * (chi - chi[inside].mean()) + float(shift)
    amount = float(p["streaks"])
    if amount > 0:
        source = torch.Generator(chi.device).manual_seed(
            int(generator(seed, "streaks").integers(2**62))
        )
        noise = torch.randn(grid.shape, generator=source, device=chi.device)
        dipole = dipole_kernel(grid.shape, grid.spacing, grid.direction, chi.device)
        spectrum = torch.fft.rfftn(noise) * torch.exp(-0.5 * (dipole / 0.06).square())
        streaks = torch.fft.irfftn(spectrum, s=grid.shape)
        result = result + amount * streaks / streaks[inside].std()
    return torch.where(inside, smooth(result, grid.spacing, float(p["blur"])), 0)


def _finished(
    qsm: Tensor,
    maps: dict[str, Tensor],
    depth: Tensor,
    grid: ScanGrid,
    seed: Sequence[int] | int,
    values: Values,
) -> dict[str, Tensor]:
    """Smooth, even out and strip the maps that need no field."""
    p = values
    blur = float(p["blur"])
    coil = sensitivity(grid, seed, p, str(depth.device)) ** float(p["homogeneity"])
    brain = site_mask(depth, grid, seed, p) if p["skull"] == "stripped" else None
    result = {"qsm": qsm}
    for contrast, image in maps.items():
        if contrast != "r2star":
            image = image / coil
        image = smooth(image, grid.spacing, blur)
        result[contrast] = image if brain is None else torch.where(brain, image, 0)
    return {contrast: image.float() for contrast, image in result.items()}


def _combined(magnitude: Array, how: str) -> Array:
    if how == "mean":
        return mean_magnitude(magnitude)
    if how == "last":
        return magnitude[..., -1]
    return np.sqrt((magnitude**2).mean(-1))


def _combined_torch(magnitudes: list[Tensor], how: str) -> Tensor:
    if how == "mean":
        return sum(magnitudes, 0 * magnitudes[0]) / len(magnitudes)
    if how == "last":
        return magnitudes[-1]
    return (sum((m.square() for m in magnitudes), 0 * magnitudes[0]) / len(magnitudes)).sqrt()


def _swi(magnitude: Tensor, phase: Tensor, power: int) -> Tensor:
    """Multiply by a mask that falls from 1 at no phase to 0 at half a paramagnetic turn."""
    return magnitude * (1 - phase.clamp(0, np.pi) / np.pi) ** power
