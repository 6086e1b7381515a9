"""The steps of one scan as plain functions."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from fdl_bidsapp.bids.inputs import Scan, Source
from fdl_bidsapp.errors import AmbiguousInputError, DataError, ImageError, InputMissingError
from fdl_bidsapp.imaging.confidence import INTERCEPT, SIGNS, Calibration
from fdl_bidsapp.labels import by_abbreviation, mirrored
from fdl_bidsapp.models.bundle import load_bundle
from fdl_bidsapp.models.fdl import ModelSpec
from fdl_bidsapp.pipeline import (
    Canvas,
    ScanImages,
    choose_target,
    load_canvas,
    load_images,
    read_scan,
    save_canvas,
    save_images,
    segment_canvas,
    to_canvas,
    to_native,
)

ALL = ("qsm", "r2star", "imag", "swi")
CPU = torch.device("cpu")


def blob_labels():
    return by_abbreviation(["RNL", "RNR"])


SIDES = (("RNL",), ("RNR",))
"""What the blob model finds, as two regions."""


@pytest.fixture
def write(tmp_path, blobs):
    """Give the writer of a contrast's file."""

    def writer(contrast: str, name: str = "", **grid: object) -> Source:
        path = tmp_path / (name or f"{contrast}.nii")
        blobs().image(contrast, **grid).to_filename(path)
        return Source(contrast, (path,), "map")

    return writer


@pytest.mark.parametrize(
    ("available", "chosen"),
    [
        (["swi", "imag", "r2star", "qsm"], "qsm"),
        (["swi", "imag", "r2star"], "r2star"),
        (["swi", "imag"], "imag"),
        (["swi"], "swi"),
    ],
)
def test_the_best_contrast_is_segmented(available, chosen):
    assert choose_target(available, "auto", ALL) == chosen


def test_only_what_the_model_takes_is_segmented():
    assert choose_target(["qsm", "imag"], "auto", ("imag",)) == "imag"
    with pytest.raises(InputMissingError, match="no contrast that the model segments"):
        choose_target(["qsm"], "auto", ("imag",))
    with pytest.raises(DataError, match="does not segment qsm"):
        choose_target(["qsm", "imag"], "qsm", ("imag",))
    with pytest.raises(InputMissingError, match="no imag image; it has qsm"):
        choose_target(["qsm"], "imag", ALL)


def test_a_scan_is_read_onto_the_grid_of_its_target(write):
    qsm = write("qsm")
    other = write("r2star", shape=(16, 16, 16), affine=np.diag([2.0, 2, 2, 1]))
    images = read_scan(Scan((), (other, qsm)), "auto", ALL)
    assert images.target == "qsm"
    assert {name: data.shape for name, data in images.maps.items()} == {
        "qsm": (32, 32, 32),
        "r2star": (32, 32, 32),
    }
    assert all(data.dtype == np.float32 for data in images.maps.values())
    assert images.notes == ("r2star was resampled to the grid of qsm",)
    images = read_scan(Scan((), (other, qsm)), "r2star", ALL)
    assert images.maps["qsm"].shape == (16, 16, 16)


def test_a_scan_s_own_error_is_its_error(write):
    error = AmbiguousInputError("two candidates", "choose")
    with pytest.raises(AmbiguousInputError):
        read_scan(Scan((), (write("qsm"),), error=error), "auto", ALL)


def test_the_brain_volume_comes_from_the_mask(tmp_path, write):
    mask = tmp_path / "mask.nii"
    data = np.zeros((10, 10, 10), np.uint8)
    data[2:5, 2:5, 2:5] = 1
    nib.Nifti1Image(data, np.diag([2.0, 1, 1, 1])).to_filename(mask)
    scan = Scan((), (write("qsm"),), brain_mask=mask)
    assert read_scan(scan, "auto", ALL).brain_volume == 54
    mask.write_text("broken")
    images = read_scan(scan, "auto", ALL)
    assert images.brain_volume is None
    assert any("brain volume is not known" in note for note in images.notes)


