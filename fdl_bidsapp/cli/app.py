"""``fdl-bidsapp``: the BIDS App."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fdl_bidsapp import __version__
from fdl_bidsapp.cli.parser import parse
from fdl_bidsapp.cli.trouble import explain, reader_left, visible
from fdl_bidsapp.errors import (
    FdlError,
    InputMissingError,
    OutputError,
    StorageError,
    UsageError,
)
from fdl_bidsapp.processor import available_cores, wait_politely
from fdl_bidsapp.settings import BEST, Settings, read_bids_filters
from fdl_bidsapp.space import lacks_space, where_space_lacks

if TYPE_CHECKING:
    from fdl_bidsapp.bids.inputs import Discovery, Scan
    from fdl_bidsapp.derivatives import Provenance
    from fdl_bidsapp.models.bundle import Bundle


_INTERRUPTED = 128 + signal.SIGINT
_WORK_PREFIX = "fdl-bidsapp-"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the app and exit with the code of the BIDS Apps execution specification."""
    wait_politely()
    stop = _Stop()
    # Schedulers and `docker stop` send SIGTERM some seconds before they kill: time to tidy up.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    code = run(argv)
    sys.exit(128 + stop.received if code == _INTERRUPTED else code)


class _Stop:
    """A signal handler that interrupts, and remembers that it did.

    The interrupt is lost when it falls into a destructor or into code that catches everything, as
    some libraries do while they are imported.
    """

    received = 0

    def __call__(self, number: int, _: object) -> None:
        again, self.received = self.received, number
        # Tidying up is under way; only somebody at the terminal may want to cut it short.
        if not again or number == signal.SIGINT:
            raise KeyboardInterrupt


def _interrupt_if_told_to_stop() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _Stop) and handler.received:
        raise KeyboardInterrupt


