"""How far a segmentation is to be trusted: the Dice that its probabilities lead to expect.

A network's probabilities are seldom true to their word, and a voxel's says little of the structure.
So each structure is described by a few numbers, and a logistic curve through them, fitted to scans
of known truth, gives the Dice to be expected. Every weight but that of the volume has a sign that
is fixed beforehand: a softer, more scattered or more lopsided structure never gains confidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from fdl_bidsapp.errors import ModelError
from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.labels import Label, mirrored
from fdl_bidsapp.settings import CONTRASTS

Features = dict[str, float]
Weights = Mapping[str, float]

BAD_DICE = 0.7
"""Below it a segmentation is not to be used unseen; the flag is to catch these."""

TAIL = 0.1
"""Probabilities below it do not count as part of a structure: over a whole window they add up."""

INTERCEPT = "intercept"
SIGNS = {
    "soft_dice": 1,
    "mean_probability": 1,
    "lost": -1,
    "log_volume": 0,
    "log_volume_squared": -1,
    "asymmetry": -1,
    "others": 1,
    "log_contrast": 1,
    "log_voxel": -1,
}
"""The features, and the sign of the weight of each; 0 for any.

``soft_dice``
    Logit of 2 Σ_mask p / (voxels of the mask + Σ p): the Dice if the probabilities were true.
``mean_probability``
    Logit of the mean probability over the mask.
``lost``
    Share of the structure's voxels that lay apart from the mask and were dropped.
``log_volume``, ``log_volume_squared``
    Natural logarithm of the volume over 1 mm³, and its square.
``asymmetry``
    Absolute difference from the ``log_volume`` of the other side, where there is another side.
``others``
    Median ``soft_dice`` of the other structures of the scan.
``log_contrast``
    Natural logarithm of what :func:`~fdl_bidsapp.imaging.measure.contrasts` tells: by how many
    standard deviations of its surround the structure differs from it. A network may be sure of
    where a nucleus has to be though nothing is to be seen there.
``log_voxel``
    Natural logarithm of the longest side of a voxel over 1 mm.
