"""Reasons for which an attack cannot act, with fixes that the audit of a recorded update has.

Attacks name the options of a matrix, such as ``batch=1``. The audit of an update has none of these: its attacks are
those of its suite, and what is known of the client is recorded, or stated by options of the command line.
"""

import re

VERBS = r"(?:use|give|grant|write|set|train|choose) "
"""What the half sentence that states a fix begins with."""

FIXES = (
    (r"batch=1", "record an update of one image"),
    (r"a client at most 1(?![\d,])", "record an update of one image"),
    (r"a client at most ([\d,]+)", r"record an update of at most \1 images"),
    (r"(?:clients that take one, and recipe=known|local_steps=1)", "record an update of one step"),
    (r"a client with optimizer=sgd", "record an update by SGD"),
    (r"(?:a threat model with )?shares=gradient", "record a gradient (--gradient)"),
    (r"(?:a threat model with )?shares=weights", "record the weights after the training"),
    (r"(?:a threat model with )?rate=known", "give --rate"),
    (r"count=known", "give --images"),
)
"""What an audit has in place of a fix of a matrix."""

MATRIX = re.compile(r"\b\w+=|\bthreat model\b|\b(?:another|no) (?:attack|defense|label)\b|^dlm\b")
"""What the other fixes of a matrix contain."""


def reworded(reason: str) -> str:
    """Return a reason with the fixes that an audit of an update has; fixes that only a matrix has are left out.

    Example:
        >>> reworded("the label counts do not follow; use labels=counts, or rate=known")
        'the label counts do not follow; give --rate'
    """
    return "; ".join(part for each in reason.split("; ") if (part := _reworded(each)))


def _reworded(part: str) -> str:
    """Return a half sentence; empty if it states fixes, and an audit has none of them."""
    verb = re.match(VERBS, part)
    if verb is None:
        return part
    found = []
    for number, one in enumerate(re.split(r", or |, (?!and )", part[verb.end() :])):
        known = next((m.expand(words) for pattern, words in FIXES if (m := re.fullmatch(pattern, one))), "")
        if known or not MATRIX.search(one):
            found.append(known or (one if number else verb.group() + one))
    return ", or ".join(found)
