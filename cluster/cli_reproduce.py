"""The command that reproduces published results."""

from __future__ import annotations

import typer

from cluster.terminal import RAY, TRACKING, out_console, print_fields, print_table
from data.errors import UserError


def reproduce(
    name: str = typer.Argument(None, help="study; none lists them"),
    out: str = typer.Option(None, "--out", help="folder or URL for models, table and figures (default: runs/NAME)"),
    seeds: int = typer.Option(None, "--seeds", min=1, max=1000, help="trainings of each recipe (default: the study's)"),
    only: list[str] = typer.Option(None, "--only", metavar="MEMBER", help="of the study's members; may be repeated"),
    set_: list[str] = typer.Option(None, "--set", metavar="KEY=VALUE", help="change a field of all recipes"),
    workers: int = typer.Option(None, "--workers", min=1, help="trainings at once, where Ray is started here"),
    cpus_per_task: float = typer.Option(1.0, "--cpus-per-task", min=0.1, help="CPUs that a training reserves"),
    gpus_per_task: float = typer.Option(0.0, "--gpus-per-task", min=0, help="GPUs that a training reserves"),
    ray_address: str = RAY,
    tracking_uri: str = TRACKING,
) -> None:
    """Reproduces the tables and figures of a publication: several recipes and seeds, resumed where it stopped."""
    from cluster.reproductions import REPRODUCTIONS

    if name is None:
        for each in REPRODUCTIONS.values():
            size = f"members: {len(each.members)}, seeds: {each.seeds}"
            out_console.print(f"{each.name:<26}  {each.summary} ({size})")
        return
    study = REPRODUCTIONS.get(name)
    if study is None:
        raise UserError(f"unknown study {name!r}: choose one of {', '.join(REPRODUCTIONS)}")
    from cluster.reproduce import reproduce as run

    place = out or f"runs/{name}"
    table = run(
        study,
        place,
        seeds=seeds,
        only=only or (),
        overrides=set_ or (),
        ray_address=ray_address,
        workers=workers,
        cpus_per_task=cpus_per_task,
        gpus_per_task=gpus_per_task,
        tracking_uri=tracking_uri,
    )
    print_table(table)
    print_fields(report=f"{place}/report.html", table=f"{place}/table.md, {place}/table.csv")
