"""Run the demo: ``python -m compressops.demo``; see ``--help``."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from safetensors.torch import load_file, save_file
from torch import nn

from compressops.compress import Recipe, Table, compress
from compressops.convert import convert
from compressops.demo.html import Findings, Stage, render, stage_cells
from compressops.registry import is_layer
from compressops.report import report
from compressops.serialize import FileInfo, inspect, save, verify
from compressops.train.memory import keep_freed_memory

ROOT = Path(__file__).parents[2]
# What the demo found, beside its report.
RESULT = "result.json"
CLASSIFY = (sys.executable, "-m", "compressops.demo.classify")


def main(arguments: list[str] | None = None) -> int:
    """Run all of it; 0 if the file's accuracy is the compressed model's to the last digit, 2 if
    what the recipe names is not there."""
    args = _parse_args(arguments)
    console = Console()
    began = time.monotonic()
    keep_freed_memory()
    try:
        recipe = Recipe.from_yaml(args.recipe)
        model, train_data, eval_data, teacher = recipe.load()
    except (OSError, ValueError) as error:
        # A checkpoint, data or recipe that is not there: nothing that a traceback explains.
        print(f"compressops.demo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if args.fresh and args.out.exists():
        shutil.rmtree(args.out)
    args.out.mkdir(parents=True, exist_ok=True)

    console.rule("[bold]1 of 4: compress")
    console.print(f"{args.recipe}: " + " → ".join(type(stage).__name__ for stage in recipe.stages))
    result = compress(
        model, recipe, train_data, eval_data, teacher, workdir=args.out / "work", log=console
    )

    console.rule("[bold]2 of 4: convert, save, verify")
    float_file, file = args.out / "float.safetensors", args.out / "packed.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, float_file)
    packed = convert(result.model)
    save(packed, file)
    console.print(str(verify(file)), highlight=False, soft_wrap=True)
    info = inspect(file)
    stored = sum(tensor.stored_nbytes for tensor in info.tensors)
    console.print(
        f"{len(info.tensors)} tensors of {stored:,} bytes + header of {info.header_bytes:,} bytes "
        f"= {info.file_bytes:,} bytes; {file.stat().st_size:,} on disk",
        highlight=False,
    )

    console.rule("[bold]3 of 4: load in a new process, classify")
    found, logits = _classify(file, args.recipe, args.out / "logits.safetensors")
    expected = (result.table[-1].top1, result.table[-1].top5)
    same = (found["top1"], found["top5"]) == expected
    for what, (top1, top5) in (
        ("compressed model, before packing", expected),
        (f"from the file, {found['samples']:,} images", (found["top1"], found["top5"])),
    ):
        console.print(f"{what:34}top-1 {top1:.2f} %, top-5 {top5:.2f} %", highlight=False)
    console.print("[green]equal to the last digit" if same else "[red]NOT EQUAL")

    console.rule("[bold]4 of 4: report")
    stages = _stages(result.table, float_file.stat().st_size, file.stat().st_size)
    layers = report(packed, file)
    page = args.out / "report.html"
    findings = Findings(
        stages=stages,
        report=layers,
        before=_weights(model),
        after=_weights(packed),
        images=eval_data.images,
        labels=eval_data.labels,
        logits=logits,
        float_bytes=float_file.stat().st_size,
        seconds=sum(row.seconds for row in result.table),
    )
    page.write_text(render(findings), encoding="utf-8")
    console.print(_table(stages))
    console.print(layers)
    facts = {
        "recipe": f"{args.recipe.parent.name}/{args.recipe.name}",
        "seconds_in_all": round(time.monotonic() - began, 1),
        **_facts(result.table, found, float_file.stat().st_size, info),
    }
    (args.out / RESULT).write_text(json.dumps(facts, indent=1) + "\n")
    console.print(
        f"\nThe file is {facts['file_rate']:.2f}× smaller than the float32 file. Done in "
        f"{facts['seconds_in_all'] / 60:.1f} minutes.",
        highlight=False,
    )
    for path, what in (
        (page, "plots and tables, to be opened in a browser"),
        (args.out / RESULT, "the same figures for programs"),
        (file, "the packed network: compressops inspect, verify, report"),
        (float_file, "the float network"),
        (args.out / "work", "checkpoints; --fresh starts without them"),
    ):
        console.print(f"  {path}  [dim]{what}", highlight=False, soft_wrap=True)
    return 0 if same else 1


def _parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m compressops.demo", description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "cifarnet_demo.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--fresh", action="store_true", help="start again from the beginning")
    return parser.parse_args(arguments)


def _classify(file: Path, recipe: Path, out: Path) -> tuple[dict, torch.Tensor]:
    """What a new process makes of the file."""
    done = subprocess.run(
        [*CLASSIFY, file, recipe, out], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1]), load_file(out)["logits"]


def _facts(table: Table, found: dict, float_bytes: int, info: FileInfo) -> dict[str, Any]:
    """The figures of the result file."""
    last = table[-1]
    return {
        "top1": last.top1,
        "top5": last.top5,
        "top1_from_file_in_new_process": found["top1"],
        "top5_from_file_in_new_process": found["top5"],
        "samples": found["samples"],
        "density": last.density,
        "bits": last.bits,
        "ideal_rate": last.ideal_rate,
        "float_file_bytes": float_bytes,
        "file_bytes": info.file_bytes,
        "file_rate": float_bytes / info.file_bytes,
        "header_bytes": info.header_bytes,
        "stages": [asdict(row) for row in table],
    }


def _stages(rows: object, float_bytes: int, file_bytes: int) -> list[Stage]:
    """The table's rows; the files at both ends are the measured ones."""
    stages = [
        Stage(row.stage, row.top1, row.top5, row.ideal_rate, row.stored_rate, row.stored_bytes)
        for row in rows
    ]
    ends = (stages[0], float_bytes, "float32 network"), (stages[-1], file_bytes, None)
    for stage, size, name in ends:
        at = stages.index(stage)
        stages[at] = Stage(
            name or stage.name,
            stage.top1,
            stage.top5,
            stage.ideal_rate,
            stage.stored_rate,
            stage.stored_bytes,
            size,
        )
    return stages


def _table(stages: list[Stage]) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(Stage.headers):
        table.add_column(header, justify="right" if i else "left")
    for stage in stages:
        table.add_row(*stage_cells(stage))
    return table


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.weight.detach() for n, m in model.named_modules() if is_layer(m)}


if __name__ == "__main__":
    sys.exit(main())
