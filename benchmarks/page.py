"""Put what a benchmark measured into a page that is written by hand otherwise."""

from __future__ import annotations

from pathlib import Path

from fdl_bidsapp.bids.outputs import write_text


def replace_part(page: Path, script: str, text: str) -> None:
    """Replace what stands between ``<!-- figures: script -->`` and ``<!-- end of figures -->``."""
    begin, end = f"<!-- figures: {script} -->", "<!-- end of figures -->"
    head, _, rest = page.read_text("utf-8").partition(begin)
    _, mark, tail = rest.partition(end)
    if not mark:
        raise SystemExit(f"{page} lacks the marks {begin} and {end}")
    write_text(page, f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}")
