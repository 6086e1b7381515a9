from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fdl_bidsapp.errors import DataError
from fdl_bidsapp.imaging.reconstruction import INVERSIONS, REFERENCES, RawEchoes, reconstruct
from fdl_bidsapp.physics.dipole import field_direction, field_from_susceptibility
from fdl_bidsapp.physics.signal import multi_echo_signal
from fdl_bidsapp.settings import QSM_REFERENCES

SHAPE, SPACING = (40, 38, 30), (3.0, 3.0, 4.0)
TIMES = (0.004, 0.012, 0.020)


def distance(centre):
    axes = [
        (np.arange(n) - (n - 1) / 2) * h - c for n, h, c in zip(SHAPE, SPACING, centre, strict=True)
    ]
    return np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij", sparse=True)))


BRAIN = distance((0, 0, 0)) < 48
IRON = distance((12, 0, 0)) < 9
TISSUE = distance((-20, 0, 0)) < 9


def oblique() -> np.ndarray:
    angle = np.deg2rad(20)
    affine = np.diag([*SPACING, 1.0])
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ affine


SINUS = distance((0, 10, -54)) < 8


def scanned(outside: float) -> RawEchoes:
    """A round brain with an iron-rich ball and a sinus, scanned obliquely at 3 T."""
    affine = oblique()
    chi = np.where(IRON, 0.2, np.where(SINUS, outside, 0.0))
    field = field_from_susceptibility(chi, SPACING, field_direction(affine))
    # A shim that is not perfect.
    field = field + (0.004 * np.arange(SHAPE[0]))[:, None, None].astype(np.float32)
    signal = multi_echo_signal(
        np.where(BRAIN, 1.0, 0.0),
        np.where(IRON, 70.0, 20.0),
        field,
        TIMES,
        3.0,
        initial_phase=0.5,
    )
    noise = np.random.default_rng(0).normal(0, 0.005, (*signal.shape, 2))
    signal = signal + noise[..., 0] + 1j * noise[..., 1]
    return RawEchoes(
        np.abs(signal).astype(np.float32),
        np.angle(signal).astype(np.float32),
        affine,
        TIMES,
        3.0,
    )


@pytest.fixture(scope="module")
def echoes() -> RawEchoes:
    """The scan without a sinus."""
    return scanned(0.0)


@pytest.mark.parametrize("inversion", list(INVERSIONS))
def test_iron_is_found_by_every_inversion(echoes, inversion):
    made = reconstruct(echoes, inversion)
    chi = made.maps["qsm"]
    assert made.mask[IRON].all()
    assert 0.08 < chi[IRON].mean() - chi[TISSUE].mean() < 0.24
    assert not chi[~made.mask].any()
    assert abs(chi[made.mask].mean()) < 1e-4
    assert made.parameters["FieldDirection"][1:] == pytest.approx([0.342, 0.940], abs=1e-3)
    assert not made.notes


def test_the_local_field_is_rid_of_what_v_sharp_has_left(monkeypatch):
    echoes = scanned(9.0)
    chain = "fdl_bidsapp.imaging.reconstruction.remaining_background"
    made = reconstruct(echoes, "tkd")
    monkeypatch.setattr(chain, lambda field, *_, **__: np.zeros_like(field))
    without = reconstruct(echoes, "tkd")
    truth = field_from_susceptibility(
        np.where(IRON, 0.2, 0.0), SPACING, field_direction(echoes.affine)
    )

    def error(found):
        return (found - truth)[made.mask].std()

    assert error(made.local_field) < 0.9 * error(without.local_field)


def test_phase_of_the_other_sense_gives_the_same_map(echoes):
    one = reconstruct(echoes, "tkd")
    other = reconstruct(replace(echoes, phase=-echoes.phase), "tkd")
    np.testing.assert_allclose(one.maps["qsm"], other.maps["qsm"], atol=2e-3)
    np.testing.assert_allclose(one.maps["swi"], other.maps["swi"], atol=1e-3)
    assert (one.parameters["PhaseSign"], other.parameters["PhaseSign"]) == (1, -1)
    assert "turned round" in other.notes[0]


