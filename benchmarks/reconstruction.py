"""How well susceptibility is reconstructed: each inversion alone, and the whole chain.

    python benchmarks/reconstruction.py OUT [--heads N] [--spacing MM] [--recon NAME|FILE ...]

Heads that nothing was tuned on are simulated with air around them, several echoes and noise. Each
inversion is measured twice: on the true local field with noise (isolated), and at the end of the
chain from the echoes (unwrapping, brain mask, V-SHARP, inversion). NRMSE in % of the truth's
standard deviation and XSIM (Milovic et al., Magn. Reson. Med. 93 (2025) 411-421) in the mask, both
after taking out the means. Writes OUT/reconstruction.tsv (one row a head and method) and prints
their means. Backgrounds are measured too, as NRMSE of the local field.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.ndimage as ndi

from fdl_bidsapp.bids.outputs import write_tsv
from fdl_bidsapp.imaging.reconstruction import (
    INVERSIONS,
    Inversion,
    RawEchoes,
    named_inversion,
    reconstruct,
)
from fdl_bidsapp.making import network_inversion
from fdl_bidsapp.physics import GAMMA_BAR
from fdl_bidsapp.physics.background import project_onto_dipoles, v_sharp
from fdl_bidsapp.physics.dipole import (
    field_direction,
    field_from_susceptibility,
    field_of_distant_sources,
)
from fdl_bidsapp.physics.signal import add_noise, multi_echo_signal
from fdl_bidsapp.simulation.contrast import susceptibility_map
from fdl_bidsapp.simulation.geometry import smooth_noise
from fdl_bidsapp.simulation.head import build_head
from fdl_bidsapp.simulation.scan import scan_geometry
from fdl_bidsapp.simulation.tissue import draw_tissues

Array = np.ndarray

TIMES, FIELD_STRENGTH, SNR = (0.004, 0.010, 0.016, 0.022, 0.028), 3.0, 60.0
COLUMNS = ("head", "stage", "method", "nrmse", "xsim", "seconds", "cpu_seconds")


def main() -> None:
    """Measure all methods on all heads."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--spacing", type=float, default=1.0, help="voxel size in mm")
    parser.add_argument("--recon", nargs="+", default=list(INVERSIONS), help="methods or files")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for head in range(options.heads):
        for row in measure(head, options.spacing, options.recon, options.threads):
            rows.append({"head": head, **row})
            print({key: row[key] for key in ("stage", "method", "nrmse", "xsim")}, flush=True)
            write_tsv(options.out / "reconstruction.tsv", rows, COLUMNS)
    for stage, method in dict.fromkeys((row["stage"], row["method"]) for row in rows):
        own = [row for row in rows if (row["stage"], row["method"]) == (stage, method)]
        nrmse, xsim = (np.mean([row[key] for row in own]) for key in ("nrmse", "xsim"))
        print(f"{stage}\t{method}\tNRMSE {nrmse:.1f} %\tXSIM {xsim:.3f}\t{len(own)} heads")


def measure(seed: int, spacing: float, methods: list[str], threads: int) -> Iterator[dict]:
    """Measure everything on one head."""
    import torch

    torch.set_num_threads(threads)
    rng = np.random.default_rng([90210, seed])
    shape, affine = scan_geometry((spacing,) * 3, rng.normal(0, 8, 3))
    head = build_head(rng, shape, affine)
    tissues = draw_tissues(rng)
    chi = susceptibility_map(head, tissues, rng)
    direction, size = field_direction(affine), head.spacing
    # Voxels that share the brain's border with air have no susceptibility to be measured.
    brain = head.brain & (np.abs(chi) < 1)
    air = tissues["air"].chi
    field = field_from_susceptibility(np.where(brain, chi, 0), size, direction)
    field += field_of_distant_sources(np.where(brain, 0, chi), size, direction, outside=air)
    field -= np.median(field[brain])
    echoes, weight = _scan(rng, head, tissues, field, affine)

    scale = 2 * np.pi * GAMMA_BAR * FIELD_STRENGTH * float(np.mean(TIMES))
    inner = ndi.binary_erosion(brain, iterations=max(1, round(3 / spacing)))
    local = field_from_susceptibility(np.where(inner, chi, 0), size, direction)
    typical = float(np.median(weight[inner]))
    noise = np.clip(typical / np.maximum(weight, 1e-6), 0, 5) / (SNR * scale)
    noisy = np.where(inner, local + noise * rng.standard_normal(shape), 0).astype(np.float32)
    common = None  # the mask of the first background method, the smallest
    with scipy.fft.set_workers(threads):
        for name in methods:
            invert = _method(name)
            found, times = _timed(invert, noisy, inner, size, direction, weight, scale)
            yield _row("isolated", name, found, chi, inner, times)
        for name, remove in (
            ("v_sharp", lambda: v_sharp(field, brain, size)),
            ("v_sharp to one voxel", lambda: v_sharp(field, brain, size, smallest_radius=0)),
            ("pdf", lambda: project_onto_dipoles(field, brain, size, direction)),
        ):
            (found, inside), times = _timed(remove)
            truth = field_from_susceptibility(np.where(inside, chi, 0), size, direction)
            common = inside if common is None else common
            yield _row("background", name, found, truth, common, times)
    for name in methods:
        inversion = _method(name)
        made, times = _timed(lambda how=inversion: reconstruct(echoes, how, threads=threads))
        yield _row("chain", name, made.maps["qsm"], chi, made.mask & brain, times)


def _method(name: str) -> Inversion:
    return named_inversion(name) if name in INVERSIONS else network_inversion(name)[0]


def _scan(rng, head, tissues, field, affine) -> tuple[RawEchoes, Array]:
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
    signal = add_noise(clean, 0.65 / SNR, rng)
    magnitude = np.abs(signal)
    weight = np.sqrt((magnitude**2 * np.square(TIMES, dtype=np.float32)).sum(-1))
    return RawEchoes(magnitude, np.angle(signal), affine, TIMES, FIELD_STRENGTH, "rad"), weight


def _timed(function: Callable, *arguments: object) -> tuple:
    started, used = time.perf_counter(), _cpu()
    result = function(*arguments)
    return result, (time.perf_counter() - started, _cpu() - used)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _row(stage, method, found, truth, mask, times) -> dict:
    return {
        "stage": stage,
        "method": method,
        "nrmse": nrmse(found, truth, mask),
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
