"""How well susceptibility is reconstructed: each inversion alone, and the whole chain.

    python benchmarks/reconstruction.py [--heads N] [--spacing MM] [--recon NAME|FILE ...]
    python benchmarks/reconstruction.py --page-only | --stages time
    python -m venv peer && peer/bin/pip install qsm-forward
    python benchmarks/reconstruction.py --stages phantom --peer peer/bin/python

Heads that nothing was tuned on are simulated with air around them, several echoes and noise. Each
inversion is measured twice: on the true local field with noise (isolated), and at the end of the
chain from the echoes (unwrapping, brain mask, V-SHARP, inversion). NRMSE in % of the truth's
standard deviation and XSIM (Milovic et al., Magn. Reson. Med. 93 (2025) 411-421) in the mask, both
after taking out the means. Background removals are measured by the local field that they leave, and
by the QSM that total variation makes of it: all of them in the mask of the one that leaves least.
The time is that of the chain on a grid of 160 x 160 x 128 voxels with five echoes, on a machine
that does nothing else. The phantom is the cylinders of an independent simulator, qsm-forward; it is
under the GPL, never imported here, and run by a Python of its own environment. Writes
``results/reconstruction.tsv`` (one row a head and method) and, from that, the figures in
docs/reconstruction.md.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.fft
import scipy.ndimage as ndi
from machine import machine
from page import replace_part

from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.imaging.reconstruction import (
    INVERSIONS,
    Inversion,
    RawEchoes,
    named_inversion,
    reconstruct,
)
from fdl_bidsapp.imaging.relaxometry import (
    mean_magnitude,
    r2star_from_t2star,
    r2star_loglinear,
)
from fdl_bidsapp.making import network_inversion
from fdl_bidsapp.physics import GAMMA_BAR
from fdl_bidsapp.physics.background import project_onto_dipoles, v_sharp
from fdl_bidsapp.physics.dipole import (
    field_direction,
    field_from_susceptibility,
    field_of_distant_sources,
)
from fdl_bidsapp.physics.iterative import remaining_background
from fdl_bidsapp.physics.signal import add_noise, multi_echo_signal
from fdl_bidsapp.simulation.contrast import susceptibility_map
from fdl_bidsapp.simulation.geometry import smooth_noise
from fdl_bidsapp.simulation.head import build_head
from fdl_bidsapp.simulation.scan import scan_geometry
from fdl_bidsapp.simulation.tissue import draw_tissues

Array = np.ndarray

TIMES, FIELD_STRENGTH, SNR = (0.004, 0.010, 0.016, 0.022, 0.028), 3.0, 60.0
RADIANS_PER_PPM = 2 * np.pi * GAMMA_BAR * FIELD_STRENGTH * float(np.mean(TIMES))
TIMED_GRID, TIMED_SPACING = (160, 160, 128), 1.3
"""Voxels and mm, about a whole head."""
COLUMNS = (
    "head",
    "stage",
    "method",
    "voxel_mm",
    "grid",
    "nrmse_percent",
    "xsim",
    "seconds",
    "cpu_seconds",
    "command",
    "machine",
    "versions",
)
RESULTS = Path(__file__).parent / "results" / "reconstruction.tsv"
DOCUMENT = Path(__file__).parents[1] / "docs" / "reconstruction.md"
STAGES = {
    "isolated": ("isolated",),
    "background": ("background", "background, tv"),
    "chain": ("chain",),
    "time": ("time",),
    "phantom": ("phantom", "phantom, chain"),
}
"""What can be measured by itself, and what it is called in the table."""

BARS = {"nrmse": 30.0, "seconds": 60.0}
"""% of total variation alone; the chain on the timed grid."""


PEER = """
import sys
import numpy as np
import qsm_forward
chi = qsm_forward.generate_susceptibility_phantom(
    resolution=[100, 100, 100], background=0, large_cylinder_val=0.005,
    small_cylinder_radii=[4, 4, 4, 7], small_cylinder_vals=[0.05, 0.1, 0.2, 0.5],
)
mask = chi != 0
field = qsm_forward.generate_field(chi, voxel_size=[1, 1, 1], B0_dir=[0, 0, 1]).real
rng = np.random.default_rng(0)
signals = [
    qsm_forward.add_noise(
        qsm_forward.generate_signal(
            field, B0=float(sys.argv[2]), TR=1e3, TE=float(time), flip_angle=90, R1=1.0,
            R2star=np.where(mask, 15 + 100 * chi, 0), M0=mask.astype(float),
        ),
        peak_snr=float(sys.argv[3]), rng=rng,
    )
    for time in sys.argv[4:]
]
np.savez(sys.argv[1], chi=chi, mask=mask, field=field, signal=np.stack(signals, -1))
"""


def main() -> None:
    """Measure all methods on all heads, write table and page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--spacing", type=float, default=1.0, help="voxel size in mm")
    parser.add_argument("--recon", nargs="+", default=list(INVERSIONS), help="methods or files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page-only", action="store_true", help="from the table that is there")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES][:-1])
    parser.add_argument("--peer", type=Path, help="a Python that has qsm-forward")
    options = parser.parse_args()
    if "phantom" in options.stages and options.peer is None:
        parser.error("the phantom needs --peer")
    if not options.page_only:
        made = {
            "command": "python benchmarks/reconstruction.py "
            + " ".join("PYTHON" if word == str(options.peer) else word for word in sys.argv[1:]),
            "machine": machine(),
            "versions": f"Python {platform.python_version()}, fdl-bidsapp {version('fdl-bidsapp')}",
        }
        rows = kept(options.stages)
        for head in range(0 if {*options.stages} <= {"time", "phantom"} else options.heads):
            for row in measure(head, options):
                rows.append({"head": head, "voxel_mm": options.spacing, **row, **made})
                print(*(rows[-1][key] for key in COLUMNS[:-3]), sep="\t", flush=True)
                write_tsv(RESULTS, rows, COLUMNS)
        if "phantom" in options.stages:
            for row in phantom(options):
                rows.append({"head": "cylinders", "voxel_mm": 1.0, **row, **made})
            write_tsv(RESULTS, rows, COLUMNS)
        if "time" in options.stages:
            row = timed_chain(options.threads)
            rows.append({"head": 0, "voxel_mm": TIMED_SPACING, **row, **made})
            write_tsv(RESULTS, rows, COLUMNS)
    replace_part(DOCUMENT, "benchmarks/reconstruction.py", figures())


