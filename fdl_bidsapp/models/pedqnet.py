"""PedQ-NET: networks that turn a local field into susceptibility, or a magnitude into a mask.

The reconstruction is trained without susceptibility labels: what it gives is convolved with the
dipole and compared with the measured field (:func:`model_loss`). Its convolutions are nnU-Net's
plain ones: two of width three a level, instance normalisation, leaky ReLU, strided ones down and
transposed ones up, and one linear channel at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import cast

import numpy as np
import scipy.ndimage as ndi
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdl_bidsapp.errors import ModelError
from fdl_bidsapp.models.backbones import BACKBONES, Backbone
from fdl_bidsapp.models.layers import Convolution3d
from fdl_bidsapp.physics.dipole import dipole_kernel
from fdl_bidsapp.physics.iterative import smooth_inversion
from fdl_bidsapp.physics.upright import UprightGrid

Array = np.ndarray

CUBIC = 3
"""Order of the splines that sample fields and susceptibility: linear ones blur."""

TASKS = ("susceptibility", "brain")

UNIT = 5.0
"""Susceptibility in terms of its field's root mean square, of which it has some three times as
much: in a unit of its own size the last layer need not grow first."""


@dataclass(frozen=True)
class VolumeSpec:
    """Everything but the weights that is needed to run a network from volume to volume.

    Attributes
    ----------
    name
        Name of the network.
    task
        ``susceptibility``: local field in, susceptibility out, both in ppm. ``brain``: mean
        magnitude in, probability of the brain out.
    backbone, backbone_options
        A name in :data:`fdl_bidsapp.models.backbones.BACKBONES`, and its options.
    smooth
        Whether a network for susceptibility reads the smooth inversion of the whole field
        (:func:`fdl_bidsapp.physics.iterative.smooth_inversion`) as a second channel, to which what
        it gives is added. It is the field under a linear filter, and brings to a patch what a patch
        of the field alone cannot tell.
    patch
        Voxels along each axis that the network sees at once.
    spacing
        Their size in mm. What the network reads is brought to this size, and upright in the
        magnet: see :class:`fdl_bidsapp.physics.upright.UprightGrid`.
    provenance
        How the network came to be, JSON values.

    Raises
    ------
    ModelError
        A value is out of its range.
    """

    name: str
    task: str = "susceptibility"
    backbone: str = "unet"
    backbone_options: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    smooth: bool = False
    patch: tuple[int, int, int] = (96, 96, 96)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():
            raise ModelError(f"the network's name is {self.name!r}", "it has to be one line")
        for what, value, known in (
            ("task", self.task, TASKS),
            ("backbone", self.backbone, tuple(BACKBONES)),
        ):
            if value not in known:
                raise ModelError(
                    f"the network's {what} is {value!r}", f"choose one of {', '.join(known)}"
                )
        if self.smooth and self.task != "susceptibility":
            raise ModelError(
                f"the network's task is {self.task} and it is to read a smooth inversion",
                "leave the inversion to networks for susceptibility",
            )
        if len(self.patch) != 3 or not all(type(n) is int and 16 <= n <= 512 for n in self.patch):
            raise ModelError(
                f"the network's patch is {self.patch!r}", "give three lengths from 16 to 512"
            )
        if len(self.spacing) != 3 or not all(0.1 <= size <= 10 for size in self.spacing):
            raise ModelError(
                f"the network's voxel size is {self.spacing!r}",
                "give three lengths of 0.1 to 10 mm",
            )


class VolumeNetwork(nn.Module):
    """A backbone and one linear channel.

    A backbone normalises its channels, so it cannot know how large its input was. Susceptibility
    grows with the field: that network divides its input by the root mean square of each field, and
    multiplies what it gives by it. A smooth inversion that it reads it corrects.

    Parameters
    ----------
    spec
        What to build.

    Examples
    --------
    >>> spec = VolumeSpec("example", backbone_options={"width": 4, "levels": 2})
    >>> VolumeNetwork(spec)(torch.rand(1, 1, 16, 12, 10)).shape
    torch.Size([1, 1, 16, 12, 10])
    """

    def __init__(self, spec: VolumeSpec) -> None:
        super().__init__()
        self.proportional = spec.task == "susceptibility"
        try:
            self.backbone = BACKBONES[spec.backbone](1 + spec.smooth, **spec.backbone_options)
            channels = cast(Backbone, self.backbone).feature_channels
        except TypeError as error:
            raise ModelError(
                f"the backbone {spec.backbone} does not take its options ({error})",
                "use the options of this backbone",
            ) from error
        self.last = Convolution3d(channels, 1, 1)
        # Nothing known is no susceptibility.
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Take ``(B, C, X, Y, Z)`` to ``(B, 1, X, Y, Z)``.

        Parameters
        ----------
        image
            The field, and its inversion where the network reads it, 0 where they are not known; or
            a magnitude.
        """
        if not self.proportional:
            brain: Tensor = self.last(cast(Backbone, self.backbone).features(image))
            return brain
        local, axes = image[:, :1], (1, 2, 3, 4)
        known = (local != 0).sum(axes, keepdim=True).clamp(min=1)
        scale = (local.square().sum(axes, keepdim=True) / known).sqrt().clamp(min=1e-6)
        chi: Tensor = self.last(cast(Backbone, self.backbone).features(image / scale))
        return UNIT * scale * chi + image[:, 1:].sum(1, keepdim=True)


