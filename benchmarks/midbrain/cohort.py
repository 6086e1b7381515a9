"""Simulate the labelled cohort of the few-label experiment, as images and one table.

    python benchmarks/midbrain/cohort.py LABELS OUT [--jobs 2] [--box 64 80 72] [--train 51] \
        [--shifted] [--spin-echo]

``LABELS`` is a folder of head label maps (see docs/simulation.md). Training and validation scans
are of all but the last four heads, test scans of these. Each scan is a participant: no two are
deformed alike. Ordinary protocols, 1 mm, maps made from echoes; the images hold a box of ``--box``
mm around the nuclei. Run again, it goes on.

``cases.tsv`` has the labels of all nuclei, left and right; ``nuclei.tsv`` the red (1) and dentate
(2) nuclei of both sides, as the papers segment them. With ``--shifted`` there are as many scans
more to measure on, in ``shifted.tsv``: of the same heads, but with all that the simulator can do,
where the others are ordinary. With ``--spin-echo`` the test scans come as T1- and T2-weighted
images too, in tables of their own: ``T1w.tsv`` and ``T2w.tsv``, where they stand in the column
``imag``. Those are rough: the tissues' signal by the equations of a spin echo, with noise and the
coils' shading.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.models.inference import resolve_device
from fdl_bidsapp.physics.forward import average_slices
from fdl_bidsapp.simulation.acquisition import scan_grid, sensitivity
from fdl_bidsapp.simulation.anatomy import build_body, draw_deformation
from fdl_bidsapp.simulation.labelmaps import HeadMap, find_label_maps, read_head_map
from fdl_bidsapp.simulation.parameters import Value, Values, draw_values
from fdl_bidsapp.simulation.physiology import all_tissues, draw_properties, label_map_table
from fdl_bidsapp.simulation.simulator import simulate_label_map

CONTRASTS = ("qsm", "r2star", "imag", "swi")
BOX = (64.0, 80.0, 72.0)
PROTOCOL: dict[str, Value] = {"in_plane": 1.0, "slice_thickness": 1.0, "orientation": "RAS"}
SIZES = {"train": 51, "validation": 8, "test": 24, "shifted": 24}
TEST_HEADS = 4
TESTS = ("test", "shifted")
JOINED = ("red_nucleus", "dentate_nucleus")

T2_SHARE = 0.65
"""R2 over R2* at 3 T: with it T2 is 73 ms in white matter and 48 ms in the red nucleus."""

SPIN_ECHOES = {"T1w": (0.6, 0.01), "T2w": (4.0, 0.09)}
"""Repetition and echo time in seconds."""

SPIN_ECHO_NOISE = 0.02
"""Over the brightest tissue's signal."""

Job = tuple[str, int]
Box = tuple[float, float, float]


