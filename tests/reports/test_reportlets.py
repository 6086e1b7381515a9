"""Figures of a scan: what is seen, how large, on which side."""

from __future__ import annotations

import base64
import io
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fdl_bidsapp.labels import by_abbreviation
from fdl_bidsapp.pipeline import ScanImages, Segmentation, StandardSpace
from fdl_bidsapp.reports.reportlets import PANEL, Figure, draw_scan, nice_ticks

LABELS = by_abbreviation(["RNL", "RNR"])
SHAPE = (60, 70, 50)
SVG = "{http://www.w3.org/2000/svg}"


def scene(affine: np.ndarray | None = None) -> tuple[ScanImages, Segmentation]:
    """Make two balls of 8 mm, at x = 20 (left, in RAS axes) and x = 40."""
    grid = np.indices(SHAPE)
    balls = [np.linalg.norm(grid - np.reshape(c, (3, 1, 1, 1)), axis=0) <= 4 for c in CENTRES]
    labels = (balls[0] + 2 * balls[1]).astype(np.uint8)
    noise = np.random.default_rng(0).normal(0, 0.01, SHAPE)
    qsm = (0.15 * (labels > 0) + noise).astype(np.float32)
    matrix = np.eye(4) if affine is None else affine
    maps = {"qsm": qsm, "r2star": (20 + 200 * qsm).astype(np.float32), "imag": 100 - 50 * qsm}
    return ScanImages("qsm", maps, matrix), Segmentation(labels, np.stack(balls).astype(np.float32))


CENTRES = ((20, 30, 25), (40, 30, 25))


def by_name(figures: list[Figure]) -> dict[tuple[str, str], ElementTree.Element]:
    return {(one.desc, one.label): ElementTree.fromstring(one.svg) for one in figures}


def outlines(svg: ElementTree.Element) -> list[np.ndarray]:
    """Return the coloured outlines as arrays of points."""
    paths = [
        path
        for group in svg.iter(f"{SVG}g")
        if group.get("class") == "outline"
        for path in group.iter(f"{SVG}path")
        if path.get("stroke") != "#000"
    ]
    return [np.array(re.findall(r"[-\d.]+", str(p.get("d"))), float).reshape(-1, 2) for p in paths]


def pictures(svg: ElementTree.Element) -> list[np.ndarray]:
    found = []
    for image in svg.iter(f"{SVG}image"):
        content = base64.b64decode(str(image.get("href")).partition("base64,")[2])
        found.append(np.asarray(Image.open(io.BytesIO(content))))
    return found


def test_every_nucleus_has_its_cuts_and_histograms() -> None:
    names = by_name(draw_scan(*scene(), LABELS))
    assert set(names) == {
        ("overview", ""),
        *((desc, label) for desc in ("overlay", "histogram") for label in ("RNL", "RNR")),
    }


def test_a_nucleus_fills_a_third_of_its_panel_and_more() -> None:
    svg = by_name(draw_scan(*scene(), LABELS))["overlay", "RNL"]
    own = outlines(svg)[0]
    assert (np.ptp(own, axis=0) > PANEL / 3).all()
    assert (np.ptp(own, axis=0) < PANEL / 2).all()
    assert own.mean(axis=0) == pytest.approx([PANEL / 2, PANEL / 2], abs=PANEL / 20)


