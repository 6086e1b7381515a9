"""The maps that a scan lacks, made from its raw echoes before anything is segmented."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from fdl_bidsapp.bids.inputs import Scan, Source
from fdl_bidsapp.bids.outputs import map_sidecar
from fdl_bidsapp.errors import FdlError, ImageError
from fdl_bidsapp.imaging.grid import in_scanner_space, load_image, onto_grid, same_grid
from fdl_bidsapp.imaging.reconstruction import (
    INVERSIONS,
    Inversion,
    RawEchoes,
    Reconstruction,
    reconstruct,
)
from fdl_bidsapp.imaging.relaxometry import (
    mean_magnitude,
    r2star_from_t2star,
    r2star_loglinear,
)

Array = np.ndarray

DEFAULT_INVERSION = "tv"

FROM_ECHOES = ("reconstruction", "echo_fit", "echo_mean")
"""Derivations of what can be made."""

MEAN = "echomean"
"""Value of ``desc-`` of the echoes' mean, by which it is known as input too."""


@dataclass(frozen=True)
class MadeMap:
    """A map in a file of the work folder, with what has to be told of it.

    Attributes
    ----------
    kind
        Suffix of its name: ``Chimap``, ``R2starmap``, ``T2starmap`` or ``T2starw``.
    path
        NIfTI file.
    sidecar
        JSON values.
    entities
        Further entities of its name, such as ``desc``.
    """

    kind: str
    path: Path
    sidecar: Mapping[str, Any]
    entities: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MadeMaps:
    """What came of the raw echoes.

    Attributes
    ----------
    scan
        The scan with the made maps in the place of its echoes, and without what could not be made.
    maps
        What is to be delivered.
    """

    scan: Scan
    maps: tuple[MadeMap, ...] = ()


def needs_making(scan: Scan) -> bool:
    """Tell whether some contrast of a scan has to be made from raw echoes."""
    return any(source.derivation in FROM_ECHOES for source in scan.sources)


@cache
def recon_identity(recon: str) -> str:
    """Return what a result depends on of ``--recon``: its name, or the hash of a network.

    Raises
    ------
    InputMissingError, ModelError, StorageError
        The network's file is not there, or is no network that reconstructs susceptibility.

    Examples
    --------
    >>> recon_identity("auto")
    'tv'
    """
    if recon in ("never", *INVERSIONS):
        return recon
    if recon == "auto":
        return DEFAULT_INVERSION
    from fdl_bidsapp.models.bundle import load_volume

    return load_volume(recon, "susceptibility").sha256


def make_maps(
    scan: Scan,
    recon: str,
    folder: Path,
    *,
    reference: str = "brain",
    threads: int = 1,
    device: str = "cpu",
) -> MadeMaps:
    """Make the contrasts that a scan has raw echoes for, but no map of.

    Parameters
    ----------
    scan
        From :func:`fdl_bidsapp.bids.inputs.find_scans`.
    recon
        ``auto``, one of :data:`~fdl_bidsapp.imaging.reconstruction.INVERSIONS`, or a
        reconstruction network: ``pedqnet`` or a model file.
    folder
        Where the maps are put.
    reference
        What has susceptibility 0; see :data:`~fdl_bidsapp.imaging.reconstruction.REFERENCES`.
    threads
        CPU threads.
    device
        ``cpu`` or ``cuda``.

    Raises
    ------
    ImageError, InputMissingError
        A magnitude image cannot be used. What is wrong with the phase alone, or with one contrast,
        is a note of the scan, and the rest goes on.
    """
    wanted = {each.contrast: each for each in scan.sources if each.derivation in FROM_ECHOES}
    notes = list(scan.notes)
    maps: list[MadeMap] = []
    paths: dict[str, Path] = {}
    series: dict[tuple[Path, ...], tuple[nib.Nifti1Image, Array]] = {}

    def echoes_of(source: Source) -> tuple[nib.Nifti1Image, Array]:
        if source.paths not in series:
            series[source.paths] = _load_series(source.paths, notes)
        return series[source.paths]

    def save(
        kind: str,
        data: Array,
        source: Source,
        description: str,
        parameters: Mapping[str, Any],
        *,
        contrast: str = "",
        desc: str = "",
    ) -> None:
        reference, _ = echoes_of(source)
        path = folder / f"{desc}{kind}.nii.gz"
        nib.Nifti1Image(data, reference.affine, reference.header).to_filename(path)
        uri = source.uris[0]
        sidecar = map_sidecar(kind, description, source.uris, uri, **parameters)
        maps.append(MadeMap(kind, path, sidecar, {"desc": desc} if desc else {}))
        if contrast:
            paths[contrast] = path

    if source := wanted.get("imag"):
        _, magnitude = echoes_of(source)
        text = "Mean of the echoes' magnitudes"
        save("T2starw", mean_magnitude(magnitude), source, text, {}, contrast="imag", desc=MEAN)
    if source := wanted.get("r2star"):
        _, magnitude = echoes_of(source)
        rate = r2star_loglinear(magnitude, source.echo_times)
        about = {
            "EstimationAlgorithm": "log-linear least squares, weighted by the squared magnitude",
            "EchoTimes": list(source.echo_times),
        }
        text = "Rate of the transverse relaxation; 0 where no decay was seen"
        save("R2starmap", rate, source, text, about, contrast="r2star")
        # The formula is its own inverse.
        text = "Time of the transverse relaxation; 0 where no decay was seen"
        save("T2starmap", r2star_from_t2star(rate), source, text, about)
    if source := wanted.get("qsm") or wanted.get("swi"):
        try:
            how = {"reference": reference, "threads": threads, "device": device}
            made = _reconstruct(source, echoes_of, scan, recon, how, notes)
        except FdlError as error:
            notes.append(f"QSM and SWI were not made: {error}")
        else:
            notes += made.notes
            about = made.parameters
            if "qsm" in wanted:
                text = "Magnetic susceptibility; 0 outside the part of the brain where it is known"
                save("Chimap", made.maps["qsm"], source, text, about, contrast="qsm")
            if "swi" in wanted:
                text = "Susceptibility-weighted image"
                save("T2starw", made.maps["swi"], source, text, about, contrast="swi", desc="swi")
                text = "Minimum-intensity projection of the susceptibility-weighted image"
                save("T2starw", made.maps["mip"], source, text, about, desc="minip")
    sources = tuple(
        replace(each, paths=(paths[each.contrast],), derivation="map", phase=())
        if each.contrast in paths
        else each
        for each in scan.sources
        if each.contrast not in wanted or each.contrast in paths
    )
    return MadeMaps(replace(scan, sources=sources, notes=tuple(notes)), tuple(maps))


