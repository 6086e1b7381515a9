"""A GPU that is full, busy or absent; stood in for, so that it is tested without one."""

from __future__ import annotations

import pytest
import torch

from fdl_bidsapp.models.bundle import Bundle
from fdl_bidsapp.workflows.interfaces.scan import _network

pytestmark = pytest.mark.real

FULL = torch.cuda.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4.00 GiB"
)
BUSY = RuntimeError(
    "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be"
)


@pytest.fixture
def gpu(monkeypatch):
    """Give a function that makes PyTorch see a GPU which fails in this way."""

    def fails(error: Exception) -> list[str]:
        network, tried = Bundle.network, []

        def on_device(self: Bundle, device: object = "cpu") -> object:
            tried.append(str(device))
            if str(device) == "cuda":
                raise error
            return network(self, device)

        _network.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(Bundle, "network", on_device)
        return tried

    return fails


@pytest.mark.parametrize(
    ("error", "cause"),
    [(FULL, "the GPU is out of memory"), (BUSY, "the GPU is busy or cannot be used")],
    ids=["full", "busy"],
)
def test_where_the_choice_is_free_the_cpu_takes_over_and_the_record_says_so(
    study, gpu, error, cause
):
    tried = gpu(error)
    study.add("01")
    study.add("02")
    assert study.run("participant", "--device", "auto") == 0
    assert tried.count("cuda") == 2
    assert tried.count("cpu") == 1
    for subject in ("01", "02"):
        (note,) = [n for n in study.record(subject)["Notes"] if "the network ran on the CPU" in n]
        assert cause in note
    study.add("03")
    tried.clear()
    assert study.run("participant", "--device", "cpu") == 0
    assert "cuda" not in tried
    assert not any("the CPU" in note for note in study.record("03")["Notes"])


@pytest.mark.parametrize("error", [FULL, BUSY], ids=["full", "busy"])
def test_where_a_gpu_was_asked_for_the_scan_fails_with_cause_and_remedy(study, gpu, capsys, error):
    tried = gpu(error)
    study.add("01")
    assert study.run("participant", "--device", "cuda") == 1
    assert tried == ["cuda"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "  sub-01: " in line]
    assert "the GPU is" in line
    assert "--device cpu" in line
    assert study.outputs("01") == ["sub-01_morph.json"]


def test_an_error_of_the_network_is_not_taken_for_one_of_the_gpu(study, gpu, capsys):
    tried = gpu(RuntimeError("shapes do not match"))
    study.add("01")
    assert study.run("participant", "--device", "auto") == 1
    assert tried == ["cuda"]
    assert "shapes do not match" in capsys.readouterr().err


def test_without_a_gpu_the_cpu_is_taken_and_named(study, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    study.add("01")
    assert study.run("participant", "--device", "auto") == 0
    assert "on cpu" in capsys.readouterr().err
