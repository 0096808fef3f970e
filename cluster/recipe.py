"""The whole recipe of the main job: each room's settings composed, read from YAML, changed by `--set key=value`."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from data.errors import UserError, one_line
from data.limits import MAX_DRAWN, MAX_SEED
from data.sources import SourceOptions
from eval.bins import BinSettings
from trainer.families import FAMILIES, MFASettings, ModelSettings
from trainer.settings import (
    EMSettings,
    InitialisationSettings,
    OptimiserSettings,
    Settings,
    TrainingSettings,
)

_LARGEST_RECIPE = 1_000_000
# Of the operating system; asking for a longer one is an error of its own.
_LONGEST_PATH = 4000
# Workers, CPUs and GPUs beyond any cluster, and seconds beyond any patience (30 years): what is larger is a slip, and
# some of Ray's and PyTorch's own numbers end below.
_MOST_WORKERS, _MOST_SECONDS, _MOST_LANES = 100_000, 10**9, 10**9
# What not every model family uses.
_FAMILY_SECTIONS = ("initialisation", "hierarchy", "evaluation")


class DataSettings(Settings):
    """Where the samples come from."""

    source: str | None = Field(
        None, description="digits, mnist:F, svhn:F, images:F, array:FILE, ring, swissroll; null takes `shards`"
    )
    shards: str | None = Field(None, description="folder or URL of the packed shards; null puts them below --out")
    rows_per_block: int | None = Field(
        None, ge=1, description="most rows in one tar member; null: 1000 small images, up to 16,384 small vectors"
    )
    options: SourceOptions = Field(default_factory=lambda: SourceOptions())

    @model_validator(mode="after")
    def _somewhere(self) -> DataSettings:
        if self.source is None and self.shards is None:
            raise ValueError("set source (what to pack), shards (a pack that is there), or both")
        return self


class ScalingSettings(Settings):
    """How the training job is placed on machines."""

    workers: int = Field(
        2, ge=1, le=_MOST_WORKERS, description="data-parallel workers (most of them, where their number is elastic)"
    )
    min_workers: int | None = Field(
        None, ge=1, description="elastic: go on with so few while nodes are missing; null keeps the number fixed"
    )
    workers_per_node: int | None = Field(
        None, ge=1, le=_MOST_WORKERS, description="most workers on one node; null: as many as fit"
    )
    placement: Literal["pack", "spread", "strict_pack", "strict_spread"] = Field(
        "pack", description="few nodes or many; strict: one node, or a node each"
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs per worker")
    threads_per_worker: int | None = Field(
        None, ge=1, le=_MOST_WORKERS, description="CPU threads of a worker's mathematics; null: its CPUs, rounded down"
    )
    gpus_per_worker: float = Field(0, ge=0, description="GPUs per worker; 0 trains on CPU")
    max_failures: int = Field(3, ge=0, description="restarts of the worker group from its last checkpoint")
    start_timeout_seconds: int = Field(
        900,
        ge=4,
        le=_MOST_SECONDS,
        description="how long workers wait for room: for other jobs' end, or an autoscaler's nodes",
    )
    timeout_seconds: int = Field(
        1800, ge=10, le=_MOST_SECONDS, description="a collective operation that takes longer has failed"
    )

    @model_validator(mode="after")
    def _fewest(self) -> ScalingSettings:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) must not be above workers ({self.workers})")
        if self.min_workers is not None and self._evenly() is None:
            raise ValueError(
                f"no batch divides by every number of workers from {self.min_workers} to {self.workers}: raise "
                "min_workers"
            )
        if self.workers_per_node is not None and self.placement in ("strict_pack", "strict_spread"):
            raise ValueError("workers_per_node is for placement pack or spread: leave it out, or change placement")
        return self

    @property
    def lanes(self) -> int:
        """Shares of the data's order that every number of workers can deal out evenly."""
        return self._evenly() or self.workers

    def _evenly(self) -> int | None:
        """The least common multiple of all numbers of workers; None where it is beyond any batch."""
        found = 1
        for workers in range(self.min_workers or self.workers, self.workers + 1):
            found = math.lcm(found, workers)
            if found > _MOST_LANES:
                return None
        return found


