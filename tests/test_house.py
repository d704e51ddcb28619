"""The house: which room may import which, and what stands at the root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import leakbench

PACKAGE = Path(leakbench.__file__).parent


def test_imports_run_downward() -> None:
    """The layers are in pyproject.toml; a circle or an import upward, one for type checkers included, breaks them."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_root_has_few_modules() -> None:
    own = {path.stem for path in PACKAGE.glob("*.py")}
    assert own == {"__init__", "__main__", "api", "errors", "observation", "version", "victim"}


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, leakbench.cli.main; assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=dict(os.environ))
