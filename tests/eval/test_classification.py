"""Accuracy, cross-entropy and confusion against scikit-learn."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss

from data.errors import UserError
from eval import classifier_figures
from eval.classification import classification


def some(n=300, n_classes=4):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(n, n_classes)) * 2
    labels = rng.integers(n_classes, size=n)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), labels


def test_equals_scikit_learn():
    log_p, labels = some()
    found = classification(log_p, labels)
    assert found.accuracy == accuracy_score(labels, log_p.argmax(1))
    assert found.cross_entropy == pytest.approx(log_loss(labels, np.exp(log_p)), rel=1e-12)
    assert np.array_equal(found.confusion, confusion_matrix(labels, log_p.argmax(1)))
    hits = log_p.argmax(1) == labels
    assert found.accuracy_error == pytest.approx(hits.std() / len(hits) ** 0.5)
    assert found.cross_entropy_error == pytest.approx(found.log_loss.std(ddof=1) / len(labels) ** 0.5)
    assert json.loads(json.dumps(found.to_dict()))["n_samples"] == 300


def test_unusable_input():
    log_p, labels = some()
    with pytest.raises(UserError, match="at least 2"):
        classification(log_p[:1], labels[:1])
    with pytest.raises(UserError, match="NaN"):
        classification(np.where(np.eye(300, 4), np.nan, log_p), labels)
    with pytest.raises(ValueError, match="labels from 0 to 3"):
        classification(log_p, labels + 1)


@pytest.mark.parametrize("n_classes", [2, 10, 30, 200])
def test_confusion_picture(n_classes):
    found = classification(*some(n_classes=n_classes))
    names = [f"class {k}" for k in range(n_classes)]
    assert classifier_figures.confusion_matrix(found.confusion, names).startswith(b"\x89PNG")
