"""The steps of one scan as Nipype interfaces: each loads, calls a plain function and saves."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)

from fdl_bidsapp.errors import TemporaryError
from fdl_bidsapp.settings import BEST, FLIPS

if TYPE_CHECKING:
    from fdl_bidsapp.models.bundle import Bundle


@lru_cache(maxsize=1)
def load_model(path: str, sha256: str) -> Bundle:
    """Load a model once a process; the hash says that it is the one the run began with."""
    from fdl_bidsapp.errors import ModelError
    from fdl_bidsapp.models.bundle import load_bundle

    bundle = load_bundle(path)
    if bundle.sha256 != sha256:
        raise ModelError(
            "the model file has changed while the scans were processed", "run again", path=path
        )
    return bundle


# One for each device, between which scans may have to change.
@lru_cache(maxsize=2)
def _network(path: str, sha256: str, device: str) -> Any:
    return load_model(path, sha256).network(device)


def _gpu_trouble(error: Exception) -> TemporaryError | None:
    """Tell what is the matter with the GPU; ``None`` where an error is about something else."""
    if isinstance(error, TemporaryError):
        return error
    if not isinstance(error, RuntimeError) or "CUDA" not in str(error):
        return None
    cause = "is out of memory" if "out of memory" in str(error) else "is busy or cannot be used"
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return TemporaryError(
        f"the GPU {cause} ({reason})", "run again when it is free, or with --device cpu"
    )


class _ModelInputs(BaseInterfaceInputSpec):
    model = traits.Str(mandatory=True, desc="model file")
    model_sha256 = traits.Str(mandatory=True, desc="its verified hash")


class _NormaliseInputs(_ModelInputs):
    scan = traits.Any(mandatory=True, desc="fdl_bidsapp.bids.inputs.Scan")
    target = traits.Str("auto", usedefault=True, desc="contrast to segment")


class _NormaliseOutputs(TraitedSpec):
    images = File(exists=True, desc="all contrasts on the target's own grid")
    canvas = File(
        exists=True,
        desc="what the network reads, on the model's canvas; none for a model that samples its "
        "windows from the images themselves, or where each contrast is to be tried",
    )


class NormaliseScan(SimpleInterface):
    """Read a scan and put it on the model's canvas."""

    input_spec = _NormaliseInputs
    output_spec = _NormaliseOutputs

    def _run_interface(self, runtime: Any) -> Any:
        from fdl_bidsapp.pipeline import read_scan, save_canvas, save_images, to_canvas

        spec = load_model(self.inputs.model, self.inputs.model_sha256).spec
        images = read_scan(self.inputs.scan, self.inputs.target, spec.contrasts)
        self._results["images"] = str(Path(runtime.cwd, "images.npz"))
        save_images(self._results["images"], images)
        if spec.locator is None and self.inputs.target != BEST:
            self._results["canvas"] = str(Path(runtime.cwd, "canvas.npz"))
            save_canvas(self._results["canvas"], to_canvas(images, spec))
        return runtime


class _SegmentInputs(_ModelInputs):
    images = File(exists=True, mandatory=True)
    canvas = File(exists=True, desc="of the images, where the model has one")
    target = traits.Str("auto", usedefault=True, desc="contrast to segment")
    device = traits.Str("cpu", usedefault=True)
    fall_back = traits.Bool(False, usedefault=True, desc="to the CPU when the GPU fails")
    use_gpu = traits.Bool(False, usedefault=True, desc="takes the GPU slot of the scheduler")
    flips = traits.Enum(*FLIPS, usedefault=True, desc="average over left-right flips")
    threads = traits.Int(1, usedefault=True)


class _SegmentOutputs(TraitedSpec):
    probabilities = File(exists=True)
    target = traits.Str(desc="the contrast that was segmented")
    notes = traits.List(traits.Str(), desc="why it ran elsewhere, or took this contrast")


