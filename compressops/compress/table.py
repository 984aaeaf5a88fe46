"""The table of a compression: a row per stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Row:
    """The model after one stage.

    Attributes:
        stage: the stage with its arguments; row 0 is the model as it was given.
        top1, top5: accuracy in percent, ``None`` without evaluation data.
        density, bits, ideal_rate, stored_bytes, stored_rate: see `compressops.compress.sizes`.
        seconds: time that the stage and its evaluation took.
    """

    stage: str
    top1: float | None
    top5: float | None
    density: float
    bits: float
    ideal_rate: float
    stored_bytes: int
    stored_rate: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.stage}: " + ", ".join(
            f"{name} {text}" for name, text in zip(_COLUMNS[1:], self.cells()[1:], strict=True)
        )

    def cells(self) -> list[str]:
        def percent(value: float | None) -> str:
            return "–" if value is None else f"{value:.2f}"

        return [
            self.stage,
            percent(self.top1),
            percent(self.top5),
            f"{100 * self.density:.2f} %",
            f"{self.bits:.4g}",
            f"{self.ideal_rate:.2f}×",
            f"{self.stored_rate:.2f}×",
            f"{self.stored_bytes:,}",
            f"{self.seconds:.1f}",
        ]


_COLUMNS = ("stage", "top-1", "top-5", "density", "bits", "ideal", "stored", "bytes", "seconds")


class Table:
    """The rows; prints as text and, in a terminal, as a rich table."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def to_json(self) -> str:
        return json.dumps([asdict(row) for row in self.rows], indent=1)

    def __rich__(self) -> RichTable:
        table = RichTable(box=box.SIMPLE_HEAD)
        for i, name in enumerate(_COLUMNS):
            table.add_column(name, justify="right" if i else "left", no_wrap=i > 0)
        for i, row in enumerate(self.rows):
            cells = row.cells()
            table.add_row(f"{i} {cells[0]}", *cells[1:])
        return table

    def __str__(self) -> str:
        console = Console(width=140, force_terminal=False, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()
