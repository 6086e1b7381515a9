import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from nipype import Function, Node, Workflow

from fdl_bidsapp.errors import (
    FdlError,
    ImageError,
    InputMissingError,
    StorageError,
    TemporaryError,
    UsageError,
)
from fdl_bidsapp.settings import Settings
from fdl_bidsapp.workflows.engine import run

# Nipype keeps the source of these functions, so that a worker needs not import this module.


def record(folder: str, name: str, after: str = "") -> str:
    from pathlib import Path

    print("said by a node")
    with (Path(folder) / "order").open("a") as stream:
        stream.write(f"{name}\n")
    return name


def cut_short(folder: str, name: str, after: str = "") -> str:
    from fdl_bidsapp.errors import ImageError

    raise ImageError("the file is cut short", "copy it again", path="sub-01_Chimap.nii.gz")


def divide(folder: str, name: str, after: str = "") -> str:
    return str(1 / 0)


def full_disk(folder: str, name: str, after: str = "") -> str:
    import errno
    import os

    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/out/file")


def out_of_memory(folder: str, name: str, after: str = "") -> str:
    raise MemoryError("cannot allocate 80 GiB")


def killed(folder: str, name: str, after: str = "") -> str:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def print_from_c(folder: str, name: str, after: str = "") -> str:
    import os

    os.write(1, b"said by compiled code")
    return ""


def threads(folder: str, name: str, after: str = "") -> str:
    import os
    from pathlib import Path

    (Path(folder) / name).write_text(os.environ.get("OMP_NUM_THREADS", ""))
    return ""


Step = Callable[..., str]


def make(folder: Path, *scans: tuple[Step, ...], shared: Step | None = None) -> Workflow:
    """Make a workflow in which each scan is a chain of steps."""

    def node(step: Step, name: str, label: str) -> Node:
        function = Function(
            input_names=["folder", "name", "after"], output_names=["out"], function=step
        )
        made = Node(function, name=name)
        made.inputs.folder = str(folder)
        made.inputs.name = label
        return made

    whole = Workflow("fdl", base_dir=str(folder / "work"))
    first = node(shared, "shared", "shared") if shared else None
    for number, steps in enumerate(scans):
        scan = Workflow(f"scan_{number}")
        nodes = [node(step, f"step_{i}", f"{number}.{i}") for i, step in enumerate(steps)]
        scan.add_nodes(nodes)
        for one, next_one in pairwise(nodes):
            scan.connect(one, "out", next_one, "after")
        if first:
            whole.connect(first, "out", scan, "step_0.after")
        else:
            whole.add_nodes([scan])
    return whole


class Outcome:
    """The failures of a run and the calls made on the way."""

    def __init__(self, folder: Path, workflow: Workflow, n_scans: int, **options: object) -> None:
        self.done: list[tuple[str, FdlError | None]] = []
        self.settings = Settings(folder / "bids", folder / "out", "participant", **options)  # type: ignore[arg-type]
        names = {f"scan_{number}": f"sub-{number:02d}" for number in range(n_scans)}
        self.failures = run(
            workflow, self.settings, names, lambda scan, error: self.done.append((scan, error))
        )
        order = folder / "order"
        self.order = order.read_text().split() if order.exists() else []
        (log,) = (folder / "out" / "logs").glob("*_nipype.log")
        self.log = log.read_text()


both = pytest.mark.parametrize("nprocs", [1, 2])


@both
def test_scans_that_end_well_are_reported_once(tmp_path: Path, nprocs: int) -> None:
    workflow = make(tmp_path, (record, record), (record,))
    outcome = Outcome(tmp_path, workflow, 2, nprocs=nprocs)
    assert outcome.failures == {}
    assert sorted(outcome.done, key=str) == [("scan_0", None), ("scan_1", None)]
    assert sorted(outcome.order) == ["0.0", "0.1", "1.0"]


@both
def test_failed_node_gives_its_own_error_and_stops_its_scan_alone(
    tmp_path: Path, nprocs: int
) -> None:
    workflow = make(tmp_path, (record, cut_short, record), (record, record))
    outcome = Outcome(tmp_path, workflow, 2, nprocs=nprocs)
    assert list(outcome.failures) == ["scan_0"]
    error = outcome.failures["scan_0"]
    assert type(error) is ImageError
    assert (error.cause, error.remedy) == ("the file is cut short", "copy it again")
    assert error.path == "sub-01_Chimap.nii.gz"
    assert sorted(outcome.order) == ["0.0", "1.0", "1.1"]
    assert dict(outcome.done) == {"scan_0": error, "scan_1": None}
    assert "sub-00 failed: sub-01_Chimap.nii.gz: the file is cut short." in outcome.log


