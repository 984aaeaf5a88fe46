"""The drop-in modules: equal to the float layers bit for bit, and real modules in every way."""

from __future__ import annotations

import copy
import io
import json
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from compressops.formats import (
    BlockSparse,
    Dense,
    DynamicFixedPoint,
    Float,
    Huffman,
    Int,
    PackedTensor,
    Raw,
    Sparse,
    Ternary,
)
from compressops.nn import (
    PackedConv1d,
    PackedConv2d,
    PackedEmbedding,
    PackedLinear,
)


@dataclass(frozen=True)
class Case:
    """A float layer, an input shape, and the module that replaces the layer."""

    target: type
    args: tuple
    shape: tuple[int, ...]
    options: dict = field(default_factory=dict)

    def layer(self) -> nn.Module:
        return self.target.source(*self.args, **self.options)

    def input(self) -> torch.Tensor:
        if self.target is PackedEmbedding:
            return torch.randint(self.args[0], self.shape)
        return torch.randn(self.shape)

    def __str__(self) -> str:
        return f"{self.target.__name__}{self.args}{self.options or ''}".replace(" ", "")


CASES = [
    Case(PackedLinear, (17, 9), (3, 17)),
    Case(PackedLinear, (64, 32), (2, 5, 64), {"bias": False}),
    Case(PackedLinear, (8, 4), (0, 8)),
    Case(PackedConv1d, (6, 9, 5), (2, 6, 20), {"stride": 2, "padding": 3}),
    Case(PackedConv1d, (6, 9, 4), (2, 6, 20), {"padding": "same", "bias": False}),
    Case(PackedConv1d, (4, 8, 3), (4, 11), {"padding_mode": "circular", "padding": 2}),
    Case(PackedConv2d, (3, 8, 3), (2, 3, 9, 7)),
    Case(PackedConv2d, (3, 8, 3), (3, 9, 7), {"padding": 1}),
    Case(PackedConv2d, (8, 12, 3), (2, 8, 9, 7), {"groups": 4, "stride": (2, 1)}),
    Case(PackedConv2d, (4, 6, (3, 5)), (2, 4, 12, 12), {"padding": "same", "dilation": (2, 1)}),
    Case(PackedConv2d, (4, 6, 3), (2, 4, 12, 12), {"padding": "valid"}),
    Case(PackedConv2d, (4, 6, 3), (2, 4, 8, 8), {"padding": (1, 2), "padding_mode": "reflect"}),
    Case(PackedConv2d, (4, 6, 4), (2, 4, 8, 8), {"padding": "same", "padding_mode": "replicate"}),
    Case(PackedConv2d, (5, 7, 1), (2, 5, 4, 4)),
    Case(PackedEmbedding, (20, 6), (3, 4), {"padding_idx": 2}),
    Case(PackedEmbedding, (20, 6), (0,)),
]
FORMATS = {
    "float": (Dense(), Float(), Raw()),
    "float-huffman": (Dense(), Float(), Huffman()),
    "dfp6-sparse-huffman": (Sparse(), DynamicFixedPoint(bits=6), Huffman()),
    "int4-groups": (Dense(), Int(bits=4, group_size=8), Raw()),
    "int5-asymmetric": (Dense(), Int(bits=5, symmetric=False), Huffman()),
    "ternary-blocks": (BlockSparse((4, 4)), Ternary(), Raw()),
}
BY_CASE = pytest.mark.parametrize("case", CASES, ids=str)
RESIDENCY = pytest.mark.parametrize("residency", ["decoded", "packed"])


def packed_twin(
    case: Case, choice: str, residency: str = "decoded"
) -> tuple[nn.Module, nn.Module, PackedTensor]:
    """The packed layer, and the float layer that holds what it unpacks to."""
    layer = case.layer()
    with torch.no_grad():
        layer.weight[layer.weight.abs() < layer.weight.abs().median()] = 0.0
    packed = PackedTensor.pack(layer.weight.detach(), *FORMATS[choice], lossy=True)
    with torch.no_grad():
        layer.weight.copy_(packed.unpack())
    return case.target.from_module(layer, packed, residency), layer, packed


@BY_CASE
@RESIDENCY
@pytest.mark.parametrize("choice", FORMATS)
def test_equals_the_float_layer(case: Case, residency: str, choice: str) -> None:
    module, layer, packed = packed_twin(case, choice, residency)
    x = case.input()
    assert torch.equal(module(x), layer(x))
    assert torch.equal(module.weight, packed.unpack())
    assert {name for name, _ in module.named_parameters()} <= {"bias"}


