"""PedQ-NET on simulated infants and adults: writes the figures of docs/pedqnet.md.

    fdl train benchmarks/pedqnet/joint.toml --output pedqnet.safetensors
    fdl train benchmarks/pedqnet/physics.toml --output physics.safetensors
    fdl train benchmarks/pedqnet/field.toml --output field.safetensors
    fdl train benchmarks/pedqnet/brainmask.toml --output brainmask.safetensors
    python benchmarks/pedqnet/compare.py pedqnet.safetensors physics.safetensors \\
        [--field field.safetensors] [--brain brainmask.safetensors] [--heads N]
    python benchmarks/pedqnet/compare.py --page-only

The second network is the first one trained without the segmentation, the third one reads the field
alone and is trained without it too. On heads that no training has seen, they are compared with
thresholded division, total variation and the smooth inversion that the first two correct: NRMSE and
XSIM in the brain, error and sharpness at the surfaces of the deep nuclei. The dipole that lies
between a map and the field it was made of is compared with the analytic one. Brain masks are
compared with the head's true one. Writes ``results/pedqnet.tsv`` (one row a head, method and
measure), ``results/pedqnet_curves.tsv`` and the pictures in docs/images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).parents[1]))
import matplotlib

matplotlib.use("agg")
import numpy as np
import pandas as pd
import scipy.fft
import scipy.ndimage as ndi
from machine import command_line, machine
from matplotlib import pyplot as plt
from page import replace_part
from reconstruction import nrmse, xsim

from fdl_bidsapp.bids.outputs import atomic_write, write_tsv
from fdl_bidsapp.imaging.reconstruction import named_inversion
from fdl_bidsapp.making import network_inversion
from fdl_bidsapp.models.bundle import load_volume
from fdl_bidsapp.models.pedqnet import predict_brain
from fdl_bidsapp.physics.dipole import dipole_kernel, field_from_susceptibility
from fdl_bidsapp.physics.iterative import smooth_inversion
from fdl_bidsapp.physics.masking import brain_mask
from fdl_bidsapp.training.bootstrap import Estimate, bootstrap_mean
from fdl_bidsapp.training.fields import SUBCORTICAL, FieldCase, simulate_field

Array = np.ndarray

ROOT = Path(__file__).parents[2]
RESULTS, CURVES = (
    ROOT / "benchmarks/results" / name for name in ("pedqnet.tsv", "pedqnet_curves.tsv")
)
PAGE, IMAGES = ROOT / "docs/pedqnet.md", ROOT / "docs/images"

UNSEEN = 7_000_000
"""Seeds from here on; a training's heads have the seeds [its own, number]."""

DIVISION, SMOOTH, VARIATION = "thresholded division", "smooth inversion", "total variation"
PHYSICS, JOINT = "PedQ-NET without segmentation", "PedQ-NET"
FIELD = "PedQ-NET of the field alone, without segmentation"
METHODS = (DIVISION, SMOOTH, VARIATION, FIELD, PHYSICS, JOINT)
CLASSICAL, LEARNT = "classical mask", "network"

MEASURES = {
    "nrmse": ("NRMSE, %", 1),
    "xsim": ("XSIM", 3),
    "edge_nrmse": ("NRMSE at nuclear edges, %", 1),
    "sharpness": ("sharpness of edges", 2),
}

DISTANCES = np.arange(-3.0, 4.01, 0.5)
"""mm from a nucleus's surface, negative inside."""

ANGLES = 24
"""Bins of the dipole's values."""


