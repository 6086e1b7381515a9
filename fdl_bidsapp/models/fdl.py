"""Frequency-disentangled networks: no split, early, late and multimodal fusion.

With ``low`` and ``high`` the two parts of the target image and ``place`` from
:mod:`fdl_bidsapp.models.fourier`:

* none: ``head(features(x))``, the baseline;
* early: ``head(features(place(conv_h(high), conv_l(low))))``;
* late: ``u = features(conv_h(high))``, then ``head(concat[place(u, conv_l(low)), u])``;
* multimodal: late fusion with the same ``u`` and ``conv_l`` for the low part of every contrast.

Where a model has contrast-invariant features (:mod:`fdl_bidsapp.models.cifl`), these take the place
of the image in all four.

Sources: arXiv 2302.12980 (early and late) and "Fourier Disentangled Multimodal Prior Knowledge
Fusion for Red Nucleus Segmentation in Brain MRI" (multimodal).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from fdl_bidsapp.errors import ModelError
from fdl_bidsapp.imaging.confidence import Calibration
from fdl_bidsapp.labels import Label, by_abbreviation, may_flip
from fdl_bidsapp.models.backbones import Backbone, make_backbone
from fdl_bidsapp.models.cifl import FeatureNetwork, FeatureSpec, FrozenFeatures
from fdl_bidsapp.models.fourier import SPECTRA, place, split
from fdl_bidsapp.models.layers import Convolution3d, convolution_block

CONTRASTS = ("qsm", "r2star", "imag", "swi")
INTENSITY_SCHEMES = ("minmax", "robust", "rate")
MAX_VOXELS = 2**25
"""Most voxels of a model's grid (320³): larger ones are a damaged file, not a model."""
MAX_FEATURES = 2**29
"""Most values in one full-resolution feature volume (2 GiB in float32), for the same reason."""


