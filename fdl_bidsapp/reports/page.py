"""One HTML file from a template: style, script and data inside, everything escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fdl_bidsapp import __version__

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, data: Any, **values: Any) -> str:
    """Fill a template.

    Parameters
    ----------
    template
        ``participant`` or ``group``: the name of its HTML, style and script.
    data
        JSON value for the script.
    values
        For the HTML; text is escaped.

    Returns
    -------
    str
        A page that needs no other file but its pictures. Its content security policy lets no other
        script run, and nothing be fetched or sent.
    """
    from markupsafe import Markup

    script = _text(f"{template}.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(f"{template}.html")
        .render(
            css=Markup(_text("style.css") + _text(f"{template}.css")),
            script=Markup(script),
            script_hash=f"'sha256-{digest}'",
            data=Markup(json_for_script(data)),
            version=__version__,
            **values,
        )
    )


def json_for_script(data: Any) -> str:
    """Write JSON that may stand in a script element.

    Examples
    --------
    >>> json_for_script({"label": "</script><!--"})
    '{"label":"\\\\u003c/script\\\\u003e\\\\u003c!--"}'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _environment() -> Environment:
    from jinja2 import DictLoader, Environment, StrictUndefined

    pages = {name: _text(name) for name in ("base.html", "participant.html", "group.html")}
    return Environment(
        loader=DictLoader(pages),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _text(name: str) -> str:
    return files("fdl_bidsapp.reports").joinpath("templates", name).read_text("utf-8")
