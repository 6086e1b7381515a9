"""The group page: its data, its words, its size."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from fdl_bidsapp.cohort import collect, write_group
from fdl_bidsapp.reports.group import COLUMN_BYTES, group_page, write_group_page

HOSTILE = '</script><script>alert("x")</script><!-- "quotes" &'


def made(output: Any, **options: Any) -> tuple[str, dict[str, Any]]:
    """Return the page's text and its data."""
    cohort = collect(output.out, output.bids, **options)
    page = write_group_page(output.out, cohort).read_text("utf-8")
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert text is not None
    return page, json.loads(text[1])


def cohort_of(output: Any, n: int, odd: float = 0.0) -> None:
    lines = ["participant_id,age,diagnosis,site"]
    for k in range(n):
        volume = odd if odd and not k else 200.0 + k
        output.add(f"{k:02d}", {"RNL": volume, "RNR": 210.0 + k})
        lines.append(f"sub-{k:02d},{50 + k},{'HC' if k % 2 else 'PD'},{k % 3}")
    output.participants(*lines)


def test_the_data_hold_each_scan_and_nucleus(output: Any) -> None:
    cohort_of(output, 4)
    _, data = made(output)
    assert data["scans"]["name"] == ["sub-00", "sub-01", "sub-02", "sub-03"]
    assert data["scans"]["page"][1] == "sub-01.html"
    assert [one["abbreviation"] for one in data["nuclei"]] == ["RNL", "RNR"]
    assert data["values"]["volume"] == [200, 210, 201, 211, 202, 212, 203, 213]
    assert data["design"] == {"group": "diagnosis", "age": "age"}
    columns = {one["key"]: one for one in data["columns"]}
    assert columns["age"]["numbers"] == [50, 51, 52, 53]
    assert columns["diagnosis"]["levels"] == ["HC", "PD"], "controls come first"
    assert columns["diagnosis"]["codes"] == [1, 0, 1, 0]


def test_a_few_numbers_that_come_again_are_groups(output: Any) -> None:
    cohort_of(output, 6)
    columns = {one["key"]: one for one in made(output)[1]["columns"]}
    assert columns["site"]["levels"] == ["0", "1", "2"]
    assert columns["site"]["groups"]
    assert not columns["age"]["groups"]
    assert not columns["participant_id"]["groups"]


def test_an_outlier_is_listed_with_its_robust_z(output: Any) -> None:
    cohort_of(output, 12, odd=600)
    page, data = made(output)
    (one,) = data["outliers"]
    assert (one["row"], one["measure"], one["median"]) == (0, "volume", 206.5)
    assert one["z"] > 3.5
    assert "beyond ±3.5" in page


def test_failures_are_counted_by_reason_with_links(output: Any) -> None:
    output.add("01", {"RNL": 200.0, "RNR": 200.0})
    for subject in ("02", "03"):
        output.add(subject, Error={"Path": None, "Cause": "it is cut short", "Remedy": "copy it"})
    output.participants("participant_id,age", "sub-01,50", "sub-02,51", "sub-03,52", "sub-04,53")
    page, _ = made(output)
    row = re.search(r"<td>it is cut short</td>.*?</tr>", page, re.DOTALL)
    assert row is not None
    assert '<td class="number">2</td>' in row[0]
    assert '<a href="sub-02.html">sub-02</a>' in row[0]
    assert "no output found: run the participant level" in page
    assert "sub-04.html" not in page


@pytest.mark.parametrize("key", ["AppVersion", "ModelSHA256"])
def test_a_mix_of_versions_or_models_is_shown_in_red(output: Any, key: str) -> None:
    output.add("01", {"RNL": 200.0, "RNR": 200.0})
    assert 'class="mixed"' not in made(output)[0]
    output.add("02", {"RNL": 200.0, "RNR": 200.0}, **{key: "cd" * 32})
    page, _ = made(output)
    assert page.count('class="mixed"') == 2
    assert '<div class="box alarm" role="note"><p>The table mixes 2' in page


