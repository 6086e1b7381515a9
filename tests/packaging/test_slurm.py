"""The scripts of docs/hpc.md, and Nipype's own plugin, on a real Slurm of one node."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

TEXT = (Path(__file__).parents[2] / "docs" / "hpc.md").read_text("utf-8")
SCRIPTS = dict(re.findall(r"^`(\S+)`:\n\n```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo", "squeue")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock
SlurmctldPort={port}
SlurmdPort={next_port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
DependencyParameters=kill_invalid_depend
ReturnToService=2
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=24000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:2
SlurmdParameters=config_overrides
"""


@dataclass
class Slurm:
    """A running Slurm.

    Attributes
    ----------
    root
        Its folder.
    environment
        With which its commands find it.
    """

    root: Path
    environment: dict[str, str]

    def run(self, *command: str, folder: Path | None = None, code: int | None = 0) -> str:
        """Run a command of it, check its exit code, and return what it prints."""
        done = subprocess.run(
            command,
            cwd=folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=540,
        )
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done.stdout.strip()

    def wait(self, seconds: float = 400) -> None:
        """Wait until no job is left."""
        deadline = time.monotonic() + seconds
        while self.run("squeue", "--noheader", "--states=all", "--format=%T %r") and [
            line
            for line in self.run("squeue", "--noheader", "--format=%T").splitlines()
            if line != "COMPLETED"
        ]:
            assert time.monotonic() < deadline, self.run("squeue")
            time.sleep(0.3)

    def finished(self) -> list[dict[str, str]]:
        """Return what is known of the jobs that have ended."""
        lines = (self.root / "log" / "jobcomp.txt").read_text().splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Start munge and Slurm in a folder of their own."""
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)} (Debian: slurm-wlm munge)")
    # A socket's path may have a hundred signs, which pytest's folders exceed.
    root = Path(subprocess.check_output(["mktemp", "-d", "/tmp/slurm.XXXXXX"], text=True).strip())
    root.chmod(0o755)
    for name in ("etc", "run", "log", "state", "spool"):
        (root / name).mkdir(mode=0o755)
    key = root / "etc" / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    configuration = root / "etc" / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            user=user,
            root=root,
            port=port,
            next_port=port + 1,
        )
    )
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{search}",
        "SLURM_CONF": str(configuration),
        "LOGNAME": user,
        "OMP_NUM_THREADS": "1",
    }
    daemons = [
        [
            "munged",
            "--foreground",
            f"--key-file={key}",
            f"--socket={root}/run/munge.sock",
            f"--pid-file={root}/run/munged.pid",
            f"--log-file={root}/log/munged.log",
            f"--seed-file={root}/run/munge.seed",
            "--num-threads=4",
        ],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D"],
    ]
    running = []
    try:
        for command in daemons:
            running.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            time.sleep(0.5)
        made = Slurm(root, environment)
        deadline = time.monotonic() + 60
        while made.run("sinfo", "--noheader", "--format=%T", code=None) != "idle":
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-500:] for path in (root / "log").glob("*.log"))
                pytest.skip(f"Slurm does not start here: {logs}")
            time.sleep(0.2)
        yield made
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def scripts(study, tmp_path: Path) -> Path:
    """Write the scripts, with the installed app in the place of Apptainer, as the text says."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name, text in SCRIPTS.items():
        text = re.sub(
            r'apptainer run .*?"\$IMAGE"', "fdl-bidsapp", text.replace("\\\n", " "), flags=re.DOTALL
        )
        text = text.replace("container=(", "export TMPDIR=$scratch\ncontainer=(", 1)
        # Asked for less than a real scan needs, so that tasks of this small machine run at once.
        text = text.replace("--cpus-per-task=4", "--cpus-per-task=1").replace("12G", "6G")
        (folder / name).write_text(text)
    with (folder / "fdl.env").open("a") as file:
        file.write(f"BIDS={study.bids}\nOUT={study.out}\nPER_TASK=2\n")
        file.write(f"OPTIONS=(--model {study.model})\n")
    return folder


