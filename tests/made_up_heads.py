"""A small made-up head that stands for a label map."""

from __future__ import annotations

import numpy as np

from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.simulation.labelmaps import HeadMap, head_map

TABLE = {
    0: ("background_and_air", "M"),
    1: ("other_soft_tissue", "M"),
    2: ("cortical_bone", "M"),
    3: ("csf", "M"),
    4: ("cerebral_cortex", "L"),
    5: ("cerebral_white_matter", "L"),
    6: ("cerebellar_white_matter", "R"),
    7: ("choroid_plexus_lateral_ventricle", "L"),
    8: ("fourth_ventricle", "M"),
    **{60 + label.index: (label.structure, label.hemisphere) for label in nuclei()},
}
PLACES = {
    "red_nucleus": ((6, -4, 2), (4, 4, 5)),
    "substantia_nigra": ((14, 2, -4), (5, 3, 5)),
    "subthalamic_nucleus": ((12, 2, 8), (4, 3, 3)),
    "dentate_nucleus": ((15, -30, -16), (5, 8, 6)),
}


def ball(points, centre, radii):
    return sum(((p - c) / r) ** 2 for p, c, r in zip(points, centre, radii, strict=True)) <= 1


def made_up_labels() -> tuple[np.ndarray, np.ndarray]:
    """Return label map and affine of nested ellipsoids with nuclei, sinus and ventricles."""
    spacing, shape = 1.5, (96, 112, 96)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [-spacing * (n - 1) / 2 for n in shape]
    points = [
        o + spacing * i for o, i in zip(affine[:3, 3], np.indices(shape, np.float32), strict=True)
    ]
    labels = np.zeros(shape, np.uint8)
    neck = (points[0] ** 2 + points[1] ** 2 < 40**2) & (points[2] < -20)
    labels[neck & (points[2] > -68)] = 1
    for index, radii in ((1, (66, 78, 66)), (2, (60, 72, 60)), (3, (56, 68, 56))):
        labels[ball(points, (0, 0, 0), radii)] = index
    labels[ball(points, (0, 0, 0), (53, 65, 53))] = 4
    labels[ball(points, (0, 0, 0), (49, 61, 49))] = 5
    labels[ball(points, (0, -30, -18), (35, 24, 22))] = 6
    labels[ball(points, (0, 62, -40), (9, 12, 8))] = 0
    labels[ball(points, (0, -16, -18), (3, 4, 6))] = 8
    for side in (-1, 1):
        labels[ball(points, (side * 14, 5, 24), (5, 9, 5))] = 7
        for label in nuclei():
            if (label.hemisphere == "L") == (side < 0):
                (x, y, z), radii = PLACES[label.structure]
                labels[ball(points, (side * x, y, z), radii)] = 60 + label.index
    return labels, affine


def made_up_head_map() -> HeadMap:
    """Return the made-up head, ready to be deformed."""
    labels, affine = made_up_labels()
    return head_map("made-up", labels, affine, TABLE)
