from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fdl_bidsapp.imaging.overlap import dice

masks = arrays(bool, (3, 4, 2), elements=st.booleans())


@given(masks, masks)
def test_dice_is_symmetric_and_between_zero_and_one(a, b):
    value = dice(a, b)
    assert math.isnan(value) == (not (a | b).any())
    if not math.isnan(value):
        assert value == dice(b, a)
        assert value == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert (value == 1) == (a == b).all()


def test_any_value_but_zero_is_inside():
    assert dice(np.array([0, 3, 3]), np.array([0, 1, 1])) == 1.0


def test_refuses_masks_of_different_shape():
    with pytest.raises(ValueError, match="one grid"):
        dice(np.ones((3, 3)), np.ones((3, 1)))
