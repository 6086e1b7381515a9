"""One safetensors file for a model: weights, low-frequency bank and all that is needed to run it.

The file's metadata hold one JSON text: format version, app version, specification, and a SHA-256
over these and the names, types, shapes and bytes of all tensors. Nothing is unpickled. A network of
contrast-invariant features is such a file too, with ``"kind": "features"`` beside the version.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from fdl_bidsapp import __version__
from fdl_bidsapp.errors import InputMissingError, ModelError, OutputError, StorageError
from fdl_bidsapp.imaging.confidence import Calibration
from fdl_bidsapp.labels import Label
from fdl_bidsapp.models.cifl import FeatureNetwork, FeatureSpec
from fdl_bidsapp.models.fdl import CONTRASTS, FusionNetwork, ModelSpec, build_network
from fdl_bidsapp.models.fourier import window_halfwidths
from fdl_bidsapp.models.pedqnet import VolumeNetwork, VolumeSpec

DEFAULT_MODEL = "default"
FORMAT_VERSION = 1
METADATA_KEY = "fdl_bidsapp"
MAX_HEADER = 2**20
"""Longest header in bytes; a real one takes some 10 kB."""
MAX_FILE = 2**30
"""Largest model file in bytes."""
STORAGE = {"float32": torch.float32, "float16": torch.float16}
NETWORK, BANK = "network.", "bank."
Spec = TypeVar("Spec", ModelSpec, FeatureSpec, VolumeSpec)
COPY_AGAIN = "download or copy the model file again"


@dataclass(frozen=True)
class Bundle:
    """A model as loaded.

    Attributes
    ----------
    spec
        How to build and feed the network.
    state
        The network's tensors by name, float32.
    bank
        For each contrast, low parts ``(n1, n2, n3)`` of training subjects; of a model with several
        regions, one for each.
    sha256
        Verified digest over all of it.
    app_version
        Version of the app that wrote the file.
    path
        Where it came from.
    """

    spec: ModelSpec
    state: dict[str, Tensor]
    bank: dict[str, list[Tensor]]
    sha256: str
    app_version: str
    path: Path

    def network(self, device: torch.device | str = "cpu") -> FusionNetwork:
        """Build the network with these weights, for evaluation, on a device."""
        network = build_network(self.spec)
        network.load_state_dict(self.state)
        return network.to(device).eval()


@dataclass(frozen=True)
class FeatureBundle:
    """A network of contrast-invariant features as loaded; attributes as in :class:`Bundle`."""

    spec: FeatureSpec
    state: dict[str, Tensor]
    sha256: str
    app_version: str
    path: Path

    def network(self, device: torch.device | str = "cpu") -> FeatureNetwork:
        """Build the network with these weights, for evaluation, on a device."""
        network = FeatureNetwork(self.spec)
        network.load_state_dict(self.state)
        return network.to(device).eval()


@dataclass(frozen=True)
class VolumeBundle:
    """A network from volume to volume as loaded; attributes as in :class:`Bundle`."""

    spec: VolumeSpec
    state: dict[str, Tensor]
    sha256: str
    app_version: str
    path: Path

    def network(self, device: torch.device | str = "cpu") -> VolumeNetwork:
        """Build the network with these weights, for evaluation, on a device."""
        network = VolumeNetwork(self.spec)
        network.load_state_dict(self.state)
        return network.to(device).eval()


def shipped_models() -> dict[str, Path]:
    """Return the models that come with the package, by name.

    Examples
    --------
    >>> all(path.suffix == ".safetensors" for path in shipped_models().values())
    True
    """
    folder = Path(str(files("fdl_bidsapp.models.weights")))
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def save_bundle(
    path: str | PathLike[str],
    network: FusionNetwork,
    spec: ModelSpec,
    bank: Mapping[str, Sequence[Tensor]] | None = None,
    *,
    dtype: str = "float32",
) -> str:
    """Write a model to one file, whole or not at all.

    Parameters
    ----------
    path
        File to write; an older one is replaced.
    network
        Network built from ``spec``.
    spec
        What it was built from; its provenance has to be JSON values.
    bank : contrast → tensors ending in (n1, n2, n3)
        Low parts of training subjects on the model's grid.
    dtype
        ``float32``, or ``float16`` for half the size; loading gives float32 either way.

    Returns
    -------
    str
        The model's SHA-256, as :func:`load_bundle` verifies it.

    Raises
    ------
    ModelError
        Network, bank and specification do not fit together, or cannot be stored.
    OutputError
        The file cannot be written.
    """
    path = Path(path)
    tensors = {NETWORK + name: tensor for name, tensor in network.state_dict().items()}
    axes = 4 if spec.features else 3
    for contrast, images in (bank or {}).items():
        for i, image in enumerate(images):
            tensors[f"{BANK}{contrast}.{i}"] = image.reshape(image.shape[-axes:])
    stored = _stored(tensors, dtype)
    content = _described(spec, path)
    _check_tensors(stored, spec, path)
    return _save(path, stored, content)


def save_features(
    path: str | PathLike[str], network: FeatureNetwork, spec: FeatureSpec, *, dtype: str = "float32"
) -> str:
    """Write a network of contrast-invariant features to one file; see :func:`save_bundle`."""
    path = Path(path)
    tensors = {NETWORK + name: tensor for name, tensor in network.state_dict().items()}
    stored = _stored(tensors, dtype)
    content = {**_described(spec, path), "kind": "features"}
    _check_feature_tensors(stored, spec, path)
    return _save(path, stored, content)


def save_volume(
    path: str | PathLike[str], network: VolumeNetwork, spec: VolumeSpec, *, dtype: str = "float32"
) -> str:
    """Write a network from volume to volume to one file; see :func:`save_bundle`."""
    path = Path(path)
    tensors = {NETWORK + name: tensor for name, tensor in network.state_dict().items()}
    stored = _stored(tensors, dtype)
    content = {**_described(spec, path), "kind": "volume"}
    _check_volume_tensors(stored, spec, path)
    return _save(path, stored, content)


def _stored(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    stored = {
        name: tensor.detach()
        .cpu()
        .to(STORAGE[dtype] if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def _described(spec: ModelSpec | FeatureSpec | VolumeSpec, path: Path) -> dict[str, object]:
    try:
        return {
            "format_version": FORMAT_VERSION,
            "app_version": __version__,
            # Through JSON and back, so that the digest is over what a reader will see.
            "spec": json.loads(json.dumps(asdict(spec), allow_nan=False)),
        }
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"its specification cannot be stored as JSON ({error})",
            "use texts, finite numbers, lists and objects in the provenance",
            path=path,
        ) from error


def _save(path: Path, stored: Mapping[str, Tensor], content: Mapping[str, object]) -> str:
    digest = _digest(stored, content)
    text = json.dumps({**content, "sha256": digest}, ensure_ascii=False)
    data = safetensors.save(dict(stored), {METADATA_KEY: text})
    if int.from_bytes(data[:8], "little") > MAX_HEADER:
        raise ModelError("its metadata are too long", "shorten the provenance", path=path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"the model file cannot be written ({error.strerror})",
            "choose a folder that exists, is writable and has space",
            path=path,
        ) from error
    return digest


def load_bundle(name_or_path: str | PathLike[str]) -> Bundle:
    """Read a model and verify it.

    Parameters
    ----------
    name_or_path
        Name of a shipped model (see :func:`shipped_models`), or a file.

    Raises
    ------
    InputMissingError
        Neither a shipped model nor a file.
    ModelError
        Not a model file, damaged, altered, of an unknown format, or inconsistent.
    StorageError
        The file cannot be read.
    """
    bundle = load_model(name_or_path)
    if isinstance(bundle, FeatureBundle):
        raise ModelError(
            "this model computes features and segments nothing",
            "use it with fdl features, or with fdl train --features to train a model that segments",
            path=bundle.path,
        )
    if isinstance(bundle, VolumeBundle):
        raise ModelError(
            f"this model's task is {bundle.spec.task}, and it segments no nuclei",
            "give it as --recon if that is susceptibility",
            path=bundle.path,
        )
    return bundle


def load_features(name_or_path: str | PathLike[str]) -> FeatureBundle:
    """Read a network of contrast-invariant features and verify it; see :func:`load_bundle`.

    Raises
    ------
    InputMissingError, ModelError, StorageError
        As there, or the file is a model that segments.
    """
    try:
        bundle = load_model(name_or_path)
    except InputMissingError as error:
        raise InputMissingError(
            "there are no such features",
            "train some with fdl train --recipe cifl --output FILE, and give that file",
            path=error.path,
        ) from error
    if not isinstance(bundle, FeatureBundle):
        raise ModelError(
            "this model has another task and has no features to give",
            "give a model trained with fdl train --recipe cifl",
            path=bundle.path,
        )
    return bundle


def load_volume(name_or_path: str | PathLike[str], task: str) -> VolumeBundle:
    """Read a network from volume to volume and verify it; see :func:`load_bundle`.

    Parameters
    ----------
    name_or_path
        As there.
    task
        ``susceptibility`` or ``brain``.

    Raises
    ------
    InputMissingError, ModelError, StorageError
        As there, or the file is a model of another task.
    """
    bundle = load_model(name_or_path)
    if not isinstance(bundle, VolumeBundle) or bundle.spec.task != task:
        recipe = {"susceptibility": "pedqnet", "brain": "brainmask"}[task]
        raise ModelError(
            f"this model's task is not {task}",
            f"give a model trained with fdl train --recipe {recipe}",
            path=bundle.path,
        )
    return bundle


def load_model(name_or_path: str | PathLike[str]) -> Bundle | FeatureBundle | VolumeBundle:
    """Read a model of any kind and verify it; see :func:`load_bundle`."""
    path = shipped_models().get(os.fspath(name_or_path), Path(name_or_path))
    content, tensors = _open(path)
    digest, version = str(content["sha256"]), str(content["app_version"])
    if content.get("kind") == "features":
        features = _rebuilt(_feature_spec_from_json, content, path)
        _check_feature_tensors(tensors, features, path)
        weights = {name.removeprefix(NETWORK): tensor for name, tensor in tensors.items()}
        return FeatureBundle(features, weights, digest, version, path)
    if content.get("kind") == "volume":
        volume = _rebuilt(_volume_spec_from_json, content, path)
        _check_volume_tensors(tensors, volume, path)
        weights = {name.removeprefix(NETWORK): tensor for name, tensor in tensors.items()}
        return VolumeBundle(volume, weights, digest, version, path)
    spec = _rebuilt(_spec_from_json, content, path)
    _check_tensors(tensors, spec, path)
    state: dict[str, Tensor] = {}
    bank: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=_bank_order):
        if name.startswith(NETWORK):
            state[name.removeprefix(NETWORK)] = tensors[name]
        else:
            bank.setdefault(name.split(".")[1], []).append(tensors[name])
    return Bundle(spec, state, bank, digest, version, path)


def _open(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Read a file's description and tensors, these in float32, and verify the digest."""
    data = _read(path)
    content = _content(_metadata(data, path), path)
    try:
        tensors = safetensors.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError("the model file is cut short or damaged", COPY_AGAIN, path=path) from error
    digest = _digest(tensors, {key: content[key] for key in content if key != "sha256"})
    if digest != content["sha256"]:
        raise ModelError(
            "the model file was altered or damaged: its SHA-256 does not match",
            COPY_AGAIN,
            path=path,
        )
    for name, tensor in tensors.items():
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return content, tensors


