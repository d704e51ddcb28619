"""The errors that leakbench raises on purpose: each message is one line with the thing, the value and the fix."""

MAX_LETTERS = 300
"""The most letters of an error of someone else's code that are kept."""

DEFENSE_FAILED = "the defense failed: "
"""The beginning of every reason by which a trial is an error of its defense."""


class LeakbenchError(Exception):
    """An error that the user can fix; the command line prints its one line and exits with 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class BadOption(LeakbenchError, ValueError):
    """A component, option or value that does not exist or is not valid."""


class MissingAsset(LeakbenchError):
    """A dataset or weight file is not in the cache; the message names the command that fetches it."""


class CorruptAsset(LeakbenchError):
    """A dataset or weight file has an unexpected checksum or structure."""


class ForeignRun(LeakbenchError):
    """A run file cannot be read, or leakbench did not write it."""


class Unsupported(LeakbenchError):
    """An attack does not support this model, dataset, defense or threat model; the message gives the reason."""


class ClientFailed(BadOption):
    """A client's step gives no finite gradient, whatever its defense."""


class DefenseFailed(ClientFailed):
    """A defense raised an error, or sent something that is no gradient of its network; nothing was protected.

    Args:
        reason: what the defense did, after its name.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason if reason.startswith(DEFENSE_FAILED) else DEFENSE_FAILED + reason)


class OldPlugin(DeprecationWarning):
    """A plugin in a form of old, which still works; the message says what to change."""


def printable(text: object) -> str:
    """Return text without line breaks and control characters, which a terminal would obey."""
    return "".join(char if char.isprintable() else " " for char in str(text))


def one_line(text: object) -> str:
    """Return printable text with single spaces."""
    return " ".join(printable(text).split())


def words(error: BaseException) -> str:
    """Return the type of an error and the beginning of its message in one line; some of torch's fill a page."""
    text = f"{type(error).__name__}: {one_line(error)}"
    return text if len(text) <= MAX_LETTERS else f"{text[: MAX_LETTERS - 4]} ..."
