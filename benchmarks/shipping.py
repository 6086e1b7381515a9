"""A network in the package, and its card: what the scripts that store one share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fdl_bidsapp.models
from fdl_bidsapp.bids.outputs import write_text

WEIGHTS = Path(fdl_bidsapp.models.__file__).parent / "weights"


def ship(
    name: str,
    about: str,
    load: Callable[[str | Path], Any],
    save: Callable[..., str],
    card: Callable[[Any], str],
) -> None:
    """Store the network that the command line names, if any, in half precision; write its card."""
    parser = argparse.ArgumentParser(description=about.split("\n", 1)[0])
    parser.add_argument("network", nargs="?", type=Path, help="of fdl train")
    options = parser.parse_args()
    if options.network is not None:
        trained = load(options.network)
        save(WEIGHTS / f"{name}.safetensors", trained.network(), trained.spec, dtype="float16")
    write_text(WEIGHTS / f"{name}.md", card(load(name)))
