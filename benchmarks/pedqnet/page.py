"""PedQ-NET on simulated infants and adults: writes docs/pedqnet.md with its figures.

    fdl train --recipe pedqnet --output pedqnet.safetensors --max-minutes 240
    fdl train CONFIG-without-segmentation.toml --output physics.safetensors --max-minutes 240
    python benchmarks/pedqnet.py docs/pedqnet.md pedqnet.safetensors physics.safetensors

The second model is the same network trained without the segmentation
(``[recipe_options] segmentation_weight = 0.0``). On heads that no training has seen, both are
compared with thresholded division and total variation: NRMSE, XSIM, and the sharpness of nuclear
edges. The dipole that lies between what a network reads and what it gives is compared with the
analytic one, as a check of its physics.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.ndimage as ndi
from reconstruction import nrmse, xsim

from fdl_bidsapp.bids.outputs import atomic_write, write_text
from fdl_bidsapp.making import network_inversion
from fdl_bidsapp.models.bundle import load_volume
from fdl_bidsapp.physics.dipole import dipole_kernel, field_from_susceptibility
from fdl_bidsapp.physics.inversion import thresholded_division
from fdl_bidsapp.physics.iterative import total_variation
from fdl_bidsapp.training.fields import FieldCase, simulate_field

Array = np.ndarray

UNSEEN = 7_000_000
"""Seeds from here on; a training's heads have the seeds [its own, number]."""


