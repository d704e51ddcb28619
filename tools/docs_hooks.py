"""A hook of MkDocs: the committed reports are part of the site, below ``reports/``."""

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of ``reports``."""
    for path in sorted((ROOT / "reports").rglob("*")):
        if path.is_file():
            place = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **given: Any) -> str:
    """Turn links between ``docs`` and ``reports``, which hold in a checkout, into those of the site."""
    if not page.file.src_uri.startswith("reports/"):
        return markdown.replace("](../reports/", "](reports/")
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"]({up}CONTRIBUTING.md", f"]({up}extending.md").replace(f"]({up}docs/", f"]({up}")
