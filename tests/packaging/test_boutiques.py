import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Action
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from fdl_bidsapp import __version__, errors
from fdl_bidsapp.cli.parser import build_parser, parse
from fdl_bidsapp.errors import FdlError
from fdl_bidsapp.settings import Settings

DESCRIPTOR = Path(__file__).parents[2] / "boutiques.json"
TOOL: dict[str, Any] = json.loads(DESCRIPTOR.read_text("utf-8"))
GROUP_ONLY = ("ratings", "controls")
OUTPUTS = ("output_dir_name", "participant_level_analysis_dir")
"""The same word twice, as Boutiques' rules for BIDS Apps want it: any name, or a folder."""

INPUTS: dict[str, dict[str, Any]] = {
    "output_dir" if item["id"] == OUTPUTS[0] else item["id"]: item
    for item in TOOL["inputs"]
    if item["id"] != OUTPUTS[1]
}
OPTIONS = {name: item for name, item in INPUTS.items() if "command-line-flag" in item}
ACTIONS: dict[str, Action] = {
    action.dest: action
    for action in build_parser()._actions
    if action.dest not in ("help", "version")  # they run nothing
}


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Give a value for every option, as Boutiques takes it."""
    folder = tmp_path_factory.mktemp("files")
    for name, text in {"filters.json": "{}", "options.toml": "", "plugin.yml": ""}.items():
        (folder / name).write_text(text)
    some: dict[str, Any] = {
        "participant_label": ["01", "sub-02"],
        "session_label": ["1"],
        "bids_filter_file": str(folder / "filters.json"),
        "derivatives": [str(folder), str(folder.parent)],
        "bids_database_dir": "database",
        "model": "default",
        "recon": "tv",
        "nprocs": 4,
        "omp_nthreads": 2,
        "mem": "8G",
        "use_plugin": str(folder / "plugin.yml"),
        "work_dir": "work folder",
        "config_file": str(folder / "options.toml"),
        "random_seed": 7,
        "ratings": [str(folder / "ratings.tsv")],
        "controls": "diagnosis=control",
    }
    for name, item in OPTIONS.items():
        if item["type"] == "Flag":
            some[name] = True
        elif "value-choices" in item:
            choice = item["value-choices"][-1]
            some[name] = [choice] if item.get("list") else choice
    assert set(some) == set(OPTIONS)
    return some


def words(name: str, value: object) -> list[str]:
    given = [] if value is True else value if isinstance(value, list) else [value]
    return [OPTIONS[name]["command-line-flag"], *map(str, given)]


def accepts(*options: str, level: str = "participant") -> bool:
    try:
        parse(["bids", "out", level, *options])
    except FdlError:
        return False
    return True


def test_describes_every_option_and_no_other() -> None:
    assert set(INPUTS) == set(ACTIONS)


@pytest.mark.parametrize("name", INPUTS)
def test_flags_lists_and_need_are_those_of_the_parser(name: str) -> None:
    item, action = INPUTS[name], ACTIONS[name]
    if action.option_strings:
        assert item["command-line-flag"] in action.option_strings
    else:
        assert "command-line-flag" not in item
    assert item.get("list", False) == (action.nargs == "+")
    assert (item["type"] == "Flag") == (action.nargs == 0)
    if name != "output_dir":
        assert item["optional"] != action.required


def test_one_of_the_two_output_folders_is_required() -> None:
    types = {item["id"]: item["type"] for item in TOOL["inputs"]}
    assert [types[name] for name in OUTPUTS] == ["String", "File"]
    group = next(group for group in TOOL["groups"] if group["members"] == list(OUTPUTS))
    assert group["one-is-required"]
    assert group["mutually-exclusive"]


@pytest.mark.parametrize("name", INPUTS)
def test_says_of_each_option_and_its_default_what_the_help_says(name: str) -> None:
    text = ACTIONS[name].help
    assert text is not None
    assert INPUTS[name]["description"] == text % {}


def test_puts_no_default_on_the_command_line() -> None:
    # It would win over --config-file.
    assert not [item["id"] for item in TOOL["inputs"] if "default-value" in item]


@pytest.mark.parametrize("name", [n for n, item in OPTIONS.items() if item["type"] == "String"])
def test_choices_are_those_of_the_parser(name: str) -> None:
    choices = OPTIONS[name].get("value-choices", [])
    assert all(accepts(*words(name, choice)) for choice in choices)
    takes_any = accepts(*words(name, "nonsense"))
    assert takes_any != bool(choices) or name in ("mem", "controls", "recon")
    if ACTIONS[name].choices is not None:
        assert choices == list(ACTIONS[name].choices or ())


def test_levels_are_those_of_the_parser() -> None:
    levels = INPUTS["analysis_level"]["value-choices"]
    assert set(levels) == {"participant", "group"}
    assert all(accepts(level=level) for level in levels)


@pytest.mark.parametrize("name", [n for n, item in OPTIONS.items() if item["type"] == "Number"])
def test_numbers_have_the_limits_of_the_parser(name: str) -> None:
    item = OPTIONS[name]
    assert item["integer"]
    assert not accepts(*words(name, 1.5))
    assert accepts(*words(name, item["minimum"]))
    assert not accepts(*words(name, item["minimum"] - 1))
    if "maximum" in item:
        assert accepts(*words(name, item["maximum"]))
    assert accepts(*words(name, item.get("maximum", 2**40) + 1)) != ("maximum" in item)


@pytest.mark.parametrize("level", ["participant", "group"])
def test_disables_at_a_level_what_the_parser_refuses_there(
    level: str, values: dict[str, Any]
) -> None:
    refused = {
        name
        for name, value in values.items()
        if name != "clean_workdir" and not accepts(*words(name, value), level=level)
    }
    assert refused == set(INPUTS["analysis_level"]["value-disables"][level])


def test_excludes_the_pairs_that_the_parser_refuses(values: dict[str, Any]) -> None:
    excluded = {
        frozenset(pair)
        for group in TOOL["groups"]
        if group.get("mutually-exclusive") and group["members"] != list(OUTPUTS)
        for pair in combinations(group["members"], 2)
    } | {
        frozenset((name, other))
        for name, item in OPTIONS.items()
        for other in item.get("disables-inputs", [])
    }
    free = set(values) - {"clean_workdir", *GROUP_ONLY}
    refused = {
        frozenset(pair)
        for pair in combinations(sorted(free), 2)
        if not accepts(*words(pair[0], values[pair[0]]), *words(pair[1], values[pair[1]]))
    }
    assert refused == excluded


def test_requires_what_the_parser_requires(values: dict[str, Any]) -> None:
    needy = {
        name: item["requires-inputs"] for name, item in OPTIONS.items() if "requires-inputs" in item
    }
    assert needy == {"clean_workdir": ["work_dir"]}
    assert not accepts("--clean-workdir")
    assert accepts("--clean-workdir", *words("work_dir", values["work_dir"]))


def test_command_line_has_the_program_and_each_key_in_brackets() -> None:
    before, _, line = TOOL["command-line"].partition("; ")
    program, *keys = line.split()
    assert before == "mkdir -p [OUTPUT_DIR]"
    assert program == "fdl-bidsapp"
    assert keys[:3] == ["[BIDS_DIR]", "[OUTPUT_DIR]", "[ANALYSIS_LEVEL]"]
    assert all(re.fullmatch(r"\[[A-Z_]+\]", key) for key in keys)
    assert sorted(keys) == sorted(item["value-key"] for item in INPUTS.values())


def test_version_and_image_are_those_of_the_package() -> None:
    assert TOOL["tool-version"] == __version__
    assert TOOL["container-image"]["image"] == f"fdl-bidsapp:{__version__}"


def test_exit_codes_are_those_of_the_errors() -> None:
    codes = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, FdlError)
    }
    assert {entry["code"] for entry in TOOL["error-codes"]} == codes


@pytest.fixture(scope="module")
def bosh() -> str:
    """Give the path of Boutiques' own command."""
    found = shutil.which("bosh", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("boutiques is not installed")
    return found


@pytest.mark.real
def test_is_valid_for_boutiques_and_its_bids_rules(bosh: str, tmp_path: Path) -> None:
    done = run([bosh, "validate", "--bids", str(DESCRIPTOR)], tmp_path)
    assert done.returncode == 0, done.stdout
    assert "BIDS validation OK" in done.stdout


@pytest.mark.real
@pytest.mark.parametrize("absent", [(), ("mem", "nprocs")], ids=["no plugin", "plugin"])
def test_boutiques_makes_a_command_line_that_means_what_was_asked(
    bosh: str, tmp_path: Path, values: dict[str, Any], absent: tuple[str, ...]
) -> None:
    (tmp_path / "bids").mkdir()
    left_out = {"dry_run", "reports_only", *GROUP_ONLY, *(absent or ("use_plugin",))}
    chosen = {name: value for name, value in values.items() if name not in left_out}
    expected = [str(tmp_path / "bids"), str(tmp_path / "the output"), "participant"]
    for name, value in chosen.items():
        expected += words(name, value)
    line = simulate(
        bosh,
        tmp_path,
        bids_dir=expected[0],
        output_dir_name=expected[1],
        analysis_level=expected[2],
        **chosen,
    )
    program, *arguments = shlex.split(line)
    assert program == "fdl-bidsapp"
    assert parse(arguments) == parse(expected)


@pytest.mark.real
def test_boutiques_makes_the_command_line_of_the_group_level(
    bosh: str, tmp_path: Path, values: dict[str, Any]
) -> None:
    for name in ("bids", "out"):
        (tmp_path / name).mkdir()
    line = simulate(
        bosh,
        tmp_path,
        bids_dir=str(tmp_path / "bids"),
        output_dir_name=str(tmp_path / "out"),
        analysis_level="group",
        **{name: values[name] for name in GROUP_ONLY},
    )
    assert parse(shlex.split(line)[1:]) == Settings(
        tmp_path / "bids",
        tmp_path / "out",
        "group",
        ratings=tuple(map(Path, values["ratings"])),
        controls=values["controls"],
    )


def simulate(bosh: str, folder: Path, **invocation: object) -> str:
    """Return the app's part of the command line that Boutiques makes of an invocation."""
    file = folder / "invocation.json"
    file.write_text(json.dumps(invocation))
    done = run([bosh, "exec", "simulate", str(DESCRIPTOR), "-i", str(file)], folder)
    assert done.returncode == 0, done.stdout
    made, _, line = done.stdout.strip().splitlines()[-1].partition("; ")
    assert shlex.split(made)[:2] == ["mkdir", "-p"]
    return line


def run(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that keeps a cache in the home folder."""
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=home,
        env={**os.environ, "HOME": str(home)},
        check=False,
    )
