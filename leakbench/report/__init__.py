"""Tables, pictures and pages of a run: pure functions of its file."""

from leakbench.analysis.statistics import bootstrap_interval
from leakbench.analysis.summary import strongest, summarise
from leakbench.report.display import console_table
from leakbench.report.files import (
    DEFAULT_FORMATS,
    FORMATS,
    STUDIES,
    has_only_csv,
    ranking,
    write,
    write_comparison,
    write_figures,
)

__all__ = [
    "DEFAULT_FORMATS",
    "FORMATS",
    "STUDIES",
    "bootstrap_interval",
    "console_table",
    "has_only_csv",
    "ranking",
    "strongest",
    "summarise",
    "write",
    "write_comparison",
    "write_figures",
]