def test_phase_in_the_numbers_of_a_scanner_gives_the_same_map(echoes):
    stored = np.round((echoes.phase + np.pi) / (2 * np.pi) * 4095).astype(np.float32)
    one = reconstruct(echoes, "tkd")
    other = reconstruct(replace(echoes, phase=stored), "tkd")
    np.testing.assert_allclose(one.maps["qsm"], other.maps["qsm"], atol=2e-3)
    assert "scaled" in other.notes[0]
    assert other.parameters["PhaseScaling"] == other.notes[0]


def test_one_echo_is_enough(echoes):
    single = replace(
        echoes,
        magnitude=echoes.magnitude[..., -1:],
        phase=echoes.phase[..., -1:],
        echo_times=TIMES[-1:],
    )
    chi = reconstruct(single, "tkd").maps["qsm"]
    assert chi[IRON].mean() - chi[TISSUE].mean() > 0.08


def test_a_brain_mask_is_taken_as_given(echoes):
    given = distance((0, 0, 0)) < 40
    made = reconstruct(echoes, "tkd", brain=given)
    assert not (made.mask & ~given).any()
    assert made.parameters["BrainMask"] == "given"


def test_images_without_a_brain_are_refused(echoes):
    nothing = np.zeros_like(echoes.magnitude)
    with pytest.raises(DataError, match=r"no brain was found in the magnitude.*desc-brain_mask"):
        reconstruct(replace(echoes, magnitude=nothing), "tkd")
    with pytest.raises(DataError, match="in the brain mask"):
        reconstruct(echoes, "tkd", brain=np.zeros(SHAPE, bool))


def test_an_inversion_of_ones_own_is_given_what_it_needs(echoes):
    seen = {}

    def invert(local, mask, spacing, direction, weight, radians_per_ppm):
        seen.update(spacing=spacing, turn=radians_per_ppm, weight=weight)
        return local

    made = reconstruct(echoes, invert)
    np.testing.assert_allclose(
        made.maps["qsm"][made.mask],
        (made.local_field - made.local_field[made.mask].mean())[made.mask],
        atol=1e-6,
    )
    np.testing.assert_allclose(seen["spacing"], SPACING)
    assert seen["turn"] == pytest.approx(2 * np.pi * 42.577 * 3 * 0.012)
    assert seen["weight"].shape == SHAPE


FLUID = distance((0, 10, 8)) < 13


@pytest.fixture(scope="module")
def with_ventricle(echoes) -> RawEchoes:
    """The same brain with a ball of fluid, which is diamagnetic against tissue."""
    affine = oblique()
    chi = np.where(IRON, 0.2, np.where(FLUID, -0.03, 0.0))
    field = field_from_susceptibility(chi, SPACING, field_direction(affine))
    rate = np.where(IRON, 70.0, np.where(FLUID, 1.0, 20.0))
    signal = multi_echo_signal(np.where(BRAIN, 1.0, 0.0), rate, field, TIMES, 3.0)
    noise = np.random.default_rng(0).normal(0, 0.005, (*signal.shape, 2))
    signal = signal + noise[..., 0] + 1j * noise[..., 1]
    return replace(
        echoes,
        magnitude=np.abs(signal).astype(np.float32),
        phase=np.angle(signal).astype(np.float32),
    )


def test_fluid_is_the_reference_where_it_is_asked_for(with_ventricle):
    brain = reconstruct(with_ventricle, "tv")
    fluid = reconstruct(with_ventricle, "tv", reference="csf")
    inside = distance((0, 10, 8)) < 8
    assert abs(fluid.maps["qsm"][inside].mean()) < 0.006
    assert brain.maps["qsm"][inside].mean() < -0.015
    # One constant is all that differs.
    assert np.ptp((fluid.maps["qsm"] - brain.maps["qsm"])[brain.mask]) < 1e-5
    assert not fluid.notes
    assert fluid.parameters["SusceptibilityReference"] == REFERENCES["csf"]
    assert brain.parameters["SusceptibilityReference"] == REFERENCES["brain"]


def test_without_fluid_the_brain_is_the_reference_and_it_is_said(echoes):
    brain = reconstruct(echoes, "tkd")
    other = reconstruct(echoes, "tkd", reference="csf")
    np.testing.assert_array_equal(brain.maps["qsm"], other.maps["qsm"])
    assert other.parameters["SusceptibilityReference"] == REFERENCES["brain"]
    assert "no cerebrospinal fluid" in other.notes[-1]


def test_the_references_are_those_of_the_command_line():
    assert tuple(REFERENCES) == QSM_REFERENCES
