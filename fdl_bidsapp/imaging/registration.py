"""Registration to the standard space, with ANTs.

ANTs works in LPS coordinates and nibabel in RAS; `to_ants` and `from_ants` are the only places
where an image crosses between them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import product
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fdl_bidsapp.errors import ImageError
from fdl_bidsapp.imaging.grid import (
    Grid,
    canonical,
    canvas_geometry,
    conform,
    foreground,
    spacing_of,
)
from fdl_bidsapp.imaging.intensity import robust

if TYPE_CHECKING:
    import ants

TEMPLATE = "MNI152NLin2009aSym"

UPPER_HEAD_MM = 120.0
"""From the vertex down to where heads and brains are still much alike; the neck is not."""

AFFINE_LEVELS_MM = (6.0, 4.0, 2.0, 1.0)
"""Resolutions of the affine stage."""

COARSE_MM = 2.0
"""Spacing at which bias field and brain are found; both are large."""

SCALP_MM = 8.0
"""Scalp and skull together are thicker than this, so that hardly any brain lies nearer the air."""

SMALLEST_BRAIN_ML = 200.0
"""What a thin slab may hold of a brain."""

LPS = np.diag([-1.0, -1.0, 1.0])

Interpolation = Literal["linear", "genericLabel"]


def template() -> nib.Nifti1Image:
    """Return the ICBM 2009a symmetric T1 brain at 1 mm that comes with nilearn.

    It is part of the installed package: nothing is fetched.
    """
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=1)
    return nib.Nifti1Image(np.asarray(image.dataobj, dtype=np.float32), image.affine)


def to_ants(image: nib.Nifti1Image) -> ants.ANTsImage:
    """Return a 3-D nibabel image as an ANTs image at the same place."""
    import ants

    spacing = spacing_of(image.affine)
    return ants.from_numpy(
        np.asarray(image.dataobj, dtype=np.float32),
        origin=[float(value) for value in LPS @ image.affine[:3, 3]],
        spacing=[float(value) for value in spacing],
        direction=LPS @ image.affine[:3, :3] / spacing,
    )


def from_ants(image: ants.ANTsImage) -> nib.Nifti1Image:
    """Return a 3-D ANTs image as a nibabel image at the same place."""
    affine = np.eye(4)
    affine[:3, :3] = LPS @ np.asarray(image.direction) * image.spacing
    affine[:3, 3] = LPS @ np.asarray(image.origin)
    return nib.Nifti1Image(image.numpy(), affine)


@dataclass(frozen=True)
class Registration:
    """The way from a scan to the template and back.

    Attributes
    ----------
    forward, inverse
        Composite transform files (affine and warp in one) that ``antsApplyTransforms`` takes: scan
        to template, template to scan.
    template, native
        The two grids.
    """

    forward: Path
    inverse: Path
    template: nib.Nifti1Image
    native: nib.Nifti1Image

    def apply(
        self,
        image: nib.Nifti1Image,
        interpolation: Interpolation = "linear",
        *,
        inverse: bool = False,
    ) -> nib.Nifti1Image:
        """Bring an image of the scan to the template's grid, or with ``inverse`` the other way.

        Parameters
        ----------
        image
            3-D, on any grid in the space that is left.
        interpolation
            ``linear`` for maps; ``genericLabel`` for label maps, which keep their data type.

        Raises
        ------
        ValueError
            There is no such interpolation.
        """
        import ants

        if interpolation not in ("linear", "genericLabel"):
            raise ValueError(f"unknown interpolation {interpolation!r}")
        moved = from_ants(
            ants.apply_transforms(
                fixed=to_ants(self.native if inverse else self.template),
                moving=to_ants(image),
                transformlist=[str(self.inverse if inverse else self.forward)],
                interpolator=interpolation,
            )
        )
        if interpolation == "linear":
            return moved
        labels = np.rint(moved.get_fdata()).astype(image.get_data_dtype())
        return nib.Nifti1Image(labels, moved.affine)

    def save_composite(self, path: str | PathLike[str], *, inverse: bool = False) -> None:
        """Copy the scan-to-template transform (or the inverse) to ``path``, an ``.h5`` file."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        shutil.copyfile(self.inverse if inverse else self.forward, partial)
        partial.replace(path)

    def inverse_error(self, step_mm: float = 8.0) -> float:
        """Return the mean distance, in mm, of template brain points from where both ways lead them.

        Parameters
        ----------
        step_mm
            Distance between the points.
        """
        import ants
        import pandas as pd

        data = np.asarray(self.template.dataobj)
        stride = np.maximum(np.round(step_mm / spacing_of(self.template.affine)), 1).astype(int)
        brain = np.argwhere(data[tuple(slice(None, None, n) for n in stride)] > 0) * stride
        affine = LPS @ self.template.affine[:3]
        points = pd.DataFrame(brain @ affine[:, :3].T + affine[:, 3], columns=["x", "y", "z"])
        there = ants.apply_transforms_to_points(3, points, [str(self.forward)])
        back = ants.apply_transforms_to_points(3, there[["x", "y", "z"]], [str(self.inverse)])
        return float(np.linalg.norm(back[["x", "y", "z"]].values - points.values, axis=1).mean())


