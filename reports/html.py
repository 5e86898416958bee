"""report.html: one file that opens anywhere, offline, and asks the network for nothing."""

import json
import re
from pathlib import Path
from typing import Any

from ..search.records import RunRecord
from .figures import panels
from .files import replace
from .page import context, script_data

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("elements.js", "card.js", "report.js")
"""In the order in which they are read; they share one scope."""


def write_report(run: RunRecord, out: Path) -> None:
    """Write the report page of a run; an older one is replaced in one step."""
    # Names may hold lone surrogates (from odd file names), which UTF-8 cannot: a question mark stands there.
    page = render(run).encode("utf-8", errors="replace")
    replace(out, lambda beside: beside.write_bytes(page))


def render(run: RunRecord) -> str:
    """The report page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = unbroken
    shown = panels(run)
    return environment.get_template("report.html.j2").render(
        **context(run, shown),
        css=Markup(_template("report.css")),
        scripts=Markup("\n".join(_template(name) for name in SCRIPTS)),
        plotly=Markup(get_plotlyjs()),
        data=Markup(embedded_json(script_data(run, shown))),
    )


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def unbroken(text: str) -> str:
    """The same sentence, in which no line breaks between a number and its unit or error."""
    return re.sub(r"(?<=[\d%]) (?=%|±|ms\b|[kMG]B\b|points?\b|min\b|h\b|s\b)|(?<=±) (?=\d)", "\u00a0", text)


def embedded_json(data: Any) -> str:
    """JSON that can stand inside a script element: no name in it can close the element or start another."""
    # ensure_ascii also escapes U+2028 and U+2029, which JavaScript once took for line ends.
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    for character, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(character, escape)
    return text
