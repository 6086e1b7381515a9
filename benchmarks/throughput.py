"""Scans a minute of the whole app, beside a bare loop and beside nnU-Net's predictor.

The same simulated scans go through the app's participant and group levels, through a loop in one
process (read, network, write: the app's own functions, nothing around them) and, where it is
installed, through ``nnUNetv2_predict`` with an untrained network of like size. Targets: the app
takes at most 20 % longer than the loop and is faster than nnU-Net; its work folder holds fewer than
100 files a scan while it runs and none after.

Run it with ``python benchmarks/throughput.py [--scans 50] [--cores 1 2] [--device cpu]``, on a
machine that has nothing else to do. nnU-Net needs an environment of its own, for its dependencies
are not ours: ``python -m venv NN; NN/bin/pip install torch==2.13.0 nnunetv2``; then add
``--nnunet NN``.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from cohort import make_cohort
from machine import machine
from watch import Watched, watch

from fdl_bidsapp.bids.outputs import write_tsv

RESULTS = Path(__file__).parent / "results" / "throughput.tsv"
APP = (sys.executable, "-c", "from fdl_bidsapp.cli.app import main; main()")
MAX_OVERHEAD = 0.20
MAX_FILES = 100


def bare_loop(bids: Path, out: Path, model: str, device: str) -> None:
    """Segment scan after scan with nothing around it."""
    import torch

    from fdl_bidsapp.bids.inputs import find_scans
    from fdl_bidsapp.derivatives import Provenance, write_scan
    from fdl_bidsapp.models.bundle import load_bundle
    from fdl_bidsapp.pipeline import read_scan, segment_canvas, to_canvas, to_native

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    bundle = load_bundle(model)
    spec, network = bundle.spec, bundle.network(device)
    provenance = Provenance(spec.name, bundle.sha256, "")
    for scan in find_scans(bids).scans:
        images = read_scan(scan, "auto", spec.contrasts)
        probabilities, affine = segment_canvas(
            to_canvas(images, spec), bundle, network, torch.device(device)
        )
        native = to_native(probabilities, affine, images, spec)
        write_scan(out, scan, images, native, spec.labels, provenance)


def run_app(bids: Path, folder: Path, cores: int, model: str, device: str) -> Watched:
    """Watch both levels of the app."""
    out, work = folder / "out", folder / "work"
    words = ["--model", model, "--device", device, "--nprocs", cores, "--work-dir", work]
    seen = watch([*APP, bids, out, "participant", *words], cores=cores, work=work)
    group = watch([*APP, bids, out, "group"], cores=cores)
    seen.seconds += group.seconds
    seen.samples += group.samples
    return seen


def run_nnunet(
    environment: Path, bids: Path, scans: int, folder: Path, cores: int, device: str
) -> Watched:
    """Watch nnU-Net's predictor on the first of the same QSM maps."""
    inputs, model = folder / "inputs", folder / "model"
    inputs.mkdir()
    for path in sorted(bids.rglob("*_Chimap.nii.gz"))[:scans]:
        (inputs / f"{path.name.split('_')[0]}_0000.nii.gz").symlink_to(path)
    maker = Path(__file__).with_name("nnunet_model.py")
    quiet = {"nnUNet_raw": "x", "nnUNet_preprocessed": "x", "nnUNet_results": "x"}
    subprocess.run(
        [environment / "bin" / "python", maker, model],
        check=True,
        env={**os.environ, **quiet},
        stdout=subprocess.DEVNULL,
    )
    words = ["-i", inputs, "-o", folder / "predicted", "-m", model, "-f", 0, "-device", device]
    words += ["--disable_tta", "-npp", 1, "-nps", 1]
    program = environment / "bin" / "nnUNetv2_predict_from_modelfolder"
    return watch([program, *words], cores=cores, environment=quiet)