def tables(out: Path) -> dict[str, bytes]:
    """Return the bytes of all that an analysis reads: tables, label maps, masks, their sidecars."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix in (".tsv", ".json", ".gz")
    }


def test_array_and_group_job_leave_the_tables_of_a_local_run(study, slurm, scripts, tmp_path):
    for subject in ("01", "02", "03", "04", "05"):
        study.add(subject, ("qsm", "r2star"))
    study.path("bad").write_text("no image")
    submitted = slurm.run("bash", "submit.sh", folder=scripts)
    assert "Submitted batch job" in submitted
    slurm.wait()
    logs = "".join(path.read_text() for path in sorted(scripts.glob("fdl-*.log")))
    assert "Traceback" not in logs
    states = sorted(job["JobState"] for job in slurm.finished())
    # One task has the scan that cannot be done; the group job runs all the same.
    assert states == ["COMPLETED", "COMPLETED", "COMPLETED", "FAILED"], logs
    on_cluster = tables(study.out)
    assert "group_morph.tsv" in on_cluster
    study.out = study.out.with_name("local")
    assert study.run() == 1
    assert len(study.group()) == 12
    assert tables(study.out) == on_cluster


def test_cancelled_and_submitted_again_the_cohort_is_finished(study, slurm, scripts):
    for k in range(8):
        study.add(f"{k:02d}")
    with (scripts / "fdl.env").open("a") as file:
        file.write("PER_TASK=8\n")
    slurm.run("bash", "submit.sh", folder=scripts)
    deadline = time.monotonic() + 120
    while not list(study.out.rglob("sub-*_morph.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    slurm.run("scancel", "--user", slurm.environment["LOGNAME"])
    slurm.wait()
    records = {path: path.stat().st_mtime_ns for path in study.out.rglob("sub-*_morph.json")}
    assert 0 < len(records) < 8
    assert not [path for path in study.out.rglob(".*") if path.name != ".bidsignore"]
    slurm.run("bash", "submit.sh", folder=scripts)
    slurm.wait()
    assert {path: path.stat().st_mtime_ns for path in records} == records
    assert len(list(study.out.rglob("sub-*_morph.json"))) == 8
    assert (study.out / "group_morph.tsv").is_file()


def test_the_plugin_of_nipype_leaves_the_tables_of_a_local_run(study, slurm, tmp_path):
    study.add("01", ("qsm", "r2star"))
    study.add("02")
    study.path("bad").write_text("no image")
    file = tmp_path / "plugin.yml"
    file.write_text("plugin: SLURM\nplugin_args:\n  sbatch_args: --mem=6G --cpus-per-task=1\n")
    words = study.arguments("participant", "--use-plugin", file, "--work-dir", tmp_path / "work")
    said = subprocess.run(
        [sys.executable, "-c", "from fdl_bidsapp.cli.app import main; main()", *words],
        env=slurm.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )
    assert said.returncode == 1, said.stderr
    assert "Traceback" not in said.stderr
    assert "not a NIfTI image" in said.stderr
    by_plugin = tables(study.out)
    study.out = study.out.with_name("local")
    assert study.run() == 1
    assert tables(study.out) == by_plugin


def test_a_stopped_run_with_the_plugin_leaves_no_job_behind(study, slurm, tmp_path):
    study.add("01")
    study.add("02")
    file = tmp_path / "plugin.yml"
    file.write_text("plugin: SLURM\nplugin_args:\n  sbatch_args: --mem=6G --begin=now+1hour\n")
    words = study.arguments("participant", "--use-plugin", file, "--work-dir", tmp_path / "work")
    run = subprocess.Popen(
        [sys.executable, "-c", "from fdl_bidsapp.cli.app import main; main()", *words],
        env=slurm.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(slurm.run("squeue", "--noheader").splitlines()) < 2:
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.2)
    run.terminate()
    assert run.communicate(timeout=60)[1].splitlines()[-1].endswith("run it again to go on")
    assert run.returncode == 128 + 15
    assert slurm.run("squeue", "--noheader") == ""
    assert list((tmp_path / "work").iterdir()) == []