def main() -> None:
    """Measure, draw, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("joint", type=Path, help="trained with the segmentation")
    parser.add_argument("physics", type=Path, help="trained without it")
    parser.add_argument("--heads", type=int, default=4, help="of each kind")
    parser.add_argument("--spacing", type=float, nargs=3, default=None, help="mm, for a trial")
    options = parser.parse_args()
    methods: dict[str, Callable[[FieldCase], Array]] = {
        "thresholded division": lambda c: thresholded_division(
            c.local_field, c.mask, c.spacing, c.direction
        ),
        "total variation": lambda c: total_variation(
            c.local_field, c.mask, c.spacing, c.direction, weight=c.weight
        ),
        "PedQ-NET without segmentation": _network(options.physics),
        "PedQ-NET": _network(options.joint),
    }
    lines = [_head(options)]
    for kind, infant in (("Infants", True), ("Adults", False)):
        cases = [
            simulate_field([UNSEEN + infant, i], infant=infant, spacing=options.spacing)
            for i in range(options.heads)
        ]
        maps = [{name: method(case) for name, method in methods.items()} for case in cases]
        lines.append(f"## {kind}\n\n" + _table(cases, maps))
        if infant:
            figure = options.page.with_name("pedqnet.png")
            draw(cases[0], maps[0], figure)
            lines.append(
                f"![Reconstructions of a simulated infant]({figure.name})\n\nA simulated infant's"
                " head: truth and reconstructions from -0.1 to 0.15 ppm, with the difference from"
                " the truth (twice as bright) below each.\n"
            )
            lines.append("### The dipole between output and input\n\n" + _dipole_table(cases, maps))
    write_text(options.page, "\n".join(lines))


def _head(options: argparse.Namespace) -> str:
    bundles = [load_volume(path, "susceptibility") for path in (options.joint, options.physics)]
    told = [
        f"- {name}: {b.spec.provenance.get('steps')} steps, SHA-256 `{b.sha256[:12]}`"
        for name, b in zip(("PedQ-NET", "without segmentation"), bundles, strict=True)
    ]
    return (
        "# PedQ-NET\n\nA network that turns a local field into susceptibility, trained without"
        " susceptibility labels: by the physical model alone, and in the last part of the training"
        " together with a network that segments what it gives. This page is written by"
        " `benchmarks/pedqnet.py`; all heads are simulated, none was seen in training. Nothing here"
        f" says how it does on patients.\n\n{chr(10).join(told)}\n"
    )


def _network(path: Path) -> Callable[[FieldCase], Array]:
    invert, _ = network_inversion(str(path))
    return lambda c: invert(
        c.local_field, c.mask, c.spacing, c.direction, c.weight, c.radians_per_ppm
    )


def _table(cases: list[FieldCase], maps: list[dict[str, Array]]) -> str:
    lines = ["| method | NRMSE (%) | XSIM | sharpness of edges |", "| --- | --- | --- | --- |"]
    for name in maps[0]:
        values = [
            (
                nrmse(own[name], case.susceptibility, case.mask),
                xsim(own[name], case.susceptibility, case.mask),
                sharpness(own[name], case),
            )
            for case, own in zip(cases, maps, strict=True)
        ]
        means = np.mean(values, 0)
        lines.append(f"| {name} | {means[0]:.1f} | {means[1]:.3f} | {means[2]:.2f} |")
    text = (
        f"\nMeans of {len(cases)} heads. Sharpness: gradient across the surfaces of caudate,"
        " putamen, pallidum and thalamus, over that of the truth (1 is as sharp as the truth).\n"
    )
    return "\n".join(lines) + "\n" + text


def sharpness(chi: Array, case: FieldCase) -> float:
    """Slope of the map against the truth's along the truth's gradient at subcortical surfaces."""
    surface = np.zeros(case.mask.shape, bool)
    for label in range(1, int(case.labels.max()) + 1):
        one = case.labels == label
        surface |= ndi.binary_dilation(one) & ~ndi.binary_erosion(one)
    found, truth = (
        np.stack(np.gradient(data, *case.spacing))[:, surface]
        for data in (chi, case.susceptibility)
    )
    return float((found * truth).sum() / (truth**2).sum())


def _dipole_table(cases: list[FieldCase], maps: list[dict[str, Array]]) -> str:
    lines = [
        "Field over susceptibility in k-space, by least squares in bins of the angle to B0, against"
        " the analytic dipole 1/3 - cos²: correlation over the bins, and largest difference.\n",
        "| method | correlation | largest difference |",
        "| --- | --- | --- |",
    ]
    for name in ("the truth", *maps[0]):
        rows = [
            recovered_dipole(case.susceptibility if name == "the truth" else own[name], case)
            for case, own in zip(cases, maps, strict=True)
        ]
        found, expected = np.mean(rows, 0)
        together = np.corrcoef(found, expected)[0, 1]
        lines.append(f"| {name} | {together:.3f} | {np.abs(found - expected).max():.3f} |")
    return "\n".join(lines) + "\n"


def recovered_dipole(chi: Array, case: FieldCase, bins: int = 24) -> tuple[Array, Array]:
    """Return the dipole between a map and the measured field, and the analytic one, by angle."""
    shape = case.mask.shape
    field = field_from_susceptibility(chi, case.spacing, case.direction)
    # The field in the mask alone is known; what the map itself makes beyond it stands in there.
    whole = np.where(case.mask, case.local_field, field)
    spectrum, source = scipy.fft.rfftn(whole), scipy.fft.rfftn(chi)
    kernel = dipole_kernel(shape, case.spacing, case.direction)
    edges = np.linspace(-2 / 3, 1 / 3, bins + 1)
    number = np.clip(np.digitize(kernel, edges) - 1, 0, bins - 1).ravel()
    power = (np.abs(source) ** 2).ravel()
    ratio = np.bincount(number, (spectrum * np.conj(source)).real.ravel(), bins)
    total = np.bincount(number, power, bins)
    expected = np.bincount(number, kernel.ravel() * power, bins)
    return ratio / np.maximum(total, 1e-12), expected / np.maximum(total, 1e-12)


def draw(case: FieldCase, maps: dict[str, Array], figure: Path) -> None:
    """Draw the truth and the reconstructions through the deep nuclei."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    slice_ = int(np.argmax((case.labels > 0).sum((0, 1))))
    shown = {"truth": case.susceptibility, **maps}
    fig, axes = plt.subplots(2, len(shown), figsize=(3 * len(shown), 6.4), layout="constrained")
    for column, (name, chi) in enumerate(shown.items()):
        chi = np.where(case.mask, chi - chi[case.mask].mean(), 0)
        difference = np.where(case.mask, chi - case.susceptibility, 0)
        for row, image in enumerate((chi, 2 * difference)):
            axes[row, column].imshow(
                image[:, :, slice_].T, cmap="gray", origin="lower", vmin=-0.1, vmax=0.15
            )
            axes[row, column].set_axis_off()
        axes[0, column].set_title(name, fontsize=9)
    with atomic_write(figure) as temporary:
        fig.savefig(temporary, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    main()
