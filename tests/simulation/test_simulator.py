"""A scan of a label map: reproducible, left stays left, and each effect does what it says."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.physics.forward import average_slices
from fdl_bidsapp.simulation import acquisition
from fdl_bidsapp.simulation.acquisition import field_in_scanner, scan_grid
from fdl_bidsapp.simulation.anatomy import build_body, draw_deformation
from fdl_bidsapp.simulation.parameters import all_off, draw_values, effects
from fdl_bidsapp.simulation.physiology import draw_properties, echo_times, steady_state
from fdl_bidsapp.simulation.simulator import reoriented, simulate_label_map

BOX = (66.0, 78.0, 66.0)
QUIET = {
    "echoes": 4,
    "in_plane": 2.0,
    "slice_thickness": 2.0,
    "inversion": "tikhonov",
    "regularisation": 0.0,
}
SHAPE = {  # Effects that move the anatomy or the grid, so that voxels cannot be compared.
    "mirrored",
    "head_rotation",
    "head_shift",
    "head_scaling",
    "head_warp",
    "in_plane",
    "slice_thickness",
    "obliquity",
    "slab",
    "slab_offset",
    "orientation",
}


@pytest.fixture(scope="module")
def scan(made_up_head):
    # A coarser field of the whole head is good enough where scans are compared with each other.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acquisition, "COARSE", 6.0)
        yield _simulator(made_up_head)


def _simulator(made_up_head):
    @cache
    def simulated(seed=0, shortcut=False, box=BOX, **forced):
        values = all_off({**QUIET, **forced})
        return simulate_label_map(made_up_head, seed, values, box=box, shortcut=shortcut)

    return simulated


def voxels(scan, structure):
    wanted = [la.index for la in nuclei() if la.structure == structure]
    return torch.isin(scan.labels, torch.tensor(wanted, dtype=torch.uint8))


def centres(scan):
    """Return the scanner coordinates of each nucleus that is there, by label."""
    found = {}
    for label in nuclei():
        places = np.argwhere((scan.labels == label.index).numpy())
        if len(places):
            found[label] = scan.affine[:3, :3] @ places.mean(0) + scan.affine[:3, 3]
    return found


def test_a_scan_is_whole(scan):
    one = scan()
    assert set(one.maps) == {"qsm", "r2star", "imag", "swi"}
    for image in one.maps.values():
        assert image.shape == one.labels.shape == one.susceptibility.shape
        assert image.dtype == torch.float32
        assert torch.isfinite(image).all()
    assert one.signal.shape == (4, *one.labels.shape)
    assert set(one.labels.unique().tolist()) == set(range(9))


def test_the_same_seed_and_values_give_the_same_scan_and_others_another(scan, made_up_head):
    forced = {"texture": 1.0, "snr": 50.0, "head_warp": 1.0, "motion": 0.5, "streaks": 0.01}
    one = scan(**forced)
    again = simulate_label_map(made_up_head, 0, all_off({**QUIET, **forced}), box=BOX)
    for contrast in one.maps:
        torch.testing.assert_close(one.maps[contrast], again.maps[contrast], rtol=0, atol=0)
    assert torch.any(one.labels != scan(seed=1, **forced).labels)


def test_r2star_and_susceptibility_come_back_from_the_signal(scan):
    one = scan()
    for structure in ("red_nucleus", "dentate_nucleus"):
        deep = voxels(one, structure) & (one.susceptibility > 0.08)
        for contrast, true in (("r2star", one.r2star), ("qsm", one.susceptibility)):
            found = one.maps[contrast]
            around = one.depth > 12
            around &= ~torch.isin(one.labels, torch.arange(1, 9, dtype=torch.uint8))
            contrast_found = found[deep].mean() - found[around].median()
            contrast_true = true[deep].mean() - true[around].median()
            assert contrast_found == pytest.approx(float(contrast_true), rel=0.25)


def test_nuclei_have_the_tissue_that_was_drawn(scan, made_up_head):
    tissues = draw_properties(0, all_off(QUIET))
    one = scan()
    for structure in ("red_nucleus", "substantia_nigra"):
        inside = voxels(one, structure) & (one.susceptibility > 0.09)
        assert one.susceptibility[inside].median() == pytest.approx(
            tissues[structure].chi, rel=0.03
        )
        assert one.r2star[inside].median() == pytest.approx(tissues[structure].r2star, rel=0.03)


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize(
    "forced",
    [
        {},
        {"mirrored": "yes"},
        {"mirrored": "yes", "head_rotation": 15.0, "obliquity": 35.0, "orientation": "LPS"},
        {"orientation": "PIR", "nucleus_shift": 1.6},
        {"orientation": "LIA", "mirrored": "yes", "head_warp": 3.5},
    ],
)
def test_left_and_right_are_never_swapped(scan, shortcut, forced):
    for label, centre in centres(scan(shortcut=shortcut, **forced)).items():
        assert (centre[0] < 0) == (label.hemisphere == "L"), label.name
    one = scan(shortcut=shortcut, **forced)
    # The image has its iron where the labels are.
    red, all_of_it = voxels(one, "red_nucleus"), one.depth > 10
    assert one.maps["qsm"][red].mean() > one.maps["qsm"][all_of_it].mean() + 0.03


def test_a_mirrored_head_is_the_mirror_image(scan):
    straight, mirror = centres(scan()), centres(scan(mirrored="yes"))
    partner = {"L": "R", "R": "L"}
    for label, centre in straight.items():
        other = next(
            c
            for la, c in mirror.items()
            if (la.structure, la.hemisphere) == (label.structure, partner[label.hemisphere])
        )
        np.testing.assert_allclose(other, centre * [-1, 1, 1], atol=0.8)


def test_storing_in_another_orientation_moves_nothing_in_the_scanner(scan):
    one = scan(snr=50.0)
    for codes in ("LAS", "LPS", "PIR", "ASL"):
        turned = reoriented(one, codes)
        assert "".join(np.array(_codes(turned.affine))) == codes
        for label, centre in centres(turned).items():
            np.testing.assert_allclose(centre, centres(one)[label], atol=1e-3)
        back = reoriented(turned, "RAS")
        torch.testing.assert_close(back.maps["qsm"], one.maps["qsm"], rtol=0, atol=0)
        torch.testing.assert_close(back.signal, one.signal, rtol=0, atol=0)
        np.testing.assert_allclose(back.affine, one.affine, atol=1e-6)


def _codes(affine):
    import nibabel as nib

    return nib.aff2axcodes(affine)


def test_the_whole_brain_is_in_the_scan_and_a_slab_holds_the_nuclei(scan):
    whole = scan(box=None, shortcut=True, in_plane=2.5, slice_thickness=2.5)
    extent = np.array(whole.labels.shape) * 2.5
    assert np.all(extent > [112, 136, 112])
    assert set(whole.labels.unique().tolist()) == set(range(9))
    slab = scan(box=None, shortcut=True, in_plane=2.5, slice_thickness=2.5, slab=60.0)
    assert slab.labels.shape[2] == 24
    assert set(slab.labels.unique().tolist()) == set(range(9))


def test_the_field_of_a_region_is_that_of_the_whole_head(made_up_head):
    # The region does not hold the sinus, but it feels it.
    values = all_off({**QUIET, "in_plane": 2.0, "slice_thickness": 2.0, "obliquity": 20.0})
    values |= {"shim_order": 0, "sinus_field": 1.0}
    deformation, tissues = draw_deformation(made_up_head, 0, values), draw_properties(0, values)
    fields = {}
    for name, box in (("whole", (152, 176, 152)), ("region", (60, 70, 60))):
        grid = scan_grid(made_up_head, deformation, 0, values, box)
        body = build_body(
            made_up_head, deformation, tissues, values, 0, grid.fine_shape, grid.fine_affine
        )
        field = field_in_scanner(made_up_head, deformation, tissues, body, grid, values)
        fields[name] = average_slices(field, grid.parts), grid.affine
    offset = np.linalg.inv(fields["whole"][1]) @ fields["region"][1] @ [0, 0, 0, 1]
    start = np.round(offset[:3]).astype(int)
    np.testing.assert_allclose(offset[:3], start, atol=0.01)
    region = fields["region"][0]
    part = tuple(slice(a, a + n) for a, n in zip(start, region.shape, strict=True))
    whole = fields["whole"][0][part]
    inner = (slice(4, -4),) * 3
    difference = (whole - region)[inner]
    # It has a constant of its own: the mean over its brain.
    assert difference.std() < 0.1 * whole[inner].std()


IMAGES = ("qsm", "r2star", "imag", "swi")


def difference(one, other, contrast):
    """Root mean square change inside the brain, relative to the image's own spread."""
    inside = one.depth > 3
    change = (one.maps[contrast] - other.maps[contrast])[inside]
    return float(change.square().mean().sqrt() / one.maps[contrast][inside].std())