@pytest.mark.parametrize(
    ("step", "kind", "text"),
    [
        (divide, FdlError, "ZeroDivisionError: division by zero"),
        (full_disk, StorageError, "No space left on device"),
        (out_of_memory, TemporaryError, "cannot allocate 80 GiB"),
    ],
)
def test_other_exceptions_become_one_line_with_a_remedy(
    tmp_path: Path, step: Step, kind: type[FdlError], text: str
) -> None:
    error = Outcome(tmp_path, make(tmp_path, (step,)), 1, nprocs=1).failures["scan_0"]
    assert type(error) is kind
    assert text in error.cause
    assert error.remedy
    assert "\n" not in str(error)


def test_killed_worker_fails_its_scan_and_the_others_finish(tmp_path: Path) -> None:
    scans = [(record, record, record), (killed, record), (record, record), (record, record)]
    start = time.monotonic()
    outcome = Outcome(tmp_path, make(tmp_path, *scans), 4, nprocs=2)
    assert time.monotonic() - start < 30
    assert list(outcome.failures) == ["scan_1"]
    assert isinstance(outcome.failures["scan_1"], TemporaryError)
    assert "killed" in outcome.failures["scan_1"].cause
    assert len(outcome.order) == 7
    assert len(outcome.done) == 4


def test_every_worker_may_die(tmp_path: Path) -> None:
    outcome = Outcome(tmp_path, make(tmp_path, (killed,), (killed,), (killed,)), 3, nprocs=2)
    assert sorted(outcome.failures) == ["scan_0", "scan_1", "scan_2"]


@both
def test_nothing_is_said_on_the_terminal(
    tmp_path: Path, nprocs: int, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = Outcome(tmp_path, make(tmp_path, (record, divide), (record,)), 2, nprocs=nprocs)
    assert capfd.readouterr() == ("", "")
    assert "said by a node" in outcome.log
    assert "ZeroDivisionError" in outcome.log


def test_compiled_code_in_a_worker_writes_to_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = Outcome(tmp_path, make(tmp_path, (print_from_c,)), 1, nprocs=2)
    assert capfd.readouterr() == ("", "")
    assert "said by compiled code" in outcome.log


@both
def test_crash_files_are_text_in_the_work_folder(
    tmp_path: Path, nprocs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    Outcome(tmp_path, make(tmp_path, (divide,)), 1, nprocs=nprocs)
    (crash,) = (tmp_path / "work" / "crash").iterdir()
    assert crash.suffix == ".txt"
    assert "ZeroDivisionError" in crash.read_text()
    assert list(here.iterdir()) == []
    assert Path.cwd() == here


@both
def test_one_scan_is_finished_before_the_next_begins(tmp_path: Path, nprocs: int) -> None:
    workflow = make(tmp_path, *[(record, record)] * 3)
    # Room for one node alone makes the order of the workers certain.
    outcome = Outcome(tmp_path, workflow, 3, nprocs=nprocs, mem=0.2)
    assert outcome.order == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]


@both
def test_shared_node_takes_all_its_scans_down(tmp_path: Path, nprocs: int) -> None:
    workflow = make(tmp_path, (record,), (record, record), shared=cut_short)
    outcome = Outcome(tmp_path, workflow, 2, nprocs=nprocs)
    assert {type(error) for error in outcome.failures.values()} == {ImageError}
    assert [scan for scan, _ in outcome.done] == ["scan_0", "scan_1"]
    assert outcome.order == []


@both
def test_stop_on_first_crash_leaves_the_other_scans_unfinished(tmp_path: Path, nprocs: int) -> None:
    scans = [(cut_short,), (record, record), (record, record), (record, record)]
    outcome = Outcome(tmp_path, make(tmp_path, *scans), 4, nprocs=nprocs, stop_on_first_crash=True)
    assert type(outcome.failures["scan_0"]) is ImageError
    assert len(outcome.done) == 4
    assert len(outcome.order) < 6
    assert "--stop-on-first-crash" in outcome.failures["scan_3"].remedy


@both
def test_error_in_the_callback_ends_the_run(tmp_path: Path, nprocs: int) -> None:
    def full(scan: str, error: FdlError | None) -> None:
        raise StorageError("disk full", path="record")

    settings = Settings(tmp_path, tmp_path / "out", "participant", nprocs=nprocs)
    workflow = make(tmp_path, (record,), (record,), (record,))
    with pytest.raises(StorageError, match="disk full"):
        run(workflow, settings, {f"scan_{number}": "" for number in range(3)}, full)
    assert (tmp_path / "order").read_text().count("\n") < 3


def test_finished_nodes_are_not_run_again(tmp_path: Path) -> None:
    names = {"scan_0": "sub-00"}
    settings = Settings(tmp_path, tmp_path / "out", "participant", nprocs=2)
    done: list[str] = []
    for _ in range(2):
        workflow = make(tmp_path, (record, record))
        assert run(workflow, settings, names, lambda scan, _: done.append(scan)) == {}
    assert done == ["scan_0", "scan_0"]
    assert (tmp_path / "order").read_text().split() == ["0.0", "0.1"]


def test_workers_are_given_their_number_of_threads(tmp_path: Path) -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    Outcome(tmp_path, make(tmp_path, (threads,)), 1, nprocs=3, omp_nthreads=3)
    assert (tmp_path / "0.0").read_text() == "3"
    assert os.environ.get("OMP_NUM_THREADS") == before


@both
def test_use_of_resources_is_kept_with_the_log_and_nothing_elsewhere(
    tmp_path: Path, nprocs: int
) -> None:
    # In a process of its own: Nipype's monitor cannot be switched off again.
    script, here = tmp_path / "monitored.py", tmp_path / "here"
    here.mkdir()
    script.write_text(
        f"""
from pathlib import Path
from nipype import Function, Node, Workflow
from fdl_bidsapp.settings import Settings
from fdl_bidsapp.workflows.engine import run

def one():
    return 1

if __name__ == "__main__":
    scan = Workflow("scan_0")
    scan.add_nodes([Node(Function(output_names=["out"], function=one), name="one")])
    whole = Workflow("fdl", base_dir={str(tmp_path / "work")!r})
    whole.add_nodes([scan])
    out = Path({str(tmp_path / "out")!r})
    settings = Settings(out, out, "participant", nprocs={nprocs}, resource_monitor=True)
    assert run(whole, settings, {{"scan_0": ""}}) == {{}}
"""
    )
    subprocess.run([sys.executable, str(script)], check=True, cwd=here)
    (usage,) = (tmp_path / "out" / "logs").glob("*_resources.json")
    assert "fdl.scan_0.one" in usage.read_text()
    assert list(here.iterdir()) == []


def test_name_without_nodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="belongs to scan_1"):
        Outcome(tmp_path, make(tmp_path, (record,)), 2, nprocs=1)


