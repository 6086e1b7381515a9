"""The participant page says what is there, what is not, and nothing that is not text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fdl_bidsapp.bids.inputs import io_spec
from fdl_bidsapp.cohort import RATINGS, collect
from fdl_bidsapp.imaging.measure import COLUMNS
from fdl_bidsapp.reports.participant import (
    ADVICE,
    DERIVATIONS,
    write_cohort_participants,
    write_participants,
)

PAIR = {"RNL": 250.0, "RNR": 200.0}
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quotes"'


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text outside of scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text += " "
        if tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def page(output: Any, subject: str = "01") -> Page:
    write_participants(output.out, [subject], output.bids)
    return Page(output.out / f"sub-{subject}.html")


def test_the_page_shows_each_nucleus_with_its_figures_and_a_rating(output: Any) -> None:
    output.add("01", PAIR, figures=True)
    made = page(output)
    images = made.all("img")
    assert [Path(image["src"]).name for image in images] == [
        "sub-01_seg-fdl_desc-overview_dseg.svg",
        "sub-01_seg-fdl_label-RNL_desc-overlay_dseg.svg",
        "sub-01_seg-fdl_label-RNL_desc-histogram_dseg.svg",
        "sub-01_seg-fdl_label-RNR_desc-overlay_dseg.svg",
        "sub-01_seg-fdl_label-RNR_desc-histogram_dseg.svg",
    ]
    assert all((output.out / image["src"]).is_file() for image in images)
    assert all(len(image["alt"]) > 20 for image in images)
    assert {one["id"] for one in made.all("article")} == {"sub-01_RNL", "sub-01_RNR"}
    radios = [one["value"] for one in made.all("input") if one.get("type") == "radio"]
    assert radios == [*RATINGS, *RATINGS]
    assert "Red nucleus left" in made.words
    assert "Confidence high: mean probability 0.93" in made.words
    for number in ("250", "0.120 ± 0.030", "40.0 ± 5.0", "+22.2"):
        assert number in made.words


def test_what_stood_in_for_what_is_said_with_units(output: Any) -> None:
    uris = {"r2star": ["bids:raw:sub-01/anat/sub-01_T2starmap.nii"], "qsm": ["bids:q:chi.nii"]}
    output.add(
        "01",
        PAIR,
        InputsUsed=uris,
        Derivations={"r2star": "inverse_t2star", "qsm": "map"},
        Notes=["the values were in ppb and were divided by 1000"],
    )
    words = page(output).words
    assert "R2* 1/s 1 / T2*, from the T2* map raw:sub-01/anat/sub-01_T2starmap.nii" in words
    assert "QSM segmented ppm read from the map q:chi.nii" in words
    assert "the values were in ppb and were divided by 1000" in words
    assert "Not found: Magnitude, SWI." in words


def test_every_way_to_a_contrast_has_words() -> None:
    contrasts = io_spec()["inputs"]["contrasts"].values()
    assert {one["derivation"] for ways in contrasts for one in ways} <= set(DERIVATIONS)


def test_the_scanner_is_told(output: Any) -> None:
    told = {"MagneticFieldStrength": 3.0, "Manufacturer": "Maker & Sons"}
    output.add("01", PAIR, **told)
    assert "Scanner Maker & Sons, 3 T" in page(output).words


def test_flags_are_told_in_words(output: Any) -> None:
    output.add("01", PAIR, cells={"qc_flag": "fragmented;low_probability"})
    words = page(output).words
    assert ADVICE["fragmented"] in words
    assert ADVICE["low_probability"] in words
    assert "look at this" in words
    assert "2 of 2 nuclei with flags" in words
    assert set(ADVICE) == set(COLUMNS["qc_flag"]["Levels"]) - {"ok"}


@pytest.mark.parametrize(
    ("confidence", "flag", "word"),
    [("0.91", "ok", "high"), ("0.8", "ok", "moderate"), ("0.64", "low_confidence", "low")],
)
def test_a_calibrated_model_says_which_dice_is_expected(
    output: Any, confidence: str, flag: str, word: str
) -> None:
    output.add("01", PAIR, cells={"confidence": confidence, "qc_flag": flag})
    words = page(output).words
    assert f"Confidence {word}: a Dice of {float(confidence):.2f}" in words
    assert "Expected Dice" in words
    assert (ADVICE["low_confidence"] in words) == (flag == "low_confidence")


def test_a_model_without_calibration_says_how_sure_it_was(output: Any) -> None:
    output.add("01", PAIR)
    words = page(output).words
    assert "Confidence high: mean probability 0.93 over the mask" in words
    assert "Expected Dice" not in words


def test_a_failed_scan_says_cause_remedy_and_file(output: Any) -> None:
    error = {"Path": "/data/x.nii", "Cause": "the file is cut short", "Remedy": "copy it again"}
    output.add("01", Error=error)
    words = page(output).words
    for text in ("Not segmented", "the file is cut short", "What to do: copy it again", "/data/x"):
        assert text in words


def test_figures_that_are_missing_are_said_to_be(output: Any) -> None:
    output.add("01", PAIR)
    made = page(output)
    assert not made.all("img")
    assert "The overlay figure is not in the output folder" in made.words


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        '{"Status": "ok", "Entities": {"subject": "01"}}',
        '{"Status": "ok", "Entities": {"subject": "02"}}',
        '{"Status": "ok", "Entities": {"subject": "../../x"}}',
    ],
    ids=["empty", "cut", "list", "bare", "another", "elsewhere"],
)
def test_a_broken_record_or_table_still_has_a_page(output: Any, damage: str) -> None:
    path = output.add("01", PAIR)
    path.write_text(damage)
    table = path.with_suffix(".tsv")
    table.write_text(table.read_text().replace("\t250\t", "\tmuch\t"))
    words = page(output).words
    assert "not segmented" in words
    assert "cannot be read" in words
    assert sorted(path.name for path in output.out.glob("*.html")) == ["sub-01.html"]


def test_an_older_record_without_the_newer_keys_has_a_page(output: Any) -> None:
    output.add("01", PAIR, Derivations=None, VoxelSize=None, Notes=None, InputsUsed=None)
    assert "250" in page(output).words


def test_text_of_the_dataset_is_text(output: Any) -> None:
    output.add(
        "01",
        PAIR,
        Notes=[HOSTILE],
        Error={"Path": HOSTILE, "Cause": HOSTILE, "Remedy": HOSTILE},
        InputsUsed={HOSTILE: [HOSTILE], "qsm": [HOSTILE]},
        Derivations={HOSTILE: HOSTILE},
        ModelName=HOSTILE,
        AppVersion=HOSTILE,
    )
    output.participants("participant_id,age,<b>bold</b>", f"sub-01,60,{HOSTILE * 30}")
    made = page(output)
    assert len(made.all("script")) == 2
    assert not made.all("img")
    assert not made.all("b")
    assert made.text.count('<script>alert("x")</script>') > 5
    assert "<b>bold</b>" in made.text


def test_only_the_pages_own_script_may_run_and_nothing_is_fetched(output: Any) -> None:
    output.add("01", PAIR, figures=True)
    made = page(output)
    (policy,) = (
        str(one["content"]) for one in made.all("meta") if "Policy" in str(one.get("http-equiv"))
    )
    assert policy.startswith("default-src 'none'")
    assert re.search(r"script-src 'sha256-[\w+/=]+';", policy)
    assert not [one for one in made.all("script") if one.get("src")]
    assert not made.all("link")[1:]


def test_sessions_stand_side_by_side_with_their_change(output: Any) -> None:
    output.add("01", {"RNL": 200.0, "RNR": 210.0}, session="1", figures=True)
    output.add("01", {"RNL": 190.0, "RNR": 231.0}, session="2", figures=True)
    made = page(output)
    assert "Change from ses-1 to ses-2" in made.words
    assert "Volume (mm³) 200 190 −10 −5.0" in made.words
    assert "Volume (mm³) 210 231 +21 +10.0" in made.words
    shown = [image["src"] for image in made.all("img")]
    side_by_side = shown[:2]
    assert [Path(path).name[:12] for path in side_by_side] == ["sub-01_ses-1", "sub-01_ses-2"]


def test_sessions_of_different_versions_are_warned_of(output: Any) -> None:
    output.add("01", PAIR, session="1")
    output.add("01", PAIR, session="2", AppVersion="0.2.0")
    assert "done with different versions (0.1.0, 0.2.0)" in page(output).words


def test_the_methods_can_be_pasted_with_their_references(output: Any) -> None:
    output.add("01", PAIR)
    words = page(output).words
    assert "segmented with fdl-bidsapp 0.1.0" in words
    assert "arXiv:2302.12980" in words
    assert "@" not in words[words.index("Deep nuclei were segmented") :]
    cited = {int(one) for group in re.findall(r"\[([\d, ]+)\]", words) for one in group.split(",")}
    assert cited == set(range(1, max(cited) + 1))


def test_the_cohort_adds_the_normal_range_and_the_neighbours(output: Any) -> None:
    lines = ["participant_id,age,diagnosis"]
    for k in range(30):
        output.add(f"{k:02d}", {"RNL": 200.0 + k + 5 * (-1) ** k, "RNR": 210.0})
        lines.append(f"sub-{k:02d},{40 + k},control")
    output.add("90", {"RNL": 500.0, "RNR": 210.0})
    output.add("91", {"RNL": 210.0, "RNR": 210.0})
    output.participants(*lines, "sub-90,55,PD", "sub-91,n/a,PD")
    write_cohort_participants(output.out, collect(output.out, output.bids))
    made = Page(output.out / "sub-90.html")
    assert "controls at age 55 (n = 30 or more)" in made.words
    low, high = re.search(r"Red nucleus left 500 (\d+) – (\d+)", made.words).groups()  # type: ignore[union-attr]
    assert 207 <= int(low) <= 212 < 218 <= int(high) <= 223
    marked = [one for one in made.all("td") if "out" in str(one.get("class")).split()]
    assert len(marked) == 1
    links = {one["href"] for one in made.all("a")}
    assert {"sub-29.html", "sub-91.html", "group_morph.html"} <= links
    assert "participant's age is not known" in Page(output.out / "sub-91.html").words


def test_each_session_is_compared_at_its_own_age(output: Any) -> None:
    lines = ["participant_id,age,sex,diagnosis"]
    for k in range(30):
        output.add(f"{k:02d}", {"RNL": 200.0 + k + 5 * (-1) ** k, "RNR": 210.0})
        lines.append(f"sub-{k:02d},{40 + k},F,control")
    output.add("90", PAIR, session="1")
    output.add("90", PAIR, session="2")
    output.participants(*lines, "sub-90,50,M,PD")
    (output.bids / "sub-90").mkdir()
    table = "session_id\tage\nses-1\t50\nses-2\t57\n"
    (output.bids / "sub-90" / "sub-90_sessions.tsv").write_text(table)
    words = page(output, "90").words
    assert "sex M, diagnosis PD" in words
    assert "ses-2 age 57" in words
    write_cohort_participants(output.out, collect(output.out, output.bids))
    words = Page(output.out / "sub-90.html").words
    assert "controls at age 50 (n = 30 or more)" in words
    assert "controls at age 57 (n = 30 or more)" in words


def test_a_page_takes_a_fraction_of_a_second(output: Any) -> None:
    import time

    output.add("01", PAIR, figures=True)
    page(output)
    start = time.process_time()
    page(output)
    assert time.process_time() - start < 0.5
