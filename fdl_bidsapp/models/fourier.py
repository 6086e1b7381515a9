"""The frequency split: a small low-frequency image and a full-size high-frequency one.

For an image on a grid ``N`` and a fraction ``theta`` of its bandwidth, the low part is what a
window of ``n = 2 m + 1`` frequencies an axis, ``m = max(1, floor(theta N / 2))``, holds. An odd,
symmetric window keeps every inverse transform real; ``norm="forward"`` keeps the small image's
amplitude equal to the large one's. The last three axes are space; any axes before them are carried
along. Source: arXiv 2302.12980.

Such a window acts on each axis by itself, so the low part is the product of three small real
matrices with the image: no transform of the whole is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.fft import fftn, ifftn

SPECTRA = ("centred", "released")

Size = tuple[int, int, int]


def window_halfwidths(shape: Sequence[int], theta: float) -> Size:
    """Return the half-widths ``(m1, m2, m3)`` of the low window, in frequency samples.

    Parameters
    ----------
    shape : 3 ints
        Grid of the image.
    theta
        Fraction of the sampled bandwidth, between 0 and 1 (both excluded).

    Raises
    ------
    ValueError
        ``theta`` is out of range, the grid is not 3-D, or an axis is shorter than the smallest
        window (3 samples).

    Examples
    --------
    >>> window_halfwidths((160, 160, 128), 0.1)
    (8, 8, 6)
    >>> window_halfwidths((5, 8, 160), 0.1)
    (1, 1, 8)
    """
    if not 0 < theta < 1:
        raise ValueError(f"theta must lie between 0 and 1, not {theta}")
    if len(shape) != 3 or min(shape) < 3:
        raise ValueError(f"the split needs three axes of at least 3 samples, not {tuple(shape)}")
    # The small number undoes the rounding of products such as 0.57 * 200.
    m1, m2, m3 = (min(max(1, math.floor(theta * n / 2 + 1e-9)), (n - 1) // 2) for n in shape)
    return m1, m2, m3


def split(x: Tensor, theta: float = 0.1, spectrum: str = "centred") -> tuple[Tensor, Tensor]:
    """Split an image into its low part (small) and its high part (full size).

    Parameters
    ----------
    x : (..., N1, N2, N3) tensor
        Real image. Half precision is taken to float32, also under autocast.
    theta
        Fraction of the sampled bandwidth that is low.
    spectrum
        ``centred``: the window is around the zero frequency on all three axes, so that the low
        part is a low-pass image of ``n1 × n2 × n3``.

        ``released``: what the authors' released code does. The spectrum is never shifted, and the
        window is cut around index ``N // 2`` of the first two axes (their *highest* frequencies)
        while the third is kept whole; the small image has ``n1 × n2 × N3`` voxels and is the
        unshifted inverse transform of that cut. The real part of each inverse is taken: the high
        part is real by itself on even axes and loses something by it on odd ones; the low part
        always loses its phase, so that ``place`` restores the image outside the window only.

    Returns
    -------
    low : (..., n1, n2, n3) tensor
    high : (..., N1, N2, N3) tensor

    Raises
    ------
    ValueError
        Unknown spectrum, or see :func:`window_halfwidths`.

    Examples
    --------
    >>> low, high = split(torch.ones(20, 20, 16), 0.2)
    >>> tuple(low.shape), bool(high.abs().max() < 1e-6)
    ((5, 5, 3), True)
    """
    _check_spectrum(spectrum)
    shape = _grid(x)
    m = window_halfwidths(shape, theta)
    with torch.autocast(x.device.type, enabled=False):
        x = _full_precision(x)
        if spectrum == "released":
            full = fftn(x, dim=(-3, -2, -1), norm="forward")
            window = _unshifted_window(shape, m)
            rest = full.clone()
            rest[window] = 0
            return _real_inverse(full[window]), _real_inverse(rest)
        low = _shrunk(x, _odd(m))
        return low, x - _grown(low, shape)


def low_part(x: Tensor, theta: float = 0.1, spectrum: str = "centred") -> Tensor:
    """Return the low part alone; see :func:`split`.

    Examples
    --------
    >>> low_part(torch.ones(2, 20, 20, 16), 0.2).shape
    torch.Size([2, 5, 5, 3])
    """
    _check_spectrum(spectrum)
    shape = _grid(x)
    m = window_halfwidths(shape, theta)
    with torch.autocast(x.device.type, enabled=False):
        x = _full_precision(x)
        if spectrum == "released":
            full = fftn(x, dim=(-3, -2, -1), norm="forward")
            return _real_inverse(full[_unshifted_window(shape, m)])
        return _shrunk(x, _odd(m))


def place(high: Tensor, low: Tensor, spectrum: str = "centred") -> Tensor:
    """Put a small image's spectrum into the window of a large image's spectrum.

    Parameters
    ----------
    high : (..., N1, N2, N3) tensor
        Large image; whatever it has inside the window is replaced.
    low : (..., n1, n2, n3) tensor
        Small image with odd axes (``released``: ``n3`` is ``N3``); leading axes broadcast.
    spectrum
        As in :func:`split`.

    Returns
    -------
    (..., N1, N2, N3) tensor
        ``place(*reversed(split(x)))`` is ``x`` for ``centred``, on every grid. For ``released`` it
        is ``x`` but for the window's frequencies: the released code takes the real part of a small
        spectrum that is not Hermitian.

    Raises
    ------
    ValueError
        Unknown spectrum, or a small image that is even or larger than the large one.

    Examples
    --------
    >>> x = torch.rand(9, 8, 12)
    >>> low, high = split(x, 0.4)
    >>> torch.allclose(place(high, low), x, atol=1e-6)
    True
    """
    _check_spectrum(spectrum)
    shape, small = _grid(high), _grid(low)
    windowed = 2 if spectrum == "released" else 3
    if (
        any(n % 2 == 0 or n > size for n, size in zip(small[:windowed], shape, strict=False))
        or small[windowed:] != shape[windowed:]
    ):
        raise ValueError(f"a low part of {small} does not fit into a grid of {shape}")
    m = (small[0] // 2, small[1] // 2, small[2] // 2)
    with torch.autocast(high.device.type, enabled=False):
        high, low = _full_precision(high), _full_precision(low)
        if spectrum == "released":
            leading = torch.broadcast_shapes(high.shape[:-3], low.shape[:-3])
            full = fftn(high.expand(*leading, *shape), dim=(-3, -2, -1), norm="forward")
            full[_unshifted_window(shape, m)] = fftn(low, dim=(-3, -2, -1), norm="forward")
            return _real_inverse(full)
        return high + _grown(low - _shrunk(high, small), shape)


def _check_spectrum(spectrum: str) -> None:
    if spectrum not in SPECTRA:
        raise ValueError(f"unknown spectrum {spectrum!r}: choose from {', '.join(SPECTRA)}")


def _grid(x: Tensor) -> Size:
    if x.ndim < 3:
        raise ValueError(f"an image has at least three axes, not {x.ndim}")
    n1, n2, n3 = x.shape[-3:]
    return n1, n2, n3


def _odd(m: Size) -> Size:
    return 2 * m[0] + 1, 2 * m[1] + 1, 2 * m[2] + 1


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _shrunk(x: Tensor, small: Size) -> Tensor:
    """Return the image of the frequencies that a small odd grid holds, on that grid."""
    flat = _channels_last(x)
    for axis, (n, to) in enumerate(zip(_grid(x), small, strict=True)):
        flat = _along(axis, _interpolation(n, to, x.device, x.dtype), flat)
    return _as(x, flat)


def _grown(x: Tensor, shape: Size) -> Tensor:
    """Return a small odd image on a larger grid, with the same frequencies."""
    flat = _channels_last(x)
    # The last axis first, so that the largest product comes last.
    for axis, (n, to) in reversed(list(enumerate(zip(_grid(x), shape, strict=True)))):
        flat = _along(axis, _interpolation(n, to, x.device, x.dtype), flat)
    return _as(x, flat)


def _channels_last(x: Tensor) -> Tensor:
    """View an image as (batch, N1, N2, N3, channels), whichever of both lie innermost in memory."""
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return x.permute(0, 2, 3, 4, 1)
    return x.reshape(-1, *x.shape[-3:], 1)


def _as(x: Tensor, flat: Tensor) -> Tensor:
    """Undo :func:`_channels_last` of ``x`` for another grid."""
    if flat.shape[-1] > 1:
        return flat.permute(0, 4, 1, 2, 3)
    return flat.reshape(*x.shape[:-3], *flat.shape[1:4])


def _along(axis: int, matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply one spatial axis of a (batch, N1, N2, N3, channels) tensor with a matrix."""
    before, after = x.shape[: axis + 1], x.shape[axis + 2 :]
    columns = x.reshape(math.prod(before), x.shape[axis + 1], math.prod(after))
    return torch.matmul(matrix, columns).reshape(*before, len(matrix), *after)


@lru_cache(maxsize=256)
def _interpolation(n: int, to: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the matrix from ``n`` samples to ``to``, for the frequencies that the fewer hold."""
    # It outlives a block without gradients, and is then multiplied with what has some.
    with torch.inference_mode(False), torch.no_grad():
        lag = torch.arange(to, dtype=torch.float64)[:, None] / to
        lag = lag - torch.arange(n, dtype=torch.float64) / n
        waves = [torch.cos(2 * math.pi * k * lag) for k in range(1, min(n, to) // 2 + 1)]
        return ((1 + 2 * torch.stack(waves).sum(0)) / n).to(device, dtype)


def _unshifted_window(shape: Size, m: Size) -> tuple[object, ...]:
    first, second = (slice(n // 2 - k, n // 2 + k + 1) for n, k in zip(shape[:2], m, strict=False))
    return ..., first, second, slice(None)


def _real_inverse(spectrum: Tensor) -> Tensor:
    return ifftn(spectrum, dim=(-3, -2, -1), norm="forward").real
