"""The commands of autoencoders: encode, decode, interpolate, codes; and the demonstration of distances."""

from __future__ import annotations

from pathlib import Path

import typer

from cluster.terminal import RAY, TRACKING, out_console, print_fields, print_table
from data.errors import UserError
from data.limits import MAX_SEED

MODEL = typer.Argument(help="an autoencoder: models:/NAME@ALIAS, or the --out folder of a run")
DATA = typer.Option(..., "--data", help="shards, a folder of images, a .npy/.npz file, or a source")
SPLIT = typer.Option("test", "--split", help="split of DATA, where it has splits")
WORKERS = typer.Option(None, "--workers", min=1, help="share the work among so many Ray workers")
SEED = typer.Option(0, "--seed", min=0, max=MAX_SEED, help="fixes which samples are taken")


def encode(
    model: str = MODEL,
    data: str = DATA,
    out: str = typer.Option(..., "--out", help="FILE.npy for codes, FILE.npz with labels, or a folder or URL: a pack"),
    split: str = typer.Option("test", "--split", help="split of DATA, where it has splits; of a pack as train,test"),
    workers: int = WORKERS,
    ray_address: str = RAY,
    tracking_uri: str = TRACKING,
) -> None:
    """Writes the codes of any set, in its order and with its labels; a pack of any size streams."""
    from cluster.code_packs import encoded
    from cluster.feature_packs import write_features
    from cluster.progress import Stages
    from cluster.questions import check_places
    from cluster.scoring import Looking, Taking, open_set, running
    from data import storage

    kind, parts = Path(out).suffix, [part.strip() for part in split.split(",") if part.strip()]
    if kind not in ("", ".npy", ".npz") or (kind and len(parts) != 1):
        raise UserError(f"--out {out}: give a .npy or .npz for one split, or the name of a folder")
    if kind:
        check_places(Path(out))
    look = Looking(features=f"encoder:{model}", tracking_uri=tracking_uri, workers=workers, ray_address=ray_address)
    with running(look, Stages()) as runner:
        sets = {name: open_set(data, Taking(split=name)) for name in parts}
        if not kind:
            manifest = write_features(runner, sets, data, storage.check_url(out))
            counts = ", ".join(f"{name} {record.samples:,}" for name, record in manifest.splits.items())
            print_fields(pack=manifest.base, codes=f"{manifest.shape[0]} dimensions; {counts}")
            return
        codes, labels = encoded(runner, sets[parts[0]])
    _write(out, codes, labels)
    print_fields(codes=f"{len(codes):,} of {codes.shape[1]} dimensions in {out}")


def decode(
    model: str = MODEL,
    codes: str = typer.Argument(help="codes: what `encode` wrote (a pack, .npy or .npz), or any array [n, K]"),
    out: str = typer.Option(..., "--out", help="FILE.png for a picture, FILE.npy, FILE.npz with labels, or a folder"),
    split: str = typer.Option("test", "--split", help="split of CODES, where it has splits"),
    workers: int = WORKERS,
    ray_address: str = RAY,
    tracking_uri: str = TRACKING,
) -> None:
    """Decodes codes into samples: a picture of the first hundred, an array, or a pack of any size."""
    from cluster.code_packs import decoded, write_decoded
    from cluster.models import open_autoencoder
    from cluster.progress import Stages
    from cluster.questions import check_places
    from cluster.scoring import Looking, running
    from data.partitions import open_partitions
    from data.storage import check_url, publish
    from eval.figures import sample_grid

    kind = Path(out).suffix
    if kind not in ("", ".png", ".npy", ".npz"):
        raise UserError(f"--out {out}: give a .png, a .npy, a .npz, or the name of a folder")
    if kind:
        check_places(Path(out))
    found = open_partitions(codes, split=split)
    opened = open_autoencoder(model, tracking_uri)
    if kind == ".png":
        samples = opened.decode(found.first(100).reshape(-1, *found.shape))
        with publish(out) as handle:
            handle.write(sample_grid(samples, 10, 10))
        print_fields(decoded=f"{len(samples)} samples of shape {list(samples.shape[1:])} in {out}")
        return
    with running(Looking(tracking_uri=tracking_uri, workers=workers, ray_address=ray_address), Stages()) as runner:
        if kind:
            samples, labels = decoded(runner, found, model, tracking_uri)
            _write(out, samples, labels)
            print_fields(decoded=f"{len(samples):,} samples of shape {list(samples.shape[1:])} in {out}")
            return
        manifest = write_decoded(runner, found, model, tracking_uri, check_url(out))
    print_fields(
        pack=manifest.base, samples=f"{manifest.n_samples('test'):,} of shape {list(manifest.shape)}, split test"
    )


