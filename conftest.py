"""For the tests and for the examples in docstrings."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Let torch draw the same numbers in each test, whatever ran before it.

    A comparison at the limit of float32 fails with one draw in a thousand.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
