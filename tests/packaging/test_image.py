"""The Dockerfile is built for real, and the image's own command does a demonstration.

Without a registry, the base image has to be in buildah's storage under the name that the Dockerfile
asks for, such as the one that ``tests/real_tools.sh`` makes of Debian packages.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.timeout(2400)]

ROOT = Path(__file__).parents[2]
BASE = re.findall(r"^ARG BASE=(\S+)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)[0]
NAME = "localhost/fdl-bidsapp-under-test"
USER = "12345:12345"
"""Nobody that the image knows."""


def run(*command: object, code: int = 0, **environment: str) -> str:
    """Run a command, check its exit code and return what it says."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


def as_pip_is_set_up_here(folder: Path) -> list[str]:
    """Return the options that give the build this machine's mirrors, wheels and certificates."""
    lines = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    settings = dict(re.findall(r"^global\.([\w-]+)='(.*)'$", "\n".join(lines), re.MULTILINE))
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in settings.items()))
    options = [f"--volume={file}:/etc/pip.conf:ro"]
    mirrors = " ".join(settings.get(key, "") for key in ("find-links", "extra-index-url"))
    places = re.findall(r"(?:^|\s|file://)(/[^/\s]+/[^/\s]+)", mirrors)
    places += [settings[key] for key in ("cert", "constraint") if key in settings]
    options += [f"--volume={place}:{place}:ro" for place in dict.fromkeys(places)]
    if wheels := settings.get("find-links"):
        # A build of PyTorch that is here already is taken before that of its own index.
        options += [f"--build-arg=PIP_FIND_LINKS={wheels}"]
        options += ["--build-arg=TORCH_INDEX=https://pypi.org/simple"]
    return options


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the image."""
    if shutil.which("buildah") is None:
        pytest.skip("buildah is not installed")
    known = subprocess.run(["buildah", "inspect", "--type=image", BASE], capture_output=True)
    if known.returncode:
        pytest.skip(f"there is no image {BASE} in buildah's storage")
    run(
        *("buildah", "bud", "--isolation=chroot", "--pull=never", "--layers"),
        *("--build-arg=REVISION=under-test", f"--tag={NAME}"),
        *as_pip_is_set_up_here(tmp_path_factory.mktemp("pip")),
        ROOT,
    )
    yield NAME
    subprocess.run(["buildah", "rmi", "--force", NAME], capture_output=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder that any user may write to."""
    made = tmp_path_factory.mktemp("demonstration")
    for each in (made, *made.parents[:2]):
        each.chmod(0o755)
    made.chmod(0o777)
    return made


def test_the_image_bears_labels_entry_point_and_user(image: str) -> None:
    form = "{{.OCIv1.Config.Labels}} {{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.User}}"
    told = run("buildah", "inspect", "--type=image", f"--format={form}", image)
    assert "org.opencontainers.image.revision:under-test" in told
    assert "[fdl-bidsapp]" in told
    assert told.strip().endswith("1000:1000")


def test_podman_does_the_demonstration_as_anybody_read_only_and_offline(
    image: str, folder: Path
) -> None:
    if shutil.which("podman") is None or shutil.which("runc", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("podman or runc is not installed")
    start = [
        *("podman", "--runtime=runc", "run", "--rm", f"--user={USER}", "--read-only"),
        *("--tmpfs=/tmp", "--network=none", f"--volume={folder}:/data"),
        *("--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"),
    ]
    words = ("simulate", "/data/bids", "--truth", "/data/truth", "--participants", 1)
    run(*start, "--entrypoint=fdl", image, *words)
    said = run(*start, image, "/data/bids", "/data/out", "participant")
    assert re.search(r"^(\d+) of \1 scans? done", said, re.MULTILINE)
    run(*start, image, "/data/bids", "/data/out", "group")
    assert (folder / "out" / "group_morph.tsv").is_file()
    assert (folder / "out").stat().st_uid == 12345


def test_apptainer_does_the_demonstration(image: str, folder: Path, tmp_path: Path) -> None:
    if shutil.which("apptainer") is None:
        pytest.skip("apptainer is not installed")
    archive, sif = tmp_path / "image.tar", tmp_path / "fdl.sif"
    run("buildah", "push", image, f"docker-archive:{archive}:fdl:test")
    fast = "-comp lz4 -processors 1"
    run("apptainer", "build", "--mksquashfs-args", fast, sif, f"docker-archive:{archive}")
    bids, out = folder / "apptainer" / "bids", folder / "apptainer" / "out"
    out.mkdir(parents=True)
    run(
        *("apptainer", "exec", "--cleanenv", "-B", f"{folder}:{folder}", sif),
        *("fdl", "simulate", bids, "--truth", folder / "truth-2", "--participants", 1),
    )
    start = ["apptainer", "run", "--cleanenv", "-B", f"{bids}:{bids}:ro", "-B", f"{out}:{out}"]
    said = run(*start, sif, bids, out, "participant")
    assert re.search(r"^(\d+) of \1 scans? done", said, re.MULTILINE)
    run(*start, sif, bids, out, "group")
    assert (out / "group_morph.tsv").is_file()
