from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

SHAPE = (16, 14, 12)


def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    axes = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), -1)
    return ((axes - np.array(centre)) ** 2).sum(-1) < radius**2


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)


def write_case(stem: Path, seed: int, suffixes: tuple[str, ...] = ("qsm",)) -> None:
    """A bright ball (1) beside a dark one (2), in noise."""
    rng = np.random.default_rng(seed)
    first, second = ball((5, 6, 6), 3.2), ball((11, 7, 5), 2.5)
    for suffix in suffixes:
        image = 0.1 * first - 0.1 * second + rng.normal(0, 0.005, SHAPE)
        save(stem.with_name(f"{stem.name}_{suffix}.nii.gz"), image.astype(np.float32))
    save(stem.with_name(f"{stem.name}_label.nii.gz"), (first + 2 * second).astype(np.uint8))


LABELS = "index\tname\n1\tBright ball\n2\tDark ball\n"


@pytest.fixture
def labelled_set(tmp_path: Path) -> Callable[..., Path]:
    """Write cases and their table; returns the table."""

    def make(splits: dict[str, int] | None = None, suffixes: tuple[str, ...] = ("qsm",)) -> Path:
        splits = {"train": 3, "validation": 2} if splits is None else splits
        rows = ["\t".join(("id", "split", *suffixes, "label"))]
        for split, n in splits.items():
            for i in range(n):
                name = f"{split}{i}"
                write_case(tmp_path / "data" / name, len(rows), suffixes)
                files = [f"data/{name}_{suffix}.nii.gz" for suffix in (*suffixes, "label")]
                rows.append("\t".join((name, split, *files)))
        (tmp_path / "labels.tsv").write_text(LABELS)
        table = tmp_path / "cases.tsv"
        table.write_text("\n".join(rows) + "\n")
        return table

    return make


@pytest.fixture
def quick(tmp_path: Path) -> dict[str, object]:
    """Settings of a training of seconds."""
    return {
        "table": str(tmp_path / "cases.tsv"),
        "labels": str(tmp_path / "labels.tsv"),
        "method": "none",
        "backbone_options": {"width": 4, "levels": 2},
        "fusion_channels": 2,
        "grid_shape": [16, 16, 12],
        "recipe_options": {"steps": 4, "batch": 1, "validate_every": 2},
    }
