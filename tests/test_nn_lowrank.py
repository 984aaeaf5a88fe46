"""The layers that run the factors of low-rank weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressops import convert, kernels, load, save
from compressops.formats import Huffman, Int, LowRank
from compressops.nn import LowRankConv2d, LowRankLinear, PackedConv2d, PackedLinear, Winograd

sys.path.insert(0, str(Path(__file__).parent))
from test_lowrank import FORMS, RANKS, every_form, packed

CONVOLUTIONS = [
    {"padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "stride": 2},
    {"padding": (2, 1), "stride": (2, 1), "dilation": (1, 2), "padding_mode": "reflect"},
    {"padding": (0, 2), "stride": (1, 3), "dilation": (2, 1), "bias": False},
]


@every_form
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("residency", ["decoded", "packed"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_run_their_factors(form: str, options, residency, memory_format) -> None:
    conv = nn.Conv2d(10, 12, 3, **options).to(memory_format=memory_format)
    weight = packed(LowRank(RANKS[form], form), tuple(conv.weight.shape))
    layer = LowRankConv2d.from_module(conv, weight, residency)
    conv.weight.data = weight.unpack()
    exact = copy.deepcopy(conv).double()
    for x in (torch.randn(2, 10, 15, 13), torch.randn(10, 9, 9), torch.randn(0, 10, 9, 9)):
        if x.numel() == 0 and options.get("padding_mode"):
            continue
        if x.dim() == 4:
            x = x.to(memory_format=memory_format)
        expected = exact(x.double())
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert layer(x).shape == conv(x).shape


@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_linear_runs_its_factors(residency: str) -> None:
    linear = nn.Linear(30, 17)
    weight = packed(LowRank(5), (17, 30))
    layer = LowRankLinear.from_module(linear, weight, residency)
    for shape in ((4, 30), (30,), (0, 30), (2, 3, 30)):
        x = torch.randn(shape)
        expected = F.linear(x.double(), weight.unpack().double(), linear.bias.double())
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    strided = torch.randn(30, 6).mT
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))


@every_form
def test_gradients_reach_the_input(form: str) -> None:
    conv = nn.Conv2d(6, 7, 3, padding=1).double()
    weight = packed(LowRank((3, 3) if form == "tucker" else 3, form), (7, 6, 3, 3))
    layer = LowRankConv2d.from_module(conv, weight)
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, x)


@every_form
def test_it_compiles_into_one_graph(form: str) -> None:
    conv = nn.Conv2d(6, 7, 3, padding=1)
    weight = packed(LowRank((3, 3) if form == "tucker" else 3, form), (7, 6, 3, 3))
    layer = LowRankConv2d.from_module(conv, weight)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 6, 8, 8)
    torch.testing.assert_close(compiled(x), layer(x))
    linear = LowRankLinear.from_module(nn.Linear(9, 8), packed(LowRank(2), (8, 9)))
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x[0, 0, :, :1] @ torch.ones(1, 9)), linear(x[0, 0, :, :1] @ torch.ones(1, 9))
    )


@pytest.mark.parametrize("form", ["matrix", "tucker"])
@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_the_kernel_runs_as_winograds(form: str, residency: str, tmp_path) -> None:
    conv = nn.Conv2d(24, 20, 3, padding="same", padding_mode="circular")
    weight = packed(LowRank((8, 8) if form == "tucker" else 8, form), (20, 24, 3, 3))
    layer = LowRankConv2d.from_module(conv, weight, residency)
    x = torch.randn(1, 24, 14, 14)
    direct = layer(x)
    assert kernels.unsafe(layer, x, 4) is None
    layer.run_winograd(Winograd(4))
    torch.testing.assert_close(layer(x), direct, rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer(x), direct)
    model = nn.Sequential(layer)
    kernels.prepare(model)
    save(model, tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors", nn.Sequential(conv), residency)
    assert again[0].winograd.tile == 4
    assert torch.equal(again(x), layer(x))


def test_only_whole_kernels_run_as_winograds() -> None:
    conv = nn.Conv2d(8, 8, 3)
    layer = LowRankConv2d.from_module(conv, packed(LowRank(3, "spatial"), (8, 8, 3, 3)))
    with pytest.raises(ValueError, match="no factor of form 'spatial' has the whole kernel"):
        layer.run_winograd(Winograd(4))
    verdict = kernels.choose(
        nn.Sequential(conv), {"0": conv}, {"0": layer}, torch.randn(1, 8, 9, 9)
    )
    assert "no factor of form 'spatial'" in verdict["0"].why


def test_moving_and_casting() -> None:
    linear = nn.Linear(16, 12)
    layer = LowRankLinear.from_float(linear, LowRank(3), Int(bits=8))
    before = layer(torch.ones(16))
    assert {p.dtype for p in layer.half().packed_weight.factors().values()} == {torch.float16}
    layer.float().bias.data.copy_(linear.bias.data)
    before = layer(torch.ones(16))
    fresh = LowRankLinear.from_module(linear, layer.packed_weight.packed())
    assert torch.equal(fresh(torch.ones(16)), before)
    layer.packed_weight.set_residency("packed")
    assert not list(layer.packed_weight.resident_buffers())
    assert torch.equal(layer(torch.ones(16)), before)
    state = layer.state_dict()
    other = LowRankLinear.from_float(nn.Linear(16, 12), LowRank(5), Int(bits=4))
    other.load_state_dict(state)
    assert torch.equal(other(torch.ones(16)), before)
    assert other.packed_weight.layout == LowRank(3)
    meta = LowRankLinear.from_float(linear, LowRank(3)).to("meta")
    assert meta(torch.ones(2, 16, device="meta")).shape == (2, 12)


def test_convert_takes_factors_where_they_are_cheaper() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32), nn.Conv2d(8, 8, 3, groups=2))
    for prefer in ("speed", "size"):
        new = convert(model, {"0": LowRank(4), "1": LowRank(25), "2": LowRank(2)}, prefer=prefer)
        assert [type(m) for m in new] == [LowRankLinear, PackedLinear, PackedConv2d]
        notes = [new.conversion_notes[name].why for name in "012"]
        assert "6.86× fewer multiply-accumulates" in notes[0] or prefer == "size"
        assert "takes 2000 multiply-accumulates, the dense weight 1536" in notes[1]
        assert "a convolution of 2 groups" in notes[2]
    x = torch.randn(5, 64)
    product = F.linear(x.double(), new[0].weight.double(), new[0].bias.double())
    torch.testing.assert_close(new[0](x).double(), product, rtol=1e-5, atol=1e-5)


def test_layers_that_share_a_weight_share_its_factors() -> None:
    a, b = nn.Linear(24, 24), nn.Linear(24, 24)
    b.weight = a.weight
    new = convert(nn.Sequential(a, b), (LowRank(3), Huffman()))
    assert new[0].packed_weight is new[1].packed_weight


def test_rivals_are_measured_against_the_dense_layer() -> None:
    conv = nn.Conv2d(8, 8, 3)
    for form in FORMS:
        weight = packed(LowRank((3, 3) if form == "tucker" else 3, form), (8, 8, 3, 3))
        new = LowRankConv2d.from_module(conv, weight)
        mine, others = kernels.rivals(new, conv, torch.randn(2, 8, 9, 9))
        assert (mine[0], others.pop("dense")) == (new, conv)
        assert all(type(layer) is LowRankConv2d for layer in mine)
        assert all(layer.winograd.tile == 4 for layer in (*mine[1:], *others.values()))
        assert all(torch.equal(layer.weight, weight.unpack()) for layer in others.values())
