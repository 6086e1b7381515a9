"""From labelled scans and settings to a model file: what ``fdl train`` does."""

from __future__ import annotations

import hashlib
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fdl_bidsapp.errors import DataError, InputMissingError, ModelError, OutputError, UsageError
from fdl_bidsapp.labels import may_flip
from fdl_bidsapp.models.bundle import (
    Bundle,
    FeatureBundle,
    load_bundle,
    load_features,
    save_bundle,
)
from fdl_bidsapp.models.cifl import FrozenFeatures
from fdl_bidsapp.models.fdl import CONTRASTS, FusionNetwork, ModelSpec, build_network
from fdl_bidsapp.models.inference import device_name, resolve_device
from fdl_bidsapp.training.batches import CaseBatches, make_bank
from fdl_bidsapp.training.cases import (
    LabelledScan,
    in_split,
    known_labels,
    load_cases,
    read_bids,
    read_table,
)
from fdl_bidsapp.training.heads import labelled_head, train_locator
from fdl_bidsapp.training.loop import LOG_COLUMNS, Trained, train
from fdl_bidsapp.training.recipes import Recipe, make_recipe

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PATHS = ("table", "bids_dir", "labels_dir", "labels")

OF_THE_NETWORK = (
    "method",
    "backbone",
    "backbone_options",
    "theta",
    "spectrum",
    "fusion_channels",
    "grid_shape",
    "grid_spacing",
    "features",
)
"""Settings that a model to go on from has already."""

LOCATOR_SHARE = 0.2
"""Of a time budget, at most for the locator."""

Settings = TypeVar("Settings", bound="DataclassInstance")


@dataclass(frozen=True)
class TrainingSettings:
    """What to train on what, under the names of the TOML file.

    Attributes
    ----------
    name
        Name of the model.
    data
        What the data are, in words, for the model's provenance.
    table
        Table of labelled scans; see :func:`fdl_bidsapp.training.cases.read_table`.
    bids_dir, labels_dir
        Instead of a table: a BIDS dataset, and a derivative dataset of label maps.
    derivatives
        Further datasets with images.
    labels
        Label table; see :func:`fdl_bidsapp.training.cases.known_labels`.
    structures
        Abbreviations of the structures to segment; all of the table if empty.
    targets
        Contrasts that the model is to segment.
    modalities
        Contrasts beside them whose low parts multimodal fusion uses.
    n_train
        Use only so many training cases, the first ones; all if 0.
    validation_share
        Share of the participants held back, where a BIDS dataset has no splits.
    init
        Name or file of a model to go on from; none if empty. Its grid, networks and bank are kept,
        and of its structures those that are wanted. Its locator is trained on too.
    method, backbone, backbone_options, theta, spectrum, fusion_channels, grid_shape, grid_spacing
        As in :class:`fdl_bidsapp.models.fdl.ModelSpec`; not to be given with ``init``.
    features
        Name or file of a network of contrast-invariant features to stand before the network; none
        if empty.
    recipe, recipe_options
        See :func:`fdl_bidsapp.training.recipes.make_recipe`. Both kinds of options may also be
        tables of options by name, of which that of the backbone or recipe in use is taken.
    seed
        Of the first weights and of the batches.
    """

    name: str = "model"
    data: str = ""
    table: str = ""
    bids_dir: str = ""
    labels_dir: str = ""
    derivatives: tuple[str, ...] = ()
    labels: str = ""
    structures: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("qsm",)
    modalities: tuple[str, ...] = ()
    n_train: int = 0
    validation_share: float = 0.2
    init: str = ""
    method: str = "late"
    backbone: str = "unet"
    backbone_options: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    theta: float = 0.1
    spectrum: str = "centred"
    fusion_channels: int = 12
    grid_shape: tuple[int, ...] = (160, 160, 128)
    grid_spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    features: str = ""
    recipe: str = "strong"
    recipe_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings; their relative paths are taken from the file's folder.

    Raises
    ------
    InputMissingError, UsageError
        No such file, or no TOML.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputMissingError("there is no such file", "check the path", path=path) from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"this is no TOML file ({' '.join(str(error).split())})", "correct it", path=path
        ) from error
    for key in (*PATHS, "features", "init"):
        value = values.get(key)
        # The last two may also be the name of a shipped model.
        if isinstance(value, str) and value and (key in PATHS or value.endswith(".safetensors")):
            values[key] = str(path.parent / value)
    if isinstance(values.get("derivatives"), list):
        values["derivatives"] = [str(path.parent / str(one)) for one in values["derivatives"]]
    return values


