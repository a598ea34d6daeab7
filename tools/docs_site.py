"""Hooks of mkdocs.yml: the repository's pages are pages of the site, and links between them hold in both."""

from __future__ import annotations

import pathlib
import posixpath
import re
from typing import Any

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = pathlib.Path(__file__).parents[1]
# Pages outside docs/, and what they are called on the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")


def on_config(config: Any) -> None:
    """Headings get the anchors that GitHub gives them."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")


def on_files(files: Any, config: Any) -> None:
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=site_text((ROOT / source).read_text(), source)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return markdown if page.file.src_uri in PAGES.values() else site_text(markdown, f"docs/{page.file.src_uri}")


def site_text(markdown: str, source: str) -> str:
    """A page of the repository with its links as they are on the site; links to other files become their names."""

    def moved(match: re.Match[str]) -> str:
        image, text, file, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), file))
        if path in PAGES or path.startswith("docs/"):
            return f"{image}[{text}]({PAGES.get(path, path.removeprefix('docs/'))}{anchor or ''})"
        return f"{text} (`{path}`)"

    return _LINK.sub(moved, markdown)
