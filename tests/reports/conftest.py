"""Output folders made up for the reports: records, tables and small figures, no images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fdl_bidsapp.imaging.measure import COLUMNS
from fdl_bidsapp.labels import by_abbreviation

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><rect width="9" height="9"/></svg>'


class Output:
    """An output folder and its dataset.

    Parameters
    ----------
    root
        An empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.out = root / "out"
        self.bids = root / "bids"
        self.out.mkdir()
        self.bids.mkdir()

    def add(
        self,
        subject: str,
        volumes: Mapping[str, float] | None = None,
        *,
        session: str | None = None,
        figures: bool = False,
        cells: Mapping[str, Any] | None = None,
        **record: Any,
    ) -> Path:
        """Write a scan, segmented if it has volumes, and return its record's path."""
        entities = {"subject": subject, **({"session": session} if session else {})}
        name = f"sub-{subject}" + (f"_ses-{session}" if session else "")
        folder = self.out / f"sub-{subject}" / (f"ses-{session}" if session else "") / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "Status": "ok" if volumes else "failed",
            "Error": None,
            "Entities": entities,
            "AppVersion": "0.1.0",
            "ModelName": "default",
            "ModelSHA256": "ab" * 32,
            "Target": "qsm",
            "InputsUsed": {"qsm": [f"bids:raw:sub-{subject}/anat/sub-{subject}_Chimap.nii"]},
            "Derivations": {"qsm": "map"},
            "VoxelSize": [1.0, 1.0, 1.5],
            "VoxelVolume": 1.5,
            "BrainVolume": None,
            "Notes": [],
        }
        if volumes:
            lines = ["\t".join(COLUMNS)]
            for label in by_abbreviation(volumes):
                row = dict.fromkeys(COLUMNS, "n/a") | {
                    "index": str(label.index),
                    "name": label.name,
                    "abbreviation": label.abbreviation,
                    "structure": label.structure,
                    "hemisphere": label.hemisphere,
                    "volume": f"{volumes[label.abbreviation]:g}",
                    "qsm_mean": "0.12",
                    "qsm_std": "0.03",
                    "r2star_mean": "40",
                    "r2star_std": "5",
                    "qc_mean_probability": "0.93",
                    "qc_flag": "ok",
                }
                row |= {key: str(value) for key, value in (cells or {}).items()}
                lines.append("\t".join(row.values()))
                if figures:
                    self.figure(subject, name, "overlay", label.abbreviation)
                    self.figure(subject, name, "histogram", label.abbreviation)
            if figures:
                self.figure(subject, name, "overview")
            (folder / f"{name}_morph.tsv").write_text("\n".join(lines) + "\n")
        path = folder / f"{name}_morph.json"
        path.write_text(json.dumps(content | record))
        return path

    def figure(self, subject: str, name: str, desc: str, label: str = "") -> None:
        """Write a figure that is just a black square."""
        folder = self.out / f"sub-{subject}" / "figures"
        folder.mkdir(exist_ok=True)
        middle = f"_label-{label}" if label else ""
        (folder / f"{name}_seg-fdl{middle}_desc-{desc}_dseg.svg").write_text(SVG)

    def participants(self, *lines: str) -> None:
        """Write ``participants.tsv``, its heading first, with commas for tabs."""
        text = "\n".join(line.replace(",", "\t") for line in lines)
        (self.bids / "participants.tsv").write_text(text + "\n")


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """Give an empty output folder."""
    return Output(tmp_path)


@pytest.fixture(scope="session")
def make_output() -> Callable[[Path], Output]:
    """Give the maker of output folders."""
    return Output
