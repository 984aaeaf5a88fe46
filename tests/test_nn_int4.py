"""`Int4Linear`, and what `Int8Linear` has beside its weight: how activations are quantized."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressops import backend, ops
from compressops.formats import BlockSparse, Dense, Huffman, Int, LowRank, Raw, Sparse
from compressops.nn import Int4Linear, Int8Linear, PackedLinear, PackedWeight
from compressops.ops.int8_linear import quantize_x

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")
RESIDENCY = pytest.mark.parametrize("residency", ["decoded", "packed"])
SHAPES = [(70, 33), (64, 32), (1, 1), (128, 16), (5, 50), (0, 8), (48, 0)]
NUMBERS = [
    Int(bits=4),
    Int(bits=4, group_size=16),
    Int(bits=4, group_size=32, symmetric=False),
    Int(bits=4, group_size=128),
    Int(bits=4, group_size=50),
    Int(bits=4, symmetric=False),
    Int(bits=3, group_size=64, symmetric=False),
    Int(bits=2, group_size=32),
]


@pytest.fixture
def eager() -> Iterator[None]:
    with backend("eager"):
        yield


def layer_of(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    # Without initialisation, which warns where a layer is empty.
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def runs(number: Int, in_features: int) -> bool:
    return number.group_size != 50 or in_features <= 50


@RESIDENCY
@pytest.mark.parametrize("number", NUMBERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_runs_the_op(shape: tuple[int, int], number: Int, residency: str) -> None:
    layer = layer_of(*shape)
    if not runs(number, shape[0]):
        with pytest.raises(ValueError, match=r"multiple of 16, got Int.*group_size=50"):
            Int4Linear.from_float(layer, Dense(), number)
        return
    module = Int4Linear.from_float(layer, Dense(), number, residency=residency)
    x = torch.randn(4, 3, shape[0])
    packed = module.packed_tensors()["weight"]
    # Straight from the format: a group that is the whole row has no size for the op.
    size = number.group_size if (number.group_size or shape[0]) < shape[0] else None
    zeros = packed.params.get("zeros")
    arguments = ops.int4_linear_pack(packed.dense_codes(), packed.params["scales"], zeros, size)
    expected = ops.int4_linear(x, *arguments, shape[1], size, layer.bias)
    assert torch.equal(module(x), expected)
    assert torch.equal(module.weight, packed.unpack())
    # The weight is exact: what is left is the rounding of the activations, in float64.
    q, scales, _ = quantize_x(x)
    exact = F.linear(q.double() * scales.double(), module.weight.double(), layer.bias.double())
    assert (module(x) - exact).norm() <= 1e-5 * exact.norm()


@RESIDENCY
@pytest.mark.parametrize(
    ("layout", "coding"), [(Dense(), Huffman()), (Sparse(), Raw()), (BlockSparse((4, 4)), Raw())]
)
def test_every_layout_and_coding(layout: object, coding: object, residency: str) -> None:
    layer = layer_of(64, 24)
    with torch.no_grad():
        layer.weight[layer.weight.abs() < 0.7] = 0
    number = Int(bits=4, group_size=32)
    module = Int4Linear.from_float(layer, layout, number, coding, residency=residency)
    x = torch.randn(5, 64)
    assert torch.equal(module(x), Int4Linear.from_float(layer, Dense(), number)(x))


@RESIDENCY
def test_state_config_and_copies(residency: str) -> None:
    number = Int(bits=4, group_size=32, symmetric=False)
    module = Int4Linear.from_float(
        layer_of(96, 20), Dense(), number, residency=residency, quantize_x=True
    )
    x = torch.randn(7, 96)
    expected = module(x)
    config = json.loads(json.dumps(module.get_config()))
    assert config["quantize_x"] is True
    again = Int4Linear.from_packed(config, module.packed_tensors(), residency)
    again.load_state_dict(module.state_dict())
    for other in (again, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)
        assert other.get_config() == module.get_config()
    # A state of another number: symmetric, so that one argument is gone.
    other = Int4Linear.from_float(layer_of(96, 20), Dense(), Int(bits=3), residency=residency)
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(x), other(x))
    wrong = PackedLinear.from_float(layer_of(96, 20), Dense(), Int(bits=8))
    with pytest.raises(RuntimeError, match=r"needs Int of 2 to 4 bits, got Int\(bits=8\)"):
        again.load_state_dict(wrong.state_dict())
    assert torch.equal(again.weight, other.weight)


def test_meta_and_back() -> None:
    module = Int4Linear.from_float(layer_of(80, 20), Dense(), Int(bits=4, group_size=16))
    x, state = torch.randn(3, 80), module.state_dict()
    empty = copy.deepcopy(module).to("meta")
    assert empty(x.to("meta")).shape == (3, 20)
    empty.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(empty(x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_and_autocast(dtype: torch.dtype) -> None:
    layer = layer_of(64, 24)
    module = Int4Linear.from_float(layer, Dense(), Int(bits=4, group_size=32))
    x = torch.randn(6, 64)
    parts = {k: v.clone() for k, v in module.packed_tensors()["weight"].parts.items()}
    with torch.autocast("cpu", dtype):
        assert module(x).dtype == layer(x).dtype == dtype
        assert torch.equal(module(x), module(x.to(dtype)))
    assert module(x).dtype == torch.float32
    expected = module(x)
    module.to(dtype)
    assert module(x.to(dtype)).dtype == dtype
    assert (module(x.to(dtype)).float() - expected).norm() < 0.02 * expected.norm()
    for name, part in module.packed_tensors()["weight"].parts.items():
        assert torch.equal(part, parts[name])


@pytest.mark.parametrize("bias", [True, False])
def test_gradient_and_compile(bias: bool) -> None:
    number = Int(bits=4, group_size=16)
    module = Int4Linear.from_float(layer_of(64, 10, bias), Dense(), number)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, grad = torch.randn(6, 64, requires_grad=True), torch.randn(6, 10)
    for run in (module, compiled):
        module.zero_grad()
        x.grad = None
        run(x).backward(grad)
        torch.testing.assert_close(x.grad, grad @ module.weight)
        if bias:
            torch.testing.assert_close(module.bias.grad, grad.sum(0))
    assert torch.equal(compiled(x), module(x))


def test_activations_as_they_are(eager: None) -> None:
    module = Int4Linear.from_float(layer_of(64, 10), None, Int(bits=4), quantize_x=False)
    x = torch.randn(6, 64)
    torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))
    assert not torch.equal(module(x), Int4Linear.from_module(module, module.packed_weight)(x * 3))
    assert Int4Linear.from_module(module, module.packed_weight).quantize_x is False
    other = Int4Linear.from_module(module, module.packed_weight, quantize_x=None)
    assert "quantize_x" not in other.get_config()
    q, scales, _ = quantize_x(x)
    torch.testing.assert_close(other(x), F.linear(q * scales, module.weight, module.bias))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda la: Int4Linear.from_float(la, None, Int(bits=5)), ValueError, "Int\\(bits=5\\)"),
        (lambda la: Int4Linear.from_float(la), ValueError, "2 to 4 bits, got Float"),
        (
            lambda la: Int4Linear.from_float(la, LowRank(2), Int(bits=4)),
            ValueError,
            "LowRank\\(rank=2\\)",
        ),
        (
            lambda la: Int4Linear.from_float(la, None, Int(bits=4), quantize_x=1),
            ValueError,
            "quantize_x must be .* got 1",
        ),
        (
            lambda la: Int4Linear.from_float(la, None, Int(bits=4), speed=True),
            TypeError,
            "settings \\('quantize_x', 'activation'\\), got \\['speed'\\]",
        ),
        (
            lambda la: Int4Linear.from_module(
                la, PackedLinear.from_float(la, None, Int(bits=4)).packed_weight
            ),
            TypeError,
            "needs a Int4Weight, got a PackedWeight",
        ),
    ],
)
def test_what_does_not_fit_is_named(make: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make(layer_of(64, 10))


def test_a_wrong_weight_is_refused_by_type() -> None:
    layer = layer_of(64, 10)
    weight = PackedWeight(PackedLinear.from_float(layer).packed_tensors()["weight"])
    with pytest.raises(TypeError, match="Int8Weight, got a PackedWeight"):
        Int8Linear(layer, weight)


# Int8Linear's activations.

QUANTIZATIONS = [(None, None, False), (0.031, None, True), (0.031, -17, False)]


@RESIDENCY
@pytest.mark.parametrize("case", QUANTIZATIONS, ids=str)
def test_int8_activations(case: tuple, residency: str) -> None:
    scale, zero, symmetric = case
    layer = layer_of(70, 33)
    module = Int8Linear.from_float(layer, None, Int(bits=8), residency=residency)
    if scale is None:
        module.set_dynamic(symmetric=False)
    else:
        module.set_static(scale, zero)
    assert module.symmetric is symmetric
    x = torch.randn(4, 5, 70) + 0.5
    static = None if scale is None else torch.tensor(scale)
    point = None if zero is None else torch.tensor(zero, dtype=torch.int8)
    q, scales, zeros = quantize_x(x, static, point, symmetric or static is not None)
    exact = F.linear(
        (q.double() - zeros) * scales.double(), module.weight.double(), layer.bias.double()
    )
    assert (module(x) - exact).norm() <= 1e-5 * exact.norm()
    dynamic = Int8Linear.from_module(layer, module.packed_weight)
    assert not torch.equal(module(x), dynamic(x))

    config = json.loads(json.dumps(module.get_config()))
    again = Int8Linear.from_packed(config, module.packed_tensors(), residency)
    again.load_state_dict(module.state_dict())
    copied = Int8Linear.from_module(module, module.packed_weight)
    for other in (again, copied, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    compiled = torch.compile(copied, fullgraph=residency == "decoded", backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    if static is not None:
        assert copied.x_scale.data_ptr() != module.x_scale.data_ptr()
        # Exact, whatever the activations' dtype is.
        assert torch.equal(copy.deepcopy(module).half().x_scale, static)
        with pytest.raises(RuntimeError, match="x_scale"):
            dynamic.load_state_dict(module.state_dict())
    copied.set_dynamic()
    assert torch.equal(copied(x), dynamic(x))
    assert copied.state_dict().keys() == dynamic.state_dict().keys()


@pytest.mark.parametrize(
    ("scale", "zero", "message"),
    [(0.0, None, "got 0.0"), (float("nan"), None, "got nan"), (0.1, 128, "got 128")],
)
def test_int8_bad_ranges_are_named(scale: float, zero: int | None, message: str) -> None:
    module = Int8Linear.from_float(layer_of(8, 4), None, Int(bits=8))
    with pytest.raises(ValueError, match=message):
        module.set_static(scale, zero)
    assert module.x_scale is None


def test_int8_wide_layers_stay_symmetric() -> None:
    module = Int8Linear.from_float(layer_of(65537, 1), None, Int(bits=8))
    with pytest.raises(ValueError, match=r"at most 65536 .*got 65537"):
        module.set_dynamic(symmetric=False)
    with pytest.raises(ValueError, match=r"at most 65536 .*got 65537"):
        module.set_static(0.1)
    assert module(torch.randn(2, 65537)).isfinite().all()
