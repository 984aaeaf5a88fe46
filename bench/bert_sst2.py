"""MiniLM on SST-2's 872 development sentences: the float model, and what the recipes make of it.

    python bench/bert_sst2.py minilm_sst2                  # first: it is the others' teacher
    python bench/bert_sst2.py minilm_int8 minilm_ternary   # hours on few cores; resumes
    python bench/bert_sst2.py minilm_ternary --ablation all --epochs 0.5

"top1" is that of the file: it is saved, loaded into a model without weights, and classifies the
sentences. "agree" are the percent of them to which the file gives the label that the model of the
training gave, in floats that stand for integers.

``--ablation`` trains a recipe's student with some of its losses alone, all for the same number of
epochs in one `Retrain`, and rounds everything from the start: "none" is cross-entropy with the
labels and no teacher, "logits", "+ hidden" and "+ scores" add one loss each to the one before, and
"LAT" is "+ scores" with loss-aware ternarization in the place of TWN's. Their "top1" is that of the
training's model. How far its answers are from the teacher's is measured more finely than by counts
of 872 sentences: "divergence" is the mean of KL(teacher || student) in nats, with its standard
error. `compressops/zoo/sentiment.py` says what to install.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from common import RESULTS, ROOT, context
from safetensors.torch import save_file
from torch import Tensor, nn

import compressops as co
from compressops.compress.run import compress, run_recipe
from compressops.compress.stage import Stage
from compressops.measure import evaluating
from compressops.train.memory import keep_freed_memory
from compressops.zoo.sentiment import Sentences

TEACHER = "minilm_sst2"
ROWS = (TEACHER, "minilm_int8", "minilm_int4", "minilm_ternary", "minilm_blocks")
# How many of a recipe's losses are left, in their order.
ABLATION = {"none": 0, "logits": 1, "+ hidden": 2, "+ scores": 3, "LAT": 3}


def logits(model: nn.Module, dev: Sentences, size: int = 32) -> Tensor:
    order = sorted(range(len(dev)), key=dev.lengths.__getitem__)
    found = torch.empty(len(dev), 2)
    with evaluating(model):
        for start in range(0, len(order), size):
            picked = order[start : start + size]
            found[picked] = model(**dev.__getitems__(picked)[0]).logits
    return found


def run(name: str, workdir: Path) -> dict:
    """Train one row, or go on with it."""
    path = ROOT / "recipes" / f"{name}.yaml"
    dev = co.Recipe.from_yaml(path).load()[2]
    result = run_recipe(path, workdir)
    measured = deployed(name, result.model, dev, workdir)
    stages = [asdict(stage) for stage in result.table]
    return {"row": name, "recipe": f"recipes/{path.name}"} | measured | {"stages": stages}


def deployed(name: str, model: nn.Module, dev: Sentences, workdir: Path) -> dict:
    """Save a row's model, and measure what its file is like in a model without weights."""
    file = workdir / f"{name}.safetensors"
    trained = logits(model, dev)
    if name == TEACHER:
        tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(tensors, file)
        loaded = trained
    else:
        # What training rounded is run as integers without being asked for; look-ups in 2 bits take
        # less memory and more time, and are taken with prefer="size" alone.
        co.save(co.convert(model, prefer="size"), file)
        co.verify(file)
        with init_empty_weights():
            skeleton = type(model)(model.config)
        loaded = logits(co.load(file, skeleton, inplace=True).eval(), dev)
    return {
        "top1": top1(loaded, dev),
        "top1 of the training's model": top1(trained, dev),
        "agree": 100 * (loaded.argmax(1) == trained.argmax(1)).double().mean().item(),
        "largest difference of logits": (loaded - trained).abs().max().item(),
        "file_bytes": file.stat().st_size,
    }


def top1(logits: Tensor, data: Sentences) -> float:
    return 100 * (logits.argmax(1) == data.labels).double().mean().item()


def ablated(recipe: co.Recipe, part: str, epochs: float) -> co.Recipe:
    """``recipe`` with one short `Retrain` by some of its losses."""
    stages = [stage for stage in recipe.stages if not isinstance(stage, co.Retrain)]
    retrain = next(stage for stage in recipe.stages if isinstance(stage, co.Retrain))
    losses = retrain.distill[: ABLATION[part]]
    if part == "LAT":
        stages = [loss_aware(stage) for stage in stages]
    last = replace(retrain, epochs=epochs, distill=losses, ce_weight=0.0 if losses else 1.0)
    return replace(recipe, stages=(*stages, last))


def loss_aware(stage: Stage) -> Stage:
    if not isinstance(stage, co.Quantize):
        return stage
    number = replace(stage.number, threshold=None)
    # A sort of all weights a step would take as long as the step.
    return replace(stage, number=number, loss_aware=True, solver="alternating")


def run_ablation(name: str, part: str, epochs: float, seed: int, workdir: Path) -> dict:
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = ablated(co.Recipe.from_yaml(path), part, epochs)
    model, train, dev, teacher = recipe.load()
    result = compress(model, recipe, train, dev, teacher, workdir, seed)
    right, found = logits(teacher, dev), logits(result.model, dev)
    expected, given = right.double().log_softmax(1), found.double().log_softmax(1)
    divergence = F.kl_div(given, expected, log_target=True, reduction="none").sum(1)
    return {
        "row": f"{name}, {part}" + (f", seed {seed}" if seed else ""),
        "recipe": f"recipes/{path.name}, then {recipe.stages[-1]}",
        "epochs": epochs,
        "seed": seed,
        "top1": result.table[-1].top1,
        "agree with the teacher": 100 * (right.argmax(1) == found.argmax(1)).double().mean().item(),
        "divergence": divergence.mean().item(),
        "its standard error": divergence.std().item() / len(dev) ** 0.5,
        "stages": [asdict(stage) for stage in result.table],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+", choices=ROWS)
    # Where the students' recipes look for their teacher.
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "bert")
    parser.add_argument("--out", type=Path, default=RESULTS / "bert_sst2.json")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--ablation", nargs="+", choices=[*ABLATION, "all"], default=[])
    parser.add_argument("--epochs", type=float, default=0.5, help="of each row of the ablation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the ablation")
    parser.set_defaults(rounds=1)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    parts = list(ABLATION) if "all" in arguments.ablation else arguments.ablation
    for name in arguments.rows:
        if not parts:
            keep(arguments, run(name, arguments.workdir))
        for seed, part in itertools.product(arguments.seeds, parts):
            keep(arguments, run_ablation(name, part, arguments.epochs, seed, arguments.workdir))


def keep(arguments: argparse.Namespace, row: dict) -> None:
    """Put a row into the file of results, in the place of an older one."""
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    rows = [other for other in before if other["row"] != row["row"]] + [context(arguments) | row]
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    size = f", {row['file_bytes']:,} bytes" if "file_bytes" in row else ""
    print(f"{row['row']}: top-1 {row['top1']:.2f}{size}", flush=True)


if __name__ == "__main__":
    main()
