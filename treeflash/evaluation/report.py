"""The report of an evaluation: an HTML page with plots and tables, or the plots alone."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment

from treeflash.errors import ConfigError
from treeflash.evaluation.plots import draw
from treeflash.evaluation.records import Record
from treeflash.evaluation.tables import tables

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em }
img { max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: 0.2em 0.8em; text-align: left }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<img alt="plots of the tables below" src="data:image/png;base64,{{ image }}">
{% for table in tables %}
<h2>{{ table.title }}</h2>
<p>{{ table.note }}</p>
<table>
<tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
</body>
</html>
"""


def check_report(path: Path) -> None:
    """Raise a ConfigError if this report could not be written."""
    if path.suffix not in (".html", ".png"):
        raise ConfigError(f"--report writes FILE.html or FILE.png, not {path}")
    if find_spec("matplotlib") is None:
        raise ConfigError("--report needs matplotlib; pip install 'treeflash[report]'")


def write_report(path: Path, records: Mapping[str, Sequence[Record]], title: str) -> None:
    """Write the plots as PNG, or plots and tables as a self-contained HTML page.

    Args:
        path: ends in .png or .html.
        records: from `treeflash.evaluation.records.compute_records`.
        title: the heading.
    """
    image = draw(records, title)
    if path.suffix == ".png":
        path.write_bytes(image)
        return
    page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    text = page.render(title=title, image=base64.b64encode(image).decode(), tables=tables(records))
    path.write_text(text, encoding="utf-8")