@pytest.mark.parametrize(
    ("effect", "contrast"),
    [
        ("nucleus_shift", "qsm"),
        ("nucleus_scaling", "qsm"),
        ("nucleus_rotation", "qsm"),
        ("nucleus_warp", "qsm"),
        ("nucleus_edge", "qsm"),
        ("dentate_folding", "qsm"),
        ("dentate_hilum", "qsm"),
        ("age", "qsm"),
        ("diagnosis", "qsm"),
        ("iron", "qsm"),
        ("spread", "r2star"),
        ("proton_density", "imag"),
        ("texture", "r2star"),
        ("nucleus_gradient", "qsm"),
        ("static_decay", "r2star"),
        ("veins", "swi"),
        ("microbleeds", "r2star"),
        ("calcification", "qsm"),
        ("shim_order", "swi"),
        ("first_echo", "imag"),
        ("last_echo", "imag"),
        ("echoes", "imag"),
        ("flip_angle", "imag"),
        ("repetition_time", "imag"),
        ("snr", "r2star"),
        ("noise_unevenness", "imag"),
        ("bias", "imag"),
        ("coil_phase", "swi"),
        ("acquired", "imag"),
        ("motion", "imag"),
        ("breathing", "r2star"),
        ("slice_unevenness", "imag"),
        ("mask", "qsm"),
        ("mask_erosion", "qsm"),
        ("mask_unevenness", "qsm"),
        ("field_map", "qsm"),
        ("background", "qsm"),
        ("sharp_radius", "qsm"),
        ("inversion", "qsm"),
        ("regularisation", "qsm"),
        ("streaks", "qsm"),
        ("reference_shift", "qsm"),
        ("qsm_gain", "qsm"),
        ("blur", "qsm"),
        ("r2star_fit", "r2star"),
        ("imag", "imag"),
        ("skull", "imag"),
        ("homogeneity", "imag"),
        ("swi_width", "swi"),
        ("swi_power", "swi"),
        ("swi_echo", "swi"),
        ("sinus_field", "swi"),
        ("field_strength", "r2star"),
    ],
)
def test_each_effect_changes_what_it_should_at_its_harsh_end(scan, effect, contrast):
    base = {"snr": 40.0} if effect in ("noise_unevenness", "r2star_fit") else {}
    base |= {"flip_angle": 25.0} if effect == "repetition_time" else {}
    base |= {"bias": 0.5} if effect == "homogeneity" else {}
    base |= {"homogeneity": 0.0} if effect == "bias" else {}
    base |= {"field_strength": 7.0} if effect == "static_decay" else {}
    base |= {"echoes": 8} if effect == "swi_echo" else {}
    box = None if effect in ("mask", "mask_erosion", "skull") else BOX
    coarse = {"in_plane": 3.0, "slice_thickness": 3.0} if box is None else {}
    # What is in the tissue shows by the short cut too.
    shortcut = effects()[effect].group in ("anatomy", "tissue")
    one = scan(box=box, shortcut=shortcut, **base, **coarse)
    other = scan(box=box, shortcut=shortcut, **{**base, **coarse, effect: "harsh"})
    assert all(torch.isfinite(image).all() for image in other.maps.values())
    if effect == "skull":
        assert (other.maps["imag"][one.depth < -3] == 0).all()
        assert (one.maps["imag"][(one.depth < -3) & (one.depth > -8)] > 0).any()
    else:
        assert difference(one, other, contrast) > 0.005


