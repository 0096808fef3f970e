"""What a trained mixture can be asked: likelihoods, outliers, completions, and a walk through its components."""

from __future__ import annotations

import csv
import heapq
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.densities import in_space
from cluster.gaussians import traversal
from cluster.models import LocalModel
from data import storage
from data.errors import UserError
from data.partitions import open_partitions
from eval import figures, mixture_figures
from eval.canvas import is_image
from eval.likelihood import LogLikelihood, summarise
from trainer.models.inpainting import inpaint
from trainer.models.latent_mixture import LatentMixture

_NOISE = 11  # first word of the key of dequantisation, apart from those of training
_SHOWN = 16  # samples and draws in a picture of completions


@dataclass(frozen=True)
class Asked:
    """Samples in the model's space, `x` [n, *shape] float32; their places in the whole, and labels where known."""

    x: np.ndarray
    index: np.ndarray
    label: np.ndarray | None


def samples_for(model: LocalModel, place: str, *, split: str, seed: int, grey: bool | None = None) -> Iterator[Asked]:
    """The samples at a place, block by block, on the scale that the model is a density of.

    Everything is streamed.

    Raises:
        UserError: nothing usable there, samples of another shape or with another number of levels.
    """
    shape = tuple(model.data["shape"])
    side = shape[0] if is_image(shape) and shape[0] == shape[1] else None
    opened = open_partitions(place, split=split, size=side, grey=grey)
    opened.name = place  # as the user calls it
    done = 0
    for number in range(len(opened)):
        for piece in opened.pieces(number):
            x = in_space(model, opened, piece, seed)
            yield Asked(x, np.arange(done, done + len(x), dtype=np.int64), piece.label)
            done += len(x)


def score(
    model: LocalModel, place: str, *, split: str = "test", seed: int = 0, grey: bool | None = None
) -> tuple[LogLikelihood, np.ndarray, np.ndarray]:
    """The log-likelihood of all samples at a place: summary, values [n] in nats, most probable components [n].

    Raises:
        UserError: see `samples_for`; or fewer than two samples.
    """
    values, components = [], []
    for block in samples_for(model, place, split=split, seed=seed, grey=grey):
        joint = model.component_log_prob(block.x)
        values.append(np.logaddexp.reduce(joint, axis=1))
        components.append(joint.argmax(1))
    log_probs = np.concatenate(values)
    levels = model.data["levels"]
    dimensions = None if levels is None else math.prod(model.data["shape"])
    return summarise(log_probs, n_dimensions=dimensions, levels=levels or 256), log_probs, np.concatenate(components)


def write_scores(path: str, log_probs: np.ndarray, components: np.ndarray) -> None:
    """One line per sample: index, log-likelihood in nats, most probable component; CSV, or .npy of the values."""
    if path.endswith(".npy"):
        with storage.publish(path) as handle:
            np.save(handle, log_probs, allow_pickle=False)
        return
    rows = ((i, f"{value:.6g}", k) for i, (value, k) in enumerate(zip(log_probs, components, strict=True)))
    write_table(path, ("index", "log_likelihood", "component"), rows)


