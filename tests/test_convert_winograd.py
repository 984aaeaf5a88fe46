"""convert(): convolutions become Winograd's where that is measured faster and exact enough.

No test here depends on how fast anything is: the times are made up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from convert_models import compressed, kinds

from compressops import kernels
from compressops.compress import Prune, Quantize
from compressops.convert import convert
from compressops.formats import DynamicFixedPoint, Huffman, Int
from compressops.nn import PackedConv2d, WinogradConv1d, WinogradConv2d
from compressops.report import report
from compressops.serialize import inspect, load, save, verify


class Net(nn.Module):
    """Convolutions that Winograd has, and some that it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2)
        self.second = nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect", bias=False)
        self.point = nn.Conv2d(8, 6, 1)
        self.line = nn.Conv1d(6, 4, 5)
        self.unused = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.down(self.first(x).relu()).relu()).relu()
        return self.line(self.point(x).flatten(2))


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def why(model: nn.Module, name: str) -> str:
    return model.conversion_notes[name].why


def test_the_fastest_tile_that_is_exact_enough(
    speeds: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With so few channels F(6, 3) has about 7 times the direct error, and F(4, 3) twice.
    monkeypatch.setattr(kernels, "ERROR_LIMIT", 4.0)
    model = Net().eval()
    seen = speeds(lambda name, tile: {2: 1.5, 4: 3.0, 6: 9.0}[tile])
    converted = convert(model, example_inputs=X)
    assert kinds(converted) == {
        "first": "WinogradConv2d",
        "down": "Conv2d",
        "second": "WinogradConv2d",
        "point": "Conv2d",
        "line": "WinogradConv1d",
        "unused": "Conv2d",
    }
    assert converted.first.winograd.tile == converted.line.winograd.tile == 4
    # What is not exact enough is not even measured.
    assert ("second", 6) not in seen
    assert (
        "Winograd F(4, 3): measured 33 µs, direct 100 µs; Winograd F(6, 3) is not safe: its "
        in (why(converted, "second"))
    )
    assert "times the direct convolution's, over 4" in why(converted, "second")
    assert why(converted, "line").startswith("Winograd F(4, 5): measured 33 µs, direct 100 µs")
    assert why(converted, "down") == "Winograd needs stride 1, got stride=(2, 2)"
    assert "got (1, 1)" in why(converted, "point")
    assert why(converted, "unused") == "Winograd not used: not called with example_inputs"
    close(converted(X), model(X))
    assert converted.conversion_notes["first"].was == "Conv2d"
    assert not hasattr(model, "conversion_notes")
    mine = {t.data_ptr() for t in model.parameters()}
    assert mine.isdisjoint(t.data_ptr() for t in converted.parameters())


@pytest.mark.parametrize(
    ("factors", "taken"),
    [
        (1.04, False),  # less than the margin
        (0.5, False),
        (1.06, True),
        ([0.8] * 3 + [1.6] * 5, False),  # faster in the median, but often slower
        ([0.9] * 1 + [1.3] * 7, True),  # one bad round
    ],
)
def test_noise_makes_no_layer_slower(speeds: Callable, factors: object, taken: bool) -> None:
    speeds(lambda name, tile: factors)
    converted = convert(nn.Sequential(nn.Conv2d(3, 8, 3)), example_inputs=X)
    assert type(converted[0]) is (WinogradConv2d if taken else nn.Conv2d)
    assert ("not used" in why(converted, "0")) is not taken
    assert "µs, direct 100 µs" in why(converted, "0")


def test_the_best_of_those_that_pass(speeds: Callable) -> None:
    # F(2, 3) is faster in the median round, and not to be relied on.
    speeds(lambda name, tile: [0.9] * 3 + [2.0] * 5 if tile == 2 else 1.2)
    converted = convert(nn.Sequential(nn.Conv2d(3, 8, 3)), example_inputs=X)
    assert converted[0].winograd.tile == 4


@pytest.mark.parametrize("options", [{}, {"prefer": "size", "example_inputs": X}])
def test_nothing_changes_unless_measured(speeds: Callable, options: dict) -> None:
    seen = speeds(lambda name, tile: 9.0)
    converted = convert(Net(), **options)
    assert "WinogradConv2d" not in kinds(converted).values()
    assert why(converted, "first") == "not compressed, and no config asks for it"
    assert seen == []


def test_what_may_not_be_touched(speeds: Callable) -> None:
    seen = speeds(lambda name, tile: 9.0)
    options = {"filter_fn": lambda module, name: name != "first", "example_inputs": X}
    converted = convert(Net(), {"second": None, "*": Huffman()}, **options)
    assert (type(converted.first), type(converted.second)) == (nn.Conv2d, nn.Conv2d)
    assert why(converted, "first") == "filtered out by filter_fn"
    assert why(converted, "second") == "left as it is by the config"
    assert {name for name, _ in seen} == {"line"}


def test_without_a_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressops.backends.name", lambda op, device: "eager")
    converted = convert(Net(), example_inputs=X)
    assert why(converted, "first") == "Winograd not used: its op has no compiled kernel here"
    doubled = convert(Net().double(), example_inputs=X.double())
    assert why(doubled, "first") == "Winograd not used: its kernels have no torch.float64"


@pytest.mark.parametrize("residency", ["decoded", "packed"])
def test_packed_convolutions(speeds: Callable, residency: str) -> None:
    model = compressed(Net().eval(), Prune(density=0.5), Quantize(DynamicFixedPoint(bits=8)))
    expected = model(X)
    speeds(lambda name, tile: 2.0 if name != "second" else 0.5)
    converted = convert(model, example_inputs=X, residency=residency)
    assert set(kinds(converted).values()) == {"PackedConv2d", "PackedConv1d"}
    assert (converted.first.op, converted.second.op) == ("winograd_conv2d", None)
    close(converted(X), expected)
    # The packed parts are what they were.
    assert torch.equal(converted.first.weight, model.first.weight)
    dense = "runs the dense kernel on decoded weights"
    assert dense not in why(converted, "first")
    assert why(converted, "first").startswith("packed as it was compressed; Winograd F(")
    assert dense in why(converted, "second")
    assert "Winograd not used" in why(converted, "second")


def test_already_packed_ones(speeds: Callable) -> None:
    once = convert(Net().eval(), Int(bits=6))
    speeds(lambda name, tile: 2.0)
    twice = convert(once, example_inputs=X)
    assert (once.first.op, twice.first.op) == (None, "winograd_conv2d")
    assert why(twice, "first").startswith("already packed; Winograd F(")
    mine = {t.data_ptr() for t in [*once.parameters(), *once.buffers()]}
    assert mine.isdisjoint(t.data_ptr() for t in [*twice.parameters(), *twice.buffers()])
    close(twice(X), once(X))
    # What runs as Winograd's goes on doing so.
    seen = speeds(lambda name, tile: 0.1)
    assert convert(twice, example_inputs=X).first.winograd.tile == twice.first.winograd.tile
    moved = convert(twice, residency="packed")
    assert moved.first.winograd.tile == twice.first.winograd.tile
    assert "first" not in {name for name, _ in seen}


def test_compressing_what_was_converted(speeds: Callable) -> None:
    speeds(lambda name, tile: 2.0)
    converted = convert(Net().eval(), example_inputs=X)
    small = compressed(converted, Prune(density=0.5), Quantize(Int(bits=8)))
    expected = small(X)
    packed = convert(small)
    assert type(packed.first) is PackedConv2d
    assert packed.first.winograd.tile == converted.first.winograd.tile
    close(packed(X), expected)
    assert packed.conversion_notes["first"].was == "Conv2d"


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.two.weight = self.one.weight
        self.again = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.two(self.one(x)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("taken", [("one", "two"), ("two",)])
def test_shared_weights_stay_shared(speeds: Callable, inplace: bool, taken: tuple) -> None:
    model, x = Shared().eval(), torch.randn(1, 4, 8, 8)
    expected, parameter = model(x), model.one.weight
    speeds(lambda name, tile: 2.0 if name in taken else 0.5)
    converted = convert(model, example_inputs=x, inplace=inplace)
    assert converted.one is converted.again
    assert converted.one.weight is converted.two.weight
    assert (converted.one.weight is parameter) is inplace
    assert isinstance(converted.two, WinogradConv2d)
    close(converted(x), expected)


def test_hooks_and_modes_go_along(speeds: Callable) -> None:
    speeds(lambda name, tile: 2.0)
    model = Net().train()
    model.second.eval()
    calls = []
    model.first.register_forward_hook(lambda m, i, o: calls.append(type(m).__name__))
    converted = convert(model, example_inputs=X)
    calls.clear()
    converted(X)
    assert calls == ["WinogradConv2d"]
    assert converted.first.training
    assert not converted.second.training
    assert "forward" not in vars(model.first)


def test_a_model_that_is_a_convolution_itself(speeds: Callable) -> None:
    speeds(lambda name, tile: 2.0)
    layer = nn.Conv2d(3, 4, 3)
    assert isinstance(convert(layer, example_inputs=X), WinogradConv2d)
    # Nothing is asked for that cannot be done in place.
    assert convert(layer, example_inputs=X, inplace=True) is layer


def test_weights_that_hooks_compute_are_left(speeds: Callable) -> None:
    speeds(lambda name, tile: 2.0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    assert not isinstance(convert(model, example_inputs=X)[0], WinogradConv2d)


def test_converted_models_train_and_compile(speeds: Callable) -> None:
    speeds(lambda name, tile: 2.0)
    model = Net().eval()
    converted = convert(model, example_inputs=X)
    for each in (model, converted):
        each(X).square().sum().backward()
    close(converted.first.weight.grad, model.first.weight.grad)
    with torch.no_grad():
        compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
        close(compiled(X), model(X))


# Files.


@pytest.fixture
def both(speeds: Callable) -> nn.Module:
    """Winograd's on a float weight, on a packed one, and neither."""
    speeds(lambda name, tile: 2.0 if tile == 2 or name == "line" else 0.5)
    return convert(Net().eval(), {"second": Int(bits=6), "down": Int(bits=6)}, example_inputs=X)


def test_files_keep_the_choice(both: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    save(both, file)
    assert verify(file).packed == 2
    assert inspect(file).file_bytes == file.stat().st_size
    loaded = load(file, Net)
    assert kinds(loaded) == kinds(both)
    assert loaded.first.winograd.tile == 2
    # Nothing is left to be computed by the first call.
    kept = loaded.first.winograd.kept()[0], loaded.second.winograd.kept()[0]
    assert torch.equal(loaded(X), both(X))
    assert loaded.first.winograd.kept()[0] is kept[0]
    assert loaded.second.winograd.kept()[0] is kept[1]
    assert isinstance(loaded.line, WinogradConv1d)
    assert loaded.second.winograd.tile == 2
    assert loaded.down.winograd is None
    # What stands in the model does not matter: the file says what runs as what.
    again = load(file, lambda: convert(Net().eval(), {"down": Int(bits=6)}))
    assert torch.equal(again(X), both(X))
    lean = load(file, Net, residency="packed")
    close(lean(X), both(X))
    assert lean.second.winograd.tile == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda m: setattr(m, "first", nn.Conv2d(3, 8, 3)),
            r"'first': the file has padding=\(1, 1",
        ),
        (lambda m: setattr(m, "first", nn.Conv2d(3, 8, 3, padding=1, bias=False)), "bias=True"),
        (lambda m: setattr(m, "first", nn.Linear(3, 8)), "WinogradConv2d, the model a Linear"),
        (lambda m: delattr(m, "first"), "'first' does not exist"),
    ],
)
def test_models_that_do_not_fit(
    both: nn.Module, tmp_path: Path, model: Callable, message: str
) -> None:
    file = tmp_path / "net.safetensors"
    save(both, file)
    other = Net()
    model(other)
    with pytest.raises(ValueError, match=message):
        load(file, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"winograd": {"tile": 3}}, "got 3"),
        ({"winograd": {"tile": 4, "aware": "maybe"}}, "aware must be"),
        ({"winograd": None}, "got None"),
        ({"color": 1}, "expected the keys"),
    ],
)
def test_configs_that_make_no_sense(
    both: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, message: str
) -> None:
    config = both.first.get_config() | change
    monkeypatch.setattr(both.first, "get_config", lambda: config)
    file = tmp_path / "net.safetensors"
    save(both, file)
    with pytest.raises(ValueError, match=f"'first': .*{message}"):
        load(file, Net)


