"""Losses of segmentation networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_dice_loss(
    logits: Tensor, target: Tensor, epsilon: float = 1.0, absent: float = 1.0
) -> Tensor:
    """Return one minus the soft Dice, averaged over the structures and the batch.

    Parameters
    ----------
    logits : (B, K + 1, X, Y, Z) tensor
        Background first.
    target : (B, X, Y, Z) long tensor
        Class of each voxel.
    epsilon
        Added to numerator and denominator, in voxels, so that a structure that is absent and not
        predicted costs nothing.
    absent
        Weight of the structures that an image does not hold, beside 1 of those that it does.

    Examples
    --------
    >>> target = torch.ones(1, 4, 4, 4, dtype=torch.long)
    >>> logits = torch.zeros(1, 2, 4, 4, 4)
    >>> logits[:, 1] = 50
    >>> round(float(soft_dice_loss(logits, target)), 4)
    0.0
    """
    # With the channels innermost in memory these sums take three times as long.
    probabilities = logits.float().contiguous().softmax(1)
    classes = target.flatten(1)
    # Class by class sums, without a volume for each class of the truth.
    correct = probabilities.gather(1, target[:, None]).flatten(1)
    zeros = probabilities.new_zeros(probabilities.shape[:2])
    overlap = zeros.scatter_add(1, classes, correct)[:, 1:]
    truth = zeros.scatter_add(1, classes, torch.ones_like(correct))[:, 1:]
    size = probabilities.sum((2, 3, 4))[:, 1:] + truth
    dice = (2 * overlap + epsilon) / (size + epsilon)
    weight = torch.where(truth > 0, 1.0, absent)
    # With no weight on absent structures a window of background tells nothing.
    total = weight.sum(1).clamp(min=1e-6)
    return ((weight * (1 - dice)).sum(1) / total).mean()


def dice_cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    structure_weight: float | Sequence[float] = 1.0,
    absent: float = 1.0,
) -> Tensor:
    """Return the sum of :func:`soft_dice_loss` and the voxel-wise cross-entropy.

    Parameters
    ----------
    logits, target, absent
        As for :func:`soft_dice_loss`.
    structure_weight
        Weight of a structure's voxel in the cross-entropy against one of background, for all or
        for each. Above 1 small structures are found sooner, and drawn too large.
    """
    weight = logits.new_ones(logits.shape[1], dtype=torch.float32)
    weight[1:] = torch.as_tensor(structure_weight, dtype=torch.float32)
    dice = soft_dice_loss(logits, target, absent=absent)
    return dice + F.cross_entropy(logits.float().contiguous(), target, weight)
