"""The scripts of docs/hpc.md are run, with stand-ins for sbatch and apptainer that take notes."""

import json
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from fdl_bidsapp.cli.parser import parse
from fdl_bidsapp.settings import Settings

TEXT = (Path(__file__).parents[2] / "docs" / "hpc.md").read_text("utf-8")
SCRIPTS = dict(re.findall(r"^`(\S+)`:\n\n```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
STAND_IN = """#!/usr/bin/env python3
import json, os, pathlib, sys
notes = pathlib.Path(os.environ["NOTES"])
scratch = [word.split(":")[0] for word in sys.argv if word.endswith(":/scratch")]
there = [path for path in scratch if os.path.isdir(path)]
with notes.open("a") as file:
    print(json.dumps({"words": sys.argv[1:], "scratch": there}), file=file)
print("42;cluster")
sys.exit(int(os.environ.get("EXIT_CODE", 0)))
"""


@dataclass
class Call:
    """What a stand-in was called with.

    Attributes
    ----------
    words
        Its arguments.
    scratch
        The folders to be mounted as /scratch that were there at the time.
    """

    words: list[str]
    scratch: list[str]

    @property
    def mounts(self) -> list[str]:
        """Return what is mounted."""
        return [b for a, b in zip(self.words, self.words[1:], strict=False) if a == "-B"]

    def settings(self, image: str) -> Settings:
        """Return what the app would take from the words after the image."""
        return parse(self.words[self.words.index(image) + 1 :])


class Cluster:
    """A folder with the scripts, a study of three participants, and no Slurm."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.image = str(root / "fdl.sif")
        self.bids = root / "my study"
        self.out = root / "my study" / "derivatives" / "fdl"
        for label in ("01", "02", "03"):
            (self.bids / f"sub-{label}").mkdir(parents=True)
        (self.bids / "sub-notes.txt").touch()
        for name, text in SCRIPTS.items():
            (root / name).write_text(text)
        self.set(IMAGE=self.image, BIDS=self.bids, OUT=self.out, PER_TASK=2)
        for name in ("sbatch", "apptainer"):
            (root / "bin").mkdir(exist_ok=True)
            (root / "bin" / name).write_text(STAND_IN)
            (root / "bin" / name).chmod(0o755)

    def set(self, **values: object) -> None:
        """Change values of the settings file."""
        with (self.root / "fdl.env").open("a") as file:
            file.writelines(f"{name}={shlex.quote(str(v))}\n" for name, v in values.items())

    def run(self, script: str, *arguments: str, code: int = 0, **environment: str) -> list[Call]:
        """Run a script, check its exit code, and return the calls that it made."""
        notes = self.root / "notes"
        notes.unlink(missing_ok=True)
        (self.root / "tmp").mkdir(exist_ok=True)
        done = subprocess.run(
            ["bash", script, *arguments],
            cwd=self.root,
            env={
                "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
                "NOTES": str(notes),
                "TMPDIR": str(self.root / "tmp"),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        lines = notes.read_text().splitlines() if notes.exists() else []
        return [Call(**json.loads(line)) for line in lines]

    def task(self, number: int, **environment: str) -> Call:
        """Run one task of the array."""
        allotted = {
            "SLURM_ARRAY_TASK_ID": str(number),
            "SLURM_CPUS_PER_TASK": "4",
            "SLURM_MEM_PER_NODE": "12288",
        }
        (call,) = self.run("participant.sbatch", **(allotted | environment))
        return call


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_all_scripts_are_found() -> None:
    assert set(SCRIPTS) == {"fdl.env", "submit.sh", "participant.sbatch", "group.sbatch"}
    assert TEXT.count("```bash") == len(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_each_script(name: str) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=SCRIPTS[name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_command_shown_is_one_that_the_app_takes() -> None:
    blocks = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line) for line in lines if line.startswith(("apptainer run", "fdl"))]
    assert words
    for line in words:
        start = next(k for k, word in enumerate(line) if word.endswith((".sif", "fdl-bidsapp")))
        assert parse(line[start + 1 :]).output_dir == Path("/data/fdl")


def test_submits_an_array_and_after_it_the_group(cluster: Cluster) -> None:
    array, group = cluster.run("submit.sh", "--gres=gpu:1")
    assert array.words == ["--parsable", "--array=0-1%50", "--gres=gpu:1", "participant.sbatch"]
    assert group.words == ["--dependency=afterany:42", "group.sbatch"]
    assert cluster.out.is_dir()


def test_submits_nothing_for_a_dataset_without_participants(cluster: Cluster) -> None:
    cluster.set(BIDS=cluster.root / "bin")
    assert cluster.run("submit.sh", code=1) == []


def test_each_participant_is_in_one_task(cluster: Cluster) -> None:
    cluster.run("submit.sh")
    labels = [cluster.task(k).settings(cluster.image).participant_label for k in (0, 1)]
    assert labels == [("01", "02"), ("03",)]


def test_a_task_uses_what_it_was_allotted(cluster: Cluster) -> None:
    cluster.run("submit.sh")
    call = cluster.task(0)
    assert call.settings(cluster.image) == Settings(
        cluster.bids,
        cluster.out,
        "participant",
        participant_label=("01", "02"),
        device="cpu",
        nprocs=4,
        mem=12.288,
    )
    assert "--cleanenv" in call.words
    assert "--nv" not in call.words


def test_a_task_mounts_dataset_output_and_a_folder_that_it_removes(cluster: Cluster) -> None:
    cluster.run("submit.sh")
    call = cluster.task(0)
    (scratch,) = call.scratch
    assert Path(scratch).parent == cluster.root / "tmp"
    assert call.mounts == [
        f"{scratch}:/scratch",
        f"{cluster.bids}:{cluster.bids}:ro",
        f"{cluster.out}:{cluster.out}",
    ]
    assert "TMPDIR=/scratch" in call.words
    assert not Path(scratch).exists()


def test_a_task_with_a_gpu_shows_it_to_the_container_and_insists_on_it(cluster: Cluster) -> None:
    cluster.run("submit.sh")
    call = cluster.task(0, SLURM_JOB_GPUS="3", CUDA_VISIBLE_DEVICES="3")
    assert "--nv" in call.words
    assert "CUDA_VISIBLE_DEVICES=3" in call.words
    assert call.settings(cluster.image).device == "cuda"


def test_a_task_passes_more_options_on(cluster: Cluster) -> None:
    with (cluster.root / "fdl.env").open("a") as file:
        file.write("OPTIONS=(--output-spaces MNI152NLin2009aSym --target qsm)\n")
    cluster.run("submit.sh")
    settings = cluster.task(0).settings(cluster.image)
    assert settings.output_spaces == ("MNI152NLin2009aSym",)
    assert settings.target == "qsm"


def test_a_failure_is_the_failure_of_the_task_and_leaves_nothing(cluster: Cluster) -> None:
    cluster.run("submit.sh")
    (call,) = cluster.run(
        "participant.sbatch",
        code=1,
        EXIT_CODE="1",
        SLURM_ARRAY_TASK_ID="0",
        SLURM_CPUS_PER_TASK="4",
        SLURM_MEM_PER_NODE="12288",
    )
    assert call.scratch
    assert not any(Path(path).exists() for path in call.scratch)


def test_the_group_job_runs_the_group_level(cluster: Cluster) -> None:
    cluster.run("submit.sh")
    (call,) = cluster.run("group.sbatch")
    assert call.settings(cluster.image) == Settings(cluster.bids, cluster.out, "group")
    assert call.mounts == [f"{cluster.bids}:{cluster.bids}:ro", f"{cluster.out}:{cluster.out}"]


@pytest.mark.real
def test_a_scan_leaves_as_many_files_as_the_text_says(study) -> None:
    def files(structures: int) -> int:
        label_map, table, page = 2, 2, 1
        return label_map + table + 2 * structures + (2 * structures + 1) + page

    study.add("01", ("qsm", "r2star"))
    assert study.run() == 0
    pages = list(study.out.glob("sub-01*.html"))
    assert len(study.outputs("01")) + len(pages) == files(2)
    assert f"{files(8)}\n  with the eight structures of the default model" in TEXT
