"""The command line. Heavy modules are imported by the command that needs them, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import typer
from rich.table import Table
from typer.exceptions import TyperException

from cluster import cli_codes, cli_jobs, cli_registry, cli_reproduce, cli_scores
from cluster.entry import leave_interrupted
from cluster.terminal import RAY, TRACKING, name_arguments, out_console, print_fields, print_table
from data.errors import UserError, io_error, one_line, printable
from data.limits import MAX_DRAWN, MAX_SEED

app = typer.Typer(
    name="manymodes",
    help="Train mixture generative models on a cluster, and prove that they cover every mode.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Any command takes --debug, which shows a traceback instead of a one-line error.",
)
_STARTED = time.perf_counter()

SET = typer.Option(None, "--set", metavar="KEY=VALUE", help="change a field of the recipe, as training.steps=500")


@app.command()
def recipes(name: str = typer.Argument(None, help="show this recipe with all of its fields")) -> None:
    """Lists the recipes that come with manymodes, or every field of one: value and meaning."""
    from cluster.recipe import described, load_recipe, shipped_recipes

    if name:
        out_console.print(described(load_recipe(name)), soft_wrap=True)
        return
    table = Table("recipe", "source", "what it does", box=None, pad_edge=False)
    for known in shipped_recipes():
        recipe = load_recipe(known)
        table.add_row(known, recipe.data.source, recipe.summary)
    out_console.print(table)


@app.command()
def pack(
    source: str = typer.Argument(help="digits, mnist:FOLDER, svhn:FOLDER, images:FOLDER or array:FILE.npy|npz"),
    dest: str = typer.Argument(help="folder or URL for the shards and their manifest"),
    set_: list[str] = typer.Option(None, "--set", metavar="KEY=VALUE", help="option of the source, as size=64"),
    replace: bool = typer.Option(False, "--replace", help="replace a pack of something else that is in DEST"),
) -> None:
    """Packs a source into WebDataset shards with a manifest."""
    from cluster.progress import Stages
    from cluster.recipe import load_source_options
    from data import storage
    from data.manifest import MANIFEST, load_manifest
    from data.shards import pack as pack_source
    from data.sources import open_source

    opened = open_source(source, load_source_options(set_ or ()))
    place = storage.check_url(dest)
    if not replace and storage.exists(storage.join(place, MANIFEST)):
        there = load_manifest(place).source
        if (there.spec, there.options) != (opened.spec, opened.options):
            raise UserError(
                f"{dest} holds a pack of {there.spec} {there.options}: choose another folder, or add --replace"
            )
    with Stages().stage("pack shards", unit="samples") as advance:
        manifest = pack_source(opened, place, progress=lambda done, total: advance(done, total=total))
    table = Table("split", "samples", "shards", "MB", box=None, pad_edge=False)
    for split, record in manifest.splits.items():
        size = sum(shard.bytes for shard in record.shards) / 1e6
        table.add_row(split, f"{record.samples:,}", str(len(record.shards)), f"{size:.1f}")
    out_console.print(table)
    out_console.print(f"{manifest.base}  shape {manifest.shape}  fingerprint {manifest.fingerprint[:12]}")


@app.command()
def run(
    recipe: str = typer.Argument(help="name of a shipped recipe, or a YAML file"),
    out: str = typer.Option(..., "--out", help="folder for shards, model, report and summary"),
    set_: list[str] = SET,
    ray_address: str = RAY,
) -> None:
    """Runs the whole job: pack, train, evaluate, register, report. The same command goes on after a crash."""
    from cluster.pipeline import run_job
    from cluster.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or ())
    summary = run_job(loaded, out, ray_address=ray_address, began=_STARTED)
    print_table(summary["table"])
    stages = Table("stage", "seconds", box=None, pad_edge=False)
    for name, seconds in summary["seconds"].items():
        stages.add_row(name, f"{seconds:.1f}")
    stages.add_row("all", f"{sum(summary['seconds'].values()):.1f}")
    out_console.print(stages)
    print_fields(
        report=summary["report"],
        model=f"{summary['model_uri']} (version {summary['model_version']})",
        mlflow=f"{summary['mlflow_tracking_uri']} run {summary['mlflow_run_id']}",
    )


@app.command()
def train(
    recipe: str = typer.Argument(help="name of a shipped recipe, or a YAML file"),
    out: str = typer.Option("runs/train", "--out", help="folder for shards and model"),
    set_: list[str] = SET,
    ray_address: str = RAY,
) -> None:
    """Packs and trains only; leaves the model in OUT/model."""
    from cluster.fitting import train_job
    from cluster.recipe import load_recipe

    result = train_job(load_recipe(recipe, set_ or ()), out, ray_address=ray_address)
    table = Table("stage", "seconds", box=None, pad_edge=False)
    for name, seconds in result["seconds"].items():
        table.add_row(name, f"{seconds:.1f}")
    out_console.print(table)
    print_fields(model=result["model"], mlflow=f"{result['mlflow_tracking_uri']} run {result['mlflow_run_id']}")


@app.command()
def sample(
    model: str = typer.Argument(help="models:/NAME@ALIAS, or the --out folder of a run"),
    n: int = typer.Option(64, "-n", min=1, max=MAX_DRAWN, help="number of samples"),
    out: str = typer.Option(..., "--out", help="FILE.png for a picture, FILE.npy, or a folder or URL for a pack"),
    seed: int = typer.Option(0, min=0, max=MAX_SEED, help="the same seed gives the same samples"),
    component: int = typer.Option(None, "--component", min=0, help="a picture or an array: of one component alone"),
    workers: int = typer.Option(None, "--workers", min=1, help="a pack: draw it by so many Ray workers"),
    ray_address: str = RAY,
    gpus_per_task: float = typer.Option(0.0, "--gpus-per-task", min=0, help="a pack: GPUs that a Ray task reserves"),
    tracking_uri: str = TRACKING,
) -> None:
    """Draws samples from a model: a picture, an array, or a pack of any size that all workers draw."""
    import math

    import numpy as np

    from cluster.models import open_model
    from cluster.questions import check_places
    from data.storage import check_url, publish
    from eval.canvas import is_image, save_png, tile
    from eval.figures import sample_grid

    if Path(out).suffix not in (".png", ".npy"):
        from cluster.progress import Stages
        from cluster.sample_packs import write_samples
        from cluster.scoring import Looking, Taking, open_drawn, running

        if Path(out).suffix:
            raise UserError(f"--out {out}: give a .png, a .npy, or the name of a folder")
        if component is not None:
            raise UserError(
                f"--component {component}: a pack is of all components: give a .png or .npy, or leave it out"
            )
        looking = Looking(
            tracking_uri=tracking_uri, workers=workers, ray_address=ray_address, gpus_per_task=gpus_per_task
        )
        with running(looking, Stages()) as runner:
            drawn = open_drawn(model, Taking(n=n, seed=seed, tracking_uri=tracking_uri))
            manifest = write_samples(runner, drawn, check_url(out))
        print_fields(pack=manifest.base, samples=f"{n:,} of shape {list(manifest.shape)}, split test")
        return
    check_places(Path(out))
    if workers is not None or ray_address or gpus_per_task:
        raise UserError(f"--out {out}: workers draw packs: give a folder, or leave --workers and --ray-address out")
    opened = open_model(model, tracking_uri)
    samples = opened.sample(n, seed, component)
    side = math.ceil(math.sqrt(n))
    if Path(out).suffix == ".npy":
        with publish(out) as handle:
            np.save(handle, samples, allow_pickle=False)
    elif is_image(samples.shape[1:]):
        sheet = tile(samples, side)
        zoom = max(1, 800 // max(sheet.shape[:2]))  # small images would be a thumbnail
        save_png(out, sheet.repeat(zoom, 0).repeat(zoom, 1))
    else:
        with publish(out) as handle:
            handle.write(sample_grid(samples, side, side))
    out_console.print(f"{n} samples of shape {samples.shape[1:]} in {out}")


@app.command()
def score(
    models: list[str] = typer.Argument(help="models:/NAME@ALIAS, or the --out folder of a run; one or more"),
    data: str = typer.Option(..., "--data", help="shards, a folder of images, a .npy/.npz file, or a source"),
    split: str = typer.Option("test", "--split", help="split of DATA, where it has splits"),
    out: str = typer.Option(None, "--out", help="FILE.csv or FILE.npy: the value of every sample (one model)"),
    picture: str = typer.Option(None, "--picture", help="FOLDER: log-likelihood and reconstructions by components"),
    seed: int = typer.Option(0, "--seed", min=0, max=MAX_SEED, help="fixes the dequantisation"),
    as_json: bool = typer.Option(False, "--json", help="print one JSON object and nothing else"),
    tracking_uri: str = TRACKING,
) -> None:
    """Log-likelihood of samples under one or more models, in nats and bits per dimension."""
    from cluster import questions
    from cluster.models import open_mixture
    from cluster.progress import Stages
    from data.storage import publish
    from eval.mixture_figures import likelihood_by_components

    if out and (len(models) > 1 or Path(out).suffix not in (".csv", ".npy")):
        raise UserError(f"--out {out}: give one model, and a file that ends in .csv or .npy")
    drawn = ("likelihood.png", "reconstructions.png") if picture else ()
    questions.check_places(*([Path(out)] if out else []), *(Path(picture) / name for name in drawn))
    table = Table("model", "components", "log-likelihood (nats)", "± s.e.", "bits/dim", "samples", box=None)
    found, points, opened = {}, [], []
    with Stages(quiet=as_json).stage("score", total=len(models), unit="models") as advance:
        for done, name in enumerate(models):
            advance(done, text=name)
            model = open_mixture(name, tracking_uri)
            summary, values, components = questions.score(model, data, split=split, seed=seed)
            opened.append((Path(name).name, model))
            k, bits = model.model.n_components, summary.bits_per_dimension
            points.append((Path(name).name, k, summary.mean, summary.standard_error))
            found[name] = {"n_components": k, **summary.to_dict()}
            cells = (f"{summary.mean:.2f}", f"{summary.standard_error:.2f}", "–" if bits is None else f"{bits:.3f}")
            table.add_row(name, str(k), *cells, f"{summary.n:,}")
    if out:
        questions.write_scores(out, values, components)
    if picture:
        sheets = {
            "likelihood.png": likelihood_by_components(points),
            "reconstructions.png": questions.reconstruction_sheet(opened, data, split=split, n=12, seed=seed),
        }
        for name, content in sheets.items():
            with publish(str(Path(picture) / name)) as handle:
                handle.write(content)
    if as_json:
        print(json.dumps(found))
        return
    out_console.print(table)


@app.command()
def outliers(
    model: str = typer.Argument(help="models:/NAME@ALIAS, or the --out folder of a run"),
    data: str = typer.Option(..., "--data", help="shards, a folder of images, a .npy/.npz file, or a source"),
    out: str = typer.Option(..., "--out", help="folder for outliers.png and outliers.csv"),
    n: int = typer.Option(24, "-n", min=1, max=1000, help="how many"),
    split: str = typer.Option("test", "--split", help="split of DATA, where it has splits"),
    seed: int = typer.Option(0, "--seed", min=0, max=MAX_SEED, help="fixes the dequantisation"),
    tracking_uri: str = TRACKING,
) -> None:
    """Finds the least likely samples, as a picture and a CSV."""
    from cluster import questions
    from cluster.models import open_mixture

    found = questions.find_outliers(open_mixture(model, tracking_uri), data, out, n=n, split=split, seed=seed)
    table = Table("rank", "index", "log-likelihood", "component", "label", box=None, pad_edge=False)
    for rank, entry in enumerate(found[:10], 1):
        label = "–" if entry["label"] is None else str(entry["label"])
        value = f"{entry['log_likelihood']:.2f}"
        table.add_row(str(rank), str(entry["index"]), value, str(entry["component"]), label)
    out_console.print(table)
    print_fields(picture=str(Path(out) / "outliers.png"), table=str(Path(out) / "outliers.csv"))


@app.command()
def inpaint(
    model: str = typer.Argument(help="models:/NAME@ALIAS, or the --out folder of a run"),
    data: str = typer.Option(..., "--data", help="shards, a folder of images, a .npy/.npz file, or a source"),
    out: str = typer.Option(..., "--out", help="FILE.png for a picture, FILE.npz for the numbers"),
    hide: str = typer.Option("centre", "--hide", help="left|right|top|bottom|centre|box:L,T,R,B|random:SHARE"),
    n: int = typer.Option(8, "-n", min=1, max=10_000, help="random samples of DATA"),
    draws: int = typer.Option(3, "--draws", min=0, max=100, help="completions drawn for each"),
    split: str = typer.Option("test", "--split", help="split of DATA, where it has splits"),
    seed: int = typer.Option(0, "--seed", min=0, max=MAX_SEED, help="fixes samples and draws"),
    tracking_uri: str = TRACKING,
) -> None:
    """Completes hidden parts of samples: the likeliest completion, the mean one, and draws."""
    import numpy as np

    from cluster import questions
    from cluster.models import open_mixture
    from data.storage import publish

    if Path(out).suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: give a file that ends in .png or .npz")
    questions.check_places(Path(out))
    opened = open_mixture(model, tracking_uri)
    found = questions.complete(opened, data, hide=hide, n=n, draws=draws, split=split, seed=seed)
    with publish(out) as handle:
        if out.endswith(".npz"):
            np.savez(handle, allow_pickle=False, **found)
        else:
            handle.write(questions.completion_sheet(found))
    error = float(np.square(found["mean"] - found["original"])[found["hidden"]].mean())
    print_fields(
        completions=f"{len(found['original'])} samples in {out}",
        **{"error of the mean completion": f"{error:.4g} (mean square over what is hidden, on the model's scale)"},
    )


_AGREEMENT = ("accuracy", "information", "purity")


@app.command()
def assign(
    model: str = typer.Argument(help="models:/NAME@ALIAS, or the --out folder of a run"),
    data: str = typer.Option(..., "--data", help="shards, a folder of images, a .npy/.npz file, or a source"),
    out: str = typer.Option(None, "--out", help="FILE.csv: the component of every sample; FILE.npy: responsibilities"),
    split: str = typer.Option("test", "--split", help="split of DATA, where it has splits"),
    seed: int = typer.Option(0, "--seed", min=0, max=MAX_SEED, help="fixes the dequantisation"),
    as_json: bool = typer.Option(False, "--json", help="print one JSON object and nothing else"),
    tracking_uri: str = TRACKING,
) -> None:
    """Assigns samples to a model's components, and tells how far these are the classes that the samples have."""
    from cluster import assignments
    from cluster.models import open_model
    from cluster.questions import check_places

    if out and Path(out).suffix not in (".csv", ".npy"):
        raise UserError(f"--out {out}: give a file that ends in .csv or .npy")
    check_places(*([Path(out)] if out else []))
    found = assignments.assign(open_model(model, tracking_uri), data, split=split, seed=seed)
    if out:
        assignments.write(out, found)
    sizes, scores = found.sizes, found.agreement
    if as_json:
        found_of = {} if scores is None else {name: getattr(scores, name) for name in _AGREEMENT}
        print(json.dumps({"samples": int(sizes.sum()), "sizes": sizes.tolist(), **found_of}))
        return
    used = f"{int((sizes > 0).sum())} of {len(sizes)} have samples: {sizes.min():,} to {sizes.max():,}"
    told = {"samples": f"{sizes.sum():,} of {data}", "components": used}
    if scores is not None:
        told |= {
            "accuracy": f"{scores.accuracy:.3f} (best matching of components and classes)",
            "information": f"{scores.information:.3f} (mutual, over the mean entropy)",
            "purity": f"{scores.purity:.3f}",
        }
    print_fields(**told, **({"table": out} if out else {}))