def test_the_brain_s_mean_susceptibility_is_told(tmp_path, write):
    qsm, path = write("qsm"), tmp_path / "mask.nii"
    values = np.tile(np.linspace(-0.1, 0.3, 32, dtype=np.float32), (32, 32, 1))
    values[:6] = 0
    nib.Nifti1Image(values, np.eye(4)).to_filename(qsm.paths[0])
    for shape, size in ((32, 1.0), (16, 2.0)):
        # From 4 to 27, where the map is not 0.
        mask = np.zeros((shape,) * 3, np.uint8)
        mask[(slice(shape // 8, -shape // 8),) * 3] = 1
        affine = np.diag([size, size, size, 1])
        affine[:3, 3] = (size - 1) / 2
        nib.Nifti1Image(mask, affine).to_filename(path)
        images = read_scan(Scan((), (qsm,), brain_mask=path), "auto", ALL)
        assert images.brain_qsm == pytest.approx(values[6, 0, 4:28].mean())
    assert read_scan(Scan((), (qsm,)), "auto", ALL).brain_qsm is None
    other = Scan((), (write("imag"),), brain_mask=path)
    assert read_scan(other, "auto", ALL).brain_qsm is None


def test_a_target_without_contrast_is_refused_by_name(tmp_path, write):
    source = write("qsm")
    data = np.zeros((32, 32, 32), np.float32)
    data[10:20, 10:20, 10:20] = 1
    nib.Nifti1Image(data, np.eye(4)).to_filename(source.paths[0])
    with pytest.raises(ImageError, match="no contrast") as caught:
        read_scan(Scan((), (source,)), "auto", ALL)
    assert caught.value.path == str(source.paths[0])


def test_images_and_canvas_survive_the_way_through_a_file(tmp_path, write):
    scan = Scan((), (write("qsm"), write("imag")), notes=("ein Vermerk, µ",))
    images = read_scan(scan, "auto", ALL)
    spec = ModelSpec("test", method="multimodal", contrasts=ALL, grid_shape=(20, 20, 20))
    canvas = to_canvas(images, spec)
    path = str(tmp_path / "file.npz")
    save_images(path, images)
    read = load_images(path)
    assert (read.target, read.notes, read.brain_volume) == ("qsm", images.notes, None)
    np.testing.assert_array_equal(read.affine, images.affine)
    np.testing.assert_equal(read.maps, images.maps)
    save_images(path, replace(images, brain_volume=12.5, brain_qsm=-0.01))
    read = load_images(path)
    assert (read.brain_volume, read.brain_qsm) == (12.5, -0.01)
    save_canvas(path, canvas)
    again = load_canvas(path)
    np.testing.assert_equal(vars(again), vars(canvas))
    assert len(again.starts) > 0


def test_only_multimodal_models_get_all_contrasts(write):
    images = read_scan(Scan((), (write("qsm"), write("imag"))), "auto", ALL)
    late = ModelSpec("test", method="late", contrasts=ALL)
    assert list(to_canvas(images, late).maps) == ["qsm"]
    multimodal = replace(late, method="multimodal")
    assert list(to_canvas(images, multimodal).maps) == ["qsm", "imag"]


def test_the_windows_together_hold_the_whole_field_of_view(write):
    images = read_scan(Scan((), (write("qsm", shape=(90, 40, 32)),)), "auto", ALL)
    spec = ModelSpec("test", contrasts=ALL, grid_shape=(32, 32, 32))
    canvas = to_canvas(images, spec)
    seen = np.zeros(canvas.maps["qsm"].shape, bool)
    for i, j, k in (*canvas.starts, *canvas.reserve):
        seen[i : i + 32, j : j + 32, k : k + 32] = True
    assert seen.all()
    assert not {tuple(start) for start in canvas.starts} & {tuple(s) for s in canvas.reserve}


@pytest.fixture
def windows_run(monkeypatch, blob_model):
    """Give a function that segments a canvas and tells which windows the network saw."""
    bundle = load_bundle(blob_model)

    def run(canvas: Canvas) -> tuple[int, np.ndarray]:
        from fdl_bidsapp.models import inference

        seen = []
        predict = inference.predict

        def counted(*arguments: object, **options: object) -> np.ndarray:
            seen.append(1)
            return predict(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(inference, "predict", counted)
        probabilities, _ = segment_canvas(canvas, bundle, bundle.network(), CPU)
        monkeypatch.setattr(inference, "predict", predict)
        return len(seen), probabilities

    return run


def canvas_of(data: np.ndarray, starts: list, reserve: list) -> Canvas:
    bounds = np.array([(0, length) for length in data.shape])
    corners = np.array(reserve, int).reshape(-1, 3)
    return Canvas("qsm", {"qsm": data}, np.eye(4), bounds, np.array(starts), corners)


def test_one_window_is_enough_where_it_holds_all_with_room(windows_run, blobs):
    starts = [(0, 0, 0), (16, 0, 0), (32, 0, 0)]
    inside = blobs(bright=(5, 16, 16), dark=(16, 16, 16)).data("qsm", (64, 32, 32))
    assert windows_run(canvas_of(inside, starts, []))[0] == 1
    near_the_face = blobs(bright=(5, 16, 16), dark=(26, 16, 16)).data("qsm", (64, 32, 32))
    assert windows_run(canvas_of(near_the_face, starts, []))[0] == 3


@pytest.mark.parametrize(
    ("made_for", "choice", "averaged"),
    [(False, "auto", False), (True, "auto", True), (True, "no", False), (False, "yes", True)],
)
def test_mirror_images_are_averaged_as_the_model_says_or_as_asked(
    blob_model, blobs, made_for, choice, averaged
):
    class LeftIsBrighter(nn.Module):
        locator = None

        def forward(self, image: torch.Tensor, others: object = ()) -> list[torch.Tensor]:
            ramp = torch.linspace(1, 0, image.shape[2])[:, None, None]
            return [torch.cat([0 * image, image * ramp, -image], 1)]

    bundle = load_bundle(blob_model)
    bundle = replace(bundle, spec=replace(bundle.spec, flips=made_for))
    canvas = canvas_of(blobs().data("qsm", (32, 32, 32)), [(0, 0, 0)], [])
    found, _ = segment_canvas(canvas, bundle, LeftIsBrighter(), CPU, flips=choice)
    mirror = replace(canvas, maps={"qsm": canvas.maps["qsm"][::-1].copy()})
    other, _ = segment_canvas(mirror, bundle, LeftIsBrighter(), CPU, flips=choice)
    assert (
        np.allclose(found, other[list(mirrored(bundle.spec.labels)), ::-1], atol=1e-3) == averaged
    )


def test_the_rest_is_searched_only_where_something_is_missing(windows_run, blobs):
    starts, reserve = [(0, 0, 0), (8, 0, 0)], [(32, 0, 0)]
    near = blobs(bright=(8, 16, 16), dark=(26, 16, 16)).data("qsm", (64, 32, 32))
    seen, probabilities = windows_run(canvas_of(near, starts, reserve))
    assert seen == 2
    assert (probabilities > 0.5).any(axis=(1, 2, 3)).all()
    far = blobs(bright=(8, 16, 16), dark=(52, 16, 16)).data("qsm", (64, 32, 32))
    seen, probabilities = windows_run(canvas_of(far, starts, reserve))
    assert seen > 2
    assert (probabilities > 0.5).any(axis=(1, 2, 3)).all()


@pytest.fixture
def located(monkeypatch, blob_model):
    """Give a function that segments a canvas around its regions and tells how often."""
    bundle = load_bundle(blob_model)
    network = bundle.network()
    network.locator = nn.Identity()

    def run(
        canvas: Canvas,
        *centres: tuple[float, float, float] | list | None,
        regions: tuple = (),
        asked: list[set[str]] | None = None,
    ) -> tuple[int, tuple]:
        from fdl_bidsapp import pipeline
        from fdl_bidsapp.models import inference

        seen = []
        predict = inference.predict

        def counted(*arguments: object, **options: object) -> np.ndarray:
            seen.append(1)
            return predict(*arguments, **options)  # type: ignore[arg-type]

        places = [centre if isinstance(centre, list) else [centre] for centre in centres]
        where = [[np.array(place) for place in each if place is not None] for each in places]

        def places_of(canvas: Canvas, *_: object) -> list:
            if asked is not None:
                asked.append(set(canvas.maps))
            return where

        monkeypatch.setattr(pipeline, "locate_regions", places_of)
        monkeypatch.setattr(inference, "predict", counted)
        coarse = replace(
            bundle.spec,
            method="none",
            labels=tuple(
                replace(bundle.spec.labels[0], index=i, abbreviation=f"R{i}")
                for i, _ in enumerate(centres, 1)
            ),
        )
        spec = replace(bundle.spec, locator=coarse, regions=regions)
        result = segment_canvas(canvas, replace(bundle, spec=spec), network, CPU)
        monkeypatch.setattr(inference, "predict", predict)
        return len(seen), result

    return run


def centres(probabilities: np.ndarray, affine: np.ndarray) -> list:
    return [
        np.round((affine @ [*np.argwhere(each > 0.5).mean(0), 1])[:3]).tolist()
        for each in probabilities
    ]


def test_a_located_window_is_one_look_and_finds_the_place(located, blobs):
    data = blobs(bright=(5, 16, 16), dark=(16, 16, 16)).data("qsm", (64, 32, 32))
    looks, (probabilities, affine) = located(canvas_of(data, [], []), (12, 15, 16))
    assert looks == 1
    assert centres(probabilities, affine) == [[5, 16, 16], [16, 16, 16]]


def test_a_window_that_lies_badly_is_placed_again_by_what_it_found(located, blobs):
    data = blobs(bright=(5, 16, 16), dark=(16, 16, 16)).data("qsm", (64, 32, 32))
    looks, (probabilities, affine) = located(canvas_of(data, [], []), (24, 15, 16))
    assert looks == 2
    assert centres(probabilities, affine) == [[5, 16, 16], [16, 16, 16]]


def test_without_the_region_nothing_is_found(located, blobs):
    data = blobs(bright=(5, 16, 16), dark=(16, 16, 16)).data("qsm", (64, 32, 32))
    looks, (probabilities, _) = located(canvas_of(data, [], []), None)
    assert looks == 0
    assert not probabilities.any()


def test_all_contrasts_together_lead_to_a_region(located, blobs):
    data = blobs(bright=(5, 16, 16), dark=(16, 16, 16)).data("qsm", (64, 32, 32))
    canvas = canvas_of(data, [], [])
    canvas.maps.update(imag=np.ones_like(data), r2star=data)
    asked: list[set[str]] = []
    _, found = located(canvas, (12, 15, 16), asked=asked)
    assert asked == [{"qsm", "imag", "r2star"}]
    assert centres(*found) == [[5, 16, 16], [16, 16, 16]]


def test_each_region_gives_its_own_structures(located, blobs):
    # Further apart than a window is long: no single window holds both.
    data = blobs(bright=(10, 16, 16), dark=(52, 16, 16)).data("qsm", (64, 32, 32))
    canvas = canvas_of(data, [], [])
    looks, found = located(canvas, (14, 15, 16), (48, 15, 16), regions=SIDES)
    assert looks == 2
    assert centres(*found) == [[10, 16, 16], [52, 16, 16]]
    # A structure that is seen in the other's window alone is not taken from there.
    _, (probabilities, _) = located(canvas, (48, 15, 16), (14, 15, 16), regions=SIDES)
    assert not (probabilities > 0.5).any()


def test_a_region_that_is_not_found_leaves_the_other(located, blobs):
    data = blobs(bright=(10, 16, 16), dark=(52, 16, 16)).data("qsm", (64, 32, 32))
    looks, (probabilities, _) = located(canvas_of(data, [], []), None, (48, 15, 16), regions=SIDES)
    assert looks == 2, "where the other region foretells it, it is not"
    assert [bool((each > 0.5).any()) for each in probabilities] == [False, True]


def test_what_one_region_shows_leads_to_another_that_no_contrast_leads_to(located, blobs):
    # Ten millimetres to the right of the left red nucleus, give or take.
    data = blobs(bright=(10, 16, 16), dark=(26, 16, 16)).data("qsm", (64, 32, 32))
    looks, found = located(canvas_of(data, [], []), (10, 15, 16), None, regions=SIDES)
    assert looks >= 2
    assert centres(*found) == [[10, 16, 16], [26, 16, 16]]


def test_a_stray_piece_does_not_draw_the_window_away(located, blobs):
    data = blobs(bright=(12, 16, 16), dark=(21, 16, 16)).data("qsm", (64, 32, 32))
    # Bright as well, and small, at the window's far end.
    data[37:39, 15:17, 15:17] = data.max()
    _, (probabilities, affine) = located(canvas_of(data, [], []), (23, 15, 16))
    for centre, each in zip(((12, 16, 16), (21, 16, 16)), probabilities, strict=True):
        x, y, z = np.round(np.linalg.inv(affine) @ [*centre, 1])[:3].astype(int)
        assert each[x, y, z] > 0.5


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_a_located_scan_is_segmented_in_any_orientation(located, blobs, codes):
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    image = blobs(bright=(5, 16, 16), dark=(16, 16, 16)).image("qsm", (64, 32, 32))
    turned = image.as_reoriented(
        ornt_transform(io_orientation(image.affine), axcodes2ornt(tuple(codes)))
    )
    images = ScanImages("qsm", {"qsm": np.asarray(turned.dataobj, np.float32)}, turned.affine)
    spec = ModelSpec("any", locator=ModelSpec("coarse", method="none", labels=blob_labels()[:1]))
    looks, (probabilities, affine) = located(to_canvas(images, spec), (12, 15, 16))
    assert looks == 1
    assert centres(probabilities, affine) == [[5, 16, 16], [16, 16, 16]]


def test_a_window_that_finds_no_rest_is_given_up(located, blobs, monkeypatch):
    from fdl_bidsapp import pipeline

    data = blobs(bright=(5, 16, 16), dark=(16, 16, 16)).data("qsm", (64, 32, 32))
    # It would be placed to and fro for ever.
    places = iter([(0, 0, 0), (4, 0, 0), (8, 0, 0), (12, 0, 0)])
    monkeypatch.setattr(pipeline, "window_around", lambda *_: next(places))
    monkeypatch.setattr(pipeline, "complete", lambda *_: False)
    looks, _ = located(canvas_of(data, [], []), (12, 15, 16))
    assert looks == pipeline.LOOKS


def test_the_next_place_is_tried_where_the_likeliest_does_not_show_all(located, blobs):
    data = blobs(bright=(5, 16, 16), dark=(16, 16, 16)).data("qsm", (64, 32, 32))
    canvas = canvas_of(data, [], [])
    looks, found = located(canvas, [(52, 15, 16), (12, 15, 16), (30, 15, 16)])
    assert looks == 2
    assert centres(*found) == [[5, 16, 16], [16, 16, 16]]
    # One that shows no more does not take the place of the one before.
    data = blobs(bright=(10, 16, 16), dark=(52, 16, 16)).data("qsm", (64, 32, 32))
    looks, (probabilities, _) = located(canvas_of(data, [], []), [(14, 15, 16), (48, 15, 16)])
    assert looks > 1
    assert [bool((each > 0.5).any()) for each in probabilities] == [True, False]


def test_a_region_of_which_nothing_is_wanted_is_not_looked_at(located, blobs):
    data = blobs(bright=(5, 16, 16), dark=(16, 16, 16)).data("qsm", (64, 32, 32))
    regions = (("RNL", "RNR"), ())
    looks, found = located(canvas_of(data, [], []), (12, 15, 16), (48, 15, 16), regions=regions)
    assert looks == 1
    assert centres(*found) == [[5, 16, 16], [16, 16, 16]]


def test_windows_without_any_contrast_are_left_out(windows_run, blobs):
    data = np.zeros((64, 32, 32), np.float32)
    data[32:] = blobs().data()
    seen, probabilities = windows_run(canvas_of(data, [(0, 0, 0), (32, 0, 0)], []))
    assert seen == 1
    assert (probabilities > 0.5).any(axis=(1, 2, 3)).all()


def test_labels_of_coinciding_grids_are_the_most_probable_structures():
    probabilities = np.zeros((2, 8, 9, 10), np.float32)
    probabilities[0, 2:5, 2:5, 2:5] = 0.9
    probabilities[1, 5:8, 2:5, 2:5] = 0.6
    probabilities[1, 0, 8, 9] = 0.7
    spec = ModelSpec("two", labels=by_abbreviation(["RNR", "DNL"]))
    images = ScanImages("qsm", {"qsm": np.ones((8, 9, 10), "f4")}, np.eye(4))
    result = to_native(probabilities, np.eye(4), images, spec)
    assert set(np.unique(result.labels)) == {0, 2, 3}
    assert (result.labels == 2).sum() == 27
    assert (result.labels == 3).sum() == 27
    assert result.components == {"RNR": (1, 0), "DNL": (2, 1)}
    np.testing.assert_allclose(result.probabilities, probabilities, atol=1e-6)


def test_a_guess_is_left_out_and_said():
    probabilities = np.zeros((2, 20, 9, 10), np.float32)
    probabilities[0, 2:5, 2:5, 2:5] = 0.9
    probabilities[1, 12:15, 2:5, 2:5] = 0.6
    weights = {INTERCEPT: 3.0, **dict.fromkeys(SIGNS, 0.0)}
    unsure = {INTERCEPT: -3.0, **dict.fromkeys(SIGNS, 0.0)}
    calibration = Calibration(
        {"qsm": {"red_nucleus": weights, "dentate_nucleus": unsure}}, threshold=0.7
    )
    labels = by_abbreviation(["RNR", "DNL"])
    spec = ModelSpec("two", labels=labels, calibration=calibration)
    maps = dict.fromkeys(("qsm", "swi"), np.ones((20, 9, 10), "f4"))
    result = to_native(probabilities, np.eye(4), ScanImages("qsm", maps, np.eye(4)), spec)
    assert set(np.unique(result.labels)) == {0, 2}
    assert result.guessed == {"DNL": "low_confidence"}
    other = to_native(probabilities, np.eye(4), ScanImages("swi", maps, np.eye(4)), spec)
    assert set(np.unique(other.labels)) == {0, 2, 3}, "no calibration, no guess"


def test_what_stands_out_in_the_contrast_that_was_segmented_is_surer():
    probabilities = np.zeros((1, 16, 16, 16), np.float32)
    probabilities[0, 6:10, 6:10, 6:10] = 0.9
    noise = np.random.default_rng(0).normal(5, 1, (16, 16, 16)).astype("f4")
    maps = {"qsm": noise, "r2star": noise + 4 * (probabilities[0] > 0)}
    weights = {INTERCEPT: 0.0, **dict.fromkeys(SIGNS, 0.0), "log_contrast": 1.0}
    known = {target: {"red_nucleus": weights} for target in maps}
    spec = ModelSpec(
        "one",
        contrasts=tuple(maps),
        intensity=dict.fromkeys(maps, "robust"),
        labels=by_abbreviation(["RNL"]),
        calibration=Calibration(known, 0.7),
    )
    faint, plain = (
        to_native(probabilities, np.eye(4), ScanImages(target, maps, np.eye(4)), spec)
        for target in maps
    )
    assert faint.contrasts["RNL"] < 0.3 < 3 < plain.contrasts["RNL"]
    assert faint.confidence["RNL"] < 0.3 < 0.75 < plain.confidence["RNL"]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.5), (0.6, 0.6, 1.0), (1.2, 1.2, 3.0)])
def test_a_structure_keeps_its_volume_on_the_scans_grid(spacing):
    # Red nuclei are this small: where a ball is most probable on the scan's own voxels, its
    # interpolated probabilities make it several per cent smaller.
    step, shape = 0.8, (30, 30, 30)
    places = [(np.arange(n) - (n - 1) / 2) * step for n in shape]
    x, y, z = np.ix_(*places)
    distance = np.sqrt((x - 0.13) ** 2 + (y + 0.21) ** 2 + (z - 0.35) ** 2)
    probabilities = (1 / (1 + np.exp((distance - 4.0) / 0.25)))[None].astype("f4")
    volume = np.count_nonzero(probabilities > 0.5) * step**3
    affine = np.diag([step, step, step, 1.0])
    native = np.diag([*spacing, 1.0])
    native[:3, 3] = (0.3, 0.1, 0.2)
    size = [int(24 / s) for s in spacing]
    spec = ModelSpec("one", labels=by_abbreviation(["RNL"]))
    images = ScanImages("qsm", {"qsm": np.ones(size, "f4")}, native)
    result = to_native(probabilities, affine, images, spec)
    voxel = float(np.prod(spacing))
    found = np.count_nonzero(result.labels) * voxel
    plain = np.count_nonzero(result.probabilities[0] > 0.5) * voxel
    assert abs(found - volume) <= max(voxel, 0.01 * volume)
    assert plain < 0.98 * volume