"""

LARGEST_WEIGHT = 1e4
_SURE, _LOPSIDED = 0.995, 2.0
_FAINT, _PLAIN = 0.05, 20.0
"""Ends of what is told apart: shares above, and log ratios of volumes above, count as these; so do
contrasts below and above."""

RIDGE = 0.05
"""Penalty on squared weights of standardised features, beside the deviance summed over cases."""


@dataclass(frozen=True)
class Calibration:
    """From the description of a structure to its expected Dice.

    Attributes
    ----------
    weights
        For each contrast and each structure (left and right alike), the weights of
        :data:`SIGNS` and an ``intercept``.
    threshold
        Expected Dice below which a structure is flagged.

    Raises
    ------
    ModelError
        A value is missing, unknown or out of its range.

    Examples
    --------
    >>> weights = {"intercept": 0.5, **dict.fromkeys(SIGNS, 0.0), "soft_dice": 1.0}
    >>> calibration = Calibration({"qsm": {"red_nucleus": weights}}, threshold=0.75)
    >>> features = {**dict.fromkeys(SIGNS, 0.0), "soft_dice": 1.5}
    >>> round(calibration.expected_dice("qsm", "red_nucleus", features), 3)
    0.881
    """

    weights: Mapping[str, Mapping[str, Weights]]
    threshold: float

    def __post_init__(self) -> None:
        _require(0 < self.threshold < 1, "threshold", self.threshold, "a number between 0 and 1")
        _require(
            bool(self.weights) and set(self.weights) <= set(CONTRASTS),
            "contrasts",
            list(self.weights),
            f"one or more of {', '.join(CONTRASTS)}",
        )
        for structures in self.weights.values():
            _require(bool(structures), "structures", list(structures), "one or more")
            for structure, weights in structures.items():
                _require(
                    set(weights) == {INTERCEPT, *SIGNS},
                    f"weights of {structure}",
                    sorted(weights),
                    f"those of {', '.join((INTERCEPT, *SIGNS))}",
                )
                _require(
                    all(abs(weight) <= LARGEST_WEIGHT for weight in weights.values())
                    and all(weights[name] * sign >= 0 for name, sign in SIGNS.items()),
                    f"weights of {structure}",
                    dict(weights),
                    f"finite, of the signs that they must have, and at most {LARGEST_WEIGHT:g}",
                )

    def expected_dice(
        self, contrast: str, structure: str, features: Features | None
    ) -> float | None:
        """Return the Dice to be expected.

        Parameters
        ----------
        contrast
            The one that was segmented.
        structure
            Name without the side.
        features
            From :func:`describe`.

        Returns
        -------
        float or None
            0 to 1: 0 where nothing was found, ``None`` where the contrast or the structure was not
            calibrated.
        """
        weights = self.weights.get(contrast, {}).get(structure)
        if weights is None:
            return None
        return 0.0 if features is None else expected(weights, features)


def _require(valid: bool, setting: str, value: object, wanted: str) -> None:
    if not valid:
        raise ModelError(f"the calibration's {setting} is {value!r:.200}", f"it has to be {wanted}")


def expected(weights: Weights, features: Features) -> float:
    """Return the logistic function of the weighted features."""
    score = weights[INTERCEPT] + sum(weights[name] * features[name] for name in SIGNS)
    return 1 / (1 + math.exp(-min(max(score, -50.0), 50.0)))


def describe(
    label_map: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    labels: Sequence[Label],
    affine: NDArray[np.float64],
    components: Mapping[str, tuple[int, int]],
    contrasts: Mapping[str, float | None],
) -> list[Features | None]:
    """Describe each structure by what foretells its Dice; see :data:`SIGNS`.

    Parameters
    ----------
    label_map : (X, Y, Z) array
        Label indices after :func:`~fdl_bidsapp.imaging.measure.largest_components`.
    probabilities : (K, X, Y, Z) array
        In the order of ``labels``.
    labels : K labels
    affine : (4, 4) array
        Voxel to scanner, in mm.
    components
        What ``largest_components`` reported.
    contrasts
        From :func:`~fdl_bidsapp.imaging.measure.contrasts`.

    Returns
    -------
    list of K features
        ``None`` for a structure without voxels.
    """
    spacing = spacing_of(affine)
    voxel_volume = float(abs(np.linalg.det(affine[:3, :3])))
    found = [
        _alone(label_map == label.index, probability, components[label.abbreviation][1])
        for label, probability in zip(labels, probabilities, strict=True)
    ]
    nothing = _logit(0.0)
    certainty = [nothing if own is None else own["soft_dice"] for own in found]
    volumes = [0.0 if own is None else own.pop("voxels") * voxel_volume for own in found]
    described: list[Features | None] = []
    for i, (own, partner) in enumerate(zip(found, mirrored(tuple(labels)), strict=True)):
        if own is None:
            described.append(None)
            continue
        volume, other = volumes[i], volumes[partner]
        own["log_volume"] = math.log(volume)
        own["log_volume_squared"] = math.log(volume) ** 2
        own["asymmetry"] = min(abs(math.log(volume / other)), _LOPSIDED) if other else _LOPSIDED
        rest = certainty[:i] + certainty[i + 1 :]
        own["others"] = median(rest) if rest else own["soft_dice"]
        contrast = contrasts[labels[i].abbreviation] or 0.0
        own["log_contrast"] = math.log(min(max(contrast, _FAINT), _PLAIN))
        own["log_voxel"] = math.log(spacing.max())
        described.append(own)
    return described


def _alone(mask: NDArray[np.bool_], probability: NDArray[np.float32], lost: int) -> Features | None:
    voxels = int(np.count_nonzero(mask))
    if not voxels:
        return None
    inside = float(probability[mask].sum(dtype=np.float64))
    outside = float(probability[(probability >= TAIL) & ~mask].sum(dtype=np.float64))
    return {
        "soft_dice": _logit(2 * inside / (voxels + inside + outside)),
        "mean_probability": _logit(inside / voxels),
        "lost": lost / (voxels + lost),
        "voxels": voxels,
    }


def _logit(share: float) -> float:
    share = min(max(share, 1 - _SURE), _SURE)
    return math.log(share / (1 - share))


def fit_weights(cases: Sequence[Features], dice: Sequence[float]) -> dict[str, float]:
    """Fit the logistic curve of one structure, by least deviance with a small ridge.

    Parameters
    ----------
    cases
        Features of structures that were found.
    dice
        Their Dice with the truth, 0 to 1.

    Returns
    -------
    dict
        Weights of :data:`SIGNS` and the intercept.

    Raises
    ------
    ValueError
        There is no case, or not one Dice for each.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    if not cases:
        raise ValueError("there are no cases to fit")
    names = list(SIGNS)
    raw = np.array([[case[name] for name in names] for case in cases])
    truth = np.array(dice, float)
    if truth.shape != (len(raw),):
        raise ValueError(f"{truth.size} values of Dice for {len(raw)} cases")
    # About its mean, so that the volume and its square are not one and the same.
    line, square = names.index("log_volume"), names.index("log_volume_squared")
    typical = raw[:, line].mean()
    raw[:, square] = (raw[:, line] - typical) ** 2
    middle, spread = raw.mean(0), raw.std(0)
    spread[spread < 1e-9] = 1
    scaled = np.column_stack([np.ones(len(raw)), (raw - middle) / spread])

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        score = scaled @ weights
        penalised = np.concatenate([[0.0], weights[1:]])
        deviance = np.logaddexp(0, score) - truth * score
        gradient = scaled.T @ (expit(score) - truth) + 2 * RIDGE * penalised
        return float(deviance.sum() + RIDGE * penalised @ penalised), gradient

    limits = {1: (0.0, None), -1: (None, 0.0), 0: (None, None)}
    fitted = minimize(
        loss,
        np.zeros(scaled.shape[1]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(None, None), *(limits[sign] for sign in SIGNS.values())],
        options={"maxiter": 2000, "ftol": 1e-12, "gtol": 1e-8},
    )
    slopes = fitted.x[1:] / spread
    intercept = fitted.x[0] - slopes @ middle + slopes[square] * typical**2
    slopes[line] -= 2 * slopes[square] * typical
    weights = dict(zip(names, slopes.tolist(), strict=True))
    return {name: float(f"{w:.6g}") for name, w in {INTERCEPT: intercept, **weights}.items()}


