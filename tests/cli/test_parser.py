import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from fdl_bidsapp import __version__
from fdl_bidsapp.cli.parser import build_parser, parse
from fdl_bidsapp.errors import FdlError, UnknownLevelError, UsageError
from fdl_bidsapp.settings import Settings

RUN = ["bids", "out", "participant"]


def config(folder: Path, text: str) -> list[str]:
    file = folder / "options.toml"
    file.write_text(text)
    return ["--config-file", str(file)]


def test_nothing_but_positionals_gives_the_defaults() -> None:
    cwd = Path.cwd()
    assert parse(RUN) == Settings(cwd / "bids", cwd / "out", "participant")


def test_every_setting_is_an_option() -> None:
    options = {action.dest for action in build_parser()._actions}
    assert {field.name for field in fields(Settings)} <= options


def test_labels_are_taken_with_and_without_prefix() -> None:
    settings = parse(
        [*RUN, "--participant-label", "sub-01", "02", "01", "--session-label", "ses-1"]
    )
    assert settings.participant_label == ("01", "02")
    assert settings.session_label == ("1",)


def test_repeated_options_of_many_values_add_up() -> None:
    settings = parse([*RUN, "-d", "qsmxt=/d/q", "/d/r", "--derivatives", "/d/s"])
    assert settings.derivatives == (
        ("qsmxt", Path("/d/q")),
        (None, Path("/d/r")),
        (None, Path("/d/s")),
    )


@pytest.mark.parametrize(
    ("text", "gigabytes"),
    [("8", 8), ("8G", 8), ("8gb", 8), ("8GiB", 8), ("8000M", 8), ("8000MB", 8), ("1.5T", 1500)],
)
def test_memory_takes_a_unit(text: str, gigabytes: float) -> None:
    assert parse([*RUN, "--mem", text]).mem == pytest.approx(gigabytes)


@pytest.mark.parametrize("option", ["--nprocs", "--n-cpus", "--nthreads"])
def test_cpus_may_be_given_under_each_name(option: str) -> None:
    assert parse([*RUN, option, "3"]).nprocs == 3


def test_model_file_does_not_depend_on_the_working_folder() -> None:
    assert parse([*RUN, "--model", "mine.safetensors"]).model == str(
        Path.cwd() / "mine.safetensors"
    )
    assert parse([*RUN, "--model", "late"]).model == "late"


@pytest.mark.parametrize(
    "words",
    [
        ["--mem", "8X"],
        ["--mem", "0"],
        ["--nprocs", "0"],
        ["--nprocs", "two"],
        ["--omp-nthreads", "-1"],
        ["--random-seed", "1.5"],
        ["--target", "t1"],
        ["--device", "gpu"],
        ["--participant-label", "sub-01_ses-1"],
        ["--participant-label"],
        ["--participant", "01"],
        ["--no-such-option"],
    ],
)
def test_value_or_option_that_does_not_exist_is_a_usage_error(words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse([*RUN, *words])
    assert caught.value.exit_code == 64
    assert words[0] in caught.value.cause


def test_unavailable_space_is_answered_with_those_available() -> None:
    with pytest.raises(UsageError, match="'T1w' is not available; available: MNI152NLin2009aSym"):
        parse([*RUN, "--output-spaces", "T1w"])


def test_missing_positionals_say_what_to_give() -> None:
    with pytest.raises(UsageError, match="give bids_dir, output_dir and analysis_level"):
        parse(["bids"])


def test_unknown_level_has_its_own_exit_code() -> None:
    with pytest.raises(UnknownLevelError, match="'session'") as caught:
        parse(["bids", "out", "session"])
    assert caught.value.exit_code == 17


@pytest.mark.parametrize(
    "words",
    [
        ["bids", "out", "group", "--participant-label", "01"],
        ["bids", "out", "group", "--session-label", "1"],
        [*RUN, "--dry-run", "--reports-only"],
        [*RUN, "--reports-only", "--boilerplate-only"],
        [*RUN, "--nprocs", "2", "--omp-nthreads", "4"],
        [*RUN, "--use-plugin", "p.yml", "--nprocs", "2"],
        [*RUN, "--use-plugin", "p.yml", "--mem", "2"],
        [*RUN, "--clean-workdir"],
        ["bids", "./bids", "participant"],
        [*RUN, "-w", "bids"],
        [*RUN, "-w", "bids/work"],
        [*RUN, "-w", "."],
    ],
)
def test_options_that_contradict_each_other_are_usage_errors(words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words)
    assert caught.value.remedy


def test_work_folder_may_lie_in_an_output_inside_the_dataset() -> None:
    words = ["bids", "bids/derivatives/fdl", "participant", "-w", "bids/derivatives/fdl/work"]
    assert parse(words).work_dir == Path.cwd() / words[-1]


def test_bad_filter_file_is_found_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "filters.json").write_text('{"bold": {}}')
    with pytest.raises(UsageError, match="'bold' is not a contrast"):
        parse([*RUN, "--bids-filter-file", str(tmp_path / "filters.json")])


