"""Progress while it runs, a table and a file afterwards."""

from thesean.report.environment import environment
from thesean.report.markdown import markdown_table
from thesean.report.progress import NullObserver, PlainObserver, RichObserver, Watching, make_observer, watched
from thesean.report.report_json import read_report, write_report
from thesean.report.table import Row, render, verdict

__all__ = [
    "NullObserver",
    "PlainObserver",
    "RichObserver",
    "Row",
    "Watching",
    "environment",
    "make_observer",
    "markdown_table",
    "read_report",
    "render",
    "verdict",
    "watched",
    "write_report",
]