def main() -> None:
    """Simulate all scans and write their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--box", nargs=3, type=float, default=BOX)
    parser.add_argument("--train", type=int, default=SIZES["train"], help="scans to train with")
    parser.add_argument("--shifted", action="store_true", help="scans unlike those to train with")
    parser.add_argument("--spin-echo", action="store_true", help="T1w and T2w of the test scans")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    maps = find_label_maps(options.labels)
    by_head: dict[Path, list[Job]] = {path: [] for path in maps}
    rows, shifted = [], []
    sizes = SIZES | {"train": options.train}
    for start, (split, n) in enumerate(sizes.items()):
        if split == "shifted" and not options.shifted:
            continue
        heads = maps[-TEST_HEADS:] if split in TESTS else maps[:-TEST_HEADS]
        for i in range(n):
            # A number for each split, far from the next.
            name, seed = f"{split}-{i:02d}", 1000 * (start + 1) + i
            by_head[heads[i % len(heads)]].append((name, seed))
            files = {contrast: f"{name}_{contrast}.nii.gz" for contrast in CONTRASTS}
            row = {"id": name, "split": split, **files, "label": f"{name}_dseg.nii.gz"}
            if split == "shifted":
                shifted.append({**row, "split": "test"})
            else:
                rows.append(row)
    # A process that was forked could not use the GPU.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(simulate, options.out, *each, tuple(options.box), options.spin_echo)
            for each in by_head.items()
        ]
        for job in jobs:
            job.result()
    columns = ("id", "split", *CONTRASTS, "label")
    write_tsv(options.out / "cases.tsv", rows, columns)
    for table, chosen in (("nuclei", rows), ("shifted", shifted)):
        joined = [{**row, "label": join_sides(options.out / row["label"]).name} for row in chosen]
        if joined:
            write_tsv(options.out / f"{table}.tsv", joined, columns)
    for weighting in SPIN_ECHOES if options.spin_echo else ():
        own = [{**row, "imag": f"{row['id']}_{weighting}.nii.gz"} for row in rows]
        own = [row for row in own if row["split"] == "test"]
        write_tsv(options.out / f"{weighting}.tsv", own, ("id", "split", "imag", "label"))


def join_sides(path: Path) -> Path:
    """Write the red and dentate nuclei of a label map, left and right as one."""
    image = nib.nifti1.load(path)
    classes = np.asarray(image.dataobj)
    both = np.zeros_like(classes)
    for label in nuclei():
        if label.structure in JOINED:
            both[classes == label.index] = 1 + JOINED.index(label.structure)
    joined = path.with_name(path.name.replace("dseg", "nuclei"))
    nib.save(nib.Nifti1Image(both, image.affine), joined)
    return joined


def simulate(out: Path, label_map: Path, scans: Sequence[Job], box: Box, spin_echo: bool) -> None:
    """Simulate the scans of one head."""
    torch.set_num_threads(1)

    def missing(name: str, suffix: str) -> bool:
        return not (out / f"{name}_{suffix}.nii.gz").exists()

    def keep(name: str, suffix: str, image: torch.Tensor, affine: np.ndarray) -> None:
        nib.save(nib.Nifti1Image(image.cpu().numpy(), affine), out / f"{name}_{suffix}.nii.gz")

    weightings = list(SPIN_ECHOES) if spin_echo else []
    head = None
    for name, seed in scans:
        profile = "full" if name.startswith("shifted") else "ordinary"
        values = draw_values(seed, profile, PROTOCOL)
        others = [w for w in weightings if name.startswith("test") and missing(name, w)]
        # The label map is the last file that is written of a scan.
        whole = missing(name, "dseg")
        if not (whole or others):
            continue
        head = head or read_head_map(label_map, resolve_device())
        for weighting in others:
            keep(name, weighting, *spin_echo_image(head, seed, values, box, weighting))
        if whole:
            scan = simulate_label_map(head, seed, values, box=box)
            for contrast in CONTRASTS:
                keep(name, contrast, scan.maps[contrast].float(), scan.affine)
            keep(name, "dseg", scan.labels, scan.affine)


def spin_echo_image(
    head: HeadMap, seed: int, values: Values, box: Box, weighting: str
) -> tuple[torch.Tensor, np.ndarray]:
    """Simulate a spin echo of what :func:`simulate_label_map` scans, with its affine."""
    repetition, echo = SPIN_ECHOES[weighting]
    deformation, tissues = draw_deformation(head, seed, values), draw_properties(seed, values)
    weighted = {}
    for name, tissue in tissues.items():
        # The scan's own signal at echo time zero is weighted by T1 already.
        density, t1 = all_tissues()[name]["rho"], label_map_table()["t1"][name]
        recovered = 1 - np.exp(-repetition / t1)
        signal = density * recovered * np.exp(-echo * T2_SHARE * tissue.r2star)
        weighted[name] = replace(tissue, rho=float(signal))
    grid = scan_grid(head, deformation, seed, values, box)
    body = build_body(head, deformation, weighted, values, seed, grid.fine_shape, grid.fine_affine)
    image = average_slices(body.rho, grid.parts)
    image = image * sensitivity(grid, seed, values, str(image.device))
    # Noise of another day than the gradient echo's.
    source = torch.Generator(image.device).manual_seed(2**32 + seed)
    level = SPIN_ECHO_NOISE * float(image.quantile(0.99))
    parts = [torch.randn(image.shape, generator=source, device=image.device) for _ in range(2)]
    return torch.hypot(image + level * parts[0], level * parts[1]), grid.affine


if __name__ == "__main__":
    main()
