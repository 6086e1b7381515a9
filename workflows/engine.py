"""Running a workflow of many scans: each fails alone, no worker's death hangs the others.

A node belongs to a scan when one of the workflows around it bears the scan's name: in the workflow
``fdl``, the node ``fdl.scan_3.segment`` belongs to ``scan_3``. Nodes outside of all scans are
shared: when one fails, all scans that need it fail.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import (
    chdir,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from traceback import format_exception
from typing import Any

import networkx as nx  # type: ignore[import-untyped]
from nipype import config as nipype_config
from nipype.pipeline import plugins
from nipype.pipeline.engine import Node, Workflow
from nipype.pipeline.plugins.base import DistributedPluginBase, PluginBase
from nipype.pipeline.plugins.multiproc import MultiProcPlugin
from nipype.pipeline.plugins.tools import report_crash

from fdl_bidsapp.errors import (
    FdlError,
    InputMissingError,
    StorageError,
    TemporaryError,
    UsageError,
)
from fdl_bidsapp.settings import Settings

ScanDone = Callable[[str, FdlError | None], None]
"""Called with a scan's name and its error as soon as the scan is finished."""

POLL_SECONDS = 0.1
"""Pause between two looks at the workers; Nipype's own two seconds cost more than most nodes."""

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)
_INTERRUPT = re.compile(r"^\s*KeyboardInterrupt\b", re.MULTILINE)
_NO_SPACE = re.compile(r"\[Errno (28|122|5)\]")
_NO_MEMORY = re.compile(r"MemoryError|OutOfMemoryError|DefaultCPUAllocator: can't allocate memory")
_LESS_AT_ONCE = (
    "run again with more memory, with --mem set to what there is, or with a lower --nprocs; "
    "finished scans are kept"
)


def run(
    workflow: Workflow,
    settings: Settings,
    names: Mapping[str, str],
    on_scan_done: ScanDone | None = None,
    *,
    log_file: Path | None = None,
) -> dict[str, FdlError]:
    """Run a workflow and say which scans failed.

    Parameters
    ----------
    workflow
        One sub-workflow for each scan, of plain nodes.
    settings
        Uses `nprocs`, `omp_nthreads`, `mem`, `use_plugin`, `stop_on_first_crash` and
        `resource_monitor`; the folder `output_dir` takes the log.
    names
        The name of each scan's sub-workflow, and the title under which the log speaks of the scan.
    on_scan_done
        Called in this process, once for each scan.
    log_file
        Where Nipype's messages go, and all that the nodes print;
        ``<output_dir>/logs/<time>-<pid>_nipype.log`` by default.

    Returns
    -------
    dict
        The error of each scan that failed, by the scan's name (a failed node that no scan needs
        stands under its own). With `stop_on_first_crash`, the scans that were not
        finished are among them.

    Raises
    ------
    UsageError, InputMissingError
        The file of `use_plugin` is not usable.

    Notes
    -----
    With one CPU, nodes run in this process, one scan after another. With more, each worker is a
    pool of one process: when it dies (killed for lack of memory, say), just its node fails, and a
    new worker takes its place; see https://github.com/nipy/nipype/issues/2700.
    """
    log_file = log_file or settings.output_dir / "logs" / (
        f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}_nipype.log"
    )
    log_file = log_file.absolute()
    base = Path(workflow.base_dir or ".").absolute()
    base.mkdir(parents=True, exist_ok=True)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    scans = _Scans(names, on_scan_done, settings.stop_on_first_crash)
    _configure(workflow, base, settings)
    # The callback writes to the terminal through streams that it took before this redirection.
    with (
        _logging_to(log_file),
        _threads(settings.omp_nthreads),
        # The monitor leaves its samples in the current folder.
        chdir(base) if settings.resource_monitor else nullcontext(),
    ):
        plugin = _plugin(settings, scans, log_file)
        try:
            workflow.run(plugin=plugin)
        except _Stop as stop:
            if stop.__cause__ is not None:
                raise stop.__cause__ from None
            scans.abandon()
    usage = base / workflow.name / "resource_monitor.json"
    if settings.resource_monitor and usage.exists():
        # The work folder may be a temporary one.
        shutil.copyfile(usage, log_file.with_name(f"{log_file.stem}_resources.json"))
    return scans.failures


class _Stop(BaseException):
    """Ends the run; Nipype would take an ordinary exception for the failure of a node."""