def test_text_of_the_dataset_is_text(output: Any) -> None:
    output.add("01", {"RNL": 200.0, "RNR": 200.0}, ModelName=HOSTILE, AppVersion=HOSTILE)
    output.add("02", Error={"Path": HOSTILE, "Cause": HOSTILE, "Remedy": HOSTILE})
    output.participants(
        f"participant_id,age,diagnosis,{HOSTILE}", f"sub-01,50,{HOSTILE},{HOSTILE * 100}"
    )
    (output.out / "dataset_description.json").write_text(json.dumps({"Name": HOSTILE}))
    page, data = made(output)
    assert page.count("<script") == page.count("</script") == 2
    assert "<!--" not in page
    columns = {one["key"]: one for one in data["columns"]}
    assert columns["diagnosis"]["levels"] == [HOSTILE]
    assert len(columns[HOSTILE]["levels"][0]) == 200


@pytest.mark.parametrize(
    "people",
    [
        (),
        ("participant_id,age,diagnosis", "sub-01,n/a,n/a"),
        ("participant_id,age,diagnosis", "sub-01,61,PD"),
        ("participant_id,weight", "sub-01,70"),
        ("participant_id", "sub-01"),
        ("something,else", "1,2"),
    ],
    ids=["none", "missing", "one diagnosis", "no age", "nothing", "another table"],
)
@pytest.mark.parametrize("done", [True, False], ids=["one", "empty"])
def test_a_poor_cohort_has_a_page_all_the_same(
    output: Any, people: tuple[str, ...], done: bool
) -> None:
    output.add("01", {"RNL": 200.0, "RNR": 200.0} if done else None)
    if people:
        output.participants(*people)
    page, data = made(output)
    assert len(data["scans"]["name"]) == 1
    assert "No normal range" in page
    assert ("There is nothing to summarise" in page) != done


def test_the_curves_of_enough_controls_are_drawn_with_their_number(output: Any) -> None:
    cohort_of(output, 44)
    page, data = made(output)
    assert {(one["abbreviation"], one["measure"]) for one in data["curves"]} == {
        (nucleus, measure)
        for nucleus in ("RNL", "RNR")
        for measure in ("volume", "qsm_mean", "r2star_mean")
    }
    assert {one["n"] for one in data["curves"]} == {22}
    assert "controls (diagnosis = HC, n = 22)" in page
    assert "n = 22" not in made(output, controls="site=1")[0]


def test_ratings_are_a_filter(output: Any, tmp_path: Path) -> None:
    cohort_of(output, 3)
    assert made(output)[1]["ratings"] is None
    ratings = tmp_path / "ratings.tsv"
    ratings.write_text("scan\tabbreviation\trating\nsub-00\tRNL\tbad\nsub-01\tRNR\tgood\n")
    page, data = made(output, ratings=[ratings])
    assert data["ratings"]["codes"] == [2, -1, -1, 0, -1, -1]
    assert "1 good, 0 needs editing, 1 bad" in page


def test_columns_that_would_make_the_page_heavy_are_left_out_and_named(output: Any) -> None:
    output.add("01", {"RNL": 200.0, "RNR": 200.0})
    output.participants("participant_id,age", "sub-01,50")
    cohort = collect(output.out, output.bids)
    many = {f"essay_{k}": "x" * 150 for k in range(COLUMN_BYTES // 200)}
    for row in cohort.rows:
        row.update(many)
    cohort = type(cohort)(**{**vars(cohort), "people": (*cohort.people, *many)})
    page = group_page(cohort)
    assert len(page) < 1.5 * COLUMN_BYTES
    assert f"essay_{len(many) - 1}" in page
    assert "would be too large" in page


def test_a_thousand_scans_are_a_light_page_in_little_time(output: Any) -> None:
    lines = ["participant_id,age,diagnosis"]
    for k in range(1000):
        output.add(f"{k:04d}", {"RNL": 200.123 + k % 90, "RNR": 210.456 + k % 80})
        lines.append(f"sub-{k:04d},{20 + k % 60},{'HC' if k % 2 else 'PD'}")
    output.participants(*lines)
    start = time.process_time()
    cohort = write_group(output.out, output.bids)
    path = write_group_page(output.out, cohort)
    assert time.process_time() - start < 20
    assert path.stat().st_size < 1_000_000
