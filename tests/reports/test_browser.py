"""The pages in a real browser: Debian's chromium, without a window, driven by selenium."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from fdl_bidsapp.cohort import collect
from fdl_bidsapp.reports.group import write_group_page
from fdl_bidsapp.reports.participant import write_cohort_participants

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
SCRIPT_SECONDS = 2.0

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="needs chromium and chromium-driver (apt-get install both)"
    ),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """Give a browser whose downloads can be read."""
    options = ChromeOptions()
    # With both paths given, selenium looks for nothing in the network, and reports nothing.
    options.binary_location = str(BROWSER)
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    downloads = str(tmp_path_factory.mktemp("downloads"))
    options.add_experimental_option("prefs", {"download.default_directory": downloads})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=ChromeService(str(DRIVER)))
    browser.downloads = Path(downloads)  # type: ignore[attr-defined]
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, make_output: Any) -> Path:
    """Give the pages of 60 scans, the first of them odd, the last one failed."""
    output = make_output(tmp_path_factory.mktemp("cohort"))
    lines = [f"participant_id,age,diagnosis,{HOSTILE}"]
    for k in range(60):
        name = f"{k:02d}"
        volumes = {"RNL": 700.0 if k == 0 else 200.0 + k, "RNR": 220.0 + k % 7}
        if k == 59:
            output.add(name, Error={"Path": None, "Cause": HOSTILE, "Remedy": HOSTILE})
        else:
            output.add(name, volumes, figures=k < 2)
        lines.append(f"sub-{name},{40 + k / 2},{('control', 'PD', HOSTILE)[k % 3]},{HOSTILE * 9}")
    output.participants(*lines)
    cohort = collect(output.out, output.bids)
    write_group_page(output.out, cohort)
    write_cohort_participants(output.out, cohort)
    return Path(output.out)


def open_page(driver: Chrome, path: Path, width: int = 1280) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    driver.get_log("browser")
    driver.get(path.as_uri())


def complaints(driver: Chrome) -> list[str]:
    return [entry["message"] for entry in driver.get_log("browser")]


def visible_rows(driver: Chrome, table: str = "rows") -> list[list[str]]:
    script = (
        "return [...document.querySelectorAll(arguments[0])]"
        ".map(r=>[...r.cells].map(c=>c.textContent))"
    )
    return list(driver.execute_script(script, f"#{table} tbody tr"))


def fill(driver: Chrome, field: Any, text: str) -> None:
    driver.execute_script(
        "arguments[0].value=arguments[1];"
        "arguments[0].dispatchEvent(new Event('input',{bubbles:true}))",
        field,
        text,
    )


def ink(driver: Chrome) -> list[int]:
    """Return for each plot how many of its pixels are coloured."""
    return list(
        driver.execute_script(
            "return [...document.querySelectorAll('[data-plot] canvas')].map(c=>{"
            "if(!c.width||!c.height) return 0;"
            "const d=c.getContext('2d').getImageData(0,0,c.width,c.height).data;let n=0;"
            "for(let i=0;i<d.length;i+=4) if(d[i+3]&&Math.abs(d[i]-d[i+2])>40) n++;return n})"
        )
    )


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["group_morph.html", "sub-00.html", "sub-59.html"])
def test_pages_open_without_complaint_and_fit_the_window(
    driver: Chrome, pages: Path, name: str, width: int
) -> None:
    open_page(driver, pages / name, width)
    assert complaints(driver) == []
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    broken = "return [...document.images].filter(i=>!(i.complete&&i.naturalWidth)).map(i=>i.src)"
    assert driver.execute_script(broken) == []
    assert driver.title not in ("1", "2"), "a script of the dataset was run"
    assert driver.execute_script("return document.images.length") == (5 if "00" in name else 0)


def test_every_plot_is_drawn_without_scrolling_there(driver: Chrome, pages: Path) -> None:
    open_page(driver, pages / "group_morph.html")
    time.sleep(1.0)
    drawn = ink(driver)
    assert len(drawn) == 8
    assert min(drawn) > 0
    assert complaints(driver) == []


def test_a_participant_s_sessions_are_joined_by_a_line(
    driver: Chrome, tmp_path: Path, make_output: Any
) -> None:
    output = make_output(tmp_path)
    for session, volume in (("1", 200.0), ("2", 300.0)):
        output.add("01", {"RNL": volume, "RNR": volume}, session=session)
    output.add("02", {"RNL": 210.0, "RNR": 210.0})
    output.participants("participant_id,age", "sub-01,50", "sub-02,51")
    (output.bids / "sub-01").mkdir()
    table = "session_id\tage\nses-1\t50\nses-2\t60\n"
    (output.bids / "sub-01" / "sub-01_sessions.tsv").write_text(table)
    cohort = collect(output.out, output.bids)
    write_group_page(output.out, cohort)
    open_page(driver, Path(output.out) / "group_morph.html")
    time.sleep(1.0)
    # Between the points there is nothing but the line.
    coloured = driver.execute_script(
        "const c=document.querySelector('[data-plot=age] canvas'), w=Math.floor(c.width/2);"
        "const d=c.getContext('2d').getImageData(w,0,Math.floor(w/3),c.height).data;let n=0;"
        "for(let i=0;i<d.length;i+=4) if(d[i+3]&&Math.abs(d[i]-d[i+2])>40) n++;return n"
    )
    assert coloured > 30
    assert complaints(driver) == []


def test_the_table_sorts_and_filters(driver: Chrome, pages: Path) -> None:
    open_page(driver, pages / "group_morph.html")
    heads = driver.find_elements(By.CSS_SELECTOR, "#rows thead th")
    names = [head.text for head in heads]
    place = names.index("Volume (mm³)")
    for order, first in (("ascending", "200"), ("descending", "700")):
        driver.execute_script("arguments[0].querySelector('button').click()", heads[place])
        expected = "201" if first == "200" else first
        assert heads[place].get_attribute("aria-sort") == order
        assert visible_rows(driver)[0][place] == expected
    filters = driver.find_elements(By.CSS_SELECTOR, "#rows thead input")
    fill(driver, filters[place], ">250")
    assert {float(row[place]) > 250 for row in visible_rows(driver)} == {True}
    fill(driver, filters[place], "")
    fill(driver, driver.find_element(By.ID, "find"), "sub-07 rnr")
    assert [row[:2] for row in visible_rows(driver)] == [["sub-07", "RNR"]]
    assert driver.find_element(By.ID, "shown").text == "1 of 60 scans"
    driver.execute_script("document.getElementById('reset').click()")
    assert "of 120" in driver.find_element(By.CSS_SELECTOR, ".pager[data-for=rows]").text
    assert HOSTILE in driver.find_element(By.TAG_NAME, "body").get_attribute("textContent")


def test_plots_are_drawn_and_follow_the_controls(driver: Chrome, pages: Path) -> None:
    open_page(driver, pages / "group_morph.html")
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 1280, "height": 6000, "deviceScaleFactor": 1, "mobile": False},
    )
    WebDriverWait(driver, 20).until(lambda _: min(ink(driver)) > 50)
    assert len(ink(driver)) == 2 + 2 + 1 + 1 + 2
    canvas = driver.find_element(By.CSS_SELECTOR, "[data-plot=groups] canvas")
    label = canvas.get_attribute("aria-label")
    assert "Volume of Red nucleus left by diagnosis" in label
    assert "control: n 20, median" in label
    Select(driver.find_element(By.ID, "measure")).select_by_value("qsm_mean")
    Select(driver.find_element(By.ID, "by")).select_by_value("")
    WebDriverWait(driver, 20).until(
        lambda _: "QSM mean of Red nucleus left" in canvas.get_attribute("aria-label")
    )
    assert "all: n 59" in canvas.get_attribute("aria-label")


def test_a_click_on_a_point_opens_its_scan(driver: Chrome, pages: Path) -> None:
    open_page(driver, pages / "group_morph.html")
    fill(driver, driver.find_element(By.ID, "find"), "sub-07 rnl")
    canvas = driver.find_element(By.CSS_SELECTOR, "[data-plot=groups] canvas")
    driver.execute_script("arguments[0].scrollIntoView({block:'center'})", canvas)
    WebDriverWait(driver, 20).until(
        lambda _: "PD: n 1, median 207" in str(canvas.get_attribute("aria-label"))
    )
    before = driver.window_handles
    driver.execute_script(
        "const c=arguments[0], box=c.getBoundingClientRect();"
        "for(let y=4;y<box.height;y+=8) for(let x=4;x<box.width;x+=8) {"
        "  const o={clientX:box.left+x,clientY:box.top+y,bubbles:true};"
        "  c.dispatchEvent(new MouseEvent('mousemove',o));"
        "  if(c.style.cursor==='pointer'){c.dispatchEvent(new MouseEvent('click',o));return}}",
        canvas,
    )
    WebDriverWait(driver, 20).until(lambda _: len(driver.window_handles) > len(before))
    (opened,) = set(driver.window_handles) - set(before)
    driver.switch_to.window(opened)
    assert driver.current_url.endswith("sub-07.html#sub-07_RNL")
    driver.close()
    driver.switch_to.window(before[0])


def test_the_link_of_an_outlier_lands_on_its_nucleus(driver: Chrome, pages: Path) -> None:
    open_page(driver, pages / "group_morph.html")
    first = visible_rows(driver, "outlier-table")[0]
    assert first[:4] == ["sub-00", "Red nucleus left", "Volume (mm³)", "700"]
    driver.execute_script("document.querySelector('#outlier-table tbody a').click()")
    WebDriverWait(driver, 20).until(lambda _: "sub-00.html" in driver.current_url)
    landed = driver.execute_script("return document.querySelector(':target').id")
    assert landed == "sub-00_RNL"
    top = driver.execute_script(
        "return document.querySelector(':target').getBoundingClientRect().top"
    )
    assert -5 <= top <= 450


def test_ratings_are_kept_and_exported(driver: Chrome, pages: Path) -> None:
    open_page(driver, pages / "sub-00.html")
    driver.execute_script("localStorage.clear()")
    open_page(driver, pages / "sub-00.html")
    left, right = driver.find_elements(By.CSS_SELECTOR, "fieldset.rating")
    driver.execute_script("arguments[0].querySelector('[value=\"needs editing\"]').click()", left)
    fill(driver, left.find_element(By.CSS_SELECTOR, ".comment input"), '=1+1\t"vein"')
    driver.execute_script("arguments[0].querySelector('[value=good]').click()", right)
    assert driver.find_element(By.ID, "rated").text == "2 of 2 nuclei rated"
    driver.refresh()
    WebDriverWait(driver, 20).until(
        lambda _: driver.find_element(By.ID, "rated").text == "2 of 2 nuclei rated"
    )
    left, right = driver.find_elements(By.CSS_SELECTOR, "fieldset.rating")
    assert left.find_element(By.CSS_SELECTOR, "[value='needs editing']").is_selected()
    driver.execute_script("arguments[0].querySelector('.withdraw').click()", right)
    fill(driver, driver.find_element(By.ID, "rater"), "A")
    driver.execute_script("document.getElementById('export').click()")
    path = driver.downloads / "sub-00_ratings.tsv"  # type: ignore[attr-defined]
    WebDriverWait(driver, 20).until(lambda _: path.is_file() and path.stat().st_size)
    lines = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
    assert lines[0] == ["scan", "abbreviation", "rating", "comment", "rater"]
    assert lines[1:] == [["sub-00", "RNL", "needs editing", '\'=1+1 "vein"', "A"]]
    cohort = collect(pages, ratings=[path])
    rated = [row for row in cohort.rows if row["rating"]]
    assert [(row["participant_id"], row["abbreviation"], row["rating"]) for row in rated] == [
        ("sub-00", "RNL", "needs editing")
    ]
    assert cohort.warnings == ()


def test_outlines_turn_off_and_on(driver: Chrome, pages: Path) -> None:
    open_page(driver, pages / "sub-00.html")
    button = driver.find_element(By.ID, "outlines")
    sources = "return [...document.querySelectorAll('img.overlay')].map(i=>i.src.split('#')[1])"
    for hidden in ("plain", None):
        driver.execute_script("arguments[0].click()", button)
        assert driver.execute_script(sources) == [hidden, hidden]
        assert button.get_attribute("aria-pressed") == ("false" if hidden else "true")


@pytest.mark.parametrize("name", ["group_morph.html", "sub-00.html"])
def test_print_shows_the_content_and_not_the_controls(
    driver: Chrome, pages: Path, name: str
) -> None:
    open_page(driver, pages / name)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    seen = (
        "return [...document.querySelectorAll(arguments[0])].filter(e=>e.getClientRects().length)"
    )
    try:
        for controls in ("nav.bar", ".controls", "fieldset.rating", ".dock", ".pager"):
            assert driver.execute_script(f"{seen}.length", controls) == 0
        for content in ("h1", "table", "figure", "thead th"):
            assert driver.execute_script(f"{seen}.length", content) > 0
        heads = driver.execute_script(f"{seen}.map(e=>e.innerText.trim())", "thead th")
        assert all(heads)
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.parametrize("name", ["group_morph.html", "sub-00.html", "sub-59.html"])
def test_text_has_contrast_and_everything_has_a_name(
    driver: Chrome, pages: Path, name: str
) -> None:
    open_page(driver, pages / name)
    poor = driver.execute_script(
        """
        const lin=v=>{v/=255;return v<=.03928?v/12.92:((v+.055)/1.055)**2.4};
        const lum=c=>.2126*lin(c[0])+.7152*lin(c[1])+.0722*lin(c[2]);
        const rgb=t=>t.match(/[\\d.]+/g).map(Number);
        const ground=e=>{for(;e;e=e.parentElement){const c=rgb(getComputedStyle(e).backgroundColor);
          if(c.length<4||c[3]>0) return c} return [255,255,255]};
        const poor=new Set();
        for(const e of document.body.querySelectorAll('*')){
          const own=[...e.childNodes].some(n=>n.nodeType===3&&n.textContent.trim());
          if(!own||['SCRIPT','STYLE','NOSCRIPT','OPTION'].includes(e.tagName)||e.disabled) continue;
          const a=lum(rgb(getComputedStyle(e).color)), b=lum(ground(e));
          const ratio=(Math.max(a,b)+.05)/(Math.min(a,b)+.05);
          if(ratio<4.5) poor.add(e.tagName+'.'+e.className+' '+ratio.toFixed(2));
        }
        return [...poor]"""
    )
    assert poor == []
    nameless = driver.execute_script(
        "return [...document"
        ".querySelectorAll('input,select,button,img,canvas[role],[role=region]')]"
        ".filter(e=>!(e.labels&&e.labels.length)&&!e.textContent.trim()&&!e.getAttribute('alt')"
        "&&!e.getAttribute('aria-label')&&!e.hidden&&e.getClientRects().length"
        "&&(e.tagName!=='CANVAS'||e.width!==300)).map(e=>e.outerHTML.slice(0,90))"
    )
    assert nameless == []
    loose = "return [...document.querySelectorAll('thead th:not([scope])')].length"
    assert driver.execute_script(loose) == 0
    assert driver.execute_script("return document.documentElement.lang") == "en"
    levels = driver.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3,h4')].map(e=>Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = driver.execute_script("return [...document.querySelectorAll('[id]')].map(e=>e.id)")
    assert len(ids) == len(set(ids))


def test_a_large_cohort_is_interactive_in_two_seconds(
    driver: Chrome, tmp_path: Path, make_output: Any
) -> None:
    output = make_output(tmp_path)
    lines = ["participant_id,age,diagnosis"]
    for k in range(2):
        output.add(f"{k}", {"RNL": 200.0 + k, "RNR": 210.0, "DNL": 900.0, "DNR": 880.0})
        lines.append(f"sub-{k},{50 + k},{'control' if k else 'PD'}")
    output.participants(*lines)
    cohort = collect(output.out, output.bids)
    rows = [
        {**row, "participant_id": f"sub-{k}", "volume": row["volume"] * (1 + k % 97 / 1000)}
        for k in range(2500)
        for row in cohort.rows
    ]
    many = {**vars(cohort), "rows": rows, "results": cohort.results * 2500}
    path = write_group_page(output.out, type(cohort)(**many))
    assert path.stat().st_size < 10_000_000
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    open_page(driver, path)
    WebDriverWait(driver, 60).until(
        lambda _: driver.execute_script("return document.documentElement.dataset.ready") == "true"
    )
    time.sleep(0.5)
    found = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    # Processor time, as other work on the machine is not the page's.
    spent = {one["name"]: one["value"] for one in found}["TaskDuration"]
    assert spent < SCRIPT_SECONDS
    assert driver.find_element(By.ID, "shown").text == "5000 of 5000 scans"
    assert complaints(driver) == []
