"""Many scans, one network: what is loaded is loaded once for all scans of a process."""

from __future__ import annotations

import pytest

from fdl_bidsapp.models.bundle import Bundle
from fdl_bidsapp.workflows.interfaces import scan as interfaces

pytestmark = pytest.mark.real


@pytest.fixture
def loads(monkeypatch):
    """Give a list that grows whenever a network is built."""
    built: list[str] = []
    network = Bundle.network

    def count(self: Bundle, device: object = "cpu") -> object:
        built.append(str(device))
        return network(self, device)

    interfaces._network.cache_clear()
    monkeypatch.setattr(Bundle, "network", count)
    return built


def test_five_scans_load_one_network(study, loads):
    subjects = ("01", "02", "03", "04", "05")
    for subject in subjects:
        study.add(subject)
    assert study.run() == 0
    assert loads == ["cpu"]
    assert all(study.record(subject)["Status"] == "ok" for subject in subjects)


def test_chunks_of_a_cohort_leave_what_one_run_leaves(study):
    subjects = ("01", "02", "03", "04")
    for subject in subjects:
        study.add(subject, ("qsm", "r2star"))
    for chunk in (subjects[:2], subjects[2:]):
        assert study.run("participant", "--participant-label", *chunk) == 0
    by_chunks = study.group()
    study.out = study.out.with_name("whole")
    assert study.run() == 0
    assert study.group() == by_chunks
