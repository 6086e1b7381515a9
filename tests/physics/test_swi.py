from __future__ import annotations

import numpy as np
import pytest

from fdl_bidsapp.physics.swi import minimum_intensity_projection, susceptibility_weighted


@pytest.mark.parametrize("sign", [1, -1])
def test_a_vein_is_darker_than_in_the_magnitude(sign):
    phase = np.zeros((24, 24, 24))
    phase[12, 12, 4:20] = sign * 1.5
    swi = susceptibility_weighted(np.exp(1j * phase).astype(np.complex64), (1, 1, 1), sign)
    assert swi[12, 12, 12] < 0.5
    assert swi[4, 4, 12] == pytest.approx(1, abs=0.05)
    turned = susceptibility_weighted(np.exp(1j * phase).astype(np.complex64), (1, 1, 1), -sign)
    assert turned[12, 12, 12] == pytest.approx(1, abs=1e-3)


def test_the_projection_shows_a_vein_throughout_the_slab():
    image = np.ones((8, 8, 20))
    image[4, 4, 10] = 0.2
    projected = minimum_intensity_projection(image, (1, 1, 2), slab=10)
    assert projected[4, 4].tolist() == [1] * 8 + [pytest.approx(0.2)] * 5 + [1] * 7
    assert (projected[3] == 1).all()
