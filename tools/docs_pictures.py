"""Make the pictures of the documentation from the committed reports: ``python tools/docs_pictures.py``.

The heat map of the worst case is drawn from its CSV; audits' pages are shown in Debian's Chromium, by Playwright.
"""

from pathlib import Path

from playwright.sync_api import sync_playwright

from leakbench.report import charts
from leakbench.report.figure import saved
from leakbench.report.files import metrics_of
from leakbench.report.run import RunData
from leakbench.store.frames import from_csv

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
AUDITS = {"audit": ("resnet18", 1090), "flower": ("flower-mlp2", 1260)}
"""The picture of each audit: its report, and the height of the part that is shown, in pixels."""


def worst_case() -> None:
    """Draw the heat map of ``reports/worst-case``."""
    trials = from_csv(ROOT / "reports" / "worst-case" / "results.csv")
    (crossing,) = charts.crossings(RunData("worst-case", (), trials, metrics_of(trials), {}))
    (DOCS / "worst-case.png").write_bytes(saved(charts.heatmap(crossing)))


def audits() -> None:
    """Take a picture of the beginning of the pages of ``AUDITS``."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name, (report, height) in AUDITS.items():
            page = browser.new_page(viewport={"width": 1100, "height": height})
            page.goto((ROOT / "reports" / "audit" / report / "audit.html").as_uri())
            page.screenshot(path=DOCS / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    worst_case()
    audits()
