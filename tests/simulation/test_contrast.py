from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.ndimage as ndi

from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.simulation.contrast import (
    Protocol,
    compute_maps,
    simulate_signal,
    susceptibility_map,
    trusted_phase,
)
from fdl_bidsapp.simulation.head import Head, build_head
from fdl_bidsapp.simulation.scan import scan_geometry
from fdl_bidsapp.simulation.tissue import IRON_RICH, Person, draw_tissues

SHAPE, AFFINE = scan_geometry((2.5, 2.5, 2.5), (4, -3, 2))
PROTOCOL = Protocol(snr=100, bias=0.1)
TISSUES = draw_tissues(np.random.default_rng(0), Person(age=70), spread=0)
SURROUNDINGS = (
    "white_matter",
    "cerebellar_white_matter",
    "brainstem",
    "cortical_grey",
    "cerebellar_cortex",
)
STRUCTURES = ("red_nucleus", "dentate_nucleus", "substantia_nigra")


@pytest.fixture(scope="module")
def head() -> Head:
    return build_head(np.random.default_rng(0), SHAPE, AFFINE, variation=0.5)


@pytest.fixture(scope="module")
def scan(head):
    return simulate_signal(head, TISSUES, AFFINE, PROTOCOL, np.random.default_rng(0))


@pytest.fixture(scope="module")
def maps(head, scan):
    return compute_maps(scan[0], head.brain, AFFINE, PROTOCOL)


def contrast(head, image, structure):
    """Mean of a structure less that of the brain tissue around it."""
    inside = np.isin(head.labels, [la.index for la in nuclei() if la.structure == structure])
    near = ndi.binary_dilation(inside, iterations=4) & ~ndi.binary_dilation(inside)
    tissue = sum(head.weights[name] for name in SURROUNDINGS)
    around = near & (head.labels == 0) & (tissue > 0.9)
    assert np.count_nonzero(inside) > 10
    assert np.count_nonzero(around) > 25
    return float(image[inside].mean() - image[around].mean())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nuclei_are_bright_in_qsm_and_r2star_and_dark_in_magnitude(head, maps, structure):
    assert 0.02 < contrast(head, maps["qsm"], structure) < TISSUES[structure].chi + 0.03
    assert contrast(head, maps["r2star"], structure) > 5
    assert contrast(head, maps["imag"], structure) < -0.02
    assert contrast(head, maps["swi"], structure) < -0.03


@pytest.mark.parametrize("structure", ["red_nucleus", "substantia_nigra"])
def test_iron_darkens_the_late_echoes(head, scan, structure):
    # By R2* alone: without it, the grey matter of nuclei is brighter than white matter.
    magnitude = np.abs(scan[0])
    late = magnitude[..., -1] / magnitude[..., 0]
    assert contrast(head, late, structure) < -0.03


def test_susceptibility_of_the_map_is_that_of_the_tissues(head):
    chi = susceptibility_map(head, TISSUES, np.random.default_rng(0), texture=0)
    for tissue in ("white_matter", "csf", "air"):
        inside = head.weights[tissue] > 0.999
        np.testing.assert_allclose(chi[inside], TISSUES[tissue].chi, atol=0.02)


def test_qsm_follows_the_true_map_and_is_zero_outside_the_mask(head, scan, maps):
    inside = maps["qsm"] != 0
    assert not np.any(inside & ~head.brain)
    assert np.count_nonzero(inside) > 0.6 * np.count_nonzero(head.brain)
    assert maps["qsm"][inside].mean() == pytest.approx(0, abs=1e-4)
    deep = ndi.binary_erosion(inside, iterations=3)
    names = (*IRON_RICH, "thalamus", "white_matter", "cortical_grey", "csf")
    places = [deep & (head.weights[name] > 0.7) for name in names]
    true, mapped = ([image[place].mean() for place in places] for image in (scan[1], maps["qsm"]))
    assert np.corrcoef(true, mapped)[0, 1] > 0.8
    assert 0.4 < np.polyfit(true, mapped, 1)[0] < 1.05


def test_r2star_of_white_matter_is_that_of_the_table(head, maps):
    inside = ndi.binary_erosion(head.brain, iterations=4) & (head.weights["white_matter"] > 0.95)
    assert np.median(maps["r2star"][inside]) == pytest.approx(
        TISSUES["white_matter"].r2star, rel=0.15
    )


def test_veins_are_darker_in_swi_than_in_magnitude(head, maps):
    vein = (head.weights["venous_blood"] > 0.5) & ndi.binary_erosion(head.brain, iterations=4)
    around = ndi.binary_dilation(vein, iterations=2) & (head.weights["venous_blood"] < 0.05)
    around &= head.brain

    def ratio(image):
        return image[vein].mean() / image[around].mean()

    assert ratio(maps["swi"]) < 0.9 * ratio(maps["imag"])


