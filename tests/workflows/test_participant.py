"""The workflow of the participant level: few nodes, what each one asks of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from fdl_bidsapp.bids.inputs import Scan, Source
from fdl_bidsapp.derivatives import Provenance
from fdl_bidsapp.errors import ModelError
from fdl_bidsapp.settings import Settings
from fdl_bidsapp.workflows.interfaces.scan import load_model
from fdl_bidsapp.workflows.participant import Compute, Job, init_participant_wf


@pytest.fixture
def build(tmp_path):
    def workflow(device: str = "cpu", scans: int = 2, **options: object) -> object:
        settings = Settings(tmp_path, tmp_path / "out", "participant", **options)
        source = Source("qsm", (tmp_path / "sub-01_Chimap.nii.gz",), "map")
        jobs = {
            f"scan_{k}": Job(
                Scan((("subject", f"{k}"),), (source,)), Provenance("name", "hash", f"key {k}")
            )
            for k in range(scans)
        }
        compute = Compute(Path("/model.safetensors"), "hash", device, 2)
        return init_participant_wf(jobs, settings, compute, tmp_path / "work")

    return workflow


def nodes(workflow, name: str) -> list:
    return [
        workflow.get_node(full) for full in workflow.list_node_names() if full.endswith(f".{name}")
    ]


def test_a_scan_is_three_nodes_of_its_own(build):
    names = build(scans=3).list_node_names()
    assert sorted(names) == [
        f"scan_{k}.{step}" for k in range(3) for step in ("deliver", "normalise", "segment")
    ]


def test_only_the_network_takes_the_gpu(build):
    workflow = build(device="cuda")
    assert all(node.interface.inputs.use_gpu for node in nodes(workflow, "segment"))
    for step in ("normalise", "deliver"):
        assert all(not hasattr(node.inputs, "use_gpu") for node in nodes(workflow, step))
    assert not any(node.interface.inputs.use_gpu for node in nodes(build(), "segment"))


def test_options_reach_the_steps_that_use_them(build):
    workflow = build(
        target="imag", flips="yes", output_spaces=("MNI152NLin2009aSym",), random_seed=7
    )
    assert {node.inputs.target for node in nodes(workflow, "normalise")} == {"imag"}
    assert {node.inputs.flips for node in nodes(workflow, "segment")} == {"yes"}
    assert {node.inputs.threads for node in nodes(workflow, "segment")} == {2}
    assert {node.n_procs for node in nodes(workflow, "segment")} == {2}
    (first, _) = nodes(workflow, "deliver")
    assert (first.inputs.space, first.inputs.seed) == ("MNI152NLin2009aSym", 7)
    assert first.inputs.provenance.key == "key 0"


def test_registration_asks_for_more_memory_and_all_threads(build):
    plain, _ = nodes(build(), "deliver")
    registering, _ = nodes(build(output_spaces=("MNI152NLin2009aSym",)), "deliver")
    assert registering.mem_gb > plain.mem_gb
    assert (plain.n_procs, registering.n_procs) == (1, 2)


def test_a_model_that_changes_while_scans_are_done_is_refused(blob_model):
    with pytest.raises(ModelError, match="has changed while"):
        load_model(str(blob_model), "another hash")
