"""Iterative dipole inversions: total variation and the non-linear one, on CPU or GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fdl_bidsapp.physics.dipole import dipole_kernel, padded_shape
from fdl_bidsapp.physics.solving import conjugate_gradients

if TYPE_CHECKING:
    import torch

Array = np.ndarray


STRENGTH_OF_NOISE = 0.1
"""Best between 0.06 and 0.15 on simulated heads whose noise differs tenfold."""

SMALLEST_NOISE = 1e-4
"""ppm; no field is known better than this."""

SMOOTHNESS = 3e-3
"""Weight of half the squared gradient (ppm²/mm²) against half the squared residual (ppm²)."""

SMOOTH_STEPS = 30
"""Of conjugate gradients."""


def field_noise(field: Array, mask: Array) -> float:
    """Estimate the noise of a local field from what changes along all three axes at once.

    Parameters
    ----------
    field : (X, Y, Z) array
        ppm.
    mask : (X, Y, Z) bool array
        Where it is known.

    Returns
    -------
    float
        Standard deviation in ppm; 0 where no cube of eight voxels is in the mask.

    Notes
    -----
    The mixed third difference takes out all that is smooth and leaves eight times the variance of
    independent noise; its median absolute value tells that without regard to the few edges.

    Examples
    --------
    >>> noise = np.random.default_rng(0).normal(0, 0.01, (20, 20, 20))
    >>> round(field_noise(noise + 5.0, np.ones((20, 20, 20), bool)), 3)
    0.01
    """
    difference, known = field.astype(np.float32), mask
    for axis in range(3):
        difference = np.diff(difference, axis=axis)
        known = np.delete(known, -1, axis) & np.delete(known, 0, axis)
    if not known.any():
        return 0.0
    return float(1.4826 * np.median(np.abs(difference[known])) / np.sqrt(8))


def penalty_of_noise(field: Array, mask: Array) -> float:
    """Return the weight of the total variation that suits a local field, ppm/mm.

    What is right for one scan blurs a better one and leaves streaks in a worse one; so it is
    :data:`STRENGTH_OF_NOISE` times the field's noise.

    Parameters
    ----------
    field, mask
        As for :func:`field_noise`.
    """
    return STRENGTH_OF_NOISE * max(field_noise(field, mask), SMALLEST_NOISE)


def total_variation(
    field: Array,
    mask: Array,
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
    *,
    weight: Array | None = None,
    strength: float | None = None,
    iterations: int = 40,
    device: str = "cpu",
) -> Array:
    """Invert the dipole with a penalty on total variation.

    Parameters
    ----------
    field : (X, Y, Z) array
        Local field, ppm.
    mask : (X, Y, Z) bool array
        Where the field is known; the result is zero elsewhere.
    spacing
        Voxel size in mm.
    direction
        Unit vector of B0 in voxel axes.
    weight : (X, Y, Z) array
        Trust in each voxel's field, such as the magnitude; equal everywhere by default.
    strength
        Weight of the total variation (ppm/mm, summed) against half the squared residual (ppm²). By
        default that of :func:`penalty_of_noise`.
    iterations
        Steps of the alternating directions.
    device
        ``cpu`` or ``cuda``.

    Returns
    -------
    (X, Y, Z) float32 array
        Susceptibility in ppm, up to a constant.

    Notes
    -----
    Minimises ½ ‖W (d ∗ χ - f)‖² + λ ‖∇χ‖₁ by the alternating direction method of multipliers with
    both ∇χ and d ∗ χ split off, so that each step is a shrinkage, a pointwise average and a
    division in k-space (Bilgic et al., Magn. Reson. Med. 72 (2014) 1444-1459; Milovic et al.,
    Magn. Reson. Med. 80 (2018) 814-821). Outside the mask the field is not zero but free.
    """
    import torch

    grid = _Grid(field, mask, spacing, direction, weight, device)
    if strength is None:
        strength = penalty_of_noise(field, mask)
    # Both decide how soon it converges, not where to: found on simulated heads.
    mu_gradient, mu_field = 300 * strength, 0.1
    denominator = mu_field * grid.dipole**2 + mu_gradient * grid.minus_laplacian
    denominator[0, 0, 0] = 1.0
    squared = grid.weight**2
    data = squared * grid.field
    known = squared + mu_field
    threshold = strength / mu_gradient
    fitted, dual_field = data / known, torch.zeros_like(data)
    edges = [torch.zeros_like(data) for _ in range(3)]
    dual_edges = [torch.zeros_like(data) for _ in range(3)]
    spectrum = torch.zeros_like(grid.dipole)
    for _ in range(iterations):
        right = torch.zeros_like(data)
        for axis, (edge, dual) in enumerate(zip(edges, dual_edges, strict=True)):
            right += grid.backward(edge.sub_(dual), axis)
        spectrum = grid.forward_fft(right) * mu_gradient
        spectrum += mu_field * grid.dipole * grid.forward_fft(fitted.sub_(dual_field))
        spectrum /= denominator
        chi = grid.inverse_fft(spectrum)
        for axis in range(3):
            with_dual = grid.forward(chi, axis).add_(dual_edges[axis])
            edges[axis] = torch.nn.functional.softshrink(with_dual, threshold)
            dual_edges[axis] = with_dual.sub_(edges[axis])
        with_dual = grid.inverse_fft(spectrum * grid.dipole).add_(dual_field)
        fitted = (data + mu_field * with_dual).div_(known)
        dual_field = with_dual.sub_(fitted)
    return grid.result(grid.inverse_fft(spectrum), mask)


def smooth_inversion(
    field: Array,
    mask: Array,
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
    *,
    weight: Array | None = None,
    strength: float = SMOOTHNESS,
    iterations: int = SMOOTH_STEPS,
    device: str = "cpu",
) -> Array:
    """Invert the dipole with a quadratic penalty on the map's gradient.

    Parameters
    ----------
    field, mask, spacing, direction, weight, device
        As for :func:`total_variation`.
    strength, iterations
        See :data:`SMOOTHNESS` and :data:`SMOOTH_STEPS`.

    Returns
    -------
    (X, Y, Z) float32 array
        Susceptibility in ppm, up to a constant. For one mask, run to the end, it is a linear filter
        of the field.

    Notes
    -----
    Minimises ½ ‖W (d ∗ χ - f)‖² + ½ λ ‖∇χ‖² (de Rochefort et al., Magn. Reson. Med. 63 (2010)
    194-206) by conjugate gradients. The sources of a local field lie in the mask, and only there
    the map may differ from zero; outside the mask the field is free. A division in k-space, which
    knows neither, has large errors that vary slowly.
    """
    grid = _Grid(field, mask, spacing, direction, weight, device)
    return grid.result(_smoothest_sources(grid, grid.inside, strength, iterations), mask)


def remaining_background(
    field: Array,
    mask: Array,
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
    *,
    weight: Array | None = None,
    device: str = "cpu",
) -> Array:
    """Find what a background removal has left of the field of sources outside the mask.

    Parameters
    ----------
    field, mask, spacing, direction, weight, device
        As for :func:`total_variation`.

    Returns
    -------
    (X, Y, Z) float32 array
        ppm, zero outside the mask; to be taken from the field.

    Notes
    -----
    What a removal by mean values over spheres leaves, or takes too much, is harmonic: the field of
    sources outside the mask. Here sources inside and outside explain the field together, inside
    with a penalty on their gradient, as in :func:`smooth_inversion`, outside with none; the field
    of those outside is what remains. A removal that fits sources outside alone (Liu et al., NMR
    Biomed. 24 (2011) 1129-1136) gives them what those inside have made.
    """
    import torch

    grid = _Grid(field, mask, spacing, direction, weight, device)
    sources = _smoothest_sources(grid, torch.ones_like(grid.inside), SMOOTHNESS, SMOOTH_STEPS)
    return grid.result(grid.convolved(sources * (1 - grid.inside)), mask)


def _smoothest_sources(
    grid: _Grid, allowed: torch.Tensor, strength: float, iterations: int
) -> torch.Tensor:
    """Explain a field by sources where they are allowed, smooth in the mask."""
    squared = grid.weight**2
    # Differences between two voxels of the mask; none at its surface.
    within = [grid.inside * grid.inside.roll(-1, axis) for axis in range(3)]

    def curvature(chi: torch.Tensor) -> torch.Tensor:
        total = grid.convolved(squared * grid.convolved(chi)).mul_(allowed)
        for axis in range(3):
            total += strength * grid.backward(within[axis] * grid.forward(chi, axis), axis)
        return total

    right = grid.convolved(squared * grid.field).mul_(allowed)
    return conjugate_gradients(curvature, right, iterations, product=lambda a, b: (a * b).sum())


def nonlinear_inversion(
    field: Array,
    mask: Array,
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
    *,
    weight: Array | None = None,
    radians_per_ppm: float = 2 * np.pi * 42.577 * 3.0 * 0.02,
    penalty: float = 1e-3,
    iterations: int = 30,
    device: str = "cpu",
) -> Array:
    """Invert the dipole on the circle, where a wrapped or noisy phase is no outlier.

    Parameters
    ----------
    field, mask, spacing, direction, weight, device
        As for :func:`total_variation`.
    radians_per_ppm
        Phase that one ppm makes: 2π γ̄ B0 TE.
    penalty
        Weight of the squared susceptibility, per ppm².
    iterations
        Steps of accelerated gradient descent; fewer make the map smoother.

    Returns
    -------
    (X, Y, Z) float32 array
        Susceptibility in ppm, up to a constant.

    Notes
    -----
    Minimises ½ ‖W |exp(i s d ∗ χ) - exp(i s f)|‖² / s² + ½ α ‖χ‖² (Polak et al., NMR Biomed. 33
    (2020) e4271), with Nesterov's momentum. The sources of a local field lie in the mask, and only
    there the map may differ from zero.
    """
    import torch

    grid = _Grid(field, mask, spacing, direction, weight, device)
    squared, s = grid.weight**2, float(radians_per_ppm)
    # The curvature is at most W² max|D|², and |D| is at most 2/3.
    step = 1.0 / (float(squared.max()) * (2 / 3) ** 2 + penalty)
    chi = torch.zeros_like(grid.field)
    ahead, momentum = chi, 1.0
    for _ in range(iterations):
        misfit = grid.convolved(ahead).sub_(grid.field)
        misfit = squared * torch.sin(misfit.mul_(s)) / s
        gradient = grid.convolved(misfit).mul_(grid.inside)
        following = ahead - step * (gradient + penalty * ahead)
        momentum, before = (1 + np.sqrt(1 + 4 * momentum**2)) / 2, momentum
        ahead = following + ((before - 1) / momentum) * (following - chi)
        chi = following
    return grid.result(chi, mask)


class _Grid:
    """The part of the grid around the mask, padded, with its dipole and differences."""

    def __init__(
        self,
        field: Array,
        mask: Array,
        spacing: Sequence[float],
        direction: Sequence[float] | Array,
        weight: Array | None,
        device: str,
    ) -> None:
        import torch

        occupied = [np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        self.box = tuple(slice(o[0], o[-1] + 1) if o.size else slice(0, 1) for o in occupied)
        inner = tuple(s.stop - s.start for s in self.box)
        self.shape = padded_shape(inner, 1.25)
        self.spacing = [float(size) for size in spacing]
        trust = mask.astype(np.float32)
        if weight is not None:
            # Bright voxels, such as fat in a faulty mask, must not outvote the others.
            typical = float(np.median(weight[mask])) if mask.any() else 1.0
            trust = np.where(mask, np.clip(weight / max(typical, 1e-12), 0, 1.5), 0)

        def padded(data: Array) -> torch.Tensor:
            whole = torch.zeros(self.shape, dtype=torch.float32, device=device)
            values = np.ascontiguousarray(data[self.box], np.float32)
            whole[: inner[0], : inner[1], : inner[2]] = torch.from_numpy(values).to(device)
            return whole

        self.inner = inner
        self.inside = padded(mask)
        self.field = padded(np.where(mask, field, 0))
        self.weight = padded(trust)
        kernel = dipole_kernel(self.shape, spacing, direction)
        self.dipole = torch.from_numpy(kernel).to(device)
        squared = torch.zeros(self.shape[0], self.shape[1], self.shape[2] // 2 + 1, device=device)
        for axis, (n, size) in enumerate(zip(self.shape, self.spacing, strict=True)):
            k = torch.fft.rfftfreq(n) if axis == 2 else torch.fft.fftfreq(n)
            value = (2 - 2 * torch.cos(2 * torch.pi * k)) / size**2
            squared += value.to(device).reshape([-1 if a == axis else 1 for a in range(3)])
        self.minus_laplacian = squared

    def forward_fft(self, data: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.fft.rfftn(data)

    def inverse_fft(self, spectrum: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.fft.irfftn(spectrum, self.shape)

    def convolved(self, data: torch.Tensor) -> torch.Tensor:
        """Field of a map of susceptibility."""
        return self.inverse_fft(self.forward_fft(data) * self.dipole)

    def forward(self, data: torch.Tensor, axis: int) -> torch.Tensor:
        """Difference to the next voxel, per mm."""
        return (data.roll(-1, axis) - data).div_(self.spacing[axis])

    def backward(self, data: torch.Tensor, axis: int) -> torch.Tensor:
        """Transpose of :meth:`forward`."""
        return (data.roll(1, axis) - data).div_(self.spacing[axis])

    def result(self, chi: torch.Tensor, mask: Array) -> Array:
        """Cut the grid's inner part out and put it where it came from."""
        x, y, z = self.inner
        whole = np.zeros(mask.shape, np.float32)
        whole[self.box] = chi[:x, :y, :z].cpu().numpy()
        return np.where(mask, whole, 0).astype(np.float32)
