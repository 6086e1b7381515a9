"""The default model on the demonstration of the README, compared with its truth."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from fdl_bidsapp.imaging.overlap import dice
from fdl_bidsapp.labels import nuclei
from fdl_bidsapp.models.bundle import shipped_models
from fdl_bidsapp.simulation import demo


@pytest.mark.skipif("default" not in shipped_models(), reason="no default model yet")
def test_the_nuclei_of_the_last_participant_are_found_from_its_echoes(study, tmp_path, monkeypatch):
    cohort = demo.plan_cohort(4, seed=1)
    others = [replace(participant, sessions=()) for participant in cohort[:-1]]
    monkeypatch.setattr(demo, "plan_cohort", lambda *_: [*others, cohort[-1]])
    study.bids, truth = tmp_path / "demo", tmp_path / "truth"
    demo.simulate_dataset(study.bids, truth, participants=4, seed=1)
    study.model = "default"
    assert study.run("participant", "--participant-label", "04") == 0
    found = np.asarray(study.labels("04").dataobj)
    true = np.asarray(nib.load(truth / "sub-04/anat/sub-04_dseg.nii.gz").dataobj)
    for label in nuclei():
        # Below what is measured, and far above a mask that is misplaced or on the other side.
        least = 0.45 if label.structure == "subthalamic_nucleus" else 0.6
        assert dice(found == label.index, true == label.index) > least, label.name
