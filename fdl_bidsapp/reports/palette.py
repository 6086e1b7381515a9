"""Colours and words that all reports share."""

from __future__ import annotations

from collections.abc import Iterable

OKABE_ITO = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart with any colour vision: Okabe M, Ito K, Color Universal Design, 2008."""

ON_GREY = ("#FF9E4A", "#56B4E9", "#7DE0B8", "#F0E442", "#FF8FC8", "#B9A6FF", "#FFFFFF")
"""For lines on grey images: the same order of hues, all of them light."""

CONTRASTS = {
    "qsm": ("QSM", "ppm"),
    "r2star": ("R2*", "1/s"),
    "imag": ("Magnitude", "a.u."),
    "swi": ("SWI", "a.u."),
}
"""Title and unit of each contrast."""


def structure_colours(
    structures: Iterable[str], palette: tuple[str, ...] = OKABE_ITO
) -> dict[str, str]:
    """Give each structure a colour; both sides share it, their place tells them apart.

    Examples
    --------
    >>> structure_colours(["red_nucleus", "red_nucleus", "dentate_nucleus"])
    {'red_nucleus': '#D55E00', 'dentate_nucleus': '#0072B2'}
    """
    known = dict.fromkeys(structures)
    return {name: palette[k % len(palette)] for k, name in enumerate(known)}