class HierarchySettings(Settings):
    """Splitting each root component into a mixture of its own, trained on the samples that belong to it."""

    samples_per_component: int = Field(60, ge=1, description="training samples for each sub-component")
    max_components: int = Field(100, ge=1, description="most sub-components of one root component")
    n_factors: int = Field(6, ge=0, description="factors per sub-component")
    method: Literal["sgd", "em"] = Field("sgd", description="stochastic gradients, or expectation-maximisation")
    em: EMSettings = Field(default_factory=lambda: EMSettings())
    steps: int = Field(200, ge=0, description="optimiser steps of each sub-mixture")
    batch_size: int = Field(64, ge=1, description="samples per step; fewer where a component has fewer")
    noise_prior_count: float = Field(
        30.0, ge=0, le=1e12, description="pseudo-samples of the prior on the noise variances, at those of the parent"
    )
    noise_prior_smoothing: float | None = Field(
        None, gt=0, description="blur in pixels: the prior is at the sub-components' own noise variances, so blurred"
    )
    n_init: int = Field(3, ge=1, description="K-means initialisations")
    optimiser: OptimiserSettings = Field(default_factory=lambda: OptimiserSettings())
    polish: TrainingSettings | None = Field(
        None, description="training of the flat model (seed, dequantise, augment are those of training); null: none"
    )
    cpus_per_task: float = Field(1, gt=0, description="CPUs per sub-mixture task")
    gpus_per_task: float = Field(0, ge=0, description="GPUs per sub-mixture task")
    max_retries: int = Field(3, ge=0, description="times a failed or killed task is tried again")


class EvaluationSettings(Settings):
    """How the trained model is judged."""

    bins: BinSettings = Field(default_factory=lambda: BinSettings())
    z_threshold: float | None = Field(None, gt=0, description="a bin differs where |z| exceeds this ...")
    significance: float | None = Field(
        None, gt=0, lt=1, description="... or where its p-value is below this; 0.05 if neither is set"
    )
    n_samples: int = Field(2000, ge=1, le=MAX_DRAWN, description="samples drawn from each model")
    baselines: list[Literal["gaussian", "gaussian-mixture"]] = Field(
        default_factory=list,
        description="also judge a full-covariance Gaussian, and a mixture of them with model.n_components",
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="fixes samples and dequantisation")

    @model_validator(mode="after")
    def _one_threshold(self) -> EvaluationSettings:
        if self.z_threshold is not None and self.significance is not None:
            raise ValueError("set z_threshold or significance, not both")
        if self.n_samples < self.bins.n_bins:
            raise ValueError(f"n_samples ({self.n_samples}) must not be below bins.n_bins ({self.bins.n_bins})")
        return self


class TrackingSettings(Settings):
    """Where the run is recorded."""

    uri: str | None = Field(None, description="MLflow tracking URI; null takes MLFLOW_TRACKING_URI or ./mlflow.db")
    experiment: str = Field("manymodes", min_length=1, description="MLflow experiment")


