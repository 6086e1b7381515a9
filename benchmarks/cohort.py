"""A dataset of as many scans as wanted: a few simulated heads under many names."""

from __future__ import annotations

import os
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
    heads = sorted(root.glob("sub-*"))
    for number in range(scans):
        head = heads[number % len(heads)]
        label = f"sub-c{number:05d}"
        for path in sorted(head.rglob("*.*")):
            if path.is_file():
                link = root / label / path.relative_to(head)
                link = link.with_name(link.name.replace(head.name, label, 1))
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, link)
    for head in heads:
        for path in sorted(head.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        head.rmdir()
    return root
