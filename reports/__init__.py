"""What a person reads: the front, its figures, tables and the report page, from a run's records."""

from ..search.config import Limits
from .compare import compare_runs
from .compare_page import write_comparison
from .covered import hypervolume_over_time, hypervolumes
from .formats import FORMATS
from .front import Point, candidates, feasible, front, picks, point, rule, uncompressed
from .html import ReviewLinks, page_html, write_report
from .summary import summary, summary_table
from .tables import write_tables
from .verdict import forced, verdict

__all__ = [
    "FORMATS",
    "Limits",
    "Point",
    "ReviewLinks",
    "candidates",
    "compare_runs",
    "feasible",
    "forced",
    "front",
    "hypervolume_over_time",
    "hypervolumes",
    "page_html",
    "picks",
    "point",
    "rule",
    "summary",
    "summary_table",
    "uncompressed",
    "verdict",
    "write_comparison",
    "write_report",
    "write_tables",
]