def make_settings(values: Mapping[str, Any]) -> TrainingSettings:
    """Make settings from the values of a TOML file and of flags.

    Raises
    ------
    UsageError
        An unknown setting, a value of a wrong type, or neither or both kinds of data.

    Examples
    --------
    >>> make_settings({"table": "cases.tsv", "method": "early"}).method
    'early'
    """
    settings = with_values(TrainingSettings(), values)
    if bool(settings.table) == bool(settings.bids_dir and settings.labels_dir):
        raise UsageError(
            "the labelled scans have to come either from a table or from two BIDS datasets",
            "give table, or bids_dir and labels_dir",
        )
    return settings


def with_values(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Return settings with some values replaced, each by one of its own type.

    Parameters
    ----------
    settings
        A dataclass.
    values
        By the names of its fields; lists stand for tuples.

    Raises
    ------
    UsageError
        An unknown setting, or a value of a wrong type.
    """
    known = [item.name for item in fields(settings)]
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise UsageError(
            f"there is no setting {', '.join(unknown)}", f"the settings are {', '.join(known)}"
        )
    typed = {key: _typed(key, value, getattr(settings, key)) for key, value in values.items()}
    return replace(settings, **typed)


def _typed(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        kinds: tuple[type, ...] = (int, float) if key.startswith("grid_") else (str,)
        if key == "grid_shape":
            kinds = (int,)
        if isinstance(value, list | tuple) and all(type(item) in kinds for item in value):
            return tuple(value)
    elif isinstance(default, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
    elif type(value) is type(default) or (isinstance(default, float) and type(value) is int):
        return type(default)(value)
    raise UsageError(f"the setting {key} is {value!r}", f"give a value like {default!r}")


def options_of(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Take the options of one backbone or recipe, where they are given by name.

    Examples
    --------
    >>> options_of("unet", {"unet": {"width": 8}, "unetr": {"heads": 4}})
    {'width': 8}
    >>> options_of("unet", {"width": 8})
    {'width': 8}
    """
    if not any(isinstance(value, Mapping) for value in options.values()):
        return dict(options)
    return dict(options.get(name, {}))


def labelled_scans(settings: TrainingSettings) -> list[LabelledScan]:
    """Find the labelled scans that the settings name."""
    if settings.table:
        return read_table(settings.table)
    return read_bids(
        settings.bids_dir,
        settings.labels_dir,
        derivatives=[(None, folder) for folder in settings.derivatives],
        validation_share=settings.validation_share,
    )


def load_volume_features(name_or_path: str) -> FeatureBundle:
    """Load a network of contrast-invariant features that takes volumes.

    Raises
    ------
    FdlError
        There is none of that name, the file is no such network, or it is for slices.
    """
    features = load_features(name_or_path)
    if features.spec.dimensions != 3:
        raise ModelError(
            "these features are of slices, and the scans are volumes",
            "train some with dimensions = 3",
            path=features.path,
        )
    return features


def make_spec(
    settings: TrainingSettings, recipe: Recipe, features: FeatureBundle | None = None
) -> tuple[ModelSpec, frozenset[int]]:
    """Make the specification of the model to train, and tell the label values that are known.

    Raises
    ------
    UsageError, ModelError
        A setting is out of its range.
    """
    labels, known = known_labels(
        settings.labels or None, settings.labels_dir or None, settings.structures
    )
    if settings.modalities and settings.method != "multimodal":
        raise UsageError(
            f"the method {settings.method} takes no modalities beside its targets",
            "choose the method multimodal, or leave modalities out",
        )
    unknown = sorted({*settings.targets, *settings.modalities} - set(CONTRASTS))
    if unknown:
        raise UsageError(
            f"there is no contrast {', '.join(unknown)}", f"choose among {', '.join(CONTRASTS)}"
        )
    contrasts = tuple(dict.fromkeys((*settings.targets, *settings.modalities)))
    defaults = {c: s for c, s in ModelSpec("defaults").intensity.items() if c in contrasts}
    options = options_of(settings.backbone, settings.backbone_options)
    if settings.backbone == "unetr":
        options.setdefault("grid", "x".join(map(str, settings.grid_shape)))
    spec = ModelSpec(
        settings.name,
        method=settings.method,
        backbone=settings.backbone,
        backbone_options=options,
        theta=settings.theta,
        spectrum=settings.spectrum,
        fusion_channels=settings.fusion_channels,
        grid_shape=settings.grid_shape,  # type: ignore[arg-type]
        grid_spacing=settings.grid_spacing,  # type: ignore[arg-type]
        contrasts=settings.targets,
        intensity=dict.fromkeys(contrasts, recipe.intensity) if recipe.intensity else defaults,
        labels=labels,
        features={} if features is None else features.spec.options,
    )
    return spec, known


def continued_spec(settings: TrainingSettings, base: Bundle) -> tuple[ModelSpec, frozenset[int]]:
    """Make the specification of a model that goes on from another, and tell the known values.

    Raises
    ------
    UsageError
        A setting asks for another network, or for what the other model does not segment.
    """
    given = [k for k in OF_THE_NETWORK if getattr(settings, k) != getattr(TrainingSettings(), k)]
    if given:
        raise UsageError(
            f"{', '.join(given)} cannot be chosen where training goes on from a model",
            "leave them out, or leave out init",
        )
    labels, known = known_labels(
        settings.labels or None,
        settings.labels_dir or None,
        settings.structures,
        base.spec.labels,
    )
    theirs = {label.abbreviation for label in base.spec.labels}
    missing = [label.abbreviation for label in labels if label.abbreviation not in theirs]
    if missing:
        raise UsageError(
            f"the model {base.spec.name!r} does not segment {', '.join(missing)}",
            f"choose --structures among {', '.join(sorted(theirs))}, or train without init",
        )
    absent = sorted(set(settings.targets) - set(base.spec.contrasts))
    if absent:
        raise UsageError(
            f"the model {base.spec.name!r} does not segment {', '.join(absent)}",
            f"choose --targets among {', '.join(base.spec.contrasts)}",
        )
    wanted = {label.abbreviation for label in labels}
    # What the base's probabilities are worth says nothing of the model to come.
    spec = replace(
        base.spec,
        name=settings.name,
        contrasts=settings.targets,
        labels=labels,
        regions=tuple(
            tuple(name for name in region if name in wanted) for region in base.spec.regions
        ),
        calibration=None,
        flips=False,
    )
    return spec, known


def continued_state(base: Bundle, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Return a model's weights, with the rows of its last layer that the structures need."""
    order = [label.abbreviation for label in base.spec.labels]
    rows = [0, *(1 + order.index(label.abbreviation) for label in spec.labels)]
    last = "head.1" if spec.method in ("late", "multimodal") else "head"
    state = dict(base.state)
    for name in (f"{last}.weight", f"{last}.bias"):
        state[name] = state[name][rows]
    return state


def fit(
    settings: TrainingSettings,
    output: Path,
    *,
    device: str = "auto",
    max_minutes: float = float("inf"),
) -> Path:
    """Train a model, or go on with a training that was cut off, and write the model file.

    Parameters
    ----------
    settings
        What to train.
    output
        The model file, ``.safetensors``. Beside it, a folder of the same name with ``.run`` holds
        the checkpoint, ``log.tsv`` and ``training.png``.
    device
        ``auto``, ``cpu`` or ``cuda``.
    max_minutes
        The schedule is shortened to end within this time, all runs together.

    Returns
    -------
    Path
        The model file.

    Raises
    ------
    FdlError
        Whatever is wrong with the settings and the data is told before the training starts.
    """
    recipe = make_recipe(settings.recipe, options_of(settings.recipe, settings.recipe_options))
    features = load_volume_features(settings.features) if settings.features else None
    base = load_bundle(settings.init) if settings.init else None
    if base is None:
        spec, known = make_spec(settings, recipe, features)
    else:
        spec, known = continued_spec(settings, base)
    # Only who was trained on mirrored images gains from them.
    spec = replace(spec, flips=recipe.augment > 0 and may_flip(spec.labels))
    where = resolve_device(device)
    torch.manual_seed(settings.seed)
    network = build_network(spec)
    if base is not None:
        network.load_state_dict(continued_state(base, spec))
    if features is not None:
        network.front.load_state_dict(FrozenFeatures(features.network()).state_dict())
    scans = labelled_scans(settings)
    source = Path(settings.table or settings.bids_dir)
    chosen = {split: in_split(scans, split, source) for split in ("train", "validation")}
    chosen["train"] = _first(chosen["train"], settings.n_train, source)
    folder = run_folder(output)
    cases = {
        split: load_cases(some, spec, known, settings.modalities) for split, some in chosen.items()
    }
    bank = {} if base is None else base.bank
    if base is None and spec.method == "multimodal":
        bank = make_bank(cases["train"], spec, settings.modalities, network.front)
        missing = [contrast for contrast in settings.modalities if contrast not in bank]
        if missing:
            raise DataError(
                f"no training case has the modality {', '.join(missing)}",
                "add one that has it, or leave the modality out",
                path=source,
            )
    batches = CaseBatches(
        cases["train"],
        spec,
        bank,
        where,
        batch=recipe.batch,
        augment=recipe.augment,
        warped=recipe.warped,
        seed=settings.seed,
        front=network.front,
    )
    held_back = CaseBatches(cases["validation"], spec, bank, where)
    mixed = recipe.schedule.mixed_precision
    configuration = _configuration(settings, chosen, spec)
    configuration["features"] = features.sha256 if features is not None else ""
    configuration["init"] = base.sha256 if base is not None else ""
    if network.locator is not None and recipe.locator_steps:
        located = train_locator(
            network.locator,
            spec,
            [labelled_head(one, spec) for one in chosen["train"]],
            replace(recipe.locator_schedule, max_minutes=LOCATOR_SHARE * max_minutes),
            folder / "locator",
            where,
            configuration=configuration,
            seed=settings.seed,
        )
        network.locator.load_state_dict(located.network.state_dict())
        # One step may outlast a short budget.
        max_minutes = max(max_minutes - located.minutes, 1e-6)
    trained = train(
        network,
        batches.draw,
        recipe.total_loss,
        replace(recipe.schedule, max_minutes=max_minutes),
        folder,
        where,
        validate=lambda averaged: held_back.mean_dice(averaged, mixed),
        configuration=configuration,
        record=spec.backbone == "unet",
    )
    draw_training_curve(folder / "log.tsv", folder / "training.png")
    provenance = _provenance(settings, configuration, chosen, trained, where)
    # What the model that it goes on from was trained on, it was trained on too.
    provenance["before"] = {} if base is None else base.spec.provenance
    assert isinstance(trained.network, FusionNetwork)
    save_bundle(output, trained.network, replace(spec, provenance=provenance), bank)
    return output


def draw_training_curve(log: Path, figure: Path) -> None:
    """Draw loss and validation Dice over the steps of a training's log."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = [line.split("\t") for line in log.read_text("utf-8").splitlines()[1:]]
    columns = {name: [row[i] for row in rows] for i, name in enumerate(LOG_COLUMNS)}

    def points(name: str) -> tuple[list[int], list[float]]:
        pairs = zip(columns["step"], columns[name], strict=True)
        kept = [(int(step), float(value)) for step, value in pairs if value != "n/a"]
        return [step for step, _ in kept], [value for _, value in kept]

    fig, left = plt.subplots(figsize=(7, 4), layout="constrained")
    right = left.twinx()
    left.plot(*points("loss"), color="tab:blue", linewidth=0.8)
    right.plot(*points("validation_dice"), color="tab:orange", marker="o", markersize=3)
    left.set_xlabel("step")
    left.set_ylabel("training loss", color="tab:blue")
    right.set_ylabel("validation Dice", color="tab:orange")
    right.set_ylim(0, 1)
    fig.savefig(figure, dpi=120)
    plt.close(fig)


def _first(scans: list[LabelledScan], n: int, source: Path) -> list[LabelledScan]:
    if n < 0 or n > len(scans):
        raise DataError(
            f"n_train is {n}, and there are {len(scans)} training cases",
            f"give at most {len(scans)}",
            path=source,
        )
    return scans[:n] if n else scans


def run_folder(output: Path) -> Path:
    """Make the folder beside a model file that holds checkpoint and log.

    Raises
    ------
    UsageError, OutputError
        The file has another ending than ``.safetensors``, or the folder cannot be written.
    """
    if output.suffix != ".safetensors":
        raise UsageError(f"the output is {output.name}", "give a name that ends in .safetensors")
    folder = output.with_suffix(".run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"the folder of the training cannot be written ({error.strerror})",
            "choose an output elsewhere",
            path=folder,
        ) from error
    return folder


def _configuration(
    settings: TrainingSettings, chosen: Mapping[str, list[LabelledScan]], spec: ModelSpec
) -> dict[str, Any]:
    """Return what a training has to have in common with its checkpoint."""
    values = {key: value for key, value in vars(settings).items() if key not in PATHS}
    for key in ("name", "data", "derivatives", "structures", "n_train", "validation_share"):
        del values[key]
    values["backbone_options"] = dict(spec.backbone_options)
    values["recipe_options"] = options_of(settings.recipe, settings.recipe_options)
    values["labels"] = [f"{label.index} {label.abbreviation}" for label in spec.labels]
    for split, scans in chosen.items():
        digest = hashlib.sha256()
        for one in scans:
            files = [file for source in one.scan.sources for file in source.paths]
            for file in (*files, one.label):
                digest.update(f"{one.name}\0{file.name}\0{file.stat().st_size}\0".encode())
        values[f"{split} cases"] = f"{len(scans)}, {digest.hexdigest()[:16]}"
    return values


def _provenance(
    settings: TrainingSettings,
    configuration: Mapping[str, Any],
    chosen: Mapping[str, list[LabelledScan]],
    trained: Trained,
    device: torch.device,
) -> dict[str, Any]:
    return {
        "data": settings.data,
        "n_train": len(chosen["train"]),
        "train_participants": len({one.participant for one in chosen["train"]}),
        "n_validation": len(chosen["validation"]),
        "recipe": settings.recipe,
        "recipe_options": options_of(settings.recipe, settings.recipe_options),
        "seed": settings.seed,
        "features": configuration["features"],
        "init": configuration["init"],
        "train_cases": configuration["train cases"],
        "steps": trained.steps,
        "step_of_weights": trained.step,
        "validation_dice": trained.validation_dice,
        "minutes": round(trained.minutes, 2),
        "trained_on": device_name(device),
        "torch": str(torch.__version__),
        "finished": time.strftime("%Y-%m-%d"),
    }
