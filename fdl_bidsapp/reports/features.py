"""Figure of contrast-invariant features: each image in a row with its channels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CHANNELS_SHOWN = 16


def draw_mosaic(
    rows: Sequence[tuple[str, NDArray[np.float32], NDArray[np.float32]]],
    path: Path,
    title: str = "",
) -> None:
    """Draw images of one anatomy below each other, each with its channels beside it.

    Alike columns show invariance, unlike ones richness.

    Parameters
    ----------
    rows : sequence of (name, (X, Y) image, (C, X, Y) channels)
        The first axis runs from left to right, the second from bottom to top, unless the caller
        has it otherwise.
    path
        PNG file to write.
    title
        Above the figure.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    shown = min(CHANNELS_SHOWN, *(len(channels) for _, _, channels in rows))
    width, height = rows[0][1].shape
    size = (1 + shown, 0.25 + len(rows) * 1.0 * height / width)
    fig, panels = plt.subplots(len(rows), 1 + shown, figsize=size, squeeze=False)
    for line, (name, image, channels) in zip(panels, rows, strict=True):
        line[0].imshow(image.T, origin="lower", cmap="gray")
        line[0].set_title(name, fontsize=5, pad=2)
        for number, panel in enumerate(line[1:]):
            # One scale for all: unit vectors have no channel beyond 1.
            panel.imshow(channels[number].T, origin="lower", cmap="RdBu_r", vmin=-0.7, vmax=0.7)
            if line is panels[0]:
                panel.set_title(str(number), fontsize=5, pad=2)
    for panel in panels.flat:
        panel.set_axis_off()
    fig.suptitle(title, fontsize=7)
    top = 1 - 0.25 / size[1]
    fig.subplots_adjust(left=0, right=1, bottom=0, top=top, wspace=0.02, hspace=0.02)
    fig.savefig(path, dpi=150)
    plt.close(fig)
