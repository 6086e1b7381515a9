"""A head label map made into a new head on a scan's grid, on CPU or GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fdl_bidsapp.imaging.grid import spacing_of
from fdl_bidsapp.labels import mirrored, nuclei
from fdl_bidsapp.physics.forward import smooth
from fdl_bidsapp.simulation.geometry import rotation, smooth_noise
from fdl_bidsapp.simulation.labelmaps import INTRACRANIAL, PARENCHYMA, HeadMap, Nucleus
from fdl_bidsapp.simulation.parameters import Values, generator
from fdl_bidsapp.simulation.tissue import Tissue
from fdl_bidsapp.simulation.veins import paint_tube

Array = np.ndarray
Tensor = torch.Tensor
Box = tuple[slice, slice, slice]

BRAIN = INTRACRANIAL | {"venous_blood", "arterial_blood"}
"""Tissues whose susceptibility a map can show; air and bone make background field."""

WARP_REACH = 160.0
"""mm from the middle of the head within which it is bent."""

WARP_STEP = 5.0
"""mm between the points at which the bending is kept."""

LATTICE = 1.6
"""mm between the random numbers that the fine texture is made of."""

OUTLINE_EDGE = 0.3
"""Width in mm of the transition at which a rater's outline is counted into voxels."""

REGION = 42.0
"""mm around the middle of the nuclei in which small veins and micro-bleeds are put."""


def sample(volume: Tensor, voxels: Tensor, mode: str = "bilinear") -> Tensor:
    """Interpolate a volume at points; beyond it, its border goes on.

    Parameters
    ----------
    volume : (C, X, Y, Z) tensor
    voxels : (3, ...) tensor
        Points in voxels.
    mode
        ``bilinear`` or ``nearest``.

    Returns
    -------
    (C, ...) tensor

    Examples
    --------
    >>> ramp = torch.arange(4.0).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    >>> sample(ramp, torch.tensor([[1.5], [0.0], [1.0]])).tolist()
    [[1.5]]
    """
    size = torch.tensor(volume.shape[1:], device=volume.device, dtype=torch.float32)
    grid = voxels.reshape(3, 1, 1, -1).movedim(0, -1)
    # An axis of a single voxel has no extent to normalise by.
    grid = grid * (2 / (size - 1).clamp(min=1)) - 1
    found = F.grid_sample(
        volume[None].float(), grid.flip(-1)[None], mode, "border", align_corners=True
    )
    return found.reshape(volume.shape[0], *voxels.shape[1:])


def transform(matrix: Array, points: Tensor) -> Tensor:
    """Apply a 4 × 4 matrix to (3, ...) points."""
    m = torch.as_tensor(np.asarray(matrix, np.float32), device=points.device)
    flat = points.reshape(3, -1)
    return (m[:3, :3] @ flat + m[:3, 3:]).reshape(points.shape)


def grid_points(shape: Sequence[int], affine: Array, device: torch.device | str) -> Tensor:
    """Return the (3, X, Y, Z) places of a grid's voxels, mm."""
    m = torch.as_tensor(np.asarray(affine, np.float32), device=device)
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in shape]
    i, j, k = (a.reshape([-1 if b == axis else 1 for b in range(3)]) for axis, a in enumerate(axes))
    return torch.stack([m[r, 0] * i + m[r, 1] * j + m[r, 2] * k + m[r, 3] for r in range(3)])


def smooth_field(
    rng: np.random.Generator,
    shape: Sequence[int],
    spacing: Sequence[float],
    scale: float,
    device: torch.device | str,
) -> Tensor:
    """Return an (X, Y, Z) field that varies over ``scale`` mm, of mean 0 and deviation 1."""
    step = max(scale / 4, 1.0)
    coarse = [max(2, int(np.ceil(n * h / step)) + 1) for n, h in zip(shape, spacing, strict=True)]
    noise = smooth_noise(rng, coarse, (step, step, step), scale)
    noise = (noise - noise.mean()) / max(float(noise.std()), 1e-6)
    field = torch.from_numpy(noise).to(device)[None, None]
    return F.interpolate(field, tuple(shape), mode="trilinear", align_corners=True)[0, 0]


