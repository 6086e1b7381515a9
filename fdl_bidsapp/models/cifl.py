"""Contrast-invariant features: a small network that sees shapes, whatever their contrast.

The network is eight convolutions of width three with leaky ReLUs between them; its receptive field
is 17 pixels. It is trained on random shapes alone (:mod:`fdl_bidsapp.training.cifl`). In training
each channel's whole map is a unit vector over space; what goes into other networks has unit length
over the channels at each pixel.

Source: Chua and Dalca, "Contrast Invariant Feature Representations for Segmentation and
Registration of Medical Images", MIDL 2023 short papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fdl_bidsapp.errors import ModelError

VARIED_SCALE, VARIED_SHIFT = 0.3, 0.6
"""Standard deviation of the log of a channel's random factor, and of its random shift as a share of
the channels' root mean square."""


@dataclass(frozen=True)
class FeatureSpec:
    """Everything but the weights that is needed to compute features.

    Attributes
    ----------
    name
        Name of the network.
    dimensions
        2 for slices, 3 for volumes.
    channels
        Features of each pixel.
    width
        Channels of the layers between.
    layers
        Convolutions.
    provenance
        How the network came to be, JSON values.

    Raises
    ------
    ModelError
        A value is out of its range.
    """

    name: str
    dimensions: int = 3
    channels: int = 16
    width: int = 32
    layers: int = 8
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges = {
            "dimensions": (2, 3),
            "channels": (2, 128),
            "width": (1, 256),
            "layers": (1, 32),
        }
        if not self.name or not self.name.isprintable():
            raise ModelError(f"the network's name is {self.name!r}", "it has to be one line")
        for name, (lowest, highest) in ranges.items():
            value = getattr(self, name)
            if type(value) is not int or not lowest <= value <= highest:
                raise ModelError(
                    f"the feature network's {name} is {value!r}",
                    f"give a whole number from {lowest} to {highest}",
                )

    @property
    def options(self) -> dict[str, int]:
        """What a model with such features in front keeps of them."""
        return {"channels": self.channels, "width": self.width, "layers": self.layers}


class FeatureNetwork(nn.Module):
    """Convolutions and leaky ReLUs, the last layer linear.

    Parameters
    ----------
    spec
        What to build.

    Examples
    --------
    >>> network = FeatureNetwork(FeatureSpec("example", dimensions=2, channels=4, width=6))
    >>> network(torch.rand(1, 1, 12, 10)).shape, len(network.layers)
    (torch.Size([1, 4, 12, 10]), 8)
    """

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.dimensions = spec.dimensions
        self.channels = spec.channels
        self.memory_format = torch.channels_last if spec.dimensions == 2 else torch.channels_last_3d
        convolution = nn.Conv2d if spec.dimensions == 2 else nn.Conv3d
        widths = [1, *[spec.width] * (spec.layers - 1), spec.channels]
        # Beyond the border the image repeats: a frame of zeros would be an edge that is not there.
        layers = [
            convolution(above, here, 3, padding=1, padding_mode="replicate")
            for above, here in pairwise(widths)
        ]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, a=0.1)
            nn.init.zeros_(cast(Tensor, layer.bias))
        self.layers = nn.ModuleList(layers)
        # Its stub knows channels-last for 2-D networks only.
        self.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> Tensor:
        """Compute the channels, not normalised.

        Parameters
        ----------
        image : (B, 1, *shape) tensor
            From 0 to 1.

        Returns
        -------
        (B, channels, *shape) tensor
        """
        x = image.contiguous(memory_format=self.memory_format)
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.1, inplace=True)
        return self.layers[-1](x)


@torch.no_grad()
def standardise(network: FeatureNetwork, images: Tensor) -> None:
    """Give each channel mean 0 and standard deviation 1 over some images, by its last layer.

    The loss leaves scale and (where maps are centred) offset of a channel free. Without this,
    unit vectors over the channels would be those of whichever channels happen to be large.

    Parameters
    ----------
    network
        Changed in place.
    images : (B, 1, *shape) tensor
        Typical of what it was trained on.
    """
    features = network(images).float().transpose(0, 1).flatten(1)
    last = network.layers[-1]
    assert isinstance(last, nn.Conv2d | nn.Conv3d)
    assert last.bias is not None
    deviation = features.std(1).clamp(min=1e-12)
    last.weight /= deviation.reshape(-1, *[1] * (last.weight.ndim - 1))
    last.bias.copy_((last.bias - features.mean(1)) / deviation)


