"""What the commands share: options, the console, and how tables and fields are printed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Column, Table

if TYPE_CHECKING:
    from eval.report import ReportTable

# Paths and names are printed as they are: square brackets in them are no markup.
out_console = Console(markup=False, emoji=False, width=None if sys.stdout and sys.stdout.isatty() else 140)

RAY = typer.Option(None, "--ray-address", help="existing Ray cluster (HOST:PORT); starts one here if left out")
TRACKING = typer.Option(None, "--tracking-uri", help="MLflow; default MLFLOW_TRACKING_URI or ./mlflow.db")


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