@dataclass(frozen=True)
class ModelSpec:
    """Everything but the weights that is needed to run a model.

    Attributes
    ----------
    name
        Name of the model.
    method
        ``none``, ``early``, ``late`` or ``multimodal``.
    backbone
        A name in :data:`fdl_bidsapp.models.backbones.BACKBONES`.
    backbone_options
        Its options, plain values.
    theta
        Fraction of the bandwidth in the low part.
    spectrum
        ``centred`` or ``released``; see :func:`fdl_bidsapp.models.fourier.split`.
    fusion_channels
        Channels into the backbone from the convolution of the high part (and, for early fusion,
        of the low part). Unused without a split.
    grid_shape
        Voxels of the grid the model works on.
    grid_spacing
        Its voxel size in mm.
    contrasts
        Contrasts that may be the target.
    intensity
        For each contrast ``minmax``, ``robust`` or ``rate``; see
        :func:`fdl_bidsapp.imaging.intensity.limits`.
    labels
        Structures in the order of the network's classes 1, 2, …; class 0 is background.
    features
        ``channels``, ``width`` and ``layers`` of the contrast-invariant features that stand before
        the network; empty for the image itself.
    provenance
        How the model came to be, JSON values.
    locator
        Specification of a second, coarse network, which finds where in the field of view the
        model's grid belongs: each of its structures is a ball around some of the nuclei. Without
        it, windows of the grid's shape cover the head.
    regions
        For each of the locator's structures, the abbreviations of the model's structures that are
        looked for around it. Empty: all of them around its only one.
    calibration
        What Dice the model's probabilities lead to expect; without it, results have no confidence.
    flips
        Whether the mean over an image and its mirror image is taken unless told otherwise: of use
        where it was trained on mirrored images too.

    Raises
    ------
    ModelError
        A value is out of its range.
    """

    name: str
    method: str = "late"
    backbone: str = "unet"
    backbone_options: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    theta: float = 0.1
    spectrum: str = "centred"
    fusion_channels: int = 12
    grid_shape: tuple[int, int, int] = (160, 160, 128)
    grid_spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    contrasts: tuple[str, ...] = ("qsm",)
    intensity: Mapping[str, str] = field(
        default_factory=lambda: {
            "qsm": "robust",
            "r2star": "rate",
            "imag": "robust",
            "swi": "robust",
        }
    )
    labels: tuple[Label, ...] = field(
        default_factory=lambda: by_abbreviation(["RNL", "RNR", "DNL", "DNR"])
    )
    features: Mapping[str, int] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)
    locator: ModelSpec | None = None
    regions: tuple[tuple[str, ...], ...] = ()
    calibration: Calibration | None = None
    flips: bool = False

    def __post_init__(self) -> None:
        _require(bool(self.name) and self.name.isprintable(), "name", self.name, "one line of text")
        _require(self.method in METHODS, "method", self.method, f"one of {', '.join(METHODS)}")
        _require(0 < self.theta < 1, "theta", self.theta, "a number between 0 and 1")
        _require(
            self.spectrum in SPECTRA, "spectrum", self.spectrum, f"one of {', '.join(SPECTRA)}"
        )
        _require(
            1 <= self.fusion_channels <= 256,
            "fusion_channels",
            self.fusion_channels,
            "a whole number from 1 to 256",
        )
        _require(
            len(self.grid_shape) == 3
            and all(3 <= n <= 1024 for n in self.grid_shape)
            and math.prod(self.grid_shape) <= MAX_VOXELS,
            "grid_shape",
            self.grid_shape,
            f"three axes of 3 to 1024 voxels, together at most {MAX_VOXELS}",
        )
        _require(
            len(self.grid_spacing) == 3 and all(0.05 <= s <= 20 for s in self.grid_spacing),
            "grid_spacing",
            self.grid_spacing,
            "three voxel sizes from 0.05 to 20 mm",
        )
        _require(
            bool(self.contrasts) and set(self.contrasts) <= set(CONTRASTS),
            "contrasts",
            self.contrasts,
            f"one or more of {', '.join(CONTRASTS)}",
        )
        _require(
            set(self.contrasts) <= set(self.intensity) <= set(CONTRASTS)
            and set(self.intensity.values()) <= set(INTENSITY_SCHEMES),
            "intensity",
            dict(self.intensity),
            f"one of {', '.join(INTENSITY_SCHEMES)} for each contrast",
        )
        abbreviations = [label.abbreviation for label in self.labels]
        _require(
            1 <= len(self.labels) <= 64
            and len(set(abbreviations)) == len(abbreviations)
            # They become part of file names.
            and all(text.isascii() and text.isalnum() for text in abbreviations),
            "label abbreviations",
            abbreviations,
            "1 to 64 different ones of letters and digits",
        )
        indices = [label.index for label in self.labels]
        _require(
            len(set(indices)) == len(indices) and all(1 <= index <= 255 for index in indices),
            "label indices",
            indices,
            "different whole numbers from 1 to 255",
        )
        _require(
            set(self.features) in (set(), {"channels", "width", "layers"}),
            "features",
            dict(self.features),
            "empty, or channels, width and layers",
        )
        # Refuses what is out of its range.
        self.feature_spec  # noqa: B018
        if self.locator is not None:
            # One channel without a split takes any field of view, whatever its shape.
            _require(self.locator.method == "none", "locator's method", self.locator.method, "none")
            _require(
                len(self.locator.labels) == len(self.regions or [()])
                and self.locator.locator is None,
                "locator",
                self.locator.name,
                "a network of one structure a region, without a locator of its own",
            )
            _require(
                set(self.contrasts) <= set(self.locator.contrasts),
                "locator's contrasts",
                self.locator.contrasts,
                "all that the model segments",
            )
        _require(
            not self.regions
            or (
                self.locator is not None
                and sorted(name for region in self.regions for name in region)
                == sorted(abbreviations)
            ),
            "regions",
            self.regions,
            "empty, or a division of the structures among those of its locator",
        )
        _require(
            not self.flips or may_flip(self.labels),
            "flips",
            self.flips,
            "false where a structure of one side lacks that of the other",
        )
        if self.calibration is not None:
            known = {label.structure for label in self.labels}
            calibrated = self.calibration.weights
            _require(
                set(calibrated) <= set(self.contrasts)
                and all(set(structures) <= known for structures in calibrated.values()),
                "calibration",
                {contrast: list(structures) for contrast, structures in calibrated.items()},
                "of contrasts and structures that the model segments",
            )

    @property
    def feature_spec(self) -> FeatureSpec | None:
        """What the features before the network are, if there are any."""
        if not self.features:
            return None
        channels, width, layers = (self.features[key] for key in ("channels", "width", "layers"))
        return FeatureSpec("features", channels=channels, width=width, layers=layers)

    @property
    def windows(self) -> tuple[tuple[int, ...], ...]:
        """For each of the locator's structures, the positions in ``labels`` of what is around it.

        Examples
        --------
        >>> ModelSpec("example", labels=by_abbreviation(["RNL", "DNL"])).windows
        ((0, 1),)
        """
        names = [label.abbreviation for label in self.labels]
        regions = self.regions or (tuple(names),)
        return tuple(tuple(names.index(name) for name in region) for region in regions)

    def averages_flips(self, choice: str = "auto") -> bool:
        """Tell whether to average over flips: ``yes``, ``no``, or ``auto`` for the model's own way.

        Raises
        ------
        ModelError
            ``yes``, and a structure of one side lacks that of the other.

        Examples
        --------
        >>> ModelSpec("example", flips=True).averages_flips()
        True
        """
        if choice == "yes" and not may_flip(self.labels):
            raise ModelError(
                f"the model {self.name!r} has structures of one side only, and no mirrored image",
                "leave out --flips yes",
            )
        return self.flips if choice == "auto" else choice == "yes"

    @property
    def image_channels(self) -> int:
        """Channels of what takes the place of the image: 1 without features."""
        return self.features.get("channels", 1)