def convolve_dipole(
    susceptibility: Tensor,
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
) -> Tensor:
    """Convolve the maps of a batch with the dipole.

    Parameters
    ----------
    susceptibility : (B, 1, X, Y, Z) tensor
        ppm.
    spacing
        Voxel size in mm.
    direction
        Unit vector of B0 in voxel axes.

    Returns
    -------
    (B, 1, X, Y, Z) float32 tensor
        Field in ppm. The grid is padded to twice its size, so that the dipole does not wrap.
    """
    x, y, z = susceptibility.shape[-3:]
    padded, axes = (2 * x, 2 * y, 2 * z), (-3, -2, -1)
    dipole = dipole_kernel(padded, spacing, direction, susceptibility.device)
    spectrum = torch.fft.rfftn(susceptibility.float(), s=padded, dim=axes) * dipole
    return torch.fft.irfftn(spectrum, s=padded, dim=axes)[..., :x, :y, :z]


def model_loss(modelled: Tensor, measured: Tensor, weight: Tensor) -> Tensor:
    """Compare two phases on the circle: mean of W |exp(iφ) - exp(iφ')|.

    Parameters
    ----------
    modelled, measured : (B, 1, X, Y, Z) tensors
        Phase in radians: 2π γ̄ B0 TE times the field.
    weight : (B, 1, X, Y, Z) tensor
        Trust in each voxel, zero outside the mask; the mean is over the voxels above zero.

    Examples
    --------
    >>> one = torch.ones(1, 1, 2, 2, 2)
    >>> round(float(model_loss(0 * one, torch.pi * one, one)), 4)
    2.0
    """
    # A chord, whose length needs no complex numbers.
    chord = 2 * torch.sin((modelled - measured) / 2).abs()
    return (weight * chord).sum() / (weight > 0).sum().clamp(min=1)


