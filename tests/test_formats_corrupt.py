"""Broken specs and blobs: a ValueError or a weight of the promised shape, and little memory."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressops.formats import (
    BlockSparse,
    DynamicFixedPoint,
    Huffman,
    Int,
    PackedTensor,
    Raw,
    Sparse,
    Ternary,
)

PACKED = {k: v for k, v in golden.tensors().items() if isinstance(v, PackedTensor)}
JUNK = [None, -1, 0, 1, 2, 7, 255, 2**31, 2**63, 2**200, 0.5, True, "x", "auto", [], [1], {}, [-1]]


def decode(spec: Any, blob: torch.Tensor) -> None:
    """Read hostile input: only a ValueError may come of it, or a weight of the stated shape."""
    try:
        packed = PackedTensor.from_blob(spec, blob)
        weight = packed.unpack()
    except ValueError:
        return
    assert list(weight.shape) == spec["shape"]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of everything inside a JSON value."""
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in [(*path, k), *places(v, (*path, k))]]
    if isinstance(value, list):
        return [p for i, v in enumerate(value) for p in [(*path, i), *places(v, (*path, i))]]
    return []


@pytest.mark.parametrize("name", PACKED)
def test_every_field_of_the_spec_replaced_by_junk(name: str):
    blob = PACKED[name].to_blob()
    spec = json.loads(json.dumps(PACKED[name].to_spec()))
    for path in places(spec):
        for junk in JUNK:
            changed = copy.deepcopy(spec)
            owner = changed
            for key in path[:-1]:
                owner = owner[key]
            owner[path[-1]] = junk
            decode(changed, blob)
        del owner[path[-1]]
        decode(changed, blob)


@pytest.mark.parametrize("name", PACKED)
def test_random_changes_of_the_blob(name: str):
    blob, spec = PACKED[name].to_blob(), PACKED[name].to_spec()
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        changed = blob.clone()
        if len(changed):
            at = torch.randint(len(changed), (int(torch.randint(1, 4, ())),), generator=generator)
            noise = torch.randint(0, 256, at.shape, generator=generator)
            changed[at] = noise.to(torch.uint8)
        decode(spec, changed)
    decode(spec, blob[:-1])
    decode(spec, torch.cat([blob, blob[:1], torch.zeros(1, dtype=torch.uint8)]))


@settings(max_examples=200)
@given(data=st.data())
def test_specs_put_together_at_random(data: st.DataObject):
    names = data.draw(st.lists(st.sampled_from(sorted(PACKED)), min_size=2, max_size=4))
    specs = [PACKED[name].to_spec() for name in names]
    mixed = {key: data.draw(st.sampled_from(specs))[key] for key in specs[0]}
    mixed["shape"] = data.draw(st.lists(st.integers(0, 300), max_size=3) | st.just(mixed["shape"]))
    decode(mixed, PACKED[names[0]].to_blob())


def hostile(**changes: Any) -> dict[str, Any]:
    weight = torch.zeros(10, 10)
    weight[3, 4] = 1.0
    spec = PackedTensor.pack(weight, Sparse("gaps"), Ternary(), Raw()).to_spec()
    return {**spec, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [2**40, 2**40, 2**40]}, r"shape \[\d+, \d+, \d+\] is too large"),
        ({"shape": [0, 2**40, 2**40]}, "is too large"),
        ({"shape": [-1, 10]}, r"each of \[-1, 10\] must be an integer from 0 to"),
        ({"shape": [1] * 17}, "a list of at most 16"),
        ({"shape": [10**6, 10**6]}, r"1 gaps index neither 1 entries nor a weight of 10{12}"),
        ({"meta": {"count": 2, "gaps": 1}}, "1 gaps index neither 2 entries"),
        ({"meta": {"count": 101, "gaps": 1}}, "count must be an integer from 0 to 100, got 101"),
        ({"meta": {"count": 1}}, r"Sparse has meta \['count', 'gaps'\], got \['count'\]"),
        ({"meta": {"count": 1, "gaps": 1, "kept": 101}}, "kept must be .* got 101"),
        ({"dtype": "int8"}, "float32, bfloat16, float16, got 'int8'"),
        ({"parts": {"codes": 1, "index": 1, "scales": 4}}, "parts must be index, codes, scales"),
        ({"parts": {"index": 1, "codes": 5}}, "parts must be index, codes, scales, got index"),
        ({"parts": {"index": 1, "codes": 2, "scales": 3}}, "scales': 3 bytes are no whole"),
        ({"parts": {"index": 0, "codes": 2, "scales": 4}}, "1 codes of 8 bits take 1 bytes"),
        ({"parts": {"index": 1, "codes": 1, "scales": 5}}, "of 7 bytes in a blob of 6"),
        ({"layout": {"type": "Sparse", "index": "auto"}}, "'bitmask' or 'gaps', got 'auto'"),
        ({"layout": {"type": "LowRank", "rank": 1}}, "LowRank has meta u and v"),
        ({"extra": 1}, "a packed tensor's spec has"),
    ],
)
def test_errors_name_what_is_wrong(changes, message):
    blob = torch.tensor([34, 1, 0, 0, 128, 63], dtype=torch.uint8)
    assert PackedTensor.from_blob(hostile(), blob).unpack()[3, 4] == 1
    with pytest.raises(ValueError, match=message):
        PackedTensor.from_blob(hostile(**changes), blob)


def test_an_index_that_ends_elsewhere_is_refused():
    blob = torch.tensor([34, 1, 0, 0, 128, 63], dtype=torch.uint8)
    blob[0] = 100
    with pytest.raises(ValueError, match="index runs over 101 positions of a weight of 100"):
        PackedTensor.from_blob(hostile(), blob).unpack()
    blob[0] = 255
    with pytest.raises(ValueError, match="index runs over 255 positions"):
        PackedTensor.from_blob(hostile(), blob).unpack()


