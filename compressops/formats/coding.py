"""The coding axis: how codes become bytes. Each coder serves one *stream* of a packed tensor.

A stream called ``codes`` is stored in one part (``codes``, raw) or three (``codes``,
``codes_sizes``, ``codes_lengths``, Huffman); codes wider than a byte are split into byte planes
``codes_0``, ``codes_1`` … (see ``planes.py``), each a stream of its own.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressops.formats.bits import pack_bits, packed_nbytes, sign_extend, unpack_bits
from compressops.formats.huffman import (
    HEADER_BYTES,
    MAX_CHUNK_SIZE,
    MAX_CODE_LENGTH,
    huffman_decode_reference,
    huffman_encode_reference,
    huffman_lengths,
)
from compressops.formats.planes import (
    code_dtype,
    decode_planes_reference,
    merge_planes_reference,
    split_planes,
)
from compressops.formats.registry import Axis, check_int

__all__ = [
    "Coding",
    "Decoder",
    "Encoder",
    "Huffman",
    "Raw",
    "code_dtype",
    "huffman_decode_reference",
    "huffman_encode_reference",
    "huffman_lengths",
    "pack_bits",
    "unpack_bits",
]


def _empty(count: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(count, dtype=dtype)


@dataclass(frozen=True)
class Decoder:
    """The kernels that decoding takes; by default the references.

    Attributes:
        symbols: ``(stream, offsets, lengths, num_symbols, chunk_size, out)`` → uint8 symbols, as
            :func:`huffman_decode_reference`.
        merge: ``(out, planes, turned)``, as :func:`merge_planes_reference`.
        planes: ``(out, planes, offsets, lengths, chunk_size, turned)``, as
            :func:`decode_planes_reference`: codes of more than a byte.
        empty: ``(count, like, dtype)`` → memory for codes of more than a byte, where ``like`` is.
    """

    symbols: Callable[..., Tensor] = huffman_decode_reference
    merge: Callable[[Tensor, Sequence[Tensor], bool], None] = merge_planes_reference
    planes: Callable[..., None] = decode_planes_reference
    empty: Callable[[int, Tensor, torch.dtype], Tensor] = _empty


# Takes ``(symbols, lengths, chunk_size)``, gives ``(stream, offsets)``: a kernel, or the reference.
Encoder = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
# What a chunk takes beside its codes: its header, and its size as uint16 (32,768 symbols of 12 bits
# are 49,152 bytes).
_CHUNK_BYTES = HEADER_BYTES + 2
# What a plane, or a weight of floats, has to shrink to: decoding costs more than less would save.
WORTH = 0.95


class Coding(Axis, abc.ABC):
    """How a stream of codes becomes bytes."""

    @abc.abstractmethod
    def encode(
        self, codes: Tensor, bits: int, name: str, encoder: Encoder = huffman_encode_reference
    ) -> dict[str, Tensor]:
        """Parts of the stream ``name`` that holds ``codes`` (CPU integers ``[N]``, of ``bits``
        bits each, two's complement)."""

    @abc.abstractmethod
    def part_dtypes(self, name: str, bits: int, present: set[str]) -> Iterator[tuple[str, str]]:
        """``(part, kind)`` of the stream's parts in their order, given the names ``present``;
        kind is ``"bytes"`` (uint8) or ``"sizes"`` (uint16)."""

    @abc.abstractmethod
    def check(self, parts: dict[str, Tensor], name: str, count: int, bits: int) -> None:
        """Raise a ``ValueError`` unless the parts can hold ``count`` codes; decodes nothing."""

    @abc.abstractmethod
    def decode(
        self,
        parts: dict[str, Tensor],
        name: str,
        count: int,
        bits: int,
        decoder: Decoder,
        out: Tensor | None = None,
    ) -> Tensor:
        """The ``count`` codes, signed integers ``[count]`` on the parts' device.

        Args:
            out: where they go, ``[count]``, contiguous, of their dtype; ``None``: into a tensor
                of their own.

        Raises:
            ValueError: the stream is corrupt.
        """

    def of(self, is_float: bool) -> Coding:
        """As this one codes the streams of a weight whose codes are floats, or are not."""
        del is_float
        return self


def _check_raw(data: Tensor, name: str, count: int, bits: int) -> None:
    if data.numel() != (size := packed_nbytes(count, bits)):
        raise ValueError(
            f"part {name!r}: {count} codes of {bits} bits take {size} bytes, got {data.numel()}"
        )


@dataclass(frozen=True)
class Raw(Coding):
    """Codes bit-packed at their width: a 6-bit code takes 6 bits."""

    def encode(
        self, codes: Tensor, bits: int, name: str, encoder: Encoder = huffman_encode_reference
    ) -> dict[str, Tensor]:
        return {name: pack_bits(codes, bits)}

    def part_dtypes(self, name: str, bits: int, present: set[str]) -> Iterator[tuple[str, str]]:
        yield name, "bytes"

    def check(self, parts: dict[str, Tensor], name: str, count: int, bits: int) -> None:
        _check_raw(parts[name], name, count, bits)

    def decode(
        self,
        parts: dict[str, Tensor],
        name: str,
        count: int,
        bits: int,
        decoder: Decoder,
        out: Tensor | None = None,
    ) -> Tensor:
        codes = sign_extend(unpack_bits(parts[name], count, bits), bits)
        return codes if out is None else out.copy_(codes)


@dataclass(frozen=True)
class Huffman(Coding):
    """Huffman codes, limited in length, in chunks that decode in parallel.

    A stream that would not shrink is stored raw. Codes wider than 8 bits are coded by byte
    planes, those of floats by planes of which the highest is the exponent; a plane that gains less
    than 5 % (a float's mantissa) is stored raw, because decoding it costs more than it saves, and
    so are all of them where they gain less than 5 % together.

    Args:
        max_length: longest code, 8 to 12 bits.
        chunk_size: symbols to a chunk, 1 to 32768; each costs 7 bytes and half a byte of padding.
    """

    max_length: int = 12
    chunk_size: int = 32768

    # Whether the codes of more than a byte are turned before they are split, see planes.py.
    _turned: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_int("Huffman", "max_length", self.max_length, 8, MAX_CODE_LENGTH)
        check_int("Huffman", "chunk_size", self.chunk_size, 1, MAX_CHUNK_SIZE)

    def _planes(self, name: str, bits: int) -> list[tuple[str, int]]:
        """Name and width of each plane of a stream."""
        if bits <= 8:
            return [(name, bits)]
        widths = [8] * (bits // 8) + [bits % 8] * (bits % 8 > 0)
        return [(f"{name}_{i}", width) for i, width in enumerate(widths)]

    def of(self, is_float: bool) -> Coding:
        return _FloatHuffman(self.max_length, self.chunk_size) if is_float else self

    def encode(
        self, codes: Tensor, bits: int, name: str, encoder: Encoder = huffman_encode_reference
    ) -> dict[str, Tensor]:
        names = self._planes(name, bits)
        if bits <= 8:
            symbols = codes.to(torch.int8).view(torch.uint8) & (2**bits - 1)
            return self._encode_plane(symbols, bits, name, 1.0, encoder)
        planes = split_planes(codes, bits, self._turned)
        parts: dict[str, Tensor] = {}
        for (plane, width), symbols in zip(names, planes, strict=True):
            parts |= self._encode_plane(symbols, width, plane, WORTH, encoder)
        if _nbytes(parts) < WORTH * sum(packed_nbytes(codes.numel(), width) for _, width in names):
            return parts
        return {n: pack_bits(p, width) for (n, width), p in zip(names, planes, strict=True)}

    def _encode_plane(
        self, symbols: Tensor, bits: int, name: str, worth: float, encoder: Encoder
    ) -> dict[str, Tensor]:
        count = symbols.numel()
        counts = torch.bincount(symbols)
        lengths = huffman_lengths(counts, self.max_length)
        table = pack_bits(lengths, 4)
        chunks = -(-count // self.chunk_size)
        limit = worth * packed_nbytes(count, bits)
        coded = int((counts * lengths).sum()) // 8 + table.numel() + _CHUNK_BYTES * chunks
        if count and coded < limit:
            stream, offsets = encoder(symbols, lengths, self.chunk_size)
            if stream.numel() + table.numel() + 2 * chunks < limit:
                sizes = offsets.diff().to(torch.uint16)
                return {name: stream, f"{name}_sizes": sizes, f"{name}_lengths": table}
        return {name: pack_bits(symbols, bits)}

    def part_dtypes(self, name: str, bits: int, present: set[str]) -> Iterator[tuple[str, str]]:
        for plane, _ in self._planes(name, bits):
            yield plane, "bytes"
            if f"{plane}_lengths" in present:
                yield f"{plane}_sizes", "sizes"
                yield f"{plane}_lengths", "bytes"

    def check(self, parts: dict[str, Tensor], name: str, count: int, bits: int) -> None:
        for plane, width in self._planes(name, bits):
            if f"{plane}_lengths" not in parts:
                _check_raw(parts[plane], plane, count, width)
                continue
            table, sizes = parts[f"{plane}_lengths"], parts[f"{plane}_sizes"]
            if not 1 <= table.numel() <= max(1, 2**width // 2) or not int(table[-1]):
                raise ValueError(
                    f"part {plane + '_lengths'!r}: {table.numel()} bytes are no table of code "
                    f"lengths of {width}-bit symbols that ends with the last one used"
                )
            chunks = -(-count // self.chunk_size)
            if not count or sizes.numel() != chunks:
                raise ValueError(
                    f"part {plane + '_sizes'!r}: {count} symbols in chunks of {self.chunk_size} "
                    f"have {chunks} sizes, got {sizes.numel()}"
                )
            total = int(sizes.to(torch.int64).sum())
            stream = parts[plane].numel()
            if total != stream or not count <= 8 * stream:
                raise ValueError(
                    f"part {plane!r}: {stream} bytes don't hold {count} symbols in chunks of "
                    f"{total} bytes together"
                )

    def decode(
        self,
        parts: dict[str, Tensor],
        name: str,
        count: int,
        bits: int,
        decoder: Decoder,
        out: Tensor | None = None,
    ) -> Tensor:
        if bits <= 8:
            if f"{name}_lengths" not in parts:
                return Raw().decode(parts, name, count, bits, decoder, out)
            code = self._plane(parts, name, count, bits)
            to = None if out is None else out.view(torch.uint8)
            return sign_extend(decoder.symbols(*code, count, self.chunk_size, to), bits)
        planes = [
            self._plane(parts, plane, count, width) for plane, width in self._planes(name, bits)
        ]
        like = parts[f"{name}_0"]
        codes = decoder.empty(count, like, code_dtype(bits)) if out is None else out
        decoder.planes(codes, *map(list, zip(*planes, strict=True)), self.chunk_size, self._turned)
        return codes if bits % 8 == 0 else codes.copy_(sign_extend(codes, bits))

    def _plane(
        self, parts: dict[str, Tensor], name: str, count: int, bits: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The stream of a plane, its offsets and code lengths; of a raw one the symbols, and
        nothing."""
        data = parts[name]
        if f"{name}_lengths" not in parts:
            symbols = data if bits == 8 else unpack_bits(data, count, bits)
            return symbols, data.new_empty(0, dtype=torch.int64), data.new_empty(0)
        sizes = parts[f"{name}_sizes"].to(torch.int64)
        table = parts[f"{name}_lengths"]
        lengths = unpack_bits(table, 2 * table.numel(), 4)
        return data, torch.nn.functional.pad(sizes.cumsum(0), (1, 0)), lengths


@dataclass(frozen=True)
class _FloatHuffman(Huffman):
    """`Huffman` of the codes of floats; a file knows no other name than that."""

    _turned: ClassVar[bool] = True


def is_coded(parts: Iterable[str]) -> bool:
    """Whether any stream of a packed tensor, by the names of its parts, is Huffman-coded: one that
    would gain too little is stored raw."""
    return any(name.endswith("_lengths") for name in parts)


def _nbytes(parts: dict[str, Tensor]) -> int:
    return sum(part.nbytes for part in parts.values())
