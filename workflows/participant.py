"""The participant level: for each scan, normalise, segment, deliver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nipype.pipeline.engine import Node, Workflow

from fdl_bidsapp.bids.inputs import Scan
from fdl_bidsapp.derivatives import Provenance
from fdl_bidsapp.making import needs_making
from fdl_bidsapp.settings import Settings
from fdl_bidsapp.workflows.interfaces.making import MakeMaps
from fdl_bidsapp.workflows.interfaces.scan import DeliverScan, NormaliseScan, SegmentScan

MAKING_GB = 3.0
READING_GB = 2.0
SEGMENTING_GB = 2.5
DELIVERING_GB = 1.5
REGISTERING_GB = 4.0


@dataclass(frozen=True)
class Job:
    """A scan to be done.

    Attributes
    ----------
    scan
        What was found.
    provenance
        What goes into its record.
    """

    scan: Scan
    provenance: Provenance


@dataclass(frozen=True)
class Compute:
    """The model and where it runs.

    Attributes
    ----------
    model, model_sha256
        File and verified hash.
    device
        ``cpu`` or ``cuda``.
    threads
        CPU threads of one network.
    fall_back
        Whether the CPU takes over when the GPU fails.
    """

    model: Path
    model_sha256: str
    device: str
    threads: int
    fall_back: bool = False


def init_participant_wf(
    jobs: Mapping[str, Job], settings: Settings, compute: Compute, work_dir: Path
) -> Workflow:
    """Build the workflow of all scans.

    Parameters
    ----------
    jobs
        Scans by the name of their sub-workflow.
    settings
        The run's options.
    compute
        Model and device.
    work_dir
        Folder of intermediate files.
    """
    workflow = Workflow("fdl", base_dir=str(work_dir))
    # Those that take minutes begin first: last, they would leave processors idle.
    ordered = sorted(jobs.items(), key=lambda item: not needs_making(item[1].scan))
    workflow.add_nodes([init_scan_wf(name, job, settings, compute) for name, job in ordered])
    return workflow


def init_scan_wf(name: str, job: Job, settings: Settings, compute: Compute) -> Workflow:
    """Build the three nodes of one scan, or four where maps have to be made from raw echoes.

    A node costs a noticeable part of a second to schedule, so there are few.
    """
    model = {"model": str(compute.model), "model_sha256": compute.model_sha256}
    normalise = Node(
        NormaliseScan(scan=job.scan, target=settings.target, **model),
        name="normalise",
        mem_gb=READING_GB,
    )
    segment = Node(
        SegmentScan(
            device=compute.device,
            fall_back=compute.fall_back,
            use_gpu=compute.device == "cuda",
            target=settings.target,
            flips=settings.flips,
            threads=compute.threads,
            **model,
        ),
        name="segment",
        mem_gb=SEGMENTING_GB,
        n_procs=compute.threads,
    )
    deliver = Node(
        DeliverScan(
            scan=job.scan,
            output_dir=str(settings.output_dir),
            provenance=job.provenance,
            space=settings.output_spaces[0] if settings.output_spaces else "",
            seed=settings.random_seed,
            **model,
        ),
        name="deliver",
        mem_gb=REGISTERING_GB if settings.output_spaces else DELIVERING_GB,
        n_procs=compute.threads if settings.output_spaces else 1,
    )
    workflow = Workflow(name)
    workflow.connect(
        [
            (normalise, segment, [("images", "images"), ("canvas", "canvas")]),
            (normalise, deliver, [("images", "images")]),
            (segment, deliver, [(name, name) for name in ("probabilities", "target", "notes")]),
        ]
    )
    if settings.recon != "never" and needs_making(job.scan):
        make = Node(
            MakeMaps(
                scan=job.scan,
                recon=settings.recon,
                reference=settings.qsm_reference,
                device=compute.device,
                use_gpu=compute.device == "cuda",
                threads=compute.threads,
            ),
            name="make",
            mem_gb=MAKING_GB,
            n_procs=compute.threads,
        )
        workflow.connect(
            [(make, normalise, [("scan", "scan")]), (make, deliver, [("maps", "maps")])]
        )
    return workflow