def test_every_effect_is_put_to_the_test():
    cases = test_each_effect_changes_what_it_should_at_its_harsh_end.pytestmark[0].args[1]
    assert {effect for effect, _ in cases} | SHAPE == set(effects())


def test_folds_and_hilum_pale_the_dentate_and_leave_its_label(scan):
    solid = scan()
    folded = scan(dentate_folding=1.0, dentate_hilum=1.0)
    torch.testing.assert_close(solid.labels, folded.labels)
    inside = voxels(solid, "dentate_nucleus")
    assert folded.susceptibility[inside].std() > 1.5 * solid.susceptibility[inside].std()
    # The mean over what a rater outlines stays that of the table.
    assert folded.susceptibility[inside].mean() == pytest.approx(
        float(solid.susceptibility[inside].mean()), rel=0.35
    )


def test_the_short_cut_resembles_the_full_path(scan):
    full, short = scan(), scan(shortcut=True)
    torch.testing.assert_close(full.labels, short.labels)
    for contrast in IMAGES:
        inside = full.depth > 8
        pair = torch.stack([full.maps[contrast][inside], short.maps[contrast][inside]])
        assert float(torch.corrcoef(pair)[0, 1]) > (0.6 if contrast == "swi" else 0.8), contrast


def test_tissue_follows_age_diagnosis_and_field():
    child, adult = (draw_properties(0, all_off({"age": age})) for age in (3.0, 60.0))
    assert child["red_nucleus"].chi < 0.4 * adult["red_nucleus"].chi
    assert child["white_matter"].r2star < adult["white_matter"].r2star
    ill = draw_properties(0, all_off({"diagnosis": "psp"}))
    assert ill["subthalamic_nucleus"].chi > 1.2 * adult["subthalamic_nucleus"].chi
    assert ill["caudate"] == adult["caudate"]
    high = draw_properties(0, all_off({"field_strength": 7.0, "static_decay": 0.26}))
    low = draw_properties(0, all_off({"static_decay": 0.26}))
    # Peters et al. (2007): 66 ms at 3 T and 33 ms at 7 T.
    assert high["cortical_grey"].r2star / low["cortical_grey"].r2star == pytest.approx(2, rel=0.03)


