"""Text in Markdown."""

from __future__ import annotations

import re

from leakbench.errors import one_line

_SPECIAL = re.compile(r"[&<>|`*\\$~#@]|\[(?=\^)|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|(?<=:)//")


def escape(text: object) -> str:
    """Return text that Markdown shows as it is, in one line, inside a table as well as outside."""
    return _SPECIAL.sub(lambda match: "".join(f"&#{ord(c)};" for c in match[0]), one_line(text))