def _require(valid: bool, setting: str, value: object, wanted: str) -> None:
    if not valid:
        raise ModelError(f"the model's {setting} is {value!r}", f"it has to be {wanted}")


class FusionNetwork(nn.Module):
    """What the four methods share: a backbone, a head, one signature.

    Parameters
    ----------
    spec
        What to build.
    backbone_channels
        Channels that the backbone takes.

    Attributes
    ----------
    locator
        The network of ``spec.locator``; no part of :meth:`forward`.
    """

    def __init__(self, spec: ModelSpec, backbone_channels: int) -> None:
        super().__init__()
        self.theta = spec.theta
        self.spectrum = spec.spectrum
        self.classes = len(spec.labels) + 1
        self.front: nn.Module = nn.Identity()
        if spec.feature_spec is not None:
            self.front = FrozenFeatures(FeatureNetwork(spec.feature_spec))
        network = make_backbone(spec.backbone, backbone_channels, **dict(spec.backbone_options))
        self.backbone = cast(nn.Module, network)
        self.feature_channels = network.feature_channels
        self.locator = build_network(spec.locator) if spec.locator is not None else None

    def features(self, x: Tensor) -> Tensor:
        """Give the backbone's features of ``x``, with its channels innermost in memory."""
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return cast(Backbone, self.backbone).features(x)

    def forward(self, target: Tensor, others: Sequence[Tensor] = ()) -> list[Tensor]:
        """Segment the target.

        Parameters
        ----------
        target : (B, 1, X, Y, Z) tensor
            The image to segment, normalised.
        others : sequence of (B, C, n1, n2, n3) tensors
            Low parts of the other contrasts (of their features where the model has some); used by
            multimodal fusion only.

        Returns
        -------
        list of (B, K + 1, X, Y, Z) tensors
            Logits, background first; the target's own first, then one for each of ``others``.
        """
        raise NotImplementedError


