"""Running a network on arrays: the device, its precision, and one scan's probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from fdl_bidsapp.errors import ModelError, TemporaryError, UsageError
from fdl_bidsapp.labels import mirrored
from fdl_bidsapp.models.fdl import FusionNetwork, ModelSpec
from fdl_bidsapp.models.fourier import low_part

Place = tuple[float, float, float]

DEVICES = ("auto", "cpu", "cuda")
LOCATED = 0.3
"""Least probability of a region of nuclei; a doubtful place is better tried than left."""

SPREAD_MM = 8.0
"""Standard deviation to which a region's probabilities are smoothed, half the radius of the balls
that locators learn: whatever else is joined to such a ball does not move its peak far."""

APART_MM = 24.0
"""Distance from which two peaks are two places."""

DOUBTFUL = 0.7
"""How high another peak is at least, beside the highest, to be a place as well."""


def resolve_device(name: str = "auto") -> torch.device:
    """Choose where to compute: ``auto`` takes the GPU where there is one.

    Raises
    ------
    UsageError
        ``cuda`` was asked for where PyTorch finds none, or the name is unknown.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if name not in DEVICES:
        raise UsageError(f"there is no device {name!r}", f"choose one of: {', '.join(DEVICES)}")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise UsageError(
            "the device cuda was asked for, but PyTorch finds no CUDA GPU here",
            "use --device cpu or auto, or install a CUDA build of PyTorch and its driver",
        )
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def device_name(device: torch.device) -> str:
    """Name a device for a record: the GPU's own name, or ``cpu``.

    Examples
    --------
    >>> device_name(torch.device("cpu"))
    'cpu'
    """
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return ``torch.bfloat16`` where the device is the faster for it, else ``None``.

    On a processor that is one with AMX or with AVX512-BF16; but where the latter comes with
    AVX512-FP16 and without AMX, as where a virtual machine hides AMX, float32 is faster
    (``benchmarks/step_time.py`` measures both). On a PyTorch that cannot name the processor's
    capabilities the answer is ``None``.

    Examples
    --------
    >>> autocast_dtype(torch.device("cpu")) in (None, torch.bfloat16)
    True
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else None
    has: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = has.get("amx_bf16") or (has.get("avx512_bf16") and not has.get("avx512_fp16"))
    return torch.bfloat16 if fast else None


@torch.inference_mode()
def predict(
    network: FusionNetwork,
    spec: ModelSpec,
    images: Mapping[str, NDArray[np.float32]],
    target: str,
    device: torch.device,
    *,
    flips: bool = False,
    average: bool = False,
    bank: Mapping[str, Sequence[Tensor]] | None = None,
) -> NDArray[np.float32]:
    """Give the probability of each structure in one scan.

    Parameters
    ----------
    network
        Network in evaluation mode, on ``device``.
    spec
        What it was built from.
    images : contrast → (X, Y, Z) float array
        The scan's normalised images on the model's grid, first axis from left to right.
    target
        The contrast to segment, one of ``spec.contrasts``.
    device
        Where to compute; bfloat16 autocast where :func:`autocast_dtype` says so.
    flips
        Average with the prediction for the left-right mirrored scan.
    average
        Multimodal models: average the predictions from the low part of each contrast, not only the
        target's own. A contrast the scan lacks takes its low part from the bank (its first image),
        and is dropped where the bank lacks it too.
    bank : contrast → low parts (n1, n2, n3)
        The model's low-frequency bank.

    Returns
    -------
    (K, X, Y, Z) float32 array
        Probabilities in the order of ``spec.labels``; background is one minus their sum.

    Raises
    ------
    ModelError
        The model does not segment that contrast.
    KeyError
        ``images`` lacks the target.
    ValueError
        An image is not on the model's grid.
    TemporaryError
        The GPU's memory is full.
    """
    if target not in spec.contrasts:
        raise ModelError(
            f"the model {spec.name!r} does not segment {target}",
            f"it takes {', '.join(spec.contrasts)}; choose another target or model",
        )
    volumes = {contrast: _volume(image, spec, device) for contrast, image in images.items()}
    try:
        total = _probabilities(network, spec, volumes, target, average, bank or {})
        if flips:
            volumes = {contrast: volume.flip(2) for contrast, volume in volumes.items()}
            swapped = _probabilities(network, spec, volumes, target, average, bank or {})
            total = (total + swapped[list(mirrored(spec.labels))].flip(1)) / 2
        return total.cpu().numpy()
    except torch.cuda.OutOfMemoryError as error:
        raise TemporaryError(
            "the GPU has too little free memory for this model",
            "wait until it is free, or use --device cpu",
        ) from error


