from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdl_bidsapp.simulation.contrast import Protocol
from fdl_bidsapp.simulation.scan import (
    FIELD_OF_VIEW,
    SimulatedScan,
    draw_protocol,
    scan_geometry,
    simulate_scan,
)


@cache
def scan(anatomy=0, physiology=0, acquisition=0, **options) -> SimulatedScan:
    return simulate_scan(
        np.random.default_rng(anatomy),
        np.random.default_rng(physiology),
        np.random.default_rng(acquisition),
        spacing=(5.0, 5.0, 5.0),
        **options,
    )


@example(spacing=(1.0, 1.0, 0.7), angles=(0.0, 0.0, 0.0))
@given(spacing=st.tuples(*[st.floats(0.4, 5)] * 3), angles=st.tuples(*[st.floats(-30, 30)] * 3))
def test_the_grid_covers_the_head_around_its_middle(spacing, angles):
    shape, affine = scan_geometry(spacing, angles)
    extent = np.diff(FIELD_OF_VIEW, axis=1)[:, 0]
    assert np.all(np.multiply(shape, spacing) >= extent - 1e-6)
    assert np.all(np.multiply(shape, spacing) < extent + spacing)
    middle = affine @ [*((np.array(shape) - 1) / 2), 1]
    np.testing.assert_allclose(middle[:3], np.mean(FIELD_OF_VIEW, 1), atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), spacing)
    assert np.linalg.det(affine[:3, :3]) == pytest.approx(np.prod(spacing))


def test_a_scan_is_whole():
    one = scan()
    shape = one.labels.shape
    assert shape == scan_geometry((5, 5, 5))[0]
    assert set(one.maps) == {"qsm", "r2star", "imag", "swi"}
    for image in (*one.maps.values(), one.susceptibility):
        assert image.shape == shape
        assert image.dtype == np.float32
        assert np.isfinite(image).all()
    assert one.signal.shape == (*shape, len(Protocol().echo_times))


def test_the_same_seeds_give_the_same_scan():
    again = scan.__wrapped__()
    np.testing.assert_array_equal(scan().signal, again.signal)
    np.testing.assert_array_equal(scan().labels, again.labels)


def test_each_generator_draws_its_own_part():
    base, head, tissue, noise = scan(), scan(anatomy=1), scan(physiology=1), scan(acquisition=1)
    assert np.any(base.labels != head.labels)
    for other in (tissue, noise):
        np.testing.assert_array_equal(base.labels, other.labels)

    # Tissue moves white matter as a whole; texture and noise do not.
    def change(other):
        return abs((other.susceptibility - base.susceptibility)[base.brain].mean())

    assert change(noise) < 0.3 * change(tissue)
    assert np.any(noise.signal != base.signal)


@given(st.integers(0, 10_000))
def test_protocols_are_ones_that_sites_use(seed):
    protocol, spacing, angles = draw_protocol(np.random.default_rng(seed))
    times = np.array(protocol.echo_times)
    assert len(times) >= 3
    assert np.all(np.diff(times) > 0.001)
    assert 0.001 < times[0] < times[-1] < 0.045
    assert protocol.field_strength == 3.0
    assert 30 < protocol.snr < 120
    assert all(0.5 <= s <= 3 for s in spacing)
    assert np.abs(angles).max() < 45
