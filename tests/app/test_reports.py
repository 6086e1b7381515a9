"""The pages of a whole run: made at both levels, made again without images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real


def pages(study) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in study.out.glob("*.html")}


@pytest.fixture
def done(study):
    """Give a study whose first participant is segmented, and whose second one has failed."""
    study.add("01", ("qsm", "r2star", "imag"))
    study.path("02").write_text("no image")
    (study.bids / "participants.tsv").write_text(
        "participant_id\tage\tdiagnosis\nsub-01\t61\t<b>PD</b>\nsub-02\t60\tcontrol\n"
    )
    assert study.run() == 1
    return study


def test_each_participant_gets_a_page_with_figures_or_the_reason(done) -> None:
    made = pages(done)
    assert set(made) == {"sub-01.html", "sub-02.html"}
    figures = sorted(path.name for path in (done.out / "sub-01" / "figures").iterdir())
    assert figures == [
        "sub-01_seg-fdl_desc-overview_dseg.svg",
        "sub-01_seg-fdl_label-RNL_desc-histogram_dseg.svg",
        "sub-01_seg-fdl_label-RNL_desc-overlay_dseg.svg",
        "sub-01_seg-fdl_label-RNR_desc-histogram_dseg.svg",
        "sub-01_seg-fdl_label-RNR_desc-overlay_dseg.svg",
    ]
    text = made["sub-01.html"].decode()
    assert all(f'src="sub-01/figures/{name}"' in text for name in figures)
    assert "diagnosis &lt;b&gt;PD&lt;/b&gt;" in text
    assert "Not segmented" in made["sub-02.html"].decode()


def test_a_scan_whose_figures_cannot_be_drawn_keeps_its_masks(study, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no pen")

    monkeypatch.setattr("fdl_bidsapp.reports.reportlets.draw_scan", fail)
    study.add("01")
    assert study.run() == 0
    note = "the figures could not be drawn (ValueError: no pen)"
    assert note in study.record("01")["Notes"]
    text = pages(study)["sub-01.html"].decode()
    assert note in text
    assert "overlay figure is not in the output folder" in text


def test_the_group_level_links_the_pages_and_the_dataset_stays_valid(done) -> None:
    assert done.run("group") == 0
    made = pages(done)
    assert set(made) == {"sub-01.html", "sub-02.html", "group_morph.html"}
    assert 'href="group_morph.html"' in made["sub-01.html"].decode()
    command = Path(sys.executable).with_name("bids-validator-deno")
    if not command.exists():
        pytest.skip("bids-validator-deno is not installed")
    run = subprocess.run([command, done.out, "--json"], capture_output=True, text=True, check=False)
    found = json.loads(run.stdout)["issues"]["issues"]
    assert [issue for issue in found if issue["severity"] == "error"] == []


def test_pages_are_made_again_without_images(done, monkeypatch) -> None:
    assert done.run("group") == 0
    before = pages(done)
    tables = {path: path.stat().st_mtime_ns for path in done.out.glob("group_*.tsv")}
    for path in (*done.bids.rglob("*.nii.gz"), *done.out.glob("*.html")):
        path.unlink()
    monkeypatch.setattr("fdl_bidsapp.bids.inputs.find_scans", None)
    assert done.run("participant", "--reports-only", "--participant-label", "01") == 0
    assert set(pages(done)) == {"sub-01.html"}
    assert done.run("participant", "--reports-only") == 0
    assert done.run("group", "--reports-only") == 0
    assert pages(done) == before
    assert tables == {path: path.stat().st_mtime_ns for path in tables}


def test_reports_of_nobody_are_an_error(done, capsys) -> None:
    assert done.run("participant", "--reports-only", "--participant-label", "77") == 66
    assert "no result of such participants" in capsys.readouterr().err


def test_ratings_and_controls_reach_the_group_page(done, tmp_path, capsys) -> None:
    ratings = tmp_path / "ratings.tsv"
    ratings.write_text("scan\tabbreviation\trating\nsub-01\tRNL\tbad\n")
    code = done.run("group", "--ratings", ratings, "--controls", "diagnosis=control")
    assert code == 0
    assert "\tbad\t" in (done.out / "group_morph.tsv").read_text()
    assert "needs editing" in (done.out / "group_morph.html").read_text()
    assert done.run("group", "--controls", "diagnosis=HC") == 64
    assert "nobody has the value 'HC'" in capsys.readouterr().err