def register_to_template(
    moving: nib.Nifti1Image,
    template: nib.Nifti1Image,
    folder: str | PathLike[str],
    seed: int = 0,
) -> Registration:
    """Register a scan to the template: affine, then SyN [1]_, both by mutual information.

    Parameters
    ----------
    moving
        iMag, or the target map where there is none; the whole head or the brain alone.
    template
        A skull-stripped brain, 0 outside.
    folder
        Where transforms and temporary files go; made if need be.
    seed
        For the voxels that the affine stage samples.

    Returns
    -------
    Registration

    Raises
    ------
    ImageError
        ANTs found no transform.

    Notes
    -----
    The template has no scalp and would be laid over that of a whole head, so a scan without
    negative values is corrected for its bias field (N4 [2]_) and roughly stripped first. The two
    brains start with the centroids of their upper 120 mm on each other. The affine stage sees the
    brains' outlines; SyN is measured within the template's brain alone, so that an outline stripped
    too tightly or too widely does not bend what lies inside.

    ANTs is given the seed and one thread, which makes runs on one machine the same. ITK reads the
    number of threads once: a process that used ANTs before with more threads keeps them, and then
    sums may differ in their last bits.

    .. [1] Avants BB et al., Med Image Anal 2008;12:26-41.
    .. [2] Tustison NJ et al., IEEE Trans Med Imaging 2010;29:1310-1320.
    """
    import ants

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ants.config.set_ants_deterministic(True, seed)

    scan = _prepared(moving, template)
    brain = (np.asarray(template.dataobj) > 0).astype(np.float32)
    shift = _upper_centroid(scan) - _upper_centroid(template)
    start = folder / "start.mat"
    translation = ants.create_ants_transform(
        transform_type="Euler3DTransform", dimension=3, translation=LPS @ shift
    )
    ants.write_transform(translation, str(start))
    fixed, floating = to_ants(template), to_ants(scan)
    levels = tuple(max(round(mm / spacing_of(template.affine).min()), 1) for mm in AFFINE_LEVELS_MM)
    try:
        affine = ants.registration(
            fixed=fixed,
            moving=floating,
            type_of_transform="Affine",
            initial_transform=str(start),
            outprefix=str(folder / "affine_"),
            aff_shrink_factors=levels,
            aff_smoothing_sigmas=tuple(level / 2 if level > 1 else 0 for level in levels),
        )
        result = ants.registration(
            fixed=fixed,
            moving=floating,
            type_of_transform="SyNOnly",
            initial_transform=affine["fwdtransforms"][0],
            outprefix=str(folder / "scan-to-template_"),
            mask=to_ants(nib.Nifti1Image(brain, template.affine)),
            mask_all_stages=True,
            write_composite_transform=True,
        )
    except RuntimeError as error:
        raise ImageError(
            "the scan could not be registered to the template",
            "check its orientation and field of view, or leave the output space out",
        ) from error
    return Registration(
        Path(result["fwdtransforms"]), Path(result["invtransforms"]), template, moving
    )


