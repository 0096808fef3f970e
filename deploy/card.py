"""The model card: a page for people, made from what the registry and the run keep of a version."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from deploy.registry import Entry, fetch_artifacts, fetch_model, find_entry
from eval import figures, mixture_figures
from eval.report import ReportFigure, ReportSection, ReportTable, render_report
from trainer.checkpoint import load_model
from trainer.tracking import mlflow_client, mlflow_errors, without_password

_SCORES = {
    "test_log_likelihood": "test log-likelihood (nats per sample)",
    "bits_per_dimension": "bits per dimension",
    "ndb": "NDB: bins that differ from the data",
    "ndb_over_k": "NDB / K",
    "js": "JS divergence (nats)",
    "test_accuracy": "test accuracy",
    "test_cross_entropy": "test cross-entropy (nats)",
}
_TASKS = {
    "log_prob": "log-likelihood of each sample, in nats",
    "probabilities": "probability of each class",
    "responsibilities": "posterior probability of each component",
    "features": "activations of the last hidden layer",
    "sample": "draws n samples, fixed by seed",
    "inpaint": "fills in what is NaN: mode map, mean, or sample (n draws of each)",
    "encode": "latent code of each sample (of a mixture: component, then its factors)",
    "decode": "samples of codes, or of points of a generator's noise",
}
_SHOWN = 64


def named_entry(place: str, tracking_uri: str) -> Entry:
    """The version that NAME@ALIAS or NAME@VERSION stands for; NAME alone is its champion, or else its candidate.

    Raises:
        UserError: there is none.
    """
    name, _, alias = place.removeprefix("models:/").partition("@")
    for wanted in (alias,) if alias else ("champion", "candidate"):
        found = find_entry(name, tracking_uri, wanted)
        if found is not None:
            return found
    raise UserError(f"{name} has no version with the alias {alias or 'champion or candidate'}: give NAME@ALIAS")


def model_card(place: str, tracking_uri: str) -> str:
    """The card of a registered model as one HTML file that carries its pictures.

    Args:
        place: NAME, NAME@ALIAS or NAME@VERSION.
        tracking_uri: where the registry is.

    Raises:
        UserError: no such version, or one that manymodes did not register.
    """
    entry = named_entry(place, tracking_uri)
    _, _, asked = place.partition("@")
    model, document = load_model(fetch_model(entry.uri, tracking_uri))
    with mlflow_errors(tracking_uri):
        client = mlflow_client(tracking_uri)
        run = client.get_run(entry.run_id)
        shared = dict(client.get_registered_model(entry.name).tags)
    with tempfile.TemporaryDirectory() as folder:
        found = fetch_artifacts(entry.run_id, "summary.json", folder, tracking_uri)
        summary = {} if found is None else json.loads(Path(found).read_text())
    data, tags = document["data"], {**shared, **entry.tags}
    aliases = ", ".join(entry.aliases) or "no alias"
    size = sum(tensor.numel() for tensor in model.parameters())
    lead = (
        f"Version {entry.version} ({aliases}): a model of the family {document['family']} with {size:,} parameters, "
        f"trained on {data['name']}, samples of {' × '.join(map(str, data['shape']))}."
    )
    sections = [
        _how_to_load(entry, asked, model, data, tracking_uri),
        *_pictures(model, data),
        _lineage(entry, tags, dict(run.data.tags), data, tracking_uri),
    ]
    protocol = _protocol(summary, data)
    scores = _scores(tags, protocol.get("bins"))
    return render_report(f"Model card: {entry.name}", scores, sections, protocol, lead=lead)


def _scores(tags: dict[str, str], bins: int | None) -> ReportTable:
    told = {**tags, **({"ndb": f"{tags['ndb']} of {bins}"} if bins and "ndb" in tags else {})}
    rows = [[label, told[name], tags.get(f"{name}_se")] for name, label in _SCORES.items() if name in told]
    note = "As recorded when it was registered, under the protocol below. ±: one standard error, over the samples."
    return ReportTable("Scores", ["score", "value", "±"], rows, note)


def _protocol(summary: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What the scores hold under: of the last row of the run's table, which is the model itself."""
    models = summary.get("models") or [{}]
    facts = dict(models[-1].get("protocol") or {})
    facts.setdefault("data_fingerprint", data["fingerprint"])
    if data["levels"] is not None:
        facts["values"] = f"pixels v of {data['levels']} levels as (v + u) / {data['levels']}, u uniform in [0, 1)"
    return facts


