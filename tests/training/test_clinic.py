"""The way of a clinic: label a few scans, train, segment the cohort."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fdl_bidsapp.cli import toolbox
from fdl_bidsapp.imaging.overlap import dice


@pytest.mark.real
def test_a_model_trained_on_a_bids_dataset_segments_it(study, blobs, tmp_path):
    truth = tmp_path / "truth"
    truth.mkdir()
    description = {
        "Name": "manual labels",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "by hand"}],
    }
    (truth / "dataset_description.json").write_text(json.dumps(description))
    (truth / "dseg.tsv").write_text(
        "index\tname\tabbreviation\n1\tRed nucleus left\tRNL\n2\tRed nucleus right\tRNR\n"
    )
    where = {}
    for i, subject in enumerate(("01", "02", "03", "04")):
        where[subject] = blobs((8.0 + i, 16, 14.0 + i), (23.0, 14.0 + i, 17))
        study.add(subject, blobs=where[subject])
        if subject != "04":
            label = where[subject].image()
            label = type(label)(where[subject].truth(), label.affine, label.header)
            path = truth / f"sub-{subject}" / "anat" / f"sub-{subject}_dseg.nii.gz"
            path.parent.mkdir(parents=True)
            label.set_data_dtype(np.uint8)
            label.to_filename(path)
    config = tmp_path / "train.toml"
    config.write_text(
        'method = "late"\nfusion_channels = 4\nbackbone_options = {width = 8, levels = 2}\n'
        "grid_shape = [32, 32, 32]\nrecipe_options = {learning_rate = 0.006, augment = 0.2, "
        "average = 0.9, steps = 150}\n"
    )
    model = tmp_path / "ours.safetensors"
    data = ["--bids-dir", str(study.bids), "--labels-dir", str(truth), "--device", "cpu"]
    assert toolbox.run(["train", str(config), *data, "--output", str(model)]) == 0
    assert study.run("participant", "--model", str(model)) == 0
    # The fourth participant has no labels: this is what the model is for.
    found = np.asarray(study.labels("04").dataobj)
    wanted = where["04"].truth()
    for index in (1, 2):
        assert dice(found == index, wanted == index) > 0.8
    measured = ["evaluate", str(model), *data, "--output", str(tmp_path / "measured")]
    assert toolbox.run(measured) == 0
    assert len((tmp_path / "measured/cases.tsv").read_text().splitlines()) == 1 + 3 * 3