def phantom(options: argparse.Namespace) -> Iterator[dict]:
    """Reconstruct the cylinders of qsm-forward, from its field and from its echoes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.npz")
        words = (options.peer, "-c", PEER, file, FIELD_STRENGTH, SNR, *TIMES)
        subprocess.run([str(word) for word in words], check=True)
        with np.load(file) as found:
            chi, mask, field, signal = (found[key] for key in ("chi", "mask", "field", "signal"))
    subject = _measured(mask, chi, field, signal, np.eye(4))
    noise = np.random.default_rng(1).normal(0, 1 / (SNR * RADIANS_PER_PPM), field.shape)
    local = np.where(mask, field + noise, 0).astype(np.float32)
    yield from inverted("phantom", subject, local, mask, options)
    yield from reconstructed("phantom, chain", subject, options, brain=mask)


def kept(stages: Sequence[str]) -> list[dict]:
    """Return the rows of the table that belong to no stage that is measured now."""
    if not RESULTS.exists():
        return []
    table = pd.read_csv(RESULTS, sep="\t", keep_default_na=False)
    again = [stage for name in stages for stage in STAGES[name]]
    return table[~table["stage"].isin(again)].to_dict("records")


def timed_chain(threads: int) -> dict[str, object]:
    """Measure the time of the default chain on a head of the timed grid."""
    affine = np.diag([TIMED_SPACING] * 3 + [1.0])
    affine[:3, 3] = -TIMED_SPACING * (np.array(TIMED_GRID) - 1) / 2
    echoes = _simulate(np.random.default_rng(0), TIMED_GRID, affine).echoes
    _, times = _timed(_all_maps, echoes, threads)
    return {
        "stage": "time",
        "method": "tv",
        "grid": _grid(echoes.magnitude.shape),
        "nrmse_percent": "n/a",
        "xsim": "n/a",
        "seconds": times[0],
        "cpu_seconds": times[1],
    }


def _all_maps(echoes: RawEchoes, threads: int) -> None:
    """Make what the app delivers of a scan's echoes."""
    reconstruct(echoes, "tv", threads=threads)
    mean_magnitude(echoes.magnitude)
    r2star_from_t2star(r2star_loglinear(echoes.magnitude, echoes.echo_times))


