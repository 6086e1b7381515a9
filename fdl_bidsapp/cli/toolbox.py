"""``fdl``: simulate, train, evaluate, list and check models, segment single files."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fdl_bidsapp import __version__
from fdl_bidsapp.cli import features
from fdl_bidsapp.cli.train import add_commands, add_flips
from fdl_bidsapp.cli.trouble import explain, reader_left
from fdl_bidsapp.errors import FdlError, OutputError, UsageError
from fdl_bidsapp.processor import wait_politely
from fdl_bidsapp.settings import CONTRASTS, DEVICES, PAPER_MEASURES


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the toolbox and exit with the codes of ``fdl-bidsapp``."""
    wait_politely()
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Run the toolbox and return its exit code; errors are told in one line."""
    try:
        options = build_parser().parse_args(argv)
        code: int = options.command(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("fdl: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if reader_left(error):
            return 128 + signal.SIGPIPE
        told = explain(error)
        print(f"fdl: {told}", file=sys.stderr)
        return told.exit_code


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all sub-commands."""
    parser = _Parser(
        prog="fdl",
        description="Simulate multi-echo GRE datasets, train, measure and look at models, segment"
        " single images.",
    )
    parser.add_argument("--version", action="version", version=f"fdl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    simulate = commands.add_parser(
        "simulate", help="write a simulated BIDS dataset with its true segmentation"
    )
    simulate.add_argument(
        "output", type=Path, nargs="?", metavar="OUT", help="folder of the dataset"
    )
    simulate.add_argument("--participants", type=int, default=4, metavar="N", help="default: 4")
    simulate.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    simulate.add_argument("--truth", type=Path, metavar="DIR", help="folder of the true label maps")
    simulate.add_argument(
        "--labels-dir",
        type=Path,
        metavar="DIR",
        help="head label maps to simulate, with dseg.tsv; default: a template with smooth shapes",
    )
    simulate.add_argument(
        "--profile",
        choices=("ordinary", "full"),
        default="ordinary",
        help="range of the effects, with --labels-dir; default: ordinary",
    )
    simulate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="EFFECT=VALUE",
        help="force an effect, with --labels-dir: a value, off, mild, middle or harsh",
    )
    simulate.add_argument(
        "--echoes", action="store_true", help="write the echoes too, with --labels-dir"
    )
    simulate.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    simulate.add_argument(
        "--gallery",
        type=Path,
        metavar="FIGURE",
        help="draw the region of the nuclei of each participant instead, with --labels-dir",
    )
    simulate.add_argument(
        "--describe", action="store_true", help="print the effects and their ranges instead"
    )
    simulate.set_defaults(command=_simulate)

    add_commands(commands)

    models = commands.add_parser("models", help="list, show and check models")
    actions = models.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the models that come with the package")
    listing.set_defaults(command=_list_models)
    show = actions.add_parser("show", help="what a model is and how it was made")
    show.add_argument("model", nargs="?", default="default", metavar="NAME|FILE")
    show.set_defaults(command=_show_model)
    check = actions.add_parser("check", help="verify models against their hash")
    check.add_argument("models", nargs="*", metavar="NAME|FILE", help="default: the shipped ones")
    check.set_defaults(command=_check_models)

    segment = commands.add_parser(
        "segment", help="segment images that are in no BIDS dataset, one label map each"
    )
    segment.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="NIfTI files")
    segment.add_argument("--contrast", choices=CONTRASTS, help="default: the model's first")
    segment.add_argument("--model", default="default", metavar="NAME|FILE", help="default: default")
    segment.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    add_flips(segment)
    segment.add_argument("--output", type=Path, required=True, metavar="DIR")
    segment.set_defaults(command=_segment)

    figure = commands.add_parser(
        "figure", help="draw a cohort's plots at print size, as SVG and PNG"
    )
    figure.add_argument("folder", type=Path, metavar="OUT", help="output folder of the app")
    figure.add_argument("--output", type=Path, required=True, metavar="DIR")
    figure.add_argument(
        "--measures", nargs="+", choices=PAPER_MEASURES, default=PAPER_MEASURES, help="default: all"
    )
    figure.add_argument("--by", metavar="COLUMN", help="default: the diagnosis, where there is one")
    figure.add_argument("--controls", metavar="COLUMN=VALUE", help="as for fdl-bidsapp group")
    figure.set_defaults(command=_figure)

    features.add_command(commands)
    return parser


def _simulate(options: argparse.Namespace) -> int:
    if options.describe:
        from fdl_bidsapp.simulation.parameters import table

        print(table(), end="")
        return 0
    if options.labels_dir is None:
        special = {"--gallery": options.gallery, "--set": options.set, "--echoes": options.echoes}
        for option, used in special.items():
            if used:
                raise UsageError(f"{option} needs head label maps", "give --labels-dir")
    if options.gallery is not None:
        return _draw_gallery(options)
    if options.output is None or options.truth is None:
        raise UsageError(
            "the folders of the dataset and of its truth are both needed", "give OUT and --truth"
        )
    for folder in (options.output, options.truth):
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError(
                "the folder is not empty", "choose another one, or empty it first", path=folder
            )

    def progress(scan: str) -> None:
        print(f"simulated {scan}", file=sys.stderr)

    if options.labels_dir is None:
        from fdl_bidsapp.memory import kept_memory
        from fdl_bidsapp.simulation.demo import simulate_dataset

        with kept_memory():
            simulate_dataset(
                options.output,
                options.truth,
                participants=options.participants,
                seed=options.seed,
                progress=progress,
            )
        return 0

    from fdl_bidsapp.models.inference import resolve_device
    from fdl_bidsapp.simulation.population import simulate_population

    simulate_population(
        options.output,
        options.truth,
        options.labels_dir,
        participants=options.participants,
        seed=options.seed,
        profile=options.profile,
        forced=_effects(options.set),
        echoes=options.echoes,
        device=str(resolve_device(options.device)),
        progress=progress,
    )
    return 0


