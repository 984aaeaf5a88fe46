"""The peers of the Huffman ops on a GPU: their formats and rows, where there is no GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import huffman_gpu
import huffman_gpu_peers
from peers import MissingError


def bits_of(data: torch.Tensor) -> list[int]:
    return (data[:, None] >> torch.arange(7, -1, -1) & 1).flatten().tolist()


def decoded(parts: huffman_gpu_peers.DFloat11) -> torch.Tensor:
    """As DFloat11's threads do it, each from its gap on to the end of its bits."""
    *tables, lengths = parts.tables.tolist()
    bits = bits_of(parts.stream)
    fives = torch.tensor(bits_of(parts.gaps)).view(-1, 5)
    gaps = (fives << torch.arange(4, -1, -1)).sum(1).tolist()
    count = parts.sign_mantissa.numel()
    exponents = []
    for thread, gap in enumerate(gaps):
        if thread % huffman_gpu_peers.BLOCK_THREADS == 0:
            block = thread // huffman_gpu_peers.BLOCK_THREADS
            assert parts.positions[block] == min(len(exponents), count)
        begin = thread * huffman_gpu_peers.THREAD_BITS
        at = begin + gap
        while at < min(begin + huffman_gpu_peers.THREAD_BITS, len(bits)) and len(exponents) < count:
            table, next_byte = 0, at
            while True:
                byte = sum(b << (7 - i) for i, b in enumerate(bits[next_byte : next_byte + 8]))
                entry, next_byte = tables[table][byte], next_byte + 8
                if entry < huffman_gpu_peers.FIRST_TABLE:
                    break
                table = 256 - entry
            exponents.append(entry)
            at += lengths[entry]
    assert parts.positions[-1] == count
    low = parts.sign_mantissa.int()
    codes = (low & 0x80) << 8 | torch.tensor(exponents) << 7 | low & 0x7F
    return codes.to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("count", [5000, 40_001])
def test_dfloat11_takes_the_weight_in_its_own_format(count: int) -> None:
    weight = torch.randn(count).bfloat16()
    parts = huffman_gpu_peers.dfloat11_parts(weight)
    assert len(parts.tables) > 2  # codes of more than a byte occur
    assert parts.gaps.numel() * 8 == 5 * 512 * (parts.positions.numel() - 1)
    assert torch.equal(decoded(parts).view(torch.int16), weight.view(torch.int16))


def test_what_dfloat11_cannot_code_is_left_out() -> None:
    with pytest.raises(MissingError, match="exponents of 240"):
        huffman_gpu_peers.dfloat11_parts(torch.tensor([1e38, 1.0]).bfloat16())
    with pytest.raises(MissingError, match="fewer than 8 bits"):
        huffman_gpu_peers.dfloat11_parts(torch.ones(10).bfloat16())


def test_peers_that_are_not_there_are_left_out_with_the_reason(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.nvcomp", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert huffman_gpu_peers.peers(torch.randn(1000).bfloat16(), 1) == {}
    printed = capsys.readouterr().out
    assert "left out: DFloat11: it is not installed" in printed
    for name in ("ANS", "ANS, floats", "GDeflate, entropy", "Zstd", "Bitcomp"):
        assert f"left out: nvCOMP {name}: nvidia.nvcomp does not import" in printed


class Codec:
    """Of a library that stores data as they are; its Zstd loses them."""

    def __init__(self, algorithm: str, cuda_stream: int, **options: object) -> None:
        assert cuda_stream == 7
        self.algorithm, self.options = algorithm, options

    def encode(self, array: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(data=array, size=array.numel() // 2, item_size=1)

    def decompression_config(self, coded: SimpleNamespace) -> str:
        return "config"

    def decode(self, coded, out: torch.Tensor, decompression_config: str) -> None:
        assert decompression_config == "config"
        out.copy_(coded.data if self.algorithm != "Zstd" else coded.data + 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_rows_of_peers(monkeypatch, capsys, dtype: torch.dtype) -> None:
    library = SimpleNamespace(Codec=Codec, as_array=lambda source, cuda_stream: source)
    monkeypatch.setitem(sys.modules, "nvidia.nvcomp", library)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    side = SimpleNamespace(cuda_stream=7, wait_stream=lambda other: None)
    for name, made in (("Stream", side), ("current_stream", None)):
        monkeypatch.setattr(torch.cuda, name, lambda made=made: made)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    data, calls = torch.randn(1000).to(dtype), []

    def seconds(call, rounds: int) -> float:
        calls.append(call)
        return 2.0 if call is ours else 5.0

    def ours() -> None: ...

    first = huffman_gpu.row("huffman_decode", "cuda", "some", 2.0, 10**9)
    rows = list(huffman_gpu.with_peers(first, ours, data, seconds, 15))
    names = ["nvCOMP ANS", "nvCOMP GDeflate, entropy", "nvCOMP Bitcomp"]
    names += ["nvCOMP ANS, floats"] if dtype == torch.bfloat16 else []
    assert rows[0] == first
    assert [row["case"] for row in rows[1:]] == [f"some, {name}" for name in names]
    assert [row["peer"] for row in rows[1:]] == [f"{name} (0.500)" for name in names]
    assert all(row["× peer"] == 2.5 and row["µs"] == 2e6 for row in rows[1:])
    assert "left out: nvCOMP Zstd: it does not give the data back" in capsys.readouterr().out