def find_outliers(
    model: LocalModel, place: str, folder: str, *, n: int = 24, split: str = "test", seed: int = 0,
    grey: bool | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The n least likely samples at a place, as `outliers.png` and `outliers.csv` in a folder; constant memory.

    Raises:
        UserError: see `samples_for`.
    """
    check_places(Path(folder) / "outliers.csv", Path(folder) / "outliers.png")
    worst: list[tuple[float, int, dict[str, Any], np.ndarray]] = []  # a heap, its top the likeliest of the worst
    for block in samples_for(model, place, split=split, seed=seed, grey=grey):
        joint = model.component_log_prob(block.x)
        log_probs = np.logaddexp.reduce(joint, axis=1)
        for row in np.argsort(log_probs)[:n]:
            value, index = float(log_probs[row]), int(block.index[row])
            label = None if block.label is None else int(block.label[row])
            found = {"index": index, "log_likelihood": value, "component": int(joint[row].argmax()), "label": label}
            item = (-value, -index, found, block.x[row])
            if len(worst) < n:
                heapq.heappush(worst, item)
            elif item[:2] > worst[0][:2]:
                heapq.heapreplace(worst, item)
            else:
                break
    worst.sort(key=lambda item: item[:2], reverse=True)
    entries = [item[2] for item in worst]
    columns = ("rank", "index", "log_likelihood", "component", "label")
    rows = ([rank, *(entry[c] for c in columns[1:])] for rank, entry in enumerate(entries, 1))
    write_table(str(Path(folder) / "outliers.csv"), columns, rows)
    picture = mixture_figures.outlier_sheet(
        np.stack([item[3] for item in worst]), np.array([e["log_likelihood"] for e in entries])
    )
    _write(str(Path(folder) / "outliers.png"), picture)
    return entries


def hidden_mask(hide: str, shape: tuple[int, ...], n: int, seed: int) -> np.ndarray:
    """Which features are hidden, [n, *shape] bool.

    Args:
        hide: left, right, top, bottom, centre (of images), box:LEFT,TOP,RIGHT,BOTTOM in pixels, or random:SHARE,
            which hides another share of each sample's pixels.
        shape: of a sample.
        n: number of samples.
        seed: for random.

    Raises:
        UserError: anything else.
    """
    kind, _, detail = hide.partition(":")
    mask = np.zeros((n, *shape), bool)
    if kind == "random":
        share = _number(hide, detail or "0.5")
        if not 0 < share <= 1:
            raise UserError(f"--hide {hide}: the share must be above 0 and at most 1")
        places = shape[:2] if is_image(shape) else shape  # all channels of a pixel together
        chosen = np.random.default_rng([_NOISE, seed]).random((n, *places)) < share
        if not chosen.any():  # a small share of few features may be none
            chosen.reshape(-1)[0] = True
        return mask | chosen.reshape(n, *places, *[1] * (len(shape) - len(places)))
    if not is_image(shape):
        raise UserError(f"--hide {hide}: samples of shape {list(shape)} are no images: use random:SHARE")
    height, width = shape[:2]
    boxes = {
        "left": (0, 0, width // 2, height),
        "right": (width // 2, 0, width, height),
        "top": (0, 0, width, height // 2),
        "bottom": (0, height // 2, width, height),
        "centre": (width // 4, height // 4, width - width // 4, height - height // 4),
    }
    if kind == "box":
        numbers = [int(part) if part.strip().isdecimal() else -1 for part in detail.split(",")]
        left, top, right, bottom = numbers if len(numbers) == 4 else (0, 0, 0, 0)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise UserError(f"--hide {hide}: no box in images of {width}x{height}: give box:LEFT,TOP,RIGHT,BOTTOM")
    elif kind in boxes and not detail:
        left, top, right, bottom = boxes[kind]
    else:
        raise UserError(f"--hide {hide}: choose left, right, top, bottom, centre, box:L,T,R,B or random:SHARE")
    mask[:, top:bottom, left:right] = True
    return mask


def _number(hide: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--hide {hide}: {text!r} is not a number") from error


def random_samples(
    model: LocalModel, place: str, *, n: int, split: str, seed: int, grey: bool | None = None
) -> np.ndarray:
    """n random samples of a place [n, *shape], or all where there are fewer, by a reservoir in one pass.

    Raises:
        UserError: see `samples_for`.
    """
    rng, seen = np.random.default_rng([_NOISE, seed, 1]), 0
    kept: list[np.ndarray] = []
    for block in samples_for(model, place, split=split, seed=seed, grey=grey):
        for x in block.x:
            seen += 1
            if len(kept) < n:
                kept.append(x)
            elif (slot := int(rng.integers(seen))) < n:
                kept[slot] = x
    return np.stack(kept)


def complete(
    model: LocalModel,
    place: str,
    *,
    hide: str = "centre",
    n: int = 8,
    draws: int = 3,
    split: str = "test",
    seed: int = 0,
    grey: bool | None = None,
) -> dict[str, np.ndarray]:
    """In-paints n random samples of a place: `original`, `hidden` [n, *shape], and completions of that shape.

    Completions: `map` (mean in the most probable component), `mean` (of the whole mixture), `draw 1` and so on.

    Raises:
        UserError: see `samples_for` and `hidden_mask`.
    """
    original = random_samples(model, place, n=n, split=split, seed=seed, grey=grey)
    hidden = hidden_mask(hide, original.shape[1:], len(original), seed)
    x, observed = torch.from_numpy(original), torch.from_numpy(~hidden)
    generator = torch.Generator().manual_seed(seed)
    out = {"original": original, "hidden": hidden}
    out["map"] = inpaint(model.model, x, observed, mode="map").numpy()
    out["mean"] = inpaint(model.model, x, observed, mode="mean").numpy()
    for i in range(draws):
        out[f"draw {i + 1}"] = inpaint(model.model, x, observed, mode="sample", generator=generator).numpy()
    return out


def completion_sheet(found: dict[str, np.ndarray]) -> bytes:
    """The picture of `complete`: originals, what is seen (the rest grey), and the completions."""
    # Hidden pixels are grey; in curves they leave a gap.
    blank = 0.5 if is_image(found["original"].shape[1:]) else np.nan
    seen = np.where(found["hidden"], blank, found["original"]).astype(np.float32)
    names = {"map": "likeliest", "mean": "mean"}
    rows = [("original", found["original"]), ("observed", seen)]
    rows += [(names.get(k, k), v) for k, v in found.items() if k not in ("original", "hidden")]
    n, shown = len(seen), min(len(seen), _SHOWN)
    rows = [(name, x[:shown]) for name, x in rows[: _SHOWN + 4]]
    more = "" if shown == n else f" (the first {shown} of {n} samples)"
    return mixture_figures.rows_of_images(rows, f"Completions of what is hidden{more}")


def traverse(
    model: LocalModel,
    folder: str,
    *,
    component: int | None = None,
    factors: tuple[int, int] | None = None,
    frames: int = 60,
    seed: int = 0,
) -> list[str]:
    """Pictures of what the mixture has learnt, written to a folder; returns their names.

    Of a generator with a latent mixture: `gaussians.png`, samples of each Gaussian; `paths.png`, ways from each to the
    next; `triangle.png`, between three of them, from `component` on; for images also `interpolation.gif`, a closed walk
    through them. Of a mixture of factor analysers: `components.png`, means, noise and factors of the largest
    components; for images, where there are two factors, also `factors.png`, a grid over two factors of one component
    (by default the largest), and `interpolation.gif`, a closed walk of its factors z through points drawn from their
    prior.

    Raises:
        UserError: no such component or factor, or another model.
    """
    if isinstance(model.model, LatentMixture):
        if factors is not None:
            raise UserError("--factors: the model has Gaussians without factors: leave it out")
        written = traversal(model, component, seed)
    else:
        written = _factors(model, component, factors or (0, 1), frames, seed)
    check_places(*(Path(folder) / name for name in written))
    for name, picture in written.items():
        _write(str(Path(folder) / name), picture)
    return list(written)


def _factors(
    model: LocalModel, component: int | None, factors: tuple[int, int], frames: int, seed: int
) -> dict[str, bytes]:
    if not hasattr(model.model, "factor_loadings"):
        raise UserError(
            f"the model of {model.data['name']} is of the family {model.document['family']}: give a mixture of factor "
            "analysers, or a generator with a latent mixture"
        )
    mixture, shape = model.model, tuple(model.data["shape"])
    means = mixture.means.detach().numpy().reshape(-1, *shape)
    loadings = mixture.factor_loadings.detach().numpy().reshape(len(means), *shape, -1)
    mixing = mixture.mixing_coefficients.detach().numpy()
    noise = mixture.noise_variance.detach().sqrt().numpy().reshape(-1, *shape)
    k = int(mixing.argmax()) if component is None else component
    if not 0 <= k < len(means):
        raise UserError(f"component {k}: the model has components 0 to {len(means) - 1}")
    for factor in factors if mixture.n_factors >= 2 else ():
        if not 0 <= factor < mixture.n_factors:
            raise UserError(f"factor {factor}: the model has factors 0 to {mixture.n_factors - 1}")
    written = {"components.png": figures.components(means, noise, loadings, mixing)}
    if is_image(shape) and mixture.n_factors >= 2:
        i, j = factors
        title = f"Component {k}: factor {i} left to right, {j} top to bottom, −2 to 2 standard deviations"
        written["factors.png"] = mixture_figures.factor_grid(
            means[k], loadings[k][..., i], loadings[k][..., j], title=title
        )
        stops = np.random.default_rng([_NOISE, seed, 2]).standard_normal((4, mixture.n_factors))
        t = np.arange(frames) / frames * len(stops)
        low, part = t.astype(int), (t % 1)[:, None]
        ease = (1 - np.cos(np.pi * part)) / 2
        z = (1 - ease) * stops[low] + ease * stops[(low + 1) % len(stops)]
        written["interpolation.gif"] = mixture_figures.animation(means[k] + np.moveaxis(loadings[k] @ z.T, -1, 0))
    return written


def reconstruction_sheet(models: list[tuple[str, LocalModel]], place: str, *, split: str, n: int, seed: int) -> bytes:
    """The first n samples of a place, and what each model makes of them without their noise."""
    first = next(samples_for(models[0][1], place, split=split, seed=seed)).x[:n]
    x = torch.from_numpy(first)
    rows = [("original", first)]
    with torch.inference_mode():
        for name, model in sorted(models, key=lambda entry: entry[1].model.n_components):
            rebuilt = model.model.reconstruct(x).numpy().reshape(first.shape)
            rows.append((f"{name}\nK = {model.model.n_components}", rebuilt))
    return mixture_figures.rows_of_images(rows, "Reconstructions by the most probable component")


def check_places(*files: Path) -> None:
    """Refuses, before any work is done, files that are folders or that lie below a file.

    Raises:
        UserError: there is one.
    """
    for file in files:
        above = next((parent for parent in file.parents if parent.exists()), file.parent)
        if file.is_dir():
            raise UserError(f"{file} is a folder: name another place, or remove it")
        if above.exists() and not above.is_dir():
            raise UserError(f"{above} is a file, and cannot hold {file.name}: name a folder")


def _write(path: str, content: bytes) -> None:
    with storage.publish(path) as handle:
        handle.write(content)


def write_table(path: str, columns: tuple[str, ...], rows: Any) -> None:
    """A CSV file of rows; None is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    storage.write_text(path, text.getvalue())
