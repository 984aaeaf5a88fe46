"""The layout axis: which entries of a weight are stored.

A layout takes the dense codes and a mask of the entries that must be kept, and gives streams of
codes (and of indices) to a coding; and back. The weight is seen as the matrix
``weight.flatten(1)`` where a layout has rows and columns.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressops.formats.coding import Coding, Decoder, Encoder, pack_bits, unpack_bits
from compressops.formats.number import matrix_shape
from compressops.formats.registry import Axis, check_choice, check_int

Parts = dict[str, Tensor]
Meta = dict[str, Any]

# In a stream of gaps: so many zeros, and no entry behind them.
SKIP = 255


class Layout(Axis):
    """Which entries of a weight are stored."""


class _EntryLayout(Layout, abc.ABC):
    """A layout that stores entries of the weight itself, as one stream of codes."""

    @abc.abstractmethod
    def encode(
        self, codes: Tensor, keep: Tensor, bits: int, coding: Coding, encoder: Encoder
    ) -> tuple[_EntryLayout, Parts, Meta]:
        """Store ``codes`` (signed integers, the weight's shape) where ``keep`` (bool) asks for it.

        Returns:
            the layout with every choice made, its parts, and what must be known to decode them.
        """

    @abc.abstractmethod
    def streams(self, shape: tuple[int, ...], meta: Meta, bits: int) -> dict[str, tuple[int, int]]:
        """``{stream: (count, bits)}`` in the order of the file.

        Raises:
            ValueError: ``meta`` is not that of a weight of ``shape``.
        """

    @abc.abstractmethod
    def decode(
        self, parts: Parts, meta: Meta, zero: Tensor, bits: int, coding: Coding, decoder: Decoder
    ) -> Tensor:
        """Dense codes; entries that are not stored are those of ``zero`` (a tensor that the
        result may overwrite, of the weight's shape)."""

    def stored(self, shape: tuple[int, ...], meta: Meta) -> int:
        """Entries that are stored."""
        del meta
        return math.prod(shape)

    def buffer_size(self, shape: tuple[int, ...]) -> int:
        """Entries that decoding needs room for."""
        return math.prod(shape)


def check_meta(owner: str, meta: Meta, limits: dict[str, int]) -> None:
    """Raise a ``ValueError`` unless ``meta`` has exactly these counts, each up to its limit."""
    if set(meta) != set(limits):
        raise ValueError(f"{owner} has meta {sorted(limits)}, got {sorted(meta)}")
    for name, limit in limits.items():
        check_int(owner, name, meta[name], 0, limit)


@dataclass(frozen=True)
class Dense(_EntryLayout):
    """Every entry, in row-major order."""

    def encode(
        self, codes: Tensor, keep: Tensor, bits: int, coding: Coding, encoder: Encoder
    ) -> tuple[_EntryLayout, Parts, Meta]:
        return self, coding.encode(codes.flatten(), bits, "codes", encoder), {}

    def streams(self, shape: tuple[int, ...], meta: Meta, bits: int) -> dict[str, tuple[int, int]]:
        check_meta("Dense", meta, {})
        return {"codes": (math.prod(shape), bits)}

    def decode(
        self, parts: Parts, meta: Meta, zero: Tensor, bits: int, coding: Coding, decoder: Decoder
    ) -> Tensor:
        return coding.decode(parts, "codes", zero.numel(), bits, decoder).view(zero.shape)


def _encode_mask(keep: Tensor, coding: Coding, encoder: Encoder) -> Parts:
    return coding.encode(pack_bits(keep.flatten().to(torch.uint8), 1), 8, "index", encoder)


def _decode_mask(
    parts: Parts, positions: int, count: int, coding: Coding, decoder: Decoder
) -> Tensor:
    """Positions that the mask marks, int64."""
    data = coding.decode(parts, "index", -(-positions // 8), 8, decoder).view(torch.uint8)
    marked = unpack_bits(data, positions, 1).view(torch.bool).nonzero().flatten()
    if len(marked) != count:
        raise ValueError(f"index marks {len(marked)} entries, count says {count}")
    return marked


def _gaps(keep: Tensor) -> Tensor:
    """uint8 symbols: before each kept entry the number of zeros; 255 = 255 zeros, no entry.

    Zeros behind the last entry are skipped too, as far as a multiple of 255 goes, so that the
    index accounts for the size of the weight.
    """
    positions = keep.flatten().nonzero().flatten()
    edges = F.pad(positions, (1, 1), value=-1)
    edges[-1] = keep.numel()
    zeros = edges.diff() - 1
    skips = zeros // SKIP
    # The i-th entry's symbol stands behind its skips; the last gap has skips only.
    at = (skips + 1).cumsum(0) - 1
    symbols = torch.full((int(at[-1]),), SKIP, dtype=torch.uint8)
    symbols[at[:-1]] = (zeros % SKIP).to(torch.uint8)[:-1]
    return symbols


def _decode_gaps(parts: Parts, meta: Meta, numel: int, coding: Coding, decoder: Decoder) -> Tensor:
    """Positions of the stored entries, int64."""
    symbols = coding.decode(parts, "index", meta["gaps"], 8, decoder).view(torch.uint8)
    entry = symbols != SKIP
    # In place: of int64, each takes more than the codes.
    ends = symbols.to(torch.int64).add_(entry)
    torch.cumsum(ends, 0, out=ends)
    end = int(ends[-1]) if len(ends) else 0
    if not 0 <= numel - end < SKIP:
        raise ValueError(f"index runs over {end} positions of a weight of {numel}")
    positions = ends[entry].sub_(1)
    if positions.numel() != meta["count"]:
        raise ValueError(f"index holds {positions.numel()} entries, count says {meta['count']}")
    return positions


@dataclass(frozen=True)
class Sparse(_EntryLayout):
    """The nonzero entries, with an index of where they are.

    Args:
        index: ``"bitmask"`` (a bit per position, coded by bytes), ``"gaps"`` (a byte per stored
            entry: the zeros before it) or ``"auto"``, whichever takes fewer bytes once coded. A
            packed tensor's layout always says which.
    """

    index: str = "auto"

    def __post_init__(self) -> None:
        check_choice("Sparse", "index", self.index, ("auto", "bitmask", "gaps"))

    def encode(
        self, codes: Tensor, keep: Tensor, bits: int, coding: Coding, encoder: Encoder
    ) -> tuple[_EntryLayout, Parts, Meta]:
        count = int(keep.sum())
        options: list[tuple[str, Parts, Meta]] = []
        if self.index != "gaps":
            options.append(("bitmask", _encode_mask(keep, coding, encoder), {"count": count}))
        if self.index != "bitmask":
            gaps = _gaps(keep)
            meta = {"count": count, "gaps": gaps.numel()}
            options.append(
                ("gaps", coding.encode(gaps.view(torch.int8), 8, "index", encoder), meta)
            )
        index, parts, meta = min(
            options, key=lambda option: sum(p.nbytes for p in option[1].values())
        )
        parts |= coding.encode(codes[keep], bits, "codes", encoder)
        return replace(self, index=index), parts, meta

    def streams(self, shape: tuple[int, ...], meta: Meta, bits: int) -> dict[str, tuple[int, int]]:
        numel = math.prod(shape)
        if self.index == "auto":
            raise ValueError("Sparse: a packed tensor's index is 'bitmask' or 'gaps', got 'auto'")
        if self.index == "bitmask":
            check_meta("Sparse", meta, {"count": numel})
            symbols = -(-numel // 8)
        else:
            check_meta("Sparse", meta, {"count": numel, "gaps": numel})
            symbols = meta["gaps"]
            if meta["count"] > symbols or numel >= SKIP * (symbols + 1):
                raise ValueError(
                    f"Sparse: {symbols} gaps index neither {meta['count']} entries nor a weight "
                    f"of {numel}"
                )
        return {"index": (symbols, 8), "codes": (meta["count"], bits)}

    def decode(
        self, parts: Parts, meta: Meta, zero: Tensor, bits: int, coding: Coding, decoder: Decoder
    ) -> Tensor:
        if self.index == "bitmask":
            where = _decode_mask(parts, zero.numel(), meta["count"], coding, decoder)
        else:
            where = _decode_gaps(parts, meta, zero.numel(), coding, decoder)
        codes = zero.flatten()
        codes[where] = coding.decode(parts, "codes", meta["count"], bits, decoder)
        return codes.view(zero.shape)

    def stored(self, shape: tuple[int, ...], meta: Meta) -> int:
        return meta["count"]


@dataclass(frozen=True)
class BlockSparse(_EntryLayout):
    """Blocks of ``weight.flatten(1)`` that hold a nonzero, with a bitmask of the block grid.

    Blocks are stored in row-major order of the grid, each row-major in itself; blocks at a ragged
    edge are padded with code 0.

    Args:
        block: rows and columns of a block, 1 to 1024 each.
    """

    block: tuple[int, int] = (16, 16)

    def __post_init__(self) -> None:
        if not isinstance(self.block, (tuple, list)) or len(self.block) != 2:
            raise ValueError(f"BlockSparse: block must be (rows, columns), got {self.block!r}")
        for side in self.block:
            check_int("BlockSparse", "block", side, 1, 1024)
        object.__setattr__(self, "block", tuple(self.block))

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = matrix_shape(shape)
        return -(-rows // self.block[0]), -(-columns // self.block[1])

    def _blocks(self, dense: Tensor) -> Tensor:
        """``[blocks, r, c]`` of a tensor of the weight's shape."""
        rows, columns = matrix_shape(tuple(dense.shape))
        (grid_rows, grid_columns), (r, c) = self._grid(tuple(dense.shape)), self.block
        padded = F.pad(
            dense.reshape(rows, columns), (0, grid_columns * c - columns, 0, grid_rows * r - rows)
        )
        return padded.view(grid_rows, r, grid_columns, c).transpose(1, 2).reshape(-1, r, c)

    def encode(
        self, codes: Tensor, keep: Tensor, bits: int, coding: Coding, encoder: Encoder
    ) -> tuple[_EntryLayout, Parts, Meta]:
        kept = self._blocks(keep).flatten(1).any(1)
        parts = _encode_mask(kept, coding, encoder)
        parts |= coding.encode(self._blocks(codes)[kept].flatten(), bits, "codes", encoder)
        return self, parts, {"count": int(kept.sum())}

    def streams(self, shape: tuple[int, ...], meta: Meta, bits: int) -> dict[str, tuple[int, int]]:
        blocks = math.prod(self._grid(shape))
        check_meta("BlockSparse", meta, {"count": blocks})
        return {
            "index": (-(-blocks // 8), 8),
            "codes": (meta["count"] * math.prod(self.block), bits),
        }

    def decode(
        self, parts: Parts, meta: Meta, zero: Tensor, bits: int, coding: Coding, decoder: Decoder
    ) -> Tensor:
        (grid_rows, grid_columns), (r, c) = self._grid(tuple(zero.shape)), self.block
        rows, columns = matrix_shape(tuple(zero.shape))
        kept = _decode_mask(parts, grid_rows * grid_columns, meta["count"], coding, decoder)
        blocks = self._blocks(zero)
        codes = coding.decode(parts, "codes", meta["count"] * r * c, bits, decoder)
        blocks[kept] = codes.view(-1, r, c)
        matrix = blocks.view(grid_rows, grid_columns, r, c).transpose(1, 2)
        return matrix.reshape(grid_rows * r, grid_columns * c)[:rows, :columns].reshape(zero.shape)

    def stored(self, shape: tuple[int, ...], meta: Meta) -> int:
        return meta["count"] * math.prod(self.block)

    def buffer_size(self, shape: tuple[int, ...]) -> int:
        return math.prod(self._grid(shape)) * math.prod(self.block)
