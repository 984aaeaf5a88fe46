"""Progress of long work: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Shows how far ``total`` units of work are.

    Args:
        console: where to; ``None`` shows nothing.
        title: what is being done.
        total: units of work.
        done: units that are done already.
    """

    def __init__(self, console: Console | None, title: str, total: int, done: int = 0) -> None:
        self.console, self.title, self.total, self.done = console, title, total, done
        self.printed = time.monotonic()
        self.bar = None
        if console is not None and console.is_terminal:
            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, note: str = "") -> None:
        """One more unit is done; ``note`` says how it went."""
        self.done += 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=note)
        elif self.console is not None:
            now = time.monotonic()
            if now - self.printed >= SECONDS_BETWEEN_LINES:
                self.printed = now
                self.console.print(f"{self.title} {self.done}/{self.total} {note}".rstrip())
