from __future__ import annotations

import numpy as np
import pytest

from fdl_bidsapp.errors import ImageError
from fdl_bidsapp.imaging.intensity import check_units, minmax, normalise, robust


def brain(scale, seed=0):
    data = np.zeros((30, 30, 30), "f4")
    data[5:25, 5:25, 5:25] = np.random.default_rng(seed).normal(0, scale, (20, 20, 20))
    return data


def test_minmax_spans_zero_to_one_linearly():
    data = brain(0.05)
    scaled = minmax(data)
    assert scaled.dtype == np.float32
    assert (scaled.min(), scaled.max()) == (0, 1)
    np.testing.assert_allclose(np.corrcoef(data.ravel(), scaled.ravel())[0, 1], 1, atol=1e-6)


def test_robust_keeps_the_range_despite_outliers():
    data = brain(0.05)
    before = robust(data)
    data[5, 5, 5] = 50
    after = robust(data)
    assert np.abs(after - before)[data != 50].max() < 0.01
    assert (after.min(), after.max()) == (0, 1)


def test_robust_does_not_depend_on_the_empty_surround():
    data = brain(0.05)
    inner = (slice(5, 25),) * 3
    np.testing.assert_array_equal(robust(data)[inner], robust(data[inner]))


@pytest.mark.parametrize("scheme", ["minmax", "robust"])
def test_an_image_without_contrast_is_refused(scheme):
    for data in (np.zeros((8, 8, 8), "f4"), np.full((8, 8, 8), 3, "f4")):
        with pytest.raises(ImageError, match="no contrast"):
            normalise(data, scheme)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="minmax, robust"):
        normalise(brain(1), "zscore")


def test_qsm_in_ppb_becomes_ppm_with_a_note():
    ppm = brain(0.05)
    converted, note = check_units(ppm * 1000, "qsm")
    np.testing.assert_allclose(converted, ppm, rtol=1e-5)
    assert note is not None
    assert "ppb" in note


@pytest.mark.parametrize(("end", "noted"), [(9.99, False), (10.01, True), (-10.01, True)])
def test_the_border_between_ppm_and_ppb_is_ten(end, noted):
    data = np.full((10, 10, 10), end, "f4")
    assert (check_units(data, "qsm")[1] is not None) == noted


def test_qsm_in_ppm_is_untouched_even_with_a_few_strong_streaks():
    data = brain(0.05)
    data[5, 5, :10] = 80
    same, note = check_units(data, "qsm")
    assert same is data
    assert note is None


@pytest.mark.parametrize(("t2star", "expected"), [(0.99, 0.99), (1.01, 0.00101)])
def test_the_border_between_seconds_and_milliseconds_is_one(t2star, expected):
    converted, note = check_units(np.full((8, 8, 8), t2star, "f4"), "t2star")
    np.testing.assert_allclose(converted, expected, rtol=1e-5)
    assert (note is not None) == (t2star > 1)


def test_strange_r2star_is_noted_but_kept():
    usual = np.abs(brain(20)) + 1
    assert check_units(usual, "r2star") == (usual, None)
    for strange, word in [(brain(20), "negative"), (usual * 1e4, "1/s")]:
        kept, note = check_units(strange, "r2star")
        assert kept is strange
        assert note is not None
        assert word in note


def test_magnitudes_have_no_unit():
    data = brain(1e5)
    assert check_units(data, "imag") == (data, None)
    assert check_units(data, "swi") == (data, None)