def run(argv: Sequence[str] | None = None) -> int:
    """Run the app and return its exit code; errors are told in one line."""
    settings = None
    try:
        settings = parse(argv)
        level = {"participant": run_participant, "group": run_group}[settings.analysis_level]
        code = level(settings)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("fdl-bidsapp: stopped; run it again to go on", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if reader_left(error):
            return 128 + signal.SIGPIPE
        told = explain(error, _log_dir(settings))
        _say(f"fdl-bidsapp: {told}")
        return told.exit_code


def _log_dir(settings: Settings | None) -> Path | None:
    """Return the folder of logs, once an earlier step has made it: it may be someone else's."""
    if settings and (settings.output_dir / "logs" / "CITATION.md").is_file():
        return settings.output_dir / "logs"
    return None


def run_group(settings: Settings) -> int:
    """Gather the cohort's tables from the output folder, and make its pages."""
    from fdl_bidsapp.cohort import collect, write_group
    from fdl_bidsapp.reports.group import write_group_page
    from fdl_bidsapp.reports.participant import write_cohort_participants

    gather = collect if settings.reports_only else write_group
    cohort = gather(
        settings.output_dir,
        settings.bids_dir,
        ratings=settings.ratings,
        controls=settings.controls,
    )
    for warning in cohort.warnings:
        _say(f"Warning: {warning}")
    page = write_group_page(settings.output_dir, cohort)
    write_cohort_participants(settings.output_dir, cohort)
    counts = ", ".join(f"{number} {status}" for status, number in cohort.scans.items())
    _say(f"{settings.output_dir / 'group_morph.tsv'}: {counts}")
    _say(f"To look at: {page}")
    return 0


def _rebuild_pages(settings: Settings) -> int:
    """Make the pages of participants again, from the output folder alone."""
    from fdl_bidsapp.reports.participant import write_participants

    pages = write_participants(
        settings.output_dir, settings.participant_label or ("*",), settings.bids_dir
    )
    if not pages:
        raise InputMissingError(
            "there is no result of such participants here",
            "run the participant level without --reports-only first",
            path=settings.output_dir,
        )
    _say(f"{len(pages)} page{'s' * (len(pages) != 1)} made in {settings.output_dir}")
    return 0


def run_participant(settings: Settings) -> int:
    """Segment every scan that is asked for and not done yet."""
    if settings.reports_only:
        return _rebuild_pages(settings)

    from fdl_bidsapp.bids.inputs import find_scans

    discovery = find_scans(
        settings.bids_dir,
        derivatives=settings.derivatives,
        participant_labels=settings.participant_label,
        session_labels=settings.session_label,
        bids_filters=read_bids_filters(settings.bids_filter_file),
        database_dir=settings.bids_database_dir,
        exclude=[settings.output_dir],
        validate=not settings.skip_bids_validation,
        reconstruct=settings.recon != "never",
    )
    for note in discovery.notes:
        _say(f"Note: {note}")

    from fdl_bidsapp.making import recon_identity
    from fdl_bidsapp.models.bundle import load_bundle

    bundle = load_bundle(settings.model)
    if settings.target == BEST and bundle.spec.calibration is None:
        raise UsageError(
            f"the model {bundle.spec.name!r} does not foretell its Dice, and cannot choose the "
            "best contrast by it",
            "name a contrast with --target, or use a calibrated model such as the default",
        )
    # A file that is no such network is told before anything is done.
    recon_identity(settings.recon)
    if settings.dry_run:
        _tell_plan(settings, discovery, bundle)
        return 0

    from fdl_bidsapp.bids.outputs import prepare_output
    from fdl_bidsapp.models.inference import resolve_device

    device = resolve_device(settings.device).type

    prepare_output(
        settings.output_dir,
        settings.bids_dir,
        settings.derivatives,
        labels=bundle.spec.labels,
        registration=bool(settings.output_spaces),
        validate=not settings.skip_bids_validation,
    )
    if settings.boilerplate_only:
        _say(f"Methods text: {settings.output_dir / 'logs' / 'CITATION.md'}")
        return 0
    return _segment(settings, discovery, bundle, device)


def _segment(settings: Settings, discovery: Discovery, bundle: Bundle, device: str) -> int:
    from fdl_bidsapp.bids.outputs import is_current, write_text
    from fdl_bidsapp.derivatives import (
        remove_missing,
        remove_partial,
        result_key,
        write_failure,
        write_missing,
    )

    _say(f"fdl-bidsapp {__version__}, model {bundle.spec.name} {bundle.sha256[:12]}, on {device}")
    # In a container every run has the same process number.
    stamp = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
    write_text(settings.output_dir / "logs" / f"{stamp}_settings.toml", settings.to_toml())

    failures: dict[str, FdlError] = {}
    todo: dict[str, tuple[Scan, Provenance]] = {}
    current = 0
    for scan in discovery.scans:
        key = result_key(scan, _result_options(settings, bundle))
        provenance = _provenance(settings, bundle, key)
        promised = _promised(settings, scan)
        remove_missing(settings.output_dir, scan)
        if scan.error is not None:
            failures[scan.source_prefix] = scan.error
            write_failure(settings.output_dir, scan, scan.error, provenance)
        elif is_current(settings.output_dir, scan, key, promised=promised):
            current += 1
        else:
            # By the scan and not by number, so that jobs can share a work folder; Nipype's names
            # have no plus sign, and Graphviz's no hyphen.
            name = scan.source_prefix.replace("-", "_").replace("+", "__")
            todo[name] = (scan, provenance)
    for subject, session in discovery.missing:
        write_missing(settings.output_dir, subject, session, _provenance(settings, bundle, ""))
    if current:
        _say(f"{_scans(current)} up to date already: nothing is done again")
    if todo:
        log_file = settings.output_dir / "logs" / f"{stamp}_nipype.log"
        try:
            failed = _run_workflow(settings, todo, bundle, device, log_file)
        except BaseException:
            for scan, _ in todo.values():
                remove_partial(settings.output_dir, scan)
            raise
        for name, error in failed.items():
            scan, provenance = todo[name]
            if is_current(
                settings.output_dir, scan, provenance.key, promised=_promised(settings, scan)
            ):
                continue  # another run that shares the folder has done it meanwhile
            failures[scan.source_prefix] = error
            write_failure(settings.output_dir, scan, error, provenance)
        _tell_notes(settings, [scan for name, (scan, _) in todo.items() if name not in failed])
        if failed:
            _say(f"Log: {log_file}")
    _write_pages(settings, discovery)
    _tell_outcome(len(discovery.scans), failures, discovery.missing)
    return 1 if failures or discovery.missing else 0


def _write_pages(settings: Settings, discovery: Discovery) -> None:
    from fdl_bidsapp.reports.participant import write_participants

    labels = dict.fromkeys(
        [scan.subject for scan in discovery.scans] + [label for label, _ in discovery.missing]
    )
    write_participants(settings.output_dir, labels, settings.bids_dir)


def _run_workflow(
    settings: Settings,
    todo: dict[str, tuple[Scan, Provenance]],
    bundle: Bundle,
    device: str,
    log_file: Path,
) -> dict[str, FdlError]:
    from fdl_bidsapp.workflows.engine import run as run_workflow
    from fdl_bidsapp.workflows.participant import Compute, Job, init_participant_wf
    from fdl_bidsapp.workflows.progress import Progress

    cpus = settings.nprocs or available_cores()
    # One scan alone gets all processors and needs no process of its own.
    at_once = min(cpus, len(todo))
    threads = settings.omp_nthreads or max(1, cpus // at_once)
    settings = replace(settings, nprocs=1 if at_once == 1 else cpus, omp_nthreads=threads)
    jobs = {name: Job(scan, provenance) for name, (scan, provenance) in todo.items()}
    titles = {name: job.scan.source_prefix for name, job in jobs.items()}
    compute = Compute(
        bundle.path, bundle.sha256, device, threads, fall_back=settings.device == "auto"
    )
    with _work_folder(settings) as folder, Progress(len(jobs)) as progress:
        workflow = init_participant_wf(jobs, settings, compute, folder)

        def done(name: str, error: FdlError | None) -> None:
            _interrupt_if_told_to_stop()
            if isinstance(error, StorageError):
                # What fails one scan for such a reason fails all that are to come.
                raise where_space_lacks(
                    error, settings, folder, todo[name][0], bundle.spec, at_once
                )
            if error is None or settings.work_dir is None:
                # A large cohort would fill the disk.
                shutil.rmtree(folder / workflow.name / name, ignore_errors=True)
            progress.scan_done(failed=error is not None)

        if settings.write_graph:
            path = settings.output_dir / "logs" / "graph.dot"
            drawn = shutil.which("dot") is not None
            workflow.write_graph(str(path), graph2use="colored", format="svg" if drawn else "dot")
            if not drawn:
                _say(f"Note: Graphviz is not installed, {path} has the graph to be drawn")
        _interrupt_if_told_to_stop()
        try:
            failed = run_workflow(workflow, settings, titles, done, log_file=log_file)
        except OSError as error:  # Nipype's own files
            first = next(iter(jobs.values())).scan
            told = explain(error)
            raise where_space_lacks(told, settings, folder, first, bundle.spec, at_once) from error
        if failed and settings.work_dir:
            _say(f"Intermediate files of scans that failed: {folder}")
        return failed


@contextmanager
def _work_folder(settings: Settings) -> Iterator[Path]:
    """Give a new folder for intermediate files, in the one asked for or in the system's.

    Nothing is taken over from an earlier run: what a power cut has left half-written, or another
    version or model has made, can get into no result, and runs that share a work folder do not
    meet. With ``--work-dir``, the files of scans that failed stay.
    """
    parent = settings.work_dir
    if parent and settings.clean_workdir:
        for earlier in parent.glob(f"{_WORK_PREFIX}*"):
            shutil.rmtree(earlier, ignore_errors=True)
    try:
        if parent:
            parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=parent))
    except OSError as error:
        kind = StorageError if lacks_space(error) else OutputError
        raise kind(
            f"the work folder cannot be made or written to ({error.strerror})",
            "choose another --work-dir",
            path=parent or tempfile.gettempdir(),
        ) from error
    keep = False
    try:
        yield folder
        keep = parent is not None and any((folder / "fdl").glob("sub_*"))
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _result_options(settings: Settings, bundle: Bundle) -> dict[str, object]:
    from fdl_bidsapp.making import recon_identity

    options: dict[str, object] = {
        "model": bundle.sha256,
        "recon": recon_identity(settings.recon),
        "qsm_reference": settings.qsm_reference,
        "target": settings.target,
        "flips": bundle.spec.averages_flips(settings.flips),
        "probabilities": settings.save_probabilities,
        "spaces": list(settings.output_spaces),
    }
    if settings.output_spaces:
        options["seed"] = settings.random_seed
    return options


