"""`LowRankIntegerLinear`: both factors multiply as integers, each by the op of its own number, and
`convert` takes it where asked."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressops import backend, convert, load, save
from compressops.compress import Encode, Factorize, Quantize, Recipe, compress
from compressops.formats import FixedPoint, Huffman, Int, LowRank, Number, PackedTensor, Ternary
from compressops.nn import LowRankIntegerLinear, LowRankLinear, scratch

INT8 = Int(bits=8)
NUMBERS = [
    (INT8, INT8),
    (Int(bits=4), Int(bits=4, group_size=16, symmetric=False)),
    (Ternary(), Ternary(granularity="group", group_size=16)),
    (INT8, Ternary()),
    (Int(bits=2), INT8),
    (Ternary(), Int(bits=3)),
]


def rounded(x: Tensor) -> Tensor:
    """Each row in 8 bits of its own range, float64: what the op makes of its input."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (x / scale).round().clamp(-127, 127) * scale


def reference(layer: LowRankIntegerLinear, x: Tensor) -> Tensor:
    u, v = (factor.unpack().double() for factor in layer.packed_weight.packed().factors())
    inner = rounded(x) @ v.T
    # The op gives float32 in between.
    product = rounded(inner.float().double()) @ u.T
    return product if layer.bias is None else product + layer.bias.double()


def layer_of(
    linear: nn.Linear, rank: int, numbers: tuple[Number, Number], residency: str = "decoded"
) -> LowRankIntegerLinear:
    """A layer of random factors, u and v of these numbers."""
    rows, columns = linear.weight.shape
    factors = [
        PackedTensor.pack(torch.randn(size), number=number, lossy=True)
        for size, number in zip(((rows, rank), (rank, columns)), numbers, strict=True)
    ]
    packed = PackedTensor.from_factors(factors, (rows, columns), torch.float32)
    return LowRankIntegerLinear.from_module(linear, packed, residency)


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("residency", ["decoded", "packed"])
@pytest.mark.parametrize(
    ("out", "inputs", "rank", "rows", "bias"),
    [
        *((24, 40, 7, (5,), True), (1, 9, 1, (3, 2), False), (130, 64, 33, (2, 3, 4), True)),
        *((16, 16, 4, (0,), True), (384, 1536, 96, (19,), True)),
    ],
)
def test_two_products_of_integers(
    out: int,
    inputs: int,
    rank: int,
    rows: tuple[int, ...],
    bias: bool,
    residency: str,
    numbers: tuple[Number, Number],
) -> None:
    torch.manual_seed(out)
    layer = layer_of(nn.Linear(inputs, out, bias=bias), rank, numbers, residency)
    x = torch.randn(*rows, 2 * inputs)[..., ::2]
    expected = reference(layer, x.double())
    # A code of the inner rows that lies between two may fall to either.
    step = expected.abs().amax().item() / 127 if expected.numel() else 0.0
    for name in ("cpu", "eager"):
        with backend(name):
            found = layer(x)
        assert found.shape == (*rows, out)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0.1 * step + 1e-6)
    assert bool(list(layer.packed_weight.resident_buffers())) == (residency == "decoded")


def test_rows_that_are_not_numbers_stay_apart() -> None:
    layer = LowRankIntegerLinear.from_float(nn.Linear(12, 8), LowRank(3), INT8)
    x = torch.randn(3, 12)
    x[1, 4] = torch.nan
    found = layer(x)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], layer(x[::2]))


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_moving_casting_copying_compiling(
    monkeypatch: pytest.MonkeyPatch, numbers: tuple[Number, Number]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    layer = layer_of(nn.Linear(16, 12), 3, numbers)
    x = torch.randn(4, 16)
    before = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), before)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), before)
    kernels = [part for kernel in layer.packed_weight.kernels() for part in kernel]
    cast = copy.deepcopy(layer).half()
    assert cast(x.half()).dtype == torch.float16
    for mine, its in zip(cast.packed_weight.kernels()[0], kernels, strict=False):
        assert mine is its is None or torch.equal(mine, its)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    # Of other numbers, too, and with zero points that must not stay.
    other = layer_of(nn.Linear(16, 12), 5, (INT8, Int(bits=4, group_size=16, symmetric=False)))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), before)
    assert other.packed_weight.layout == LowRank(3)
    meta = copy.deepcopy(layer).to("meta")
    assert meta(torch.ones(2, 16, device="meta")).shape == (2, 12)
    again = meta.to_empty(device="cpu")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), before)


