"""What the commands share: options, the console, and how tables and fields are printed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from typer.models import ArgumentInfo, ParameterInfo

if TYPE_CHECKING:
    from eval.report import ReportTable

PLACES = "shards, a folder of images, a .npy/.npz file, models:/NAME@ALIAS, a run, or a source (digits, mnist:FOLDER)"

# Paths and names are printed as they are: square brackets in them are no markup.
out_console = Console(markup=False, emoji=False, width=None if sys.stdout and sys.stdout.isatty() else 140)

RAY = typer.Option(None, "--ray-address", help="existing Ray cluster (HOST:PORT); starts one here if left out")
TRACKING = typer.Option(None, "--tracking-uri", help="MLflow; default MLFLOW_TRACKING_URI or ./mlflow.db")


# What options of text stand for, where their name does not tell.
_METAVARS = {
    **{"out": "PLACE", "reference": "REF", "held_out": "DATA", "report": "FILE.html", "history": "FILE"},
    **{"per_sample": "FOLDER", "export_missing": "FOLDER", "store": "FOLDER", "picture": "FOLDER"},
    **{"features": "SPEC", "classifier": "SPEC", "density": "MODEL", "by_class": "SCORE"},
    **{"source": "ALIAS", "to": "ALIAS"},
}


def name_arguments(command: Callable[..., Any]) -> None:
    """Gives the arguments of a command, and its options of text, a name in its help, as SAMPLES or FOLDER."""
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        found = parameter.default
        if not isinstance(found, ParameterInfo) or found.metavar:
            continue
        if isinstance(found, ArgumentInfo):
            found.metavar = "REF" if parameter.name == "reference" else parameter.name.upper()
        elif parameter.annotation in (str, list[str]):
            found.metavar = _METAVARS.get(parameter.name, parameter.name.rpartition("_")[2].upper())


def print_table(table: ReportTable) -> None:
    """A report's table on the terminal; below it the details of its rows, and its note."""
    columns = [Column(name, overflow="fold") for name in table.columns]  # never cut, as names are told apart by ends
    shown = Table(*columns, box=None, pad_edge=False, title=table.title, title_justify="left")
    cells = table.cells()
    for row in cells:
        shown.add_row(*row)
    out_console.print(shown)
    for number, row in enumerate(cells):
        if table.detail(number):
            out_console.print(f"{row[0]}: {table.detail(number)}", style="dim", highlight=False)
    out_console.print(table.note, style="dim")


def print_fields(**fields: Any) -> None:
    """Names and values, one pair a line."""
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        out_console.print(f"{name:<{width}}  {value}", soft_wrap=True, highlight=False)