class _Scans:
    """What is known of each scan while the workflow runs."""

    def __init__(
        self, names: Mapping[str, str], on_done: ScanDone | None, stop_on_first_crash: bool
    ) -> None:
        self.failures: dict[str, FdlError] = {}
        self._titles = names
        self._rank = {name: rank for rank, name in enumerate(names)}
        self._on_done = on_done
        self._stop_on_first_crash = stop_on_first_crash
        self._waiting: dict[str, set[Node]] = {}
        self._owner: dict[Node, str] = {}
        self._graph = nx.DiGraph()

    def start(self, graph: nx.DiGraph) -> None:
        self._graph = graph
        self._waiting = {name: set() for name in self._rank}
        for node in graph:
            for part in node.fullname.split("."):
                if part in self._waiting:
                    self._owner[node] = part
                    self._waiting[part].add(node)
        if idle := [name for name, nodes in self._waiting.items() if not nodes]:
            raise ValueError(f"no node of the workflow belongs to {idle[0]}")

    def rank(self, node: Node) -> int:
        """Order nodes so that a scan is finished before the next begins, shared nodes first."""
        return self._rank.get(self._owner.get(node, ""), -1)

    def finished(self, node: Node) -> None:
        scan = self._owner.get(node, "")
        if scan in self._waiting:
            self._waiting[scan].discard(node)
            if not self._waiting[scan]:
                self._close(scan)

    def failed(self, node: Node, error: FdlError) -> None:
        lost = {node, *nx.descendants(self._graph, node)}
        concerned = {self._owner[each] for each in lost if each in self._owner} or {node.fullname}
        for scan in sorted(concerned, key=lambda scan: self._rank.get(scan, -1)):
            self.failures.setdefault(scan, error)
            logging.getLogger("nipype.workflow").error(
                "%s failed: %s", self._titles.get(scan, scan), error
            )
        for each in sorted(lost, key=self.rank):
            self.finished(each)
        if self._stop_on_first_crash:
            raise _Stop

    def abandon(self) -> None:
        for scan in list(self._waiting):
            self.failures.setdefault(
                scan,
                TemporaryError(
                    "the run was stopped by the failure of another scan",
                    "run again without --stop-on-first-crash",
                ),
            )
            self._close(scan)

    def _close(self, scan: str) -> None:
        del self._waiting[scan]
        if self._on_done is None:
            return
        try:
            self._on_done(scan, self.failures.get(scan))
        except Exception as error:
            raise _Stop from error


class _Reporting:
    """Tells `_Scans` of each node; mixed into Nipype's distributed plugins."""

    scans: _Scans
    procs: list[Node]
    _run_errors: list[object]

    def _generate_dependency_list(self, graph: nx.DiGraph) -> None:
        super()._generate_dependency_list(graph)  # type: ignore[misc]
        self.scans.start(graph)

    def _task_finished_cb(self, jobid: int, cached: bool = False) -> None:
        super()._task_finished_cb(jobid, cached=cached)  # type: ignore[misc]
        self.scans.finished(self.procs[jobid])

    def _clean_queue(
        self, jobid: int, graph: nx.DiGraph, result: dict[str, Any] | None = None
    ) -> object:
        lines = result["traceback"] if result else format_exception(*sys.exc_info())
        notrun = super()._clean_queue(jobid, graph, result=result)  # type: ignore[misc]
        outcome = result and result.get("result")
        self.scans.failed(self.procs[jobid], _error_of(self.procs[jobid], "".join(lines), outcome))
        return notrun

    def _postrun_check(self) -> None:
        super()._postrun_check()  # type: ignore[misc]
        # Nipype would raise the first of them, though each scan's failure is reported already.
        self._run_errors = []


