"""`Int8Conv2d`: the op on packed weights, every option of `Conv2d`, its gradient, its dtypes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressops as co
from compressops import ops
from compressops.formats import Dense, Huffman, Int, Raw
from compressops.nn import Fused, Int8Conv2d, PackedConv2d
from compressops.report import report

RESIDENCY = pytest.mark.parametrize("residency", ["decoded", "packed"])
INT8 = Int(bits=8)


def close(module: nn.Module, layer: nn.Module, x: torch.Tensor) -> bool:
    return bool((module(x) - layer(x)).norm() < 0.02 * layer(x).norm())


@RESIDENCY
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("coding", [Raw(), Huffman()], ids=["raw", "huffman"])
def test_int8_conv2d_runs_the_op(residency: str, groups: int, coding: object) -> None:
    layer = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=groups, bias=groups != 2)
    module = Int8Conv2d.from_float(layer, Dense(), INT8, coding, residency=residency)
    x = torch.randn(4, 6, 9, 8)
    packed = module.packed_tensors()["weight"]
    codes = packed.dense_codes().view(layer.weight.shape)
    scales, sums = packed.params["scales"].view(6), codes.sum((1, 2, 3), dtype=torch.int32)
    expected = ops.int8_conv2d(x, codes, scales, sums, layer.bias, 2, 1, 1, groups)
    assert torch.equal(module(x), expected)
    assert close(module, layer, x)
    again = Int8Conv2d.from_packed(module.get_config(), module.packed_tensors(), residency)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), expected)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)
    assert torch.equal(module.weight, packed.unpack())
    module.packed_weight.set_residency("packed" if residency == "decoded" else "decoded")
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same", "dilation": 2},
        {"padding": "same", "kernel_size": (4, 3)},
        {"padding": "valid"},
        {"padding": (2, 0), "stride": (1, 3)},
        {"padding": (1, 2), "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "replicate", "kernel_size": 2},
    ],
    ids=str,
)
def test_every_option_of_conv2d(options: dict) -> None:
    layer = nn.Conv2d(5, 7, **{"kernel_size": 3, **options})
    module = Int8Conv2d.from_float(layer, Dense(), INT8)
    x = torch.randn(3, 5, 8, 9)
    assert module(x).shape == layer(x).shape
    assert close(module, layer, x)
    # One image, with or without its batch.
    assert torch.equal(module(x[1]), module(x[1:2])[0])
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(module(last), module(x))
    if layer.padding_mode == "zeros":
        assert module(last).is_contiguous(memory_format=torch.channels_last)
    again = Int8Conv2d.from_packed(module.get_config(), module.packed_tensors())
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x))


def test_int8_conv2d_gradient() -> None:
    module = Int8Conv2d.from_float(nn.Conv2d(4, 6, 3, padding=1), Dense(), INT8)
    x = torch.randn(2, 4, 7, 5, requires_grad=True)
    grad = torch.randn(2, 6, 7, 5)
    module(x).backward(grad)
    straight = x.detach().requires_grad_()
    F.conv2d(straight, module.weight, None, padding=1).backward(grad)
    torch.testing.assert_close(x.grad, straight.grad)
    torch.testing.assert_close(module.bias.grad, grad.sum((0, 2, 3)))


def test_int8_conv2d_in_half_precision_and_compiled() -> None:
    module = Int8Conv2d.from_float(nn.Conv2d(4, 6, 3), Dense(), INT8)
    x = torch.randn(2, 4, 7, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    parts = {k: v.clone() for k, v in module.packed_tensors()["weight"].parts.items()}
    module.to(torch.bfloat16, memory_format=torch.channels_last)
    assert module(x.bfloat16()).dtype == torch.bfloat16
    for name, part in module.packed_tensors()["weight"].parts.items():
        assert torch.equal(part, parts[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_conv2d_follows_autocast(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(4, 6, 3)
    module = Int8Conv2d.from_float(layer, Dense(), INT8)
    x = torch.randn(2, 4, 7, 5)
    with torch.autocast("cpu", dtype):
        assert module(x).dtype == layer(x).dtype == dtype
        assert torch.equal(module(x), module(x.to(dtype)))
    assert module(x).dtype == torch.float32


def test_int8_conv2d_refuses_other_numbers() -> None:
    with pytest.raises(ValueError, match="Int\\(bits=4"):
        Int8Conv2d.from_float(nn.Conv2d(4, 6, 3), Dense(), Int(bits=4))


def test_a_shared_weight_in_two_numbers_of_groups() -> None:
    """Its codes lie differently for each, so that each has its own."""
    one, two = nn.Conv2d(3, 4, 3), nn.Conv2d(6, 4, 3, groups=2)
    two.weight = one.weight
    first = Int8Conv2d.from_float(one, Dense(), INT8)
    second = Int8Conv2d.from_module(two, first.packed_weight)
    assert second.packed_weight is not first.packed_weight
    for module, layer in ((first, one), (second, two)):
        assert close(module, layer, torch.randn(2, layer.in_channels, 7, 7))
    assert Int8Conv2d.from_module(one, first.packed_weight).packed_weight is first.packed_weight


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12)
    ).eval()


@RESIDENCY
def test_convert_save_load(residency: str, tmp_path: Path) -> None:
    model, x = net(), torch.randn(2, 8, 9, 9)
    packed = co.convert(model, INT8, prefer="size", residency=residency)
    # A depthwise convolution has too few products for it.
    assert [type(m) for m in packed] == [Int8Conv2d, Fused, PackedConv2d]
    co.save(packed, tmp_path / "net.safetensors")
    again = co.load(tmp_path / "net.safetensors", net())
    assert type(again[0]) is Int8Conv2d
    assert torch.equal(again(x), packed(x))
    assert (packed(x) - model(x)).norm() < 0.02 * model(x).norm()
    first, _ = report(packed).layers
    assert (first.kernel, first.became) == ("int8_conv2d", "Int8Conv2d")
    assert "Int8Conv2d: int8_conv2d" in " ".join(str(report(packed)).split())


@pytest.mark.parametrize("fastest", [0, 1, 2, 3])
@pytest.mark.parametrize("safe", [(2, 4), ()], ids=str)
def test_convert_measures_it(monkeypatch: pytest.MonkeyPatch, fastest: int, safe: tuple) -> None:
    """Against the dense convolution, and against Winograd's with every tile that is safe."""
    seen = []

    def fake_times(functions: list) -> list[float]:
        assert len({function().shape for function in functions}) == 1
        seen.append(len(functions))
        return [1e-5 if i == fastest else 2e-5 for i in range(len(functions))]

    def fake_times_in_place(model: nn.Module, layers: dict, variants: dict, inputs: object) -> dict:
        assert type(layers["0"]) is nn.Conv2d
        ratio = 1 + variants["0"][1].__self__.winograd.tile
        return {"0": [[1e-5 * ratio] * 8, [1e-5] * 8]}

    monkeypatch.setattr("compressops.rivals.median_times", fake_times)
    monkeypatch.setattr("compressops.kernels.times_in_place", fake_times_in_place)
    unsafe = {t: None if t in safe else "not here" for t in (2, 4, 6)}
    monkeypatch.setattr("compressops.kernels.unsafe", lambda layer, input, tile: unsafe[tile])
    monkeypatch.setattr("compressops.backends.name", lambda op, device: "cpu")
    packed = co.convert(net()[:1], INT8, example_inputs=torch.randn(2, 8, 9, 9))
    assert seen == [2 + len(safe)]
    # Where nothing else is the fastest, both are as fast, and the dense one is taken.
    assert type(packed[0]) is (Int8Conv2d if fastest == 0 else PackedConv2d)
    why = packed.conversion_notes["0"].why
    used = "" if fastest == 0 else " not used"
    rivals = [
        f"Winograd F({tile}, 3) {10 if i + 2 == fastest else 20} µs" for i, tile in enumerate(safe)
    ]
    times = [f"{10 if fastest == 0 else 20} µs", f"dense {10 if fastest == 1 else 20} µs", *rivals]
    assert f"Int8Conv2d{used}: measured {', '.join(times)}" in why
    if fastest:
        runs = packed[0].winograd
        assert (runs and runs.tile) == (4 if safe else None)


@pytest.mark.parametrize("asked", [{"activations": "minmax"}, {"symmetric": False}], ids=str)
def test_that_activations_stay_dynamic_is_said(asked: dict) -> None:
    images = torch.randn(2, 4, 6, 6)
    model = nn.Sequential(nn.Conv2d(4, 8, 3)).eval()
    calibration = co.Calibrate([images], **asked)
    found = co.convert(model, co.Int(bits=8), calibration=calibration, prefer="size")
    assert type(found[0]) is co.nn.Int8Conv2d
    assert "activations are dynamic and symmetric" in found.conversion_notes["0"].why
