"""From a head to its multi-echo images: the grid, the field, the echoes and what spoils them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
import torch

from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.physics.dipole import field_direction
from fdl_bidsapp.physics.forward import (
    average_slices,
    dipole_field,
    echo,
    steps_and_waves,
)
from fdl_bidsapp.simulation.anatomy import (
    Body,
    Deformation,
    coarse_susceptibility,
    grid_points,
    sample,
    smooth_field,
    transform,
)
from fdl_bidsapp.simulation.geometry import rotation
from fdl_bidsapp.simulation.labelmaps import HeadMap
from fdl_bidsapp.simulation.parameters import Values, generator
from fdl_bidsapp.simulation.physiology import echo_times
from fdl_bidsapp.simulation.tissue import Tissue

Array = np.ndarray
Tensor = torch.Tensor
Triple = tuple[float, float, float]

COARSE = 3.0
"""mm of the grid on which the field of the whole head is found."""

THINNEST = 1.0
"""mm: slices are simulated in parts that are no thicker, and then averaged."""

AROUND = (20.0, 22.0, 10.0)
"""mm around the brain that an image of the whole brain holds, on either side of each axis."""


@dataclass(frozen=True)
class ScanGrid:
    """The grid of a scan and the finer one on which it is simulated.

    Attributes
    ----------
    shape, affine
        The scan's grid; its axes point about to the right, front and top.
    parts
        How many thinner slices stand for one.
    """

    shape: tuple[int, int, int]
    affine: Array
    parts: int

    @property
    def spacing(self) -> Triple:
        """Voxel size in mm."""
        x, y, z = spacing_of(self.affine).tolist()
        return x, y, z

    @property
    def direction(self) -> Triple:
        """Unit vector of B0 in voxel axes."""
        x, y, z = field_direction(self.affine).tolist()
        return x, y, z

    @property
    def fine_shape(self) -> tuple[int, int, int]:
        """Size of the finer grid."""
        x, y, z = self.shape
        return x, y, z * self.parts

    @property
    def fine_affine(self) -> Array:
        """Voxel to scanner coordinates of the finer grid."""
        fine = np.array(self.affine, float)
        fine[:3, 2] /= self.parts
        fine[:3, 3] -= fine[:3, 2] * (self.parts - 1) / 2
        return fine

    @property
    def fine_spacing(self) -> Triple:
        """Voxel size of the finer grid, mm."""
        x, y, z = spacing_of(self.fine_affine).tolist()
        return x, y, z


def scan_grid(
    head: HeadMap,
    deformation: Deformation,
    seed: Sequence[int] | int,
    values: Values,
    box: Sequence[float] | None = None,
) -> ScanGrid:
    """Place a scan's grid on a head.

    Parameters
    ----------
    head, deformation
        The head.
    seed
        The same gives the same tilt.
    values
        Value of each effect.
    box
        Extent in mm along each axis of a region around the nuclei; else the grid holds the whole
        brain, or the slab that the values ask for.
    """
    p = values
    spacing = np.array([p["in_plane"], p["in_plane"], p["slice_thickness"]], float)
    tilt = generator(seed, "tilt").uniform(-1, 1, 3) * float(p["obliquity"])
    axes = rotation(tilt)
    target = deformation.inverse(head.nuclei_centre[None])[0]
    if box is not None:
        centre, extent = target, np.asarray(box, float)
    else:
        centre = deformation.inverse(head.brain_centre[None])[0]
        scale = spacing_of(np.linalg.inv(deformation.matrix))
        extent = head.brain_size * scale + 2 * np.array(AROUND)
        if float(p["slab"]) > 0:
            # Along the slice axis the slab follows the nuclei, in plane the brain.
            along = axes[:, 2]
            centre = centre + along * (along @ (target - centre) + float(p["slab_offset"]))
            extent[2] = float(p["slab"])
    x, y, z = (int(n) for n in np.maximum(np.round(extent / spacing), 4))
    # Even numbers of lines, of lengths that are fast to transform.
    x, y = (2 * int(scipy.fft.next_fast_len(-(-n // 2))) for n in (x, y))
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array([x, y, z]) - 1) / 2)
    return ScanGrid((x, y, z), affine, int(np.ceil(spacing[2] / THINNEST - 1e-6)))


def field_in_scanner(
    head: HeadMap,
    deformation: Deformation,
    tissues: dict[str, Tissue],
    body: Body,
    grid: ScanGrid,
    values: Values,
) -> Tensor:
    """Return the relative field on the finer grid, ppm, with the whole head as its source.

    Parameters
    ----------
    head, deformation, tissues
        The head.
    body
        What the finer grid holds of it.
    grid
        The grid.
    values
        Value of each effect.

    Returns
    -------
    (X, Y, Z) tensor

    Notes
    -----
    The field is linear in susceptibility. That of the whole head comes from a grid of 3 mm that
    reaches far below the scan; what that grid cannot hold, the difference of the two maps, is
    convolved on the fine grid. So a slab, or a region around the nuclei, feels sinuses and neck.
    """
    device = body.chi.device
    scale = spacing_of(np.linalg.inv(deformation.matrix))
    half = head.brain_size * scale / 2 + 40
    low, high = -half - np.array([0, 0, 50.0]), half
    middle = deformation.inverse(head.brain_centre[None])[0]
    shape = [int(n) for n in np.ceil((high - low) / COARSE)]
    affine = np.diag([COARSE, COARSE, COARSE, 1.0])
    affine[:3, 3] = middle + low
    coarse = coarse_susceptibility(head, deformation, tissues, shape, affine)
    depth = sample(
        head.brain_depth,
        transform(head.depth_to_voxel, deformation(grid_points(shape, affine, device))),
    )[0]
    strength, air = float(values["sinus_field"]), tissues["air"].chi
    coarse = torch.where(depth > 0, coarse, strength * coarse)
    wide = dipole_field(coarse, (COARSE,) * 3, (0, 0, 1), outside=strength * air)
    points = grid_points(grid.fine_shape, grid.fine_affine, device)
    shown = sample(torch.stack([coarse, wide]), transform(np.linalg.inv(affine), points))
    left = torch.where(body.depth > 0, body.chi, strength * body.chi) - shown[0]
    field = shown[1] + dipole_field(left, grid.fine_spacing, grid.direction, padding=1.25)
    return field - _shim(field, points, body.depth > 3, int(values["shim_order"]))


def _shim(field: Tensor, points: Tensor, brain: Tensor, order: int) -> Tensor:
    """Return the polynomial of the scanner's axes that fits the field in the brain best."""
    chosen = torch.nonzero(brain.flatten())[:, 0]
    if len(chosen) == 0:
        return torch.zeros_like(field)
    chosen = chosen[:: max(1, len(chosen) // 20_000)]
    x, y, z = points.flatten(1)[:, chosen] / 100
    one = torch.ones_like(x)

    def terms(x: Tensor, y: Tensor, z: Tensor, one: Tensor) -> list[Tensor]:
        first = [x, y, z] if order >= 1 else []
        second = [x * y, y * z, x * z, x**2 - y**2, 2 * z**2 - x**2 - y**2] if order >= 2 else []
        return [one, *first, *second]

    matrix = torch.stack(terms(x, y, z, one), 1).double()
    weights = torch.linalg.lstsq(matrix, field.flatten()[chosen].double()[:, None])[0][:, 0]
    places = points / 100
    every = terms(places[0], places[1], places[2], torch.ones_like(field))
    return sum((float(w) * term for w, term in zip(weights, every, strict=True)), 0 * field)


def sensitivity(grid: ScanGrid, seed: Sequence[int] | int, values: Values, device: str) -> Tensor:
    """Return the (X, Y, Z) receive sensitivity of the coils, 1 in the mean of its logarithm."""
    rng = generator(seed, "coil sensitivity")
    return torch.exp(
        float(values["bias"]) * smooth_field(rng, grid.shape, grid.spacing, 90, device)
    )


def acquire(
    body: Body,
    field: Tensor,
    tissues: dict[str, Tissue],
    grid: ScanGrid,
    seed: Sequence[int] | int,
    values: Values,
) -> Tensor:
    """Simulate the complex multi-echo image.

    Parameters
    ----------
    body, field
        The head, and its field in ppm, on the finer grid.
    tissues
        Its tissues; the signal of white matter sets the noise.
    grid
        The grid.
    seed
        The same gives the same noise on the same kind of device.
    values
        Value of each effect.

    Returns
    -------
    (E, X, Y, Z) complex64 tensor
    """
    p, device = values, body.chi.device
    times, strength = echo_times(p), float(p["field_strength"])
    phase = smooth_field(generator(seed, "coil phase"), grid.shape, grid.spacing, 80, device)
    coil = torch.polar(sensitivity(grid, seed, p, str(device)), float(p["coil_phase"]) * phase)
    echoes = torch.stack(
        [
            average_slices(echo(body.rho, body.r2star, field, time, strength), grid.parts)
            for time in times
        ]
    )
    echoes *= coil
    brightness = generator(seed, "slice unevenness").standard_normal(grid.shape[2])
    uneven = np.exp(float(p["slice_unevenness"]) * brightness).astype(np.float32)
    echoes *= torch.from_numpy(uneven).to(device)
    echoes += _noise(echoes, noise_level(tissues, p), grid, seed, p)
    return _spoil(echoes, times, grid, seed, p)


def noise_level(tissues: dict[str, Tissue], values: Values) -> float:
    """Return the standard deviation of the noise of one channel."""
    white = tissues["white_matter"]
    signal = white.rho * np.exp(-white.r2star * echo_times(values)[0])
    return float(signal / float(values["snr"]))


def _noise(
    echoes: Tensor, sigma: float, grid: ScanGrid, seed: Sequence[int] | int, values: Values
) -> Tensor:
    device = echoes.device
    source = torch.Generator(device).manual_seed(int(generator(seed, "noise").integers(2**62)))
    noise = torch.randn((*echoes.shape, 2), generator=source, device=device)
    rng = generator(seed, "noise unevenness")
    spread = float(values["noise_unevenness"])
    level = sigma * torch.exp(spread * smooth_field(rng, grid.shape, grid.spacing, 50, device))
    return torch.view_as_complex(noise) * level


def _spoil(
    echoes: Tensor,
    times: Sequence[float],
    grid: ScanGrid,
    seed: Sequence[int] | int,
    values: Values,
) -> Tensor:
    """Let the head move and breathe, and acquire a part of k-space."""
    p = values
    motion, breathing, share = (float(p[n]) for n in ("motion", "breathing", "acquired"))
    if motion == 0 and breathing == 0 and share >= 1:
        return echoes
    lines = grid.shape[1]
    rng = generator(seed, "motion")
    steps = np.zeros((lines, 2), np.float32)
    for at in rng.integers(0, lines, int(rng.integers(1, 5))):
        steps[at:] += rng.uniform(-1, 1, 2)
    largest = np.abs(steps - steps[lines // 2]).max()
    steps = (steps - steps[lines // 2]) * (motion / max(float(largest), 1e-6))
    rng = generator(seed, "breathing")
    # The whole scan takes 4 to 8 minutes, so a breath of 4 s comes back every few lines.
    turns = rng.uniform(30, 120)
    breath = np.sin(2 * np.pi * (turns * np.arange(lines) / lines + rng.random()))
    hertz = breathing * float(p["field_strength"]) / 3 * breath.astype(np.float32)
    spoilt = torch.empty_like(echoes)
    for e, time in enumerate(times):
        spoilt[e] = steps_and_waves(
            echoes[e],
            grid.spacing,
            acquired=share,
            displacement=torch.from_numpy(steps),
            phase=torch.from_numpy(2 * np.pi * time * hertz),
        )
    return spoilt