def register_features(
    moving: nib.Nifti1Image,
    fixed: nib.Nifti1Image,
    moving_features: NDArray[np.float32],
    fixed_features: NDArray[np.float32],
    folder: str | PathLike[str],
    seed: int = 0,
) -> Registration:
    """Register two images whatever their contrasts, with features as further metrics.

    An affine stage by the mutual information of the images is followed by SyN, in which every
    feature channel is a metric of its own (mean squares) beside that information.

    Parameters
    ----------
    moving, fixed
        3-D images.
    moving_features, fixed_features : (C, X, Y, Z) arrays
        On the images' grids; see :func:`fdl_bidsapp.models.cifl.compute_features`.
    folder
        Where transforms go; made if need be.
    seed
        For the voxels that the affine stage samples.

    Returns
    -------
    Registration
        ``template`` is ``fixed``, ``native`` is ``moving``.

    Raises
    ------
    ImageError
        ANTs found no transform.
    ValueError
        The features have unlike channels or do not lie on the images' grids.
    """
    import ants

    if (
        len(moving_features) != len(fixed_features)
        or moving_features.shape[1:] != moving.shape
        or fixed_features.shape[1:] != fixed.shape
    ):
        raise ValueError("features need the same channels, on the grids of their images")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ants.config.set_ants_deterministic(True, seed)

    def channel(data: NDArray[np.float32], image: nib.Nifti1Image) -> ants.ANTsImage:
        return to_ants(nib.Nifti1Image(data, image.affine))

    pairs = [
        (channel(f, fixed), channel(m, moving))
        for f, m in zip(fixed_features, moving_features, strict=True)
    ]
    target, source = to_ants(fixed), to_ants(moving)
    try:
        affine = ants.registration(
            fixed=target,
            moving=source,
            type_of_transform="Affine",
            outprefix=str(folder / "affine_"),
        )
        result = ants.registration(
            fixed=target,
            moving=source,
            type_of_transform="SyNOnly",
            initial_transform=affine["fwdtransforms"][0],
            outprefix=str(folder / "features_"),
            multivariate_extras=[("meansquares", f, m, 1.0, 0) for f, m in pairs],
            write_composite_transform=True,
        )
    except RuntimeError as error:
        raise ImageError(
            "the images could not be registered", "check that they show the same anatomy"
        ) from error
    return Registration(Path(result["fwdtransforms"]), Path(result["invtransforms"]), fixed, moving)


def _prepared(moving: nib.Nifti1Image, template: nib.Nifti1Image) -> nib.Nifti1Image:
    """Return the scan's brain at the template's spacing, evened out, in [0, 1], 0 outside."""
    x, y, z = (float(value) for value in spacing_of(template.affine))
    scan = canonical(moving)
    shape, affine, _ = canvas_geometry(scan, Grid((1, 1, 1), (x, y, z)))
    data = conform(scan, shape, affine)
    if data.min() < 0:
        inside = foreground(data)
    else:
        bias, brain = _bias_and_brain(scan)
        data = data / np.maximum(conform(bias, shape, affine), 0.1)
        inside = conform(brain, shape, affine) > 0.5
    return nib.Nifti1Image(np.where(inside, robust(data), np.float32(0)), affine)


def _bias_and_brain(scan: nib.Nifti1Image) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    import ants

    shape, affine, _ = canvas_geometry(scan, Grid((1, 1, 1), (COARSE_MM,) * 3))
    data = conform(scan, shape, affine)
    head = foreground(data)
    bias = ants.n4_bias_field_correction(
        to_ants(nib.Nifti1Image(robust(data), affine)),
        to_ants(nib.Nifti1Image(head.astype(np.float32), affine)),
        shrink_factor=4,
        convergence={"iters": [20] * 4, "tol": 1e-4},
        return_bias_field=True,
    ).numpy()
    brain = _stripped(data / np.maximum(bias, 0.1), head, affine)
    return nib.Nifti1Image(bias, affine), nib.Nifti1Image(brain.astype(np.float32), affine)


def _stripped(
    data: NDArray[np.float32], head: NDArray[np.bool_], affine: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Return the brain within a head whose skull is dark; all of it where no brain comes loose.

    Ever deeper erosion of ever brighter tissue cuts the bridges between brain and scalp, until the
    largest piece keeps its distance from the air; dilation then gives the piece its size back.
    """
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    outer = _depth(head, affine) < SCALP_MM
    level = np.median(data[head])
    for depth, share in product((2.0, 3.0, 4.0, 5.0, 6.0, 8.0), (0.5, 0.7, 0.8, 0.9)):
        eroded = _depth(head & (data > share * level), affine) > depth
        regions, n = ndimage.label(eroded)
        if n == 0:
            continue
        core = regions == 1 + np.bincount(regions.ravel())[1:].argmax()
        brain = _depth(~core, affine) <= depth
        size = np.count_nonzero(brain)
        loose = np.count_nonzero(brain & outer) < 0.02 * size
        if loose and size * voxel_ml >= SMALLEST_BRAIN_ML:
            return ndimage.binary_fill_holes(brain)
    return head


def _depth(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distance of each voxel of a mask from its border, in mm; 0 outside."""
    return ndimage.distance_transform_edt(mask, sampling=spacing_of(affine))


def _upper_centroid(brain: nib.Nifti1Image) -> NDArray[np.float64]:
    """Return the centroid, in RAS mm, of an image in RAS axes down to 120 mm below its top."""
    mask = np.asarray(brain.dataobj) > 0
    top = int(np.flatnonzero(mask.any(axis=(0, 1)))[-1])
    low = max(top - round(UPPER_HEAD_MM / spacing_of(brain.affine)[2]), 0)
    x, y, z = np.argwhere(mask[:, :, low:]).mean(axis=0)
    return brain.affine[:3] @ [x, y, z + low, 1.0]
