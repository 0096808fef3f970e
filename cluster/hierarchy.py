"""Hierarchical training of mixtures: route samples to root components, train sub-mixtures as parallel Ray tasks.

Richardson & Weiss 2018, supplement §1.2: each root component is split using only the samples that belong to it, into
a number of sub-components by its sample count; in the flat model the mixing coefficients are multiplied.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import ray
import torch

from cluster.counting import result_of
from cluster.recipe import Recipe
from data import storage
from data.augment import variants
from data.errors import StorageError
from data.manifest import Manifest, ShardRecord, SplitRecord, load_manifest, save_manifest
from data.shards import write_shard
from data.stream import read_blocks
from trainer.checkpoint import load_model, save_model
from trainer.fit import Fit, trained_tensors
from trainer.initialise import initial_rows, initialise_mfa
from trainer.loop import Callbacks, LogEntry
from trainer.models.mfa import MFA
from trainer.settings import TRAIN_SPLIT

Advance = Callable[..., None]

# A routing task holds what it read in memory until it writes its parts.
_ROUTED_BYTES = 256 << 20


def route_samples(recipe: Recipe, manifest: Manifest, root: str, folder: str, advance: Advance) -> dict[int, str]:
    """One pass over the training split: every sample goes to the shards of its most responsible root component.

    Where training augments its samples, all variants of a sample are routed, each to its own component.

    The pass is cut into Ray tasks, each reading its own blocks and writing one part per component. How it is cut
    depends on the data alone, so that the components' shards are the same on any cluster.

    Args:
        recipe: the job's recipe.
        manifest: the packed data.
        root: folder of the root model.
        folder: where the components' shards go, one sub-folder each.
        advance: moves a progress bar.

    Returns:
        The folder of each component that received samples.
    """
    shards = manifest.split(TRAIN_SPLIT).shards
    tasks = min(sum(len(s.members) for s in shards), max(8, math.ceil(sum(s.bytes for s in shards) / _ROUTED_BYTES)))
    retries = recipe.splitting.max_retries
    task = ray.remote(num_cpus=1, max_retries=retries, retry_exceptions=[StorageError])(_route_part)
    document = recipe.model_dump(mode="json")
    pending = [task.remote(document, manifest.base, root, folder, i, tasks) for i in range(tasks)]
    parts: dict[int, list[ShardRecord]] = {}
    for done, found in enumerate(_drain(pending, retries), start=1):
        advance(done, total=tasks)
        for component, record in found[1].items():
            parts.setdefault(component, []).append(ShardRecord.model_validate(record))
    folders = {}
    for component, records in parts.items():
        target = component_folder(folder, component)
        records.sort(key=lambda record: record.file)
        split = SplitRecord(samples=sum(record.samples for record in records), shards=records)
        save_manifest(manifest.model_copy(update={"splits": {TRAIN_SPLIT: split}}), target)
        folders[component] = target
    return folders


def component_folder(folder: str, component: int) -> str:
    """Where a root component's shards and sub-mixture lie."""
    return storage.join(folder, f"component-{component:05d}")


def _route_part(
    document: dict[str, Any], shards: str, root: str, folder: str, part: int, parts: int
) -> tuple[int, dict[int, dict[str, Any]]]:
    recipe, manifest = Recipe.model_validate(document), load_manifest(shards)
    model, _ = load_model(root)
    seed = recipe.training.seed if recipe.training.dequantises(manifest.levels) else None
    scaled = read_blocks(manifest, TRAIN_SPLIT, rank=part, world_size=parts, dequantise_seed=seed)
    stored = read_blocks(manifest, TRAIN_SPLIT, rank=part, world_size=parts, raw=True)
    routed: dict[int, list[dict[str, np.ndarray]]] = {}
    with torch.inference_mode():
        for block, raw in zip(scaled, stored, strict=True):
            names = recipe.training.augment
            # A variant of a sample may belong to another component than the sample.
            for x, kept in zip(variants(block["x"], names), variants(raw["x"], names), strict=True):
                component = model.component_log_prob(torch.from_numpy(np.ascontiguousarray(x))).argmax(1).numpy()
                for k in np.unique(component):
                    rows = component == k
                    part_of = {n: v[rows] for n, v in raw.items() if n not in ("index", "x")}
                    routed.setdefault(int(k), []).append({"x": kept[rows], **part_of})
    records = {}
    for k, blocks in routed.items():
        merged = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        url = storage.join(component_folder(folder, k), f"{TRAIN_SPLIT}-{part:06d}.tar")
        record = write_shard(url, [merged], rows_per_block=recipe.data.rows_per_block, n_samples=len(merged["x"]))
        records[k] = record.model_dump(mode="json")
    return part, records


def train_sub_mixtures(
    recipe: Recipe,
    folders: dict[int, str],
    root: str,
    advance: Advance,
    on_result: Callable[[int, dict[str, Any]], None] = lambda component, result: None,
) -> dict[int, dict[str, Any]]:
    """Trains the sub-mixture of every root component that is large enough to split, as Ray tasks, largest first.

    A task leaves its model in the component's folder and is not run again where that model is there; one that fails
    or is killed is tried again alone.

    Returns:
        Per component: `samples`, `n_components`, `log_likelihood` (the last one in training, nats per sample; None
        where it was not split) and `seconds`. `on_result` gets each as soon as it is there.
    """
    settings = recipe.splitting
    sizes = {k: load_manifest(folder).n_samples(TRAIN_SPLIT) for k, folder in folders.items()}
    order = sorted(sizes, key=lambda k: -sizes[k])
    task = ray.remote(
        num_cpus=settings.cpus_per_task,
        num_gpus=settings.gpus_per_task,
        max_retries=settings.max_retries,
        retry_exceptions=[StorageError],
    )(_train_sub_mixture)
    document = recipe.model_dump(mode="json")
    pending = [task.remote(document, folders[k], root, k) for k in order]
    results, done = {}, 0
    for component, result in _drain(pending, settings.max_retries):
        results[component] = result
        on_result(component, result)
        done += sizes[component]
        advance(done, total=sum(sizes.values()), text=f"{len(results)} of {len(order)} components")
    return results


