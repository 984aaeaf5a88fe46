"""on_huge_pages: the same tensor in memory that a kernel streams faster."""

from __future__ import annotations

import copy
import gc
import io
import mmap
import pickle
import sys

import pytest
import torch

import compressops as co
from compressops.ops import huge_pages
from compressops.ops.huge_pages import (
    KEPT,
    PAGE,
    empty_on_huge_pages,
    empty_to_keep,
    on_huge_pages,
)

linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages to ask for")


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-100, 100, shape).to(dtype)


CASES = [
    ((PAGE,), torch.int8),
    ((PAGE + 1,), torch.uint8),
    ((1 << 20, 3), torch.int8),
    ((1025, 1023), torch.float32),
    ((5, 7, 64, 1024), torch.bfloat16),
]


@linux
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_a_copy_at_the_start_of_a_page(shape, dtype):
    tensor = random(shape, dtype)
    found = on_huge_pages(tensor)
    assert found.data_ptr() % PAGE == 0
    assert found.data_ptr() != tensor.data_ptr()
    assert found.is_contiguous()
    assert found.dtype == dtype
    assert found.untyped_storage().nbytes() == tensor.nbytes
    assert torch.equal(found, tensor)


@linux
def test_strides_and_the_source_may_go():
    tensor = random((3000, 1000), torch.int8)
    strided = on_huge_pages(tensor.t())
    assert strided.is_contiguous()
    expected = tensor.t().clone()
    del tensor
    gc.collect()
    assert torch.equal(strided, expected)
    view = strided[500:]
    del strided
    gc.collect()
    assert torch.equal(view, expected[500:])


@linux
def test_it_is_copied_saved_and_written_as_any_tensor():
    tensor = on_huge_pages(random((PAGE,), torch.int8))
    file = io.BytesIO()
    torch.save(tensor, file)
    assert file.tell() < PAGE + 4096
    file.seek(0)
    copies = copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), torch.load(file)
    for other in copies:
        assert torch.equal(other, tensor)
    tensor.fill_(3)
    assert tensor.sum(dtype=torch.int64) == 3 * PAGE
    assert not torch.equal(copies[0], tensor)


def mapped(address: int) -> bool:
    with open("/proc/self/maps") as lines:
        for line in lines:
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            if start <= address < end:
                return True
    return False


@linux
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it has no /proc")
def test_memory_is_given_back():
    tensor = on_huge_pages(torch.zeros(16 * PAGE, dtype=torch.int8))
    address = tensor.data_ptr() + 8 * PAGE
    assert mapped(address)
    del tensor
    gc.collect()
    assert not mapped(address)


def test_what_stays_as_it_is():
    class Own(torch.Tensor):
        pass

    for tensor in (
        torch.zeros(PAGE - 1, dtype=torch.int8),
        torch.zeros(0),
        torch.zeros(PAGE, device="meta"),
        torch.zeros(PAGE).as_subclass(Own),
        torch.nn.Parameter(torch.zeros(PAGE)),
    ):
        assert on_huge_pages(tensor) is tensor


def test_systems_without_huge_pages(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            raise OSError(22, "Invalid argument")

    tensor = random((PAGE + 5,), torch.int8)
    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert torch.equal(on_huge_pages(tensor), tensor)
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert on_huge_pages(tensor) is tensor


@linux
def test_packed_weights_are_there_and_multiply_the_same(monkeypatch):
    x = torch.randn(2, 2048)
    codes = torch.randint(-8, 8, (2064, 2048), dtype=torch.int8)
    scales = torch.rand(2064, 16)
    ternary = torch.randint(-1, 2, (4128, 2048), dtype=torch.int8)

    def packed() -> list[tuple]:
        return [
            (co.ops.int8_linear_pack(codes), lambda w, s: (x, w, torch.ones(2064), s)),
            (
                co.ops.int4_linear_pack(codes, scales, None, 128),
                lambda w, s, z: (x, w, s, z, 2064, 128),
            ),
            (
                co.ops.ternary_linear_pack(ternary, torch.ones(())),
                lambda w, s: (x, w, s, 4128),
            ),
        ]

    ops = (co.ops.int8_linear, co.ops.int4_linear, co.ops.ternary_linear)
    huge = packed()
    monkeypatch.setattr(huge_pages, "PAGE", 1 << 40)
    for op, (here, arguments), (there, _) in zip(ops, huge, packed(), strict=True):
        assert here[0].data_ptr() % PAGE == 0
        assert torch.equal(here[0], there[0])
        assert torch.equal(op(*arguments(*here)), op(*arguments(*there)))


@linux
def test_new_memory_on_huge_pages():
    like = torch.empty(0)
    large = empty_on_huge_pages(PAGE // 2 + 3, like, torch.bfloat16)
    assert large.data_ptr() % PAGE == 0
    assert large.shape == (PAGE // 2 + 3,)
    assert large.untyped_storage().nbytes() == large.nbytes
    large.fill_(2.0)
    small = empty_on_huge_pages(PAGE // 2 - 1, like, torch.bfloat16)
    assert (small.dtype, small.shape) == (torch.bfloat16, (PAGE // 2 - 1,))
    meta = empty_on_huge_pages(PAGE, torch.empty(0, device="meta"), torch.uint8)
    assert meta.is_meta
    assert empty_on_huge_pages(0, like, torch.uint8).numel() == 0


@linux
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it has no /proc")
def test_memory_to_keep_is_its_own():
    like = torch.empty(0)
    kept = empty_to_keep(KEPT // 4 + 3, like, torch.float32)
    assert kept.data_ptr() % mmap.PAGESIZE == 0
    assert kept.untyped_storage().nbytes() == kept.nbytes
    kept.fill_(2.0)
    address = kept.data_ptr()
    assert mapped(address)
    del kept
    gc.collect()
    assert not mapped(address)
    assert empty_to_keep(PAGE, like, torch.int8).data_ptr() % PAGE == 0
    assert empty_to_keep(KEPT - 1, like, torch.int8).shape == (KEPT - 1,)
    assert empty_to_keep(KEPT, torch.empty(0, device="meta"), torch.int8).is_meta
    assert empty_to_keep(0, like, torch.uint8).numel() == 0


@linux
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it has no /proc")
def test_int8_weights_are_packed_into_pages_of_their_own():
    codes = torch.randint(-128, 128, (400, 301), dtype=torch.int8)
    weight, sums = co.ops.int8_linear_pack(codes)
    address = weight.data_ptr()
    assert mapped(address)
    del weight
    gc.collect()
    assert not mapped(address)
    assert torch.equal(sums, codes.sum(1, dtype=torch.int32))
