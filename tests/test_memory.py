from __future__ import annotations

import ctypes
import resource
import subprocess
import sys

import pytest

from fdl_bidsapp.memory import kept_memory

USE = """
import resource, sys
import torch
from contextlib import nullcontext
from fdl_bidsapp.memory import kept_memory

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

with kept_memory() if sys.argv[1] == "kept" else nullcontext():
    # Until the freed blocks lie so that an aligned one fits in.
    for _ in range(20):
        torch.ones(2**24)
    before = pages()
    for _ in range(20):
        torch.ones(2**24)
    print(pages() - before)
with open("/proc/self/statm") as file:
    print(int(file.read().split()[1]))
"""


def used(how: str) -> tuple[int, int]:
    """Pages that 20 arrays of 64 MiB took from the system, and pages held at the end."""
    run = subprocess.run([sys.executable, "-c", USE, how], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    faults, held = map(int, run.stdout.split())
    return faults, held


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_arrays_take_the_memory_of_those_before_and_give_it_back_at_the_end():
    pages_of_one = 2**26 // resource.getpagesize()
    faults, held = used("kept")
    assert faults < 2 * pages_of_one
    _, plain_held = used("plain")
    assert held < plain_held + pages_of_one / 2


def test_an_error_inside_is_the_callers():
    with pytest.raises(ValueError, match="mine"), kept_memory():
        raise ValueError("mine")
