"""``fdl train``, ``fdl evaluate``, ``fdl experiment``: their options, and the calls behind them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdl_bidsapp.errors import OutputError, UsageError
from fdl_bidsapp.settings import CONTRASTS, DEVICES, FLIPS

if TYPE_CHECKING:
    from fdl_bidsapp.training.cases import LabelledScan

METHODS = ("none", "early", "late", "multimodal")
SPLITS = ("train", "validation", "test")


def add_commands(commands: Any) -> None:
    """Add the three commands to the toolbox' parser."""
    train = commands.add_parser(
        "train",
        help="train a model on labelled scans",
        description="Train a model on labelled scans, from a TOML file, flags or both (flags win)."
        " The same command goes on with a training that was cut off.",
    )
    train.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml")
    train.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors")
    _add_data(train)
    train.add_argument("--name", metavar="NAME", help="the model's name")
    train.add_argument("--targets", nargs="+", choices=CONTRASTS, help="contrasts to segment")
    train.add_argument("--modalities", nargs="+", choices=CONTRASTS, help="for multimodal fusion")
    train.add_argument("--structures", nargs="+", metavar="ABBREVIATION")
    train.add_argument("--init", metavar="NAME|FILE", help="model to go on from, such as default")
    train.add_argument("--method", choices=METHODS)
    train.add_argument("--backbone", metavar="NAME", help="unet, dynunet, segresnet, unetr")
    train.add_argument("--spectrum", choices=("centred", "released"))
    train.add_argument("--theta", type=float, metavar="SHARE")
    train.add_argument(
        "--features", metavar="NAME|FILE", help="contrast-invariant features before the network"
    )
    train.add_argument(
        "--recipe",
        metavar="NAME",
        help="paper, strong or finetune; without labelled scans: cifl trains contrast-invariant"
        " features, pedqnet a reconstruction of QSM, brainmask a brain mask",
    )
    train.add_argument("--steps", type=int, metavar="N")
    train.add_argument("--n-train", type=int, metavar="N", help="use the first N training cases")
    train.add_argument("--seed", type=int, metavar="S")
    train.add_argument("--max-minutes", type=float, default=float("inf"), metavar="M")
    train.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser(
        "evaluate", help="measure models on labelled scans, and compare them"
    )
    evaluate.add_argument("models", nargs="+", metavar="NAME|FILE")
    evaluate.add_argument("--output", type=Path, required=True, metavar="DIR")
    _add_data(evaluate)
    evaluate.add_argument("--split", choices=SPLITS, help="default: all cases")
    evaluate.add_argument("--target", choices=CONTRASTS, help="default: the first of the model's")
    add_flips(evaluate)
    evaluate.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    evaluate.set_defaults(command=_evaluate)

    experiment = commands.add_parser(
        "experiment",
        help="train and measure a grid of settings",
        description="Train and measure every point of a grid of settings. The same command goes on"
        " with what is not done.",
    )
    experiment.add_argument("config", type=Path, metavar="CONFIG.toml")
    experiment.add_argument("--output", type=Path, required=True, metavar="DIR")
    _add_data(experiment)
    experiment.add_argument("--jobs", type=int, default=1, metavar="N", help="default: 1")
    experiment.add_argument(
        "--max-minutes",
        type=float,
        default=float("inf"),
        metavar="M",
        help="begin no run later than this; the tables then hold what is done",
    )
    experiment.add_argument("--published", type=Path, metavar="TSV", help="published values")
    experiment.add_argument("--device", choices=DEVICES, default="auto", help="default: auto")
    experiment.set_defaults(command=_experiment)


