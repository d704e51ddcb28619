"""The house: which room may import which, and what stands at the root."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.utils import canonicalize_name

import leakbench
from leakbench import attacks, defenses, metrics, models
from leakbench.core.text import FEDKL
from tools import cuda_wheels

PACKAGE = Path(leakbench.__file__).parent
ROOT = PACKAGE.parent
RIDDLES = (
    "beyond chance|complete and sound|give[ns]? away|go(es)? on|has its like|informed of|read off|settled|"
    "so many|sought|spared|the informed|told apart|told nothing|told which|who is informed|words of another form|"
    "work(s|ed)? out"
)
"""Phrases that a newcomer does not understand at first reading; CONTRIBUTING's glossary has the field's terms."""


def test_imports_run_downward() -> None:
    """The layers are in pyproject.toml; a circle or an import upward, one for type checkers included, breaks them."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_root_has_few_modules() -> None:
    own = {path.stem for path in PACKAGE.glob("*.py")}
    assert own == {"__init__", "__main__", "api", "errors", "observation", "version"}


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, leakbench.cli.main; assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=dict(os.environ))


def test_a_public_class_name_means_one_thing() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1 and not name.startswith("_")] == []


def test_the_text_that_users_read_has_no_riddles() -> None:
    pages = [*PACKAGE.rglob("*.j2"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")]
    text = {str(page): page.read_text(encoding="utf-8") for page in pages}
    for path in PACKAGE.rglob("*.py"):
        strings = [node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if _is_text(node)]
        text[str(path)] = "\n".join(strings)
    found = {name: hits for name, body in text.items() if (hits := _riddles(body))}
    assert found == {}


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _riddles(text: str) -> list[str]:
    return [match[0] for match in re.finditer(rf"\b({RIDDLES})\b", " ".join(text.split()))]


def test_every_citation_of_fedkl_names_its_authors() -> None:
    """Each has the words of one constant; nothing but that constant spells them in the package."""
    authors = FEDKL.partition(",")[0]
    wrong = "W" + "ei et al"
    pages = [path for path in _own_files() if path.suffix in (".cff", ".html", ".j2", ".md", ".py", ".toml")]
    text = {str(path.relative_to(ROOT)): " ".join(path.read_text(encoding="utf-8").split()) for path in pages}
    assert [name for name, body in text.items() if wrong.lower() in body.lower()] == []
    names = re.compile(r"(\w+ et al\.? \d{4}), FedKL|FedKL \((\w+ et al\.? \d{4})")
    cited = {name: {first or second for first, second in names.findall(body)} for name, body in text.items()}
    found = {name: hits for name, hits in cited.items() if hits}
    assert {name: hits for name, hits in found.items() if hits != {authors}} == {}
    assert {"README.md", "docs/paper.md", "docs/reference/defenses.md", "reports/table6/paper.md"} <= set(found)
    package = {name for name, body in text.items() if name.startswith("leakbench/") and authors in body}
    assert package == {"leakbench/core/text.py"}
    kinds = (attacks, defenses, models, metrics)
    own = [kind.get(name).reference for kind in kinds for name in kind.names()]
    assert all(FEDKL in one for one in own if "FedKL" in one or "2305.04095" in one)
    assert sum(FEDKL in one for one in own) >= 8


def _own_files() -> list[Path]:
    """Return the project's files, without environments, caches and what make built."""
    made = ("build", "dist", "runs")
    tops = [
        path
        for path in ROOT.iterdir()
        if path.is_file() or path.name == ".ci" or not (path.name.startswith(".") or path.name in made)
    ]
    return [path for top in tops for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]


def test_the_wheels_for_a_gpu_cover_what_is_imported_there() -> None:
    """The package, without its extras, and what ``make cuda-check`` runs, on a machine with torch and torchvision."""
    tests = [ROOT / "tests" / f"{name}.py" for name in ("conftest", "own_attacks", "test_graph", "test_faults")]
    tests += [ROOT / "tests" / f"{name}.py" for name in ("test_engine", "test_cli")]  # which test_faults imports
    files = (*PACKAGE.rglob("*.py"), *tests, ROOT / "tools" / "cuda_check.py")
    line = re.compile(r"^ *(?:from|import) (\w+)", re.MULTILINE)
    imported = {name for path in files for name in line.findall(path.read_text(encoding="utf-8"))}
    there = cuda_wheels.needed(cuda_wheels.PRESENT) | set(cuda_wheels.wheels())
    found = packages_distributions()
    needed = {canonicalize_name(found[name][0]) for name in imported if name in found} - {"leakbench"}
    assert {"hypothesis", "cloudpickle", "tabulate", "lazy-loader", "markupsafe", "numpy", "pydantic"} <= needed
    assert needed - there == {"dp-accounting"}  # of an extra: the defense says that it is missing
    assert cuda_wheels.wheels(["SciPy"]) == [name for name in cuda_wheels.wheels() if name != "scipy"]
