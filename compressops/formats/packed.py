"""PackedTensor: a weight as one choice of layout, number and coding, exact to the bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressops.formats import checks
from compressops.formats.coding import Coding, Decoder, Encoder, Raw, huffman_encode_reference
from compressops.formats.decompose import decompose
from compressops.formats.layout import Dense, Layout
from compressops.formats.lowrank import LowRank
from compressops.formats.number import FLOAT_DTYPES, Float, Number, check_dtype, check_weight
from compressops.formats.registry import check_int

_PART_DTYPES = {"bytes": torch.uint8, "sizes": torch.uint16}


@dataclass(frozen=True, eq=False, repr=False)
class PackedTensor:
    """A weight in packed form: what flows between compressing, saving and running.

    Attributes:
        shape: of the weight.
        dtype: of the weight: float32, bfloat16 or float16.
        layout, number, coding: the three choices.
        parts: the stored tensors by name, in the order of the file.
        meta: the counts that decoding needs (``docs/FORMAT.md``), and ``kept``, the entries that
            the mask keeps, where they are not those that are stored.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    number: Number
    coding: Coding
    parts: dict[str, Tensor]
    meta: dict[str, Any]

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        layout: Layout | None = None,
        number: Number | None = None,
        coding: Coding | None = None,
        params: dict[str, Tensor] | None = None,
        mask: Tensor | None = None,
        *,
        lossy: bool = False,
        encoder: Encoder = huffman_encode_reference,
    ) -> PackedTensor:
        """Pack the dense weight that the compressed model computes with; the parts are where it is.

        Args:
            weight: float32, bfloat16 or float16, any shape and device.
            layout: default ``Dense()``. ``LowRank`` factorises (so it needs ``lossy``);
                :meth:`from_factors` takes factors that exist.
            number: default ``Float`` of the weight's dtype.
            coding: default ``Raw()``.
            params: the number's parameters; ``None`` fits them to ``weight``.
            mask: bool, of the weight's shape: the entries that pruning kept. The others must be
                0; the accounting counts those that it keeps.
            lossy: quantize ``weight`` instead of refusing one that is not on the grid.
            encoder: a kernel instead of the reference.

        Raises:
            ValueError: ``unpack()`` would not give ``weight`` back bit for bit; NaN or infinities
                in a number that has none; a dtype that is none of the three; parameters or a mask
                of another shape.
        """
        weight = weight.detach()
        layout, coding = layout or Dense(), coding or Raw()
        number = number or Float(check_dtype(weight.dtype))
        (check_dtype(weight.dtype) if number.is_float else check_weight(weight))
        if mask is not None:
            checks.check_mask(weight, mask)
        if isinstance(layout, LowRank):
            if params is not None:
                raise ValueError("LowRank: params belong to a factor; use from_factors")
            how = {"number": number, "coding": coding, "lossy": lossy, "encoder": encoder}
            factors = [cls.pack(factor, **how) for factor in decompose(layout, weight)]
            packed = cls.from_factors(factors, tuple(weight.shape), weight.dtype, layout)
            if mask is not None:
                packed.meta["kept"] = int(mask.sum())
            if not lossy:
                checks.check_same_bits(weight, packed.unpack(), packed.layout)
            return packed
        params = number.fit(weight) if params is None else params
        shape, device = tuple(weight.shape), weight.device
        number.check_params(params, shape)
        codes = number.quantize(weight, params)
        values = number.dequantize(codes, params, weight.dtype)
        if not lossy:
            checks.check_same_bits(weight, values, number)
        keep = checks.bits_of(values) != 0
        layout, parts, meta = layout.encode(
            codes.cpu(), keep.cpu(), number.bits, coding.of(number.is_float), encoder
        )
        parts = {name: part.to(device) for name, part in parts.items()}
        # A copy: what is packed doesn't change with what is trained on.
        parts |= {
            name: params[name].detach().to(device).clone() for name in number.param_shapes(shape)
        }
        if mask is not None and (kept := int(mask.sum())) != layout.stored(shape, meta):
            meta["kept"] = kept
        return cls(shape, weight.dtype, layout, number, coding, parts, meta)

    @classmethod
    def from_factors(
        cls,
        factors: Sequence[PackedTensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        layout: LowRank | None = None,
    ) -> PackedTensor:
        """The low-rank weight of packed factors.

        Args:
            factors: in the order of the layout's ``names``, of its ``factor_shapes``.
            shape, dtype: of the weight.
            layout: ``None``: u ``[rows, rank]`` @ v ``[rank, columns]``.

        Raises:
            ValueError: the factors don't fit each other or ``shape``, have a rank above that of
                any such weight, or are low-rank themselves.
        """
        shapes = [tuple(factor.shape) for factor in factors]
        if layout is None:
            layout = LowRank(max(1, shapes[0][-1] if shapes and shapes[0] else 1))
        layout.check_shapes(shapes, tuple(shape))
        named = dict(zip(layout.names, factors, strict=True))
        for name, factor in named.items():
            if isinstance(factor.layout, LowRank):
                raise ValueError(f"factor {name} is low-rank itself")
        parts = {f"{n}_{k}": part for n, f in named.items() for k, part in f.parts.items()}
        meta = {name: factor.to_spec() for name, factor in named.items()}
        return cls(tuple(shape), dtype, layout, factors[0].number, factors[0].coding, parts, meta)

    def factors(self) -> tuple[PackedTensor, ...]:
        """The factors of a low-rank weight, in the order of the layout's ``names``.

        Raises:
            ValueError: the layout is not ``LowRank``.
        """
        if not isinstance(self.layout, LowRank):
            raise ValueError(f"only LowRank has factors, this layout is {self.layout}")
        named = ((self.meta[name], checks.subset(self.parts, name)) for name in self.layout.names)
        return tuple(_from_spec_unchecked(*factor) for factor in named)

    def unpack(self, decoder: Decoder | None = None, out: Tensor | None = None) -> Tensor:
        """The dense weight, bit for bit: ``shape``, ``dtype``, on the parts' device.

        Args:
            decoder: kernels instead of the references.
            out: where the weight goes: of its shape and device, any float dtype (to which values
                are rounded once) and strides. ``None``: into a tensor of its own.

        Raises:
            ValueError: the parts are corrupt.
        """
        if isinstance(self.layout, LowRank):
            factors = [factor.unpack(decoder) for factor in self.factors()]
            weight = self.layout.product(factors, self.shape, self.dtype)
            return weight if out is None else out.copy_(weight)
        if self._decodes_into(out):
            how, like = decoder or Decoder(), next(iter(self.parts.values()))
            count, bits, dtype = math.prod(self.shape), self.number.bits, self.number.code_dtype
            codes = how.empty(count, like, dtype) if out is None else out.view(dtype).view(-1)
            self.coding.of(True).decode(self.parts, "codes", count, bits, how, codes)
            return codes.view(self.dtype).view(self.shape) if out is None else out
        codes = self.dense_codes(decoder)
        return self.number.dequantize_into(out, codes, self.params, self.dtype)

    def _decodes_into(self, out: Tensor | None) -> bool:
        """Whether the codes are the floats that ``out`` holds, in its order; ``None`` is new."""
        plain = self.number.is_float and FLOAT_DTYPES[self.number.dtype] == self.dtype
        fits = out is None or (out.dtype == self.dtype and out.is_contiguous())
        return plain and isinstance(self.layout, Dense) and fits

    def dense_codes(self, decoder: Decoder | None = None, out: Tensor | None = None) -> Tensor:
        """The integer codes that ``number.dequantize`` takes: signed, of ``shape`` (in ``out``,
        contiguous, if that is given); an entry that is not stored has the code of 0.0.

        Raises:
            ValueError: the parts are corrupt, or the layout is ``LowRank``.
        """
        if isinstance(self.layout, LowRank):
            raise ValueError("a LowRank weight has no codes of its own; its factors() have")
        bits, coding = self.number.bits, self.coding.of(self.number.is_float)
        decoder = decoder or Decoder()
        if isinstance(self.layout, Dense):
            flat, count = None if out is None else out.view(-1), math.prod(self.shape)
            return coding.decode(self.parts, "codes", count, bits, decoder, flat).view(self.shape)
        like = next(iter(self.parts.values()))
        zero = like.new_empty(self.shape, dtype=self.number.code_dtype) if out is None else out
        self.number.zero_codes(zero, self.params)
        codes = self.layout.decode(self.parts, self.meta, zero, bits, coding, decoder)
        return codes if out is None else out.copy_(codes)

    def __repr__(self) -> str:
        axes = f"{self.layout} × {self.number} × {self.coding}"
        return f"PackedTensor({list(self.shape)}, {self.dtype}, {axes}, {self.nbytes} bytes)"

    @property
    def params(self) -> dict[str, Tensor]:
        """The number's parameters: see its ``param_shapes``; ``{}`` for ``LowRank``."""
        if isinstance(self.layout, LowRank):
            return {}
        return {name: self.parts[name] for name in self.number.param_shapes(self.shape)}

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, exact: what the file stores."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def density(self) -> float:
        """Fraction of the entries that are kept by the mask, or else stored; 1.0 if there are
        none."""
        numel = math.prod(self.shape)
        if not numel:
            return 1.0
        if "kept" in self.meta:
            return self.meta["kept"] / numel
        if isinstance(self.layout, LowRank):
            return sum(f.density * math.prod(f.shape) for f in self.factors()) / numel
        return min(1.0, self.layout.stored(self.shape, self.meta) / numel)

    @property
    def ideal_nbytes(self) -> float:
        """weights × density × bits / 8: the accounting of papers, no indices, scales or tables."""
        if isinstance(self.layout, LowRank):
            return sum(factor.ideal_nbytes for factor in self.factors())
        return math.prod(self.shape) * self.density * self.number.bits / 8

    def to(self, device: torch.device | str) -> PackedTensor:
        """The same weight with its parts on ``device``."""
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})

    def to_spec(self) -> dict[str, Any]:
        """Everything but the parts' bytes, JSON-serialisable; ``parts`` gives their sizes."""
        return {
            "shape": list(self.shape),
            "dtype": check_dtype(self.dtype),
            "layout": self.layout.to_spec(),
            "number": self.number.to_spec(),
            "coding": self.coding.to_spec(),
            "meta": dict(self.meta),
            "parts": {name: part.nbytes for name, part in self.parts.items()},
        }

    def to_blob(self) -> Tensor:
        """uint8 ``[nbytes]`` on the CPU: all parts in their order, without padding."""
        flat = [part.detach().cpu().flatten().view(torch.uint8) for part in self.parts.values()]
        return torch.cat([torch.empty(0, dtype=torch.uint8), *flat])

    @classmethod
    def from_spec(
        cls, spec: dict[str, Any], parts: dict[str, Tensor], max_entries: int | None = None
    ) -> PackedTensor:
        """The packed tensor that ``to_spec`` described, everything checked but the coded bits
        themselves (``unpack`` checks those).

        Args:
            spec: of ``to_spec``.
            parts: of those names, dtypes and shapes.
            max_entries: allow a weight of so many entries, where that is more than the limit: 2^24,
                and 4096 per stored byte.

        Raises:
            ValueError: which names what is wrong and its value.
        """
        packed = _from_spec_unchecked(spec, parts)
        expected = packed._part_shapes(set(parts))
        if list(parts) != list(expected):
            raise ValueError(f"parts must be {', '.join(expected)}, got {', '.join(parts)}")
        for name, (dtype, size) in expected.items():
            part = parts[name]
            size = (part.numel(),) if size is None else size
            if part.dtype != dtype or tuple(part.shape) != size:
                raise ValueError(
                    f"part {name!r} must be {dtype} {list(size)}, "
                    f"got {part.dtype} {list(part.shape)}"
                )
        packed._check(max_entries)
        if (sizes := packed.to_spec()["parts"]) != spec["parts"]:
            raise ValueError(f"parts must have {spec['parts']} bytes, got {sizes}")
        return packed

    @classmethod
    def from_blob(
        cls,
        spec: dict[str, Any],
        blob: Tensor,
        max_entries: int | None = None,
    ) -> PackedTensor:
        """The inverse of ``to_blob``: ``blob`` is uint8 ``[nbytes]``, and aligned parts stay in its
        memory; see :meth:`from_spec`."""
        packed = _from_spec_unchecked(spec, {})
        sizes = spec["parts"]
        for name, size in sizes.items():
            check_int("part", repr(name), size, 0, blob.numel())
        if sum(sizes.values()) != blob.numel():
            raise ValueError(f"parts of {sum(sizes.values())} bytes in a blob of {blob.numel()}")
        expected = packed._part_shapes(set(sizes))
        if list(sizes) != list(expected):
            raise ValueError(f"parts must be {', '.join(expected)}, got {', '.join(sizes)}")
        parts = checks.parts_of_blob(blob, sizes, expected)
        return cls.from_spec(spec, parts, max_entries)

    @classmethod
    def describe(cls, spec: dict[str, Any]) -> PackedTensor:
        """What a spec says, without parts: for ``density`` and ``ideal_nbytes``.

        Raises:
            ValueError: the spec is not that of a packed tensor.
        """
        packed = _from_spec_unchecked(spec, {})
        packed._part_shapes(set(spec["parts"]))
        packed._check_kept()
        return packed

    def work(self, allowed: int = 0) -> int:
        """Entries that decoding takes in memory, more for a low-rank weight; 0 if ``allowed``."""
        entries, rank = self._size()
        return 0 if entries <= allowed else checks.decoding_work(entries, rank)

    def _size(self) -> tuple[int, int]:
        """Entries in memory, and the rank, 0 where there is none."""
        rank = self.layout.products if isinstance(self.layout, LowRank) else 0
        return self.layout.buffer_size(self.shape), rank

    def _check_kept(self) -> None:
        if "kept" in self.meta:
            check_int("meta", "kept", self.meta["kept"], 0, math.prod(self.shape))

    def _streams(self) -> dict[str, tuple[int, int]]:
        counts = {name: value for name, value in self.meta.items() if name != "kept"}
        return self.layout.streams(self.shape, counts, self.number.bits)

    def _part_shapes(
        self, present: set[str]
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...] | None]]:
        """dtype and shape of each part in order; shape None: a vector as long as it is."""
        if isinstance(self.layout, LowRank):
            return {
                f"{n}_{part}": value
                for n in self.layout.names
                for part, value in _from_spec_unchecked(self.meta[n], {})
                ._part_shapes(set(checks.subset(dict.fromkeys(present), n)))
                .items()
            }
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...] | None]] = {}
        for name, (_, bits) in self._streams().items():
            for part, kind in self.coding.part_dtypes(name, bits, present):
                shapes[part] = _PART_DTYPES[kind], None
        return shapes | self.number.param_shapes(self.shape)

    def _check(self, max_entries: int | None) -> None:
        entries, rank = self._size()
        checks.check_entries(self.shape, entries, rank, self.nbytes, max_entries)
        self._check_kept()
        if rank:
            factors = [
                PackedTensor.from_spec(self.meta[n], checks.subset(self.parts, n), max_entries)
                for n in self.layout.names
            ]
            rebuilt = PackedTensor.from_factors(factors, self.shape, self.dtype, self.layout)
            if (rebuilt.number, rebuilt.coding) != (given := (self.number, self.coding)):
                raise ValueError(f"LowRank: {given} is not what its factor u has")
            return
        for name, (count, bits) in self._streams().items():
            self.coding.check(self.parts, name, count, bits)
        self.number.check_params(self.params, self.shape)
        if not self.number.is_float:
            for name, param in self.params.items():
                if param.is_floating_point() and not checks.all_finite(param):
                    raise ValueError(f"{name} holds NaN or infinite values")


def _from_spec_unchecked(spec: dict[str, Any], parts: dict[str, Tensor]) -> PackedTensor:
    """Axes, shape and meta are checked by themselves; whether they fit ``parts`` is not."""
    shape, dtype = checks.check_spec(spec)
    meta = spec["meta"]
    layout = Layout.from_spec(spec["layout"])
    number = Number.from_spec(spec["number"])
    coding = Coding.from_spec(spec["coding"])
    if isinstance(layout, LowRank):
        layout.factor_shapes(shape)
        checks.check_factors(meta, layout.names)
    return PackedTensor(shape, dtype, layout, number, coding, parts, meta)