@pytest.mark.parametrize("text", ["plugin: Linear", "plugin: MultiProc\nplugin_args: {n_procs: 2}"])
def test_plugin_file_chooses_the_plugin(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plugin.yml"
    file.write_text(text)
    outcome = Outcome(tmp_path, make(tmp_path, (record, divide), (record,)), 2, use_plugin=file)
    assert list(outcome.failures) == ["scan_0"]


def test_other_plugins_of_nipype_report_as_well(tmp_path: Path) -> None:
    file = tmp_path / "plugin.yml"
    file.write_text("plugin: LegacyMultiProc\nplugin_args: {n_procs: 1}")
    outcome = Outcome(
        tmp_path, make(tmp_path, (record, cut_short, record), (record,)), 2, use_plugin=file
    )
    assert type(outcome.failures["scan_0"]) is ImageError
    assert dict(outcome.done)["scan_1"] is None


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("plugin: [", "not YAML"),
        ("n_procs: 2", "names no plugin"),
        ("plugin: NoSuch", "'NoSuch' is not a plugin"),
        ("plugin: SGEGraph", "'SGEGraph' is not a plugin"),
        ("plugin: MultiProc\nplugin_args: 2", "not a mapping"),
    ],
)
def test_bad_plugin_file_is_a_usage_error(tmp_path: Path, text: str, cause: str) -> None:
    file = tmp_path / "plugin.yml"
    file.write_text(text)
    with pytest.raises(UsageError, match=cause):
        Outcome(tmp_path, make(tmp_path, (record,)), 1, use_plugin=file)


def test_absent_plugin_file_is_missing_input(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="No such file"):
        Outcome(tmp_path, make(tmp_path, (record,)), 1, use_plugin=tmp_path / "no.yml")


def test_streams_are_given_back(tmp_path: Path) -> None:
    before = sys.stdout, sys.stderr
    Outcome(tmp_path, make(tmp_path, (record,)), 1, nprocs=1)
    assert (sys.stdout, sys.stderr) == before
