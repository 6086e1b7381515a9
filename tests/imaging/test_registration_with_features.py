"""Two contrasts of one anatomy, one bent: feature channels lead ANTs where images do not."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from fdl_bidsapp.errors import ImageError
from fdl_bidsapp.imaging.overlap import dice
from fdl_bidsapp.imaging.registration import register_features

pytestmark = pytest.mark.real

SHAPE = (40, 44, 36)
AFFINE = np.diag([-1.0, 1.2, 1.0, 1.0])


def anatomy(bend: float) -> np.ndarray:
    """Nested balls: 1 outside, 2 within; the inner one is moved by the bend."""
    i, j, k = np.indices(SHAPE).astype(float)
    outer = ((i - 20) ** 2 + (j - 22) ** 2 + (k - 18) ** 2) < 15**2
    inner = ((i - 20 - bend) ** 2 + (j - 22 + bend) ** 2 + (k - 18) ** 2) < 6**2
    return outer.astype(np.uint8) + inner


def contrast(labels: np.ndarray, table: tuple[float, float, float], seed: int) -> nib.Nifti1Image:
    noise = np.random.default_rng(seed).normal(0, 0.03, SHAPE)
    data = ndimage.gaussian_filter(np.array(table)[labels] + noise, 0.7)
    return nib.Nifti1Image(data.astype(np.float32), AFFINE)


def channels(labels: np.ndarray) -> np.ndarray:
    """What perfect features would be: the same for both contrasts."""
    return np.stack([ndimage.gaussian_filter((labels == v) * 1.0, 1.0) for v in range(3)]).astype(
        np.float32
    )


def test_channels_lead_where_the_images_cannot(tmp_path):
    fixed, moving = anatomy(0), anatomy(3)
    # The inner ball cannot be seen in one of the two images.
    images = contrast(moving, (0, 0.8, 0.3), 1), contrast(fixed, (0, 0.6, 0.6), 2)
    way = register_features(*images, channels(moving), channels(fixed), tmp_path)
    moved = way.apply(nib.Nifti1Image(moving, AFFINE), "genericLabel").get_fdata()
    assert dice(moving == 2, fixed == 2) < 0.55
    assert dice(moved == 2, fixed == 2) > 0.85
    assert dice(moved >= 1, fixed >= 1) > 0.95
    back = way.apply(nib.Nifti1Image(fixed, AFFINE), "genericLabel", inverse=True).get_fdata()
    assert dice(back == 2, moving == 2) > 0.85


def test_channels_off_their_images_grid_are_refused(tmp_path):
    image = contrast(anatomy(0), (0, 0.8, 0.3), 1)
    good = channels(anatomy(0))
    for other in (good[:, :-1], good[:2]):
        with pytest.raises(ValueError, match="features"):
            register_features(image, image, good, other, tmp_path)


def test_a_failure_of_ants_is_an_image_error(monkeypatch, tmp_path):
    import ants

    def fail(**_):
        raise RuntimeError("Registration failed with error code 1")

    monkeypatch.setattr(ants, "registration", fail)
    image, good = contrast(anatomy(0), (0, 0.8, 0.3), 1), channels(anatomy(0))
    with pytest.raises(ImageError, match="could not be registered"):
        register_features(image, image, good, good, tmp_path)
