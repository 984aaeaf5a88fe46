"""The published CIFAR-10 table: run its recipes, and write each row with the bytes of its file.

    python bench/cifarnet_table.py run cifarnet_pruned_dfp6      # hours on few cores; resumes
    python bench/cifarnet_table.py run --all
    python bench/cifarnet_table.py demo                          # make demo, from its beginning
    python bench/cifarnet_table.py show                          # the table of the README

A row's accuracy is that of the file: it is saved, loaded again, and the loaded model classifies the
10,000 test images.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import RESULTS, ROOT, context
from safetensors.torch import save_file

import compressops as co
from compressops.compress.run import run_recipe
from compressops.train.evaluate import evaluate
from compressops.train.memory import keep_freed_memory


@dataclass(frozen=True)
class Published:
    """A row of the published table (CifarNet of Mayo)."""

    row: str
    bits: int
    density: float
    rate: float | None
    top1: float
    top5: float


BASELINE = "cifarnet_baseline"
HONEST = "cifarnet_honest34x"
# For speed, and no row of the table: bench_blocks_convert.py times its file.
BLOCKS = "cifarnet_blocks"
PUBLISHED = {
    BASELINE: Published("baseline", 32, 100.0, None, 91.37, 99.67),
    "cifarnet_fixed4": Published("fixed-point", 4, 100.0, 8.00, 89.64, 99.74),
    "cifarnet_dfp4": Published("dynamic fixed-point", 4, 100.0, 8.00, 90.63, 99.68),
    "cifarnet_pruned": Published("fine-grained pruned", 32, 15.65, 6.39, 91.12, 99.70),
    "cifarnet_pruned_fixed6": Published("pruned + fixed", 6, 15.65, 33.92, 90.59, 99.68),
    "cifarnet_pruned_dfp6": Published("pruned + DFP", 6, 15.65, 33.92, 91.04, 99.70),
}


def result_path(name: str) -> Path:
    return RESULTS / f"{name}.json"


def run(name: str, workdir: Path, arguments: argparse.Namespace) -> None:
    """Train one row, or go on with it; its result is that of the file, loaded again."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    workdir.mkdir(parents=True, exist_ok=True)
    # Every row starts from the same checkpoint; the baseline is that.
    path = ROOT / "recipes" / f"{name if name != BASELINE else 'cifarnet_pruned'}.yaml"
    model, _, test, _ = co.Recipe.from_yaml(path).load()
    plain = workdir / "float.safetensors"
    # Anybody's file of it, without what ours says of every tensor.
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, plain)
    row = {"float_file_bytes": plain.stat().st_size}
    if name == BASELINE:
        accuracy = evaluate(model, test)
        row |= {"ideal_rate": 1.0, "file_bytes": plain.stat().st_size, "file_rate": 1.0}
    else:
        result = run_recipe(path, workdir)
        packed = workdir / f"{name}.safetensors"
        co.save(co.convert(result.model), packed)
        co.verify(packed)
        accuracy = evaluate(co.load(packed, model), test)
        last = result.table[-1]
        if accuracy.top1 != last.top1:
            raise AssertionError(f"{packed}: top-1 {accuracy.top1}, the model has {last.top1}")
        row |= {
            "recipe": f"recipes/{path.name}",
            "density": last.density,
            "bits": last.bits,
            "ideal_rate": last.ideal_rate,
            "file_bytes": packed.stat().st_size,
            "file_rate": plain.stat().st_size / packed.stat().st_size,
            "stages": [asdict(stage) for stage in result.table],
        }
    row |= {"top1": accuracy.top1, "top5": accuracy.top5}
    if arguments.remarks:
        row["remarks"] = arguments.remarks
    result_path(name).write_text(json.dumps({**context(arguments), **row}, indent=1) + "\n")
    print(f"{name}: {accuracy.top1:.2f}/{accuracy.top5:.2f}, {row['file_bytes']:,} bytes")


def run_demo(out: Path, arguments: argparse.Namespace) -> None:
    """Run the demo anew, and keep what it found with commit, machine and versions."""
    from compressops.demo import __main__ as demo

    head = context(arguments)
    options = ["--recipe", str(arguments.recipe)] if arguments.recipe else []
    if code := demo.main(["--fresh", "--out", str(out), *options]):
        raise SystemExit(code)
    found = json.loads((out / demo.RESULT).read_text())
    RESULTS.mkdir(parents=True, exist_ok=True)
    result_path("cifarnet_demo").write_text(json.dumps({**head, **found}, indent=1) + "\n")


def show() -> None:
    """The table in Markdown; rows that nobody has run say so."""
    print(
        "| row | published rate | published top-1/top-5 | ours: ideal rate | file | top-1/top-5 |"
    )
    print("|---|---|---|---|---|---|")
    for name in (*PUBLISHED, HONEST):
        published = PUBLISHED.get(name)
        theirs = "– | –"
        title = "ours: the whole file"
        if published is not None:
            rate = f"{published.rate:.2f}×" if published.rate else "–"
            theirs = f"{rate} | {published.top1:.2f}/{published.top5:.2f}"
            title = published.row
        ours = "not yet run | – | –"
        if result_path(name).exists():
            r = json.loads(result_path(name).read_text())
            ours = (
                f"{r['ideal_rate']:.2f}× | {r['file_bytes']:,} bytes, {r['file_rate']:.2f}× | "
                f"{r['top1']:.2f}/{r['top5']:.2f}"
            )
        print(f"| {title} | {theirs} | {ours} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("recipes", nargs="*", help="names of files in recipes/, without .yaml")
    runner.add_argument("--all", action="store_true")
    runner.add_argument("--workdir", type=Path, default=ROOT / "runs" / "cifarnet")
    runner.add_argument("--remarks", help="written into the result")
    demo = commands.add_parser("demo")
    demo.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    demo.add_argument("--recipe", type=Path, help="default: the demo's own")
    for command in (runner, demo):
        command.add_argument("--threads", type=int, default=None)
        command.set_defaults(rounds=1)
    commands.add_parser("show")
    arguments = parser.parse_args()
    if arguments.command == "show":
        return show()
    keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.command == "demo":
        return run_demo(arguments.out, arguments)
    names = [*PUBLISHED, HONEST] if arguments.all else arguments.recipes
    for name in names:
        if name not in (known := (*PUBLISHED, HONEST, BLOCKS)):
            parser.error(f"unknown row {name!r}; there are {', '.join(known)}")
        run(name, arguments.workdir, arguments)


if __name__ == "__main__":
    main()