def figures() -> str:
    """Return the measured figures as Markdown."""
    table = pd.read_csv(RESULTS, sep="\t", na_values="n/a")
    measured, timed = table[table["stage"] != "time"], table[table["stage"] == "time"]
    titles = {
        "isolated": "inversion alone, of the true local field with noise",
        "background": "local field after background removal, with noise",
        "background, tv": "QSM by total variation of that local field",
        "chain": "QSM at the end of the chain",
        "phantom": "cylinders of qsm-forward: inversion of its field with noise",
        "phantom, chain": "cylinders of qsm-forward: QSM from its echoes",
    }
    lines = ["| | method | NRMSE, % | XSIM |", "| --- | --- | ---: | ---: |"]
    groups = measured.groupby(["stage", "method"], sort=False)
    for (stage, method), own in sorted(groups, key=lambda group: [*titles].index(group[0][0])):
        nrmse_cell = f"{own['nrmse_percent'].mean():.1f}{_range(own['nrmse_percent'])}"
        likeness = "" if stage == "background" else f"{own['xsim'].mean():.3f}"
        lines.append(f"| {titles[str(stage)]} | {method} | {nrmse_cell} | {likeness} |")
    first = measured.iloc[0]
    heads = measured.loc[measured["stage"] == "isolated", "head"].nunique()
    alone = measured[(measured["stage"] == "isolated") & (measured["method"] == "tv")]
    error = alone["nrmse_percent"].mean()
    verdict = "met" if error <= BARS["nrmse"] else "missed"
    parts = [
        f"{heads} simulated heads that nothing was tuned on, voxels of"
        f" {first['voxel_mm']:g} mm, {len(TIMES)} echoes at {FIELD_STRENGTH:g} T with noise and the"
        " field of the air around them; mean, least and greatest (`benchmarks/results/"
        "reconstruction.tsv`).",
        "\n".join(lines),
        f"Total variation alone is to stay within {BARS['nrmse']:g} % NRMSE: {error:.1f} %,"
        f" {verdict}.",
    ]
    if len(timed):
        row = timed.iloc[0]
        verdict = "met" if row["seconds"] <= BARS["seconds"] else "missed"
        parts.append(
            f"From the echoes to QSM, SWI, R2*, T2* and mean magnitude in memory ({row['grid']}):"
            f" {row['seconds']:.0f} s on {row['machine']}; aimed at is {BARS['seconds']:g} s,"
            f" {verdict}."
        )
    return "\n\n".join(parts)


def _range(values: pd.Series) -> str:
    return f" ({values.min():.1f} to {values.max():.1f})" if len(values) > 1 else ""


def measure(seed: int, options: argparse.Namespace) -> Iterator[dict]:
    """Measure on one head what is asked for."""
    import torch

    torch.set_num_threads(options.threads)
    rng = np.random.default_rng([90210, seed])
    shape, affine = scan_geometry((options.spacing,) * 3, rng.normal(0, 8, 3))
    subject = _simulate(rng, shape, affine)
    if "isolated" in options.stages:
        yield from isolated(subject, rng, options)
    if "background" in options.stages:
        yield from background(subject, np.random.default_rng([90211, seed]), options)
    if "chain" in options.stages:
        yield from reconstructed("chain", subject, options)