def add_flips(command: argparse.ArgumentParser) -> None:
    """Add the option to average over mirrored input."""
    command.add_argument(
        "--flips",
        choices=FLIPS,
        default="auto",
        help="average over left-right flips; default: auto, as the model was made for",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("labelled scans, from a table or from BIDS datasets")
    data.add_argument("--table", type=Path, metavar="TSV", help="id, split, contrasts …, label")
    data.add_argument("--bids-dir", type=Path, metavar="DIR", help="dataset with the images")
    data.add_argument("--labels-dir", type=Path, metavar="DIR", help="dataset with _dseg maps")
    data.add_argument("--derivatives", nargs="+", type=Path, metavar="DIR", help="more images")
    data.add_argument("--labels", type=Path, metavar="TSV", help="label table, as in dseg.tsv")


def _train(options: argparse.Namespace) -> int:
    from fdl_bidsapp.training.cifl import fit_features, make_feature_settings
    from fdl_bidsapp.training.fit import fit, make_settings, read_toml
    from fdl_bidsapp.training.pedqnet import RECIPES, fit_volume, make_volume_settings

    values = {**(read_toml(options.config) if options.config else {}), **_given(options)}
    if options.steps is not None:
        values["recipe_options"] = {**values.get("recipe_options", {}), "steps": options.steps}
    if options.max_minutes <= 0:
        raise UsageError("--max-minutes is not above 0", "give a number of minutes")
    how = {"device": options.device, "max_minutes": options.max_minutes}
    if values.get("recipe") == "cifl":
        print(fit_features(make_feature_settings(values), options.output, **how))
    elif values.get("recipe") in RECIPES:
        print(fit_volume(make_volume_settings(values), options.output, **how))
    else:
        print(fit(make_settings(values), options.output, **how))
    return 0


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that were given, as settings."""
    from fdl_bidsapp.training.fit import TrainingSettings

    values: dict[str, Any] = {}
    for item in fields(TrainingSettings):
        value = getattr(options, item.name, None)
        if isinstance(value, list):
            values[item.name] = [str(one) for one in value]
        elif value is not None:
            values[item.name] = str(value) if isinstance(value, Path) else value
    if options.table:
        values.update(bids_dir="", labels_dir="")
    elif options.bids_dir:
        values.update(table="")
    return values


def _evaluate(options: argparse.Namespace) -> int:
    from fdl_bidsapp.models.bundle import load_bundle
    from fdl_bidsapp.training.cases import read_labels
    from fdl_bidsapp.training.evaluate import MEAN, evaluate, summarise, write_evaluation

    bundles = [load_bundle(model) for model in options.models]
    names = [bundle.spec.name for bundle in bundles]
    if len(set(names)) < len(names):
        raise UsageError(
            f"two models are called {max(names, key=names.count)}",
            "evaluate them apart, or train one under another --name",
        )
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder cannot be made ({error.strerror})", "choose another", path=options.output
        ) from error
    scans = _scans(options)
    table = options.labels
    if table is None and options.labels_dir and (options.labels_dir / "dseg.tsv").is_file():
        table = options.labels_dir / "dseg.tsv"
    rows = []
    for bundle in bundles:
        rows += evaluate(
            bundle,
            scans,
            target=options.target,
            device=options.device,
            flips=options.flips,
            reference_labels=read_labels(table) if table else (),
            progress=_progress(bundle.spec.name, len(scans)),
        )
    write_evaluation(rows, names, options.output)
    for row in summarise(rows):
        if row["metric"] == "dice":
            what = "mean of structures" if row["structure"] == MEAN else row["structure"]
            print(
                f"{row['model']}\t{what}\tDice {row['mean']:.4f}"
                f" [{row['lower']:.4f}, {row['upper']:.4f}]\t{row['n_cases']} cases of"
                f" {row['n_participants']} participants"
            )
    return 0


def _experiment(options: argparse.Namespace) -> int:
    from fdl_bidsapp.training.experiment import make_experiment, run_experiment
    from fdl_bidsapp.training.fit import read_toml

    values = {**read_toml(options.config), **_given(options)}
    for path in run_experiment(
        make_experiment(values),
        options.output,
        jobs=options.jobs,
        device=options.device,
        published=options.published,
        max_minutes=options.max_minutes,
        progress=lambda line: print(line, file=sys.stderr),
    ):
        print(path)
    return 0


def _scans(options: argparse.Namespace) -> list[LabelledScan]:
    from fdl_bidsapp.training.cases import in_split, read_bids, read_table

    if bool(options.table) == bool(options.bids_dir and options.labels_dir):
        raise UsageError(
            "the labelled scans have to come either from a table or from two BIDS datasets",
            "give --table, or --bids-dir and --labels-dir",
        )
    if options.table:
        scans = read_table(options.table)
    else:
        more = [(None, folder) for folder in options.derivatives or ()]
        scans = read_bids(options.bids_dir, options.labels_dir, derivatives=more)
    if options.split:
        return in_split(scans, options.split, options.table or options.bids_dir)
    return scans


def _progress(model: str, n: int) -> Any:
    from tqdm import tqdm

    # disable=None: quiet where standard error is no terminal.
    bar = tqdm(total=n, desc=model, disable=None)

    def done(_: str) -> None:
        bar.update()
        if bar.n == n:
            bar.close()

    return done