def _reconstruct(
    source: Source,
    echoes_of: Any,
    scan: Scan,
    recon: str,
    how: Mapping[str, Any],
    notes: list[str],
) -> Reconstruction:
    reference, magnitude = echoes_of(source)
    image, phase = _load_series(source.phase, notes)
    if not same_grid(image, reference):
        raise ImageError(
            "the phase's shape or affine differs from the magnitude's",
            "convert magnitude and phase of one series together",
            path=source.phase[0],
        )
    if not in_scanner_space(reference.header):
        notes.append(
            f"{source.paths[0].name}: the header does not say how the head lies in the scanner; "
            "the field was taken to point along the third axis"
        )
    echoes = RawEchoes(
        magnitude,
        phase,
        np.asarray(reference.affine, float),
        source.echo_times,
        source.field_strength,
        source.phase_unit,
    )
    brain = _brain(scan.brain_mask, reference, notes)
    if recon in ("auto", *INVERSIONS):
        name = DEFAULT_INVERSION if recon == "auto" else recon
        return reconstruct(echoes, name, brain=brain, **how)
    invert, description = network_inversion(recon, how["device"])
    made = reconstruct(echoes, invert, brain=brain, **how)
    return replace(made, parameters={**made.parameters, "DipoleInversion": description})


def network_inversion(model: str, device: str = "cpu") -> tuple[Inversion, str]:
    """Make an inversion of a reconstruction network, and say which one it is.

    Parameters
    ----------
    model
        Name of a shipped network, or a model file.
    device
        ``cpu`` or ``cuda``.

    Raises
    ------
    InputMissingError, ModelError, StorageError
        As :func:`fdl_bidsapp.models.bundle.load_volume`.
    """
    from fdl_bidsapp.models.bundle import load_volume
    from fdl_bidsapp.models.pedqnet import predict_susceptibility

    bundle = load_volume(model, "susceptibility")
    network = bundle.network(device)

    def invert(
        local: Array, mask: Array, spacing: Sequence[float], direction: Array, *_: object
    ) -> Array:
        return predict_susceptibility(network, bundle.spec, local, mask, spacing, direction, device)

    return invert, f"network {bundle.spec.name}, SHA-256 {bundle.sha256}"


def _load_series(paths: Sequence[Path], notes: list[str]) -> tuple[nib.Nifti1Image, Array]:
    """Read the echoes of one series into an (X, Y, Z, E) float32 array."""
    loaded = [load_image(path) for path in paths]
    first = loaded[0].image
    for path, one in zip(paths, loaded, strict=True):
        notes.extend(note for note in one.notes if note not in notes)
        if not same_grid(one.image, first):
            raise ImageError(
                "this echo's shape or affine differs from the first echo's",
                "convert the echoes of one series together",
                path=path,
            )
    return first, np.stack([np.asarray(one.image.dataobj, np.float32) for one in loaded], -1)


def _brain(path: Path | None, reference: nib.Nifti1Image, notes: list[str]) -> Array | None:
    """Read the scan's brain mask on the echoes' grid; ``None``, with a note, if it is of no use."""
    if path is None:
        return None
    try:
        image = load_image(path).image
    except FdlError as error:
        notes.append(f"the brain was looked for in the magnitude: {error}")
        return None
    onto = onto_grid(image, reference)
    if onto is None:
        notes.append(
            f"the brain was looked for in the magnitude: the grid of {path.name} differs from that "
            "of the echoes and the headers do not say how the two lie in the scanner"
        )
        return None
    if onto is not image:
        notes.append("the brain mask was resampled to the grid of the echoes")
    mask = np.asarray(onto.dataobj) > 0.5
    if not mask.any():
        notes.append(f"{path.name} is empty: the brain was looked for in the magnitude")
        return None
    return mask
