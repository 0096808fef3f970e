"""Judges classifiers: accuracy and cross-entropy on the test split, and the samples that they find hardest."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.fitting import Trained
from cluster.models import LocalClassifier
from cluster.recipe import Recipe
from cluster.verdict import Verdict
from data.errors import UserError
from data.manifest import Manifest
from data.stream import read_blocks, read_labels
from eval.canvas import labelled_sheet
from eval.classification import Classification, classification
from eval.classifier_figures import confusion_matrix
from eval.report import ReportFigure, ReportSection, ReportTable
from trainer.settings import TEST_SPLIT, TRAIN_SPLIT

UNIT = "samples"  # of progress
_SHOWN = 40
_GUESS = "class frequencies of the training split"


def can_be_judged(recipe: Recipe, manifest: Manifest) -> None:
    """Refuses, before training, data that the evaluation would refuse after it."""
    n = manifest.n_samples(TEST_SPLIT)
    if n < 2:
        raise UserError(f"{manifest.name}: the test split has {n} sample, a standard error needs 2: use more data")


def judge(recipe: Recipe, trained: Trained, advance: Any) -> Verdict:
    """Judges the classifier, beside the guess that knows only how frequent each class is."""
    manifest = trained.manifest
    model = LocalClassifier(trained.model)
    log_probabilities, labels, hardest = _over_test_split(model, manifest, advance)
    n_classes = log_probabilities.shape[1]
    found = classification(log_probabilities, labels)
    counts = np.bincount(read_labels(manifest, TRAIN_SPLIT), minlength=n_classes)
    # As if each class had been seen once more: one that the training split lacks is not impossible.
    frequencies = np.log((counts + 1) / (counts.sum() + n_classes))
    guess = classification(np.broadcast_to(frequencies, log_probabilities.shape), labels)
    names = list(manifest.class_names or map(str, range(n_classes)))
    rows = {_GUESS: guess, recipe.model.label: found}
    wrong = found.n - int(np.trace(found.confusion))
    return Verdict(
        metrics={
            "test_accuracy": found.accuracy,
            "test_accuracy_se": found.accuracy_error,
            "test_cross_entropy": found.cross_entropy,
            "test_cross_entropy_se": found.cross_entropy_error,
        },
        table=_table(rows),
        models=[{"name": name, **row.to_dict()} for name, row in rows.items()],
        protocol={
            "data": manifest.name,
            "data_fingerprint": manifest.fingerprint,
            "split": TEST_SPLIT,
            "n_samples": found.n,
            "n_training_samples": manifest.n_samples(TRAIN_SPLIT),
            "classes": n_classes,
            "sample_shape": list(manifest.shape),
            "scale": "real numbers as stored" if manifest.levels is None else f"pixels / {manifest.levels - 1}",
        },
        lead=f"{wrong:,} of {found.n:,} test samples of {manifest.name} are taken for another class than their own.",
        sections=lambda: _sections(found, np.exp(log_probabilities), labels, hardest, names),
    )


def _over_test_split(
    model: LocalClassifier, manifest: Manifest, advance: Any
) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """log p(class | x) and label of every test sample, and the samples of highest loss by their rows."""
    parts, labels, hardest, losses, done = [], [], {}, np.zeros(0), 0
    for block in read_blocks(manifest, TEST_SPLIT):
        values, truth = model.log_probabilities(block["x"]), block["label"]
        loss = -values[np.arange(len(values)), truth]
        for row in np.argsort(-loss, kind="stable")[:_SHOWN]:
            hardest[done + int(row)] = block["x"][row]
        parts.append(values)
        labels.append(truth)
        losses = np.concatenate([losses, loss])
        kept = np.argsort(-losses, kind="stable")[:_SHOWN]
        hardest = {int(row): hardest[int(row)] for row in kept}
        done += len(values)
        advance(done, total=manifest.n_samples(TEST_SPLIT))
    return np.concatenate(parts), np.concatenate(labels), hardest


def _table(rows: dict[str, Classification]) -> ReportTable:
    cells = [
        [
            *(name, f"{100 * row.accuracy:.2f} %", f"{100 * row.accuracy_error:.2f}"),
            *(f"{row.cross_entropy:.4f}", f"{row.cross_entropy_error:.4f}", f"{row.n:,}"),
        ]
        for name, row in rows.items()
    ]
    columns = ["model", "test accuracy", "± s.e.", "cross-entropy (nats)", "± s.e.", "samples"]
    note = "Accuracy: test samples whose most probable class is their label. Cross-entropy: mean of -log p(label | x)."
    return ReportTable("Classification of the test split", columns, cells, note)


def _sections(
    found: Classification,
    probabilities: np.ndarray,
    labels: np.ndarray,
    hardest: dict[int, np.ndarray],
    names: list[str],
) -> list[ReportSection]:
    texts = []
    for row in hardest:
        label, predicted = int(labels[row]), int(found.predicted[row])
        share = f"{100 * probabilities[row, label]:.2g} %"
        taken = "" if label == predicted else f" → {names[predicted]}"
        texts.append(f"{names[label]}{taken}, {share}")
    wrong = sum(int(labels[row]) != int(found.predicted[row]) for row in hardest)
    sheet = labelled_sheet(np.stack(list(hardest.values())), texts, "Label (→ prediction) and the label's probability")
    return [
        ReportSection(
            "Which classes are taken for which",
            "",
            [
                ReportFigure(
                    "Confusion matrix",
                    confusion_matrix(found.confusion, names),
                    "Test samples by their label and by their most probable class.",
                    "Confusion matrix",
                )
            ],
        ),
        ReportSection(
            "The hardest test samples",
            f"The {len(hardest)} to whose label the classifier gives the least probability; it takes {wrong} of them "
            "for another class.",
            [ReportFigure("Samples", sheet, "Hardest first.", "Test samples that are hard to classify")],
        ),
    ]
