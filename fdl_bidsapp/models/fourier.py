"""The frequency split: a small low-frequency image and a full-size high-frequency one.

For an image on a grid ``N`` and a fraction ``theta`` of its bandwidth, the low part is what a
window of ``n = 2 m + 1`` frequencies an axis, ``m = max(1, floor(theta N / 2))``, holds. An odd,
symmetric window keeps every inverse transform real; ``norm="forward"`` keeps the small image's
amplitude equal to the large one's. The last three axes are space; any axes before them are carried
along. Source: arXiv 2302.12980.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fft import fft, fftn, ifft, ifftn, irfft, rfft

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
        part is a low-pass image of ``n1 × n2 × n3``; computed with real-input transforms in which
        only the window's frequencies are carried from axis to axis.

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
        window_spectrum = _low_spectrum(x, m)
        return _image(window_spectrum, _odd(m)), x - _image(window_spectrum, shape)


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
        return _image(_low_spectrum(x, m), _odd(m))


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
        return high + _image(_low_spectrum(low, m) - _low_spectrum(high, m), shape)


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


def _low_spectrum(x: Tensor, m: Size) -> Tensor:
    """Frequencies -m..m of a real image, zero first, the last axis its non-negative half."""
    spectrum = rfft(x, dim=-1, norm="forward")[..., : m[2] + 1]
    spectrum = _keep(fft(spectrum, dim=-2, norm="forward"), -2, m[1])
    return _keep(fft(spectrum, dim=-3, norm="forward"), -3, m[0])


def _image(spectrum: Tensor, shape: Size) -> Tensor:
    """Inverse of :func:`_low_spectrum` on any grid that holds its frequencies."""
    spectrum = ifft(_widen(spectrum, -3, shape[0]), dim=-3, norm="forward")
    spectrum = ifft(_widen(spectrum, -2, shape[1]), dim=-2, norm="forward")
    return irfft(spectrum, n=shape[2], dim=-1, norm="forward")


def _keep(spectrum: Tensor, axis: int, m: int) -> Tensor:
    n = spectrum.shape[axis]
    return torch.cat([spectrum.narrow(axis, 0, m + 1), spectrum.narrow(axis, n - m, m)], axis)


def _widen(spectrum: Tensor, axis: int, n: int) -> Tensor:
    m = spectrum.shape[axis] // 2
    gap = list(spectrum.shape)
    gap[axis] = n - 2 * m - 1
    return torch.cat(
        [
            spectrum.narrow(axis, 0, m + 1),
            spectrum.new_zeros(gap),
            spectrum.narrow(axis, m + 1, m),
        ],
        axis,
    )


def _unshifted_window(shape: Size, m: Size) -> tuple[object, ...]:
    first, second = (slice(n // 2 - k, n // 2 + k + 1) for n, k in zip(shape[:2], m, strict=False))
    return ..., first, second, slice(None)


def _real_inverse(spectrum: Tensor) -> Tensor:
    return ifftn(spectrum, dim=(-3, -2, -1), norm="forward").real
