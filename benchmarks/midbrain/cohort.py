"""Simulate the labelled cohort of the few-label experiment, as images and one table.

    python benchmarks/midbrain/cohort.py LABELS OUT [--jobs 2]

``LABELS`` is a folder of head label maps (see docs/simulation.md). Training and validation scans
are of all but the last four heads, test scans of these. Each scan is a participant: no two are
deformed alike. Ordinary protocols, 1 mm, maps made from echoes; the images hold a box of 64 × 80 ×
72 mm around the nuclei. Run again, it goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.models.inference import resolve_device
from fdl_bidsapp.simulation.labelmaps import find_label_maps, read_head_map
from fdl_bidsapp.simulation.parameters import Value, draw_values
from fdl_bidsapp.simulation.simulator import simulate_label_map

CONTRASTS = ("qsm", "r2star", "imag")
BOX = (64.0, 80.0, 72.0)
PROTOCOL: dict[str, Value] = {"in_plane": 1.0, "slice_thickness": 1.0, "orientation": "RAS"}
SIZES = {"train": 51, "validation": 8, "test": 24}
TEST_HEADS = 4

Job = tuple[str, int]


def main() -> None:
    """Simulate all scans and write their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    maps = find_label_maps(options.labels)
    by_head: dict[Path, list[Job]] = {path: [] for path in maps}
    rows = []
    for start, (split, n) in enumerate(SIZES.items()):
        heads = maps[-TEST_HEADS:] if split == "test" else maps[:-TEST_HEADS]
        for i in range(n):
            # A number for each split, far from the next.
            name, seed = f"{split}-{i:02d}", 1000 * (start + 1) + i
            by_head[heads[i % len(heads)]].append((name, seed))
            files = {contrast: f"{name}_{contrast}.nii.gz" for contrast in CONTRASTS}
            rows.append({"id": name, "split": split, **files, "label": f"{name}_dseg.nii.gz"})
    # A process that was forked could not use the GPU.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(simulate, options.out, *each) for each in by_head.items()]
        for job in jobs:
            job.result()
    write_tsv(options.out / "cases.tsv", rows, ("id", "split", *CONTRASTS, "label"))


def simulate(out: Path, label_map: Path, scans: Sequence[Job]) -> None:
    """Simulate the scans of one head."""
    torch.set_num_threads(1)
    # The label map is the last file that is written of a scan.
    wanted = [(n, s) for n, s in scans if not (out / f"{n}_dseg.nii.gz").exists()]
    if not wanted:
        return
    head = read_head_map(label_map, resolve_device())
    for name, seed in wanted:
        scan = simulate_label_map(head, seed, draw_values(seed, "ordinary", PROTOCOL), box=BOX)
        for contrast in CONTRASTS:
            image = scan.maps[contrast].cpu().numpy().astype(np.float32)
            nib.save(nib.Nifti1Image(image, scan.affine), out / f"{name}_{contrast}.nii.gz")
        labels = scan.labels.cpu().numpy()
        nib.save(nib.Nifti1Image(labels, scan.affine), out / f"{name}_dseg.nii.gz")


if __name__ == "__main__":
    main()