def choose_threshold(
    confidence: Sequence[float], dice: Sequence[float], weights: Sequence[float] | None = None
) -> float:
    """Choose the expected Dice below which a structure is to be flagged.

    The aims are to catch nine in ten of the bad ones, those of a Dice below :data:`BAD_DICE`, and
    to flag at most one in ten of the others; the threshold is the one that is furthest on the good
    side of both, or least far on the bad side.

    Parameters
    ----------
    confidence, dice
        Expected and true Dice of structures whose expected Dice is not from a fit to themselves.
    weights
        How many structures like it each stands for, 0 or more; without them, all count alike.

    Returns
    -------
    float
        :data:`BAD_DICE` where there are not both good ones and bad ones to choose by.

    Examples
    --------
    >>> choose_threshold([0.5, 0.6, 0.8, 0.9], [0.4, 0.6, 0.8, 0.9])
    0.7
    """
    share = np.ones(len(dice)) if weights is None else np.asarray(weights, float)
    counted = share > 0
    values, share = np.asarray(confidence, float)[counted], share[counted]
    bad = np.asarray(dice, float)[counted] < BAD_DICE
    if bad.all() or not bad.any():
        return BAD_DICE
    levels = np.unique(values)
    # Half-way between neighbours, so that rounding moves nobody to the other side.
    candidates = np.clip((levels[1:] + levels[:-1]) / 2, 0.01, 0.99)
    if not candidates.size:
        return BAD_DICE
    caught, wrongly = (
        np.array([np.average(values[part] < level, weights=share[part]) for level in candidates])
        for part in (bad, ~bad)
    )
    room = np.minimum(caught - 0.9, 0.1 - wrongly)
    best = candidates[room >= room.max() - 1e-12]
    return round(float(np.median(best)), 4)