def test_each_contrast_and_the_probability_have_three_cuts() -> None:
    svg = by_name(draw_scan(*scene(), LABELS))["overlay", "RNL"]
    texts = {str(one.text) for one in svg.iter(f"{SVG}text")}
    assert texts >= {"QSM −0.1 to 0.2 ppm", "R2* 0 to 75 1/s", "Magnitude"}
    assert texts >= {"axial", "coronal", "sagittal", "L", "R", "P", "A", "5 mm"}
    assert "Red nucleus left: probability" in texts
    cuts = [picture for picture in pictures(svg) if picture.shape[0] == picture.shape[1]]
    assert len(cuts) == 12
    # The nucleus is bright in QSM, dark in the magnitude, coloured in the probability.
    n = len(cuts[0])
    middle, corner = slice(n // 2 - n // 16, n // 2 + n // 16), slice(n // 9)
    assert cuts[0][middle, middle].mean() > 1.5 * cuts[0][corner, corner].mean()
    assert cuts[6][middle, middle].mean() < cuts[6][corner, corner].mean()
    red, _, blue = cuts[9][middle, middle].reshape(-1, 3).mean(axis=0)
    assert red > blue + 50


@pytest.mark.parametrize(("voxel", "pixels"), [(1.0, 48), (0.5, 72), (0.2, 112)])
def test_a_picture_has_two_pixels_for_a_voxel_within_limits(voxel: float, pixels: int) -> None:
    scan = scene(np.diag([voxel, voxel, voxel, 1.0]))
    svg = by_name(draw_scan(*scan, LABELS))["overlay", "RNL"]
    assert pictures(svg)[0].shape == (pixels, pixels)


@pytest.mark.parametrize("flipped", [False, True], ids=["RAS", "LAS"])
def test_left_in_the_picture_is_left_in_the_body(flipped: bool) -> None:
    affine = np.eye(4)
    if flipped:
        affine[0] = [-1, 0, 0, SHAPE[0] - 1]
    svg = by_name(draw_scan(*scene(affine), LABELS))["overlay", "RNL"]
    own, neighbour = outlines(svg)[:2]
    # In RAS axes the first ball lies left of the second one; in LAS axes it lies right of it.
    assert (own[:, 0].mean() < neighbour[:, 0].mean()) != flipped
    marks = {
        str(one.text): float(str(one.get("x")))
        for one in svg.iter(f"{SVG}text")
        if one.text in "LR"
    }
    assert marks["L"] < PANEL / 2 < marks["R"]


def test_voxels_of_any_shape_keep_millimetres_alike() -> None:
    images, segmentation = scene()
    images = ScanImages("qsm", images.maps, np.diag([1.0, 1.0, 2.0, 1.0]))
    svg = by_name(draw_scan(images, segmentation, LABELS))["overlay", "RNL"]
    axial, coronal = outlines(svg)[0], outlines(svg)[2]
    assert np.ptp(axial[:, 0]) == pytest.approx(np.ptp(axial[:, 1]), rel=0.05)
    assert np.ptp(coronal[:, 1]) == pytest.approx(2 * np.ptp(coronal[:, 0]), rel=0.05)


def test_outlines_can_be_hidden_by_the_fragment() -> None:
    for figure in draw_scan(*scene(), LABELS):
        if figure.desc in ("overlay", "overview"):
            assert '<g id="plain"/>' in figure.svg
            assert "#plain:target~.outline{visibility:hidden}" in figure.svg


def test_the_histogram_tells_inside_from_around() -> None:
    svg = by_name(draw_scan(*scene(), LABELS))["histogram", "RNL"]
    inside, around = (
        [path for path in svg.iter(f"{SVG}path") if path.get("class") == kind][-1]
        for kind in ("in", "out")
    )

    def centre(path: ElementTree.Element) -> float:
        points = np.array(re.findall(r"[-\d.]+", str(path.get("d"))), float).reshape(-1, 2)
        weight = points[:, 1].max() - points[:, 1]
        return float((points[:, 0] * weight).sum() / weight.sum())

    assert centre(inside) > centre(around) + 50


def test_an_empty_nucleus_is_shown_where_it_was_most_probable() -> None:
    images, segmentation = scene()
    labels = np.where(segmentation.labels == 1, 0, segmentation.labels).astype(np.uint8)
    weak = segmentation.probabilities * np.reshape([0.3, 1], (2, 1, 1, 1)).astype(np.float32)
    names = by_name(draw_scan(images, Segmentation(labels, weak), LABELS))
    assert ("overlay", "RNL") in names
    assert ("histogram", "RNL") not in names
    nothing = weak * np.reshape([0, 1], (2, 1, 1, 1)).astype(np.float32)
    names = by_name(draw_scan(images, Segmentation(labels, nothing), LABELS))
    assert ("overlay", "RNL") not in names


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf], ids=str)
def test_maps_without_contrast_or_with_holes_are_drawn_all_the_same(value: float) -> None:
    images, segmentation = scene()
    maps = {name: data.copy() for name, data in images.maps.items()}
    maps["qsm"][:25] = value
    maps["r2star"][:] = value
    figures = draw_scan(ScanImages("qsm", maps, np.eye(4)), segmentation, LABELS)
    assert {figure.label for figure in figures if figure.desc == "overlay"} == {"RNL", "RNR"}


def test_a_nucleus_at_the_edge_and_one_that_fills_everything_are_drawn() -> None:
    images, _ = scene()
    labels = np.full(SHAPE, 2, np.uint8)
    labels[:3, :3, :3] = 1
    probabilities = np.stack([labels == 1, labels == 2]).astype(np.float32)
    names = by_name(draw_scan(images, Segmentation(labels, probabilities), LABELS))
    assert {("overlay", "RNL"), ("overlay", "RNR")} <= set(names)


def test_the_registration_shows_template_and_scan_in_turn() -> None:
    images, segmentation = scene()
    marked, image = segmentation.labels, images.maps["imag"].astype(np.float32)
    standard = StandardSpace("space", marked, np.eye(4), Path("x.h5"), image, image * 2)
    svg = by_name(draw_scan(images, segmentation, LABELS, standard))["registration", ""]
    assert {str(group.get("id")) for group in svg.iter(f"{SVG}g")} >= {"template", "scan"}
    text = ElementTree.tostring(svg, "unicode")
    assert "prefers-reduced-motion" in text
    assert "animation" in text
    assert outlines(svg)


def test_all_figures_of_a_scan_take_a_second_or_two() -> None:
    draw_scan(*scene(), LABELS)  # imports
    start = time.process_time()
    draw_scan(*scene(), LABELS)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.03, 0.21), (12.0, 4000.0), (5.0, 5.1)])
def test_ticks_are_few_and_within(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 4)
    assert 2 <= len(ticks) <= 6
    assert low <= ticks[0] < ticks[-1] <= high