@app.command()
def traverse(
    model: str = typer.Argument(help="models:/NAME@ALIAS, or the --out folder of a run"),
    out: str = typer.Option(..., "--out", help="folder for the pictures"),
    component: int = typer.Option(None, "--component", min=0, help="default: the largest, or the first"),
    factors: tuple[int, int] = typer.Option(None, "--factors", help="the two factors of the grid (default: 0 1)"),
    seed: int = typer.Option(0, "--seed", min=0, max=MAX_SEED, help="fixes the walk of the animation"),
    tracking_uri: str = TRACKING,
) -> None:
    """Shows what a mixture has learnt: its components, what lies between them or along factors, an animated walk."""
    from cluster import questions
    from cluster.models import open_model

    written = questions.traverse(open_model(model, tracking_uri), out, component=component, factors=factors, seed=seed)
    for name in written:
        out_console.print(str(Path(out) / name), highlight=False)


_JUDGING = (
    *(cli_scores.evaluate, cli_scores.compare, cli_scores.reference, cli_scores.watch, cli_scores.study),
    cli_scores.features,
)
_REGISTRY = (cli_registry.promote, cli_registry.card, cli_registry.serve)
_CODES = (cli_codes.encode, cli_codes.decode, cli_codes.interpolate, cli_codes.codes, cli_codes.demonstrate)
for command in (*_JUDGING, *_CODES, cli_reproduce.reproduce, *_REGISTRY):
    app.command()(command)