def _draw_gallery(options: argparse.Namespace) -> int:
    from fdl_bidsapp.models.inference import resolve_device
    from fdl_bidsapp.simulation.gallery import REGION, draw_gallery
    from fdl_bidsapp.simulation.population import draw_scans

    scans = draw_scans(
        options.labels_dir,
        options.participants,
        options.seed,
        options.profile,
        _effects(options.set),
        box=REGION,
        device=str(resolve_device(options.device)),
    )
    draw_gallery(options.gallery, (scan for _, scan in scans))
    return 0


def _effects(words: Sequence[str]) -> dict[str, float | int | str]:
    """Split EFFECT=VALUE; what they mean is checked where the effects are known."""
    forced: dict[str, float | int | str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--set {word} has no value", "write --set EFFECT=VALUE")
        forced[name.strip()] = value.strip()
    return forced


def _list_models(options: argparse.Namespace) -> int:
    from fdl_bidsapp.models.bundle import Bundle, VolumeBundle, load_model, shipped_models

    for name, path in shipped_models().items():
        bundle = load_model(path)
        if isinstance(bundle, Bundle):
            structures = " ".join(label.abbreviation for label in bundle.spec.labels)
            what = f"{bundle.spec.method}\t{' '.join(bundle.spec.contrasts)}\t{structures}"
        elif isinstance(bundle, VolumeBundle):
            what = f"{bundle.spec.task}\t{bundle.spec.backbone}"
        else:
            what = f"features\t{bundle.spec.dimensions}-D\t{bundle.spec.channels} channels"
        print(f"{name}\t{what}\t{path.stat().st_size / 1e6:.1f} MB")
    return 0


def _show_model(options: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from fdl_bidsapp.models.bundle import Bundle, load_model

    bundle = load_model(options.model)
    content: dict[str, object] = {
        "path": str(bundle.path),
        "sha256": bundle.sha256,
        "app_version": bundle.app_version,
        "parameters": sum(tensor.numel() for tensor in bundle.state.values()),
        **asdict(bundle.spec),
    }
    if isinstance(bundle, Bundle):
        content["labels"] = [label.abbreviation for label in bundle.spec.labels]
        content["bank"] = {contrast: len(images) for contrast, images in bundle.bank.items()}
    print(json.dumps(content, indent=2, ensure_ascii=False))
    card = bundle.path.with_suffix(".md")
    if card.is_file():
        print(f"\n{card.read_text('utf-8')}", end="")
    return 0


def _check_models(options: argparse.Namespace) -> int:
    from fdl_bidsapp.models.bundle import load_model, shipped_models

    code = 0
    for model in options.models or shipped_models().values():
        try:
            bundle = load_model(model)
            bundle.network()
            print(f"{bundle.path}\tok\t{bundle.sha256}")
        except FdlError as error:
            print(f"fdl: {error}", file=sys.stderr)
            code = code or error.exit_code
    return code


def _figure(options: argparse.Namespace) -> int:
    from fdl_bidsapp.reports.figures import write_figures

    for path in write_figures(
        options.folder / "group_morph.tsv",
        options.output,
        measures=options.measures,
        by=options.by,
        controls=options.controls,
    ):
        print(path)
    return 0


def _segment(options: argparse.Namespace) -> int:
    from fdl_bidsapp.bids.inputs import Scan, Source
    from fdl_bidsapp.bids.outputs import write_image
    from fdl_bidsapp.derivatives import scanner_image
    from fdl_bidsapp.models.bundle import load_bundle
    from fdl_bidsapp.models.inference import resolve_device
    from fdl_bidsapp.pipeline import read_scan, segment_canvas, to_canvas, to_native

    names = [image.name for image in options.images]
    if len(set(names)) < len(names):
        raise UsageError(
            "two images have the same name and would overwrite each other in the output folder",
            "segment them into different folders",
        )
    for image in options.images:
        if image.absolute().parent == options.output.absolute():
            raise OutputError(
                "the output would overwrite the image", "choose another --output", path=image
            )
    bundle = load_bundle(options.model)
    device = resolve_device(options.device)
    print(f"model {bundle.spec.name} {bundle.sha256[:12]}, on {device.type}", file=sys.stderr)
    network = bundle.network(device)
    contrast = options.contrast or bundle.spec.contrasts[0]
    code = 0
    for path in options.images:
        source = Source(contrast, (path,), "map")
        try:
            images = read_scan(Scan((), (source,)), contrast, bundle.spec.contrasts)
            probabilities, affine = segment_canvas(
                to_canvas(images, bundle.spec), bundle, network, device, flips=options.flips
            )
            result = to_native(probabilities, affine, images, bundle.spec)
            name = path.name if path.name.endswith((".nii", ".nii.gz")) else f"{path.name}.nii.gz"
            write_image(options.output / name, scanner_image(result.labels, images.affine))
        except FdlError as error:
            # The other images are done all the same.
            print(f"fdl: {error}", file=sys.stderr)
            code = code or error.exit_code
            continue
        for note in images.notes:
            print(f"{path}: {note}", file=sys.stderr)
        empty = [
            label.abbreviation
            for label in bundle.spec.labels
            if not (result.labels == label.index).any()
        ]
        found = f"nothing found of {', '.join(empty)}" if empty else "all structures found"
        print(f"{options.output / name}\t{found}")
    return code
