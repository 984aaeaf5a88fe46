"""Attention scores and hidden states: against loops in float64, and on models of the BERT kind."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops.distill import AttentionScoreKD, Distiller, HiddenStateKD
from compressops.distill.transformers import scores


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor]:
        q, k, v = (
            part(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mask = None if mask is None else mask[:, None, None, :].bool()
        return (F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2),)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = SelfAttention(width, heads)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor]:
        return (x + self.output(self.attention.self(x, mask)[0]).tanh(),)


class Bert(nn.Module):
    """The names of Hugging Face's BERT, and its fused attention."""

    def __init__(self, layers: int, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(20, width)
        self.embeddings.forward = self.embeddings.word_embeddings.forward
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.classifier = nn.Linear(width, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embeddings(input_ids)
        for layer in self.encoder.layer:
            x = layer(x, attention_mask)[0]
        return self.classifier(x[:, 0])


def _scores(q: Tensor, k: Tensor, heads: int, keep) -> list:
    """Q·Kᵀ/√d by loops; ``keep(sample, head, row, column)`` says what is not masked."""
    n, length, width = q.shape
    d = width // heads
    shared = heads // (k.shape[2] // d)
    return [
        [
            [
                [
                    sum(
                        q[b, i, h * d + c].item() * k[b, j, h // shared * d + c].item()
                        for c in range(d)
                    )
                    / math.sqrt(d)
                    * keep(b, h, i, j)
                    for j in range(length)
                ]
                for i in range(length)
            ]
            for h in range(heads)
        ]
        for b in range(n)
    ]


@pytest.mark.parametrize("kind", ["none", "tokens", "added", "bool", "causal"])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_scores(kind: str, key_heads: int) -> None:
    q, k = torch.randn(2, 5, 12).double(), torch.randn(2, 5, 3 * key_heads).double()
    tokens = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    square = torch.rand(2, 4, 5, 5) < 0.6
    mask = {
        "tokens": tokens,
        "added": torch.where(tokens.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None],
        "bool": square,
    }.get(kind)

    def keep(b: int, h: int, i: int, j: int) -> bool:
        if kind in ("tokens", "added"):
            return bool(tokens[b, j])
        return bool(square[b, h, i, j]) if kind == "bool" else kind != "causal" or j <= i

    found = scores(q, k, 4, mask, causal=kind == "causal")
    torch.testing.assert_close(found, torch.tensor(_scores(q, k, 4, keep), dtype=torch.float64))


def test_the_losses_are_sums_of_mean_squares() -> None:
    students = [torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    teachers = [torch.randn(2, 3, 4, 4).double() for _ in range(2)]
    wanted = sum(
        sum((a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True))
        / s.numel()
        for s, t in zip(students, teachers, strict=True)
    )
    for loss in (AttentionScoreKD(), HiddenStateKD()):
        assert loss(students, teachers).item() == pytest.approx(wanted)
        assert torch.autograd.gradcheck(lambda *x, loss=loss: loss(list(x), teachers), students)


def test_fused_attention_gives_its_scores() -> None:
    """The recomputed scores are those that the attention used: its softmax times the values."""
    model = Bert(1)
    attention = model.encoder.layer[0].attention.self
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    found = scores(attention.query(x), attention.key(x), 2, mask)
    weights = found.masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1)
    values = attention.value(x).unflatten(-1, (2, -1)).transpose(1, 2)
    wanted = (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, mask)[0], wanted)


def test_a_student_with_fewer_and_narrower_layers() -> None:
    torch.manual_seed(1)
    student, teacher = Bert(2, width=6), Bert(6, width=8)
    batch = {
        "input_ids": torch.randint(0, 20, (3, 5)),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [1, 1, 0, 0, 0]]),
    }
    losses = [AttentionScoreKD(), HiddenStateKD()]
    kd = Distiller(student, teacher, losses, example=batch)
    assert [tuple(r.linear.weight.shape) for r in kd.regressors.values()] == [(8, 6)] * 3
    with kd:
        loss = kd(student(**batch), **batch)
    mine = student.embeddings(batch["input_ids"])
    its = teacher.embeddings(batch["input_ids"])
    states = F.mse_loss(kd.regressors["1_0"](mine), its)
    attention = torch.zeros(())
    teachers = []
    for layer in teacher.encoder.layer:
        part = layer.attention.self
        teachers.append(scores(part.query(its), part.key(its), 2, batch["attention_mask"]))
        its = layer(its, batch["attention_mask"])[0]
        teachers[-1] = teachers[-1], its
    for i, layer in enumerate(student.encoder.layer):
        part = layer.attention.self
        found = scores(part.query(mine), part.key(mine), 2, batch["attention_mask"])
        mine = layer(mine, batch["attention_mask"])[0]
        # TinyBERT's map: of 6 layers the third and the sixth.
        score, state = teachers[[2, 5][i]]
        attention = attention + F.mse_loss(found, score)
        states = states + F.mse_loss(kd.regressors[f"1_{i + 1}"](mine), state)
    torch.testing.assert_close(kd.values["AttentionScoreKD"], attention.detach())
    torch.testing.assert_close(kd.values["HiddenStateKD"], states.detach())
    loss.backward()
    assert student.encoder.layer[1].attention.self.key.weight.grad is not None
    assert student.embeddings.word_embeddings.weight.grad is not None


