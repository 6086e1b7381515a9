"""What the reports cost, and two of them to look at.

A cohort of made-up records, four structures a scan, goes through the group level: tables, group
page, and the page of each participant. Then the figures of one scan of 160 × 160 × 128 are drawn,
eight structures in four contrasts, and its page is made. Each in a process of its own, by
processor time. The targets: 6 s for a participant's figures and page, 20 s and 1 GB for the group
page of 1,000 scans, 10 MB for that of 5,000.

Run it with ``python benchmarks/reports.py [--scans 1000 5000]``. With ``--screenshots OUT`` (the
output folder of ``make demo``) and chromium installed, it makes the pictures of docs/reports.md.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine
from PIL import Image

from fdl_bidsapp.bids.outputs import write_json, write_tsv
from fdl_bidsapp.cohort import collect, write_group
from fdl_bidsapp.imaging.measure import COLUMNS
from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.pipeline import ScanImages, Segmentation
from fdl_bidsapp.reports.group import write_group_page
from fdl_bidsapp.reports.participant import write_cohort_participants, write_participants
from fdl_bidsapp.reports.reportlets import draw_scan

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "reports.tsv"
HEADINGS = ("case", "value", "unit", "target", "command", "machine")
SHAPE = (160, 160, 128)
VOLUMES = {"red_nucleus": 280.0, "dentate_nucleus": 900.0}
SHIFTS = {"control": 0.0, "PD": 0.02, "MSA": 0.01}


def make_cohort(root: Path, scans: int) -> tuple[Path, Path]:
    """Write the records and tables of made-up scans; return output folder and dataset."""
    rng = np.random.default_rng(0)
    out, bids = root / "out", root / "bids"
    people = []
    for k in range(scans):
        name = f"sub-{k + 1:04d}"
        age = float(rng.uniform(40, 85))
        diagnosis = str(rng.choice(list(SHIFTS), p=[0.5, 0.4, 0.1]))
        sex = str(rng.choice(["F", "M"]))
        people.append({"participant_id": name, "age": age, "sex": sex, "diagnosis": diagnosis})
        size = 1 + 0.1 * rng.standard_normal()
        rows = []
        for label in nuclei()[:4]:
            volume = VOLUMES[label.structure] * size * (1 + 0.06 * rng.standard_normal())
            volume *= 2 if rng.random() < 0.004 else 1
            qsm = 0.1 + 0.0008 * (age - 60) + SHIFTS[diagnosis] + 0.015 * rng.standard_normal()
            rate = 22 + 180 * qsm + 2 * rng.standard_normal()
            flag = "ok" if rng.random() < 0.97 else "low_probability"
            rows.append(
                {
                    **{name: getattr(label, name, None) for name in COLUMNS},
                    **{"volume": volume, "n_voxels": round(volume), "volume_soft": volume},
                    **{f"qsm_{part}": qsm for part in ("mean", "median")},
                    **{f"r2star_{part}": rate for part in ("mean", "median")},
                    **{"qc_mean_probability": 0.93, "qc_touches_fov": 0, "qc_flag": flag},
                }
            )
        stem = out / name / "anat" / f"{name}_morph"
        if failed := rng.random() < 0.01:
            error = {"Path": None, "Cause": "the file is cut short", "Remedy": "copy it again"}
        else:
            write_tsv(stem.with_suffix(".tsv"), rows, list(COLUMNS))
        write_json(
            stem.with_suffix(".json"),
            {
                "Status": "failed" if failed else "ok",
                "Error": error if failed else None,
                "Entities": {"subject": name[4:]},
                "AppVersion": "0.1.0",
                "ModelName": "made up",
                "ModelSHA256": "0" * 64,
                "Target": "qsm",
                "InputsUsed": {key: [f"bids:raw:{name}_{key}.nii"] for key in ("qsm", "r2star")},
                "VoxelVolume": 1.0,
                "BrainVolume": 1.2e6 * size,
                "Notes": [],
            },
        )
    write_tsv(bids / "participants.tsv", people, list(people[0]))
    write_json(out / "dataset_description.json", {"Name": "A cohort of made-up numbers"})
    return out, bids


def group_level(out: Path, bids: Path) -> dict[str, float]:
    """Time the steps of the group level in this process."""
    marks = [time.process_time()]
    cohort = write_group(out, bids)
    marks.append(time.process_time())
    page = write_group_page(out, cohort)
    marks.append(time.process_time())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    write_cohort_participants(out, cohort)
    marks.append(time.process_time())
    tables, group, participants = np.diff(marks).tolist()
    return {
        "tables": tables,
        "group page": group,
        "participant pages": participants,
        "memory": peak,
        "size": page.stat().st_size / 1e6,
    }


def one_scan(folder: Path) -> dict[str, float]:
    """Time the figures and the page of one scan, imports included."""
    rng = np.random.default_rng(0)
    grid = np.indices(SHAPE)
    labels = np.zeros(SHAPE, np.uint8)
    for label in nuclei():
        centre = np.array([50 + 60 * (label.hemisphere == "R"), 80, 15 + 12 * label.index])
        labels[((grid - centre.reshape(3, 1, 1, 1)) ** 2).sum(0) <= 25] = label.index
    probabilities = np.stack([labels == label.index for label in nuclei()]).astype(np.float32)
    maps = {
        name: (size * (1 + (labels > 0) + 0.1 * rng.standard_normal(SHAPE))).astype(np.float32)
        for name, size in {"qsm": 0.08, "r2star": 20.0, "imag": 500.0, "swi": 400.0}.items()
    }
    start = time.process_time()
    figures = draw_scan(
        ScanImages("qsm", maps, np.eye(4)), Segmentation(labels, probabilities), nuclei()
    )
    drawn = time.process_time()
    out, _ = make_cohort(folder, 1)
    start_page = time.process_time()
    write_participants(out)
    page = time.process_time() - start_page
    return {
        "figures": drawn - start,
        "page": page,
        "size": sum(len(figure.svg) for figure in figures) / 1e6,
    }


def apart(*words: object) -> dict[str, float]:
    """Run a part of this file in a process of its own."""
    command = [sys.executable, __file__, "--part", *map(str, words)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(run.stdout)
    return result


def screenshots(demo: Path, folder: Path) -> None:
    """Take the pictures of the docs."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    browser_path, driver_path = shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser_path and driver_path):
        raise SystemExit("needs chromium and chromium-driver")
    options = ChromeOptions()
    # With both paths given, selenium looks for nothing in the network, and reports nothing.
    options.binary_location = browser_path
    for word in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(word)
    browser = Chrome(options=options, service=ChromeService(driver_path))

    def take(page: Path, name: str, width: int, height: int, scroll: str) -> None:
        view = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
        browser.get(page.absolute().as_uri())
        browser.execute_script(f"document.getElementById('{scroll}').scrollIntoView()")
        time.sleep(5)
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        picture.quantize(256).save(folder / name, optimize=True)

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        out, bids = make_cohort(Path(root), 300)
        page = write_group_page(out, collect(out, bids))
        take(page, "group.png", 1280, 1250, "overview")
    try:
        take(demo / "sub-01.html", "participant.png", 1280, 1250, "sub-01_ses-1_RNL")
    finally:
        browser.quit()