def _how_to_load(entry: Entry, asked: str, model: Any, data: dict[str, Any], tracking_uri: str) -> ReportSection:
    from deploy.served_model import tasks_of

    tasks, width = tasks_of(model), math.prod(data["shape"])
    # As it was asked for; NAME alone is the champion, or else the candidate.
    aliases = [alias for alias in (asked, "champion", *entry.aliases) if alias in entry.aliases]
    place = f"{entry.name}@{aliases[0]}" if aliases and not asked.isdecimal() else f"{entry.name}/{entry.version}"
    lines = [
        "import mlflow, numpy as np",
        "",
        f"mlflow.set_tracking_uri({without_password(tracking_uri)!r})",
        f'model = mlflow.pyfunc.load_model("models:/{place}")',
        f"x = np.full((3, {width}), 0.5)",
    ]
    for task in tasks:
        given = "x"
        if task == "decode":
            coded = 'model.predict(x, params={"task": "encode"})'
            given = coded if "encode" in tasks else f"np.zeros((3, {model.n_latent}))"
        options = ', "n": 3, "seed": 1' if task == "sample" else ""
        lines.append(f'print(model.predict({given}, params={{"task": "{task}"{options}}}).shape)')
    rows = [[task, _TASKS[task]] for task in tasks]
    text = "A machine with mlflow, torch and numpy is enough. Arrays and data frames are taken, any number of rows."
    table = ReportTable("What it can be asked", ["task", "what it gives"], rows)
    return ReportSection("How to load it", text, table=table, code="\n".join(lines))


def _pictures(model: Any, data: dict[str, Any]) -> list[ReportSection]:
    shape = tuple(data["shape"])
    sections = []
    if hasattr(model, "sample"):
        with torch.inference_mode():
            samples = model.sample(_SHOWN, torch.Generator().manual_seed(0)).reshape(_SHOWN, *shape).numpy()
        picture = figures.sample_grid(samples, 8, 8)
        caption = f"The first {_SHOWN} of seed 0, not chosen."
        sections.append(
            ReportSection("Samples", "", [ReportFigure("Samples", picture, caption, "Samples")], beside=True)
        )
    components = mixture_figures.components_of(model, shape)
    if components is not None:
        figure = ReportFigure("Components", components, "Mean μ, noise, and μ ± A for each factor.", "Components")
        sections.append(ReportSection("Components", "Those with the largest mixing coefficients.", [figure]))
    return sections


def _lineage(
    entry: Entry, tags: dict[str, str], run: dict[str, str], data: dict[str, Any], tracking_uri: str
) -> ReportSection:
    facts = {
        "registered model": f"{entry.name}, version {entry.version}",
        "licence": tags.get("licence") or tags.get("license") or "not stated (tag licence)",
        "MLflow": without_password(tracking_uri),
        "run": entry.run_id,
        "recipe": tags.get("recipe") or run.get("recipe"),
        "recipe fingerprint": tags.get("recipe.fingerprint"),
        "data": data["name"],
        "data fingerprint": data["fingerprint"],
        "commit": run.get("mlflow.source.git.commit"),
        **{key.replace(".", " "): value for key, value in sorted(run.items()) if key.startswith("version.")},
        **{key.replace(".", " "): value for key, value in sorted(tags.items()) if key.startswith("promotion.")},
    }
    rows = [[name, value] for name, value in facts.items() if value]
    return ReportSection("Lineage", table=ReportTable("Where it comes from", ["what", "value"], rows))
