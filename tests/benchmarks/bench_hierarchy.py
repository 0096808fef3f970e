"""Hierarchical training on MNIST: sub-mixtures on one and two CPUs, a killed task, and flat EM in the same time.

The root (20 components) and the split into about 300 are those of the recipe `mnist`, without the polish. Goals: two
CPUs at least 1.7 times as fast as one; a task that is killed costs about its own time.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import psutil
import ray
import torch
from mnist_files import FOLDER, dequantised

from cluster.hierarchy import flatten, route_samples, save_trained, train_sub_mixtures
from cluster.recipe import Recipe, load_recipe
from data.manifest import Manifest
from data.shards import pack
from data.sources import SourceOptions, open_source
from eval.likelihood import summarise
from trainer.fit import Fit
from trainer.initialise import initial_rows, initialise_mfa
from trainer.models.mfa import MFA
from trainer.settings import EMSettings


def started(recipe: Recipe, manifest: Manifest, n_components: int) -> MFA:
    m = recipe.model
    model = MFA(n_components, 784, m.n_factors, m.noise_floor)
    rows = initial_rows(manifest, recipe.training, recipe.initialisation)
    initialise_mfa(model, rows, recipe.initialisation, seed=0, shape=(28, 28, 1))
    return model


def held_out(model: MFA, x: torch.Tensor) -> str:
    with torch.inference_mode():
        values = torch.cat([model.log_prob(part) for part in x.split(1000)]).double().numpy()
    return f"K={model.n_components}: test {summarise(values)} nats"


def sub_mixtures(
    recipe: Recipe, root: str, folders: dict[int, str], place: Path, cpus: int, kill: bool = False
) -> tuple[float, dict[int, str], float]:
    """Seconds of all tasks on so many CPUs, their folders, and the seconds that a killed task had run at most."""
    copies = {k: shutil.copytree(folder, place / Path(folder).name) for k, folder in folders.items()}
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        ray.get([ray.remote(num_cpus=1)(_warm).remote() for _ in range(2 * cpus)])
        killed: list[float] = []
        began = time.perf_counter()
        if kill:
            threading.Timer(2.0, _kill_one, [killed]).start()
        train_sub_mixtures(recipe, {k: str(v) for k, v in copies.items()}, root, lambda *a, **b: None)
        lost = killed[0] - began if killed else 0.0
        return time.perf_counter() - began, {k: str(v) for k, v in copies.items()}, lost
    finally:
        ray.shutdown()


def _warm() -> None:
    import cluster.hierarchy  # noqa: F401

    time.sleep(0.5)


def _kill_one(killed: list[float]) -> None:
    """SIGKILL to one of this process' sub-mixture workers; notes when."""
    for process in psutil.Process().children(recursive=True):
        if "_train_sub_mixture" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(time.perf_counter())
            return


def main() -> None:
    _, test = dequantised()
    x = torch.from_numpy(test)
    recipe = load_recipe("mnist", [f"data.source=mnist:{FOLDER}"])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        manifest = pack(open_source(f"mnist:{FOLDER}", SourceOptions()), str(place / "shards"))
        began = time.perf_counter()
        root_model = started(recipe, manifest, 20)
        Fit(root_model, manifest, recipe.training).run()
        root_seconds = time.perf_counter() - began
        save_trained(str(place / "root"), root_model, recipe, manifest)
        print(f"root {held_out(root_model, x)}, {root_seconds:.1f} s")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        began = time.perf_counter()
        split = str(place / "split")
        folders = route_samples(recipe, manifest, str(place / "root"), split, lambda *a, **b: None)
        routing = time.perf_counter() - began
        ray.shutdown()
        root = str(place / "root")
        one, _, _ = sub_mixtures(recipe, root, folders, place / "one", 1)
        two, trained, _ = sub_mixtures(recipe, root, folders, place / "two", 2)
        killed, _, lost = sub_mixtures(recipe, root, folders, place / "killed", 2, kill=True)
        print(f"sub-mixtures: 1 CPU {one:.1f} s, 2 CPUs {two:.1f} s, ratio {one / two:.2f} (goal 1.7)")
        print(f"  with one task killed after {lost:.1f} s: {killed:.1f} s, {killed - two:+.1f} s")
        flat = flatten(root, trained, recipe.splitting.noise_prior_count)
        total = root_seconds + routing + two
        print(f"hierarchical {held_out(flat, x)}, {total:.1f} s (routing {routing:.1f} s)")
        began = time.perf_counter()
        same = started(recipe, manifest, flat.n_components)
        one_pass = recipe.training.model_copy(update={"em": EMSettings(iterations=1)})
        number, last = 0, 0.0
        while number == 0 or time.perf_counter() - began + last < total:  # another pass would still fit
            before = time.perf_counter()
            Fit(same, manifest, one_pass).run()
            number, last = number + 1, time.perf_counter() - before
        seconds = time.perf_counter() - began
        print(f"flat EM {held_out(same, x)}, {seconds:.1f} s ({number} iterations)")


if __name__ == "__main__":
    main()
