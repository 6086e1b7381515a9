"""Making maps from raw echoes, as a Nipype interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nipype.interfaces.base import BaseInterfaceInputSpec, SimpleInterface, TraitedSpec, traits

from fdl_bidsapp.memory import kept_memory


class _MakeInputs(BaseInterfaceInputSpec):
    scan = traits.Any(mandatory=True, desc="fdl_bidsapp.bids.inputs.Scan")
    recon = traits.Str("auto", usedefault=True, desc="how susceptibility is reconstructed")
    reference = traits.Str("brain", usedefault=True, desc="what has susceptibility 0")
    device = traits.Str("cpu", usedefault=True)
    use_gpu = traits.Bool(False, usedefault=True, desc="takes the GPU slot of the scheduler")
    threads = traits.Int(1, usedefault=True)


class _MakeOutputs(TraitedSpec):
    scan = traits.Any(desc="the scan with the made maps in the place of its echoes")
    maps = traits.Any(desc="the maps to be delivered, fdl_bidsapp.making.MadeMap each")


class MakeMaps(SimpleInterface):
    """Make the maps that a scan lacks from its raw echoes."""

    input_spec = _MakeInputs
    output_spec = _MakeOutputs

    def _run_interface(self, runtime: Any) -> Any:
        import torch

        from fdl_bidsapp.making import make_maps

        torch.set_num_threads(self.inputs.threads)
        with kept_memory():
            made = make_maps(
                self.inputs.scan,
                self.inputs.recon,
                Path(runtime.cwd),
                reference=self.inputs.reference,
                threads=self.inputs.threads,
                device=self.inputs.device,
            )
        self._results.update(scan=made.scan, maps=made.maps)
        return runtime
