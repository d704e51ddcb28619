"""Markdown: escaping and tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tabulate import tabulate

from leakbench.errors import one_line

_SPECIAL = re.compile(r"[&<>|`*\\$~#@]|\[(?=\^)|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|(?<=:)//")


def escape(text: object) -> str:
    """Return text that Markdown shows as it is, in one line, inside a table as well as outside."""
    return _SPECIAL.sub(lambda match: "".join(f"&#{ord(c)};" for c in match[0]), one_line(text))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Return a Markdown table whose first ``left`` columns are aligned to the left; cells are escaped already."""
    align = ["left" if column < left else "right" for column in range(len(headers))]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align) if rows else ""
