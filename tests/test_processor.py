from __future__ import annotations

import os
import subprocess
import sys

import pytest

START = """
import os, sys
from fdl_bidsapp.cli import app, toolbox

command = {"app": app, "toolbox": toolbox}[sys.argv[1]]
command.run = lambda argv: print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules) or 0
command.main([])
"""


@pytest.mark.parametrize("command", ["app", "toolbox"])
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
    ids=["by itself", "count chosen", "policy chosen"],
)
def test_threads_give_up_their_core_soon_unless_told_otherwise(command, chosen, expected):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", START, command],
        env=environment | chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    # It has to be there before PyTorch reads it.
    assert done.stdout.split() == [expected, "False"]
