"""Tables of the top README that programs write: each is between two lines of its own."""

from __future__ import annotations

from pathlib import Path


def filled(text: str, block: str, begin: str, end: str) -> str:
    """Return a text with what stands between two lines replaced.

    Raises:
        ValueError: the text does not have them.
    """
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"the README has no lines {begin!r} and {end!r}; put them where the table belongs")
    return f"{before}{begin}\n{block}\n{end}{after}"


def fill(readme: Path, block: str, begin: str, end: str) -> None:
    """Replace what stands between two lines of a file."""
    readme.write_text(filled(readme.read_text(encoding="utf-8"), block, begin, end), encoding="utf-8")
