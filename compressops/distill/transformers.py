"""Losses on what the layers of a transformer compute: attention scores and hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops.distill.capture import find_layers, unwrapped
from compressops.distill.losses import DistillLoss, check_flag, exact, pairs
from compressops.formats.registry import check_choice, check_fraction, check_int

_HEADS = ("num_attention_heads", "num_heads", "n_heads")
_MAPPINGS = ("uniform", "first", "last")


@dataclass(frozen=True)
class _BlocksKD(DistillLoss):
    """A loss summed over pairs of a transformer's layers."""

    blocks: str = "*encoder.layer"
    teacher_blocks: str | None = None
    mapping: str | tuple[int, ...] = "uniform"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("blocks", "teacher_blocks"):
            _check_text(owner, name, getattr(self, name), optional=name != "blocks")
        if isinstance(self.mapping, (tuple, list)):
            for layer in self.mapping:
                check_int(owner, "mapping", layer, 0, 2**31)
            object.__setattr__(self, "mapping", tuple(self.mapping))
        else:
            check_choice(owner, "mapping", self.mapping, _MAPPINGS)
        check_fraction(owner, "weight", self.weight, 0, 1e9)

    def mapped(self, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
        """The paths of the layers that are compared."""
        owner = type(self).__name__
        mine = _blocks(f"{owner}: blocks", self.blocks, student)
        its = _blocks(f"{owner}: teacher_blocks", self.teacher_blocks or self.blocks, teacher)
        return [(mine[i], its[j]) for i, j in enumerate(self._indices(len(mine), len(its)))]

    def _indices(self, student: int, teacher: int) -> Sequence[int]:
        """The teacher's layer for each of the student's."""
        owner = type(self).__name__
        if isinstance(self.mapping, tuple):
            if len(self.mapping) != student or max(self.mapping, default=0) >= teacher:
                raise ValueError(
                    f"{owner}: mapping must give one of the teacher's {teacher} layers for each of "
                    f"the student's {student}, got {self.mapping}"
                )
            return self.mapping
        if student > teacher:
            raise ValueError(
                f"{owner}: the student has {student} layers and the teacher {teacher}; "
                "give mapping as a list"
            )
        if self.mapping == "uniform":
            return [(i + 1) * teacher // student - 1 for i in range(student)]
        return range(student) if self.mapping == "first" else range(teacher - student, teacher)


@dataclass(frozen=True)
class AttentionScoreKD(_BlocksKD):
    """Match attention scores before the softmax: Σ_l mean squared difference of Q·Kᵀ/√d over all
    heads and places (TinyBERT, Jiao et al. 2020, arXiv 1909.10351, equation 7; TernaryBERT, Zhang
    et al. 2020, arXiv 2009.12812, section 3.3). Entries of masked keys are 0 in both, as in the
    code of both.

    Fused attention never has these scores, so they are computed once more from the outputs of the
    query and key projections, as they are before `QuantizeAttention` rounds them. That holds for
    attention whose projections go into the product as they are, as BERT's: not with rotary
    embeddings or relative positions.

    Args:
        blocks: glob of the student's list of layers; it must match one `nn.ModuleList`.
        teacher_blocks: the same of the teacher; ``None`` is ``blocks``.
        mapping: the teacher's layer for each of the student's. ``"uniform"``: of M and N layers,
            the m-th takes the ⌊m·N/M⌋-th (TinyBERT's g); ``"first"``, ``"last"``: the teacher's
            first or last M; or a list of numbers from 0.
        query, key: paths of the projections within a layer (DistilBERT: ``"attention.q_lin"``,
            ``"attention.k_lin"``, with ``blocks="*transformer.layer"``).
        heads: ``None`` takes ``num_attention_heads``, ``num_heads`` or ``n_heads`` of the module
            that holds the query projection. A key of fewer (grouped) heads is repeated.
        mask: keyword argument of the model with the mask: ``[N, L]`` (not 0: a token), or
            ``[N, 1 or heads, 1 or L, L]``, bool (true: attend) or added to the scores.
        causal: entries of later keys are 0, too.
        weight: factor in the total loss.
    """

    query: str = "attention.self.query"
    key: str = "attention.self.key"
    heads: int | None = None
    mask: str = "attention_mask"
    causal: bool = False
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("query", "key", "mask"):
            _check_text("AttentionScoreKD", name, getattr(self, name))
        if self.heads is not None:
            check_int("AttentionScoreKD", "heads", self.heads, 1, 2**31)
        check_flag("AttentionScoreKD", "causal", self.causal)

    def layer_pairs(self, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
        found = []
        for mine, its in self.mapped(student, teacher):
            for part in (self.query, self.key):
                names = [f"{mine}.{part}", f"{its}.{part}"]
                for name, model in zip(names, (student, teacher), strict=True):
                    find_layers("AttentionScoreKD: query and key", name, model)
                found.append(tuple(names))
        return found

    def read(
        self, outputs: Sequence[Tensor], model: nn.Module, names: Sequence[str], inputs: Mapping
    ) -> list[Tensor]:
        """Scores ``[N, heads, L, L]`` of each layer."""
        mask = inputs.get(self.mask)
        found = []
        for i in range(0, len(outputs), 2):
            attention = unwrapped(model).get_submodule(names[i].rpartition(".")[0])
            heads = self.heads or _heads(attention, names[i])
            found.append(scores(outputs[i], outputs[i + 1], heads, mask, self.causal))
        return found

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        """Scores ``[N, heads, L, L]`` each, or a list of them."""
        return _sum_of_mse("AttentionScoreKD", student, teacher)


@dataclass(frozen=True)
class HiddenStateKD(_BlocksKD):
    """Match the output of the embeddings and of every layer: Σ_l mean squared difference (TinyBERT,
    Jiao et al. 2020, arXiv 1909.10351, equations 8 and 9; TernaryBERT, Zhang et al. 2020, arXiv
    2009.12812, section 3.3).

    Args:
        blocks, teacher_blocks, mapping: as of `AttentionScoreKD`.
        embeddings: glob of the module that gives the embeddings, the outermost that matches;
            ``None`` leaves them out.
        regressor: where widths differ, learn a linear map with bias from the student's states to
            the teacher's, one for each pair (TinyBERT's W without bias, and one for all layers).
        weight: factor in the total loss.
    """

    embeddings: str | None = "*embeddings"
    regressor: bool = True
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_text("HiddenStateKD", "embeddings", self.embeddings, optional=True)
        check_flag("HiddenStateKD", "regressor", self.regressor)

    def layer_pairs(self, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
        found = self.mapped(student, teacher)
        if self.embeddings is None:
            return found
        # Its parts come after it in the model's order.
        first = [
            find_layers("HiddenStateKD: embeddings", self.embeddings, model)[0]
            for model in (student, teacher)
        ]
        return [tuple(first), *found]

    def __call__(self, student: Any, teacher: Any) -> Tensor:
        """States ``[N, L, width]`` each, or a list of them."""
        return _sum_of_mse("HiddenStateKD", student, teacher)


def scores(
    query: Tensor, key: Tensor, heads: int, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Q·Kᵀ/√d of every head, 0 where it is masked.

    Args:
        query, key: outputs of the projections, ``[N, L, heads · d]``; the key's may have fewer
            heads.
        mask: see `AttentionScoreKD`.

    Returns:
        float32 ``[N, heads, L, L]``; float64 for such.

    Raises:
        ValueError: shapes that do not fit each other or the number of heads.
    """
    query, key = exact(query), exact(key)
    if query.dim() != 3 or query.shape[-1] % heads or key.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"queries {list(query.shape)} and keys {list(key.shape)} are not [N, L, {heads} · d]"
        )
    d = query.shape[-1] // heads
    if not key.shape[-1] or key.shape[-1] % d or heads % (key.shape[-1] // d):
        raise ValueError(f"keys {list(key.shape)} have no whole number of heads of {d}")
    # [N, L, heads · d] -> [N, heads, L, d]
    q = query.unflatten(-1, (heads, d)).transpose(1, 2)
    k = key.unflatten(-1, (-1, d)).transpose(1, 2)
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    found = q @ k.transpose(-1, -2) / d**0.5
    if mask is not None:
        found = found.masked_fill(~_attended(mask), 0.0)
    if causal:
        found = found.tril()
    return found


def _attended(mask: Tensor) -> Tensor:
    if mask.dim() == 2:
        return (mask != 0)[:, None, None, :]
    if mask.dim() != 4:
        raise ValueError(f"the mask must be [N, L] or [N, heads, L, L], got {list(mask.shape)}")
    # A mask that is added: 0 attends, and what is taken off is out of proportion to any score.
    return mask if mask.dtype == torch.bool else mask > -100


def _sum_of_mse(owner: str, student: Any, teacher: Any) -> Tensor:
    total: Tensor | float = 0.0
    for s, t in pairs(owner, student, teacher):
        if s.shape != t.shape:
            raise ValueError(
                f"{owner}: {list(s.shape)} of the student and {list(t.shape)} of the teacher "
                "differ in shape"
            )
        total = total + F.mse_loss(exact(s), exact(t))
    return total


def _blocks(argument: str, glob: str, model: nn.Module) -> list[str]:
    lists = [
        name
        for name in find_layers(argument, glob, model)
        if isinstance(model.get_submodule(name), (nn.ModuleList, nn.Sequential))
    ]
    if len(lists) != 1:
        raise ValueError(
            f"{argument}: {glob!r} must match one list of layers, got {', '.join(lists) or 'none'}"
        )
    return [f"{lists[0]}.{i}" for i in range(len(model.get_submodule(lists[0])))]


def _heads(attention: nn.Module, name: str) -> int:
    for attribute in _HEADS:
        if isinstance(value := getattr(attention, attribute, None), int):
            return value
    raise ValueError(
        f"AttentionScoreKD: the module of {name!r} has none of {', '.join(_HEADS)}; give heads"
    )


def _check_text(owner: str, name: str, value: Any, optional: bool = False) -> None:
    if not (optional and value is None) and (not isinstance(value, str) or not value):
        raise ValueError(f"{owner}: {name} must be a name, got {value!r}")
