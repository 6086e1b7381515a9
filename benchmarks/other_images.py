"""The default model on images that the package's simulator did not make.

    python benchmarks/other_images.py --labels-dir ../shared/data/headlabels
        --real-head ../shared/data/megre/dcm_qa_philips_enh --work WORK

Plain images of the four heads that no training has seen, made here with NumPy and SciPy: each
tissue has the one value of the package's table, with soft borders and noise, and nothing else of
what the simulator adds (shapes of its own, texture, veins, ghosts, bias); QSM also as a thresholded
division of its own field gives it. The truth is known.

And the one real head at hand: magnitude and phase of two echoes at 3 mm, from which the app makes
the maps. No one has labelled it; the picture in WORK is to be looked at.

Writes ``results/plain_images.tsv`` and ``results/real_head.tsv``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import nibabel as nib
import numpy as np
import pandas as pd
import scipy.ndimage as ndi
from default_model_accuracy import HEADS, RESULTS
from experiment_tables import made_by
from machine import command_line
from real_echoes import DCM_QA

from fdl_bidsapp.bids.outputs import write_image, write_json, write_tsv
from fdl_bidsapp.imaging.overlap import dice
from fdl_bidsapp.models.bundle import Bundle, load_bundle
from fdl_bidsapp.settings import CONTRASTS
from fdl_bidsapp.simulation.labelmaps import INTRACRANIAL
from fdl_bidsapp.simulation.physiology import all_tissues, label_map_table
from fdl_bidsapp.simulation.writing import MAPS

mpl.use("Agg")
import matplotlib.pyplot as plt

Array = np.ndarray

NO_BRAIN = {"eyeball", "optic_chiasm", "optic_nerve", "spinal_cord"}
"""Structures of a tissue of the brain that lie outside it."""

ECHO_TIMES = np.arange(1, 6) * 5e-3
"""Seconds."""

UNITS = {"qsm": "ppm", "r2star": "1/s", "imag": "arbitrary"}
THRESHOLD = 0.15
"""Of the dipole kernel, below which the division takes this in its place."""

EDGE = 0.5
"""Standard deviation of the soft borders, in mm."""

NOISE = {"qsm": 0.015, "field": 0.002, "r2star": 2.0, "imag": 0.01}
"""Standard deviations: ppm, ppm, 1/s, share of the signal of water."""

SHOWN = (-0.1, 0.2)
"""Window of QSM in the picture, in ppm."""


def main() -> None:
    """Make the images, run the app, measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels-dir", type=Path, required=True)
    parser.add_argument("--real-head", type=Path, required=True, help="folder of its echoes")
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    bundle = load_bundle("default")
    command = command_line("benchmarks/other_images.py", WORK=options.work)
    made = {"model_sha256": bundle.sha256[:12], **made_by(command)}
    for name, rows in (
        ("plain_images", plain(options, bundle)),
        ("real_head", real(options, bundle)),
    ):
        write_tsv(RESULTS / f"{name}.tsv", [{**row, **made} for row in rows], (*rows[0], *made))


def plain(options: argparse.Namespace, bundle: Bundle) -> list[dict[str, Any]]:
    """Segment the plain images, and compare with the label maps."""
    folder = fresh(options.work / "plain")
    names = pd.read_csv(options.labels_dir / "dseg.tsv", sep="\t")
    truths = {}
    for h, head in enumerate(HEADS):
        image = nib.load(options.labels_dir / f"{head}_dseg.nii.gz")
        labels = np.asarray(image.dataobj)
        truths[head] = truth(labels, names, bundle)
        structures = dict(zip(names["index"], names["name"], strict=True))
        for kind, contrast, values in images(labels, structures, np.random.default_rng(h)):
            scan = f"{head}{kind}"
            stem = folder / "bids" / scan / "anat" / f"{scan}_{MAPS[contrast]}"
            write_json(Path(f"{stem}.json"), {"Units": UNITS[contrast]})
            write_image(f"{stem}.nii.gz", nib.Nifti1Image(values.astype(np.float32), image.affine))
    out = run_app(folder)
    cases = []
    for file in sorted(out.rglob("*_morph.tsv")):
        scan = file.name.removesuffix("_morph.tsv")
        head = next(head for head in HEADS if scan.startswith(head))
        mask = file.with_name(f"{scan}_space-orig_seg-fdl_dseg.nii.gz")
        found = np.asarray(nib.load(mask).dataobj)
        morph = pd.read_csv(file, sep="\t", na_values=["n/a"]).set_index("index")
        for label in bundle.spec.labels:
            mine, true = found == label.index, truths[head] == label.index
            case = {
                "dice": dice(mine, true),
                "volume_ratio": mine.sum() / true.sum(),
                "confidence": morph.loc[label.index, "confidence"],
            }
            kind = scan.removeprefix(head)
            cases.append({"images": kind, "structure": label.structure, **case})
    table = pd.DataFrame(cases).groupby(["images", "structure"], sort=False)
    summary = table.agg(
        masks=("dice", "size"),
        dice_mean=("dice", "mean"),
        dice_min=("dice", "min"),
        volume_ratio_mean=("volume_ratio", "mean"),
        confidence_mean=("confidence", "mean"),
    )
    print(summary.round(3).to_string(), file=sys.stderr)
    return summary.reset_index().to_dict("records")


def truth(labels: Array, names: pd.DataFrame, bundle: Bundle) -> Array:
    """Give the nuclei of a label map the model's indices."""
    found = np.zeros(labels.shape, np.uint8)
    known = names.set_index(["name", "hemisphere"])["index"]
    for label in bundle.spec.labels:
        found[labels == known[label.structure, label.hemisphere]] = label.index
    return found