class Unsplit(FusionNetwork):
    """The backbone alone, on the whole image."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, spec.image_channels)
        self.head = Convolution3d(self.feature_channels, self.classes, 1)

    def forward(self, target: Tensor, others: Sequence[Tensor] = ()) -> list[Tensor]:
        """See :meth:`FusionNetwork.forward`."""
        return [self.head(self.features(self.front(target)))]


class EarlyFusion(FusionNetwork):
    """The parts are convolved apart and joined before the backbone."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, spec.fusion_channels)
        self.conv_h = convolution_block(spec.image_channels, spec.fusion_channels)
        self.conv_l = convolution_block(spec.image_channels, spec.fusion_channels)
        self.head = Convolution3d(self.feature_channels, self.classes, 1)

    def forward(self, target: Tensor, others: Sequence[Tensor] = ()) -> list[Tensor]:
        """See :meth:`FusionNetwork.forward`."""
        low, high = split(self.front(target), self.theta, self.spectrum)
        fused = place(self.conv_h(high), self.conv_l(low), self.spectrum)
        return [self.head(self.features(fused))]


class LateFusion(FusionNetwork):
    """The backbone sees the high part only; the low part joins its last features."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, spec.fusion_channels)
        self.conv_h = convolution_block(spec.image_channels, spec.fusion_channels)
        self.conv_l = convolution_block(spec.image_channels, self.feature_channels)
        # The backbone has seen each voxel's surroundings: what is joined is weighed voxel by voxel.
        self.head = nn.Sequential(
            convolution_block(2 * self.feature_channels, self.feature_channels, width=1),
            Convolution3d(self.feature_channels, self.classes, 1),
        )

    def forward(self, target: Tensor, others: Sequence[Tensor] = ()) -> list[Tensor]:
        """See :meth:`FusionNetwork.forward`."""
        low, high = split(self.front(target), self.theta, self.spectrum)
        return [self.fuse(self.features(self.conv_h(high)), low)]

    def fuse(self, u: Tensor, low: Tensor) -> Tensor:
        """Join the high part's features with one low part to logits."""
        placed = place(u, self.conv_l(low), self.spectrum).to(u.dtype)
        joined = torch.cat([placed, u], dim=1)
        return self.head(joined.contiguous(memory_format=torch.channels_last_3d))


class MultimodalFusion(LateFusion):
    """Late fusion of the target's high part with the low part of every contrast in turn."""

    def forward(self, target: Tensor, others: Sequence[Tensor] = ()) -> list[Tensor]:
        """See :meth:`FusionNetwork.forward`."""
        low, high = split(self.front(target), self.theta, self.spectrum)
        u = self.features(self.conv_h(high))
        return [self.fuse(u, low) for low in (low, *others)]


METHODS: dict[str, Callable[[ModelSpec], FusionNetwork]] = {
    "none": Unsplit,
    "early": EarlyFusion,
    "late": LateFusion,
    "multimodal": MultimodalFusion,
}
"""The fusion methods by name."""


def build_network(spec: ModelSpec) -> FusionNetwork:
    """Build the network that a specification describes, with fresh weights.

    The weights lie channels-last in memory, which is the fastest on processors and GPUs alike.

    Raises
    ------
    ModelError
        The backbone does not exist or refuses its options, or is too wide for the grid.

    Examples
    --------
    >>> spec = ModelSpec("example", backbone_options={"width": 4, "levels": 2})
    >>> (logits,) = build_network(spec)(torch.rand(1, 1, 12, 12, 10))
    >>> logits.shape
    torch.Size([1, 5, 12, 12, 10])
    """
    network = METHODS[spec.method](spec)
    widest = max(network.feature_channels, *spec.features.values(), 1)
    if widest * math.prod(spec.grid_shape) > MAX_FEATURES:
        raise ModelError(
            f"{widest} channels on a {spec.grid_shape} grid need too much memory",
            "choose a narrower backbone or a smaller grid",
        )
    # Its stub knows channels-last for 2-D networks only.
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
