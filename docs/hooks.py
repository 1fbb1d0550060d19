"""For mkdocs: pages that are files elsewhere in the repository, and links between them and the pages here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "benchmarks/README.md": "benchmarks.md"}
"""File of the repository -> page of the site."""
LINK = re.compile(r"\]\((?:\.\./)*(?:docs/)?([^):#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Make links what they are on the site; links to other files of the repository become plain text."""
    return LINK.sub(_on_site, markdown)


def _on_site(link: re.Match[str]) -> str:
    path, anchor = link[1], link[2] or ""
    path = PAGES.get(path, path)
    if (ROOT / "docs" / path).is_file() or path in PAGES.values():
        return f"]({path}{anchor})"
    return link[0]
