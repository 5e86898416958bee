"""The figures as files: PNG and SVG by kaleido, which draws them in the system's Chromium."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..search.records import RunRecord
from ..spaces.errors import InputError
from ..spaces.files import write_whole
from .figures import panels
from .html import PLOTLY, TEMPLATES

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WIDTH = 1000
PIXELS = 2
"""Pixels of a PNG for each unit of its width."""
INK, GRID = "#3c475c", "#e3e7ee"


def write_images(run: RunRecord, out: Path, kind: str) -> list[Path]:
    """Write the front to ``out`` where that names a file of the kind, ``png`` or ``svg``; else every figure into the
    folder ``out``. Raises InputError when kaleido or a browser is missing, or there is nothing to draw."""
    figures = {panel.key: panel.figure for panel in panels(run) if panel.figure is not None}
    if out.suffix.lower() == f".{kind}":
        figures = {out.stem: figures["front"]} if "front" in figures else {}
        folder = out.parent
    else:
        folder = out
    if not figures:
        raise InputError(f"{run.path}: there is no figure to draw: no trial of the run is known in full.")
    files = {folder / f"{name}.{kind}": figure for name, figure in figures.items()}
    for path, data in zip(files, _drawn(list(files.values()), kind), strict=True):
        write_whole(path, lambda beside, data=data: beside.write_bytes(data))
    return list(files)


def _drawn(figures: Sequence["Figure"], kind: str) -> list[bytes]:
    if find_spec("kaleido") is None:
        raise InputError("--format png and svg need kaleido: pip install 'nightpress[figures]'.")
    import kaleido
    from choreographer.errors import ChromeNotFoundError

    # Its own plotly.js, so that the browser asks no network for one.
    page = kaleido.PageGenerator(plotly=(TEMPLATES / PLOTLY).as_uri(), mathjax=False)
    try:
        kaleido.start_sync_server(n=1, page_generator=page, silence_warnings=True)
        try:
            return [kaleido.calc_fig_sync(_on_paper(figure), opts=_size(figure, kind)) for figure in figures]
        finally:
            kaleido.stop_sync_server(silence_warnings=True)
    except ChromeNotFoundError:
        raise InputError(
            "--format png and svg need Chromium or Chrome, but none was found: install one (apt-get install chromium) "
            "or name it in BROWSER_PATH."
        ) from None


def _size(figure: "Figure", kind: str) -> Mapping[str, Any]:
    height = figure.layout.height or 400
    return {"format": kind, "width": WIDTH, "height": height, "scale": PIXELS if kind == "png" else 1}


def _on_paper(figure: "Figure") -> dict[str, Any]:
    """The figure in the colours of the page's light theme."""
    figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", font={"color": INK, "family": "sans-serif"})
    figure.update_xaxes(gridcolor=GRID)
    figure.update_yaxes(gridcolor=GRID)
    return figure.to_dict()
