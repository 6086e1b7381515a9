"""Room on disk: whether an error is about it, and how much a scan needs."""

from __future__ import annotations

import errno
import math
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fdl_bidsapp.errors import FdlError, StorageError

if TYPE_CHECKING:
    from fdl_bidsapp.bids.inputs import Scan
    from fdl_bidsapp.models.fdl import ModelSpec
    from fdl_bidsapp.settings import Settings

VALUE = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Space:
    """Bytes on disk for one scan.

    Attributes
    ----------
    work
        Intermediate files.
    output
        Derivatives, before compression.
    """

    work: int
    output: int


def lacks_space(error: BaseException) -> bool:
    """Tell whether an error says that a disk or a quota is full.

    Examples
    --------
    >>> lacks_space(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    True
    """
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))


def space_needed(scan: Scan, target: str, spec: ModelSpec, probabilities: bool = False) -> Space:
    """Reckon from its header what a scan takes on disk; 0 where that cannot be read.

    Parameters
    ----------
    scan
        The scan.
    target
        ``auto`` or a contrast.
    spec
        The model's specification: grid, contrasts, labels.
    probabilities
        Whether probabilities are written.
    """
    import nibabel as nib

    from fdl_bidsapp.imaging.grid import Grid, canvas_geometry
    from fdl_bidsapp.pipeline import choose_target

    try:
        chosen = choose_target([each.contrast for each in scan.sources], target, spec.contrasts)
        source = scan.get(chosen)
        assert source is not None
        image = cast("nib.Nifti1Image", nib.load(source.paths[0]))
        shape = image.shape[:3]
        if spec.locator is None:
            shape, _, _ = canvas_geometry(image, Grid(spec.grid_shape, spec.grid_spacing))
    except (FdlError, OSError, ValueError, nib.filebasedimages.ImageFileError):
        return Space(0, 0)
    native, canvas = math.prod(image.shape[:3]), math.prod(shape)
    maps, structures = len(scan.sources), len(spec.labels)
    used = maps if spec.method == "multimodal" else 1
    return Space(
        VALUE * (native * maps + canvas * (used + structures)),
        native * (1 + structures + (VALUE * structures if probabilities else 0)),
    )


def where_space_lacks(
    error: FdlError, settings: Settings, work: Path, scan: Scan, spec: ModelSpec, at_once: int
) -> FdlError:
    """Say of a full disk which folder it is, and what the run needs there.

    Parameters
    ----------
    error
        What was told; returned as it is unless it is about space.
    settings
        The run's options.
    work
        Folder of its intermediate files.
    scan
        The scan that did not fit.
    spec
        The model's specification.
    at_once
        How many scans are worked on at once.
    """
    if not lacks_space(error):
        return error
    in_output = error.path is not None and Path(error.path).is_relative_to(settings.output_dir)
    folder = settings.output_dir if in_output else work.parent
    left = "an unknown amount is"
    with suppress(OSError):
        left = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are"
    need = space_needed(scan, settings.target, spec, settings.save_probabilities)
    if in_output:
        remedy = f"make room there, up to {need.output / 1e6:.1f} MB for each scan to be done"
    else:
        remedy = (
            f"make room there, {need.work * at_once / 1e6:.1f} MB for {at_once} at once, or "
            "choose another folder with --work-dir"
        )
    return StorageError(
        f"the disk or quota is full, {left} free",
        f"{remedy}, and run again; finished scans are kept",
        path=folder,
    )