@dataclass(frozen=True)
class Deformation:
    """From scanner coordinates to those of a label map, mm.

    Attributes
    ----------
    matrix
        (4, 4) array: the affine part, applied after the bending.
    warp
        (3, N, N, N) tensor: displacement in the scanner, mm.
    flipped
        Whether left and right are exchanged.
    """

    matrix: Array
    warp: Tensor
    flipped: bool

    def __call__(self, points: Tensor) -> Tensor:
        """Return where (3, ...) points of the scanner lie in the label map, mm."""
        return transform(self.matrix, points + self._displacement(points))

    def inverse(self, points: Array) -> Array:
        """Return where (N, 3) points of the label map lie in the scanner, mm."""
        back = np.linalg.inv(self.matrix)
        straight = points @ back[:3, :3].T + back[:3, 3]
        found = straight
        for _ in range(8):
            at = torch.as_tensor(found.T.astype(np.float32), device=self.warp.device)
            found = straight - self._displacement(at).cpu().numpy().T
        return found

    def _displacement(self, points: Tensor) -> Tensor:
        return sample(self.warp, (points + WARP_REACH) / WARP_STEP)


def draw_deformation(head: HeadMap, seed: Sequence[int] | int, values: Values) -> Deformation:
    """Draw position, size and form of a head; its brain is about the scanner's origin.

    Parameters
    ----------
    head
        The label map.
    seed
        The same gives the same head on any grid.
    values
        Value of each effect.
    """
    p = values
    rng = generator(seed, "head")
    angles = rng.uniform(-1, 1, 3) * float(p["head_rotation"])
    shift = rng.uniform(-1, 1, 3) * float(p["head_shift"])
    # In all and along an axis together, within the limit.
    size = float(p["head_scaling"])
    scales = 1 + size * (0.6 * rng.uniform(-1, 1) + 0.4 * rng.uniform(-1, 1, 3))
    flipped = p["mirrored"] == "yes"
    linear = np.diag([-1.0 if flipped else 1.0, 1, 1]) @ np.diag(1 / scales) @ rotation(angles).T
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = head.brain_centre - linear @ shift
    n = round(2 * WARP_REACH / WARP_STEP) + 1
    shape, spacing = (n, n, n), (WARP_STEP,) * 3
    noise = generator(seed, "warp of the head")
    # Most of the bending is wide; what is left is narrow enough to change single structures.
    warp = [
        0.85 * smooth_noise(noise, shape, spacing, 60)
        + 0.53 * 0.6 * smooth_noise(noise, shape, spacing, 28)
        for _ in range(3)
    ]
    displacement = torch.from_numpy(float(p["head_warp"]) * np.stack(warp))
    return Deformation(matrix, displacement.float().to(head.tissue.device), flipped)


@dataclass
class Body:
    """What a scan sees of a head, on its grid.

    Attributes
    ----------
    chi
        (X, Y, Z) tensor: susceptibility in ppm.
    r2star
        (X, Y, Z) tensor: 1/s.
    rho
        (X, Y, Z) tensor: signal at echo time zero.
    brain
        (X, Y, Z) tensor: share of each voxel that brain, fluid and blood fill.
    depth
        (X, Y, Z) tensor: distance from the brain's surface in mm, positive inside.
    outlines
        For each nucleus that is in the grid: index in the label table, part of the grid, share of
        each of its voxels that a rater outlines.
    """

    chi: Tensor
    r2star: Tensor
    rho: Tensor
    brain: Tensor
    depth: Tensor
    outlines: list[tuple[int, Box, Tensor]]


def coarse_susceptibility(
    head: HeadMap,
    deformation: Deformation,
    tissues: dict[str, Tissue],
    shape: Sequence[int],
    affine: Array,
) -> Tensor:
    """Return the head's susceptibility in ppm on a coarse grid, without nuclei and small things.

    Parameters
    ----------
    head, deformation, tissues
        As for :func:`build_body`.
    shape, affine
        The grid.

    Returns
    -------
    (X, Y, Z) tensor
    """
    table = torch.tensor([[tissues[name].chi for name in head.tissues]], device=head.tissue.device)
    return _tissue_maps(head, deformation, shape, affine, table)[0][0]