def test_config_file_gives_options_by_their_names(tmp_path: Path) -> None:
    text = """
        participant-label = ["sub-01", "02"]
        derivatives = "qsmxt=/d/q"
        n_cpus = 2
        mem = "8000M"
        flips = "yes"
        save-probabilities = false
        verbose = 2
    """
    settings = parse([*RUN, *config(tmp_path, text)])
    assert settings.participant_label == ("01", "02")
    assert settings.derivatives == (("qsmxt", Path("/d/q")),)
    assert (settings.nprocs, settings.mem) == (2, 8)
    assert (settings.flips, settings.save_probabilities, settings.verbose) == ("yes", False, 2)


def test_command_line_wins_over_config_file(tmp_path: Path) -> None:
    words = config(tmp_path, 'participant-label = ["01"]\ntarget = "qsm"\nnprocs = 2')
    settings = parse([*RUN, *words, "--participant-label", "03", "--nprocs", "1"])
    assert settings.participant_label == ("03",)
    assert (settings.nprocs, settings.target) == (1, "qsm")


def test_settings_of_a_run_serve_as_config_file(tmp_path: Path) -> None:
    first = parse(
        [*RUN, "-d", "q=/d/q", "--mem", "8", "-vv", "--flips", "no", "--session-label", "1"]
    )
    assert parse([*RUN, *config(tmp_path, first.to_toml())]) == first


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("colour = 1", "'colour' is not an option"),
        ('config-file = "a"', "'config-file' is not an option"),
        ('target = "t1"', "invalid choice: 't1'"),
        ("save-probabilities = 1", "'save-probabilities' must be true or false"),
        ("target = ['qsm']", "'target' has a value of the wrong type"),
        ("nprocs = true", "'nprocs' has a value of the wrong type"),
        ("nprocs", "not TOML"),
    ],
)
def test_bad_config_file_is_named_with_the_key(tmp_path: Path, text: str, cause: str) -> None:
    words = config(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        parse([*RUN, *words])
    assert cause in caught.value.cause
    assert caught.value.path == words[1]


def test_conflict_between_config_file_and_command_line_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        parse([*RUN, *config(tmp_path, "dry-run = true"), "--reports-only"])


def test_absent_config_file_is_missing_input(tmp_path: Path) -> None:
    with pytest.raises(FdlError) as caught:
        parse([*RUN, "--config-file", str(tmp_path / "no.toml")])
    assert caught.value.exit_code == 66


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fdl-bidsapp {__version__}\n"


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, fdl_bidsapp.cli.parser as p\n"
        "try: p.parse(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'nipype', 'ants', 'pandas', 'numpy', 'matplotlib', 'bids', 'nibabel'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--participant-label" in done.stdout
    assert time.perf_counter() - start < 3