def main() -> None:
    """Measure, and write tables, pictures and page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("joint", nargs="?", type=Path, help="trained with the segmentation")
    parser.add_argument("physics", nargs="?", type=Path, help="trained without it")
    parser.add_argument("--field", type=Path, help="trained without it, on the field alone")
    parser.add_argument("--brain", type=Path, help="a network that finds the brain")
    parser.add_argument("--heads", type=int, default=4, help="of each kind")
    parser.add_argument("--page-only", action="store_true", help="write the page of the tables")
    options = parser.parse_args()
    if not options.page_only:
        if options.physics is None:
            parser.error("give both networks, or --page-only")
        measure(options)
    write_page()


def measure(options: argparse.Namespace) -> None:
    """Reconstruct every head with every method."""
    methods = {
        DIVISION: named_inversion("tkd"),
        SMOOTH: lambda *known: smooth_inversion(*known[:4]),
        VARIATION: named_inversion("tv"),
        PHYSICS: network_inversion(str(options.physics))[0],
        JOINT: network_inversion(str(options.joint))[0],
    }
    if options.field is not None:
        methods[FIELD] = network_inversion(str(options.field))[0]
    given = [path for path in (options.joint, options.physics, options.field) if path is not None]
    networks = [load_volume(path, "susceptibility") for path in given]
    about = {
        "networks": " ".join(bundle.sha256[:12] for bundle in networks),
        "steps": networks[0].spec.provenance.get("steps"),
        "command": command_line("benchmarks/pedqnet/compare.py"),
        "machine": machine(),
    }
    finders = {CLASSICAL: lambda case: brain_mask(case.magnitude, case.spacing)}
    if options.brain is not None:
        finders[LEARNT] = brain_finder(options.brain)
    rows, curves = [], []
    for kind in ("infant", "adult"):
        for number in range(options.heads):
            infant = kind == "infant"
            case = simulate_field([UNSEEN + infant, number], infant=infant)
            maps = {
                name: invert(
                    case.local_field,
                    case.mask,
                    case.spacing,
                    case.direction,
                    case.weight,
                    case.radians_per_ppm,
                )
                for name, invert in methods.items()
            }
            head = {"kind": kind, "head": number}
            for name, chi in maps.items():
                rows += [
                    {**head, "method": name, "measure": what, "value": value}
                    for what, value in measured(chi, case)
                ]
            for name, chi in {"truth": case.susceptibility, **maps}.items():
                curves += [
                    {**head, "method": name, "curve": what, "x": x, "value": value}
                    for what, x, value in (*profile(chi, case), *recovered_dipole(chi, case))
                ]
            for name, find in finders.items():
                found = find(case)
                dice = 2 * (found & case.brain).sum() / (found.sum() + case.brain.sum())
                rows.append({**head, "method": name, "measure": "brain_dice", "value": dice})
            if number == 0:
                draw_maps(case, maps, IMAGES / f"pedqnet-{kind}.png")
            print(kind, number, *(f"{name} {chi.std():.3f}" for name, chi in maps.items()))
    rows = [{**row, **about} for row in rows]
    write_tsv(RESULTS, rows, list(rows[0]))
    table = pd.DataFrame(curves).groupby(["kind", "method", "curve", "x"], sort=False)
    means = table["value"].mean().reset_index().to_dict("records")
    write_tsv(CURVES, means, list(means[0]))


def measured(chi: Array, case: FieldCase) -> Iterator[tuple[str, float]]:
    """Compare a map with the truth."""
    yield "nrmse", nrmse(chi, case.susceptibility, case.mask)
    yield "xsim", xsim(chi, case.susceptibility, case.mask)
    edges = surfaces(case)
    yield "edge_nrmse", nrmse(chi, case.susceptibility, edges)
    found, truth = (
        np.stack(np.gradient(data, *case.spacing))[:, edges] for data in (chi, case.susceptibility)
    )
    yield "sharpness", float((found * truth).sum() / (truth**2).sum())


def surfaces(case: FieldCase) -> Array:
    """Return the voxels on either side of the nuclei's surfaces."""
    surface = np.zeros(case.mask.shape, bool)
    for label in range(1, 2 * len(SUBCORTICAL) + 1):
        one = case.labels == label
        surface |= ndi.binary_dilation(one) & ~ndi.binary_erosion(one)
    return surface & case.mask


def profile(chi: Array, case: FieldCase) -> Iterator[tuple[str, float, float]]:
    """Mean over shells at a distance from the pallidum's surface, the brain's mean being 0."""
    number = SUBCORTICAL.index("globus_pallidus")
    inside = np.isin(case.labels, (2 * number + 1, 2 * number + 2))
    distance = ndi.distance_transform_edt(~inside, case.spacing)
    distance -= ndi.distance_transform_edt(inside, case.spacing)
    # Other nuclei next to it are not its surround.
    usable = case.mask & (inside | (case.labels == 0))
    chi = chi - chi[case.mask].mean()
    for middle in DISTANCES:
        shell = usable & (np.abs(distance - middle) <= 0.5)
        if shell.any():
            yield "edge", float(middle), float(chi[shell].mean())