@pytest.mark.parametrize(
    ("mapping", "layers"),
    [("uniform", (0, 2, 4)), ("first", (0, 1, 2)), ("last", (2, 3, 4)), ((4, 4, 1), (4, 4, 1))],
)
def test_mappings(mapping, layers: tuple[int, ...]) -> None:
    loss = HiddenStateKD(mapping=mapping, embeddings=None)
    wanted = [(f"encoder.layer.{i}", f"encoder.layer.{j}") for i, j in enumerate(layers)]
    assert loss.layer_pairs(Bert(3), Bert(5)) == wanted
    with_embeddings = HiddenStateKD(mapping=mapping).layer_pairs(Bert(3), Bert(5))
    assert with_embeddings == [("embeddings", "embeddings"), *wanted]


def test_a_model_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"max_position_embeddings": 16, "num_labels": 3}
    student, teacher = (
        transformers.BertForSequenceClassification(
            transformers.BertConfig(hidden_size=width, num_hidden_layers=layers, **sizes)
        )
        for width, layers in ((8, 2), (12, 4))
    )
    batch = {
        "input_ids": torch.randint(0, 30, (3, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]),
    }
    kd = Distiller(student, teacher, [AttentionScoreKD(), HiddenStateKD()], example=batch)
    student.eval()
    with kd:
        kd(student(**batch), **batch)
    with torch.no_grad():
        mine = student(**batch, output_hidden_states=True).hidden_states
        its = teacher.eval()(**batch, output_hidden_states=True).hidden_states
    wanted = sum(
        F.mse_loss(kd.regressors[f"1_{i}"](mine[i]), its[j]) for i, j in enumerate((0, 2, 4))
    )
    torch.testing.assert_close(kd.values["HiddenStateKD"], wanted.detach())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiddenStateKD(blocks=""), "HiddenStateKD: blocks must be a name, got ''"),
        (lambda: HiddenStateKD(mapping="even"), "mapping must be one of uniform, first, last, got"),
        (lambda: HiddenStateKD(mapping=(-1,)), "HiddenStateKD: mapping must be an integer .* -1"),
        (lambda: HiddenStateKD(weight=-1.0), "HiddenStateKD: weight must be .* got -1.0"),
        (lambda: HiddenStateKD(regressor=0), "regressor must be true or false, got 0"),
        (lambda: AttentionScoreKD(query=3), "AttentionScoreKD: query must be a name, got 3"),
        (lambda: AttentionScoreKD(heads=0), "AttentionScoreKD: heads must be an integer .* got 0"),
        (
            lambda: HiddenStateKD().layer_pairs(Bert(5), Bert(3)),
            "the student has 5 layers and the teacher 3; give mapping as a list",
        ),
        (
            lambda: HiddenStateKD(mapping=(0, 3)).layer_pairs(Bert(2), Bert(3)),
            r"one of the teacher's 3 layers for each of the student's 2, got \(0, 3\)",
        ),
        (
            lambda: HiddenStateKD(blocks="encoder*").layer_pairs(
                nn.ModuleDict({"encoder": nn.Identity()}), Bert(3)
            ),
            r"HiddenStateKD: blocks: 'encoder\*' must match one list of layers, got none",
        ),
        (
            lambda: AttentionScoreKD(query="self.q").layer_pairs(Bert(1), Bert(1)),
            "query and key: 'encoder.layer.0.self.q' matches no layer",
        ),
        (
            lambda: scores(torch.zeros(1, 2, 6), torch.zeros(1, 2, 6), 4),
            r"queries \[1, 2, 6\] and keys \[1, 2, 6\] are not \[N, L, 4 · d\]",
        ),
        (
            lambda: scores(torch.zeros(1, 2, 6), torch.zeros(1, 2, 4), 2),
            r"keys \[1, 2, 4\] have no whole number of heads of 3",
        ),
        (
            lambda: scores(*[torch.zeros(1, 2, 6)] * 2, 2, torch.zeros(1, 2, 2)),
            r"the mask must be \[N, L\] or \[N, heads, L, L\], got \[1, 2, 2\]",
        ),
        (
            lambda: AttentionScoreKD()(torch.zeros(1, 2, 2, 2), torch.zeros(1, 4, 2, 2)),
            r"AttentionScoreKD: \[1, 2, 2, 2\] of the student and \[1, 4, 2, 2\] of the teacher",
        ),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_heads() -> None:
    student = Bert(1)
    del student.encoder.layer[0].attention.self.num_attention_heads
    names = [f"encoder.layer.0.attention.self.{part}" for part in ("query", "key")]
    outputs = [torch.zeros(1, 2, 8)] * 2
    with pytest.raises(ValueError, match=r"has none of num_attention_heads, .* give heads"):
        AttentionScoreKD().read(outputs, student, names, {})
    assert AttentionScoreKD(heads=4).read(outputs, student, names, {})[0].shape == (1, 4, 2, 2)