@BY_CASE
def test_config_rebuilds_the_module(case: Case) -> None:
    module, _, _ = packed_twin(case, "dfp6-sparse-huffman")
    config = json.loads(json.dumps(module.get_config()))
    again = case.target.from_packed(config, module.packed_tensors())
    again.load_state_dict(module.state_dict())
    x = case.input()
    assert torch.equal(again(x), module(x))
    assert again.get_config() == module.get_config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": [0, 1]}, "stride"),
        ({"groups": 3}, "divisible by groups"),
        ({"padding_mode": "mirror"}, "mirror"),
        ({"colour": 1}, "colour"),
        ({"out_channels": 16}, "shape"),
    ],
)
def test_bad_configs_are_refused(change: dict, message: str) -> None:
    module, _, _ = packed_twin(Case(PackedConv2d, (4, 8, 3), ()), "float")
    with pytest.raises(ValueError, match=message):
        PackedConv2d.from_packed({**module.get_config(), **change}, module.packed_tensors())


def test_a_bad_residency_is_named() -> None:
    with pytest.raises(ValueError, match="'lazy'"):
        PackedLinear.from_float(nn.Linear(3, 4), residency="lazy")


def test_a_wrong_layer_is_named() -> None:
    with pytest.raises(TypeError, match=r"replaces a Conv2d, got a Linear"):
        PackedConv2d.from_float(nn.Linear(3, 4))


def test_max_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_norm=1\.0"):
        PackedEmbedding.from_float(nn.Embedding(3, 4, max_norm=1.0))


@RESIDENCY
def test_state_dict_round_trip_strict(residency: str) -> None:
    case = CASES[8]
    module, _, _ = packed_twin(case, "dfp6-sparse-huffman", residency)
    # Parts of other names and sizes: the state dict brings its own packing along.
    other, _, _ = packed_twin(case, "int4-groups", residency)
    other.load_state_dict(module.state_dict(), strict=True)
    x = case.input()
    assert torch.equal(other(x), module(x))
    assert other.packed_tensors()["weight"].to_spec() == module.packed_tensors()["weight"].to_spec()

    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    again, _, _ = packed_twin(case, "float", residency)
    again.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(again(x), module(x))

    assigned, _, _ = packed_twin(case, "float", residency)
    assigned.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(assigned(x), module(x))


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    module, _, _ = packed_twin(CASES[0], "float")
    other, _, _ = packed_twin(Case(PackedLinear, (9, 17), ()), "float")
    before = module.weight.clone()
    with pytest.raises(RuntimeError, match=r"\(17, 9\)"):
        module.load_state_dict(other.state_dict())
    assert torch.equal(module.weight, before)
    state = module.state_dict()
    del state["packed_weight._extra_state"]
    with pytest.raises(RuntimeError, match="Missing"):
        module.load_state_dict(state)


