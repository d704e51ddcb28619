"""The ranking of defenses in the README: ``python -m benchmarks.ranking runs/worst-case`` writes it from a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.readme import fill
from leakbench import report

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- worst case: begin, written by python -m benchmarks.ranking -->"
END = "<!-- worst case: end -->"


def main() -> None:
    """Write the table of a run of the suite worst-case between the README's markers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranking", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run of the suite worst-case")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    chosen = parser.parse_args()
    fill(chosen.readme, report.ranking(chosen.run), BEGIN, END)


if __name__ == "__main__":
    main()
