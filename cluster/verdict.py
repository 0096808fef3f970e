"""What a trained model is worth, in the form in which the main job records it, whatever kind of model it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.report import ReportSection, ReportTable


@dataclass(frozen=True)
class Verdict:
    """The scores of a model and of what it is compared with.

    Attributes:
        metrics: of the final model; recorded in MLflow, with its registered version and in its model.json.
        table: the headline table.
        models: JSON-safe, one entry per row of the table.
        protocol: what the scores hold under.
        lead: the finding, in a sentence.
        sections: draws the report's pictures.
        save: leaves in the job's folder what later evaluations need.
    """

    metrics: dict[str, float]
    table: ReportTable
    models: list[dict[str, Any]]
    protocol: dict[str, Any]
    lead: str
    sections: Callable[[], list[ReportSection]]
    save: Callable[[str], None] = lambda folder: None