def test_swi_darkens_paramagnetic_phase_by_the_fourth_power_and_no_other():
    shape = (32, 32, 32)
    phase = np.zeros(shape, np.float32)
    phase[10, 16], phase[22, 16] = 0.8, -0.8
    signal = 2 * np.exp(1j * phase)[..., None] * np.ones(5)
    brain = np.zeros(shape, bool)
    brain[4:28, 4:28, 4:28] = True
    swi = compute_maps(signal.astype(np.complex64), brain, np.eye(4), PROTOCOL)["swi"]
    # The high-pass takes a little of the phase.
    assert 2 * (1 - 0.8 / np.pi) ** 4 <= swi[10, 16, 16] < 2 * (1 - 0.7 / np.pi) ** 4
    assert swi[22, 16, 16] == pytest.approx(2)


def test_every_map_is_finite_and_in_its_range(maps):
    assert set(maps) == {"qsm", "r2star", "imag", "swi"}
    for image in maps.values():
        assert image.shape == SHAPE
        assert image.dtype == np.float32
        assert np.isfinite(image).all()
    assert maps["r2star"].min() >= 0
    assert maps["r2star"].max() <= 400
    assert maps["imag"].min() >= 0
    assert maps["swi"].min() >= 0


def test_noise_follows_the_protocol(head):
    air = head.weights["air"] > 0.999
    for snr in (20, 80):
        signal, _ = simulate_signal(
            head, TISSUES, AFFINE, replace(PROTOCOL, snr=snr), np.random.default_rng(1)
        )
        assert signal[air].real.std() == pytest.approx(0.65 / snr, rel=0.02)


def test_a_higher_field_decays_faster(head):
    strong = replace(PROTOCOL, field_strength=7.0)
    at_7t = draw_tissues(np.random.default_rng(0), Person(age=70), spread=0, field_strength=7.0)
    signal, _ = simulate_signal(head, at_7t, AFFINE, strong, np.random.default_rng(0))
    weak, _ = simulate_signal(head, TISSUES, AFFINE, PROTOCOL, np.random.default_rng(0))

    def decay(data):
        magnitude = np.abs(data[head.brain])
        return np.median(np.log(magnitude[:, 0] / magnitude[:, -1]))

    assert decay(signal) > 1.8 * decay(weak)


def test_the_inversion_is_the_one_asked_for(head, scan, maps):
    other = compute_maps(
        scan[0], head.brain, AFFINE, replace(PROTOCOL, inversion="thresholded_division")
    )
    inside = maps["qsm"] != 0
    assert np.abs(other["qsm"] - maps["qsm"])[inside].max() > 0.01
    # Both estimate the same susceptibility.
    assert np.corrcoef(other["qsm"][inside], maps["qsm"][inside])[0, 1] > 0.8
    np.testing.assert_array_equal(other["r2star"], maps["r2star"])


def test_susceptibility_is_recovered_where_voxels_are_long():
    shape, affine = scan_geometry((2.2, 2.2, 3.5))
    head = build_head(np.random.default_rng(0), shape, affine, variation=0.5)
    signal, chi = simulate_signal(head, TISSUES, affine, PROTOCOL, np.random.default_rng(0))
    qsm = compute_maps(signal, head.brain, affine, PROTOCOL)["qsm"]
    deep = ndi.binary_erosion(qsm != 0, iterations=3)
    assert np.corrcoef(qsm[deep], chi[deep])[0, 1] > 0.7


def test_phase_is_trusted_where_signal_lasts():
    brain = np.zeros((24, 24, 24), bool)
    brain[2:22, 2:22, 2:22] = True
    late = np.where(brain, 1.0, 0.0).astype(np.float32)
    late[2:8, 2:8, 2:8] = 0.02
    late[12:15, 12:15, 12:15] = 0.05
    mask = trusted_phase(late, brain)
    assert not mask[2:7, 2:7, 2:7].any()
    # A dark nucleus within the brain is no reason to lose it.
    assert mask[12:15, 12:15, 12:15].all()
    assert np.count_nonzero(mask) > 0.9 * np.count_nonzero(brain)
    assert not np.any(mask & ~brain)
    np.testing.assert_array_equal(trusted_phase(np.zeros_like(late), brain), brain)


def test_swi_is_made_of_the_echo_nearest_to_20_ms():
    assert Protocol(echo_times=(0.005, 0.012, 0.021, 0.03)).swi_echo == 2
    assert Protocol(echo_times=(0.003, 0.009)).swi_echo == 1