def isolated(
    subject: Subject, rng: np.random.Generator, options: argparse.Namespace
) -> Iterator[dict]:
    """Invert the true local field, with noise."""
    size, direction = spacing_of(subject.affine), field_direction(subject.affine)
    inner = ndi.binary_erosion(subject.brain, iterations=max(1, round(3 / min(size))))
    local = field_from_susceptibility(np.where(inner, subject.chi, 0), size, direction)
    noisy = np.where(inner, local + _noise(subject, inner, rng), 0).astype(np.float32)
    yield from inverted("isolated", subject, noisy, inner, options)


def inverted(
    stage: str, subject: Subject, local: Array, mask: Array, options: argparse.Namespace
) -> Iterator[dict]:
    """Invert a local field by every method."""
    with scipy.fft.set_workers(options.threads):
        for name in options.recon:
            found, times = _inverted(name, subject, local, mask)
            yield _row(stage, name, found, subject.chi, mask, times)


def reconstructed(
    stage: str, subject: Subject, options: argparse.Namespace, brain: Array | None = None
) -> Iterator[dict]:
    """Reconstruct echoes by every method."""
    for name in options.recon:
        made, times = _timed(
            reconstruct, subject.echoes, _method(name), brain=brain, threads=options.threads
        )
        yield _row(stage, name, made.maps["qsm"], subject.chi, made.mask & subject.brain, times)


def background(
    subject: Subject, rng: np.random.Generator, options: argparse.Namespace
) -> Iterator[dict]:
    """Remove the background from the true total field with noise; invert what is left."""
    size, direction = spacing_of(subject.affine), field_direction(subject.affine)
    # No mask holds the voxels that share the brain's border.
    mask = ndi.binary_erosion(subject.brain)
    field = np.where(mask, subject.field + _noise(subject, mask, rng), 0).astype(np.float32)
    common = None  # the mask of the first method, the smallest
    with scipy.fft.set_workers(options.threads):
        for name, remove in (
            ("v_sharp", lambda: v_sharp(field, mask, size)),
            ("v_sharp, then what remains", lambda: thorough(field, mask, subject)),
            ("v_sharp to one voxel", lambda: v_sharp(field, mask, size, smallest_radius=0)),
            ("pdf", lambda: project_onto_dipoles(field, mask, size, direction, tolerance=0)),
        ):
            (local, inside), times = _timed(remove)
            truth = field_from_susceptibility(np.where(inside, subject.chi, 0), size, direction)
            common = inside if common is None else common
            yield _row("background", name, local, truth, common, times)
            found, times = _inverted("tv", subject, local, inside)
            yield _row("background, tv", name, found, subject.chi, common, times)


def thorough(field: Array, mask: Array, subject: Subject) -> tuple[Array, Array]:
    """Remove the background as the chain does."""
    size, direction = spacing_of(subject.affine), field_direction(subject.affine)
    local, inside = v_sharp(field, mask, size)
    rest = remaining_background(local, inside, size, direction, weight=subject.weight)
    return local - rest, inside


def _noise(subject: Subject, mask: Array, rng: np.random.Generator) -> Array:
    """Draw the noise of a field in ppm that was fitted to the echoes."""
    typical = float(np.median(subject.weight[mask]))
    spread = np.clip(typical / np.maximum(subject.weight, 1e-6), 0, 5) / (SNR * RADIANS_PER_PPM)
    return spread * rng.standard_normal(mask.shape)


def _inverted(name: str, subject: Subject, local: Array, mask: Array) -> tuple:
    size, direction = spacing_of(subject.affine), field_direction(subject.affine)
    return _timed(_method(name), local, mask, size, direction, subject.weight, RADIANS_PER_PPM)


def _method(name: str) -> Inversion:
    return named_inversion(name) if name in INVERSIONS else network_inversion(name)[0]


