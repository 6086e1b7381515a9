"""Make an untrained nnU-Net model folder, for its predictor to be timed with.

To be run where nnU-Net is installed: ``python benchmarks/nnunet_model.py FOLDER``. The network is a
plain U-Net with as many levels and channels as the default model; weights do not change the time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PATCH = [128, 160, 160]
LEVELS, WIDTH, CLASSES = 4, 8, 5


def main() -> None:
    """Write plans, description and checkpoint."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    arguments = {
        "n_stages": LEVELS,
        "features_per_stage": [WIDTH * 2**level for level in range(LEVELS)],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * LEVELS,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (LEVELS - 1),
        "n_conv_per_stage": [2] * LEVELS,
        "n_conv_per_stage_decoder": [2] * (LEVELS - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    kind = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    imports = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    resampling = {
        "is_seg": False,
        "order": 3,
        "order_z": 0,
        "force_separate_z": None,
    }
    function = "resample_data_or_seg_to_shape"
    plans = {
        "dataset_name": "Dataset001_Speed",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": PATCH,
        "image_reader_writer": "NibabelIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "3d_fullres": {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": PATCH,
                "median_image_size_in_voxels": PATCH,
                "spacing": [1.0, 1.0, 1.0],
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": function,
                "resampling_fn_seg": function,
                "resampling_fn_data_kwargs": resampling,
                "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
                "resampling_fn_probabilities": function,
                "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
                "architecture": {
                    "network_class_name": kind,
                    "arch_kwargs": arguments,
                    "_kw_requires_import": imports,
                },
                "batch_dice": False,
            }
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
    }
    labels = {"background": 0} | {f"structure {value}": value for value in range(1, CLASSES)}
    description = {
        "channel_names": {"0": "QSM"},
        "labels": labels,
        "numTraining": 0,
        "file_ending": ".nii.gz",
    }
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(description))
    network = get_network_from_plans(kind, arguments, imports, 1, CLASSES, deep_supervision=False)
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres", "plans": plans, "fold": 0},
        "inference_allowed_mirroring_axes": None,
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    print(sum(parameter.numel() for parameter in network.parameters()))


if __name__ == "__main__":
    main()
