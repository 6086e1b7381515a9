"""``fdl features``: its options, and the calls behind it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fdl_bidsapp.errors import FdlError, OutputError, UsageError
from fdl_bidsapp.settings import DEVICES


def add_command(commands: Any) -> None:
    """Add the command to the toolbox' parser."""
    features = commands.add_parser(
        "features",
        help="write contrast-invariant features of images",
        description="Write the channels of each image as a 4-D NIfTI file on its own grid, and one"
        " figure of all: images of one anatomy in different contrasts should look alike in it.",
    )
    features.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="NIfTI files")
    features.add_argument(
        "--model", default="cifl", metavar="NAME|FILE", help="from fdl train; default: cifl"
    )
    features.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    features.add_argument("--output", type=Path, required=True, metavar="DIR")
    features.set_defaults(command=_features)


def _features(options: argparse.Namespace) -> int:
    import numpy as np

    from fdl_bidsapp.bids.outputs import atomic_write, write_image
    from fdl_bidsapp.derivatives import scanner_image
    from fdl_bidsapp.imaging.grid import canonical, load_image
    from fdl_bidsapp.imaging.intensity import normalise
    from fdl_bidsapp.models.bundle import load_features
    from fdl_bidsapp.models.cifl import compute_features
    from fdl_bidsapp.models.inference import resolve_device
    from fdl_bidsapp.reports.features import draw_mosaic

    stems = [path.name.removesuffix(".gz").removesuffix(".nii") for path in options.images]
    if len(set(stems)) < len(stems):
        raise UsageError(
            "two images have the same name and would overwrite each other in the output folder",
            "give them in two calls with different folders",
        )
    bundle = load_features(options.model)
    device = resolve_device(options.device)
    network = bundle.network(device)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder cannot be made ({error.strerror})", "choose another", path=options.output
        ) from error
    code = 0
    rows = []
    for path, stem in zip(options.images, stems, strict=True):
        try:
            image = canonical(load_image(path).image)
            volume = normalise(np.asarray(image.dataobj, np.float32), "robust")
            channels = compute_features(network, volume, device)
            target = options.output / f"{stem}_features.nii.gz"
            write_image(target, scanner_image(np.moveaxis(channels, 0, 3), image.affine))
        except FdlError as error:
            # The other images are done all the same.
            print(f"fdl: {error}", file=sys.stderr)
            code = code or error.exit_code
            continue
        middle = volume.shape[2] // 2
        rows.append((stem, volume[..., middle], channels[..., middle]))
        print(target)
    if rows:
        figure = options.output / "features.png"
        with atomic_write(figure) as temporary:
            draw_mosaic(rows, temporary, f"{bundle.spec.name}: image, then channels")
        print(figure)
    return code
