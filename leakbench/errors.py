"""The errors that leakbench raises on purpose: each message is one line with the thing, the value and the fix."""


class LeakbenchError(Exception):
    """Something the user can put right; the command line prints its one line and exits with 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class BadOption(LeakbenchError, ValueError):
    """A component, option or value that does not exist or does not fit."""


class MissingAsset(LeakbenchError):
    """A dataset or weight file that is not in the cache; the message says which command fetches it."""


class CorruptAsset(LeakbenchError):
    """A dataset or weight file whose checksum or structure is not the expected one."""


class ForeignRun(LeakbenchError):
    """A run file that cannot be read or that leakbench did not write."""


class Unsupported(LeakbenchError):
    """An attack that cannot serve this model, dataset or threat model; the message says why."""


class OldPlugin(DeprecationWarning):
    """A plugin in a form of old, which still works; the message says what to change."""


def printable(text: object) -> str:
    """Return text without line breaks and control characters, which a terminal would obey, whoever wrote it."""
    return "".join(char if char.isprintable() else " " for char in str(text))


def one_line(text: object) -> str:
    """Return printable text with single spaces."""
    return " ".join(printable(text).split())
