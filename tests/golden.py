"""What the golden file of format version 1 holds, made without any random number generator.

``python tests/golden.py`` writes the file: once for a released format version, and never again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from compressops.formats import (
    BlockSparse,
    Dense,
    DynamicFixedPoint,
    FixedPoint,
    Float,
    Huffman,
    Int,
    LowRank,
    PackedTensor,
    Raw,
    Sparse,
    Ternary,
)
from compressops.serialize import write

FILE = Path(__file__).parent / "data" / "golden_v1.safetensors"
MODULES = {
    "a": {"type": "PackedConv2d", "stride": [1, 1], "bias": False, "note": 'any "JSON", ünïcode'},
    "b": {"type": "PackedConv2d", "stride": [1, 1], "bias": True, "note": None},
    "c": {"type": "PackedLinear", "bias": False},
}
SHORT_CHUNKS = Huffman(max_length=9, chunk_size=50)


def weight(*shape: int, density: float = 1.0, seed: int = 1) -> Tensor:
    """Bell-shaped multiples of 1/64, exact in every dtype, the small ones pruned."""
    count = torch.Size(shape).numel()
    state = (torch.arange(count * 3, dtype=torch.int64) + 977 * seed) * 1103515245 + 12345
    draws = (state // 65536) % 97
    values = (draws.view(count, 3).sum(1) - 144).view(shape).to(torch.float32) / 64
    kept = int(count * density)
    threshold = values.abs().flatten().sort(descending=True).values[max(0, kept - 1)]
    return torch.where(values.abs() >= threshold, values, 0.0)


def tensors() -> dict[str, Tensor | PackedTensor]:
    """Every layout, number and coding, each at least once; ragged, empty and scalar ones too."""
    pack = PackedTensor.pack
    sparse = weight(8, 6, 3, 3, density=0.3)
    gaps = weight(1, 700, density=0.02)
    bf16 = weight(6, 11).to(torch.bfloat16)
    special = torch.tensor([0x7FC01234, -0x80000000, 0x7F800000, 1], dtype=torch.int32)
    packed = {
        "raw_float32": pack(special.view(torch.float32)),
        "planes_bfloat16": pack(weight(20, 33).to(torch.bfloat16), coding=Huffman()),
        "planes_float16": pack(weight(20, 33).to(torch.float16), Sparse(), coding=SHORT_CHUNKS),
        "float_upcast": pack(bf16.float(), number=Float("bfloat16")),
        "fixed_raw": pack(weight(5, 7), Dense(), FixedPoint(5, 3), Raw(), lossy=True),
        "fixed_wide": pack(weight(9, 9), Dense(), FixedPoint(11, 4), Huffman(), lossy=True),
        "fixed_wide_raw": pack(weight(3, 5), Dense(), DynamicFixedPoint(13), lossy=True),
        "sparse_mask": pack(
            sparse,
            Sparse("bitmask"),
            DynamicFixedPoint(6),
            SHORT_CHUNKS,
            mask=sparse != 0,
            lossy=True,
        ),
        "sparse_gaps": pack(gaps, Sparse("gaps"), DynamicFixedPoint(6), Huffman(), lossy=True),
        "sparse_gaps_raw": pack(gaps, Sparse("gaps"), Ternary("row"), lossy=True),
        "sparse_zero": pack(torch.zeros(4, 200), Sparse("gaps"), Int(8), Huffman()),
        "sparse_asymmetric": pack(
            sparse.to(torch.float16), Sparse(), Int(4, 8, symmetric=False), Huffman(), lossy=True
        ),
        "int8_rows": pack(bf16, number=Int(8), coding=Huffman(), lossy=True),
        "int3_ragged": pack(weight(4, 10), number=Int(3, 4, symmetric=False), lossy=True),
        "ternary_tensor": pack(weight(12, 12), number=Ternary(), coding=SHORT_CHUNKS, lossy=True),
        "ternary_groups": pack(weight(3, 10), number=Ternary("group", 4, 0.5), lossy=True),
        "blocks": pack(
            weight(10, 7) * torch.eye(5).repeat_interleave(2, 0).repeat_interleave(2, 1)[:, :7],
            BlockSparse((4, 3)),
            Int(8),
            Huffman(),
            lossy=True,
        ),
        "scalar": pack(torch.tensor(-0.5), number=Int(8)),
        "empty": pack(torch.empty(0, 3), Sparse(), Ternary("group", 2), Huffman()),
    }
    u = pack(weight(6, 2, seed=2), number=Int(8), coding=Raw(), lossy=True)
    v = pack(weight(2, 12, density=0.5), Sparse(), DynamicFixedPoint(6), Huffman(), lossy=True)
    packed["low_rank"] = PackedTensor.from_factors([u, v], (6, 4, 3), torch.bfloat16)
    for form, rank in (("spatial", 2), ("tucker", (2, 3)), ("cp", 5)):
        layout = LowRank(rank, form)
        factors = [
            pack(weight(*shape, seed=5 + i), number=number, lossy=True)
            for i, (shape, number) in enumerate(
                zip(
                    layout.factor_shapes((4, 3, 3, 2)).values(),
                    (DynamicFixedPoint(6), Int(8), Int(4, 2)),
                    strict=False,
                )
            )
        ]
        packed[f"low_rank_{form}"] = PackedTensor.from_factors(
            factors, (4, 3, 3, 2), torch.float32, layout
        )
    plain = {
        "plain.running_mean": weight(5),
        "plain.running_var": weight(200, seed=3).square() + 1 / 3,
        "plain.bias": weight(60, seed=4) / 3,
        "plain.scalar": torch.tensor(-1.5),
        "plain.num_batches_tracked": torch.tensor(7),
        "plain.flags": torch.tensor([True, False, True]),
        "plain.more_flags": torch.tensor([[False], [True]]),
        "plain.empty": torch.empty(2, 0, dtype=torch.float16),
        "plain.bfloat16": weight(3).to(torch.bfloat16),
        "plain.more_bfloat16": weight(2, 2).to(torch.bfloat16),
    }
    plain["plain.tied"] = plain["plain.running_mean"]
    return packed | {"tied": packed["blocks"]} | plain


if __name__ == "__main__":
    if FILE.exists():
        raise SystemExit(f"{FILE} is there already: a golden file never changes")
    print(write(FILE, tensors(), MODULES, SHORT_CHUNKS), "bytes")