def main() -> None:
    """Measure and write the table, or take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--screenshots", type=Path, metavar="OUT")
    parser.add_argument("--part", nargs="+", help="internal")
    options = parser.parse_args()
    if options.screenshots:
        screenshots(options.screenshots, ROOT / "docs" / "images")
        return
    if options.part:
        part, *paths = options.part
        run = {"group": group_level, "scan": one_scan}[part]
        print(json.dumps(run(*map(Path, paths))))
        return
    found: list[tuple[str, float, str, float | None]] = []
    with tempfile.TemporaryDirectory() as root:
        seconds = apart("scan", Path(root) / "scan")
        found += [
            ("figures of a scan", seconds["figures"], "s", None),
            ("page of a participant", seconds["page"], "s", None),
            ("both", seconds["figures"] + seconds["page"], "s", 6),
            ("size of the figures", seconds["size"], "MB", None),
        ]
        for scans in options.scans:
            result = apart("group", *make_cohort(Path(root) / str(scans), scans))
            units = {"memory": "GB", "size": "MB"}
            targets = {"group page": 20, "memory": 1, "size": 10}
            found += [
                (f"{scans} scans: {name}", value, units.get(name, "s"), targets.get(name))
                for name, value in result.items()
            ]
    words = " ".join(map(str, options.scans))
    about = {"command": f"python benchmarks/reports.py --scans {words}", "machine": machine()}
    rows = [dict(zip(HEADINGS, each, strict=False)) | about for each in found]
    for case, value, unit, target in found:
        print(f"{case}: {value:.2f} {unit}" + (f" (target: {target} {unit})" if target else ""))
    write_tsv(RESULTS, rows, HEADINGS)


if __name__ == "__main__":
    main()
