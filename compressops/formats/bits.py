"""Codes of few bits without gaps between them."""

from __future__ import annotations

import torch
from torch import Tensor

from compressops.formats.planes import code_dtype, split_planes


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Lowest ``bits`` bits of each code, lowest bit first, without gaps.

    Args:
        codes: integers ``[N]``.
        bits: 1 to 16, or 32.

    Returns:
        uint8 ``[ceil(N · bits / 8)]``; unused bits of the last byte are 0.
    """
    if bits in (8, 16, 32):
        # A copy: what is packed must not change with what it was packed from.
        return codes.to(code_dtype(bits), copy=True).view(torch.uint8)
    if bits > 8:
        low, high = split_planes(codes, bits)
        position = torch.arange(bits, device=codes.device)
        spread = torch.stack([low, high], 1).to(torch.int32)
        flags = (spread[:, position // 8] >> (position % 8)) & 1
        return pack_bits(flags.flatten(), 1)
    count = codes.numel()
    if 8 % bits == 0:
        each = 8 // bits
        low = torch.nn.functional.pad(codes.to(torch.uint8) & (2**bits - 1), (0, -count % each))
        first, *others = low.view(-1, each).unbind(1)
        data = first.clone()
        for i, other in enumerate(others, 1):
            data |= other << (i * bits)
        return data
    # Eight codes fill `bits` bytes exactly and fit one int64.
    grouped = torch.nn.functional.pad(codes, (0, -count % 8)).view(-1, 8)
    words = torch.zeros(len(grouped), dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= (grouped[:, i].to(torch.int64) & (2**bits - 1)) << (i * bits)
    shifts = torch.arange(bits, device=codes.device) * 8
    data = ((words[:, None] >> shifts) & 255).to(torch.uint8)
    return data.flatten()[: (count * bits + 7) // 8]


def unpack_bits(data: Tensor, count: int, bits: int) -> Tensor:
    """``count`` unsigned codes of ``bits`` bits: the inverse of :func:`pack_bits`.

    Returns:
        uint8 ``[count]`` for 1 to 8 bits, else int16 or int32 holding the bits.

    Raises:
        ValueError: ``data`` has another length, or unused bits that are not 0.
    """
    size = packed_nbytes(count, bits)
    if data.numel() != size:
        raise ValueError(f"{count} codes of {bits} bits take {size} bytes, got {data.numel()}")
    if bits in (8, 16, 32):
        # A copy: the parts must not change with what is unpacked from them.
        return data.clone().view(torch.uint8 if bits == 8 else code_dtype(bits))
    if (used := count * bits % 8) and int(data[-1]) >> used:
        raise ValueError(f"the bits behind {count} codes of {bits} bits are not zero")
    if bits > 8:
        flags = unpack_bits(data, count * bits, 1).view(count, bits)
        codes = torch.zeros(count, dtype=torch.int32, device=data.device)
        for i in range(bits):
            codes |= flags[:, i].to(torch.int32) << i
        return codes.to(torch.int16)
    if 8 % bits == 0:
        # Without integers of 8 bytes, which are 32 times as large as codes of 2 bits.
        codes = torch.empty((size, 8 // bits), dtype=torch.uint8, device=data.device)
        for i in range(8 // bits):
            codes[:, i] = data >> (i * bits)
        return codes.bitwise_and_(2**bits - 1).flatten()[:count]
    grouped = torch.nn.functional.pad(data, (0, -size % bits)).view(-1, bits)
    words = torch.zeros(len(grouped), dtype=torch.int64, device=data.device)
    for i in range(bits):
        words |= grouped[:, i].to(torch.int64) << (8 * i)
    codes = torch.empty((len(words), 8), dtype=torch.uint8, device=data.device)
    for i in range(8):
        codes[:, i] = (words >> (i * bits)) & (2**bits - 1)
    return codes.flatten()[:count]


def sign_extend(codes: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` bits as the signed integers that they are in two's complement, in place."""
    dtype = code_dtype(bits)
    codes, sign = codes.view(dtype), 1 << (bits - 1)
    # Not by shifts, which processors have none of for bytes.
    return codes.bitwise_xor_(sign).sub_(sign) if dtype.itemsize * 8 > bits else codes


def packed_nbytes(count: int, bits: int) -> int:
    return (count * bits + 7) // 8
