"""What distillation is worth on CIFAR-10: a half-width student, the 4-bit and the pruned network.

    python bench/distill_cifar10.py run                  # all rows; goes on where it stopped
    python bench/distill_cifar10.py run ce logits --seeds 0 1 2
    python bench/distill_cifar10.py show                 # the table in Markdown, and the curves

The teacher is recipes/cifarnet.safetensors; that of the rows `wide_…` is the network of row `wide`,
which begins as a widened copy of it (Net2WiderNet) and is trained on. All rows of a kind share one
schedule; rows that differ in it do not go into one table, so another schedule wants another --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import torch
from common import RESULTS, ROOT, context
from safetensors.torch import load_file

import compressops as co
from compressops.train.memory import keep_freed_memory
from compressops.zoo import cifar10
from compressops.zoo.cifarnet import CifarNet, widen

# The last block of each image size, after its ReLU.
LAYERS = "features.[147]"
LOGITS = co.LogitsKD(temperature=4.0)
ACTIVATIONS = co.ActivationKD(LAYERS)
# The reference code's form. Its β of 10³ is for hundreds of epochs.
MAPS = {m: co.AttentionMapKD(LAYERS, m=m, form="mse", weight=100.0) for m in (1.0, 2.0)}
STUDENT = {
    "ce": (),
    "logits": (LOGITS,),
    "activation": (ACTIVATIONS,),
    "attention_m1": (MAPS[1.0],),
    "attention_m2": (MAPS[2.0],),
    "all": (LOGITS, ACTIVATIONS, MAPS[2.0]),
}
COMPRESSED = {
    "dfp4": (),
    "dfp4_distilled": (LOGITS, MAPS[2.0]),
    "pruned10": (),
    "pruned10_distilled": (LOGITS, MAPS[2.0]),
}
WIDTH = 1.5
WIDE = {f"wide_{name}": STUDENT[name] for name in ("logits", "attention_m2", "all")}
EPOCHS = ("epochs", "quantized_epochs", "pruned_epochs", "wide_epochs")
STUDENTS = {**STUDENT, **WIDE}
ROWS = {**STUDENT, **COMPRESSED, "wide": (), **WIDE}


def stages(row: str, arguments: argparse.Namespace) -> tuple[torch.nn.Module, list]:
    """The network that a row begins with, and what it does to it."""
    schedule = {"optimizer": "muon", "momentum": 0.85, "schedule": "linear", "warmup": 0.05}
    schedule |= {"batch_size": arguments.batch_size, "weight_decay": 5e-4}
    schedule |= {"convolutions": "winograd", "checkpoint_seconds": 30.0}
    if row in STUDENTS:
        student = CifarNet(dropout=0.0, width=0.5)
        return student, [
            co.Retrain(
                epochs=arguments.epochs,
                lr=0.1,
                other_lr=0.05,
                image_sizes=((20, 0.6), (28, 0.2), (32, 0.2)),
                distill=STUDENTS[row],
                **schedule,
            )
        ]
    if row == "wide":
        # A short cycle at a small rate; other rates were not tried.
        return widen(teacher(), WIDTH, noise=0.05), [
            co.Retrain(
                epochs=arguments.wide_epochs,
                lr=0.02,
                other_lr=0.01,
                label_smoothing=0.1,
                image_sizes=((24, 0.3), (28, 0.3), (32, 0.4)),
                **schedule,
            )
        ]
    if row.startswith("dfp4"):
        lossy = [co.Equalize(), co.Quantize(co.DynamicFixedPoint(bits=4, overflow=0.05))]
        epochs, lr = arguments.quantized_epochs, 0.02
    else:
        lossy = [co.Prune(0.1, scope="global", score="lamp", schedule="cubic", ends=0.4)]
        epochs, lr = arguments.pruned_epochs, 0.03
    return teacher(), [
        *lossy,
        co.Retrain(
            epochs=epochs,
            lr=lr,
            other_lr=0.01,
            image_sizes=((28, 0.5), (32, 0.5)),
            distill=COMPRESSED[row],
            **schedule,
        ),
    ]


def teacher() -> CifarNet:
    model = CifarNet(dropout=0.0)
    model.load_state_dict(load_file(ROOT / "recipes" / "cifarnet.safetensors"))
    return model.eval()


def compressed(
    row: str, seed: int, data: tuple, arguments: argparse.Namespace
) -> tuple[co.Result, list]:
    """What a row's stages make of its network, or have made of it, and these stages."""
    torch.manual_seed(seed)
    model, chain = stages(row, arguments)
    # One wide teacher serves all seeds.
    taught_by = compressed("wide", 0, data, arguments)[0].model if row in WIDE else teacher()
    recipe = co.Recipe(chain)
    return co.compress(model, recipe, *data, taught_by, arguments.workdir, seed), chain


