"""Files of ternary and 8-bit BERTs: the sizes that TernaryBERT's table 1 states, as bytes on disk.

    python bench/bert_sizes.py

BERT-base and the 6-layer TinyBERT (Zhang et al. 2020, arXiv:2009.12812) as
`transformers.BertForSequenceClassification`, with Gaussian weights because no trained ones are
needed for a size: entropy coding gains on real ones what their codes allow. W-E-A are the bits of
the encoder's weights, of the word embeddings, and of the activations; LayerNorms, biases,
position and type embeddings and the classifier stay float32. "published" is the paper's sum of
bytes. Each file is loaded again and runs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import parser, report
from torch import nn

import compressops as co

MIB = 2**20
SHAPES = {
    "BERT-base": {"num_hidden_layers": 12},
    "6 layers": {"num_hidden_layers": 6},
}
SMOKE = {
    "smoke": {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
}
PUBLISHED = {
    ("BERT-base", "float32"): 418,
    ("BERT-base", "8-8-8"): 106,
    ("BERT-base", "2-2-8"): 28,
    ("6 layers", "2-2-8"): 18,
}


def build(shape: dict) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**shape)).eval()


def config(number: co.formats.Number, embedding: co.formats.Number, coding: co.formats.Coding):
    return {
        "bert.embeddings.word_embeddings": (embedding, coding),
        "bert.embeddings.*": None,
        "classifier": None,
        "*": (number, coding),
    }


ROWS = {
    "8-8-8": (co.Int(bits=8), co.Int(bits=8)),
    "2-2-8": (co.Ternary("tensor"), co.Ternary("row")),
}


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__, "bert_sizes").parse_args()
    try:
        import transformers
    except ImportError as missing:
        if arguments.smoke:
            print(f"not run: {missing}")
            return
        raise
    transformers.logging.set_verbosity_error()
    rows = []
    for name, shape in (SMOKE if arguments.smoke else SHAPES).items():
        model = build(shape)
        dense = sum(p.nbytes for p in model.parameters())
        rows.append(row(name, "float32", "", dense, dense))
        ids = torch.randint(0, model.config.vocab_size, (2, 16))
        for bits, (number, embedding) in ROWS.items():
            for coding in (co.Raw(), co.Huffman()):
                packed = co.convert(model, config(number, embedding, coding), prefer="size")
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "model.safetensors"
                    co.save(packed, path)
                    size = path.stat().st_size
                    again = co.load(path, build(shape))
                same = torch.equal(again(ids).logits, packed(ids).logits)
                rows.append(row(name, bits, str(coding), size, dense) | {"loads and runs": same})
                del packed, again
    report("BERT in files", rows, arguments)


def row(name: str, bits: str, coding: str, size: int, dense: int) -> dict:
    return {
        "model": name,
        "W-E-A": bits,
        "coding": coding,
        "bytes": size,
        "MiB": size / MIB,
        "published MB": PUBLISHED.get((name, bits)),
        "× float32": dense / size,
        "loads and runs": None,
    }


if __name__ == "__main__":
    main()