def main() -> None:
    """Measure all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, default=50)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="default")
    parser.add_argument("--nnunet", type=Path, metavar="ENVIRONMENT")
    parser.add_argument("--nnunet-scans", type=int, help="of the same; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--bare", nargs=2, type=Path, metavar=("BIDS", "OUT"), help="internal")
    options = parser.parse_args()
    if options.bare:
        bare_loop(*options.bare, options.model, options.device)
        return

    number = dict.fromkeys(("bare loop", "fdl-bidsapp", "nnU-Net"), options.scans)
    number["nnU-Net"] = min(options.nnunet_scans or options.scans, options.scans)
    rows = []
    with tempfile.TemporaryDirectory() as root:
        bids = make_cohort(Path(root, "bids"), options.scans)
        for cores in options.cores:
            folder = Path(root, f"cores{cores}")
            folder.mkdir()
            bare = [sys.executable, __file__, "--model", options.model, "--device", options.device]
            loop = watch([*bare, "--bare", bids, folder / "bare"], cores=cores)
            app = run_app(bids, folder, cores, options.model, options.device)
            runs = {"bare loop": loop, "fdl-bidsapp": app}
            if options.nnunet:
                runs["nnU-Net"] = run_nnunet(
                    options.nnunet, bids, number["nnU-Net"], folder, cores, options.device
                )
            rows += [
                row(name, number[name], seen, loop, options, cores) for name, seen in runs.items()
            ]
            overhead = app.seconds / loop.seconds - 1
            files = app.peak_files / min(cores, options.scans)
            print(f"{cores} cores: {overhead:+.0%} over the bare loop (target {MAX_OVERHEAD:.0%})")
            print(
                f"  {files:.0f} files a scan at work (target {MAX_FILES}), {app.files_after} left"
            )
            for name, seen in runs.items():
                print(f"  {name}: {60 * number[name] / seen.seconds:.1f} scans a minute")
    write_tsv(options.results, [*kept(options.results, rows), *rows], list(rows[0]))


def kept(table: Path, rows: Sequence[dict[str, object]]) -> list[dict[str, str]]:
    """Return the rows of the table that these do not replace; each says how it was measured."""
    if not table.is_file():
        return []
    with table.open(encoding="utf-8", newline="") as lines:
        before = list(csv.DictReader(lines, delimiter="\t"))
    key = ("tool", "cores", "device")
    new = {tuple(str(row[name]) for name in key) for row in rows}
    return [row for row in before if tuple(row[name] for name in key) not in new]


def row(
    name: str,
    scans: int,
    seen: Watched,
    loop: Watched,
    options: argparse.Namespace,
    cores: int,
) -> dict[str, object]:
    """Return a row of the table."""
    at_once = min(cores, scans)
    per_scan, bare = seen.seconds / scans, loop.seconds / options.scans
    app = name == "fdl-bidsapp"
    return {
        "tool": name,
        "cores": cores,
        "device": options.device,
        "scans": scans,
        "seconds": seen.seconds,
        "scans_per_minute": 60 / per_scan,
        "overhead_seconds_per_scan": per_scan - bare,
        "overhead": per_scan / bare - 1,
        "peak_memory_mb": seen.peak_memory,
        "work_files_per_scan_at_work": seen.peak_files / at_once if app else None,
        "work_mb_per_scan_at_work": seen.peak_bytes / at_once / 1e6 if app else None,
        "work_files_after": seen.files_after if app else None,
        "command": f"python benchmarks/throughput.py --scans {options.scans} "
        f"--cores {' '.join(map(str, options.cores))} --device {options.device} "
        f"--model {options.model}{' --nnunet NN' if options.nnunet else ''}"
        f"{f' --nnunet-scans {options.nnunet_scans}' if options.nnunet_scans else ''}",
        "machine": machine(),
        "versions": f"Python {platform.python_version()}, torch {version('torch')}, "
        f"nipype {version('nipype')}, fdl-bidsapp {version('fdl-bidsapp')}",
    }


if __name__ == "__main__":
    main()
