"""A dataset of as many scans as wanted: a few simulated heads under many names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HEADS = 2


def make_cohort(root: Path, scans: int) -> Path:
    """Simulate some heads and link their files under further participants' names."""
    toolbox = [sys.executable, "-c", "from fdl_bidsapp.cli.toolbox import main; main()"]
    words = ["simulate", root, "--participants", min(HEADS, scans), "--seed", 1]
    words += ["--truth", root.with_name(f"{root.name}-truth")]
    subprocess.run([*toolbox, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    (root / "participants.tsv").unlink(missing_ok=True)
    originals = [path for path in root.iterdir() if path.name.startswith("sub-")]
    heads = sorted({path.parent for path in root.rglob("*_Chimap.nii.gz")})
    for number in range(scans):
        label = f"sub-c{number:05d}"
        target = root / label / "anat"
        target.mkdir(parents=True)
        for path in heads[number % len(heads)].iterdir():
            os.link(path, target / re.sub(r"^sub-[^_]+(_ses-[^_]+)?", label, path.name))
    for folder in originals:
        shutil.rmtree(folder)
    return root
