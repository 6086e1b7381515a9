"""What the app costs beside its bare steps: one scan of four maps of 160 × 160 × 128.

The same scan goes through ``fdl-bidsapp … participant`` (a process of its own, from the command to
its end) and through the five steps alone in one process whose imports are done and whose model is
loaded: read, conform, network, restore, write. The target is twice the sum plus 5 s.

Run it with ``python benchmarks/overhead.py [--repeats 3] [--model default]``.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import nibabel as nib
import numpy as np
from machine import machine
from scipy import ndimage

from fdl_bidsapp.bids.outputs import write_tsv

SHAPE = (160, 160, 128)
MAPS = {"Chimap": 0.1, "R2starmap": 30.0, "part-mag_T2starw": 500.0, "swi": 400.0}
STEPS = ("read", "conform", "network", "restore", "write")
RESULTS = Path(__file__).parent / "results" / "overhead.tsv"
COLUMNS = ("case", "seconds", "target_seconds", "command", "machine", "versions")


def make_dataset(root: Path) -> None:
    """Write one participant's maps: smooth noise within an ellipsoid."""
    anat = root / "sub-01" / "anat"
    anat.mkdir(parents=True)
    description = {"Name": "one scan", "BIDSVersion": "1.10.0"}
    (root / "dataset_description.json").write_text(json.dumps(description))
    axes = np.ogrid[tuple(slice(-1, 1, length * 1j) for length in SHAPE)]
    head = sum(axis**2 for axis in axes) < 0.8
    rng = np.random.default_rng(0)
    for name, size in MAPS.items():
        texture = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 2).astype(np.float32)
        data = size * (texture / texture.std() + (0 if name == "Chimap" else 4)) * head
        image = nib.Nifti1Image(data.astype(np.float32), np.eye(4))
        image.set_sform(np.eye(4), 1)
        image.to_filename(anat / f"sub-01_{name}.nii.gz")


def bare_steps(bids: Path, out: Path, model: str) -> dict[str, float]:
    """Time each step in this process."""
    import torch

    from fdl_bidsapp.bids.inputs import find_scans
    from fdl_bidsapp.derivatives import Provenance, write_scan
    from fdl_bidsapp.models.bundle import load_bundle
    from fdl_bidsapp.pipeline import read_scan, segment_canvas, to_canvas, to_native

    (scan,) = find_scans(bids).scans
    bundle = load_bundle(model)
    network, device, spec = bundle.network(), torch.device("cpu"), bundle.spec
    marks = [time.perf_counter()]
    images = read_scan(scan, "auto", spec.contrasts)
    marks.append(time.perf_counter())
    canvas = to_canvas(images, spec)
    marks.append(time.perf_counter())
    probabilities, affine = segment_canvas(canvas, bundle, network, device)
    marks.append(time.perf_counter())
    segmentation = to_native(probabilities, affine, images, spec)
    marks.append(time.perf_counter())
    provenance = Provenance(spec.name, bundle.sha256, "")
    write_scan(out, scan, images, segmentation, spec.labels, provenance)
    marks.append(time.perf_counter())
    return dict(zip(STEPS, np.diff(marks).tolist(), strict=True))


def whole_run(bids: Path, out: Path, model: str) -> float:
    """Time the app from its start to its end."""
    command = [sys.executable, "-c", "from fdl_bidsapp.cli.app import main; main()"]
    start = time.perf_counter()
    subprocess.run(
        [*command, bids, out, "participant", "--model", model, "--device", "cpu"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def main() -> None:
    """Measure both and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="default")
    parser.add_argument("--bare", nargs=2, type=Path, metavar=("BIDS", "OUT"), help="internal")
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare_steps(*options.bare, options.model)))
        return

    bare: list[dict[str, float]] = []
    whole: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        bids = Path(folder) / "bids"
        make_dataset(bids)
        for k in range(options.repeats):
            alone = Path(folder) / f"bare{k}"
            words = [sys.executable, __file__, "--model", options.model, "--bare", bids, alone]
            run = subprocess.run(words, check=True, capture_output=True, text=True)
            bare.append(json.loads(run.stdout))
            whole.append(whole_run(bids, Path(folder) / f"out{k}", options.model))
    seconds = {step: median(each[step] for each in bare) for step in STEPS}
    total = sum(seconds.values())
    seconds |= {"sum of the bare steps": total, "whole participant run": median(whole)}
    about = {
        "command": f"python benchmarks/overhead.py --repeats {options.repeats} "
        f"--model {options.model}",
        "machine": machine(),
        "versions": f"Python {platform.python_version()}, torch {version('torch')}, "
        f"nipype {version('nipype')}, fdl-bidsapp {version('fdl-bidsapp')}",
    }
    targets = {"whole participant run": 2 * total + 5}
    rows = [
        {"case": case, "seconds": value, "target_seconds": targets.get(case), **about}
        for case, value in seconds.items()
    ]
    for row in rows:
        target = f" (target: {row['target_seconds']:.1f} s)" if row["target_seconds"] else ""
        print(f"{row['case']}: {row['seconds']:.2f} s{target}")
    write_tsv(RESULTS, rows, COLUMNS)


if __name__ == "__main__":
    main()
