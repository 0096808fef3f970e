"""Progress of long work: a bar with rate and time left, also for work that runs in other processes."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

# Where nobody's terminal sets a width (logs, pipes), lines are wide enough for a whole table row.
console = Console(stderr=True, markup=False, emoji=False, width=None if sys.stderr and sys.stderr.isatty() else 140)


# Between two lines about a stage, where nobody's terminal shows its bar.
_TELL_SECONDS = 15.0


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "it")
        return Text("" if speed is None else f"{speed:,.0f} {unit}/s" if speed >= 10 else f"{speed:.1f} {unit}/s")


@dataclass
class Stages:
    """The stages of a job: one progress bar each, and the seconds that each took."""

    quiet: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str, *, total: float | None = None, unit: str = "it") -> Iterator[Any]:
        """Times a stage; yields `advance(done, total=None, text=None)` for its progress bar."""
        began = time.perf_counter()
        columns = (
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f}%"),
            _RateColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[text]}", style="dim", markup=False, table_column=Column(no_wrap=True, ratio=1)),
        )
        with Progress(*columns, console=console, disable=self.quiet, refresh_per_second=5) as bar:
            task = bar.add_task(name, total=total, unit=unit, text="")

            def advance(done: float, total: float | None = None, text: str | None = None) -> None:
                bar.update(task, completed=done, total=total)  # None leaves the total as it is
                if text is not None:
                    bar.update(task, text=text)

            with _told(bar, silent=self.quiet or console.is_terminal):
                try:
                    yield advance
                except BaseException:
                    bar.update(task, visible=False)  # the error's line says what there is to say
                    raise
            known = bar.tasks[0].total
            bar.update(task, completed=known if known is not None else 1, total=known if known is not None else 1)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


@contextlib.contextmanager
def _told(bar: Progress, *, silent: bool) -> Iterator[None]:
    """In a log, where a bar shows at its end alone, says how far the stage is from time to time."""
    if silent:
        yield
        return
    over = threading.Event()

    def tell() -> None:
        while not over.wait(_TELL_SECONDS):
            task = bar.tasks[0]
            done = f"{task.completed:,.0f}" + (f" of {task.total:,.0f}" if task.total else "")
            left = f", {task.time_remaining:,.0f} s left" if task.time_remaining else ""
            rate = _RateColumn().render(task).plain
            words = ", ".join(filter(None, (f"{done} {task.fields['unit']}", rate, f"{task.elapsed or 0:,.0f} s")))
            console.print(f"{task.description}: {words}{left}  {task.fields['text']}".rstrip(), highlight=False)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2)


class _Board:
    """An actor that holds what a remote job posts: its latest progress, and the fault that ended it."""

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}
        self.counts: dict[str, float] = {}
        self.fault: str | None = None

    def fail(self, fault: str) -> None:
        self.fault = self.fault or fault

    def failure(self) -> str | None:
        return self.fault

    def post(self, values: dict[str, Any]) -> None:
        self.latest = values

    def count(self, name: str, done: float, text: str) -> None:
        """One of several jobs has done so much; what all have done is shown."""
        self.counts[name] = done
        self.latest = {"done": sum(self.counts.values()), "text": text}

    def read(self) -> dict[str, Any]:
        return self.latest


@contextlib.contextmanager
def remote_progress(advance: Any) -> Iterator[Any]:
    """An actor handle to which a remote process posts {"done", "text"}; a thread here moves the bar by it.

    The same actor keeps the fault of one worker for the others (`fail`, `failure`).
    """
    import ray  # what needs no cluster (pack, evaluate) shows progress without it

    board = ray.remote(num_cpus=0)(_Board).remote()
    over = threading.Event()

    def follow() -> None:
        while not over.wait(0.3):
            with contextlib.suppress(Exception):  # a bar that stands still is no reason to end a job
                latest = ray.get(board.read.remote(), timeout=5)
                if latest:
                    advance(latest["done"], text=latest.get("text"))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        over.set()
        thread.join(timeout=2)
        ray.kill(board)
