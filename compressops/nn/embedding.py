"""Embeddings that hold a packed table."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops import ops
from compressops.formats import Layout, Number, PackedTensor, Raw
from compressops.formats.rows import integer_rows, rows_refusal
from compressops.nn.base import PackedModule
from compressops.nn.kernel_weight import TernaryWeight
from compressops.nn.weight import PackedWeight


class PackedEmbedding(PackedModule):
    """`torch.nn.Embedding` with a packed weight ``[num_embeddings, embedding_dim]``.

    ``max_norm`` is refused: it renormalises the table in place on each use, which a packed table
    cannot follow.

    Packed residency decodes the chunks that hold the rows of a call where the table is one of
    floats, `Int` or `Ternary`, and else all of it. It breaks compiled graphs, see `PackedModule`.

    Shape: input integer ``[...]``, output ``[..., embedding_dim]``.
    """

    source = nn.Embedding
    options = ("num_embeddings", "embedding_dim", "padding_idx")

    def __init__(self, module: nn.Module, weight: PackedWeight, **settings: Any) -> None:
        if getattr(module, "max_norm", None) is not None:
            raise ValueError(f"module: max_norm={module.max_norm} needs a weight that can change")
        super().__init__(module, weight, **settings)

    @classmethod
    def _template(cls, config: dict[str, Any]) -> nn.Module:
        if config["bias"] is not False:
            raise ValueError(f"bias must be False, got {config['bias']!r}")
        return super()._template({k: v for k, v in config.items() if k != "bias"})

    def forward(self, input: Tensor) -> Tensor:
        held = self.packed_weight
        # Elsewhere finding the rows would wait for the device.
        if input.device.type == "cpu" and held.keeps_none() and held.has_rows():
            if input.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"input must be int32 or int64, got {input.dtype}")
            wanted, places = input.unique(return_inverse=True)
            for row in (wanted[0], wanted[-1]) if wanted.numel() else ():
                if not 0 <= row < self.num_embeddings:
                    raise IndexError(
                        f"input must be from 0 to {self.num_embeddings - 1}, got {int(row)}"
                    )
            return F.embedding(places, held.rows(wanted.long()))
        return self._looked_up(input)

    def _looked_up(self, input: Tensor) -> Tensor:
        return self.with_weight(F.embedding, input, self.padding_idx)


class TernaryEmbedding(PackedEmbedding):
    """`torch.nn.Embedding` on a table −α, 0 and α that stays in 2 bits.

    Only the rows that are asked for are decoded, on each call: bit for bit the rows of the decoded
    table (one α for the table, a row, or a group of a multiple of 16). The table may be the weight
    of a `TernaryLinear` too, in memory once.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Shape: input integer ``[...]``, output ``[..., embedding_dim]`` in the dtype of the layer.
    """

    weight_type = TernaryWeight
    op = "ternary_linear_rows"

    def _looked_up(self, input: Tensor) -> Tensor:
        held = self.packed_weight
        sides = self.num_embeddings, self.embedding_dim, held.group_size
        return self.with_weight(ops.ternary_linear_rows, input, *sides).to(held._probe.dtype)


class IntegerRows(PackedWeight):
    """A table of integers that stays as its file has it, in either residency: rows are decoded as
    they are asked for.

    Raises:
        ValueError: rows of such a weight cannot be read alone.
    """

    keeps_floats = False

    @classmethod
    def refusal(cls, layout: Layout, number: Number, shape: tuple[int, ...]) -> str | None:
        needed = rows_refusal(layout, number, shape)
        return needed and f"look-ups need {needed}"

    def _set_packed(self, packed: PackedTensor) -> None:
        why = self.refusal(packed.layout, packed.number, packed.shape)
        if why is None and not isinstance(packed.coding, Raw):
            why = f"look-ups need codes of one length, got {packed.coding}"
        if why is not None:
            raise ValueError(f"weight: {why}")
        super()._set_packed(packed)
        self._number, self._names = packed.number, tuple(packed.params)
        for name in self._names:
            # Copies where they are few: of a mapped file the system brings up to 2 MB around them
            # into memory, where nothing else is that a look-up reads.
            if self._buffers[name].numel() <= self.shape[0]:
                self._buffers[name] = self._buffers[name].clone()

    def _resident(self) -> tuple[str, ...]:
        return ()

    def _materialize(self) -> None:
        pass

    def forward(self) -> Tensor:
        return self._decode()

    def rows(self, wanted: Tensor) -> Tensor:
        params = {name: self._buffers[name] for name in self._names}
        how = params, self._number, self.shape, self._probe.dtype
        return integer_rows(self._buffers["codes"], *how, wanted)


class IntEmbedding(PackedEmbedding):
    """`torch.nn.Embedding` on a table of integers that is in memory once, in as few bits as in its
    file; of a file that is mapped (`compressops.load`), only what is looked up is.

    Only the rows that are asked for are decoded, on each call: bit for bit the rows of the decoded
    table.

    Shape: input integer ``[...]``, output ``[..., embedding_dim]`` in the dtype of the layer.
    """

    weight_type = IntegerRows

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"input must be int32 or int64, got {input.dtype}")
        rows = self.packed_weight.rows(input.long().flatten())
        return rows.view(*input.shape, self.embedding_dim)
