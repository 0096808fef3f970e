"""The commands about registered models: promote, card, serve."""

from __future__ import annotations

import sys
import threading

import typer

from cluster.terminal import TRACKING, out_console, print_fields, print_table
from data.errors import printable
from data.limits import MAX_DRAWN, MAX_SEED


def promote(
    name: str = typer.Argument(help="the registered model"),
    source: str = typer.Option("candidate", "--from", help="alias (or version) of the candidate"),
    to: str = typer.Option("champion", "--to", help="alias that moves to the candidate"),
    reference: str = typer.Option(None, "--reference", help="what `reference` left; default: the champion's"),
    data: str = typer.Option(None, "--data", help="held-out data for likelihoods; default: the champion's"),
    split: str = typer.Option("test", "--split", help="split of DATA, where it has splits"),
    features: str = typer.Option(None, "--features", help="what REF was fitted by; default: pixels"),
    margin: float = typer.Option(0.0, "--margin", min=0, help="nats of likelihood that may be lost beyond chance"),
    n: int = typer.Option(10_000, "-n", min=2, max=MAX_DRAWN, help="samples drawn from each"),
    seed: int = typer.Option(0, "--seed", min=0, max=MAX_SEED, help="fixes the samples and the dequantisation"),
    force: bool = typer.Option(False, "--force", help="promote a worse candidate too; recorded as a tag"),
    tracking_uri: str = TRACKING,
) -> None:
    """Makes the candidate champion, unless NDB, JS or likelihood is worse beyond chance: then exit code 3."""
    from cluster.promotion import Protocol
    from cluster.promotion import promote as promote_entry

    protocol = Protocol(n, seed, reference, data, split, features, margin)
    outcome = promote_entry(name, protocol, source=source, target=to, tracking_uri=tracking_uri, force=force)
    if outcome.contests:
        print_table(outcome.table())
    worse = "; ".join(contest.text for contest in outcome.worse)
    if not outcome.promoted:
        print(f"manymodes: refused: {printable(worse)} (--force promotes nevertheless)", file=sys.stderr)
        raise typer.Exit(3)
    if outcome.worse:
        print(f"manymodes: warning: promoted by force, although {printable(worse)}", file=sys.stderr)
    if outcome.uncompared:
        print(f"manymodes: warning: promoted by force, not compared: {printable(outcome.uncompared)}", file=sys.stderr)
    elif not outcome.contests:
        out_console.print(" ".join(outcome.notes) or f"{name} had no {to}: the candidate is complete.")
    print_fields(**{to: f"models:/{name}@{to} (version {outcome.candidate.version})"})


def card(
    name: str = typer.Argument(help="the registered model: NAME, NAME@ALIAS or NAME@VERSION"),
    out: str = typer.Option(..., "--out", help="HTML file"),
    tracking_uri: str = TRACKING,
) -> None:
    """Writes a model card: scores with their protocol, pictures, how to load it, where it comes from."""
    from data import storage
    from deploy.card import model_card
    from trainer.tracking import resolve_uri

    storage.write_text(out, model_card(name, resolve_uri(tracking_uri)))
    print_fields(card=out)


def serve(
    model: str = typer.Argument(help="models:/NAME@ALIAS, or the --out folder of a run"),
    host: str = typer.Option("127.0.0.1", "--host", help="address that is listened to"),
    port: int = typer.Option(8000, "--port", min=1, max=65535),
    no_token: bool = typer.Option(False, "--no-token", help="let everybody on this machine in (loopback only)"),
    max_body_mb: float = typer.Option(16, "--max-body-mb", min=0.001, max=1024, help="largest request"),
    max_rows: int = typer.Option(10_000, "--max-rows", min=1, help="most samples in a request"),
    tracking_uri: str = TRACKING,
) -> None:
    """Serves a model over HTTP: /sample, /score, /inpaint, /health, /metrics. Ctrl-C ends it."""
    from deploy.serving.jobs import Limits
    from deploy.serving.server import check_place, serving

    token = check_place(host, port, no_token)
    from cluster.models import open_model
    from cluster.session import ray_session

    opened = open_model(model, tracking_uri)  # what cannot be served is told before anything starts
    limits = Limits(body_bytes=int(max_body_mb * 1e6), rows=max_rows)
    try:
        with ray_session(None, 1), serving(opened.folder, model, host, port, token, limits):
            print_fields(model=model, address=f"http://{host}:{port}", token="none" if token is None else "as set")
            threading.Event().wait()
    except KeyboardInterrupt:
        out_console.print("ended")
