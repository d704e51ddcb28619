"""What the audit of a recorded update names as fixes: what its command line, or another recording, has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import leakbench
from leakbench.audit.fixes import MATRIX, reworded

PACKAGE = Path(leakbench.__file__).parent
FLAG = re.compile(r"--[a-z][a-z-]+")


def refusals() -> list[str]:
    """Every message of ``Unsupported`` that the code of attacks states, with a word for each value in it."""
    found = []
    for folder in ("attacks", "gradients", "models", "generators"):
        for path in (PACKAGE / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Unsupported" and node.args:
                    (text,) = node.args
                    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                    found.append("".join(str(one.value) if isinstance(one, ast.Constant) else "7" for one in parts))
    return found


def test_no_reason_in_an_audit_of_an_update_names_an_option_of_a_matrix() -> None:
    each = refusals()
    assert sum(bool(MATRIX.search(one)) for one in each) > 20
    options = (PACKAGE / "cli" / "audit.py").read_text(encoding="utf-8")
    for one in each:
        problem, *fixes = reworded(one).split("; ")
        assert problem == one.split("; ")[0]
        for fix in fixes:
            assert not MATRIX.search(fix), fix
            for flag in FLAG.findall(fix):
                assert f"    {flag.removeprefix('--').replace('-', '_')}: " in options, fix


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("a serves clients of one image; use batch=1", "a serves clients of one image; record an update of one image"),
        ("counts; use labels=counts, or rate=known", "counts; give --rate"),
        ("counts are not known; use labels=counts", "counts are not known"),
        ("a needs the number, which is hidden; use count=known", "a needs the number, which is hidden; give --images"),
        ("sums; use a client with optimizer=sgd, or local=unrolled with rate=known", "sums; record an update by SGD"),
        ("too many; give a client at most 16, or use a wider layer",
         "too many; record an update of at most 16 images, or use a wider layer"),
        ("too many; give a client at most 1", "too many; record an update of one image"),
        ("one step; use clients that take one, and recipe=known", "one step; record an update of one step"),
        ("a needs x; use smaller images; nor does y", "a needs x; use smaller images; nor does y"),
        ("size; use dlm or dlm+, or a threat model with rate=known", "size; give --rate"),
        ("it is cut; attack it in eval mode", "it is cut; attack it in eval mode"),
    ],
)  # fmt: skip
def test_fixes_are_those_of_an_audit(reason: str, words: str) -> None:
    assert reworded(reason) == words
