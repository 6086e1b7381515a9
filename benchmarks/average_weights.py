"""Average the weights of a model before and after its last phase of training.

    python benchmarks/average_weights.py BEFORE AFTER OUTPUT

A network that is trained on for long on scans of one kind forgets others. The mean of both weights
does what the first could and most of what the second has learnt (Wortsman et al., Robust
Fine-tuning of Zero-shot Models, CVPR 2022). It has no confidence: fit one with
``calibrate_confidence.py``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fdl_bidsapp.models.bundle import load_bundle, save_bundle


def main() -> None:
    """Write the mean of two models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    before, after = load_bundle(options.before), load_bundle(options.after)
    network = after.network()
    state = {name: (value.float() + before.state[name].float()) / 2
             for name, value in after.state.items()}  # fmt: skip
    network.load_state_dict(state)
    told = "weights: the mean of those before and after the last phase"
    provenance = {**after.spec.provenance, "averaged": told}
    spec = replace(after.spec, calibration=None, provenance=provenance)
    print(save_bundle(options.output, network, spec, after.bank, dtype="float16"))


if __name__ == "__main__":
    main()