def test_tissues_of_a_kind_vary_together():
    heads = [draw_properties(s, all_off({"spread": 1.0})) for s in range(300)]

    def chi(name):
        return [head[name].chi for head in heads]

    assert np.corrcoef(chi("red_nucleus"), chi("dentate_nucleus"))[0, 1] == pytest.approx(
        0.5, abs=0.15
    )
    assert np.corrcoef(chi("white_matter"), chi("brainstem"))[0, 1] > 0.65
    assert abs(np.corrcoef(chi("csf"), chi("white_matter"))[0, 1]) < 0.2
    # Iron moves both.
    r2star = [head["red_nucleus"].r2star for head in heads]
    assert np.corrcoef(chi("red_nucleus"), r2star)[0, 1] > 0.65


def test_steady_state_at_the_ernst_angle_is_the_largest_signal():
    ernst = np.degrees(np.arccos(np.exp(-0.04 / 1.2)))
    signals = [
        np.sin(np.deg2rad(a)) * steady_state(1.2, 0.04, a) for a in (ernst - 4, ernst, ernst + 4)
    ]
    assert signals[1] == max(signals)


def test_echoes_come_earlier_at_high_field():
    assert echo_times(all_off({"field_strength": 7.0}))[-1] < 0.7 * echo_times(all_off())[-1]


def test_draws_of_the_whole_range_run(made_up_head):
    for seed in (1, 2, 3):
        values = draw_values(seed, "full", {"in_plane": 2.0, "slice_thickness": 3.0})
        one = simulate_label_map(made_up_head, seed, values, box=(60, 70, 60))
        assert all(torch.isfinite(image).all() for image in one.maps.values())
        assert one.labels.max() > 0
