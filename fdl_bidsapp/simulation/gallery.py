"""A figure of many draws of the simulator, to look at before anything is trained on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fdl_bidsapp.bids.outputs import atomic_write
from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.simulation.simulator import LabelMapScan, reoriented

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray

SHOWN = {"qsm": ("QSM", (-0.12, 0.22)), "r2star": ("R2*", (0.0, 60.0)), "imag": ("iMag", None)}
SHOWN |= {"swi": ("SWI", None)}
"""Title of each contrast, and its fixed window at 3 T."""

REGION = (128.0, 128.0, 112.0)
"""Box in mm around the nuclei that is worth simulating for a gallery."""

LEVELS = (("red_nucleus", "midbrain"), ("dentate_nucleus", "dentate"))


def draw_gallery(path: Path, scans: Iterable[LabelMapScan], reach: float = 45.0) -> None:
    """Draw one row for each scan: its contrasts at the level of midbrain and dentate.

    The nuclei of the left are outlined; the right shows the image bare.

    Parameters
    ----------
    path
        A PNG, SVG or PDF file.
    scans
        What to draw.
    reach
        Half the width of each picture, mm.

    Raises
    ------
    OutputError, StorageError
        The file cannot be written.
    """
    from matplotlib.figure import Figure

    # Echoes are not shown, and take most of the memory.
    rows = [reoriented(replace(scan, signal=None), "RAS") for scan in scans]
    columns = len(SHOWN) * len(LEVELS)
    figure = Figure(figsize=(2.0 * columns, 2.15 * len(rows) + 0.3), facecolor="black")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for i, scan in enumerate(rows):
        labels = scan.labels.cpu().numpy()
        for j, (contrast, (title, window)) in enumerate(SHOWN.items()):
            image = scan.maps[contrast].cpu().numpy()
            scale = float(scan.values["field_strength"]) / 3 if contrast == "r2star" else 1.0
            limits = (window[0] * scale, window[1] * scale) if window else _range(image)
            for k, (structure, place) in enumerate(LEVELS):
                axis = axes[i, k * len(SHOWN) + j]
                _draw_slice(axis, image, labels, scan.affine, structure, limits, reach)
                if i == 0:
                    axis.set_title(f"{title}, {place}", color="white", fontsize=9)
        axes[i, 0].text(
            0.02, 0.02, _caption(scan), color="white", fontsize=5, transform=axes[i, 0].transAxes
        )
    figure.subplots_adjust(0, 0, 1, 1 - 0.25 / (2.15 * len(rows) + 0.3), 0.02, 0.02)
    with atomic_write(path) as temporary:
        kind = path.suffix.lstrip(".").lower() or "png"
        figure.savefig(temporary, format=kind, dpi=100, facecolor="black")


def _draw_slice(
    axis: Axes,
    image: Array,
    labels: Array,
    affine: Array,
    structure: str,
    limits: tuple[float, float],
    reach: float,
) -> None:
    indices = {la.index: la for la in nuclei()}
    wanted = [la.index for la in nuclei() if la.structure == structure]
    places = np.argwhere(np.isin(labels, wanted))
    axis.set_axis_off()
    if len(places) == 0:
        return
    centre = places.mean(0)
    z = round(centre[2])
    size = spacing_of(affine)
    axis.imshow(
        image[:, :, z].T,
        cmap="gray",
        vmin=limits[0],
        vmax=limits[1],
        origin="lower",
        aspect=float(size[1] / size[0]),
        interpolation="nearest",
    )
    for index in np.unique(labels[:, :, z])[1:]:
        label: Any = indices[int(index)]
        if label.hemisphere == "L":
            inside = (labels[:, :, z] == index).T.astype(float)
            axis.contour(inside, [0.5], colors=[label.color], linewidths=0.7)
    axis.set_xlim(centre[0] - reach / size[0], centre[0] + reach / size[0])
    axis.set_ylim(centre[1] - reach / size[1], centre[1] + reach / size[1])


def _range(image: Array) -> tuple[float, float]:
    inside = image[image > 0]
    return (0.0, float(np.percentile(inside, 99)) if inside.size else 1.0)


def _caption(scan: LabelMapScan) -> str:
    p = scan.values
    return (
        f"{p['field_strength']:g} T, {p['echoes']} echoes, "
        f"{p['in_plane']:.2f} × {p['slice_thickness']:.2f} mm, SNR {p['snr']:.0f}\n"
        f"{p['age']:.0f} y, {p['diagnosis']}, iron {p['iron']:.2f}, {p['background']}, "
        f"{p['inversion']} {p['regularisation']:.2f}"
    )