@torch.inference_mode()
def predict_volume(
    network: nn.Module,
    volume: Array,
    patch: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    overlap: float = 0.5,
    surround: bool = True,
) -> Array:
    """Run a network over a volume in overlapping windows, and blend them.

    Parameters
    ----------
    network
        In evaluation mode, on ``device``.
    volume : (C, X, Y, Z) float array
        The channels that the network reads.
    patch
        Size of the windows.
    device
        Where to compute.
    overlap
        Share of a window that the next one covers as well.
    surround
        Whether half a window of zeros is put around the volume: its border is then seen from the
        middle of a window, and sources near it are not taken for their periodic copies.

    Returns
    -------
    (X, Y, Z) float32 array
    """
    half = [n // 2 if surround else 0 for n in patch]
    shape = volume.shape[1:]
    sizes = [max(s + 2 * h, n) for s, h, n in zip(shape, half, patch, strict=True)]
    data = torch.zeros((len(volume), *sizes))
    inner = tuple(slice(h, h + s) for h, s in zip(half, shape, strict=True))
    data[(slice(None), *inner)] = torch.from_numpy(np.ascontiguousarray(volume, np.float32))
    total, weights = torch.zeros(tuple(sizes)), torch.zeros(tuple(sizes))
    window = _window(patch)
    starts = [
        _starts(size, n, max(1, round(n * (1 - overlap))))
        for size, n in zip(sizes, patch, strict=True)
    ]
    for corner in product(*starts):
        place = tuple(slice(s, s + n) for s, n in zip(corner, patch, strict=True))
        seen = data[(slice(None), *place)]
        if not seen.any():
            weights[place] += window
            continue
        output = network(seen[None].to(device))[0, 0].float().cpu()
        total[place] += window * output
        weights[place] += window
    return (total / weights)[inner].numpy()


def _starts(size: int, window: int, step: int) -> list[int]:
    last = size - window
    return sorted({*range(0, last, step), last})


def _window(patch: Sequence[int]) -> Tensor:
    """Weights that fall from the middle of a window to its border."""
    result = torch.ones(())
    for axis, n in enumerate(patch):
        ramp = torch.sin((torch.arange(n) + 0.5) * torch.pi / n) ** 2 + 1e-3
        result = result * ramp.reshape([-1 if a == axis else 1 for a in range(3)])
    return result


def predict_susceptibility(
    network: nn.Module,
    spec: VolumeSpec,
    local_field: Array,
    mask: Array,
    spacing: Sequence[float],
    direction: Sequence[float] | Array,
    device: torch.device | str = "cpu",
) -> Array:
    """Reconstruct susceptibility from a local field.

    Parameters
    ----------
    network
        Trained by ``fdl train --recipe pedqnet``.
    spec
        Its specification.
    local_field : (X, Y, Z) array
        ppm.
    mask : (X, Y, Z) bool array
        Where the field is known.
    spacing
        Voxel size in mm.
    direction
        Unit vector of B0 in voxel axes.
    device
        Where to compute.

    Returns
    -------
    (X, Y, Z) float32 array
        ppm, zero outside the mask.
    """
    grid = UprightGrid(mask.shape, spacing, direction, spec.spacing)
    field, inside = upright_field(grid, local_field, mask)
    channels = field_channels(field, inside, spec, device)
    chi = predict_volume(network, channels, spec.patch, device)
    chi = grid.put_back(_continued(chi, inside), CUBIC)
    return np.where(mask, chi, 0).astype(np.float32)


def field_channels(
    local_field: Array, mask: Array, spec: VolumeSpec, device: torch.device | str
) -> Array:
    """Return what a network for susceptibility reads of an upright field, (C, X, Y, Z) float32."""
    if not spec.smooth:
        return np.asarray(local_field, np.float32)[None]
    inverted = smooth_inversion(local_field, mask, spec.spacing, device=str(device))
    return np.stack([local_field, inverted]).astype(np.float32)


def upright_field(grid: UprightGrid, local_field: Array, mask: Array) -> tuple[Array, Array]:
    """Return a local field on an upright grid, 0 outside the mask, and the mask there."""
    inside = grid.take(mask.astype(np.float32)) > 0.5
    field = grid.take(_continued(local_field, mask), CUBIC)
    return np.where(inside, field, 0).astype(np.float32), inside


def _continued(volume: Array, mask: Array) -> Array:
    """Let a volume go on beyond a mask as it ends at the rim, where splines would ring."""
    if mask.any():
        nearest = ndi.distance_transform_edt(~mask, return_distances=False, return_indices=True)
        volume = volume[tuple(nearest)]
    return np.asarray(volume, np.float32)


def predict_brain(
    network: nn.Module,
    spec: VolumeSpec,
    magnitude: Array,
    spacing: Sequence[float],
    direction: Sequence[float] | Array = (0.0, 0.0, 1.0),
    device: torch.device | str = "cpu",
) -> Array:
    """Find the brain in a magnitude image, (X, Y, Z), as a bool array of the same grid.

    The parameters are those of :func:`predict_susceptibility`.
    """
    grid = UprightGrid(magnitude.shape, spacing, direction, spec.spacing)
    image = grid.take(scaled_magnitude(magnitude))
    logits = predict_volume(network, image[None], spec.patch, device, surround=False)
    return grid.put_back((logits > 0).astype(np.float32)) > 0.5


def scaled_magnitude(magnitude: Array) -> Array:
    """Bring a magnitude image to about 0 to 1, whatever its unit."""
    high = float(np.percentile(magnitude, 99))
    return np.clip(magnitude / (high or 1.0), 0, 2).astype(np.float32)


def segmentation_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Soft Dice plus cross-entropy; classes below 0 are not known and do not count.

    Parameters
    ----------
    logits : (B, C, X, Y, Z) tensor
        The background first.
    classes : (B, X, Y, Z) integer tensor
    """
    known = classes >= 0
    if not known.any():
        return logits.sum() * 0
    target = F.one_hot(classes.clamp(min=0).long(), logits.shape[1]).movedim(-1, 1).float()
    counted = known[:, None].float()
    probabilities = logits.float().softmax(1) * counted
    target = target * counted
    axes = (0, 2, 3, 4)
    both = 2 * (probabilities * target).sum(axes)
    dice = (both + 1) / (probabilities.sum(axes) + target.sum(axes) + 1)
    entropy = F.cross_entropy(logits.float(), classes.long().clamp(min=-1), ignore_index=-1)
    return 1 - dice[1:].mean() + entropy