def test_other_numbers_are_refused() -> None:
    linear = nn.Linear(16, 12)
    for number, why in (
        (Int(bits=8, symmetric=False), r"int8_linear needs Int\(bits=8.* factor u"),
        (Int(bits=4, group_size=2), r"int4_linear needs a group_size .* factor u"),
        (
            FixedPoint(bits=8, integer_bits=2),
            r"it needs Int or Ternary, got Fixed.* of factor u",
        ),
        (None, r"it needs Int or Ternary, got Float.* of factor u"),
    ):
        with pytest.raises(ValueError, match=f"weight: {why}"):
            LowRankIntegerLinear.from_float(linear, LowRank(3), number)
    with pytest.raises(ValueError, match=r"got Int\(bits=6\) of factor v"):
        layer_of(linear, 3, (INT8, Int(bits=6)))


def test_convert_takes_it_where_the_number_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    stages = [Factorize(rank=8), Quantize(INT8), Encode(Huffman())]
    trained = compress(model, Recipe(stages), log=False).model
    plain = convert(trained)
    assert [type(plain[i]) for i in (0, 2)] == [LowRankLinear] * 2
    why = plain.conversion_notes["0"].why
    assert "LowRankIntegerLinear not used: it rounds activations, and training did not" in why
    new = convert(trained, INT8)
    assert [type(new[i]) for i in (0, 2)] == [LowRankIntegerLinear] * 2
    assert "fewer multiply-accumulates" in new.conversion_notes["0"].why
    # Of a plain model, factorized and quantized at once.
    assert type(convert(model, (LowRank(8), INT8))[0]) is LowRankIntegerLinear
    for number in (Int(bits=4), Ternary()):
        assert type(convert(model, (LowRank(8), number))[0]) is LowRankIntegerLinear
    for number in (Int(bits=6), Int(bits=8, group_size=16), FixedPoint(bits=8, integer_bits=2)):
        assert type(convert(model, (LowRank(8), number))[0]) is LowRankLinear
    x = torch.randn(6, 64)
    assert torch.equal(new[0].weight, plain[0].weight)
    error = (new(x) - plain(x)).norm() / plain(x).norm()
    assert 0 < error < 0.03
    save(new, tmp_path / "net.safetensors")
    for residency in ("decoded", "packed"):
        again = load(tmp_path / "net.safetensors", model, residency)
        assert type(again[2]) is LowRankIntegerLinear
        assert torch.equal(again(x), new(x))


def test_convert_measures_it() -> None:
    model = nn.Sequential(nn.Linear(512, 512)).eval()
    new = convert(model, (LowRank(64), INT8), example_inputs=torch.randn(64, 512))
    why = new.conversion_notes["0"].why
    assert "LowRankLinear" in why
    assert "LowRankIntegerLinear" in why
    assert why.count("measured") >= 2


def test_packed_factors_are_made_in_shared_memory() -> None:
    linear = nn.Linear(96, 80)
    layer = layer_of(linear, 32, (INT8, Int(bits=4)), "packed")
    held, x = layer.packed_weight, torch.randn(3, 96, requires_grad=True)
    with torch.no_grad():
        y = layer(x)
    assert scratch.held() > 0
    made = held._holders[1]
    kept = copy.deepcopy(layer)
    kept.packed_weight.set_residency("decoded")
    assert torch.equal(kept(x), y)
    # With a gradient too; another layer writes over the buffer before the backward pass.
    results = [layer(x), kept(x)]
    layer_of(linear, 32, (INT8, Int(bits=4)), "packed")(x)
    (first,), (second,) = (torch.autograd.grad(y.square().sum(), x) for y in results)
    assert torch.equal(results[0], y)
    assert torch.equal(first, second)
    # Made once, and again only of another weight.
    assert held._holders[1] is made
    held.load_state_dict(
        layer_of(linear, 32, (INT8, Int(bits=4)), "packed").packed_weight.state_dict()
    )
    assert not torch.equal(layer(x), y)
    del layer, kept, held, made
    gc.collect()
    assert scratch.held() == 0


def test_holders_follow_parts_that_are_moved_and_written_to() -> None:
    layer = layer_of(nn.Linear(96, 80), 32, (INT8, Int(bits=4)), "packed")
    held, x = layer.packed_weight, torch.randn(3, 96)
    with torch.no_grad():
        before = layer(x)
        layer._apply(torch.clone)  # as another device of the same type would be taken
        next(part for name, part in held.named_buffers() if name == "u_scales").mul_(2)
        after = layer(x)
        held.set_residency("decoded")
        assert torch.equal(after, layer(x))
    assert not torch.equal(after, before)
