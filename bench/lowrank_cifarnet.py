"""CifarNet with low-rank factors: accuracy against rate, with and without retraining.

    python bench/lowrank_cifarnet.py run --workdir WORKDIR
    python bench/lowrank_cifarnet.py plot

Each budget of multiply-accumulates is shared out over the convolutions, factors are calibrated on
training images, and then retrained for a short schedule of Muon, one seed. ``run`` goes on where it
stopped, and writes the result file after each budget; ``plot`` draws it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from common import RESULTS, context

import compressops as co
from compressops.zoo.registry import build_data, build_model

FILE = RESULTS / "lowrank_cifarnet.json"
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def recipe(form: str, macs: float, steps: int, batch: int) -> co.Recipe:
    return co.Recipe(
        [
            co.Factorize(form, macs=macs, calibration=4 if form == "matrix" else 1),
            co.Retrain(
                steps=steps,
                optimizer="muon",
                lr=0.02,
                other_lr=0.01,
                momentum=0.85,
                weight_decay=5e-4,
                batch_size=batch,
                schedule="linear",
                warmup=0.05,
                label_smoothing=0.1,
                convolutions="winograd",
            ),
        ]
    )


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    spec = {"CifarNet": {"checkpoint": "cifarnet.safetensors", "dropout": 0.0}}
    model = build_model(spec, RECIPES)
    train, held = build_data({"Cifar10": {"test_images": arguments.test_images}})
    rows = []
    for macs in arguments.macs:
        for form in arguments.forms:
            stages = recipe(form, macs, arguments.steps, arguments.batch)
            result = co.compress(model, stages, train, held, workdir=arguments.workdir)
            given, cut, trained = result.table
            rows.append(
                {
                    "form": form,
                    "macs": macs,
                    "weights": cut.density,
                    "bytes": cut.stored_bytes,
                    "bytes dense": given.stored_bytes,
                    "top-1 dense": given.top1,
                    "top-1": cut.top1,
                    "top-1 retrained": trained.top1,
                }
            )
            arguments.rounds = 1
            head = context(arguments) | {
                "steps": arguments.steps,
                "batch": arguments.batch,
                "test images": arguments.test_images,
            }
            FILE.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
            print(rows[-1], flush=True)


def plot(_: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = json.loads(FILE.read_text())
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    rows = found["rows"]
    for form, colour in (("matrix", "tab:blue"), ("spatial", "tab:orange")):
        mine = sorted((r for r in rows if r["form"] == form), key=lambda row: row["macs"])
        if mine:
            x = [1 / row["macs"] for row in mine]
            axes.plot(x, [r["top-1"] for r in mine], "o--", color=colour, label=form)
            trained = [row["top-1 retrained"] for row in mine]
            axes.plot(x, trained, "o-", color=colour, label=f"{form}, retrained")
    axes.axhline(rows[0]["top-1 dense"], color="grey", linewidth=1, label="dense")
    axes.set_xlabel("times fewer multiply-accumulates")
    axes.set_ylabel(f"top-1 on {found['test images']:,} test images, %")
    axes.set_title(f"CifarNet, {found['steps']} steps of {found['batch']} images, one seed")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(FILE.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--workdir", type=Path, required=True)
    running.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.25, 0.7])
    running.add_argument("--forms", nargs="+", default=["matrix", "spatial"])
    running.add_argument("--steps", type=int, default=30)
    running.add_argument("--batch", type=int, default=128)
    running.add_argument("--test-images", type=int, default=1000)
    running.add_argument("--threads", type=int, default=1)
    running.set_defaults(call=run)
    commands.add_parser("plot").set_defaults(call=plot)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
