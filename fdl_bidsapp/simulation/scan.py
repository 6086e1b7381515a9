"""One simulated scan: a person, a protocol, a position in the scanner, and all that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fdl_bidsapp.simulation.contrast import Protocol, compute_maps, simulate_signal
from fdl_bidsapp.simulation.geometry import rotation
from fdl_bidsapp.simulation.head import build_head
from fdl_bidsapp.simulation.tissue import Person, draw_tissues

Array = np.ndarray

FIELD_OF_VIEW = ((-90.0, 90.0), (-124.0, 92.0), (-76.0, 92.0))
"""The box around a head of the template's size, mm in its space."""


@dataclass(frozen=True)
class SimulatedScan:
    """A scan with its truth.

    Attributes
    ----------
    signal
        (X, Y, Z, E) complex64 array.
    maps
        ``qsm``, ``r2star``, ``imag``, ``swi``; (X, Y, Z) float32 each.
    labels
        (X, Y, Z) uint8 array, the nuclei with the indices of the label table.
    susceptibility
        (X, Y, Z) float32 array, the true map in ppm.
    brain
        (X, Y, Z) bool array.
    affine
        Voxel to scanner coordinates, mm.
    """

    signal: Array
    maps: dict[str, Array]
    labels: Array
    susceptibility: Array
    brain: Array
    affine: Array


def scan_geometry(
    spacing: Sequence[float], angles: Sequence[float] | Array = (0.0, 0.0, 0.0)
) -> tuple[tuple[int, int, int], Array]:
    """Place a grid of the given voxel size around the head.

    Parameters
    ----------
    spacing
        Voxel size in mm.
    angles
        Tilt of the grid about x, y, z in degrees (an oblique scan).

    Returns
    -------
    shape : three ints
    affine : (4, 4) array

    Examples
    --------
    >>> scan_geometry((1.0, 1.0, 1.5))[0]
    (180, 216, 112)
    """
    box = np.array(FIELD_OF_VIEW)
    extent = box[:, 1] - box[:, 0]
    # 168 / 0.7 is a little more than 240 in floating point, and no voxel more than that.
    x, y, z = (int(np.ceil(e / s - 1e-9)) for e, s in zip(extent, spacing, strict=True))
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) @ np.diag(spacing)
    affine[:3, 3] = box.mean(1) - affine[:3, :3] @ ((np.array([x, y, z]) - 1) / 2)
    return (x, y, z), affine


def simulate_scan(
    anatomy: np.random.Generator,
    physiology: np.random.Generator,
    acquisition: np.random.Generator | None = None,
    *,
    person: Person | None = None,
    protocol: Protocol | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    angles: Sequence[float] | Array = (0.0, 0.0, 0.0),
    variation: float = 1.0,
    tissue_spread: float = 1.0,
) -> SimulatedScan:
    """Simulate a scan from anatomy to maps.

    Parameters
    ----------
    anatomy
        Draws the head: generators in the same state give the same head on the same grid. Where
        the grid is turned, the non-linear warp turns with it, which moves a nucleus by less than a
        millimetre for a few degrees.
    physiology
        Draws tissue.
    acquisition
        Draws texture, coil and noise; ``physiology`` goes on doing so by default.
    person, protocol
        Who is scanned, and how.
    spacing, angles
        As for :func:`scan_geometry`.
    variation, tissue_spread
        Factors on the spread of anatomy and of tissue.

    Returns
    -------
    SimulatedScan
    """
    protocol = protocol or Protocol()
    shape, affine = scan_geometry(spacing, angles)
    head = build_head(anatomy, shape, affine, variation=variation)
    tissues = draw_tissues(
        physiology, person, spread=tissue_spread, field_strength=protocol.field_strength
    )
    signal, susceptibility = simulate_signal(
        head, tissues, affine, protocol, acquisition or physiology
    )
    maps = compute_maps(signal, head.brain, affine, protocol)
    return SimulatedScan(signal, maps, head.labels, susceptibility, head.brain, affine)


def draw_protocol(rng: np.random.Generator) -> tuple[Protocol, tuple[float, ...], Array]:
    """Draw a protocol, voxel size and tilt such as most sites have at 3 T.

    Returns
    -------
    protocol : Protocol
    spacing : three floats, mm
    angles : (3,) array, degrees
    """
    # Few echoes and no voxels finer than the model's grid: both cost time and teach nothing.
    n_echoes = int(rng.integers(4, 6))
    times = np.linspace(rng.uniform(0.003, 0.006), rng.uniform(0.022, 0.034), n_echoes)
    protocol = Protocol(
        echo_times=tuple(float(t) for t in times),
        snr=float(np.exp(rng.uniform(np.log(35), np.log(110)))),
        bias=float(rng.uniform(0.05, 0.3)),
        texture=float(rng.uniform(0.7, 1.5)),
        inversion="thresholded_division" if rng.random() < 0.25 else "tikhonov",
    )
    in_plane = float(rng.uniform(1.0, 1.15))
    spacing = (in_plane, in_plane, float(rng.choice([in_plane, rng.uniform(1.0, 1.6)])))
    angles = rng.normal(0, 5, 3)
    return protocol, spacing, angles