@torch.inference_mode()
def locate(
    network: FusionNetwork,
    images: Sequence[NDArray[np.float32]],
    spacing: Sequence[float],
    device: torch.device,
) -> list[list[Place]]:
    """Find the regions of the nuclei in a whole field of view.

    Contrasts of one scan see the same head: the probabilities that each gives are averaged.

    Parameters
    ----------
    network
        A locator in evaluation mode, on ``device``.
    images : sequence of (X, Y, Z) float arrays
        One for each contrast, normalised, at the locator's spacing, of any shape.
    spacing
        Voxel size in mm.
    device
        Where to compute.

    Returns
    -------
    list of lists of (x, y, z)
        For each region its centre in voxels, the likeliest first; empty where there is none.
    """
    volumes = torch.from_numpy(np.stack(images).astype(np.float32)).to(device)
    dtype = autocast_dtype(device)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        (logits,) = network(volumes[:, None])
    probabilities = logits.float().softmax(1).mean(0)[1:].cpu().numpy()
    sizes = np.asarray(spacing, float)
    return [_places(inside, sizes) for inside in probabilities]


def _places(inside: NDArray[np.float32], spacing: NDArray[np.float64]) -> list[Place]:
    """Return the middles of the probabilities around their peaks, the highest peak first."""
    likely = np.where(inside > LOCATED, inside, 0)
    if not likely.any():
        return []
    smooth = ndimage.gaussian_filter(likely, SPREAD_MM / spacing, mode="constant")
    reach = 2 * np.ceil(APART_MM / spacing).astype(int) - 1
    peaks = (smooth == ndimage.maximum_filter(smooth, reach)) & (smooth > DOUBTFUL * smooth.max())
    grid = np.indices(inside.shape)
    places = []
    for peak in sorted(np.argwhere(peaks), key=lambda at: -smooth[tuple(at)]):
        distance = np.linalg.norm((grid - peak[:, None, None, None]).T * spacing, axis=-1).T
        around = np.where(distance < APART_MM, likely, 0)
        if around.any():
            x, y, z = ndimage.center_of_mass(around)
            places.append((float(x), float(y), float(z)))
    return places


def _volume(image: NDArray[np.float32], spec: ModelSpec, device: torch.device) -> Tensor:
    if image.shape != tuple(spec.grid_shape):
        raise ValueError(f"the image is {image.shape}, the model's grid {spec.grid_shape}")
    volume = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
    return volume.to(device)[None, None]


def _probabilities(
    network: FusionNetwork,
    spec: ModelSpec,
    volumes: Mapping[str, Tensor],
    target: str,
    average: bool,
    bank: Mapping[str, Sequence[Tensor]],
) -> Tensor:
    volume = volumes[target]
    others: list[Tensor] = []
    if average and spec.method == "multimodal":
        others = other_low_parts(spec, volumes, target, bank, network.front)
    dtype = autocast_dtype(volume.device)
    with torch.autocast(volume.device.type, dtype, enabled=dtype is not None):
        logits = network(volume, others)
    return torch.stack([each[0].float().softmax(0)[1:] for each in logits]).mean(0)


def other_low_parts(
    spec: ModelSpec,
    volumes: Mapping[str, Tensor],
    target: str,
    bank: Mapping[str, Sequence[Tensor]],
    front: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Collect the low parts of the contrasts beside the target.

    Each comes from the subject where it has the contrast, else from the bank's first image, else
    it is left out.

    Parameters
    ----------
    volumes : contrast → (1, 1, X, Y, Z) tensor
        The subject's images, the target among them.
    front
        The model's features of an image; the identity where it has none.

    Returns
    -------
    list of (1, C, n1, n2, n3) tensors

    Examples
    --------
    >>> spec = ModelSpec("example", contrasts=("qsm", "imag"), grid_shape=(20, 20, 20))
    >>> volumes = {"qsm": torch.rand(1, 1, 20, 20, 20)}
    >>> bank = {"imag": [torch.rand(3, 3, 3)]}
    >>> (low,) = other_low_parts(spec, volumes, "qsm", bank, torch.nn.Identity())
    >>> low.shape
    torch.Size([1, 1, 3, 3, 3])
    """
    device = volumes[target].device
    parts = []
    for contrast in dict.fromkeys([*spec.contrasts, *bank]):
        if contrast == target:
            continue
        if contrast in volumes:
            parts.append(low_part(front(volumes[contrast]), spec.theta, spec.spectrum))
        elif bank.get(contrast):
            low = bank[contrast][0].to(device)
            parts.append(low.reshape(1, spec.image_channels, *low.shape[-3:]))
    return parts