def save_trained(
    folder: str, model: Any, recipe: Recipe, manifest: Manifest, scores: Mapping[str, float] | None = None
) -> None:
    """Stores a model of this recipe, trained on this data, perhaps with what it reached on test data."""
    dequantised = recipe.training.dequantises(manifest.levels)
    save_model(folder, model, recipe.model.family, manifest, dequantised=dequantised, scores=scores)


def sub_components(samples: int, recipe: Recipe) -> int:
    """The number of sub-components of a root component with so many samples."""
    settings = recipe.splitting
    return max(1, min(settings.max_components, round(samples / settings.samples_per_component)))


def _train_sub_mixture(document: dict[str, Any], folder: str, root: str, component: int) -> tuple[int, dict[str, Any]]:
    recipe, manifest = Recipe.model_validate(document), load_manifest(folder)
    settings = recipe.splitting
    result_url = storage.join(folder, "result.json")
    if storage.exists(result_url):
        return component, json.loads(storage.read_bytes(result_url))
    samples = manifest.n_samples(TRAIN_SPLIT)
    n_components = sub_components(samples, recipe)
    parent, _ = load_model(root)
    model = MFA(n_components, parent.n_features, settings.n_factors, parent.noise_floor, parent.noise)
    began, log_likelihood = time.perf_counter(), None
    if n_components > 1:
        parent_noise = parent.noise_variance[component].detach()
        log_likelihood = _fit_sub_mixture(model, recipe, manifest, parent_noise, component)
        save_trained(storage.join(folder, "model"), model, recipe, manifest)
    seconds = round(time.perf_counter() - began, 3)
    result = {
        "samples": samples,
        "n_components": n_components,
        "log_likelihood": log_likelihood,
        "seconds": seconds,
    }
    storage.write_text(result_url, json.dumps(result))
    return component, result


def _fit_sub_mixture(
    model: MFA, recipe: Recipe, manifest: Manifest, parent_noise: torch.Tensor, component: int
) -> float | None:
    settings = recipe.splitting
    training = recipe.training.model_copy(
        update={
            "method": settings.method,
            "em": settings.em,
            "steps": settings.steps,
            "batch_size": min(settings.batch_size, manifest.n_samples(TRAIN_SPLIT)),
            "seed": recipe.training.seed + component + 1,
            "engine": "ddp",
            "lanes": 1,
            "augment": [],  # the variants were routed
            "checkpoint_every": settings.steps + 1,
            "optimiser": settings.optimiser,
        }
    )
    smoothing = settings.noise_prior_smoothing
    start = recipe.initialisation.model_copy(
        update={
            "noise_prior_count": settings.noise_prior_count,
            "noise_prior_smoothing": smoothing or 0.0,
            "n_init": settings.n_init,
        }
    )
    rows = initial_rows(manifest, training, start)
    initialise_mfa(
        model,
        rows,
        start,
        seed=training.seed,
        shape=tuple(manifest.shape),
        prior_variance=None if smoothing else parent_noise,
    )
    if not training.length:
        return None
    history: list[LogEntry] = []
    device = torch.device("cuda") if settings.gpus_per_task else None
    state = Fit(model, manifest, training, device=device).run(Callbacks(on_log=history.append))
    tensors = trained_tensors(state)
    model.cpu().load_state_dict({name: tensors[name] for name in model.state_dict()})
    return history[-1].metrics["log_likelihood"]


def flatten(root: str, folders: dict[int, str], noise_prior_count: float) -> MFA:
    """The flat model: all sub-mixtures, their mixing coefficients multiplied by those of their root components.

    Root components that were not split (too few samples, or none) stay as they are. The noise priors of the
    sub-mixtures are kept, for training the flat model further.
    """
    parent, _ = load_model(root)
    π = parent.mixing_coefficients.detach().double()
    parts: list[tuple[torch.Tensor, ...]] = []
    for k in range(parent.n_components):
        split = k in folders and storage.exists(storage.join(folders[k], "model", "model.json"))
        if split:
            sub, _ = load_model(storage.join(folders[k], "model"))
            weights = sub.mixing_logits.detach().double().softmax(0) * π[k]
            prior = sub.noise_prior_variance if sub.noise_prior_count > 0 else sub.noise_variance
            parts.append((weights, sub.means, sub.factor_loadings, sub.noise_variance, prior))
        else:
            own = slice(k, k + 1)
            noise = parent.noise_variance[own]
            parts.append((π[own], parent.means[own], parent.factor_loadings[own], noise, noise))
    n_factors = max(part[2].shape[-1] for part in parts)
    padded = [torch.nn.functional.pad(part[2], (0, n_factors - part[2].shape[-1])) for part in parts]
    flat = MFA(sum(len(part[0]) for part in parts), parent.n_features, n_factors, parent.noise_floor, parent.noise)
    flat.set_components(
        torch.cat([part[0] for part in parts]),
        torch.cat([part[1] for part in parts]),
        torch.cat(padded),
        torch.cat([part[3] for part in parts]),
    )
    flat.set_noise_prior(noise_prior_count, torch.cat([part[4].expand(-1, parent.n_features) for part in parts]))
    return flat


def _drain(pending: list[Any], retries: int) -> Iterator[Any]:
    """Results in the order in which the tasks end."""
    while pending:
        ready, pending = ray.wait(pending, num_returns=1)
        yield result_of(ready[0], retries)