def test_params_that_are_not_finite_are_refused():
    blob = torch.tensor([34, 1, 0, 0, 128, 127], dtype=torch.uint8)
    with pytest.raises(ValueError, match="scales holds NaN or infinite values"):
        PackedTensor.from_blob(hostile(), blob)


def test_out_of_proportion_is_refused_until_allowed():
    pack = PackedTensor.pack
    rank_one = PackedTensor.from_factors(
        [pack(torch.ones(size), number=Ternary()) for size in ((5000, 1), (1, 50_000))],
        (5000, 50_000),
        torch.float32,
    )
    spec, blob = rank_one.to_spec(), rank_one.to_blob()
    with pytest.raises(ValueError, match="takes 250000000 entries in memory, more than the"):
        PackedTensor.from_blob(spec, blob)
    assert PackedTensor.from_blob(spec, blob, max_entries=250_000_000).shape == (5000, 50_000)
    with pytest.raises(ValueError, match="takes 250000000 entries"):
        PackedTensor.from_blob(spec, blob, max_entries=10)
    thin = pack(torch.zeros(1, 1000), BlockSparse((1, 1)), Int(8)).to_spec()
    thin |= {"shape": [1, 2**21], "layout": {"type": "BlockSparse", "block": [1024, 8]}}
    thin["parts"]["index"] = 2**15
    with pytest.raises(ValueError, match="entries in memory"):
        PackedTensor.from_blob(thin, torch.zeros(2**15 + 4, dtype=torch.uint8))


def test_nothing_but_zeros_still_reads_back():
    weight = torch.zeros(4096, 4096)
    packed = PackedTensor.pack(weight, Sparse(), DynamicFixedPoint(6), Huffman())
    assert packed.nbytes < 9000
    again = PackedTensor.from_blob(packed.to_spec(), packed.to_blob())
    assert torch.equal(again.unpack(), weight)


def test_the_largest_expansion_stays_within_the_limit():
    """A process with 1.5 GiB of address space to spare decodes what a kilobyte can expand to."""
    script = """
import resource, torch
from compressops.formats import PackedTensor
from cuda_on_cpu.huffman_streams import framed
import golden
spec = golden.tensors()["sparse_zero"].to_spec()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**29, resource.RLIM_INFINITY))
symbols = 8 * 1024
numel = 255 * symbols
spec |= {"shape": [1, numel], "meta": {"count": 0, "gaps": symbols}}
spec["parts"] = {"index": 1029, "index_sizes": 2, "index_lengths": 128, "codes": 0, "scales": 4}
table = torch.zeros(128, dtype=torch.uint8); table[-1] = 16
sizes = torch.tensor([1029], dtype=torch.uint16).view(torch.uint8)
blob = torch.cat([torch.from_numpy(framed(symbols * "0")), sizes, table,
                  torch.zeros(4, dtype=torch.uint8)])
assert PackedTensor.from_blob(spec, blob).unpack().shape == (1, numel)
print("whole")
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.stdout == "whole\n", result.stderr


def low_rank(rank: int, rows: int = 1, columns: int = 1) -> tuple[dict, torch.Tensor]:
    """Spec and blob of factors that store nothing but empty indices."""
    u, v = (
        PackedTensor.pack(torch.zeros(s), Sparse("gaps"), Ternary(), Huffman())
        for s in ((rows, rank), (rank, columns))
    )
    parts = {f"{n}_{k}": p for n, f in (("u", u), ("v", v)) for k, p in f.parts.items()}
    spec = u.to_spec() | {"shape": [rows, columns], "layout": {"type": "LowRank", "rank": rank}}
    spec["meta"] = {"u": u.to_spec(), "v": v.to_spec()}
    spec["parts"] = {name: part.nbytes for name, part in parts.items()}
    return spec, torch.cat([part.flatten().view(torch.uint8) for part in parts.values()])


def test_a_rank_above_that_of_the_matrix_is_refused():
    assert PackedTensor.from_blob(*low_rank(3, 3, 4)).unpack().shape == (3, 4)
    for rank, rows, columns in ((2**20, 1, 1), (4, 3, 4), (4, 4, 3)):
        spec, blob = low_rank(rank, rows, columns)
        for read in (PackedTensor.describe, lambda s, b=blob: PackedTensor.from_blob(s, b)):
            with pytest.raises(ValueError, match=f"rank {rank} of a {rows} × {columns} matrix"):
                read(spec)
    u, v = (PackedTensor.pack(torch.zeros(s)) for s in ((2, 3), (3, 2)))
    with pytest.raises(ValueError, match="rank 3 of a 2 × 2 matrix"):
        PackedTensor.from_factors([u, v], (2, 2), torch.float32)


def test_the_products_of_a_low_rank_weight_count():
    spec, blob = low_rank(4096, 4096, 4096)
    with pytest.raises(ValueError, match="takes 1073741824 entries' worth of work, more than the"):
        PackedTensor.from_blob(spec, blob)
    assert PackedTensor.from_blob(spec, blob, max_entries=2**24).layout.rank == 4096


def test_messages_repeat_no_huge_values():
    number = 10**4000
    blob = torch.tensor([34, 1, 0, 0, 128, 63], dtype=torch.uint8)
    for changes in (
        {"shape": [number]},
        {"shape": list(range(10**5))},
        {"meta": {"count": number, "gaps": 1}},
        {"dtype": "x" * 10**6},
        {"layout": {"type": "x" * 10**6}},
        {"layout": list(range(10**5))},
        {"number": {"type": "Int", "bits": number}},
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            PackedTensor.from_blob(hostile(**changes), blob)
        assert len(str(caught.value)) < 1000, changes.keys()