def build_body(
    head: HeadMap,
    deformation: Deformation,
    tissues: dict[str, Tissue],
    values: Values,
    seed: Sequence[int] | int,
    shape: Sequence[int],
    affine: Array,
) -> Body:
    """Put a deformed head, its nuclei, veins and lesions on a grid.

    Parameters
    ----------
    head
        The label map.
    deformation
        As :func:`draw_deformation` gives it.
    tissues
        As :func:`~fdl_bidsapp.simulation.physiology.draw_properties` gives them.
    values
        Value of each effect.
    seed
        The same gives the same head.
    shape, affine
        The grid.

    Returns
    -------
    Body
    """
    device = head.tissue.device
    rows = [
        [t.chi for t in (tissues[n] for n in head.tissues)],
        [t.rho for t in (tissues[n] for n in head.tissues)],
        # Weighted by signal, as tissue that gives none has no part in the decay.
        [t.rho * t.r2star for t in (tissues[n] for n in head.tissues)],
        [float(n in PARENCHYMA) for n in head.tissues],
        [float(n in BRAIN) for n in head.tissues],
    ]
    maps, depth = _tissue_maps(head, deformation, shape, affine, torch.tensor(rows, device=device))
    body = _Painter(maps[0], maps[1], maps[2], maps[3], depth, [])
    order = mirrored(nuclei())
    free = torch.ones_like(depth)
    # Where two nuclei meet, the first one stays whole: it had better be the smaller one.
    for position in sorted(range(len(head.nuclei)), key=lambda i: head.nuclei[i].reach):
        nucleus = head.nuclei[position]
        # A mirrored head's left nucleus lies on the right.
        index = nuclei()[order[position] if deformation.flipped else position].index
        _paint_nucleus(body, free, nucleus, index, deformation, tissues, values, seed, affine)
    _paint_veins(body, free, head, deformation, tissues, values, seed, affine)
    _paint_lesions(body, head, deformation, tissues, values, seed, affine)
    _add_texture(body, values, seed, spacing_of(affine).tolist())
    return Body(
        body.chi,
        (body.decay / body.rho.clamp(min=1e-3)).clamp(min=0),
        body.rho,
        maps[4],
        depth,
        body.done,
    )


@dataclass
class _Painter:
    """The maps while things are put in; ``decay`` is R2* times signal."""

    chi: Tensor
    rho: Tensor
    decay: Tensor
    parenchyma: Tensor
    depth: Tensor
    done: list[tuple[int, Box, Tensor]]

    def put(self, box: Box, share: Tensor, chi: Tensor | float, r2star: float, rho: float) -> None:
        """Replace a share of each voxel of a part of the grid."""
        for data, value in ((self.chi, chi), (self.rho, rho), (self.decay, rho * r2star)):
            data[box] += share * (value - data[box])