def recovered_dipole(chi: Array, case: FieldCase) -> Iterator[tuple[str, float, float]]:
    """Yield the dipole between a map and the measured field, by the analytic dipole's value.

    Field over susceptibility in k-space, by least squares in each bin. The field in the mask alone
    is known; what the map itself makes beyond it stands in there.
    """
    field = field_from_susceptibility(chi, case.spacing, case.direction)
    whole = np.where(case.mask, case.local_field, field)
    spectrum, source = scipy.fft.rfftn(whole), scipy.fft.rfftn(chi)
    kernel = dipole_kernel(case.mask.shape, case.spacing, case.direction)
    edges = np.linspace(-2 / 3, 1 / 3, ANGLES + 1)
    number = np.clip(np.digitize(kernel, edges) - 1, 0, ANGLES - 1).ravel()
    power = np.maximum(np.bincount(number, (np.abs(source) ** 2).ravel(), ANGLES), 1e-12)
    found = np.bincount(number, (spectrum * np.conj(source)).real.ravel(), ANGLES) / power
    for middle, value in zip((edges[1:] + edges[:-1]) / 2, found, strict=True):
        yield "dipole", float(middle), float(value)


def brain_finder(path: Path) -> Callable[[FieldCase], Array]:
    """Make a function that finds the brain in a magnitude with a network."""
    bundle = load_volume(path, "brain")
    network = bundle.network()
    return lambda case: predict_brain(
        network, bundle.spec, case.magnitude, case.spacing, case.direction
    )


def draw_maps(case: FieldCase, maps: dict[str, Array], figure: Path) -> None:
    """Draw the truth and the reconstructions through the deep nuclei."""
    cut = int(np.argmax((case.labels > 0).sum((0, 1))))
    shown = {"truth": case.susceptibility, **maps}
    rows, columns = (np.flatnonzero(case.mask[..., cut].any(axis)) for axis in (1, 0))
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1), cut)
    fig, axes = plt.subplots(2, len(shown), figsize=(2.4 * len(shown), 6.2), layout="constrained")
    for column, (name, chi) in enumerate(shown.items()):
        chi = np.where(case.mask, chi - chi[case.mask].mean(), 0)
        difference = np.where(case.mask, chi - case.susceptibility, 0)
        for row, image in enumerate((chi, difference)):
            axes[row, column].imshow(
                image[window].T,
                cmap="gray",
                origin="lower",
                vmin=-0.1,
                vmax=0.1,
                aspect=case.spacing[1] / case.spacing[0],
            )
            axes[row, column].set_axis_off()
        axes[0, column].set_title(fill(name, 24), fontsize=8)
    with atomic_write(figure) as temporary:
        fig.savefig(temporary, dpi=90, format="png")
    plt.close(fig)


