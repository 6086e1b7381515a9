"""Prediction on arrays: devices, flips, and the low-frequency bank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fdl_bidsapp.errors import ModelError, TemporaryError, UsageError
from fdl_bidsapp.labels import by_abbreviation
from fdl_bidsapp.models import inference
from fdl_bidsapp.models.fdl import METHODS, ModelSpec, build_network
from fdl_bidsapp.models.fourier import low_part
from fdl_bidsapp.models.inference import autocast_dtype, locate, predict, resolve_device

CPU = torch.device("cpu")
GRID = (12, 14, 10)


def specification(method: str = "late", **values: object) -> ModelSpec:
    return ModelSpec(
        "test",
        method=method,
        theta=0.2,
        grid_shape=GRID,
        backbone_options={"width": 4, "levels": 2},
        **{"contrasts": ("qsm", "imag", "r2star"), **values},
    )


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(GRID, dtype=np.float32)


@pytest.fixture
def single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "autocast_dtype", lambda device: None)


@pytest.mark.parametrize("method", METHODS)
def test_gives_a_probability_for_each_structure(method):
    spec = specification(method)
    result = predict(build_network(spec).eval(), spec, {"qsm": image(0)}, "qsm", CPU)
    assert result.shape == (4, *GRID)
    assert result.dtype == np.float32
    assert result.min() >= 0
    assert result.sum(0).max() <= 1 + 1e-5


@pytest.mark.usefixtures("single_precision")
def test_is_the_softmax_of_the_target_s_own_logits():
    spec = specification("multimodal")
    network = build_network(spec).eval()
    images = {"qsm": image(0), "imag": image(1)}
    logits = network(torch.from_numpy(images["qsm"])[None, None])[0]
    expected = logits.softmax(1)[0, 1:].detach().numpy()
    result = predict(network, spec, images, "qsm", CPU)
    np.testing.assert_allclose(result, expected, atol=1e-6)


@pytest.mark.usefixtures("single_precision")
def test_missing_contrasts_come_from_the_bank_or_drop_out():
    spec = specification("multimodal")
    network = build_network(spec).eval()
    images = {"qsm": image(0), "imag": image(1)}
    x, own = (torch.from_numpy(images[c])[None, None] for c in ("qsm", "imag"))
    stand_in = low_part(torch.from_numpy(image(2)), 0.2)
    # The subject's own imag goes before the bank's.
    bank = {"imag": [torch.zeros(3, 3, 3)], "r2star": [stand_in, torch.zeros(3, 3, 3)]}

    def mean(others: list[Tensor]) -> np.ndarray:
        logits = network(x, others)
        return torch.stack([each.softmax(1)[0, 1:] for each in logits]).mean(0).detach().numpy()

    both = [low_part(own, 0.2), stand_in[None, None]]
    with_bank = predict(network, spec, images, "qsm", CPU, average=True, bank=bank)
    without = predict(network, spec, images, "qsm", CPU, average=True)
    np.testing.assert_allclose(with_bank, mean(both), atol=1e-6)
    np.testing.assert_allclose(without, mean(both[:1]), atol=1e-6)
    assert np.abs(with_bank - without).max() > 1e-6


@pytest.mark.usefixtures("single_precision")
def test_flips_make_the_prediction_symmetric_with_the_sides_swapped():
    spec = specification(labels=by_abbreviation(["RNL", "DNR", "RNR", "DNL"]))
    network = build_network(spec).eval()
    scan = image(0)
    result = predict(network, spec, {"qsm": scan}, "qsm", CPU, flips=True)
    mirror = predict(network, spec, {"qsm": scan[::-1]}, "qsm", CPU, flips=True)
    np.testing.assert_allclose(mirror[[2, 3, 0, 1]][:, ::-1], result, atol=1e-5)
    plain = predict(network, spec, {"qsm": scan}, "qsm", CPU)
    assert np.abs(result - plain).max() > 1e-4


def test_a_model_of_one_side_has_no_mirror_image():
    labels = by_abbreviation(["RNL", "DNL", "DNR"])
    assert not specification(labels=labels).averages_flips("auto")
    with pytest.raises(ModelError, match="one side only"):
        specification(labels=labels).averages_flips("yes")
    with pytest.raises(ModelError, match="flips"):
        specification(labels=labels, flips=True)


def test_refuses_a_contrast_the_model_was_not_made_for():
    spec = specification(contrasts=("qsm",))
    with pytest.raises(ModelError, match="does not segment swi"):
        predict(build_network(spec), spec, {"swi": image(0)}, "swi", CPU)


def test_refuses_an_image_on_another_grid():
    spec = specification()
    with pytest.raises(ValueError, match="grid"):
        predict(build_network(spec), spec, {"qsm": image(0)[1:]}, "qsm", CPU)


def test_a_full_gpu_is_a_failure_that_may_pass():
    class Full(nn.Module):
        def forward(self, target: Tensor, others: Sequence[Tensor] = ()) -> list[Tensor]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TemporaryError, match="too little free memory"):
        predict(Full(), specification(), {"qsm": image(0)}, "qsm", CPU)


def test_device_follows_what_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(UsageError, match="no CUDA GPU"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == resolve_device("cuda").type == "cuda"
    assert resolve_device("cpu") == CPU
    with pytest.raises(UsageError, match="choose one of"):
        resolve_device("tpu")


def test_bfloat16_only_where_the_hardware_is_faster_for_it(monkeypatch):
    for capabilities, expected in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "avx512_fp16": True, "amx_bf16": False}, None),
        ({"avx512_f": True}, None),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        assert autocast_dtype(CPU) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert autocast_dtype(CPU) is None
    for capability, expected in (((9, 0), torch.bfloat16), ((7, 5), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert autocast_dtype(torch.device("cuda")) is expected


def test_bfloat16_hardly_changes_the_prediction(monkeypatch):
    spec = specification()
    network = build_network(spec).eval()
    monkeypatch.setattr(inference, "autocast_dtype", lambda device: torch.bfloat16)
    half = predict(network, spec, {"qsm": image(0)}, "qsm", CPU)
    monkeypatch.setattr(inference, "autocast_dtype", lambda device: None)
    full = predict(network, spec, {"qsm": image(0)}, "qsm", CPU)
    np.testing.assert_allclose(half, full, atol=0.05)
    assert np.abs(half - full).max() > 0


class Bright(nn.Module):
    """Takes what is bright for the region."""

    def forward(self, volume: Tensor) -> list[Tensor]:
        return [torch.cat([0.5 - volume, volume - 0.5], 1) * 20]


COARSE = (4.0, 4.0, 4.0)


def test_locates_the_largest_region_at_its_centre():
    image = np.zeros((20, 24, 18), np.float32)
    image[4:9, 10:15, 6:9] = 1
    image[15, 2, 2] = 1
    ((centre,),) = locate(Bright(), [image], COARSE, CPU)
    assert centre == pytest.approx((6, 12, 7), abs=0.01)


def test_locates_nothing_where_there_is_no_region():
    assert locate(Bright(), [np.zeros((20, 24, 18), np.float32)], COARSE, CPU) == [[]]


def test_contrasts_together_outvote_the_one_that_errs():
    right, wrong = (np.zeros((20, 24, 18), np.float32) for _ in range(2))
    right[4:9, 10:15, 6:9] = 1
    wrong[13:18, 2:7, 10:13] = 1
    ((centre,),) = locate(Bright(), [right, wrong, right], COARSE, CPU)
    assert centre == pytest.approx((6, 12, 7), abs=0.01)


def test_two_regions_that_a_bridge_joins_are_two_places():
    image = np.zeros((20, 20, 40), np.float32)
    image[7:14, 7:14, 28:35] = 1
    image[5:12, 7:14, 4:10] = 1
    image[9:11, 9:11, 10:28] = 1
    ((first, second),) = locate(Bright(), [image], COARSE, CPU)
    assert first == pytest.approx((10, 10, 31), abs=1)
    assert second == pytest.approx((8, 10, 7), abs=1)


class BrightAndDark(nn.Module):
    """Two regions: what is brighter than 0.8, and what is darker than 0.2."""

    def forward(self, volume: torch.Tensor) -> list[torch.Tensor]:
        bright, dark = (volume - 0.8) * 40, (0.2 - volume) * 40
        return [torch.cat([torch.zeros_like(volume), bright, dark], 1)]


def test_locates_each_region_by_itself():
    image = np.full((20, 24, 18), 0.5, np.float32)
    image[4:9, 10:15, 6:9] = 1
    assert locate(BrightAndDark(), [image], COARSE, CPU)[1] == []
    image[12:15, 4:7, 10:15] = 0
    (bright,), (dark,) = locate(BrightAndDark(), [image], COARSE, CPU)
    assert bright == pytest.approx((6, 12, 7), abs=0.01)
    assert dark == pytest.approx((13, 5, 12), abs=0.01)
