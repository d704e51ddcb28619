"""Pages from the templates in ``report/pages``: Markdown, and HTML in one file that loads nothing from anywhere."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from leakbench.core.text import ABSENT, english, in_groups, number, part, percent, plural, with_interval
from leakbench.errors import one_line
from leakbench.report.display import aligned, escape, per_cent, to_markdown

STYLES = ("style.css",)
"""The look that every page shares: colours for light and dark, type, tables, cards, print."""

SCRIPTS = ("base.js",)
"""What every page does: the toggle of the theme, tables that sort, buttons that copy."""


def render(
    template: str,
    context: Mapping[str, object],
    data: object = None,
    styles: Sequence[str] = STYLES,
    scripts: Sequence[str] = SCRIPTS,
) -> str:
    """Return a page whose Content-Security-Policy admits its own scripts and styles by their hash, and nothing else.

    Args:
        template: a template in ``report/pages`` that extends ``base.html.j2``; all it is given is escaped.
        context: what the template shows; ``title`` is needed.
        data: JSON values for the scripts (``leakbench.data()``); a number that is not finite arrives as null or, where
            infinite, as the text ``inf`` or ``-inf``. None for no data.
        styles: style sheets in ``report/pages``, in order; likewise ``scripts``.
    """
    style, script = "\n".join(map(_text, styles)), "\n".join(map(_text, scripts))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        _environment(html=True)
        .get_template(template)
        .render(
            context,
            policy=policy,
            style=Markup(style),
            script=Markup(script),
            data=None if data is None else Markup(embedded(data)),
        )
    )


def fragment(template: str, **context: object) -> str:
    """Return HTML for inside another page, such as a notebook, from a template; all it is given is escaped."""
    return str(_environment(html=True).get_template(template).render(context)).strip()


def embedded(data: object) -> str:
    """Return JSON that may stand inside a script element: no ``<`` that could end it."""
    return json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def picture(data: bytes, kind: str = "png") -> str:
    """Return an image file as the address of an image (``src``); ``kind`` is the second half of its media type."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _text(name: str) -> str:
    return (resources.files("leakbench") / "report" / "pages" / name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def render_markdown(template: str, **context: object) -> str:
    """Return Markdown from a template in ``report/pages``, with one empty line between its paragraphs.

    Text is shown as given: the template passes text that is not Markdown through the filter ``escape``. The filter
    ``table`` takes rows of cells and makes a table, as ``rows | table(["attack", "n"], left=1)``; it escapes them. Rows
    that are cells by heading need no list of headings, and a missing cell is empty. The filter ``columns`` takes
    lines of cells between ``|``, the headings first, and lines them up as a table.
    """
    text = _environment(html=False).get_template(template).render(context)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _table(rows: Sequence[Any], headings: Sequence[str] = (), *, left: int) -> str:
    named = [dict(zip(headings, row)) if headings else row for row in rows]
    cells = [{heading: str(cell) for heading, cell in row.items()} for row in named]
    return to_markdown(pd.DataFrame(cells, dtype=str).fillna(""), left)


def _columns(text: str, left: int) -> str:
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.strip()]
    return aligned(rows, left) + "\n"  # a block's end takes the line break behind it


def sentence(template: str, name: str, *values: object) -> str:
    """Return the text, without markup, of a template's macro for these values."""
    return str(getattr(_environment(html=False).get_template(template).module, name)(*values))


@cache
def _environment(html: bool) -> Environment:
    found = Environment(
        loader=PackageLoader("leakbench.report", "pages"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {
        "english": english,
        "in_groups": in_groups,
        "number": number,
        "one_line": one_line,
        "part": part,
        "percent": percent,
        "plural": plural,
    }
    found.globals |= {"ABSENT": ABSENT, "isnan": math.isnan, "per_cent": per_cent, "with_interval": with_interval}
    found.filters |= {"quoted": "“{}”".format} if html else {"escape": escape, "table": _table, "columns": _columns}
    return found
