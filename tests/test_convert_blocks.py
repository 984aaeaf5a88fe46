"""convert() to block-sparse layers: only where measured faster; what the report says; the file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

sys.path.insert(0, str(Path(__file__).parent))
from convert_models import compressed, kinds
from test_nn_block_sparse import in_blocks

import compressops as co
from compressops import kernels
from compressops.compress import Encode, Prune
from compressops.formats import BlockSparse, Huffman, Int
from compressops.nn import (
    BlockSparseConv2d,
    BlockSparseInt8Linear,
    BlockSparseLinear,
    Int8Linear,
    PackedConv2d,
    PackedLinear,
)
from compressops.report import report
from compressops.rivals import break_even

X = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def pruned() -> nn.Module:
    torch.manual_seed(0)
    prune = Prune(density=0.25, granularity="block", block=(16, 1))
    return compressed(Net().eval(), prune, Encode(Huffman()))


def why(model: nn.Module, name: str) -> str:
    return model.conversion_notes[name].why


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Sets the µs that a layer of each class takes (``empty``: a block-sparse one of no blocks),
    and how many times Winograd is faster than what it is compared with. Gives what was timed."""

    def set_speeds(winograd: float = 0.5, empty: int = 2, **of: int) -> list[str]:
        timed = []

        def fake_times(functions: list[Callable[[], torch.Tensor]]) -> list[float]:
            assert len({function().shape for function in functions}) == 1
            layers = [function.__defaults__[0] for function in functions]
            names = [type_before_parametrizations(layer).__name__ for layer in layers]
            timed.extend(names)
            found = [getattr(layer, "block_density", 1.0) for layer in layers]
            return [
                (empty if not density else of[name]) * 1e-6
                for name, density in zip(names, found, strict=True)
            ]

        def fake_in_place(model: nn.Module, layers: dict, variants: dict, inputs: object) -> dict:
            timed.extend(type(before.__self__).__name__ for before, _ in variants.values())
            return {name: [[1e-4] * 8, [1e-4 / winograd] * 8] for name in variants}

        monkeypatch.setattr("compressops.rivals.median_times", fake_times)
        monkeypatch.setattr(kernels, "times_in_place", fake_in_place)
        return timed

    monkeypatch.setattr("compressops.backends.name", lambda op, device: "cpu")
    return set_speeds


def test_where_it_is_faster(speeds: Callable, tmp_path: Path) -> None:
    speeds(Conv2d=32, Linear=22, BlockSparseConv2d=12, BlockSparseLinear=42)
    model = pruned()
    packed = co.convert(model, example_inputs=X)
    assert type(packed.conv) is BlockSparseConv2d
    assert (
        "BlockSparseConv2d: measured 12 µs, dense 32 µs; density of blocks 25.0%, break-even 75.0%"
    ) in why(packed, "conv")
    assert type(packed.head) is PackedLinear
    assert (
        "BlockSparseLinear not used: measured 42 µs, dense 22 µs; density of blocks 25.0%, "
        "break-even 12.5%"
    ) in why(packed, "head")
    assert why(packed, "head").endswith("runs the dense kernel on decoded weights")
    # Which is as it was, its parametrizations too.
    torch.testing.assert_close(packed(X), model(X))
    assert "break-even 75.0%" in report(packed).layers[0].why
    co.save(packed, tmp_path / "net.safetensors")
    again = co.load(tmp_path / "net.safetensors", Net().eval())
    assert kinds(again) == kinds(packed)
    assert torch.equal(again(X), packed(X))


def test_winograd_is_a_rival(speeds: Callable) -> None:
    fast = {"Conv2d": 32, "Linear": 22, "BlockSparseConv2d": 12, "BlockSparseLinear": 12}
    timed = speeds(winograd=3.0, **fast)
    packed = co.convert(pruned(), example_inputs=X)
    assert type(packed.conv) is PackedConv2d
    assert packed.conv.winograd.tile in (2, 4, 6)
    # Winograd has to be faster than the block-sparse layer, not than the dense one.
    assert timed.count("BlockSparseConv2d") > 2
    speeds(winograd=1.01, **fast)
    packed = co.convert(pruned(), example_inputs=X)
    assert type(packed.conv) is BlockSparseConv2d
    assert "Winograd not used: Winograd F(" in why(packed, "conv")


@pytest.mark.parametrize(
    ("faster", "kind"),
    [
        ("BlockSparseInt8Linear", BlockSparseInt8Linear),
        ("Int8Linear", Int8Linear),
        ("BlockSparseLinear", BlockSparseLinear),
        ("Linear", PackedLinear),
    ],
)
def test_the_fastest_of_all_rivals(speeds: Callable, faster: str, kind: type) -> None:
    names = ("Linear", "BlockSparseInt8Linear", "Int8Linear", "BlockSparseLinear")
    speeds(**{name: 10 if name == faster else 20 for name in names})
    model = nn.Sequential(in_blocks(nn.Linear(32, 32), (16, 16), 0.5))
    config = (BlockSparse(), Int(bits=8))
    packed = co.convert(model, config, example_inputs=torch.randn(4, 32))
    assert type(packed[0]) is kind
    assert why(packed, "0").count("not used") == (3 if kind is PackedLinear else 2)


def test_unmeasured_it_is_not_assumed_faster() -> None:
    packed = co.convert(pruned())
    assert kinds(packed) == {"conv": "PackedConv2d", "head": "PackedLinear"}
    assert "BlockSparseLinear not used: prefer='size' asks for it, or a mea" in why(packed, "head")


@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_for_size(residency: str, tmp_path: Path) -> None:
    model = pruned()
    packed = co.convert(model, prefer="size", residency=residency)
    assert kinds(packed) == {"conv": "BlockSparseConv2d", "head": "BlockSparseLinear"}
    torch.testing.assert_close(packed(X), model(X))
    again = co.convert(packed, residency="packed" if residency == "decoded" else "decoded")
    assert torch.equal(again(X), packed(X))
    co.save(packed, tmp_path / "net.safetensors")
    assert torch.equal(co.load(tmp_path / "net.safetensors", Net().eval())(X), packed(X))


def test_integers_for_size() -> None:
    model = nn.Sequential(in_blocks(nn.Linear(32, 32), (16, 16), 0.5))
    packed = co.convert(model, (BlockSparse(), Int(bits=8)), prefer="size")
    assert type(packed[0]) is BlockSparseInt8Linear
    # Of other layouts and numbers nothing is to be said.
    for config in (Int(bits=8), BlockSparse(), (BlockSparse(), Int(bits=4))):
        packed = co.convert(model, config, prefer="size")
        assert "BlockSparseInt8Linear" not in why(packed, "0")


def test_tied_weights_stay_in_one_form() -> None:
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32, bias=False))
    model[1].weight = model[0].weight
    packed = co.convert(model, BlockSparse(), prefer="size")
    assert type(packed[1]) is PackedLinear
    assert "shared with a layer of another type" in why(packed, "1")


def test_break_even() -> None:
    assert break_even(0.2, ours=30.0, dense=100.0, nothing=10.0) == pytest.approx(0.9)
    assert break_even(0.2, ours=11.0, dense=100.0, nothing=10.0) == 1.0
    assert break_even(0.2, ours=30.0, dense=5.0, nothing=10.0) == 0.0
    assert break_even(0.2, ours=9.0, dense=20.0, nothing=10.0) == 1.0


def test_measured_in_earnest() -> None:
    packed = co.convert(pruned(), example_inputs=X)
    for name in ("conv", "head"):
        assert "break-even" in why(packed, name)