def draw_curves(curves: pd.DataFrame, figure: Path) -> None:
    """Draw profiles across the pallidum's surface, and the recovered dipoles."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    styles = dict(
        zip(("truth", *METHODS), ("k-", "C7:", "C4-", "C0--", "C1:", "C2-.", "C3-"), strict=True)
    )
    panels = (
        ("edge", "infant", "Across the pallidum's surface, infants", "mm from the surface", "ppm"),
        ("edge", "adult", "Across the pallidum's surface, adults", "mm from the surface", "ppm"),
        ("dipole", "infant", "Dipole between map and field, infants", "analytic", "recovered"),
    )
    for axis, (curve, kind, title, x, y) in zip(axes, panels, strict=True):
        chosen = curves[(curves["curve"] == curve) & (curves["kind"] == kind)]
        for name, style in styles.items():
            one = chosen[chosen["method"] == name]
            if one.empty:
                continue
            axis.plot(one["x"], one["value"], style, label=name)
        axis.set(title=title, xlabel=x, ylabel=y)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    with atomic_write(figure) as temporary:
        fig.savefig(temporary, dpi=90, format="png")
    plt.close(fig)


def write_page() -> None:
    """Write the tables into the page, of what was measured."""
    table, curves = (pd.read_csv(path, sep="\t") for path in (RESULTS, CURVES))
    draw_curves(curves, IMAGES / "pedqnet-curves.png")
    heads = table["head"].nunique()
    lines = [
        f"{heads} infants at 0.78 × 0.78 × 2 mm and {heads} adults at 1 mm, none seen in training;"
        f" the networks were trained for {table['steps'].iloc[0]} steps"
        f" (`benchmarks/results/{RESULTS.name}`: networks {table['networks'].iloc[0]},"
        f" {table['machine'].iloc[0]}).",
        "",
        "| heads | method | " + " | ".join(name for name, _ in MEASURES.values()) + " |",
        "| --- | --- |" + " ---: |" * len(MEASURES),
    ]
    for kind in ("infant", "adult"):
        for method in measured_methods(table):
            cells = [
                f"{values(table, kind, method, what).mean():.{digits}f}"
                for what, (_, digits) in MEASURES.items()
            ]
            lines.append(f"| {kind}s | {method} | {' | '.join(cells)} |")
    lines += ["", "What the network gains over each, with 95 % intervals over the heads:", ""]
    for kind in ("infant", "adult"):
        for what, (name, digits) in MEASURES.items():
            told = [
                f"{other} {difference(table, kind, other, what, digits)}"
                for other in measured_methods(table)
                if other != JOINT
            ]
            lines.append(f"* {name}, {kind}s, minus that of {'; '.join(told)}.")
    lines += ["", *verdicts(table)]
    lines += ["", "| heads | brain mask | Dice with the true brain |", "| --- | --- | ---: |"]
    for kind in ("infant", "adult"):
        for method in (CLASSICAL, LEARNT):
            dice = values(table, kind, method, "brain_dice")
            if len(dice):
                lines.append(f"| {kind}s | {method} | {dice.mean():.3f} |")
    lines += [
        "",
        "Correlation of the recovered dipole with the analytic one, and its mean distance from it:",
        "",
        "| heads | map | correlation | mean distance |",
        "| --- | --- | ---: | ---: |",
    ]
    for kind in ("infant", "adult"):
        for method in ("truth", *measured_methods(table)):
            one = curves[
                (curves["kind"] == kind)
                & (curves["method"] == method)
                & (curves["curve"] == "dipole")
            ]
            together = np.corrcoef(one["x"], one["value"])[0, 1]
            apart = np.abs(one["x"] - one["value"]).mean()
            lines.append(f"| {kind}s | {method} | {together:.3f} | {apart:.3f} |")
    for kind in ("infant", "adult"):
        lines += [
            "",
            f"![Maps of a simulated {kind}](images/pedqnet-{kind}.png)",
            "",
            f"A simulated {kind}: maps, and below them their difference from the truth, from -0.1"
            " to 0.1 ppm.",
        ]
    lines += ["", "![Edges and dipoles](images/pedqnet-curves.png)"]
    replace_part(PAGE, "benchmarks/pedqnet/compare.py", "\n".join(lines))


def verdicts(table: pd.DataFrame) -> Iterator[str]:
    """Tell in how many heads PedQ-NET is better at nuclear edges, and by how much."""
    for other in (DIVISION, SMOOTH, VARIATION, PHYSICS):
        for kind in ("infant", "adult"):
            ours, theirs = (
                values(table, kind, name, "edge_nrmse").round(1) for name in (JOINT, other)
            )
            fewer = (theirs - ours).dropna()
            yield (
                f"* Fewer errors at nuclear edges than {other}, {kind}s: in {(fewer > 0).sum()} of"
                f" {len(fewer)} heads, by {fewer.mean():.1f} on average."
            )


def measured_methods(table: pd.DataFrame) -> list[str]:
    """Return the methods of a table in their order."""
    return [method for method in METHODS if (table["method"] == method).any()]


def values(table: pd.DataFrame, kind: str, method: str, what: str) -> pd.Series:
    """Return one measure of one method, by head."""
    chosen = table[
        (table["kind"] == kind) & (table["method"] == method) & (table["measure"] == what)
    ]
    return chosen.set_index("head")["value"]


def difference(table: pd.DataFrame, kind: str, other: str, what: str, digits: int) -> str:
    """Tell by how much the joint network differs from another method, head by head."""
    one = gain(table, kind, other, what)
    return f"{one.mean:+.{digits}f} ({one.lower:+.{digits}f} to {one.upper:+.{digits}f})"


def gain(table: pd.DataFrame, kind: str, other: str, what: str) -> Estimate:
    """Return the joint network's measure minus another method's, over the heads."""
    paired = (values(table, kind, JOINT, what) - values(table, kind, other, what)).dropna()
    return bootstrap_mean(list(paired), [str(head) for head in paired.index])


if __name__ == "__main__":
    main()
