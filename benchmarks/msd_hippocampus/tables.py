"""Write the tables of labelled scans for the MSD hippocampus crops.

    python benchmarks/msd_hippocampus/tables.py DATA OUT [--folds 5]

``DATA`` holds ``splits.tsv``, ``images`` and ``labels``. ``OUT/cases.tsv`` has its own split,
with nested training subsets in its order: the first 4 rows are the subset of 4, and so on.
``OUT/fold-0.tsv`` and the others are for reporting: a fold of the training participants becomes
``test``, the rest stays ``train``, and the validation cases stay what they are.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

COLUMNS = ("id", "participant", "split", "imag", "label")


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--folds", type=int, default=5)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.data / "splits.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    base = Path(os.path.relpath(options.data, options.out))
    for row in rows:
        row["imag"] = str(base / "images" / f"{row['id']}.nii.gz")
        row["label"] = str(base / "labels" / f"{row['id']}.nii.gz")
    write(options.out / "cases.tsv", rows)
    trained = list(dict.fromkeys(r["participant"] for r in rows if r["split"] == "train"))
    for fold in range(options.folds):
        held = set(trained[fold :: options.folds])
        split = [{**r, "split": "test"} if r["participant"] in held else r for r in rows]
        write(options.out / f"fold-{fold}.tsv", split)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
