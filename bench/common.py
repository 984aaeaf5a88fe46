"""What every benchmark shares: interleaved timing, the machine's limits, and the result file.

A figure is the median of at least 15 timings taken in rounds, one of each contestant a round, so
that what the machine does meanwhile hits all alike. Ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    out = argparse.ArgumentParser(description=description)
    out.add_argument("--rounds", type=int, default=15, help="timings of each contestant (>= 15)")
    out.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    out.add_argument("--smoke", action="store_true", help="run all once, tiny; write nothing")
    out.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return out


def interleaved(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    min_seconds: float = 0.005,
    settle: float = 0.0,
    remote: Mapping[str, Callable[[float], float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds a call for each contestant, ``rounds`` of them.

    Each timing repeats the call until it lasts ``min_seconds``, so that the clock's resolution and
    the call's own overhead stay small. With ``settle`` it begins that many seconds after the one
    before and after one call more: contestants with threads of their own, which go on spinning for
    a while, do not disturb each other then. ``remote`` are contestants in processes of their own:
    given the seconds that a timing should last, they answer with the seconds of a call.
    """
    remote = remote or {}
    repeats = {}
    for name, call in contestants.items():
        call()
        began = time.perf_counter()
        call()
        repeats[name] = max(1, int(min_seconds / max(1e-7, time.perf_counter() - began)))
    seconds: dict[str, list[float]] = {name: [] for name in [*contestants, *remote]}
    for _ in range(rounds):
        for name, call in contestants.items():
            if settle:
                time.sleep(settle)
                call()
            began = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - began) / repeats[name])
        for name, timed in remote.items():
            time.sleep(settle)
            seconds[name].append(timed(min_seconds))
    return seconds


def median_ratio(peer: list[float], ours: list[float]) -> float:
    """How many times faster ours is: the median over the rounds."""
    return statistics.median(p / o for p, o in zip(peer, ours, strict=True))


def measured_fp32_peak() -> float:
    """GFLOP/s of a 1024² float32 matrix product with the current number of threads."""
    a = torch.randn(1024, 1024)
    times = interleaved({"mm": lambda: a @ a}, 15)["mm"]
    return 2 * 1024**3 / min(times) / 1e9


def measured_read_bandwidth() -> float:
    """GB/s at which 512 MB of memory are summed with the current number of threads."""
    data = torch.ones(128 * 1024**2)
    times = interleaved({"sum": data.sum}, 5)["sum"]
    return data.numel() * 4 / min(times) / 1e9


def context(arguments: argparse.Namespace) -> dict:
    """Commit, machine, versions and command, for the head of a result file."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    # Results that were written a moment ago change nothing that is measured.
    changes = git("status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "commit": git("rev-parse", "HEAD") + ("+changes" if changes else ""),
        "date": time.strftime("%Y-%m-%d"),
        "command": " && ".join(_commands(arguments)),
        "cpu": cpu,
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
    }


def _commands(arguments: argparse.Namespace) -> list[str]:
    """The command that runs now, after those whose rows ``--merge`` keeps."""
    # Folders of the machine that it runs on mean nothing elsewhere.
    now = "python bench/" + shlex.join(Path(word).name for word in sys.argv)
    if not getattr(arguments, "merge", False) or not arguments.out.exists():
        return [now]
    before = json.loads(arguments.out.read_text())["command"].split(" && ")
    return [*(command for command in before if command != now), now]


def merged(rows: list[dict], arguments: argparse.Namespace, keys: tuple[str, ...]) -> list[dict]:
    """With ``--merge``, ``rows`` after those of the existing result file that are about other
    cases, so that a long benchmark can be run in parts. Two rows of equal ``keys`` are of one case;
    they may lack some.
    """
    if not arguments.merge or not arguments.out.exists():
        return rows
    before, now = json.loads(arguments.out.read_text()), context(arguments)
    for key in ("commit", "cpu", "torch"):
        if before[key] != now[key]:
            raise SystemExit(f"--merge: {arguments.out} has {key} {before[key]}, not {now[key]}")
    new = {tuple(row.get(key) for key in keys) for row in rows}
    return [row for row in before["rows"] if tuple(row.get(key) for key in keys) not in new] + rows


def report(title: str, rows: list[dict], arguments: argparse.Namespace) -> None:
    """Print the rows as a table and, unless this is a smoke run, write them to ``--out``."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=200).print(table)
    if not arguments.smoke:
        write(title, rows, arguments)
        print(f"written: {arguments.out}")


def write(title: str, rows: list[dict], arguments: argparse.Namespace) -> None:
    """Write the rows to ``--out``."""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result = {**context(arguments), "title": title, "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
