"""What a file writes once: small tensors under one pair of hashes, options that modules share."""

from __future__ import annotations

import zlib

import pytest
import torch

import compressops as co
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
        bytes_of = pools.stored_nbytes(tensors, pools.build(tensors, coding or Raw()))
        assert bytes_of == sum(t.stored_nbytes for t in by_name.values())
    assert sizes[Huffman()] < 0.95 * sizes[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mmap", [False, True])
def test_large_floats_are_coded_alone_bit_for_bit(tmp_path, dtype, mmap):
    large = torch.randn(3, 200, 256).mul(0.02).to(dtype)
    integers = {torch.float32: torch.int32}.get(dtype, torch.int16)
    large[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    large.view(integers)[0, 0, 4] = torch.iinfo(integers).max - 1  # a NaN with a payload
    tensors = {"experts": large, "steps": torch.arange(2**14), "turned": large.mT}
    tensors["tied"] = large
    write(tmp_path / "file", tensors, coding=Huffman())
    contents = read(tmp_path / "file", mmap=mmap)
    assert contents.aliases == {"tied": "experts"}
    assert not contents.packed
    for name, tensor in contents.tensors.items():
        bits = torch.int64 if name == "steps" else integers
        assert tensor.shape == tensors[name].shape
        assert torch.equal(tensor.view(bits), tensors[name].contiguous().view(bits))
    info = inspect(tmp_path / "file")
    by_name = {t.name: t for t in info.tensors}
    assert by_name["experts"].pooled == {"experts": (3, 200, 256)}
    # Of the sixteen bits of a float16, eight are coded: three of them are of the mantissa.
    worth = 0.95 if dtype == torch.float16 else 0.9 if dtype == torch.float32 else 0.75
    assert by_name["experts"].stored_nbytes < worth * large.nbytes
    assert by_name["steps"].coding is None
    (line,) = (line for line in str(info).splitlines() if "experts" in line)
    assert "3×200×256" in line
    assert "small tensors" not in str(info)


def test_what_no_module_packs_is_coded_beside_what_one_does(tmp_path):
    """Experts of a mixture are parameters without a layer of their own."""

    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.left = torch.nn.Linear(64, 300)
            self.gate = torch.nn.Linear(300, 300)
            self.experts = torch.nn.Parameter(torch.randn(300, 64, 2) * 0.02)

        def forward(self, x):
            return self.gate(self.left(x)).softmax(-1) @ (x @ self.experts).sum(1)

    model, x = Mixture(), torch.randn(5, 64)
    packed = co.convert(model, {"gate": co.Huffman()})
    size = co.save(packed, tmp_path / "file")
    assert size < 0.9 * sum(p.nbytes for p in model.parameters())
    stored = sum(t.stored_nbytes for t in inspect(tmp_path / "file").tensors)
    left, gate = co.report(packed).layers
    totals = co.report(packed).totals
    assert totals.stored + totals.other_stored == stored
    assert (left.coding, gate.coding) == ("Huffman", "Huffman")
    assert (left.residency, gate.residency) == ("plain", "decoded")
    assert left.stored < 0.9 * left.dense
    assert totals.other_stored < 0.9 * totals.other
    for mmap in (False, True):
        loaded = co.load(tmp_path / "file", Mixture, mmap=mmap)
        assert torch.equal(loaded(x), model(x))
    # Without a coding it is stored as it is.
    co.save(model, tmp_path / "file")
    assert {t.name for t in inspect(tmp_path / "file").tensors if t.coding} == set()


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