@dataclass(frozen=True)
class Subject:
    """Susceptibility and field in ppm, what is measured of them, and how far that is trusted."""

    brain: Array
    chi: Array
    field: Array
    affine: Array
    echoes: RawEchoes
    weight: Array


def _simulate(rng: np.random.Generator, shape: Sequence[int], affine: Array) -> Subject:
    head = build_head(rng, shape, affine)
    tissues = draw_tissues(rng)
    chi = susceptibility_map(head, tissues, rng)
    # Voxels that share the brain's border with air have no susceptibility to be measured.
    brain = head.brain & (np.abs(chi) < 1)
    geometry = head.spacing, field_direction(affine)
    field = field_from_susceptibility(np.where(brain, chi, 0), *geometry)
    field += field_of_distant_sources(
        np.where(brain, 0, chi), *geometry, outside=tissues["air"].chi
    )
    field -= np.median(field[brain])
    return _measured(brain, chi, field, _signal(rng, head, tissues, field), affine)


def _measured(brain: Array, chi: Array, field: Array, signal: Array, affine: Array) -> Subject:
    magnitude, phase = np.abs(signal).astype(np.float32), np.angle(signal).astype(np.float32)
    weight = np.sqrt((magnitude**2 * np.square(TIMES, dtype=np.float32)).sum(-1))
    echoes = RawEchoes(magnitude, phase, affine, TIMES, FIELD_STRENGTH, "rad")
    return Subject(brain, chi, field, affine, echoes, weight)


def _signal(rng, head, tissues, field) -> Array:
    def mixture(name: str) -> Array:
        return sum(
            share * np.float32(getattr(tissues[tissue], name))
            for tissue, share in head.weights.items()
        )

    coil = np.exp(0.15 * smooth_noise(rng, field.shape, head.spacing, 90))
    phase = np.pi * smooth_noise(rng, field.shape, head.spacing, 120)
    gradient = np.sqrt(sum(part**2 for part in np.gradient(field)))
    r2star = mixture("r2star") + 0.3 * 2 * np.pi * GAMMA_BAR * FIELD_STRENGTH * gradient
    rho = np.maximum(mixture("rho"), 0) * coil
    clean = multi_echo_signal(
        rho, r2star.astype(np.float32), field, TIMES, FIELD_STRENGTH, initial_phase=phase
    )
    return add_noise(clean, 0.65 / SNR, rng)


def _grid(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _timed(function: Callable, *arguments: object, **options: object) -> tuple:
    started, used = time.perf_counter(), _cpu()
    result = function(*arguments, **options)
    return result, (time.perf_counter() - started, _cpu() - used)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _row(stage, method, found, truth, mask, times) -> dict:
    return {
        "stage": stage,
        "method": method,
        "grid": _grid(mask.shape),
        "nrmse_percent": nrmse(found, truth, mask),
        "xsim": xsim(found, truth, mask),
        "seconds": times[0],
        "cpu_seconds": times[1],
    }


def nrmse(found: Array, truth: Array, mask: Array) -> float:
    """Root mean square error in % of the truth's deviation, means taken out."""
    found, truth = (data[mask] - data[mask].mean() for data in (found, truth))
    return float(100 * np.linalg.norm(found - truth) / np.linalg.norm(truth))


def xsim(found: Array, truth: Array, mask: Array) -> float:
    """Structural similarity in ppm: range 1 ppm, K 0.01 and 0.001, Gaussian 3 × 3 × 3 window."""
    small, smaller = 0.01**2, 0.001**2
    taps = np.exp(-(np.arange(-1, 2) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def smooth(image: Array) -> Array:
        for axis in range(3):
            image = ndi.correlate1d(image, taps, axis)
        return image

    a, b = (
        np.where(mask, data - data[mask].mean(), 0).astype(np.float64) for data in (found, truth)
    )
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    both = smooth(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + small) * (2 * both + smaller)
    likeness /= (mean_a**2 + mean_b**2 + small) * (var_a + var_b + smaller)
    return float(likeness[mask].mean())


if __name__ == "__main__":
    main()