class _Workers(_Reporting, MultiProcPlugin):
    """Processes that each run one node at a time."""

    def __init__(self, plugin_args: dict[str, Any], log_file: Path) -> None:
        super().__init__(plugin_args=plugin_args)
        self.pool.shutdown()  # has not started any process
        self._log_file = log_file
        self._workers: set[ProcessPoolExecutor] = set()
        self._idle: list[ProcessPoolExecutor] = []

    def run(self, graph: nx.DiGraph, config: object, updatehash: bool = False) -> None:
        # Nipype collects garbage before each submission, at 0.1 s in a process of many modules.
        gc.freeze()
        try:
            super().run(graph, config, updatehash=updatehash)
        except BaseException:
            for worker in list(self._workers):
                # No public way before Python 3.14, and waiting may take as long as a node takes.
                for process in list((worker._processes or {}).values()):
                    process.kill()
            raise
        finally:
            gc.unfreeze()
            for worker in list(self._workers):  # a dying worker leaves the set
                worker.shutdown(cancel_futures=True)

    def _sort_jobs(self, jobids: list[int], scheduler: str = "tsort") -> list[int]:
        return sorted(jobids, key=lambda jobid: self.scans.rank(self.procs[jobid]))

    def _submit_job(self, node: Node, updatehash: bool = False) -> int:
        self._taskid += 1
        while True:
            worker = self._idle.pop() if self._idle else self._new_worker()
            try:
                # A process started within never sees the terminal's interrupt, which goes to all
                # processes alike; the parent gets it a moment later and ends its workers.
                with _blocked(signal.SIGINT):
                    future = worker.submit(_run_node, node, updatehash, self._taskid)
            except BrokenProcessPool:  # it died while it had nothing to do
                self._workers.discard(worker)
            else:
                break
        self._task_obj[self._taskid] = future
        future.add_done_callback(partial(self._node_done, self._taskid, worker))
        return self._taskid

    def _node_done(self, taskid: int, worker: ProcessPoolExecutor, future: Future) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            self._workers.discard(worker)
        else:
            self._idle.append(worker)
        self._taskresult[taskid] = (
            future.result()
            if error is None
            else {"result": None, "traceback": format_exception(error), "taskid": taskid}
        )

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        return self._taskresult.pop(taskid, None)

    def _new_worker(self) -> ProcessPoolExecutor:
        # "spawn": a forked process cannot use CUDA, and may inherit a lock that is held.
        worker = ProcessPoolExecutor(
            max_workers=1,
            mp_context=get_context("spawn"),
            initializer=_start_worker,
            initargs=(self._log_file, Path.cwd(), nipype_config.resource_monitor),
        )
        self._workers.add(worker)
        return worker


class _Jobs(_Reporting):
    """Jobs of a cluster; those of Slurm do not outlive the run."""

    def run(self, graph: nx.DiGraph, config: object, updatehash: bool = False) -> None:
        try:
            super().run(graph, config, updatehash=updatehash)  # type: ignore[misc]
        except BaseException:
            if isinstance(self, plugins.SLURMPlugin) and self._pending:
                jobs = [str(job) for job in self._pending]
                subprocess.run(["scancel", *jobs], capture_output=True, check=False)
            raise

    def _submit_job(self, node: Node, updatehash: bool = False) -> int:
        # Nobody would know of a job whose number was not read.
        with _blocked(signal.SIGINT, signal.SIGTERM):
            return int(super()._submit_job(node, updatehash=updatehash))  # type: ignore[misc]


class _InProcess(PluginBase):
    """Runs nodes one by one in this process, scan after scan."""

    scans: _Scans

    def run(self, graph: nx.DiGraph, config: object, updatehash: bool = False) -> None:
        self.scans.start(graph)
        lost: set[Node] = set()
        for node in nx.lexicographical_topological_sort(graph, key=self.scans.rank):
            if node in lost:
                continue
            try:
                node.run(updatehash=updatehash)
            except Exception as error:
                lines = format_exception(error)
                if _INTERRUPT.search("".join(lines)):
                    # Nipype takes it for the failure of a node.
                    raise KeyboardInterrupt from None
                report_crash(node, traceback=list(lines))
                lost |= nx.descendants(graph, node)
                self.scans.failed(node, _error_of(node, "".join(lines)))
            else:
                self.scans.finished(node)


def _plugin(settings: Settings, scans: _Scans, log_file: Path) -> PluginBase:
    nprocs = settings.nprocs or len(os.sched_getaffinity(0))
    name = "Linear" if nprocs == 1 else "MultiProc"
    arguments: dict[str, Any] = {"n_procs": nprocs}
    if settings.mem:
        arguments["memory_gb"] = settings.mem
    if settings.use_plugin:
        name, arguments = read_plugin(settings.use_plugin)
    plugin: PluginBase
    if name == "Linear":
        plugin = _InProcess()
    elif name == "MultiProc":
        # One node at a time on the GPU; a node that asks for more than there is runs alone.
        alone = {"n_gpu_procs": 1, "raise_insufficient": False}
        plugin = _Workers(alone | arguments, log_file)
    else:
        kind = getattr(plugins, f"{name}Plugin")
        plugin = type(name, (_Jobs, kind), {})(plugin_args=arguments)
    plugin.scans = scans
    return plugin