def _rebuilt(make: Callable[[object], Spec], content: Mapping[str, object], path: Path) -> Spec:
    try:
        return make(content["spec"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(
            f"the model file's specification is incomplete or of wrong types ({error})",
            "write it again with this app",
            path=path,
        ) from error
    except ModelError as error:
        raise ModelError(error.cause, error.remedy, path=path) from error


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ModelError("this is a folder, not a model file", "name the file in it", path=path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= MAX_HEADER:
                raise ModelError(
                    "this is not a safetensors file",
                    "give a model file written by this app; PyTorch checkpoints (pickles, zip"
                    " archives) are never opened, as they can run code",
                    path=path,
                )
            if length > size - 8:
                raise ModelError("the model file is cut short", COPY_AGAIN, path=path)
            if size > MAX_FILE:
                raise ModelError(
                    "the file is too large for a model", "give another file", path=path
                )
            return start + file.read()
    except FileNotFoundError as error:
        names = ", ".join(shipped_models()) or "none is shipped"
        raise InputMissingError(
            "there is no such model", f"give a model file or a shipped name ({names})", path=path
        ) from error
    except OSError as error:
        raise StorageError(
            f"the model file cannot be read ({error.strerror})",
            "check its permissions and the disk",
            path=path,
        ) from error


def _metadata(data: bytes, path: Path) -> object:
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        return header["__metadata__"][METADATA_KEY]
    except (ValueError, RecursionError) as error:
        raise ModelError(
            "the header of the model file is damaged", COPY_AGAIN, path=path
        ) from error
    except (KeyError, TypeError) as error:
        raise ModelError(
            "this safetensors file is not a model of this app: it has no description",
            "give a model file written by this app",
            path=path,
        ) from error


def _content(metadata: object, path: Path) -> dict[str, object]:
    try:
        content = json.loads(metadata) if isinstance(metadata, str) else None
    except (ValueError, RecursionError) as error:
        raise ModelError(
            "the description in the model file is damaged", COPY_AGAIN, path=path
        ) from error
    needed = ("format_version", "app_version", "spec", "sha256")
    if not isinstance(content, dict) or not all(key in content for key in needed):
        raise ModelError("the description in the model file is incomplete", COPY_AGAIN, path=path)
    if content["format_version"] != FORMAT_VERSION:
        raise ModelError(
            f"the model file has format {content['format_version']!r}, this app reads"
            f" {FORMAT_VERSION}",
            f"use the app version that wrote it ({content['app_version']!r}) or a newer one",
            path=path,
        )
    return content


def _digest(tensors: Mapping[str, Tensor], content: Mapping[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec, path: Path) -> None:
    """Compare the tensors with what the specification needs, without allocating a network."""
    try:
        with torch.device("meta"):
            expected = build_network(spec).state_dict()
    except ModelError as error:
        raise ModelError(error.cause, error.remedy, path=path) from error
    shapes = {NETWORK + name: tensor.shape for name, tensor in expected.items()}
    window = [2 * m + 1 for m in window_halfwidths(spec.grid_shape, spec.theta)]
    if spec.spectrum == "released":
        window[2] = spec.grid_shape[2]
    if spec.features:
        window.insert(0, spec.image_channels)
    for name in tensors:
        if _is_bank_name(name):
            shapes[name] = torch.Size(window)
    _compare(tensors, shapes, path)


def _check_feature_tensors(tensors: Mapping[str, Tensor], spec: FeatureSpec, path: Path) -> None:
    with torch.device("meta"):
        expected = FeatureNetwork(spec).state_dict()
    _compare(tensors, {NETWORK + name: tensor.shape for name, tensor in expected.items()}, path)


def _check_volume_tensors(tensors: Mapping[str, Tensor], spec: VolumeSpec, path: Path) -> None:
    with torch.device("meta"):
        expected = VolumeNetwork(spec).state_dict()
    _compare(tensors, {NETWORK + name: tensor.shape for name, tensor in expected.items()}, path)


def _compare(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], path: Path) -> None:
    wrong = [
        name
        for name in sorted(shapes.keys() | tensors.keys())
        if name not in tensors or name not in shapes or tensors[name].shape != shapes[name]
    ]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors do not fit the model's specification, the first is {wrong[0]!r}",
            "use the weights and the specification of one and the same model",
            path=path,
        )
    if not all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point()):
        raise ModelError(
            "some weights are not finite",
            "train the model again, or store it in float32",
            path=path,
        )


def _is_bank_name(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[0] == "bank" and parts[1] in CONTRASTS and parts[2].isdecimal()


def _bank_order(name: str) -> tuple[str, int]:
    stem, _, number = name.rpartition(".")
    return (stem, int(number)) if _is_bank_name(name) else (name, 0)


def _spec_from_json(value: object) -> ModelSpec:
    """Rebuild a specification; every value has to have its type."""
    values = dict(_typed(value, dict))
    _refuse_unknown(values, ModelSpec)
    return ModelSpec(
        name=_typed(values["name"], str),
        method=_typed(values["method"], str),
        backbone=_typed(values["backbone"], str),
        backbone_options={
            key: _typed(option, int, float, str, bool)
            for key, option in _typed(values["backbone_options"], dict).items()
        },
        theta=float(_typed(values["theta"], int, float)),
        spectrum=_typed(values["spectrum"], str),
        fusion_channels=_typed(values["fusion_channels"], int),
        grid_shape=_three(_typed(n, int) for n in _typed(values["grid_shape"], list)),
        grid_spacing=_three(
            float(_typed(size, int, float)) for size in _typed(values["grid_spacing"], list)
        ),
        contrasts=tuple(_typed(name, str) for name in _typed(values["contrasts"], list)),
        intensity={
            key: _typed(scheme, str) for key, scheme in _typed(values["intensity"], dict).items()
        },
        labels=tuple(_label(row) for row in _typed(values["labels"], list)),
        # Older files have no features.
        features={
            key: _typed(option, int)
            for key, option in _typed(values.get("features", {}), dict).items()
        },
        provenance=_typed(values["provenance"], dict),
        # Files from before there were locators have none.
        locator=None if values.get("locator") is None else _spec_from_json(values["locator"]),
        # Files from before there were several regions have none, and neither have locators.
        regions=tuple(
            tuple(_typed(name, str) for name in _typed(region, list))
            for region in _typed(values.get("regions", []), list)
        ),
        # Older files have no calibration, and neither have locators.
        calibration=None
        if values.get("calibration") is None
        else _calibration_from_json(values["calibration"]),
        # Older files do not tell.
        flips=_typed(values.get("flips", False), bool),
    )


def _calibration_from_json(value: object) -> Calibration:
    values = dict(_typed(value, dict))
    _refuse_unknown(values, Calibration)
    return Calibration(
        weights={
            contrast: {
                structure: {
                    name: float(_typed(weight, int, float))
                    for name, weight in _typed(weights, dict).items()
                }
                for structure, weights in _typed(structures, dict).items()
            }
            for contrast, structures in _typed(values["weights"], dict).items()
        },
        threshold=float(_typed(values["threshold"], int, float)),
    )


def _feature_spec_from_json(value: object) -> FeatureSpec:
    values = dict(_typed(value, dict))
    _refuse_unknown(values, FeatureSpec)
    return FeatureSpec(
        name=_typed(values["name"], str),
        **{key: _typed(values[key], int) for key in ("dimensions", "channels", "width", "layers")},
        provenance=_typed(values["provenance"], dict),
    )


def _volume_spec_from_json(value: object) -> VolumeSpec:
    values = dict(_typed(value, dict))
    _refuse_unknown(values, VolumeSpec)
    return VolumeSpec(
        **{key: _typed(values[key], str) for key in ("name", "task", "backbone")},
        backbone_options={
            key: _typed(option, int, float, str, bool)
            for key, option in _typed(values["backbone_options"], dict).items()
        },
        smooth=_typed(values["smooth"], bool),
        patch=_three(_typed(n, int) for n in _typed(values["patch"], list)),
        spacing=_three(float(_typed(n, int, float)) for n in _typed(values["spacing"], list)),
        provenance=_typed(values["provenance"], dict),
    )


def _refuse_unknown(
    values: Mapping[str, Any],
    kind: type[ModelSpec] | type[FeatureSpec] | type[VolumeSpec] | type[Calibration],
) -> None:
    unknown = values.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"unknown setting {min(unknown)!r}")


def _three(values: Iterable[Any]) -> tuple[Any, Any, Any]:
    first, second, third = values
    return first, second, third


def _label(value: object) -> Label:
    row = _typed(value, dict)
    texts = ("name", "abbreviation", "structure", "hemisphere", "color")
    return Label(
        index=_typed(row["index"], int),
        mapping=None if row["mapping"] is None else _typed(row["mapping"], int),
        **{key: _typed(row[key], str) for key in texts},
    )


def _typed(value: object, *kinds: type) -> Any:
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{value!r:.40} is not of type {names}")
    return value
