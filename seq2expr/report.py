"""One self-contained HTML page for a run: text, facts, tables and figures, nothing to load."""

import base64
import numbers
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from seq2expr import plot
from seq2expr.store import write_text

Format = str | Callable[[Any], str]

_DPI = 160  # sharp on screens; the files beside the report are for print

_PAGE = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
).from_string(
    """\
{% macro show(block) %}
{% if block.kind == "text" %}
<p>{{ block.text }}</p>
{% elif block.kind == "facts" %}
<div class="scroll"><table class="facts"><tbody>
{% for name, value in block.rows %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</tbody></table></div>
{% elif block.kind == "table" %}
<div class="scroll"><table>
<caption><b>Table {{ block.number }}.</b> {{ block.caption }}</caption>
<thead><tr>
{% for column in block.columns %}
<th scope="col"{% if column.numeric %} class="number"{% endif %}>{{ column.name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in block.rows %}
<tr>
{% for cell in row %}
<td{% if block.columns[loop.index0].numeric %} class="number"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% else %}
<figure>
<img src="data:image/png;base64,{{ block.png }}" width="{{ block.width }}" alt="{{ block.alt }}">
<figcaption><b>Figure {{ block.number }}.</b> {{ block.caption }}</figcaption>
</figure>
{% endif %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff;
       font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem;
     border-bottom: 1px solid #ccc; }
nav ol { margin: 0 0 1rem; padding-left: 1.4rem; }
a { color: #0072b2; }
p { white-space: pre-line; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; font-size: .875rem; color: #444; padding: .3rem 0; }
thead th { border-top: 1.5px solid #222; border-bottom: 1px solid #222; }
tbody tr:last-child > * { border-bottom: 1.5px solid #222; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
th.number, td.number { text-align: right; white-space: nowrap; }
.facts th { font-weight: normal; color: #555; white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.facts tbody tr > * { border: 0; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; }
@media print {
  body { max-width: none; margin: 0; font-size: 10pt; }
  nav { display: none; }
  .scroll { overflow: visible; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for block in sections[0].blocks %}
{{ show(block) }}
{% endfor %}
{% if sections|length > 2 %}
<nav aria-label="Contents">
<ol>
{% for section in sections[1:] %}
<li><a href="#section-{{ loop.index }}">{{ section.heading }}</a></li>
{% endfor %}
</ol>
</nav>
{% endif %}
{% for section in sections[1:] %}
<section id="section-{{ loop.index }}">
<h2>{{ section.heading }}</h2>
{% for block in section.blocks %}
{{ show(block) }}
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""
)


class Report:
    """A page that grows from top to bottom and is written once.

    What is added before the first :meth:`section` stands under the title. Every string is shown
    as it is: markup in the name of a gene or a file is escaped. The same content makes the same
    bytes; the page holds no date.

    Parameters
    ----------
    title
        Heading of the page.

    Examples
    --------
    >>> report = Report("Expression in K562")
    >>> report.section("Data")
    >>> report.facts({"genes": 18377, "test chromosomes": ["chr3", "chr21"]})
    >>> report.write("report.html")  # doctest: +SKIP
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._sections: list[dict[str, Any]] = [{"heading": "", "blocks": []}]
        self._counts = {"table": 0, "figure": 0}

    def section(self, heading: str) -> None:
        """Start a section; from the second on the page has a table of contents."""
        self._sections.append({"heading": heading, "blocks": []})

    def text(self, *paragraphs: str) -> None:
        """Add paragraphs of plain text; line breaks are kept."""
        for paragraph in paragraphs:
            self._add("text", text=paragraph)

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Add names with their values, one a line, formatted by :func:`shown`."""
        self._add("facts", rows=[(name, shown(value)) for name, value in facts.items()])

    def table(
        self,
        frame: pd.DataFrame,
        caption: str,
        formats: Mapping[str, Format] | None = None,
        *,
        max_rows: int = 200,
    ) -> None:
        """Add a numbered table.

        Parameters
        ----------
        frame
            What to show. An index with a name becomes columns, one without is left out.
        caption
            What the numbers are: metric, unit, n.
        formats
            By column, a format specification (``".2f"``) or a function of one value that returns
            its text; other columns are formatted by :func:`shown`.
        max_rows
            Show this many rows; the caption says how many there are.

        Raises
        ------
        ValueError
            When ``formats`` names a column that the table does not have.
        """
        if any(name is not None for name in frame.index.names):
            frame = frame.reset_index()
        formats = formats or {}
        if unknown := set(formats) - set(frame.columns):
            raise ValueError(f"formats for {sorted(unknown)}, which are not columns of the table")
        if len(frame) > max_rows:
            caption = f"{caption} (The first {max_rows:,} of {len(frame):,} rows.)"
        head = frame.head(max_rows)
        columns = [{"name": name, "numeric": _is_number(data)} for name, data in head.items()]
        cells = [[shown(v, formats.get(name)) for v in data] for name, data in head.items()]
        rows = list(zip(*cells, strict=True))
        self._add("table", columns=columns, rows=rows, caption=caption)

    def figure(self, figure: Figure, caption: str, *, alt: str | None = None) -> None:
        """Add a numbered figure, embedded as PNG.

        Parameters
        ----------
        figure
            What to draw; later changes to it do not show.
        caption
            What it shows.
        alt
            What a reader who does not see it should know; by default the caption.
        """
        self._add(
            "figure",
            png=base64.b64encode(plot.render(figure, "png", dpi=_DPI)).decode("ascii"),
            width=round(96 * figure.get_figwidth()),  # a CSS inch has 96 pixels
            caption=caption,
            alt=caption if alt is None else alt,
        )

    def write(self, path: str | os.PathLike) -> Path:
        """Write the page, whole or not at all, and return its path.

        Raises
        ------
        UserError
            When the place cannot be written.
        """
        write_text(Path(path), _PAGE.render(title=self.title, sections=self._sections))
        return Path(path)

    def _add(self, kind: str, **content: Any) -> None:
        """Append a block to the last section; tables and figures are numbered."""
        if kind in self._counts:
            self._counts[kind] += 1
            content["number"] = self._counts[kind]
        self._sections[-1]["blocks"].append({"kind": kind, **content})


def shown(value: Any, how: Format | None = None) -> str:
    """Return a value as a reader should see it.

    Whole numbers get thousands separators, others three significant digits (all digits before
    the point from 1000 on), lists commas, and a missing value a dash.

    Parameters
    ----------
    value
        What to show.
    how
        A format specification or a function instead of these rules; a missing value stays a dash.
    """
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return ", ".join(shown(item, how) for item in items)
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if how is not None:
        return how(value) if callable(how) else format(value, how)
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{value:,}"
    if isinstance(value, numbers.Real):
        return _three_digits(float(value))
    return str(value)


def _three_digits(value: float) -> str:
    """Return three significant digits, trailing zeros kept so that columns line up."""
    if value == 0:
        return "0"
    if 999.5 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def _is_number(column: pd.Series) -> bool:
    """Tell whether a column holds numbers (which are aligned right); flags are not numbers."""
    kind = pd.api.types
    return kind.is_numeric_dtype(column) and not kind.is_bool_dtype(column)