class SegmentScan(SimpleInterface):
    """Run the network; it is loaded once a process, however many scans there are.

    It sees one window of one scan at a time: where the GPU's memory does not hold that, there is no
    smaller batch to turn to, but the CPU.
    """

    input_spec = _SegmentInputs
    output_spec = _SegmentOutputs

    def _run_interface(self, runtime: Any) -> Any:
        import numpy as np
        import torch

        torch.set_num_threads(self.inputs.threads)
        notes = []
        try:
            expected, probabilities, affine = self._segment(self.inputs.device)
        except Exception as error:
            trouble = _gpu_trouble(error) if self.inputs.device == "cuda" else None
            if trouble is None:
                raise
            if not self.inputs.fall_back:
                raise trouble from error
            notes.append(f"the network ran on the CPU: {trouble.cause}")
        if notes:
            # Not in the handler, where the error holds what was on the GPU.
            torch.cuda.empty_cache()
            expected, probabilities, affine = self._segment("cpu")
        target, *others = expected
        if others:
            dice = ", ".join(f"{name} {value:.2f}" for name, value in expected.items())
            notes.append(f"{target} was segmented, of which most was expected (Dice: {dice})")
        path = str(Path(runtime.cwd, "probabilities.npz"))
        np.savez(path, allow_pickle=False, probabilities=probabilities, affine=affine)
        self._results.update(probabilities=path, target=target, notes=notes)
        return runtime

    def _segment(self, device: str) -> tuple[dict[str, Any], Any, Any]:
        """Return the contrasts segmented, that which is kept first, and what is found in it."""
        import torch

        from fdl_bidsapp.pipeline import (
            load_canvas,
            load_images,
            segment_canvas,
            segment_surest,
            to_canvas,
        )

        model = (self.inputs.model, self.inputs.model_sha256)
        bundle = load_model(*model)
        means = (bundle, _network(*model, device), torch.device(device))
        flips = self.inputs.flips
        if self.inputs.target == BEST:
            return segment_surest(load_images(self.inputs.images), *means, flips=flips)
        if isdefined(self.inputs.canvas):
            canvas = load_canvas(self.inputs.canvas)
        else:
            canvas = to_canvas(load_images(self.inputs.images), bundle.spec)
        return {canvas.target: None}, *segment_canvas(canvas, *means, flips=flips)


class _DeliverInputs(_ModelInputs):
    scan = traits.Any(mandatory=True)
    images = File(exists=True, mandatory=True)
    probabilities = File(exists=True, mandatory=True)
    target = traits.Str(mandatory=True, desc="the contrast that was segmented")
    notes = traits.List(traits.Str(), desc="of the segmentation, for the record")
    output_dir = traits.Str(mandatory=True)
    provenance = traits.Any(mandatory=True, desc="fdl_bidsapp.derivatives.Provenance")
    space = traits.Str("", usedefault=True, desc="standard space to deliver in as well")
    maps = traits.Any((), usedefault=True, desc="maps made, fdl_bidsapp.making.MadeMap each")
    seed = traits.Int(0, usedefault=True)


class _DeliverOutputs(TraitedSpec):
    record = traits.Str(desc="the record that says the scan is done")


class DeliverScan(SimpleInterface):
    """Bring the result to the scan's own grid, measure it and write the derivatives."""

    input_spec = _DeliverInputs
    output_spec = _DeliverOutputs

    def _run_interface(self, runtime: Any) -> Any:
        import numpy as np

        from fdl_bidsapp.bids.outputs import output_path
        from fdl_bidsapp.derivatives import write_scan
        from fdl_bidsapp.pipeline import load_images, to_native, to_standard
        from fdl_bidsapp.reports.reportlets import draw_scan

        spec = load_model(self.inputs.model, self.inputs.model_sha256).spec
        labels = spec.labels
        images = load_images(self.inputs.images)
        notes = (*images.notes, *self.inputs.notes)
        images = replace(images, target=self.inputs.target, notes=notes)
        with np.load(self.inputs.probabilities, allow_pickle=False) as file:
            segmentation = to_native(file["probabilities"], file["affine"], images, spec)
        standard = None
        if self.inputs.space:
            standard = to_standard(
                images, segmentation, self.inputs.space, Path(runtime.cwd), self.inputs.seed
            )
        out, scan = Path(self.inputs.output_dir), self.inputs.scan
        try:
            figures = {
                (figure.desc, figure.label): figure.svg
                for figure in draw_scan(images, segmentation, labels, standard)
            }
        except Exception as problem:
            # A mask without its picture is still a mask.
            figures = {}
            told = " ".join(f"{type(problem).__name__}: {problem}".split())
            note = f"the figures could not be drawn ({told})"
            images = replace(images, notes=(*images.notes, note))
        write_scan(
            out,
            scan,
            images,
            segmentation,
            labels,
            self.inputs.provenance,
            standard,
            figures,
            self.inputs.maps,
            spec.calibration,
        )
        self._results["record"] = str(output_path(out, scan.entities, "morph", extension=".json"))
        return runtime
