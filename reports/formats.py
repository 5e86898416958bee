"""The formats that a report is written in."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..search.records import RunRecord
from .html import write_page, write_report
from .images import write_images
from .markdown import markdown
from .tables import write_csv, write_parquet


class Format(NamedTuple):
    """``default`` is the path inside the run folder; ``write`` returns the files that it wrote."""

    default: str
    write: Callable[[RunRecord, Path], list[Path]]


def _one(write: Callable[[RunRecord, Path], None]) -> Callable[[RunRecord, Path], list[Path]]:
    def written(run: RunRecord, out: Path) -> list[Path]:
        write(run, out)
        return [out]

    return written


FORMATS: Mapping[str, Format] = {
    "html": Format("report.html", _one(write_report)),
    "md": Format("report.md", _one(lambda run, out: write_page(markdown(run), out))),
    "csv": Format("trials.csv", _one(write_csv)),
    "parquet": Format("trials.parquet", _one(write_parquet)),
    "png": Format("figures", lambda run, out: write_images(run, out, "png")),
    "svg": Format("figures", lambda run, out: write_images(run, out, "svg")),
}