@RESIDENCY
@pytest.mark.parametrize("copies", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same(copies: str, residency: str) -> None:
    case = CASES[6]
    module, _, _ = packed_twin(case, "dfp6-sparse-huffman", residency)
    module.to(memory_format=torch.channels_last)
    if copies == "deepcopy":
        again = copy.deepcopy(module)
    elif copies == "pickle":
        again = pickle.loads(pickle.dumps(module))
    else:
        stream = io.BytesIO()
        torch.save(module, stream)
        stream.seek(0)
        again = torch.load(stream, weights_only=False)
    x = case.input()
    assert torch.equal(again(x), module(x))
    assert again.weight.stride() == module.weight.stride()
    for mine, theirs in zip(module.buffers(), again.buffers(), strict=True):
        assert not mine.numel() or mine.data_ptr() != theirs.data_ptr()


def test_pickles_hold_the_parts_only() -> None:
    module = PackedLinear.from_float(
        nn.Linear(512, 512, bias=False), Dense(), Int(bits=2), residency="decoded"
    )
    assert len(pickle.dumps(module)) < 512 * 512 * 2 / 8 + 8000


@RESIDENCY
def test_casts_leave_the_parts_alone(residency: str) -> None:
    case = Case(PackedLinear, (16, 8), (3, 16))
    module, layer, packed = packed_twin(case, "int4-groups", residency)
    module.half()
    assert module.weight.dtype == module.bias.dtype == torch.float16
    assert module.packed_tensors()["weight"].parts["scales"].dtype == torch.float32
    x = case.input()
    assert torch.equal(module(x.half()), copy.deepcopy(layer).half()(x.half()))
    module.to(torch.bfloat16)
    assert torch.equal(module(x.bfloat16()), copy.deepcopy(layer).bfloat16()(x.bfloat16()))
    module.float()
    # Decoded anew from the parts: nothing was lost on the way through half precision.
    assert torch.equal(module.weight, packed.unpack())
    for name, part in module.packed_tensors()["weight"].parts.items():
        assert torch.equal(part, packed.parts[name])


@RESIDENCY
@pytest.mark.parametrize("kernel", [1, 3])
def test_memory_format_follows_the_model(residency: str, kernel: int) -> None:
    case = Case(PackedConv2d, (16, 24, kernel), (2, 16, 12, 12))
    module, layer, _ = packed_twin(case, "dfp6-sparse-huffman", residency)
    x = case.input()
    for target in (torch.channels_last, torch.contiguous_format):
        module.to(memory_format=target)
        layer.to(memory_format=target)
        assert module.weight.stride() == layer.weight.stride()
        assert torch.equal(module(x), layer(x))
    layer.to(memory_format=torch.channels_last)
    again = PackedConv2d.from_module(layer, module.packed_tensors()["weight"], residency)
    assert again.weight.stride() == layer.weight.stride()


def test_meta_device_and_back() -> None:
    case = CASES[6]
    module, _, _ = packed_twin(case, "dfp6-sparse-huffman")
    state = module.state_dict()
    hollow = copy.deepcopy(module).to("meta")
    assert all(b.device.type == "meta" for b in hollow.buffers())
    assert hollow(case.input().to("meta")).device.type == "meta"
    assert "DynamicFixedPoint" in repr(hollow)
    hollow.to_empty(device="cpu")
    hollow.load_state_dict(state)
    x = case.input()
    assert torch.equal(hollow(x), module(x))


@BY_CASE
def test_compiles_in_one_graph(case: Case) -> None:
    if 0 in case.shape:
        pytest.skip("Inductor is not asked about empty inputs here")
    torch.compiler.reset()
    module, _, _ = packed_twin(case, "dfp6-sparse-huffman")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = case.input()
    torch.testing.assert_close(compiled(x), module(x))


def test_packed_residency_works_under_compile() -> None:
    torch.compiler.reset()
    module, _, _ = packed_twin(CASES[0], "dfp6-sparse-huffman", "packed")
    x = CASES[0].input()
    torch.testing.assert_close(torch.compile(module, backend="aot_eager")(x), module(x))


def test_gradient_reaches_the_input_and_the_bias() -> None:
    module, layer, _ = packed_twin(CASES[0], "float")
    x = CASES[0].input().requires_grad_()
    module(x).square().sum().backward()
    expected = x.grad.clone(), layer.bias.grad.clone()  # the bias is the layer's own
    x.grad = layer.bias.grad = None
    layer(x).square().sum().backward()
    assert torch.equal(expected[0], x.grad)
    assert torch.equal(expected[1], layer.bias.grad)


def test_extra_repr_says_what_it_is() -> None:
    module, _, packed = packed_twin(CASES[6], "dfp6-sparse-huffman")
    text = repr(module)
    for part in ("in_channels=3", "Sparse", "DynamicFixedPoint(bits=6", "Huffman", "decoded"):
        assert part in text
    assert f"{packed.nbytes} bytes" in text


def test_set_residency_frees_and_restores() -> None:
    module, _, _ = packed_twin(CASES[6], "dfp6-sparse-huffman")
    x = CASES[6].input()
    expected = module(x)
    held = sum(b.nbytes for b in module.packed_weight.resident_buffers())
    module.packed_weight.set_residency("packed")
    assert held == module.weight.nbytes
    assert not list(module.packed_weight.resident_buffers())
    assert torch.equal(module(x), expected)
    module.packed_weight.set_residency("decoded")
    assert torch.equal(module(x), expected)


@RESIDENCY
def test_parts_are_checked_once_until_they_change(
    residency: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[6]
    module, _, _ = packed_twin(case, "dfp6-sparse-huffman", residency)
    other, _, _ = packed_twin(case, "int4-groups", residency)
    checks = []
    check = PackedTensor.from_spec
    monkeypatch.setattr(
        PackedTensor, "from_spec", lambda *args, **kw: checks.append(1) or check(*args, **kw)
    )
    x = case.input()
    held, expected = module.packed_weight, module(x)
    first = held.packed()
    checks.clear()
    for _ in range(3):
        assert torch.equal(module(x), expected)
        assert held.packed() is first
    assert not checks

    # Whatever changes the parts is seen: another state, a cast, a move, copies, a write.
    twin, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    assert held.packed().to_spec() == other.packed_weight.packed().to_spec()
    for copied in (twin, pickled):
        assert torch.equal(copied(x), expected)
        mine = copied.packed_weight.packed()
        for name, part in copied.packed_weight.named_buffers():
            assert name not in mine.parts or mine.parts[name] is part
    twin.to("meta").to_empty(device="cpu").load_state_dict(other.state_dict())
    assert torch.equal(twin(x), other(x))
    held.scales.fill_(torch.nan)
    with pytest.raises(ValueError, match="scales holds NaN"):
        held.packed()


def test_packed_residency_works_in_inference_mode() -> None:
    with torch.inference_mode():
        module, layer, _ = packed_twin(CASES[0], "dfp6-sparse-huffman", "packed")
        x = CASES[0].input()
        assert torch.equal(module(x), layer(x))
        assert torch.equal(module(x), layer(x))


def test_packed_residency_breaks_a_full_graph_as_its_docstring_says() -> None:
    torch.compiler.reset()
    module, _, _ = packed_twin(CASES[0], "dfp6-sparse-huffman", "packed")
    assert "fullgraph=True" in PackedLinear.__mro__[1].__doc__
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(module, fullgraph=True, backend="aot_eager")(CASES[0].input())
