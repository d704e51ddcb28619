"""What a report says of defenses and datasets in their own words: options, what the informed do, and the images."""

from __future__ import annotations

from collections.abc import Iterable

from leakbench.report.text import ABSENT, escape, table
from leakbench.store import Component, Statement

_TITLE = (
    "What the defenses state of themselves: what a reader must know of their options, and what an attacker does who is "
    'informed of them (`informed = true` in a threat model; a further one by its name, `informed = "NAME"`):'
)


def stated(components: Iterable[Component]) -> str:
    """Return a table, in Markdown, with a row for every defense; empty where the run holds no such words."""
    own = [(one.spec, one.statement) for one in components if one.kind == "defense" and one.statement is not None]
    rows = [[escape(spec), escape(statement.note) or ABSENT, _attackers(statement)] for spec, statement in own]
    return f"{_TITLE}\n\n{table(['defense', 'note', 'informed attacker'], rows, left=3)}" if rows else ""


def notes(components: Iterable[Component]) -> dict[str, str]:
    """Return what a reader must know of the images of each dataset that has a note."""
    return {one.spec: one.statement.note for one in components if one.kind == "dataset" and one.statement is not None}


def _attackers(statement: Statement) -> str:
    words = [escape(said if name == "true" else f'"{name}": {said}') for name, said in statement.informed.items()]
    return "; ".join(words) or "none stated"
