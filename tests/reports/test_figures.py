"""Figures for papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fdl_bidsapp.cli.toolbox import run
from fdl_bidsapp.cohort import write_group
from fdl_bidsapp.errors import DataError, InputMissingError, UsageError
from fdl_bidsapp.reports.figures import WIDTH_MM, write_figures


@pytest.fixture
def table(output: Any) -> Path:
    """Give the table of a small cohort, with a dollar sign in it."""
    lines = ["participant_id,age,diagnosis"]
    for k in range(6):
        output.add(f"{k}", {"RNL": 200.0 + k, "RNR": 210.0 - k, "DNL": 900.0, "DNR": 880.0 + k})
        lines.append(f"sub-{k},{50 + k},{'control' if k % 2 else '$P$ & <D>'}")
    output.participants(*lines)
    write_group(output.out, output.bids)
    return output.out / "group_morph.tsv"


def test_each_plot_is_an_svg_with_text_and_a_png_of_print_size(table: Path, tmp_path: Path) -> None:
    assert run(["figure", str(table.parent), "--output", str(tmp_path / "f")]) == 0
    names = {path.name for path in (tmp_path / "f").iterdir()}
    kinds = [f"{k}_{m}" for k in ("groups", "age", "sides") for m in ("volume", "qsm_mean")]
    assert names >= {f"{name}.{e}" for name in (*kinds, "qsm_r2star") for e in ("svg", "png")}
    image = Image.open(tmp_path / "f" / "groups_volume.png")
    assert image.width == pytest.approx(WIDTH_MM / 25.4 * 300, abs=2)
    text = (tmp_path / "f" / "groups_volume.svg").read_text()
    for words in ("Red nucleus left", "Volume (mm³)", "control (3)", "$P$ &amp; &lt;D&gt; (3)"):
        assert words in text


def test_figures_made_again_are_the_same(table: Path, tmp_path: Path) -> None:
    first, second = (
        [path.read_bytes() for path in write_figures(table, tmp_path / name, measures=["volume"])]
        for name in ("a", "b")
    )
    assert first == second


def test_a_participant_s_sessions_are_joined_by_a_line(output: Any, tmp_path: Path) -> None:
    for k in range(3):
        output.add(f"{k}", {"RNL": 200.0, "RNR": 210.0}, session="1")
        output.add(f"{k}", {"RNL": 190.0, "RNR": 215.0}, session="2")
        (output.bids / f"sub-{k}").mkdir()
        # The last one did not grow older.
        table = f"session_id\tage\nses-1\t{50 + k}\nses-2\t{52 + k - 2 * (k == 2)}\n"
        (output.bids / f"sub-{k}" / f"sub-{k}_sessions.tsv").write_text(table)
    write_group(output.out, output.bids)
    write_figures(output.out / "group_morph.tsv", tmp_path)
    drawn = (tmp_path / "age_volume.svg").read_text()
    assert drawn.count("stroke-width: 0.5;") == 2 * 2


def test_what_is_not_there_is_not_drawn(output: Any, tmp_path: Path) -> None:
    output.add("1", {"RNL": 200.0}, cells={"r2star_mean": "n/a"})
    write_group(output.out, output.bids)
    paths = write_figures(output.out / "group_morph.tsv", tmp_path / "f")
    assert {path.stem for path in paths} == {"groups_volume", "groups_qsm_mean"}


def test_a_table_that_is_none_is_refused(table: Path, output: Any, tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="run the group level first"):
        write_figures(tmp_path / "group_morph.tsv", tmp_path / "f")
    with pytest.raises(UsageError, match="no column 'dx'"):
        write_figures(table, tmp_path / "f", by="dx")
    output.participants("participant_id")
    with pytest.raises(DataError, match="no table of a cohort"):
        write_figures(output.bids / "participants.tsv", tmp_path / "f")