app.command()(cli_jobs.submit)
app.add_typer(cli_jobs.jobs, name="jobs")
for registered in (*app.registered_commands, *cli_jobs.jobs.registered_commands):
    if registered.callback is not None:
        name_arguments(registered.callback)


def main() -> None:
    """The entry point: one line and exit code 2 for what the user can mend; a traceback only with --debug."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        if debug:
            raise
        _leave(2, str(error))
    except TyperException as error:
        message = " ".join(error.format_message().split())
        if not message:  # no arguments at all: the help was shown
            sys.exit(2)
        _leave(2, f"{message} (--help shows what is possible)")
    except (KeyboardInterrupt, typer.Abort):
        leave_interrupted()
    except BrokenPipeError:
        _drop_output()
        sys.exit(1)
    except OSError as error:  # a full disk behind stdout, a home folder that is none: the machine's, not ours
        if debug:
            raise
        _drop_output()
        _leave(2, str(io_error(error, str(error.filename or "the output"), "use")))
    except Exception as error:
        if debug:
            raise
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # NumPy's, and torch's RuntimeError
            _leave(2, f"not enough memory ({one_line(error)}): use fewer or smaller samples")
        _leave(1, f"internal error: {type(error).__name__}: {one_line(error)} (--debug shows where)")
    if code == 130:  # what typer makes of an interruption
        leave_interrupted()
    sys.exit(code or 0)


def _drop_output() -> None:
    """What stdout still holds cannot be written: without this Python would complain about it once more at the end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(code: int, message: str) -> NoReturn:
    print(f"manymodes: {printable(message)}", file=sys.stderr)
    sys.exit(code)