def images(
    labels: Array, structures: Mapping[int, str], rng: np.random.Generator
) -> Iterator[tuple[str, str, Array]]:
    """Give name, contrast and values of each image of a head."""
    tissue = label_map_table()["tissues"]
    inside = {
        index: all_tissues()[tissue[name]]
        for index, name in structures.items()
        if tissue[name] in INTRACRANIAL and name not in NO_BRAIN
    }

    def painted(what: str, elsewhere: float) -> Array:
        lookup = np.full(max(structures) + 1, elsewhere)
        lookup[0] = 0
        for index, values in inside.items():
            lookup[index] = values[what]
        return ndi.gaussian_filter(lookup[labels], EDGE)

    chi, decay, density = painted("chi", 0.0), painted("r2star", 25.0), painted("rho", 0.5)
    brain = ndi.binary_fill_holes(np.isin(labels, list(inside)))
    noise = rng.standard_normal(labels.shape)
    yield "clean", "qsm", chi * brain
    yield "noisy", "qsm", (chi + NOISE["qsm"] * noise) * brain
    divided = divide(chi * brain, NOISE["field"] * noise * brain)
    yield "divided", "qsm", divided * brain
    yield "unmasked", "qsm", np.where(brain, divided, 0.05 * noise)
    yield "r2star", "r2star", np.clip(decay + NOISE["r2star"] * noise * (labels > 0), 0, None)
    signal = np.mean([density * np.exp(-time * decay) for time in ECHO_TIMES], axis=0)
    yield "imag", "imag", 1000 * np.abs(signal + NOISE["imag"] * noise)


def divide(chi: Array, noise: Array) -> Array:
    """Make the field of chi along z, add noise, divide by the kernel where that is not small."""
    padded = [(0, 32)] * 3
    k = np.meshgrid(*(np.fft.fftfreq(n + 32) for n in chi.shape), indexing="ij")
    square = k[0] ** 2 + k[1] ** 2 + k[2] ** 2
    square[0, 0, 0] = 1
    kernel = 1 / 3 - k[2] ** 2 / square
    kernel[0, 0, 0] = 0
    field = np.fft.fftn(np.pad(chi, padded)) * kernel + np.fft.fftn(np.pad(noise, padded))
    safe = np.where(np.abs(kernel) > THRESHOLD, kernel, np.copysign(THRESHOLD, kernel))
    return np.fft.ifftn(field / safe).real[:-32, :-32, :-32]


def real(options: argparse.Namespace, bundle: Bundle) -> list[dict[str, Any]]:
    """Run the app from the echoes of the real head on, and say what it finds in each contrast."""
    folder = fresh(options.work / "real")
    anat = folder / "bids" / "sub-01" / "anat"
    anat.mkdir(parents=True)
    for echo in (1, 2):
        for ending, part in (("", "mag"), ("_ph", "phase")):
            source = options.real_head / f"{DCM_QA}{echo}{ending}"
            for kind in (".nii.gz", ".json"):
                copy = anat / f"sub-01_echo-{echo}_part-{part}_MEGRE{kind}"
                shutil.copyfile(f"{source}{kind}", copy)
    rows = []
    for target in CONTRASTS:
        out = run_app(folder, "--target", target)
        table = pd.read_csv(
            out / "sub-01" / "anat" / "sub-01_morph.tsv", sep="\t", keep_default_na=False
        )
        kept = ("volume", "qsm_mean", "r2star_mean", "confidence", "qc_contrast", "qc_flag")
        rows += [
            {"target": target, "structure": row["abbreviation"], **{key: row[key] for key in kept}}
            for row in table.to_dict("records")
        ]
    draw(options.work / "real_head.png", folder / "out-qsm", bundle)
    print(pd.DataFrame(rows).to_string(), file=sys.stderr)
    return rows


def draw(path: Path, out: Path, bundle: Bundle) -> None:
    """Draw the QSM through the middle of each pair of nuclei, without and with the masks."""
    chi, masks = (
        np.squeeze(nib.as_closest_canonical(nib.load(next(out.rglob(name)))).get_fdata())
        for name in ("*_Chimap.nii.gz", "*_seg-fdl_dseg.nii.gz")
    )
    indices: dict[str, list[int]] = {}
    for label in bundle.spec.labels:
        indices.setdefault(label.structure, []).append(label.index)
    pairs = [np.isin(masks, pair) for pair in indices.values()]
    figure, axes = plt.subplots(2, len(pairs), figsize=(13, 7))
    for column, pair in zip(axes.T, pairs, strict=True):
        z = int(np.argmax(pair.sum((0, 1))))
        for axis in column:
            axis.imshow(chi[:, :, z].T, cmap="gray", origin="lower", vmin=SHOWN[0], vmax=SHOWN[1])
            axis.axis("off")
        column[1].contour(masks[:, :, z].T > 0, [0.5], colors="red", linewidths=0.8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def fresh(folder: Path) -> Path:
    """Make an empty folder with an empty dataset in it."""
    shutil.rmtree(folder, ignore_errors=True)
    about = {"Name": "Images that the simulator did not make", "BIDSVersion": "1.10.0"}
    write_json(folder / "bids" / "dataset_description.json", about)
    return folder


def run_app(folder: Path, *options: str) -> Path:
    """Run the participant level."""
    out = folder / "-".join(("out", *options[1:]))
    words = [Path(sys.executable).parent / "fdl-bidsapp", folder / "bids", out, "participant"]
    subprocess.run([*words, *options], check=True)
    return out


if __name__ == "__main__":
    main()