# What is said.


def test_the_report(both: nn.Module) -> None:
    found = {layer.name: layer for layer in report(both).layers}
    assert found["first"].kernel == "winograd_conv2d F(2, 3)"
    assert (found["first"].became, found["first"].backend) == ("WinogradConv2d", "cpu")
    assert found["second"].kernel == "winograd_conv2d F(2, 3)"
    assert found["line"].kernel == "winograd_conv2d F(4, 5)"
    assert found["down"].kernel == "dense"
    # The transformed weight is memory that the layer takes, and no byte of the file.
    transformed = both.first.winograd.kept()[0].nbytes
    assert found["first"].memory == found["first"].dense + transformed
    assert found["first"].stored == found["first"].dense
    assert found["second"].memory > found["second"].dense + both.second.winograd.kept()[0].nbytes
    text = str(report(both))
    assert "2 run winograd_conv2d F(2, 3) (cpu); 1 runs winograd_conv2d F(4, 5) (cpu)" in (
        " ".join(text.split())
    )


def test_what_is_nowhere_safe_stays_direct(
    speeds: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "ERROR_LIMIT", 0.01)
    seen = speeds(lambda name, tile: 9.0)
    converted = convert(nn.Sequential(nn.Conv2d(3, 8, 3)), example_inputs=X)
    assert type(converted[0]) is nn.Conv2d
    assert why(converted, "0").startswith("Winograd not used: Winograd F(2, 3) is not safe: its er")
    assert "F(6, 3) is not safe" in why(converted, "0")
    assert seen == []


def test_real_measurement_runs() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    x = torch.randn(1, 16, 20, 20)
    converted = convert(model, example_inputs=x)
    close(converted(x), model(x))
    assert "Winograd" in why(converted, "0")


@pytest.mark.parametrize("made_inside", [False, True])
def test_in_inference_mode_layers_keep_their_transformed_weights(
    speeds: Callable, tmp_path: Path, made_inside: bool
) -> None:
    """Tensors of inference mode count no writes: nothing is kept of such a weight."""
    speeds(lambda name, tile: 2.0)
    with torch.inference_mode(made_inside):
        model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).eval()
        x = torch.randn(1, 16, 24, 24)
    with torch.inference_mode():
        made = convert(model, example_inputs=x)
        save(made, tmp_path / "net.safetensors")
        for net in (made, load(tmp_path / "net.safetensors", model)):
            assert not net[0].weight.is_inference()
            close(net(x), model(x))
            kept = net[0].winograd.kept()[-1]
            net(x)
            assert net[0].winograd.kept()[-1] is kept
