"""What a file writes once: small tensors under one pair of hashes, options that modules share."""

from __future__ import annotations

import zlib

import pytest
import torch

from compressops.formats import (
    Huffman,
    Raw,
    pools,
)
from compressops.serialize import (
    inspect,
    read,
    write,
)


def batch_norms(count: int = 6) -> dict[str, torch.Tensor]:
    tensors = {}
    for i in range(count):
        tensors[f"{i}.weight"] = torch.rand(100) + 0.5
        tensors[f"{i}.running_mean"] = torch.randn(100)
        tensors[f"{i}.steps"] = torch.tensor(7)
    return tensors


def test_small_tensors_are_pooled_and_coded(tmp_path):
    tensors = batch_norms() | {"large": torch.randn(2**14 + 1), "limit": torch.randn(2**14)}
    sizes = {}
    for coding in (None, Huffman()):
        sizes[coding] = write(tmp_path / "file", tensors, coding=coding)
        contents = read(tmp_path / "file")
        assert set(contents.tensors) == set(tensors)
        for name, tensor in contents.tensors.items():
            assert torch.equal(tensor, tensors[name])
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        by_name = {t.name: t for t in inspect(tmp_path / "file").tensors}
        assert set(by_name) == {"large", "__F32__", "__I64__"}
        assert by_name["__F32__"].coding == (coding and "Huffman")
        assert by_name["__I64__"].coding is None
        bytes_of = pools.stored_nbytes(tensors, coding or Raw())
        assert bytes_of == sum(t.stored_nbytes for t in by_name.values())
    assert sizes[Huffman()] < 0.95 * sizes[None]


def test_noise_is_not_coded(tmp_path):
    noise = torch.randint(-(2**31), 2**31, (3, 4000), dtype=torch.int32).view(torch.float32)
    write(tmp_path / "file", dict(zip("abc", noise, strict=True)), coding=Huffman())
    (pool,) = inspect(tmp_path / "file").tensors
    assert pool.coding is None
    back = read(tmp_path / "file").tensors
    for name, tensor in zip("abc", noise, strict=True):
        assert torch.equal(back[name].view(torch.int32), tensor.view(torch.int32))


@pytest.mark.parametrize("coding", [None, Huffman()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_floats_take_16_bits(tmp_path, dtype, coding):
    tensors = {n: t.to(dtype).to(t.dtype) for n, t in batch_norms().items() if n[2:] != "steps"}
    tensors["0.weight"][:3] = torch.tensor([float("inf"), -0.0, 0.0])
    write(tmp_path / "file", tensors, coding=coding)
    (pool,) = inspect(tmp_path / "file").tensors
    assert pool.number == f"Float(dtype='{str(dtype).removeprefix('torch.')}')"
    assert pool.stored_nbytes <= 2 * sum(t.numel() for t in tensors.values())
    for name, tensor in read(tmp_path / "file").tensors.items():
        assert torch.equal(tensor.view(torch.int32), tensors[name].view(torch.int32))
    # Those that are not go apart.
    for name in ("1.weight", "2.weight"):
        tensors[name][0] = 1 + 2**-20
    write(tmp_path / "file", tensors, coding=coding)
    assert {t.name: len(t.pooled) for t in inspect(tmp_path / "file").tensors} == {
        pool.name: 10,
        "__F32__": 2,
    }


def test_names_of_pooled_tensors_can_be_aliases(tmp_path):
    tensors = batch_norms()
    tensors["tied"] = tensors["0.weight"]
    write(tmp_path / "file", tensors)
    contents = read(tmp_path / "file")
    assert contents.aliases == {"tied": "0.weight"}
    assert "tied" not in contents.tensors


def test_options_that_modules_share_are_written_once(tmp_path):
    options = {"stride": [1, 1], "padding_mode": "zeros", "bias": False}
    modules = {str(i): {"type": "Conv", "channels": i, **options} for i in range(9)}
    modules["3"] = {"type": "Conv", "channels": 3, "stride": [2, 2], "bias": False, "extra": None}
    modules["other"] = {"type": "Linear", "channels": 4}
    write(tmp_path / "file", {}, modules)
    assert read(tmp_path / "file").modules == inspect(tmp_path / "file").modules == modules
    data = (tmp_path / "file").read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    assert zlib.decompress(data[size:], -15).count(b"stride") == 2
