"""An embedding that holds a packed table."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from compressops.nn.base import PackedModule
from compressops.nn.weight import PackedWeight


class PackedEmbedding(PackedModule):
    """`torch.nn.Embedding` with a packed weight ``[num_embeddings, embedding_dim]``.

    ``max_norm`` is refused: it renormalises the table in place on each use, which a packed table
    cannot follow.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Shape: input integer ``[...]``, output ``[..., embedding_dim]``.
    """

    source = nn.Embedding
    options = ("num_embeddings", "embedding_dim", "padding_idx")

    def __init__(self, module: nn.Module, weight: PackedWeight) -> None:
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(f"module: max_norm={module.max_norm} needs a weight that can change")
        super().__init__(module, weight)

    @classmethod
    def _template(cls, config: dict[str, Any]) -> nn.Module:
        if config["bias"] is not False:
            raise ValueError(f"bias must be False, got {config['bias']!r}")
        return super()._template({k: v for k, v in config.items() if k != "bias"})

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, self.padding_idx)