class FrozenFeatures(nn.Module):
    """A trained feature network as the first part of another one; it learns no more.

    While the other one is trained, the channels are varied (:func:`vary_channels`). Features of two
    contrasts are alike, not equal; a network that sees one contrast only would come to rely on the
    small rest that tells it.

    Parameters
    ----------
    features
        The trained network.

    Examples
    --------
    >>> network = FrozenFeatures(FeatureNetwork(FeatureSpec("example", 2, channels=4, width=6)))
    >>> image = torch.rand(1, 1, 9, 8, requires_grad=True)
    >>> network(image).shape, network(image).requires_grad
    (torch.Size([1, 4, 9, 8]), False)
    """

    def __init__(self, features: FeatureNetwork) -> None:
        super().__init__()
        self.network = features.requires_grad_(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Return the features of each pixel, of unit length."""
        features = unit_pixels(self.network(image))
        return unit_pixels(vary_channels(features)) if self.training else features


def vary_channels(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Scale and shift each channel of each image by a random amount of its own.

    Parameters
    ----------
    images : (B, C, *shape) tensor
    generator
        Source of randomness, on the images' device; PyTorch's own by default.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> varied = vary_channels(torch.ones(1, 2, 3, 3), generator)
    >>> varied.flatten(2).std(2).max().item(), bool(varied[0, 0, 0, 0] == varied[0, 1, 0, 0])
    (0.0, False)
    """
    shape = (*images.shape[:2], *[1] * (images.ndim - 2))
    exponent, shift = (
        torch.randn(shape, device=images.device, generator=generator) for _ in range(2)
    )
    size = images.square().flatten(1).mean(1).sqrt().reshape(-1, *[1] * (images.ndim - 1))
    return images * torch.exp(VARIED_SCALE * exponent) + VARIED_SHIFT * size * shift


def unit_maps(features: Tensor, centred: bool = False) -> Tensor:
    """Make each channel's whole map a unit vector over space.

    Parameters
    ----------
    features : (B, C, *shape) tensor
    centred
        Whether to take each map's mean out first.

    Returns
    -------
    (B, C, N) float32 tensor

    Examples
    --------
    >>> maps = unit_maps(torch.tensor([[[[3.0, 4.0]], [[0.0, -2.0]]]]))
    >>> maps.tolist()
    [[[0.6..., 0.8...], [0.0, -1.0]]]
    """
    maps = features.flatten(2).float()
    if centred:
        maps = maps - maps.mean(2, keepdim=True)
    return F.normalize(maps, dim=2)


def unit_pixels(features: Tensor) -> Tensor:
    """Give the features of each pixel unit length over the channels.

    Parameters
    ----------
    features : (B, C, *shape) tensor

    Examples
    --------
    >>> unit_pixels(torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)).flatten().tolist()
    [0.6..., 0.8...]
    """
    return F.normalize(features.float(), dim=1)


def cifl_loss(
    first: Tensor,
    second: Tensor,
    *,
    tau_match: float = 0.1,
    tau_total: float = 0.1,
    tau_channels: float = 1.0,
    centred: bool = False,
) -> Tensor:
    """Return how unlike the channels of two views are, and how alike those of one view.

    With r1 and r2 the unit maps of :func:`unit_maps`, the mean over the batch of

        -log Σ_c exp(r1_c·r2_c / τα)
             / [Σ_c exp(r1_c·r2_c / τβ) + Σ_c Σ_{c'≠c} exp(r1_c·r1_c' / τγ)]

    Parameters
    ----------
    first, second : (B, C, *shape) tensors
        Features of two images of one anatomy.
    tau_match, tau_total, tau_channels
        The temperatures τα, τβ and τγ.
    centred
        Whether each map's mean is taken out before products are formed.

    Examples
    --------
    >>> one_map_each = torch.eye(2).reshape(1, 2, 1, 2)
    >>> loss = cifl_loss(one_map_each, one_map_each, tau_match=1, tau_total=1)
    >>> round(float(loss), 4)  # log((2e + 2) / 2e)
    0.3133
    """
    r1, r2 = unit_maps(first, centred), unit_maps(second, centred)
    match = (r1 * r2).sum(2)
    products = r1 @ r1.transpose(1, 2)
    others = ~torch.eye(r1.shape[1], dtype=torch.bool, device=r1.device)
    unlike = products[:, others] / tau_channels
    # In logarithms throughout: exp(1 / 0.01) is beyond float32.
    total = torch.cat([match / tau_total, unlike], dim=1).logsumexp(1)
    return (total - (match / tau_match).logsumexp(1)).mean()


@torch.inference_mode()
def compute_features(
    network: FeatureNetwork,
    volume: NDArray[np.float32],
    device: torch.device,
    *,
    slab: int = 64,
) -> NDArray[np.float32]:
    """Compute the features of a volume, of unit length at each voxel.

    Parameters
    ----------
    network
        In evaluation mode, on ``device``. One for slices takes the volume slice by slice along its
        last axis.
    volume : (X, Y, Z) float array
        From 0 to 1.
    device
        Where to compute.
    slab
        Slices computed at a time, which bounds the memory and changes nothing else.

    Returns
    -------
    (C, X, Y, Z) float32 array

    Examples
    --------
    >>> network = FeatureNetwork(FeatureSpec("example", channels=4, width=6))
    >>> compute_features(network, np.ones((9, 8, 7), np.float32), torch.device("cpu")).shape
    (4, 9, 8, 7)
    """
    # What a convolution cannot see changes nothing: beyond the receptive field slabs are exact.
    halo = len(network.layers) if network.dimensions == 3 else 0
    depth = volume.shape[2]
    result = np.empty((network.channels, *volume.shape), np.float32)
    for start in range(0, depth, slab):
        stop = min(start + slab, depth)
        first, last = max(start - halo, 0), min(stop + halo, depth)
        part = torch.from_numpy(np.ascontiguousarray(volume[..., first:last], np.float32))
        part = part.to(device)
        if network.dimensions == 2:
            features = network(part.movedim(2, 0)[:, None]).movedim(0, 3)
        else:
            features = network(part[None, None])[0]
        unit = unit_pixels(features[None])[0, ..., start - first : stop - first]
        result[..., start:stop] = unit.cpu().numpy()
    return result