def run(arguments: argparse.Namespace) -> None:
    data = cifar10.datasets(test_images=arguments.test_images)
    schedule = {name: getattr(arguments, name) for name in (*EPOCHS, "batch_size", "test_images")}
    found = {**context(arguments), "schedule": schedule, "rows": []}
    if arguments.out.exists():
        before = json.loads(arguments.out.read_text())
        # A kind of rows that an older file knows nothing of has no schedule there yet.
        if schedule | before["schedule"] != schedule:
            raise SystemExit(
                f"{arguments.out} holds rows of the schedule {before['schedule']}, not {schedule}"
            )
        found |= {key: before[key] for key in ("rows", "remarks") if key in before}
    done = {(row["row"], row["seed"]) for row in found["rows"]}
    for seed in arguments.seeds:
        for name in arguments.rows or ROWS:
            if (name, seed) in done:
                continue
            result, chain = compressed(name, seed, data, arguments)
            last = result.table[-1]
            found["rows"].append(
                {
                    "row": name,
                    "seed": seed,
                    "losses": [str(loss) for loss in chain[-1].distill],
                    **{key: found[key] for key in ("commit", "command")},
                    "top1": last.top1,
                    "top5": last.top5,
                    "seconds": last.seconds,
                    "stages": [asdict(stage) for stage in result.table],
                    "history": result.history[-1],
                }
            )
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def show(arguments: argparse.Namespace) -> None:
    """The rows' means over the seeds, and a picture of them beside the JSON."""
    found = json.loads(arguments.out.read_text())
    print(f"schedule: {found['schedule']}\n\n| row | losses | seeds | top-1 | top-5 |")
    print("|---|---|---|---|---|")
    means = {}
    for name in ROWS:
        rows = [row for row in found["rows"] if row["row"] == name]
        if rows:
            top1, top5 = (statistics.mean(row[key] for row in rows) for key in ("top1", "top5"))
            means[name] = top1
            losses = ", ".join(["cross entropy", *rows[0]["losses"]])
            print(f"| {name} | {losses} | {len(rows)} | {top1:.2f} | {top5:.2f} |")
    draw(found["rows"], means, arguments.out.with_suffix(".png"))


def draw(rows: list[dict], means: dict[str, float], path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for row in rows:
        if row["row"] in STUDENTS and row["seed"] == rows[0]["seed"]:
            key = "cross_entropy" if row["losses"] else "loss"
            epochs = [entry["epoch"] for entry in row["history"]]
            left.plot(epochs, [entry[key] for entry in row["history"]], ".-", label=row["row"])
    left.set(xlabel="epoch", ylabel="cross entropy in training", title="student of half width")
    left.legend()
    bars = right.bar(list(means), list(means.values()))
    right.bar_label(bars, fmt="%.2f")
    right.set(ylim=(min(means.values()) - 5, 100), ylabel="top-1 on the test images, %")
    right.tick_params(axis="x", rotation=90)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}")
    runner.add_argument("--seeds", type=int, nargs="+", default=[0])
    runner.add_argument("--epochs", type=float, default=16.0, help="of the student")
    runner.add_argument("--quantized-epochs", type=float, default=3.0)
    runner.add_argument("--pruned-epochs", type=float, default=3.0)
    runner.add_argument("--wide-epochs", type=float, default=3.0, help="of the wider teacher")
    runner.add_argument("--batch-size", type=int, default=250)
    runner.add_argument("--test-images", type=int, default=None, help="default: all 10,000")
    runner.add_argument("--workdir", type=Path, default=ROOT / "runs" / "distill")
    runner.add_argument("--threads", type=int, default=None)
    runner.set_defaults(rounds=1)
    shower = commands.add_parser("show")
    for command in (runner, shower):
        command.add_argument("--out", type=Path, default=RESULTS / "distill_cifar10.json")
    arguments = parser.parse_args()
    if arguments.command == "show":
        return show(arguments)
    for name in arguments.rows:
        if name not in ROWS:
            parser.error(f"unknown row {name!r}; there are {', '.join(ROWS)}")
    keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    run(arguments)


if __name__ == "__main__":
    main()
