from pathlib import Path

import pytest

from fdl_bidsapp.errors import InputMissingError, UsageError
from fdl_bidsapp.settings import Settings, read_bids_filters, read_config

FULL = Settings(
    Path("/data/häd bids"),
    Path("/out"),
    "participant",
    participant_label=("01", "02"),
    session_label=("1",),
    bids_filter_file=Path("/filters.json"),
    derivatives=(("qsmxt", Path("/d/qsmxt")), (None, Path("/d/a=b"))),
    target="qsm",
    output_spaces=("MNI152NLin2009aSym",),
    nprocs=4,
    mem=7.5,
    work_dir=Path("/work"),
    save_probabilities=True,
    verbose=2,
)


@pytest.mark.parametrize("settings", [FULL, Settings(Path("/a"), Path("/b"), "group")])
def test_toml_keeps_every_setting(settings: Settings) -> None:
    assert Settings.from_toml(settings.to_toml()) == settings


def test_toml_uses_the_names_of_the_options() -> None:
    text = FULL.to_toml()
    assert 'participant-label = [\n    "01",' in text
    assert "save-probabilities = true" in text


@pytest.mark.parametrize("text", ["colour = 1", "bids-dir =", 'bids-dir = "/a"'])
def test_settings_that_are_not_complete_toml_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Settings.from_toml(text)


def test_filters_are_read_per_contrast(tmp_path: Path) -> None:
    file = tmp_path / "filters.json"
    file.write_text('{"qsm": {"acquisition": "hr", "run": [1, 2], "session": null}}')
    expected = {"qsm": {"acquisition": "hr", "run": [1, 2], "session": None}}
    assert read_bids_filters(file) == expected
    assert read_bids_filters(None) == {}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"qsm": ', "not JSON"),
        ('["qsm"]', "not a JSON object"),
        ('{"bold": {}}', "'bold' is not a contrast"),
        ('{"qsm": "hr"}', "'qsm' are not an object"),
    ],
)
def test_bad_filters_are_named_with_their_file(tmp_path: Path, text: str, cause: str) -> None:
    file = tmp_path / "filters.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=cause) as caught:
        read_bids_filters(file)
    assert caught.value.path == str(file)


def test_absent_file_of_options_is_missing_input(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="No such file"):
        read_bids_filters(tmp_path / "no.json")
    with pytest.raises(InputMissingError, match="--config-file"):
        read_config(tmp_path / "no.toml")


def test_binary_file_of_options_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "filters.json"
    file.write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(UsageError, match="not a text file"):
        read_bids_filters(file)
