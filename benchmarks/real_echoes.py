"""The chain from echoes to maps on real acquisitions: is the field continuous, is R2* plausible?

    python benchmarks/real_echoes.py ROMEO_SMALL DCM_QA_PHILIPS_ENH OUT

``ROMEO_SMALL`` is the folder ``test/data/small`` of ROMEO.jl (a crop within a brain at high
resolution; neither its echo times nor its field strength are written anywhere: 4, 8 and 12 ms are
what its own examples take, 7 T is where brain has the R2* that follows, which rests on them),
``DCM_QA_PHILIPS_ENH`` the folder ``Ref`` of the repository of that name (a head, two echoes, 3 mm).
Neighbours are torn where the phase between them steps by more than half a turn within the shortest
echo spacing: in the phase as measured, and in the field that the chain made of it. Writes a picture
of each into OUT and ``benchmarks/results/real_echoes.tsv``.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import nibabel as nib
import numpy as np
from machine import machine

from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.imaging.reconstruction import RawEchoes, reconstruct
from fdl_bidsapp.imaging.relaxometry import r2star_loglinear
from fdl_bidsapp.physics import GAMMA_BAR
from fdl_bidsapp.physics.convention import phase_to_radians
from fdl_bidsapp.physics.unwrapping import fit_unwrapped_field

mpl.use("Agg")
import matplotlib.pyplot as plt

Array = np.ndarray
Made = tuple[Array, Array, dict[str, Array]]
"""Field in ppm, where it is known, and the maps that were made of it."""

RESULTS = Path(__file__).parent / "results" / "real_echoes.tsv"
DCM_QA = "2001_WIP_fcMRI_Field_Mapping_cl_e"
"""Of the files of ``dcm_qa_philips_enh``, what is before the number of the echo."""

PLAUSIBLE = (5.0, 60.0)
"""1/s, of the middle of a brain's R2* from 1.5 to 7 T."""

TORN = 0.001
"""Largest share of neighbours between which a continuous field may step."""


def main() -> None:
    """Reconstruct both, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("romeo_small", type=Path)
    parser.add_argument("dcm_qa", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    made = {
        "command": "python benchmarks/real_echoes.py ROMEO_SMALL DCM_QA_PHILIPS_ENH OUT",
        "machine": machine(),
        "versions": f"Python {platform.python_version()}, fdl-bidsapp {version('fdl-bidsapp')}",
    }
    rows = []
    for name, echoes, (field, mask, maps) in samples(options):
        maps["R2*, 1/s"] = decay = r2star_loglinear(echoes.magnitude, echoes.echo_times)
        row = {"sample": name, **measured(echoes, field, mask, decay)}
        print(row, file=sys.stderr)
        rows.append({**row, **made})
        draw(options.out / f"{name}.png", echoes, mask, {"field, ppm": field, **maps})
    write_tsv(RESULTS, rows, tuple(rows[0]))


def samples(options: argparse.Namespace) -> Iterator[tuple[str, RawEchoes, Made]]:
    """Give the name of each sample, its echoes and what the chain makes of them."""
    magnitude, phase = (nib.load(options.romeo_small / f"{part}.nii") for part in ("Mag", "Phase"))
    # Stored in radians; the header's slope is that of another scaling.
    stored = np.asarray(phase.dataobj.get_unscaled(), np.float32)
    affine = np.diag([*magnitude.header.get_zooms()[:3], 1.0])
    echoes = RawEchoes(
        np.asarray(magnitude.dataobj, np.float32), stored, affine, (0.004, 0.008, 0.012), 7.0, "rad"
    )
    # Too small for spheres of 12 mm: the field is as far as the chain goes.
    inside = np.ones(stored.shape[:3], bool)
    signal = (echoes.magnitude * np.exp(1j * stored)).astype(np.complex64)
    field, _ = fit_unwrapped_field(
        signal, inside, spacing_of(affine), echoes.echo_times, echoes.field_strength
    )
    yield "romeo_small", echoes, (field, inside, {})

    parts = {"": [], "_ph": []}
    times = []
    for echo in (1, 2):
        for ending, images in parts.items():
            images.append(nib.load(options.dcm_qa / f"{DCM_QA}{echo}{ending}.nii.gz"))
        sidecar = json.loads((options.dcm_qa / f"{DCM_QA}{echo}.json").read_text("utf-8"))
        times.append(float(sidecar["EchoTime"]))
    magnitude, phase = (
        np.stack([image.get_fdata(dtype=np.float32) for image in images], -1)
        for images in parts.values()
    )
    strength = float(sidecar["MagneticFieldStrength"])
    affine = parts[""][0].affine
    echoes = RawEchoes(magnitude, phase, affine, tuple(times), strength)
    found = reconstruct(echoes)
    print(*found.notes, sep="\n", file=sys.stderr)
    maps = {
        "local field, ppm": found.local_field,
        "QSM, ppm": found.maps["qsm"],
        "SWI": found.maps["swi"],
    }
    yield "dcm_qa_philips_enh", echoes, (found.total_field, found.mask, maps)


def measured(echoes: RawEchoes, field: Array, mask: Array, decay: Array) -> dict[str, object]:
    """Return shares of torn neighbours and what R2* is in the mask."""
    phase = phase_to_radians(echoes.phase, echoes.phase_unit)[0]
    spacing = min(np.diff(echoes.echo_times))
    radians = field * 2 * np.pi * GAMMA_BAR * echoes.field_strength * spacing
    lower, middle, upper = np.percentile(decay[mask], [5, 50, 95])
    field_torn = torn(radians, mask)
    return {
        "echoes": len(echoes.echo_times),
        "mask_ml": np.count_nonzero(mask) * abs(np.linalg.det(echoes.affine[:3, :3])) / 1000,
        "measured_phase_torn": torn(phase[..., -1], mask),
        "field_torn": field_torn,
        "field_continuous": "yes" if field_torn <= TORN else "no",
        "r2star_p05": lower,
        "r2star_median": middle,
        "r2star_p95": upper,
        "r2star_plausible": "yes" if PLAUSIBLE[0] <= middle <= PLAUSIBLE[1] else "no",
    }


def torn(phase: Array, mask: Array) -> float:
    """Return the share of neighbours in a mask between which phase steps by over half a turn."""
    steps = pairs = 0
    for axis in range(3):
        both = mask & np.roll(mask, -1, axis)
        both[(slice(None),) * axis + (-1,)] = False
        steps += np.count_nonzero(np.abs(np.roll(phase, -1, axis) - phase)[both] > np.pi)
        pairs += np.count_nonzero(both)
    return steps / pairs


def draw(path: Path, echoes: RawEchoes, mask: Array, maps: dict[str, Array]) -> None:
    """Draw a slice of what was measured and of all that was made of it."""
    z = int(np.argmax(mask.sum((0, 1))))
    pictures = {
        "magnitude": echoes.magnitude[..., -1],
        "phase as measured": echoes.phase[..., -1],
        **maps,
    }
    figure, axes = plt.subplots(1, len(pictures), figsize=(3 * len(pictures), 3.4))
    for axis, (title, image) in zip(axes, pictures.items(), strict=True):
        low, high = np.percentile(image[:, :, z][mask[:, :, z]], [1, 99])
        axis.imshow(image[:, :, z].T, cmap="gray", origin="lower", vmin=low, vmax=high)
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