def _provenance(settings: Settings, bundle: Bundle, key: str) -> Provenance:
    from fdl_bidsapp.derivatives import Provenance

    return Provenance(bundle.spec.name, bundle.sha256, key, settings.save_probabilities)


def _promised(settings: Settings, scan: Scan) -> list[Path]:
    """Return the files asked for beyond the masks and the table."""
    from fdl_bidsapp.bids.outputs import output_path

    out = settings.output_dir
    paths = [
        path
        for space in settings.output_spaces
        for path in (
            output_path(out, scan.entities, "dseg", space=space, res="1"),
            output_path(out, scan.entities, "xfm", to=space),
        )
    ]
    if settings.save_probabilities:
        paths.append(output_path(out, scan.entities, "probseg"))
    return paths


def _tell_plan(settings: Settings, discovery: Discovery, bundle: Bundle) -> None:
    """List the inputs found and the outputs planned (``--dry-run``)."""
    from fdl_bidsapp.bids.outputs import output_path
    from fdl_bidsapp.pipeline import choose_target

    for scan in discovery.scans:
        print(scan.source_prefix)
        if scan.error is not None:
            print(f"  cannot be done: {scan.error}")
            continue
        try:
            contrasts = [source.contrast for source in scan.sources]
            targets = [choose_target(contrasts, settings.target, bundle.spec.contrasts)]
            if settings.target == BEST:
                targets = [each for each in contrasts if each in bundle.spec.contrasts]
        except FdlError as error:
            print(f"  cannot be done: {error}")
            continue
        for source in scan.sources:
            chosen = "  <- segmented" if source.contrast in targets else ""
            print(f"  {source.contrast} ({source.derivation}){chosen}")
            for path in (*source.paths, *source.phase):
                print(f"    {path}")
        print(f"  would write {output_path(settings.output_dir, scan.entities, 'dseg')}")
    for subject, session in discovery.missing:
        print(f"{_title(subject, session)}: no usable contrast")


