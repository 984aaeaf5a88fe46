"""Winograd layers: the float layers' results and state, and no transformed weight out of date."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops import ops
from compressops.formats import DynamicFixedPoint, Float, Huffman, Int
from compressops.nn import PackedConv1d, PackedConv2d, Winograd, WinogradConv2d

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def float_layer(**options: object) -> nn.Conv2d:
    return nn.Conv2d(**{"in_channels": 6, "out_channels": 10, "kernel_size": 3, **options})


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_state_dicts_are_interchangeable() -> None:
    layer, ours = float_layer(padding=1), WinogradConv2d(6, 10, 3, padding=1)
    assert list(ours.state_dict()) == list(layer.state_dict())
    x = torch.randn(1, 6, 9, 9)
    ours(x)
    ours.load_state_dict(layer.state_dict())
    close(ours(x), layer(x))
    layer.load_state_dict(WinogradConv2d(6, 10, 3).state_dict())
    ours.load_state_dict(layer.state_dict(), assign=True)
    close(ours(x), layer(x))


# The transformed weight.


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Grows by one with each transformation of a weight."""
    calls: list[tuple] = []
    pack = ops.winograd_conv2d_pack

    def counted(weight: Tensor, *args: object) -> Tensor:
        calls.append(tuple(weight.shape))
        return pack(weight, *args)

    monkeypatch.setattr(ops, "winograd_conv2d_pack", counted)
    return calls


def test_it_is_transformed_once(packs: list) -> None:
    ours = WinogradConv2d(6, 10, 3)
    for _ in range(3):
        ours(torch.randn(1, 6, 9, 9))
    with torch.no_grad():
        ours(torch.randn(4, 6, 12, 7))
    assert len(packs) == 1


def replace_weight(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def swap_data(layer: nn.Module) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def step(layer: nn.Module) -> None:
    layer(torch.randn(1, 6, 9, 9)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), 0.5).step()


def write_behind_its_back(layer: nn.Module) -> None:
    layer.weight.data.mul_(2)
    layer.winograd.clear()