def _tissue_maps(
    head: HeadMap,
    deformation: Deformation,
    shape: Sequence[int],
    affine: Array,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return tissue properties, given as (P, tissues), and the depth in the brain on a grid."""
    device = table.device
    x, y, z = shape
    width = max(1.0, float(np.prod(spacing_of(affine)) ** (1 / 3)))
    maps = torch.empty((len(table), x, y, z), device=device)
    depth = torch.empty((x, y, z), device=device)
    # In blocks, which bounds the memory on fine grids.
    block = max(1, 4_000_000 // (y * z))
    for start in range(0, x, block):
        part = slice(start, min(start + block, x))
        moved = np.array(affine, float)
        moved[:3, 3] += affine[:3, 0] * start
        places = deformation(grid_points((part.stop - start, y, z), moved, device))
        depth[part] = sample(head.brain_depth, transform(head.depth_to_voxel, places))[0]
        voxels = transform(head.to_voxel, places)
        # The neck goes on below the label map, as it is where smoothing does not reach its cut.
        voxels[2].clamp_(min=head.lowest + 2 * width / head.spacing[2])
        low = voxels.flatten(1).amin(1).floor().long().tolist()
        high = voxels.flatten(1).amax(1).ceil().long().tolist()
        crop = tuple(
            slice(min(max(a, 0), n - 2), min(max(b, 1), n - 1) + 1)
            for a, b, n in zip(low, high, head.tissue.shape, strict=True)
        )
        # It takes the steps out of the label map's surfaces, and gives wide voxels their share.
        volume = smooth(table[:, head.tissue[crop].long()], head.spacing, width)
        first = torch.tensor([s.start for s in crop], device=device)
        maps[:, part] = sample(volume, voxels - first.reshape(3, 1, 1, 1))
    return maps, depth


def _paint_nucleus(
    body: _Painter,
    free: Tensor,
    nucleus: Nucleus,
    index: int,
    deformation: Deformation,
    tissues: dict[str, Tissue],
    values: Values,
    seed: Sequence[int] | int,
    affine: Array,
) -> None:
    """Give a nucleus its own place, size and form, and put it in."""
    p = values
    rng = generator(seed, f"nucleus {nucleus.label.abbreviation}")
    # What neighbours share of their displacement keeps them from overlapping.
    group = "dentate" if nucleus.label.structure == "dentate_nucleus" else "midbrain"
    shared = generator(seed, f"shift of {group} {nucleus.label.hemisphere}")
    shift = np.sqrt(0.5) * (shared.normal(0, 1, 3) + rng.normal(0, 1, 3))
    shift = shift * float(p["nucleus_shift"])
    size = float(p["nucleus_scaling"])
    scales = np.exp(size * np.clip(rng.normal(0, 0.7) + rng.normal(0, 0.7, 3), -2.5, 2.5))
    turn = rotation(rng.normal(0, 1, 3) * float(p["nucleus_rotation"]))
    bend = float(p["nucleus_warp"])
    lattice = (17, 17, 17)
    warp = np.stack([smooth_noise(rng, lattice, (3, 3, 3), 7) for _ in range(3)])

    reach = nucleus.reach * float(scales.max()) + np.abs(shift).max() + 3 * bend + 3
    region = _box(deformation.inverse(nucleus.centre[None])[0], reach, affine, body.chi.shape)
    if region is None:
        return
    box, points = region
    points = points.to(body.chi.device)
    offset = deformation(points)
    middle = torch.as_tensor(nucleus.centre + shift, dtype=torch.float32, device=points.device)
    offset = offset - middle.reshape(3, 1, 1, 1)
    own = np.eye(4)
    own[:3, :3] = np.diag(1 / scales) @ turn.T
    offset = transform(own, offset)
    bending = torch.from_numpy(bend * warp).float().to(points.device)
    offset = offset + sample(bending, offset / 3 + 8)
    depth = sample(nucleus.depth, transform(nucleus.to_voxel, offset))[0]
    depth = depth * float(scales.mean())

    room = (free[box] * body.parenchyma[box]).clamp(0, 1)
    outline = torch.minimum((0.5 + depth / OUTLINE_EDGE).clamp(0, 1), room)
    share = torch.minimum((0.5 + depth / float(p["nucleus_edge"])).clamp(0, 1), room)
    free[box] -= torch.maximum(share, outline)
    body.done.append((index, box, outline))

    tissue = tissues[nucleus.label.structure]
    axes = torch.as_tensor(nucleus.axes, dtype=torch.float32, device=points.device)
    along = torch.tensordot(axes, offset, 1)
    slope = rng.normal(0, 1, 3) * float(p["nucleus_gradient"]) / nucleus.radii
    iron = 1 + sum(float(s) * a for s, a in zip(slope, along, strict=True))
    iron = iron.clamp(0.2, 2.0)
    if nucleus.label.structure == "dentate_nucleus":
        pattern = _dentate(rng, depth, along, offset, nucleus, deformation, p)
        # The table's values are means over what raters outline: the sheet itself holds more.
        held = float((share * pattern).sum() / share.sum().clamp(min=1e-6))
        iron = iron * min(max(held, 0.3) ** -0.8, 1.7)
        share = share * pattern
    around = body.chi[box]
    chi = around + (tissue.chi - around) * iron
    r2star = body.decay[box] / body.rho[box].clamp(min=1e-3)
    fast = r2star + (tissue.r2star - r2star) * iron
    body.chi[box] = around + share * (chi - around)
    rho = body.rho[box]
    body.decay[box] += share * (tissue.rho * fast.clamp(min=0.5) - body.decay[box])
    body.rho[box] = rho + share * (tissue.rho - rho)


def _dentate(
    rng: np.random.Generator,
    depth: Tensor,
    along: Tensor,
    offset: Tensor,
    nucleus: Nucleus,
    deformation: Deformation,
    values: Values,
) -> Tensor:
    """Return how much of the dentate's outline is grey matter: a folded sheet around its hilum.

    The sheet runs below the surface, nearer and farther in waves that are its folds. Its hilum
    opens towards the midline and the front.
    """
    deepest = float(nucleus.depth.max())
    thickness = rng.uniform(1.1, 2.0)
    lengths = rng.uniform(3.0, 5.5, 2)
    angle = rng.uniform(0, np.pi)
    phases = rng.uniform(0, 2 * np.pi, 2)
    first = along[0] * np.cos(angle) + along[1] * np.sin(angle)
    second = along[1] * np.cos(angle) - along[0] * np.sin(angle)
    # The folds wander.
    first = first + 0.7 * torch.sin(second / 2 + float(phases[1]))
    wave = torch.cos(2 * np.pi * first / float(lengths[0]) + float(phases[0]))
    wave = 0.7 * wave + 0.3 * torch.cos(2 * np.pi * second / float(lengths[1]) + float(phases[1]))
    middle = 0.4 * deepest + 0.3 * deepest * wave
    edge = float(values["nucleus_edge"]) / 2
    sheet = (0.5 + (thickness / 2 - (depth - middle).abs()) / edge).clamp(0, 1)
    left = nucleus.label.hemisphere == "L"
    towards = np.array([1.0 if left else -1.0, rng.uniform(0.2, 0.9), rng.uniform(0.0, 0.7)])
    towards /= np.linalg.norm(towards)
    medial = sum(float(t) * o for t, o in zip(towards, offset, strict=True))
    aside = (offset**2).sum(0) - medial**2
    width = rng.uniform(2.0, 4.0)
    mouth = ((medial - 0.5) / 1.5).clamp(0, 1) * torch.exp(-aside / (2 * width**2))
    sheet = sheet * (1 - mouth)
    inner = ((depth - middle) / edge).clamp(0, 1)
    inner = torch.maximum(inner, mouth)
    pale = inner * float(values["dentate_hilum"]) + (1 - inner) * float(values["dentate_folding"])
    return 1 - pale * (1 - sheet)


def _box(
    centre: Array, reach: float, affine: Array, shape: Sequence[int]
) -> tuple[Box, Tensor] | None:
    """Return the part of a grid within ``reach`` mm of a point, and where its voxels lie."""
    inverse = np.linalg.inv(affine)
    middle = inverse[:3, :3] @ centre + inverse[:3, 3]
    half = np.linalg.norm(inverse[:3, :3], axis=1) * reach
    low = np.maximum(np.floor(middle - half), 0).astype(int)
    high = np.minimum(np.ceil(middle + half) + 1, shape).astype(int)
    if np.any(low >= high):
        return None
    x, y, z = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    moved = np.array(affine, float)
    moved[:3, 3] += affine[:3, :3] @ low
    return (x, y, z), grid_points(high - low, moved, "cpu")


def _paint_veins(
    body: _Painter,
    free: Tensor,
    head: HeadMap,
    deformation: Deformation,
    tissues: dict[str, Tissue],
    values: Values,
    seed: Sequence[int] | int,
    affine: Array,
) -> None:
    """Put thin veins around the nuclei, most of them around the midbrain."""
    rng = generator(seed, "veins")
    spacing = spacing_of(affine)
    to_voxel = np.linalg.inv(affine)
    share = np.zeros(body.chi.shape, np.float32)
    middle = deformation.inverse(head.nuclei_centre[None])[0]
    for _ in range(int(values["veins"])):
        start = middle + rng.normal(0, 0.45, 3) * REGION
        direction = rng.normal(0, 1, 3)
        direction /= np.linalg.norm(direction)
        bend = np.cross(direction, rng.normal(0, 1, 3)) * rng.uniform(0, 0.4)
        length, radius = rng.uniform(10, 45), rng.uniform(0.3, 1.2) ** 1.5
        t = np.arange(0, length, 0.5 * min(1.0, float(spacing.min())))[:, None]
        course = start + direction * t + bend * length * np.sin(np.pi * t / length)
        paint_tube(share, course @ to_voxel[:3, :3].T + to_voxel[:3, 3], radius, spacing)
    vein = torch.from_numpy(share).to(body.chi.device) * free.clamp(0, 1)
    vein = vein * (body.depth > 0)
    blood = tissues["venous_blood"]
    body.put((slice(None),) * 3, vein, blood.chi, blood.r2star, blood.rho)


def _paint_lesions(
    body: _Painter,
    head: HeadMap,
    deformation: Deformation,
    tissues: dict[str, Tissue],
    values: Values,
    seed: Sequence[int] | int,
    affine: Array,
) -> None:
    """Put in micro-bleeds, and calcifications of the choroid plexus."""
    p = values
    decay = tissues["white_matter"].r2star / 20
    rng = generator(seed, "microbleeds")
    middle = deformation.inverse(head.nuclei_centre[None])[0]
    for _ in range(int(p["microbleeds"])):
        centre = middle + rng.uniform(-1, 1, 3) * REGION
        radius, chi = rng.uniform(0.8, 2.5), rng.uniform(0.3, 1.5)
        _paint_ball(body, centre, radius, chi, 150 * decay, 0.6, affine, within=body.parenchyma)
    if float(p["calcification"]) > 0:
        rng = generator(seed, "calcification")
        for places, most, largest in ((head.plexus, 6, 3.5), (head.ventricle, 3, 1.8)):
            if len(places) == 0:
                continue
            for _ in range(int(rng.integers(1, most + 1))):
                point = places[int(rng.integers(len(places)))]
                centre = deformation.inverse(point[None])[0]
                chi = -float(p["calcification"]) * rng.uniform(0.4, 1.0)
                radius = rng.uniform(0.8, largest)
                _paint_ball(body, centre, radius, chi, 80 * decay, 0.4, affine)


def _paint_ball(
    body: _Painter,
    centre: Array,
    radius: float,
    chi: float,
    r2star: float,
    rho: float,
    affine: Array,
    within: Tensor | None = None,
) -> None:
    region = _box(centre, radius + 2, affine, body.chi.shape)
    if region is None:
        return
    box, points = region
    at = torch.as_tensor(centre, dtype=torch.float32).reshape(3, 1, 1, 1)
    distance = (points - at).square().sum(0).sqrt().to(body.chi.device)
    share = (0.5 + radius - distance).clamp(0, 1)
    if within is not None:
        share = share * within[box]
    body.put(box, share, chi, r2star, rho)


def _add_texture(
    body: _Painter, values: Values, seed: Sequence[int] | int, spacing: Sequence[float]
) -> None:
    """Vary each tissue of the brain: fine grain, and slow gradients."""
    amplitude = float(values["texture"])
    if amplitude == 0:
        return
    device, shape = body.chi.device, body.chi.shape
    inside = (body.parenchyma * (body.depth > 0)).clamp(0, 1)
    for data, size, relative in (
        (body.chi, 0.006, False), (body.decay, 0.06, True), (body.rho, 0.03, True),
    ):  # fmt: skip
        rng = generator(seed, f"texture {size}")
        lattice = [
            max(2, int(np.ceil(n * h / LATTICE))) for n, h in zip(shape, spacing, strict=True)
        ]
        grain = torch.from_numpy(rng.standard_normal(lattice, np.float32)).to(device)
        fine = F.interpolate(grain[None, None], tuple(shape), mode="trilinear")[0, 0]
        slow = smooth_field(rng, shape, spacing, 20, device)
        change = (amplitude * size * inside) * (1.0 * fine + 0.7 * slow)
        if relative:
            data *= (1 + change).clamp(min=0.2)
        else:
            data += change
