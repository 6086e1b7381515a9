"""The split against a direct NumPy transcription of the published formulas, and its properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fdl_bidsapp.models.fourier import low_part, place, split, window_halfwidths

THETAS = (0.05, 0.1, 0.37, 0.8, 0.99)
grids = st.tuples(*(st.integers(3, 24) for _ in range(3)))
cases = settings(max_examples=40, deadline=None)


def random_image(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def transcribed_window(shape: tuple[int, ...], theta: float) -> tuple[slice, ...]:
    halves = [max(1, math.floor(theta * n / 2)) for n in shape]
    return tuple(slice(n // 2 - m, n // 2 + m + 1) for n, m in zip(shape, halves, strict=True))


def forward(x: NDArray) -> NDArray:
    return np.fft.fftshift(np.fft.fftn(x, norm="forward"))


def inverse(spectrum: NDArray) -> NDArray:
    image = np.fft.ifftn(np.fft.ifftshift(spectrum), norm="forward")
    assert np.abs(image.imag).max() < 1e-5 * max(1.0, np.ptp(image.real))
    return image.real


@cases
@given(grids, st.sampled_from(THETAS))
def test_split_and_place_equal_the_published_formulas(shape, theta):
    x = random_image(shape)
    window = transcribed_window(shape, theta)
    spectrum = forward(x.double().numpy())
    expected_low = inverse(spectrum[window])
    rest = spectrum.copy()
    rest[window] = 0

    low, high = split(x, theta)

    np.testing.assert_allclose(low, expected_low, atol=1e-5)
    np.testing.assert_allclose(high, inverse(rest), atol=1e-5)
    assert low.dtype == high.dtype == torch.float32

    u, small = random_image(shape, 1), random_image(expected_low.shape, 2)
    merged = forward(u.double().numpy())
    merged[window] = forward(small.double().numpy())
    np.testing.assert_allclose(place(u, small), inverse(merged), atol=1e-5)


@cases
@given(grids, st.sampled_from(THETAS))
def test_low_and_high_together_are_the_image(shape, theta):
    x = random_image((2, *shape))
    low, high = split(x, theta)
    torch.testing.assert_close(place(high, low), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(low_part(x, theta), low)
    torch.testing.assert_close(low_part(high, theta), torch.zeros_like(low), atol=1e-5, rtol=0)


@cases
@given(grids, st.sampled_from(["centred", "released"]), st.floats(-3, 3))
def test_split_is_linear(shape, spectrum, factor):
    x, y = random_image(shape, 1), random_image(shape, 2)
    for joint, one, other in zip(
        split(factor * x + y, 0.3, spectrum),
        split(x, 0.3, spectrum),
        split(y, 0.3, spectrum),
        strict=True,
    ):
        torch.testing.assert_close(joint, factor * one + other, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", [(16, 20, 12), (9, 7, 15)])
def test_a_constant_image_has_no_high_part(shape):
    low, high = split(torch.full(shape, 3.0), 0.2)
    assert high.abs().max() < 1e-5
    torch.testing.assert_close(low, torch.full_like(low, 3.0))


@pytest.mark.parametrize("spectrum", ["centred", "released"])
def test_gradients_flow_through_split_and_place(spectrum):
    x = torch.rand(1, 6, 7, 5, dtype=torch.float64, requires_grad=True)
    u = torch.rand(1, 6, 7, 5, dtype=torch.float64, requires_grad=True)

    def joined(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        low, high = split(x, 0.4, spectrum)
        return place(u * high, low.square(), spectrum)

    assert torch.autograd.gradcheck(joined, (x, u))


def test_centred_gradient_is_that_of_the_published_formulas():
    x = torch.rand(8, 9, 10, requires_grad=True)
    weights = random_image((8, 9, 10), 3)
    _, high = split(x, 0.3)
    (high * weights).sum().backward()
    # The split is a symmetric projection, so the gradient is the weights' own high part.
    spectrum = forward(weights.double().numpy())
    spectrum[transcribed_window((8, 9, 10), 0.3)] = 0
    np.testing.assert_allclose(x.grad, inverse(spectrum), atol=1e-5)


@pytest.mark.parametrize("spectrum", ["centred", "released"])
def test_transforms_stay_in_float32_under_autocast(spectrum):
    x = random_image((1, 2, 12, 10, 8))
    expected_low, expected_high = split(x, 0.3, spectrum)
    with torch.autocast("cpu", torch.bfloat16):
        low, high = split(x, 0.3, spectrum)
        placed = place(high.bfloat16(), low.bfloat16(), spectrum)
    assert low.dtype == high.dtype == placed.dtype == torch.float32
    torch.testing.assert_close(low, expected_low, atol=1e-6, rtol=0)
    torch.testing.assert_close(high, expected_high, atol=1e-6, rtol=0)


@cases
@given(grids)
def test_released_split_cuts_two_axes_of_the_unshifted_spectrum(shape):
    x = random_image(shape)
    spectrum = np.fft.fftn(x.double().numpy(), norm="forward")
    window = (*transcribed_window(shape, 0.3)[:2], slice(None))
    rest = spectrum.copy()
    rest[window] = 0

    low, high = split(x, 0.3, "released")

    np.testing.assert_allclose(low, np.fft.ifftn(spectrum[window], norm="forward").real, atol=1e-5)
    np.testing.assert_allclose(high, np.fft.ifftn(rest, norm="forward").real, atol=1e-5)
    merged = np.fft.fftn(high.double().numpy(), norm="forward")
    merged[window] = np.fft.fftn(low.double().numpy(), norm="forward")
    np.testing.assert_allclose(
        place(high, low, "released"), np.fft.ifftn(merged, norm="forward").real, atol=1e-5
    )


def test_released_parts_restore_an_even_image_outside_the_window():
    x = random_image((12, 16, 10))
    low, high = split(x, 0.3, "released")
    error = np.fft.fftn((place(high, low, "released") - x).double().numpy(), norm="forward")
    error[(*transcribed_window((12, 16, 10), 0.3)[:2], slice(None))] = 0
    assert np.abs(error).max() < 1e-6


def test_centred_low_part_holds_the_energy_of_a_smooth_image_and_released_hardly_any():
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (64, 64, 48)), indexing="ij")
    blob = torch.exp(-sum(a.square() for a in axes) / 0.1)
    energy = blob.square().mean()
    assert split(blob, 0.1)[0].square().mean() / energy > 0.95
    assert split(blob, 0.1, "released")[0].square().mean() / energy < 1e-3


def test_leading_axes_of_a_shared_low_part_broadcast():
    u, low = random_image((2, 3, 8, 8, 8)), random_image((1, 3, 3, 3, 3))
    for spectrum, small in (("centred", low), ("released", random_image((1, 3, 3, 3, 8)))):
        assert place(u, small, spectrum).shape == u.shape
    torch.testing.assert_close(place(u, low)[1], place(u[1:], low)[0])


@pytest.mark.parametrize(("n", "theta", "m"), [(200, 0.57, 57), (160, 0.1, 8), (3, 0.99, 1)])
def test_window_is_the_exact_floor(n, theta, m):
    assert window_halfwidths((n, n, n), theta) == (m, m, m)


def test_refuses_what_cannot_be_split():
    with pytest.raises(ValueError, match="at least 3 samples"):
        split(torch.rand(8, 2, 8))
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(torch.rand(8, 8, 8), 1.0)
    with pytest.raises(ValueError, match="unknown spectrum"):
        split(torch.rand(8, 8, 8), 0.1, "shifted")
    with pytest.raises(ValueError, match="three axes"):
        low_part(torch.rand(8, 8))
    for small in ((3, 4, 3), (3, 9, 3)):
        with pytest.raises(ValueError, match="does not fit"):
            place(torch.rand(8, 8, 8), torch.rand(small))
    with pytest.raises(ValueError, match="does not fit"):
        place(torch.rand(8, 8, 8), torch.rand(3, 3, 3), "released")
