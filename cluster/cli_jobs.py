"""The commands that send work to a cluster: submit, and jobs list, logs, stop."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from cluster.terminal import out_console, print_fields
from data.errors import UserError

if TYPE_CHECKING:
    from cluster.jobs import Jobs

ADDRESS = typer.Option(
    None, "--address", envvar="RAY_API_SERVER_ADDRESS", help="the cluster's HTTP address, http://HEAD:8265"
)

jobs = typer.Typer(help="Jobs of a Ray cluster.", no_args_is_help=True)


def submit(
    recipe: str = typer.Argument(help="name of a shipped recipe, or a YAML file"),
    out: str = typer.Option(..., "--out", help="folder or URL that all nodes reach, as s3://BUCKET/NAME"),
    address: str = ADDRESS,
    set_: list[str] = typer.Option(None, "--set", metavar="KEY=VALUE", help="change a field of the recipe"),
    wait: bool = typer.Option(False, "--wait", help="follow the job's output, and exit as it does"),
    env: list[str] = typer.Option(None, "--env", help="NAME=VALUE for the job, or NAME to pass on its value here"),
    working_dir: str = typer.Option(None, "--working-dir", help="folder that is sent (default: this project)"),
    kubernetes: bool = typer.Option(False, "--kubernetes", help="print a RayJob manifest, with a cluster of its own"),
    apply: bool = typer.Option(False, "--apply", help="--kubernetes: create it by kubectl instead of printing it"),
    image: str = typer.Option(None, "--image", help="--kubernetes: image of all Ray containers"),
    cluster: str = typer.Option(None, "--cluster", help="--kubernetes: file of an overlay's manifests, or -"),
    namespace: str = typer.Option(None, "--namespace", help="--kubernetes: default that of --cluster, else manymodes"),
    name: str = typer.Option(None, "--name", help="--kubernetes: of the RayJob; default the recipe's and a random end"),
) -> None:
    """Sends a recipe to a Ray cluster as a job: what it needs is decided there, not on this machine."""
    from pathlib import Path

    from cluster.recipe import load_recipe
    from data import storage

    loaded = load_recipe(recipe, set_ or ())  # a fault in it is better told here
    place = storage.check_url(out)
    if kubernetes:
        from deploy.kubernetes_job import apply_manifest, render_ray_job

        overlay = None
        if cluster:
            overlay = sys.stdin.read() if cluster == "-" else storage.read_bytes(cluster).decode(errors="replace")
        manifest = render_ray_job(
            recipe,
            out=out,
            overrides=set_ or (),
            workers=loaded.scaling.workers,
            cpus_per_worker=loaded.scaling.cpus_per_worker,
            gpus_per_worker=loaded.scaling.gpus_per_worker,
            name=name,
            namespace=namespace,
            image=image,
            cluster=overlay,
        )
        if apply:
            apply_manifest(manifest)
        else:
            print(manifest, end="")
        return
    if apply or image or cluster or namespace or name:
        raise UserError("--apply, --image, --cluster, --namespace and --name belong to --kubernetes: add it")
    from cluster.jobs import Jobs, entrypoint, package, parse_env, project_folder

    variables = parse_env(env or ())
    client = Jobs(_required(address))
    folder = Path(working_dir) if working_dir else project_folder()
    if not folder.is_dir():
        raise UserError(f"--working-dir {working_dir}: no such folder")
    with package(folder, recipe) as (packed, packed_recipe):
        job = client.submit(packed, entrypoint(packed_recipe, place, set_ or ()), name=loaded.name, env=variables)
    print_fields(job=job, follow=f"manymodes jobs logs {job} --address {address} --follow")
    if wait:
        _follow(client, job)


@jobs.command("list")
def list_(address: str = ADDRESS) -> None:
    """Lists the submitted jobs, latest first."""
    from cluster.jobs import Jobs

    table = Table("job", "name", "status", "start", "seconds", box=None, pad_edge=False)
    for row in Jobs(_required(address)).rows():
        table.add_row(*row)
    out_console.print(table)


@jobs.command()
def logs(
    job: str = typer.Argument(help="id of the job"),
    address: str = ADDRESS,
    follow: bool = typer.Option(False, "--follow", help="until the job ends; exits as it does"),
) -> None:
    """Prints what a job has written."""
    from cluster.jobs import Jobs

    client = Jobs(_required(address))
    if follow:
        _follow(client, job)
        return
    print(client.log(job), end="")


@jobs.command()
def stop(job: str = typer.Argument(help="id of the job"), address: str = ADDRESS) -> None:
    """Asks a job to end; the same recipe, sent again with the same --out, goes on."""
    from cluster.jobs import Jobs

    ended = not Jobs(_required(address)).stop(job)
    print_fields(job=f"{job} had ended already" if ended else f"{job} is ending")


def _follow(client: Jobs, job: str) -> None:
    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    outcome = client.follow(job, write)
    if outcome.code:
        message = outcome.message if outcome.exit_code is None else f"exit code {outcome.exit_code}"
        print(f"manymodes: job {job} {outcome.status.lower()}: {message}", file=sys.stderr)
        raise typer.Exit(outcome.code)


def _required(address: str | None) -> str:
    if not address:
        raise UserError("name the cluster by --address http://HEAD:8265 (or RAY_API_SERVER_ADDRESS)")
    return address
