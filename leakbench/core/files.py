"""Files that are written whole or not at all, and models of what JSON and TOML files hold."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from leakbench.errors import one_line


class StrictModel(BaseModel):
    """A frozen model of the content of a file; an unknown field is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def first_fault(error: ValidationError) -> str:
    """Return the first thing that is wrong with the content of a file, in one line that names the field."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {one_line(first['msg'])}"


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to, which replaces it at the end, or is removed after an error.

    No other thread, process or machine is given the same one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield own
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
