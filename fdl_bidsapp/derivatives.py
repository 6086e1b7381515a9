"""What a scan leaves in the output folder: its derivatives, and the record of what became of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from fdl_bidsapp import __version__
from fdl_bidsapp.bids.inputs import Scan, scanner_of
from fdl_bidsapp.bids.outputs import (
    alone,
    atomic_write,
    dseg_sidecar,
    mask_sidecar,
    output_path,
    probseg_sidecar,
    read_record,
    remove_scan_outputs,
    write_image,
    write_json,
    write_text,
    write_tsv,
)
from fdl_bidsapp.errors import FdlError
from fdl_bidsapp.imaging.confidence import Calibration
from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.imaging.measure import COLUMNS, measure
from fdl_bidsapp.labels import Label
from fdl_bidsapp.making import MadeMap
from fdl_bidsapp.pipeline import ScanImages, Segmentation, StandardSpace

Array = np.ndarray


@dataclass(frozen=True)
class Provenance:
    """What a result depends on besides its images.

    Attributes
    ----------
    model_name, model_sha256
        The model.
    key
        Hash of everything that the result follows from; see :func:`result_key`.
    save_probabilities
        Whether probabilities are written.
    """

    model_name: str
    model_sha256: str
    key: str
    save_probabilities: bool = False


def result_key(scan: Scan, options: Mapping[str, Any]) -> str:
    """Hash what a scan's result follows from: this version, the options, the input files.

    Files count by size and time of modification; links are followed for these, and for nothing
    else.

    Parameters
    ----------
    scan
        The scan.
    options
        JSON values: model hash, target, outputs asked for.
    """
    paths = [path for source in scan.sources for path in (*source.paths, *source.phase)]
    if scan.brain_mask:
        paths.append(scan.brain_mask)
    inputs = []
    for path in paths:
        try:
            status = path.stat()
            inputs.append([str(path.name), status.st_size, status.st_mtime_ns])
        except OSError:
            inputs.append([str(path.name), None, None])
    derivations = [
        [
            source.contrast,
            source.derivation,
            list(source.echo_times),
            list(source.uris),
            source.field_strength,
            source.phase_unit,
        ]
        for source in scan.sources
    ]
    content = json.dumps([__version__, dict(options), inputs, derivations], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def write_scan(
    out: Path,
    scan: Scan,
    images: ScanImages,
    segmentation: Segmentation,
    labels: Sequence[Label],
    provenance: Provenance,
    standard: StandardSpace | None = None,
    figures: Mapping[tuple[str, str], str] | None = None,
    maps: Sequence[MadeMap] = (),
    calibration: Calibration | None = None,
) -> None:
    """Write everything of a scan that went well; the record comes last.

    Parameters
    ----------
    out
        The output folder.
    scan, images, segmentation, labels, provenance, standard
        The scan, and what became of it.
    figures
        SVG texts by ``desc-`` and ``label-`` (empty where a figure has none).
    maps
        What was made from raw echoes.
    calibration
        Of the model, for the flags.

    Raises
    ------
    OutputError, StorageError
        A file cannot be written.
    """
    with alone(out, scan.source_prefix):
        _write_scan(
            out,
            scan,
            images,
            segmentation,
            labels,
            provenance,
            standard,
            figures or {},
            maps,
            calibration,
        )


def _write_scan(
    out: Path,
    scan: Scan,
    images: ScanImages,
    segmentation: Segmentation,
    labels: Sequence[Label],
    provenance: Provenance,
    standard: StandardSpace | None,
    figures: Mapping[tuple[str, str], str],
    maps: Sequence[MadeMap],
    calibration: Calibration | None,
) -> None:
    remove_scan_outputs(out, scan)
    used = [source for source in scan.sources if source.contrast in images.maps]
    # The echoes of one series serve two contrasts.
    sources = list(dict.fromkeys(uri for source in used for uri in source.uris))
    target = scan.get(images.target)
    reference = target.uris[0] if target and target.uris else images.target

    def save(kind: str, data: Array, sidecar: Mapping[str, Any], **extra: str) -> None:
        path = output_path(out, scan.entities, kind, **extra)
        write_image(path, scanner_image(data, images.affine))
        write_json(output_path(out, scan.entities, kind, extension=".json", **extra), sidecar)

    save("dseg", segmentation.labels, dseg_sidecar(sources, reference))
    for label in labels:
        save(
            "mask",
            (segmentation.labels == label.index).astype(np.uint8),
            mask_sidecar(label, sources, reference),
            label=label.abbreviation,
        )
    if provenance.save_probabilities:
        save(
            "probseg",
            np.moveaxis(segmentation.probabilities, 0, -1),
            probseg_sidecar(labels, sources, reference),
        )
    if standard is not None:
        _write_standard(out, scan, sources, standard)
    for made in maps:
        image = nib.Nifti1Image.from_filename(made.path)
        path = output_path(out, scan.entities, made.kind, **made.entities)
        write_image(path, scanner_image(np.asanyarray(image.dataobj), image.affine))
        write_json(path.with_name(path.name.replace(".nii.gz", ".json")), made.sidecar)
    for (desc, abbreviation), svg in figures.items():
        extra = {"label": abbreviation} if abbreviation else {}
        write_text(output_path(out, scan.entities, "figure", desc=desc, **extra), svg)
    rows = measure(
        segmentation.labels,
        segmentation.probabilities,
        labels,
        images.affine,
        {name: images.maps[name] for name in ("qsm", "r2star") if name in images.maps},
        components=segmentation.components,
        guessed=segmentation.guessed,
        contrasts=segmentation.contrasts,
        confidence=segmentation.confidence,
        threshold=0.0 if calibration is None else calibration.threshold,
    )
    write_tsv(output_path(out, scan.entities, "morph"), rows, list(COLUMNS))
    record = _record(scan, "ok", None, provenance, images, maps)
    write_json(output_path(out, scan.entities, "morph", extension=".json"), record)


def scanner_image(data: Array, affine: Array, code: int = 1) -> nib.Nifti1Image:
    """Make an image whose header says which space it is in: 1 the scanner's, 4 MNI."""
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code)
    image.set_qform(affine, code)
    image.header.set_xyzt_units("mm")
    return image