def _tell_notes(settings: Settings, scans: Sequence[Scan]) -> None:
    """Say what was converted, resampled or left out."""
    from fdl_bidsapp.bids.outputs import output_path, read_record

    noted = 0
    for scan in scans:
        path = output_path(settings.output_dir, scan.entities, "morph", extension=".json")
        notes = (read_record(path) or {}).get("Notes") or []
        noted += bool(notes)
        for note in notes if settings.verbose else ():
            _say(f"  {scan.source_prefix}: {note}")
    if noted and not settings.verbose:
        _say(f"{_scans(noted)} with notes: see Notes in _morph.json, or run with -v")


def _tell_outcome(
    total: int, failures: dict[str, FdlError], missing: Sequence[tuple[str, str | None]]
) -> None:
    done = total - len(failures)
    _say(f"{done} of {_scans(total)} done, {len(failures)} failed, {len(missing)} without input")
    for title, error in sorted(failures.items()):
        _say(f"  {title}: {error}")
    for subject, session in missing:
        _say(f"  {_title(subject, session)}: no usable contrast was found")


def _title(subject: str, session: str | None) -> str:
    return f"sub-{subject}" + (f"_ses-{session}" if session else "")


def _scans(number: int) -> str:
    return f"{number} scan" + ("" if number == 1 else "s")


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr)
