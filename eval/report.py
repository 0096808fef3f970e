"""The evaluation report: one HTML file that carries its pictures and asks nothing of the network."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_NUMBER = re.compile(r"^[+\-−±<>≤≥~ ]*\d[\d.,eE+\-−±%/ ]*( ?[a-zA-Zµ%/]{1,8})?$|^[–—-]$|^$")


# What the keys of protocols are called on the page; others are shown as they are, without underscores.
_WORDS = {
    "reference_fingerprint": "fingerprint of the reference",
    "bins_fingerprint": "fingerprint of the bins",
    "samples_fingerprint": "fingerprint of the samples",
    "held_out": "held-out data",
    "held_out_fingerprint": "fingerprint of the held-out data",
    "held_out_split": "split of the held-out data",
    "n_reference": "samples in the reference",
    "n_samples": "samples that are judged",
    "n_set": "samples in the set",
    "n_used": "samples that are used",
    "n_pairwise": "samples for scores of pairs",
    "sample_shape": "shape of a sample",
    "scale": "scale of the values",
    "samples_reach": "range of the samples",
    "reference_reach": "range of the reference",
    "space": "distances are between",
    "space_fingerprint": "fingerprint of the features",
    "dimensions_total": "dimensions of the features",
    "dimensions_used": "dimensions that K-means used",
    "clustered_samples": "samples that K-means used",
    "initialisations": "starts of K-means",
    "kmeans_subset": "subset for K-means",
    "threshold": "a bin differs where",
    "scores": "scores that are taken",
    "pairs_subsample": "samples for scores of pairs",
    "scores_seed": "seed of their subset",
    "reference_split": "split of the reference",
    "reference_scores": "scores that the reference was fitted for",
    "reference_pairs_subsample": "samples of the reference for scores of pairs",
    "reference_scores_seed": "seed of their subset in the reference",
    "samples_split": "split of the samples",
    "samples_model": "fingerprint of the model",
    "samples_draws": "samples drawn from the model",
    "samples_seed": "seed of the samples",
    "samples_levels": "levels of the drawn pixels",
    "memorisation": "search for copies",
}


@dataclass(frozen=True)
class ReportTable:
    """A table: column headings, rows of text or numbers (None is shown as a dash), and small print.

    `details` has a line for each row, which is shown muted below it ("" for none); `note` stands below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    note: str = ""
    details: Sequence[str] = ()

    def cells(self) -> list[list[str]]:
        """Rows as text: whole numbers with thousands separated, others to four significant digits."""
        return [[_spelled(cell) for cell in row] for row in self.rows]

    def detail(self, row: int) -> str:
        """The line below a row."""
        return self.details[row] if self.details else ""

    def numeric(self) -> list[bool]:
        """Whether a column holds only numbers, which are aligned at the right."""
        return [all(_NUMBER.match(row[i]) for row in self.cells()) and i > 0 for i in range(len(self.columns))]


@dataclass(frozen=True)
class ReportFigure:
    """A picture as PNG bytes, with its caption and the text for those who cannot see it."""

    title: str
    png: bytes
    caption: str
    alt: str

    def uri(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class ReportSection:
    """A heading, a paragraph, code, a table, and figures below each other, or `beside` each other in a wide window."""

    title: str
    text: str = ""
    figures: Sequence[ReportFigure] = field(default_factory=tuple)
    beside: bool = False
    table: ReportTable | None = None
    code: str = ""


def render_report(
    title: str,
    summary: ReportTable,
    sections: Sequence[ReportSection],
    facts: Mapping[str, Any],
    stages: ReportTable | None = None,
    lead: str = "",
) -> str:
    """The report as HTML: headline table, sections, then the protocol (`facts`) and the timings (`stages`).

    Everything is escaped; styles and pictures are in the file, and its content security policy forbids the rest.

    Args:
        lead: a sentence or two under the title: what was judged, against what, and the finding.

    Raises:
        ValueError: a table row with another number of cells than the table has columns.
    """
    tables = [section.table for section in sections]
    for table in filter(None, (summary, stages, *tables)):
        for row in table.rows:
            if len(row) != len(table.columns):
                raise ValueError(f"table {table.title!r}: {len(row)} cells under {len(table.columns)} columns")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        lead=lead,
        summary=summary,
        sections=sections,
        facts=_told(facts),
        stages=stages,
    )


def _told(facts: Mapping[str, Any]) -> dict[str, str]:
    """The protocol in words. Pixels need no fingerprint."""
    shown = {k: v for k, v in facts.items() if k != "space_fingerprint" or v != facts.get("space")}
    return {
        _WORDS.get(key, key.replace("_", " ")): str(value) if key.endswith("seed") else _spelled(value)
        for key, value in shown.items()
    }


def _spelled(value: Any) -> str:
    """A value as a reader expects it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return " × ".join(_spelled(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_spelled(item)}" for key, item in value.items())
    return str(value)