CHANGES = {
    "in place": lambda m: torch.nn.init.normal_(m.weight),
    "a view of it": lambda m: m.weight.detach()[:, 1:3].zero_(),
    "replaced": replace_weight,
    "its data replaced": swap_data,
    "an optimizer's step": step,
    "load_state_dict": lambda m: m.load_state_dict(float_layer(padding=1).state_dict()),
    "assigned": lambda m: m.load_state_dict(float_layer(padding=1).state_dict(), assign=True),
    "another dtype and back": lambda m: m.to(torch.bfloat16).float(),
    "written through .data, and cleared": write_behind_its_back,
    "written through .data, then eval()": lambda m: (m.weight.data.mul_(2), m.eval()),
    "of other strides": lambda m: m.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_the_weight(change: str, compiled: bool) -> None:
    torch.compiler.reset()
    ours, x = WinogradConv2d(6, 10, 3, padding=1), torch.randn(2, 6, 11, 9)
    call = torch.compile(ours, backend="eager", fullgraph=True) if compiled else ours
    with torch.no_grad():
        call(x)
    CHANGES[change](ours)
    with torch.no_grad():
        close(call(x), F.conv2d(x, ours.weight, ours.bias, padding=1))


def test_memory_that_was_freed_is_not_taken_for_the_old_weight() -> None:
    ours, x = WinogradConv2d(6, 10, 3), torch.randn(1, 6, 9, 9)
    with torch.no_grad():
        for _ in range(20):
            # A new weight likes to lie where the last but one lay, and has the same version.
            for _ in range(2):
                ours.weight.data = torch.randn(10, 6, 3, 3)
            close(ours(x), F.conv2d(x, ours.weight, ours.bias))


def test_copies_are_transformed_anew(packs: list) -> None:
    ours, x = WinogradConv2d(6, 10, 3, tile=2), torch.randn(1, 6, 9, 9)
    expected = ours(x)
    size = len(pickle.dumps(ours))
    assert size < len(pickle.dumps(float_layer())) + 1000
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert copied.winograd.kept() == ()
        assert copied.winograd.tile == 2
        with torch.no_grad():
            copied.weight.mul_(2)
        close(copied(x) - copied.bias.view(-1, 1, 1), 2 * (expected - ours.bias.view(-1, 1, 1)))
        assert torch.equal(ours(x), expected)
    assert len(packs) == 3


def test_it_goes_with_its_layer() -> None:
    ours = WinogradConv2d(6, 10, 3)
    ours(torch.randn(1, 6, 9, 9))
    (kept,) = map(weakref.ref, ours.winograd.kept())
    assert kept() is not None
    ours.to(torch.float16)
    assert kept() is None
    ours.float()(torch.randn(1, 6, 9, 9))
    (kept,) = map(weakref.ref, ours.winograd.kept())
    del ours
    gc.collect()
    assert kept() is None


def test_tensors_without_memory() -> None:
    ours, x = WinogradConv2d(6, 10, 3, padding=1, device="meta"), torch.empty(2, 6, 9, 9)
    assert ours(x.to("meta")).shape == (2, 10, 9, 9)
    assert ours.winograd.kept() == ()
    ours = WinogradConv2d(6, 10, 3, padding=1)
    weights = torch.randn(3, 10, 6, 3, 3)

    def call(weight: Tensor) -> Tensor:
        return torch.func.functional_call(ours, {"weight": weight}, (x.normal_(),))

    with torch.no_grad():
        for weight in weights:
            close(call(weight), F.conv2d(x, weight, ours.bias, padding=1))


@torch.inference_mode()
def test_inference_mode() -> None:
    ours, x = WinogradConv2d(6, 10, 3), torch.randn(1, 6, 9, 9)
    close(ours(x), F.conv2d(x, ours.weight, ours.bias))
    close(ours(x), F.conv2d(x, ours.weight, ours.bias))
    ours.load_state_dict(float_layer().state_dict(), assign=True)
    close(ours(x), F.conv2d(x, ours.weight, ours.bias))


@torch.inference_mode()
def test_writes_in_inference_mode_are_seen(packs: list) -> None:
    for made_there in (True, False):
        with torch.inference_mode(made_there):
            ours = WinogradConv2d(6, 10, 3, tile=4)
        x = torch.randn(1, 6, 9, 9)
        ours(x)
        ours.load_state_dict(float_layer().state_dict())
        close(ours(x), F.conv2d(x, ours.weight, ours.bias))
    before = len(packs)
    ours(x)
    assert len(packs) == before  # of the one that was made outside


# Gradients, autocast, graphs.


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("tile", [2, 4])
def test_gradients_are_those_of_the_float_layer(aware: bool, tile: int) -> None:
    layer = float_layer(padding=1, groups=2)
    ours = WinogradConv2d.from_float(copy.deepcopy(layer), tile=tile, aware=aware)
    x = torch.randn(2, 6, 9, 7, requires_grad=True)
    results = []
    for module in (layer, ours):
        module(x).square().sum().backward()
        results.append((x.grad, module.weight.grad, module.bias.grad))
        x.grad = None
    for actual, expected in zip(*reversed(results), strict=True):
        close(actual, expected)


def test_aware_differentiates_through_the_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    reference = ops.winograd_conv2d_reference
    monkeypatch.setattr(
        ops, "winograd_conv2d_reference", lambda *a: (calls.append(1), reference(*a))[1]
    )
    ours, x = WinogradConv2d(6, 10, 3, aware=True), torch.randn(1, 6, 9, 9)
    ours(x).sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        ours(x)
    ours.requires_grad_(False)(x)
    assert len(calls) == 1
    assert ours.weight.grad is not None


def test_double_precision_runs_the_reference() -> None:
    layer = float_layer(padding=1).double()
    ours = WinogradConv2d.from_float(layer)
    x = torch.randn(1, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours(x), layer(x), rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(ours, (x,))


def test_training_learns() -> None:
    torch.manual_seed(1)
    target = float_layer(padding=1).requires_grad_(False)
    model = nn.Sequential(WinogradConv2d(6, 10, 3, padding=1))
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    x = torch.randn(4, 6, 8, 8)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), target(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_autocast_casts_as_it_does_for_conv2d(packs: list) -> None:
    layer = float_layer(padding=1)
    ours, x = WinogradConv2d.from_float(layer), torch.randn(2, 6, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        assert ours(x).dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(ours(x), expected, rtol=0.02, atol=0.02)
        assert len(packs) == 1
        ours(x).float().sum().backward()
    assert ours.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_it_compiles_into_one_graph(backend: str, packs: list) -> None:
    torch.compiler.reset()
    model = nn.Sequential(
        WinogradConv2d(6, 10, 3, padding=1), nn.ReLU(), WinogradConv2d(10, 6, 3, padding="same")
    )
    x = torch.randn(2, 6, 9, 9)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        actual = compiled(x)
        # The transformed weights are those of the layers, not computed in the graph.
        assert len(packs) == 2
        close(compiled(x), actual)
        close(model(x), actual)
        assert len(packs) == 2
        model[2].weight.mul_(3)
        actual = compiled(x)
        assert len(packs) == 3
        close(model(x), actual)
    if backend != "inductor":
        compiled(x).sum().backward()
        actual = [p.grad for p in model.parameters()]
        model.zero_grad()
        model(x).sum().backward()
        for got, parameter in zip(actual, model.parameters(), strict=True):
            close(got, parameter.grad)


def test_it_exports() -> None:
    model, x = nn.Sequential(WinogradConv2d(4, 4, 3)).eval(), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        close(exported(x), model(x))


def test_the_op_in_graphs() -> None:
    strategy = Winograd(tile=4)
    for x in (
        torch.randn(2, 6, 9, 8),
        torch.randn(1, 6, 9, 8).to(memory_format=torch.channels_last),
    ):
        args = (x, torch.randn(10, 6, 3, 3), torch.randn(10), [1, 0], 1, strategy._key)
        torch.library.opcheck(torch.ops.compressops.winograd_layer.default, args)


# Packed layers.


@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_packed_layers_run_it(residency: str, packs: list) -> None:
    layer = float_layer(padding="same", groups=2)
    packed = PackedConv2d.from_float(
        layer, number=Int(bits=6), coding=Huffman(), residency=residency
    )
    x = torch.randn(2, 6, 9, 9)
    expected = packed(x)
    assert (packed.op, packed.backend()) == (None, "torch")
    packed.run_winograd(Winograd(4))
    assert packed.op == "winograd_conv2d"
    close(packed(x), expected)
    packed(x)
    # Packed residency keeps nothing that is decoded.
    assert len(packs) == len(packed.winograd.kept()) == (1 if residency == "decoded" else 0)
    assert torch.equal(packed(x), WinogradConv2d.from_float(dense(packed), 4)(x))
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        close(copied(x), expected)
        assert copied.op == "winograd_conv2d"
    packed.run_winograd(None)
    assert torch.equal(packed(x), expected)
    packed.run_winograd(Winograd(4))
    torch.testing.assert_close(packed.half().float()(x), expected, rtol=1e-3, atol=1e-3)


def dense(packed: PackedConv2d) -> nn.Conv2d:
    """The float layer that holds the decoded weight."""
    layer = float_layer(padding="same", groups=packed.groups)
    layer.weight, layer.bias = nn.Parameter(packed.weight), packed.bias
    return layer


def test_packed_conv1d_runs_it() -> None:
    layer = nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular")
    packed = PackedConv1d.from_float(layer)
    packed.run_winograd(Winograd("auto"))
    x = torch.randn(2, 6, 20)
    close(packed(x), layer(x))


def test_packed_layers_go_on_running_it() -> None:
    ours = WinogradConv2d.from_float(float_layer(), tile=2)
    packed = PackedConv2d.from_float(ours, number=Float())
    assert packed.winograd.tile == 2
    assert packed.winograd is not ours.winograd
    assert "winograd={'tile': 2}" in repr(packed)
    again = PackedConv2d.from_packed(packed.get_config(), packed.packed_tensors())
    assert again.winograd.tile == 2
    assert again.get_config() == packed.get_config()


def test_new_parts_are_transformed_anew() -> None:
    one, two = (
        PackedConv2d.from_float(float_layer(padding=1), number=DynamicFixedPoint(bits=6))
        for _ in range(2)
    )
    x = torch.randn(1, 6, 9, 9)
    one.run_winograd(Winograd(4))
    one(x)
    one.load_state_dict(two.state_dict())
    close(one(x), two(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"winograd": {"tile": 5}}, "got 5"),
        ({"winograd": {"tile": [4]}}, r"got \[4\]"),
        ({"winograd": {"tile": 4.0}}, "got 4.0"),
        ({"winograd": {"aware": True}}, "must have a tile"),
        ({"winograd": 4}, "got 4"),
        ({"winograd": {"tile": 4, "color": "red"}}, "'color'"),
        ({"winograd": {"tile": 4}, "stride": [2, 2]}, "stride 1"),
    ],
)
def test_configs_that_make_no_sense(change: dict, message: str) -> None:
    packed = PackedConv2d.from_float(float_layer())
    with pytest.raises(ValueError, match=message):
        PackedConv2d.from_packed(packed.get_config() | change, packed.packed_tensors())


def test_packed_decoded_layers_compile() -> None:
    torch.compiler.reset()
    packed = PackedConv2d.from_float(float_layer(padding=1), number=Int(bits=4))
    packed.run_winograd(Winograd(4))
    x = torch.randn(2, 6, 9, 9)
    with torch.no_grad():
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        close(compiled(x), packed(x))
