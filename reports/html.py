"""report.html: one file that opens anywhere, offline, and asks the network for nothing."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..search.records import RunRecord
from ..spaces.files import write_whole
from .figures import panels
from .page import context, script_data
from .text import cut

TEMPLATES = Path(__file__).parent / "templates"
PLOTLY = "plotly-cartesian.min.js"
"""The cartesian bundle of plotly.js 4.1.1 (MIT, see plotly-LICENSE): a third of what the Python package brings."""
SCRIPTS = ("elements.js", "theme.js", "layers.js", "card.js", "front.js", "report.js")
"""In the order in which they are read; they share one scope."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewLinks:
    """Where a served page sends a person's word on a trial.

    The page POSTs ``{"trial", "digest", "action": "pick" | "reject" | "note", "note"}`` as JSON to ``url`` (same
    origin), with ``token`` in the header ``X-Nightpress-Token``, and shows the entry that comes back, or the sentence
    under ``error`` of an answer that is not 2xx. ``who`` is the name shown beside the buttons.
    """

    url: str
    token: str = ""
    who: str = ""


def write_report(run: RunRecord, out: Path) -> None:
    """Write the report page of a run; an older one is replaced in one step."""
    write_page(page_html(run), out)


def write_page(html: str, out: Path) -> None:
    """Write a page; an older one is replaced in one step."""
    # Names may hold lone surrogates (from odd file names), which UTF-8 cannot: a question mark stands there.
    data = html.encode("utf-8", errors="replace")
    write_whole(out, lambda beside: beside.write_bytes(data))


def page_html(run: RunRecord, *, review: ReviewLinks | None = None) -> str:
    """The report page as text; with ``review``, each complete trial's card has the buttons pick, reject and note."""
    shown = panels(run)
    scripts = SCRIPTS if review is None else ("elements.js", "review.js", *SCRIPTS[1:])
    data = script_data(run, shown) | ({"review": asdict(review)} if review is not None else {})
    return fill("report.html.j2", **context(run, shown), review=review is not None, data=data, scripts=scripts)


def fill(template: str, *, data: Any, scripts: tuple[str, ...], **values: Any) -> str:
    """A page from its template, with the style, the scripts, plotly.js and its data inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = unbroken
    environment.filters["cut"] = cut
    return environment.get_template(template).render(
        **values,
        css=Markup(_template("report.css")),
        scripts=Markup("\n".join(_template(name) for name in scripts)),
        plotly=Markup(_template(PLOTLY)),
        data=Markup(embedded_json(data)),
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
