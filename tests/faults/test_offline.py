"""A run in which there is no network at all."""

from __future__ import annotations

import shutil
import subprocess

import pytest

pytestmark = pytest.mark.real

NO_NETWORK = ("unshare", "--map-root-user", "--net")


def test_both_levels_run_without_a_network(study, start):
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    reach = [*NO_NETWORK, "sh", "-c", "test $(wc -l < /proc/net/dev) = 3"]
    if subprocess.run(reach, check=False, capture_output=True).returncode:
        pytest.skip("a network cannot be taken away here")
    study.add("01", ("qsm", "r2star"))
    for level in ("participant", "group"):
        # Two workers; the environment that would let libraries know of proxies stays as it is.
        options = ("--nprocs", 2) if level == "participant" else ()
        run = start(study.arguments(level, *options), prefix=NO_NETWORK)
        assert run.finish() == 0, run.said
    assert study.record("01")["Status"] == "ok"
    assert (study.out / "group_morph.tsv").is_file()
