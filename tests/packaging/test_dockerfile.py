import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fdl_bidsapp import __version__

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Give the instructions, each with its words on one line."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def image(instructions: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Give the instructions of the last stage, which is the image that users get."""
    last = max(k for k, (name, _) in enumerate(instructions) if name == "FROM")
    return instructions[last:]


def copied(instructions: list[tuple[str, str]]) -> set[str]:
    return {
        source
        for name, text in instructions
        if name == "COPY" and not text.startswith("--from")
        for source in shlex.split(text)[:-1]
    }


def test_copies_what_the_repository_has(instructions: list[tuple[str, str]]) -> None:
    assert [name for name in copied(instructions) if not (ROOT / name).exists()] == []


def test_context_is_what_is_copied_and_no_more(instructions: list[tuple[str, str]]) -> None:
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied(instructions)


def test_holds_all_that_the_wheel_is_made_of(instructions: list[tuple[str, str]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    files = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    assert folders | files | {"constraints.txt"} <= copied(instructions)


def test_entry_point_is_a_command_of_the_package(image: list[tuple[str, str]]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    entry = dict(image)["ENTRYPOINT"]
    assert json.loads(entry) == ["fdl-bidsapp"]
    assert "fdl-bidsapp" in scripts
    link = next(text for name, text in image if name == "RUN")
    assert {f"/opt/fdl-bidsapp/bin/{script}" for script in scripts} <= set(link.split())


def test_runs_as_a_user_by_number_and_not_as_root(image: list[tuple[str, str]]) -> None:
    users = [text for name, text in image if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])


def test_base_has_a_tag_and_a_python_that_the_package_takes(
    instructions: list[tuple[str, str]],
) -> None:
    name, text = instructions[0]
    match = re.fullmatch(r"BASE=docker\.io/library/python:3\.(\d+)-slim-\w+", text)
    assert name == "ARG"
    assert match
    assert 11 <= int(match[1]) <= 13
    assert {text.split()[0] for name, text in instructions if name == "FROM"} <= {
        "${BASE}",
        "build",
    }


def test_labels_bear_the_version_of_the_package(image: list[tuple[str, str]]) -> None:
    assert ("ARG", f"VERSION={__version__}") in image
    labels = dict(pair.split("=", 1) for pair in shlex.split(dict(image)["LABEL"]))
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}version"] == "${VERSION}"
    assert labels[f"{prefix}licenses"] == "Apache-2.0"
    assert {f"{prefix}title", f"{prefix}description", f"{prefix}revision"} <= set(labels)


@pytest.mark.real
def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which(
        "hadolint", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    )
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
