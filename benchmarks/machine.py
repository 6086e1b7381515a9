"""What a benchmark says of how it was run."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path

from fdl_bidsapp.processor import available_cores


def machine() -> str:
    """Describe the processor and the number of cores that may be used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {available_cores()} cores, {platform.system()}"


def command_line(script: str, **named: Path) -> str:
    """Write the command that is running, with names in place of this machine's folders."""
    names = {str(path): name for name, path in named.items()}
    return shlex.join(["python", script, *(names.get(word, word) for word in sys.argv[1:])])
