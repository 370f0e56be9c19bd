"""The documentation as a site: `tox -e docs` builds it into `build/docs`.

Sphinx builds it, because it checks the links between pages and the form of docstrings without
plugins. MyST reads the pages as GitHub shows them. The first page is README.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
# Files of the repository's root that are pages of the site, by page.
ROOT_PAGES = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}

project = "treeflash"
release = metadata.version("treeflash")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
html_theme = "furo"
html_title = "treeflash"
html_static_path = ["pictures"]

myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
# Backticks in docstrings mark code, which is a link where it names something on the site.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_custom_sections = [("Options", "params_style")]
napoleon_use_ivar = True


def _read_page(_app: Sphinx, name: str, source: list[str]) -> None:
    """Put a file of the root before its page's own text, and direct links to pages of the site."""
    text = source[0]
    if name in ROOT_PAGES:
        text = (ROOT / ROOT_PAGES[name]).read_text() + text
    text = re.sub(r"(?<=\]\()(\.\./)?docs/", "", text)
    text = re.sub(r'"(docs/)?pictures/', '"_static/', text)
    for page, path in ROOT_PAGES.items():
        text = re.sub(rf"\]\((\.\./)?{path}", f"]({page}.md", text)
    # Other files of the repository are not on the site: their names remain.
    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./)?Dockerfile[^)]*\)", r"\1", text)


def _name_defaults(*signature: Any) -> tuple[str | None, str | None]:
    """Write a default that only the text of an option names as three dots."""
    arguments, returned = signature[-2:]
    return arguments and arguments.replace("Ellipsis", "..."), returned


def setup(app: Sphinx) -> None:
    """Register how pages and signatures are read."""
    app.connect("source-read", _read_page)
    app.connect("autodoc-process-signature", _name_defaults)