def interpolate(
    model: str = MODEL,
    data: str = DATA,
    out: str = typer.Option(..., "--out", help="FILE.png"),
    n: int = typer.Option(8, "-n", min=1, max=100, help="random pairs of samples"),
    steps: int = typer.Option(9, "--steps", min=2, max=50, help="codes along each line"),
    split: str = SPLIT,
    seed: int = SEED,
    tracking_uri: str = TRACKING,
) -> None:
    """Decodes straight lines between the codes of random pairs of samples, as a picture."""
    from cluster.codes import interpolation_sheet
    from cluster.models import open_autoencoder
    from cluster.questions import check_places, random_samples
    from data.storage import publish

    if Path(out).suffix != ".png":
        raise UserError(f"--out {out}: give a file that ends in .png")
    check_places(Path(out))
    opened = open_autoencoder(model, tracking_uri)
    x = random_samples(opened, data, n=2 * n, split=split, seed=seed)
    if len(x) < 2:
        raise UserError(f"{data}: a pair needs two samples: give more")
    half = len(x) // 2
    with publish(out) as handle:
        handle.write(interpolation_sheet(opened, x[:half], x[half : 2 * half], steps))
    print_fields(interpolations=f"{half} pairs in {out}")


def codes(
    model: str = MODEL,
    data: str = DATA,
    out: str = typer.Option(..., "--out", help="folder for the pictures and codes.json"),
    split: str = SPLIT,
    seed: int = SEED,
    tracking_uri: str = TRACKING,
) -> None:
    """Measures how near codes come to their prior and how well samples are rebuilt, and draws what there is to see."""
    import json
    import re

    from cluster.codes import measure, sections
    from cluster.models import open_autoencoder
    from cluster.questions import check_places, samples_for
    from data.storage import publish, write_text

    opened = open_autoencoder(model, tracking_uri)
    check_places(Path(out) / "codes.json")
    found = measure(
        opened,
        (
            {"x": block.x} | ({} if block.label is None else {"label": block.label})
            for block in samples_for(opened, data, split=split, seed=seed)
        ),
        seed=seed,
    )
    (section,) = sections(opened, found)
    for figure in section.figures:
        name = re.sub("[^a-z0-9]+", "-", figure.title.lower()).strip("-")
        with publish(str(Path(out) / f"{name}.png")) as handle:
            handle.write(figure.png)
    write_text(str(Path(out) / "codes.json"), json.dumps(found.metrics | found.distance.to_dict(), indent=1))
    if section.table is not None:
        print_table(section.table)
    out_console.print(f"{len(section.figures)} pictures in {out}", highlight=False)


def demonstrate(
    out: str = typer.Option(..., "--out", help="FILE.png"),
    what: str = typer.Argument("wasserstein", help="wasserstein: W₁ and JS between shifted uniform densities"),
) -> None:
    """Draws why distances of transport can be descended where divergences are flat."""
    from cluster.questions import check_places
    from data.storage import publish
    from eval.code_figures import wasserstein_against_js

    if what != "wasserstein" or Path(out).suffix != ".png":
        raise UserError(
            f"demonstrate {what} --out {out}: what can be shown is wasserstein, in a file that ends in .png"
        )
    check_places(Path(out))
    with publish(out) as handle:
        handle.write(wasserstein_against_js())
    print_fields(picture=out)


def _write(out: str, x: object, labels: object) -> None:
    """An array as .npy, or with its labels as .npz."""
    import numpy as np

    from data.storage import publish

    with publish(out) as handle:
        if out.endswith(".npy"):
            np.save(handle, np.asarray(x), allow_pickle=False)
        else:
            told = {} if labels is None else {"label": np.asarray(labels)}
            np.savez(handle, allow_pickle=False, x=np.asarray(x), **told)
