"""Agreement of field and signal with an independent simulator, qsm-forward, on the same tissue.

qsm-forward is under the GPL: it is never imported here, but run by a Python of its own environment.

    python -m venv peer && peer/bin/pip install qsm-forward
    python benchmarks/qsm_forward.py LABELS_DIR --peer peer/bin/python [--heads 3] [--spacing 2]

The same susceptibility, on the same grid with the same direction of B0, goes to both. Both fields
are compared in the brain less their means there, since neither knows a constant; both signals as
complex numbers at the last echo, where errors of decay and phase count most.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from machine import machine

from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.physics.dipole import field_direction
from fdl_bidsapp.physics.forward import dipole_field, echo
from fdl_bidsapp.simulation.acquisition import scan_grid
from fdl_bidsapp.simulation.anatomy import build_body, draw_deformation
from fdl_bidsapp.simulation.labelmaps import find_label_maps, read_head_map
from fdl_bidsapp.simulation.parameters import draw_values
from fdl_bidsapp.simulation.physiology import draw_properties, echo_times

RESULTS = Path(__file__).parent / "results" / "qsm_forward.tsv"
COLUMNS = (
    "head",
    "seed",
    "voxel_mm",
    "field_nrmse_percent",
    "field_correlation",
    "signal_nrmse_percent",
    "field_sd_ppm",
    "peer",
    "command",
    "machine",
    "versions",
)

PEER = """
import sys
import numpy as np
import qsm_forward
from importlib.metadata import version
given = np.load(sys.argv[1])
field = qsm_forward.generate_field(
    given["chi"], voxel_size=list(given["spacing"]), B0_dir=list(given["direction"])
)
signal = qsm_forward.generate_signal(
    given["field"], B0=float(given["b0"]), TR=1e3, TE=float(given["time"]), flip_angle=90,
    R1=1.0, R2star=given["r2star"], M0=given["rho"],
)
np.savez(sys.argv[2], field=field, signal=signal, version=version("qsm-forward"))
"""


def compare(head_file: Path, seed: int, spacing: float, peer: Path) -> dict[str, object]:
    """Simulate one head by both; return the differences."""
    head = read_head_map(head_file)
    sizes = {"in_plane": spacing, "slice_thickness": spacing, "obliquity": 20.0}
    values = draw_values(seed, "ordinary", sizes)
    deformation, tissues = draw_deformation(head, seed, values), draw_properties(seed, values)
    grid = scan_grid(head, deformation, seed, values)
    shape, affine = grid.shape, grid.affine
    body = build_body(head, deformation, tissues, values, seed, shape, affine)
    air, direction, b0 = tissues["air"].chi, field_direction(affine), 3.0
    time = echo_times(values)[-1]
    # Zero beyond the grid for both: susceptibility relative to air.
    ours = dipole_field(body.chi - air, grid.spacing, direction)
    brain = (body.depth > 4).numpy()
    # Without steps of the field from voxel to voxel, the loss of phase across them is none.
    even = torch.full_like(ours, 0.05)
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "given.npz"), Path(folder, "found.npz")
        np.savez(
            given,
            chi=(body.chi - air).numpy(),
            spacing=np.array(grid.spacing),
            direction=direction,
            field=even.numpy(),
            r2star=body.r2star.numpy(),
            rho=body.rho.numpy(),
            time=time,
            b0=b0,
        )
        subprocess.run([str(peer), "-c", PEER, str(given), str(found)], check=True)
        with np.load(found) as result:
            theirs, their_signal = result["field"].real, result["signal"]
            peer_version = str(result["version"])
    one, other = ours.numpy()[brain], theirs[brain]
    one, other = one - one.mean(), other - other.mean()
    signal = echo(body.rho, body.r2star, even, time, b0).numpy()[brain]
    their_signal = their_signal[brain]
    return {
        "head": head.name,
        "seed": seed,
        "voxel_mm": spacing,
        "field_nrmse_percent": 100 * float(np.linalg.norm(one - other) / np.linalg.norm(other)),
        "field_correlation": float(np.corrcoef(one, other)[0, 1]),
        "signal_nrmse_percent": 100
        * float(np.linalg.norm(signal - their_signal) / np.linalg.norm(their_signal)),
        "field_sd_ppm": float(other.std()),
        "peer": f"qsm-forward {peer_version}",
    }


def main() -> None:
    """Compare some heads and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels_dir", type=Path)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--spacing", type=float, default=2.0)
    options = parser.parse_args()
    rows = []
    for seed, file in enumerate(find_label_maps(options.labels_dir)[: options.heads]):
        row = compare(file, seed, options.spacing, options.peer)
        print({key: row[key] for key in COLUMNS[:7]}, flush=True)
        rows.append(
            {
                **row,
                "command": "python benchmarks/qsm_forward.py LABELS_DIR --peer PYTHON"
                f" --heads {options.heads} --spacing {options.spacing:g}",
                "machine": machine(),
                "versions": f"Python {platform.python_version()}, torch {version('torch')}, "
                f"fdl-bidsapp {version('fdl-bidsapp')}",
            }
        )
    write_tsv(RESULTS, rows, COLUMNS)


if __name__ == "__main__":
    main()