def _write_standard(out: Path, scan: Scan, sources: Sequence[str], standard: StandardSpace) -> None:
    extra = {"space": standard.space, "res": "1"}
    path = output_path(out, scan.entities, "dseg", **extra)
    write_image(path, scanner_image(standard.labels, standard.affine, code=4))
    write_json(
        output_path(out, scan.entities, "dseg", extension=".json", **extra),
        dseg_sidecar(
            sources, space=standard.space, resolution="1 mm isotropic, the template's own grid"
        ),
    )
    with atomic_write(output_path(out, scan.entities, "xfm", to=standard.space)) as temporary:
        temporary.write_bytes(standard.transform.read_bytes())


def write_failure(out: Path, scan: Scan, error: FdlError, provenance: Provenance) -> None:
    """Record that a scan failed; what an earlier run made of it goes, lest the two be mixed."""
    record = _record(scan, "failed", error, provenance)
    with alone(out, scan.source_prefix):
        remove_scan_outputs(out, scan)
        write_json(output_path(out, scan.entities, "morph", extension=".json"), record)


def write_missing(out: Path, subject: str, session: str | None, provenance: Provenance) -> None:
    """Record that a participant or session has no usable contrast.

    Results that an earlier run made of other input stay as they are.
    """
    scan = Scan((("subject", subject), *((("session", session),) if session else ())))
    error = FdlError(
        "no usable contrast was found",
        "name the maps as the documentation says, or give their dataset with --derivatives",
    )
    record = _record(scan, "missing_input", error, provenance)
    with alone(out, scan.source_prefix):
        if _status(out, scan) != "ok":
            remove_scan_outputs(out, scan)
            write_json(output_path(out, scan.entities, "morph", extension=".json"), record)


def remove_missing(out: Path, scan: Scan) -> None:
    """Delete the record that this scan's participant or session had no usable contrast."""
    for names in (("subject",), ("subject", "session")):
        place = Scan(tuple(pair for pair in scan.entities if pair[0] in names))
        if _status(out, place) == "missing_input":
            with alone(out, place.source_prefix):
                remove_scan_outputs(out, place)


def remove_partial(out: Path, scan: Scan) -> None:
    """Delete what an interrupted run has left of a scan: files without the record, the last one."""
    with alone(out, scan.source_prefix):
        if _status(out, scan) is None:
            remove_scan_outputs(out, scan)


def _status(out: Path, scan: Scan) -> object:
    record = read_record(output_path(out, scan.entities, "morph", extension=".json"))
    return record and record.get("Status")


def _record(
    scan: Scan,
    status: str,
    error: FdlError | None,
    provenance: Provenance,
    images: ScanImages | None = None,
    maps: Sequence[MadeMap] = (),
) -> dict[str, Any]:
    told = error and {"Path": error.path, "Cause": error.cause, "Remedy": error.remedy}
    used = {
        source.contrast: list(source.uris)
        for source in scan.sources
        if images is None or source.contrast in images.maps
    }
    voxel = None if images is None else float(abs(np.linalg.det(images.affine[:3, :3])))
    return {
        "Status": status,
        "Error": told,
        "Entities": dict(scan.entities),
        "AppVersion": __version__,
        "ModelName": provenance.model_name,
        "ModelSHA256": provenance.model_sha256,
        "Target": images.target if images else None,
        "InputsUsed": used,
        "Derivations": {
            source.contrast: source.derivation for source in scan.sources if source.contrast in used
        },
        "VoxelSize": None if images is None else spacing_of(images.affine).tolist(),
        "MapsMade": [
            output_path("", scan.entities, made.kind, **made.entities).name for made in maps
        ],
        "VoxelVolume": voxel,
        **scanner_of(scan),
        "BrainVolume": images.brain_volume if images else None,
        "BrainQSM": images.brain_qsm if images else None,
        "Notes": list(images.notes if images else scan.notes),
        "Key": provenance.key,
        **COLUMNS,
    }