class RegistrySettings(Settings):
    """Under which name the model is registered."""

    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._-]+$", description="registered model; null takes the recipe's name"
    )
    alias: str = Field("candidate", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", description="alias given to the new version")

    @field_validator("alias")
    @classmethod
    def _not_reserved(cls, alias: str) -> str:
        # MLflow would refuse it, after training.
        if re.fullmatch(r"(?i)latest|v\d+", alias):
            raise ValueError("MLflow keeps latest, v1, v2, ... for itself: choose another alias")
        return alias


class Recipe(Settings):
    """Everything that decides what a job computes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the recipe, its runs and its model")
    summary: str = Field("", description="one line for `manymodes recipes`")
    data: DataSettings
    model: ModelSettings = Field(default_factory=lambda: MFASettings())
    initialisation: InitialisationSettings = Field(default_factory=lambda: InitialisationSettings())
    training: TrainingSettings = Field(default_factory=lambda: TrainingSettings())
    scaling: ScalingSettings = Field(default_factory=lambda: ScalingSettings())
    hierarchy: HierarchySettings | None = Field(None, description="split the root components; null keeps the root")
    evaluation: EvaluationSettings = Field(default_factory=lambda: EvaluationSettings())
    tracking: TrackingSettings = Field(default_factory=lambda: TrackingSettings())
    registry: RegistrySettings = Field(default_factory=lambda: RegistrySettings())

    @model_validator(mode="after")
    def _fits_the_family(self) -> Recipe:
        model = self.model
        if self.training.method not in model.methods:
            raise ValueError(
                f"training.method={self.training.method} is not for model.family={model.family}: set it to "
                f"{' or '.join(model.methods)}"
            )
        if self.training.dequantise and not model.dequantises:
            raise ValueError(
                f"training.dequantise is for densities, a model of the family {model.family} takes pixels as they are: "
                "set it to false"
            )
        for name in _FAMILY_SECTIONS:
            if name not in model.sections and getattr(self, name) != Recipe.model_fields[name].get_default(
                call_default_factory=True
            ):
                raise ValueError(f"{name} is not for model.family={model.family}: leave it out")
        return self

    @model_validator(mode="after")
    def _can_be_trained(self) -> Recipe:
        self.model.check_training(self.training, self.training.lanes or self.scaling.workers)
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Recipe:
        polish = self.hierarchy.polish if self.hierarchy else None
        for name, training in (("training", self.training), ("hierarchy.polish", polish)):
            if training is None or training.method == "em":
                continue
            lanes = training.lanes or self.scaling.lanes
            if training.batch_size % lanes or lanes % self.scaling.lanes:
                least = self.scaling.lanes
                of = "scaling.workers" if least == self.scaling.workers else "every number of workers up to them"
                raise ValueError(
                    f"{name}.batch_size ({training.batch_size}) must be a multiple of the lanes ({lanes}), and "
                    f"these of {of} ({least})"
                )
        return self

    @property
    def splitting(self) -> HierarchySettings:
        """The hierarchy's settings, for the code that runs only where there is one."""
        if self.hierarchy is None:
            raise ValueError("this recipe does not split its root components")
        return self.hierarchy

    @property
    def model_name(self) -> str:
        """The registered model's name."""
        return self.registry.name or self.name

    def fingerprint(self) -> str:
        """SHA-256 of what decides the trained model: an unfinished job goes on where this is the same.

        Where it runs, by which engine, how it is judged and where it is recorded may change in between.
        """
        em = {"checkpoint_every"}
        training = {"log_every", "checkpoint_every", "loader_workers", "engine", "zero_stage", "lanes"}
        document = self.model_dump(
            mode="json",
            include={"data": True, "model": True, "initialisation": True, "training": True, "hierarchy": True},
            exclude={
                "training": {**dict.fromkeys(training, True), "em": em},
                "hierarchy": {
                    **dict.fromkeys(("cpus_per_task", "gpus_per_task", "max_retries"), True),
                    "em": em,
                    "polish": {**dict.fromkeys(training, True), "em": em},
                },
            },
        )
        document["lanes"] = self.training.lanes or self.scaling.lanes
        if self.hierarchy and self.hierarchy.polish:
            document["polish_lanes"] = self.hierarchy.polish.lanes or self.scaling.lanes
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(files("trainer"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a shipped recipe by name or a YAML file by path, and applies `key.sub=value` overrides.

    Raises:
        UserError: unknown recipe, unreadable YAML, unknown or mistyped fields; all faults in one line.
    """
    known = shipped_recipes()
    path = known.get(name_or_path, Path(name_or_path))
    if len(name_or_path) > _LONGEST_PATH or not path.is_file():
        hint = _nearest(name_or_path, known)
        raise UserError(
            f"unknown recipe {name_or_path!r}{hint}: give a YAML file or one of {', '.join(known)} "
            "(`manymodes recipes` lists them)"
        )
    try:
        if path.stat().st_size > _LARGEST_RECIPE:
            raise UserError(f"recipe {path} has more than {_LARGEST_RECIPE:,} bytes: give a recipe")
        document = _parsed(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"recipe {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise UserError(f"recipe {path} is not a mapping: it needs `name:`, `data:` and so on")
    for override in overrides:
        _apply(document, override)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise UserError(f"recipe {name_or_path}: {'; '.join(_explain(error))}") from error


class _Loader(yaml.SafeLoader):
    """Refuses aliases: nine of them in nine lines are a billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not read: write the value again")
        return super().compose_node(parent, index)


def _parsed(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is none, or no such number, date or depth can be.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, AttributeError, OverflowError, TypeError) as error:  # PyYAML does not wrap them all
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def load_source_options(overrides: Sequence[str]) -> SourceOptions:
    """The options of a source from `key=value` texts.

    Raises:
        UserError: unknown or mistyped options.
    """
    document: dict[str, Any] = {}
    for override in overrides:
        _apply(document, override)
    try:
        return SourceOptions.model_validate(document)
    except ValidationError as error:
        raise UserError(f"--set: {'; '.join(_explain(error, SourceOptions))}") from error


def described(recipe: Recipe) -> str:
    """The recipe as YAML with every field, defaults included, and what each means; a file to start one's own from."""
    lines: list[str] = []
    _describe(recipe, "", lines)
    return "\n".join(lines)


def _describe(settings: BaseModel, indent: str, lines: list[str]) -> None:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(settings, Recipe) and name in _FAMILY_SECTIONS and name not in settings.model.sections:
            continue
        if isinstance(value, BaseModel):
            lines.append(f"{indent}{name}:")
            _describe(value, indent + "  ", lines)
        else:
            lines.append(f"{indent + name + ': ' + json.dumps(value):<44}  # {field.description}")


def _apply(document: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise UserError(f"--set {override!r} is not understood: write --set training.steps=500")
    try:
        value = _parsed(text)
    except ValueError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML ({one_line(error)})") from error
    *parents, last = key.strip().split(".")
    place = document
    for parent in parents:
        if place.get(parent) is None:  # absent, or a group that the recipe leaves empty
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise UserError(f"--set {override!r}: {parent!r} is a value, not a group of fields")
    place[last] = value


def _explain(error: ValidationError, root: type[BaseModel] | None = None) -> list[str]:
    messages = []
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        # The choice of the family stands in the place of the fault, but not in the recipe.
        where = ".".join(part for i, part in enumerate(path) if not (path[i - 1 : i] == ["model"] and part in FAMILIES))
        if fault["type"] == "extra_forbidden":
            fields = _fields_at(path[:-1], root or Recipe)
            messages.append(f"unknown field {where!r}{_nearest(path[-1], fields)} (fields there: {', '.join(fields)})")
        elif fault["type"] == "unknown_family":
            family = str(fault["input"].get("family") if isinstance(fault["input"], dict) else fault["input"])
            hint = _nearest(family, FAMILIES)
            messages.append(f"model.family: choose one of {', '.join(FAMILIES)}, got {family!r}{hint}")
        elif fault["type"] == "missing":
            messages.append(f"{where!r} is missing")
        else:
            reason = fault["msg"].removeprefix("Value error, ")
            got = "" if isinstance(fault["input"], dict) or not where else f", got {fault['input']!r}"
            messages.append(f"{where + ': ' if where else ''}{reason}{got}")
    return messages


def _fields_at(path: Sequence[str], place: type[BaseModel]) -> list[str]:
    """The known field names at a dotted place below a settings class."""
    for part in path:
        if part not in place.model_fields:  # the family that `model` was read as
            place = FAMILIES[part]
            continue
        annotation = place.model_fields[part].annotation
        choices = [c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, BaseModel)]
        place = choices[0] if choices else place
    return list(place.model_fields)


def _nearest(name: str, known: Any) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {match[0]!r}?" if match else ""
