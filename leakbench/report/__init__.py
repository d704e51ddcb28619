"""Tables, pictures and pages of a run: pure functions of its file."""

from leakbench.report.console import console_table
from leakbench.report.files import DEFAULT, FORMATS, ranking, write, write_comparison, write_figures, write_sharing
from leakbench.report.statistics import bootstrap_interval
from leakbench.report.table import strongest, summarise

__all__ = [
    "DEFAULT",
    "FORMATS",
    "bootstrap_interval",
    "console_table",
    "ranking",
    "strongest",
    "summarise",
    "write",
    "write_comparison",
    "write_figures",
    "write_sharing",
]
