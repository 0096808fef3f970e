"""A registry of small mixtures of real digits, made in this process."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.partitions import PackPartitions
from data.stream import read_blocks
from deploy.registry import REFERENCE_ARTIFACT, register_model
from eval.bins import BinSettings
from eval.likelihood import summarise
from eval.measure import local_pass
from eval.reference import fit_reference
from eval.scores import ScoreSettings
from trainer.checkpoint import save_model
from trainer.models.factor_analysis import fit_factor_analyser
from trainer.models.mfa import MFA
from trainer.tracking import finish_run, log_dataset, log_folder, start_run


def _rows(manifest, split):
    blocks = list(read_blocks(manifest, split, dequantise_seed=0))
    return tuple(np.concatenate([block[name] for block in blocks]) for name in ("x", "label"))


def _class_mixture(manifest, left_out=(), n_factors=5, noise=1.0):
    """A mixture with one factor analyser per class of the digits, fitted without the classes `left_out`."""
    x, labels = _rows(manifest, "train")
    x = torch.from_numpy(x).flatten(1)
    kept = [label for label in range(10) if label not in left_out]
    prior = x.var(0) + 1e-3
    parts = [
        fit_factor_analyser(x[labels == k], n_factors, prior_count=30, prior_variance=prior, n_iterations=10)
        for k in kept
    ]
    model = MFA(len(kept), x.shape[1], n_factors, noise_floor=1e-5)
    mixing = torch.tensor([float((labels == k).sum()) for k in kept])
    means, loadings, variances = (torch.stack(column) for column in zip(*parts))
    model.set_components(mixing / mixing.sum(), means, loadings, variances * noise)
    return model


def _reference(folder, manifest):
    partitions = PackPartitions(manifest, "train")
    settings = [BinSettings(n_bins=20, n_init=2)]
    fit_reference(partitions, local_pass(partitions), settings, ScoreSettings(())).save(folder)
    return folder


@pytest.fixture(scope="session")
def digits_reference(digits_pack, tmp_path_factory):
    """The folder of a reference fitted to the digits' training split."""
    return _reference(str(tmp_path_factory.mktemp("reference")), digits_pack)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory, digits_pack, digits_reference):
    """A registry: `put(model, name, alias)` registers a mixture with its run, reference and scores.

    All tests of a session share it, each under names of its own.
    """
    tmp_path = tmp_path_factory.mktemp("shelf")
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def put(
        model, name, alias="candidate", *, manifest=digits_pack, reference=digits_reference, data=False, failed=False
    ):
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        save_model(str(folder), model, "mfa", manifest, dequantised=True)
        run = start_run(uri, "shelf", "run", params={}, tags={})
        if reference:
            log_folder(uri, run, reference, REFERENCE_ARTIFACT)
        x, _ = _rows(digits_pack, "test")
        with torch.no_grad():
            found = summarise(np.nan_to_num(model.log_prob(torch.from_numpy(x)).numpy()))
        scores = {"test_log_likelihood": found.mean, "test_log_likelihood_se": found.standard_error}
        options = {"name": name, "alias": alias, "tracking_uri": uri, "run_id": run, "scores": scores}
        lineage = {"recipe": "by hand", "recipe.fingerprint": "0" * 64}
        registered = register_model(str(folder), **options, lineage=lineage)
        if data:
            log_dataset(uri, run, name="digits", source=manifest.base, fingerprint=manifest.fingerprint)
        finish_run(uri, run, failed=failed)
        return registered

    def reference_of(manifest):
        return _reference(str(tmp_path_factory.mktemp("reference")), manifest)

    return SimpleNamespace(uri=uri, put=put, mixture=partial(_class_mixture, digits_pack), reference_of=reference_of)