def read_plugin(path: Path) -> tuple[str, dict[str, Any]]:
    """Read the name of a Nipype plugin and its arguments from YAML.

    Raises
    ------
    InputMissingError
        There is no such file, or it cannot be read.
    UsageError
        It is not YAML, or names no plugin that can be used.
    """
    import yaml  # type: ignore[import-untyped]

    remedy = "write 'plugin: NAME' and, below it, 'plugin_args:' with its arguments"
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise InputMissingError(
            f"the file cannot be read ({error.strerror})",
            "check the path after --use-plugin",
            path=path,
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UsageError("this is not YAML", remedy, path=path) from None
    name = content.get("plugin") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise UsageError("it names no plugin", remedy, path=path)
    kind = getattr(plugins, f"{name}Plugin", None)
    if name != "Linear" and not (
        isinstance(kind, type) and issubclass(kind, DistributedPluginBase)
    ):
        raise UsageError(
            f"'{name}' is not a plugin that reports on single nodes",
            "use Linear, MultiProc, SLURM, SGE, PBS, LSF, OAR or Condor",
            path=path,
        )
    arguments = content.get("plugin_args") or {}
    if not isinstance(arguments, dict):
        raise UsageError("'plugin_args' is not a mapping", remedy, path=path)
    return name, arguments


def _configure(workflow: Workflow, base: Path, settings: Settings) -> None:
    workflow.config["execution"] = {
        **workflow.config.get("execution", {}),
        "crashdump_dir": str(base / "crash"),
        "crashfile_format": "txt",
        "create_report": False,
        "poll_sleep_duration": POLL_SECONDS,
        "remove_unnecessary_outputs": False,
        "stop_on_first_crash": False,  # `_Scans` stops, so that workers are ended as well
    }
    if settings.resource_monitor:
        nipype_config.enable_resource_monitor()


def _run_node(node: Node, updatehash: bool, taskid: int) -> dict[str, Any]:
    try:
        return {"result": node.run(updatehash=updatehash), "traceback": None, "taskid": taskid}
    except BaseException as error:
        return {"result": None, "traceback": format_exception(error), "taskid": taskid}


def _start_worker(log_file: Path, folder: Path, resource_monitor: bool) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    # Compiled code writes to the file descriptors themselves.
    log = os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    _log_handlers(log_file)
    os.chdir(folder)
    if resource_monitor:
        nipype_config.enable_resource_monitor()


def _end_with_parent() -> None:
    # A worker waits for work on a pipe that it holds open itself, so that it would outlive a
    # parent that was killed, with its memory and its GPU.
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _log_handlers(log_file: Path) -> logging.Handler:
    handler = logging.FileHandler(log_file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    logger = logging.getLogger("nipype")
    logger.handlers = [handler]
    logger.propagate = False
    return handler


@contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _logging_to(log_file: Path) -> Iterator[None]:
    logger = logging.getLogger("nipype")
    before = logger.handlers, logger.propagate
    stream = log_file.open("a", encoding="utf-8")
    handler = _log_handlers(log_file)
    try:
        with redirect_stdout(stream), redirect_stderr(stream):
            yield
    finally:
        logger.handlers, logger.propagate = before
        for each in (handler, stream):
            # On a full disk the end of the log is lost; what is said of the scans must not be.
            with suppress(OSError):
                each.close()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    # Libraries read these when they are loaded, which in a spawned worker comes after this.
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    if count:
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _error_of(node: Node, traceback: str, outcome: Any = None) -> FdlError:
    """Recover the error of a node, of which Nipype keeps the text alone."""
    if "results file does not exist" in traceback:
        return TemporaryError(
            "its job ended without a result, most likely for lack of memory or time",
            "ask for more of both in the file after --use-plugin; finished scans are kept",
        )
    if "BrokenProcessPool" in traceback:
        return TemporaryError(
            "its worker process was killed, most likely for lack of memory", _LESS_AT_ONCE
        )
    if "Exception raised while executing Node" in traceback:
        # From the cluster's job, or written by Nipype beside the node; whatever it is, the
        # traceback remains.
        with suppress(Exception):
            runtime = (outcome or node.result).runtime
            traceback = runtime.traceback
            *arguments, closing = runtime.traceback_args[0].split("\n")
            kind = _kinds().get(closing.split()[4])
            if kind is not None:
                cause, remedy, path = arguments
                return kind(cause, remedy, path=None if path == "None" else path)
    text = _last_message(traceback)
    if _NO_SPACE.search(text):
        return StorageError(text, "free space in the work and output folders and run again")
    if _NO_MEMORY.search(text):
        return TemporaryError(text, _LESS_AT_ONCE)
    return FdlError(text, "see the log in the output folder, and report it if the input is sound")


def _kinds() -> dict[str, type[FdlError]]:
    kinds, found = [FdlError], {}
    while kinds:
        kind = kinds.pop()
        found[kind.__name__] = kind
        kinds += kind.__subclasses__()
    return found


def _last_message(traceback: str) -> str:
    """Return the type and text of the exception that ends a traceback, on one line.

    Examples
    --------
    >>> _last_message("Traceback (most recent call last):\\n  File ...\\nValueError: a\\nb\\n")
    'ValueError: a b'
    """
    lines = traceback.strip("\n").splitlines()
    indented = [number for number, line in enumerate(lines) if line.startswith("  ")]
    return " ".join(line.strip() for line in lines[max(indented, default=-1) + 1 :])
