"""convert() lets integer layers compute what activates them: where, where not, and the file."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops import fusion, kernels
from compressops.compress import Quantize
from compressops.convert import convert, from_packed
from compressops.formats import BlockSparse, Huffman, Int, Number, Ternary
from compressops.nn import Fused, Int8Linear, PackedLinear
from compressops.report import report
from compressops.serialize import load, save


class GELUActivation(nn.Module):
    """As transformers has it."""

    def __init__(self) -> None:
        super().__init__()
        self.act = F.gelu

    def forward(self, input: Tensor) -> Tensor:
        return self.act(input)


class Block(nn.Module):
    """Two linear layers and an activation, and how they are used."""

    def __init__(self, use: Callable[..., Any], act: nn.Module | None = None) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(32, 48), act or GELUActivation()
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(48, 32)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def sequential(*after: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 48), *after, nn.Linear(48, 32))


def mlp(block: Block, x: Tensor) -> Tensor:
    return block.out(block.drop(block.act(block.dense(x))))


def unfused(model: nn.Module, config: Any, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    with monkeypatch.context() as patch:
        patch.setattr(fusion, "pairs", lambda model: {})
        return convert(model, config, prefer="size")


X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
FUSED = {
    "Sequential, GELU": (lambda: sequential(nn.GELU()), {"0": ("1", "gelu")}),
    "Sequential, ReLU": (lambda: sequential(nn.ReLU(inplace=True)), {"0": ("1", "relu")}),
    "two": (
        lambda: nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.GELU()),
        {"0": ("1", "relu"), "2": ("3", "gelu")},
    ),
    "BertIntermediate": (lambda: Block(lambda b, x: b.act(b.dense(x))), {"dense": ("act", "gelu")}),
    "dropout after": (
        lambda: Block(lambda b, x: F.dropout(b.act(b.dense(x)), training=b.training)),
        {"dense": ("act", "gelu")},
    ),
    "MLP": (lambda: Block(mlp, nn.ReLU()), {"dense": ("act", "relu")}),
    "residual": (lambda: Block(lambda b, x: x + mlp(b, x)), {"dense": ("act", "gelu")}),
}


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("number", [Int(8), Int(4, group_size=16), Ternary("row")], ids=str)
def test_fused(case: str, number: Number, monkeypatch: pytest.MonkeyPatch) -> None:
    make, expected = FUSED[case]
    model = nn.ModuleDict({"inner": make()})
    before, random = copy.deepcopy(model), torch.get_rng_state()
    assert fusion.pairs(model["inner"]) == expected
    assert torch.equal(torch.get_rng_state(), random)
    model.eval(), before.eval()
    packed = convert(model, number, prefer="size")
    plain = unfused(model, number, monkeypatch)
    for layer, (after, activation) in expected.items():
        module = packed["inner"].get_submodule(after)
        assert type(module) is Fused
        assert module.activation == activation
        assert packed["inner"].get_submodule(layer).activation == activation
        note = next(la.why for la in report(packed).layers if la.name == f"inner.{layer}")
        assert f"computes the {activation} of 'inner.{after}' too" in note
    x = X.clone().requires_grad_()
    ours, theirs = packed["inner"](x), plain["inner"](x)
    # The fused GELU is as exact as torch's, and codes of what follows may tip over to the next.
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=0)
    assert (ours - theirs).abs().mean() < 1e-4
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
    assert (grads[0] - grads[1]).abs().mean() < 1e-2 * grads[1].abs().mean()
    # The model that was given is as it was.
    assert str(model) == str(before)


class Residual(nn.Module):
    """As of a ResNet without batch norms: the second sum is activated, and nobody's alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.relu, self.after = nn.ReLU(), nn.ReLU(inplace=True)
        self.shortcut, self.norm = nn.Conv2d(8, 32, 1, 2), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.relu(self.first(x)))
        return self.after(y + self.norm(self.shortcut(x)))


IMAGES = torch.randn(2, 8, 9, 10, generator=torch.Generator().manual_seed(0))
FUSED_CONVOLUTIONS = {
    "Sequential": (
        lambda: nn.Sequential(
            *(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, 1, "same")),
            *(nn.GELU(), nn.Flatten(), nn.Linear(24 * 12, 20), nn.ReLU(inplace=True)),
        ),
        {"0": ("1", "relu"), "3": ("4", "gelu"), "6": ("7", "relu")},
    ),
    "residual": (Residual, {"first": ("relu", "relu")}),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        {},
    ),
}


@pytest.mark.parametrize("case", FUSED_CONVOLUTIONS)
@pytest.mark.parametrize("config", [BlockSparse((4, 1)), Int(8)], ids=str)
def test_convolutions(
    case: str, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, expected = FUSED_CONVOLUTIONS[case]
    model = make().eval()
    assert fusion.pairs(model) == expected
    packed, plain = convert(model, config, prefer="size"), unfused(model, config, monkeypatch)
    found = {name for name, module in packed.named_modules() if type(module) is Fused}
    assert found == {after for after, _ in expected.values()}
    x = IMAGES.clone().requires_grad_()
    ours, theirs = packed(x), plain(x)
    # Codes of what follows a GELU may tip over to the next.
    close = 1e-5 if isinstance(config, BlockSparse) else 2e-2
    torch.testing.assert_close(ours, theirs, atol=close, rtol=close)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
    assert (grads[0] - grads[1]).abs().mean() < close * grads[1].abs().mean()
    save(packed, tmp_path / "net.safetensors")
    assert torch.equal(load(tmp_path / "net.safetensors", make().eval())(IMAGES), packed(IMAGES))


def test_a_layer_with_an_activation_does_not_become_winograd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = convert(FUSED_CONVOLUTIONS["Sequential"][0]().eval(), BlockSparse(), prefer="size")
    seen: list[str] = []
    monkeypatch.setattr(kernels, "choose", lambda model, layers, *_: seen.extend(layers) or {})
    again = convert(packed, example_inputs=IMAGES)
    assert seen == []
    assert torch.equal(again(IMAGES), packed(IMAGES))


def both(block: Block, x: Tensor) -> Any:
    y = block.dense(x)
    return block.act(y), y


def kept(block: Block, x: Tensor) -> Tensor:
    block.last = block.dense(x)
    return block.act(block.last)


def in_place(block: Block, x: Tensor) -> Tensor:
    y = block.dense(x)
    block.act(y)
    return block.out(y)


def also_out(block: Block, x: Tensor) -> Tensor:
    y = block.dense(x)
    return block.out(block.act(y)) + block.out(y)


def by_dimensions(wanted: int) -> Callable[[], nn.Module]:
    def use(block: Block, x: Tensor) -> Tensor:
        y = block.dense(x)
        return y if x.dim() == wanted else block.act(y)

    return lambda: Block(use)


def in_training(block: Block, x: Tensor) -> Tensor:
    y = block.dense(x)
    return y if block.training else block.act(y)


def fails_in_training(block: Block, x: Tensor) -> Tensor:
    if block.training:
        raise RuntimeError("not so")
    return block.act(block.dense(x))


def endless(block: Block, x: Tensor) -> Tensor:
    while float(x.sum()) <= 0:
        x = block.act(block.dense(x))
    return x


def endless_alone(block: Block, x: Tensor) -> Tensor:
    y = block.act(block.dense(x))
    while True:
        try:
            if float(y.sum()) > 0:
                return y
        except Exception:
            y = y + 0


class TwoInputs(Block):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.act(self.dense(x)) * mask


def shared() -> nn.Module:
    act = nn.ReLU()
    return nn.Sequential(nn.Linear(32, 32), act, nn.Linear(32, 32), act)


def hooked(where: str, register: str) -> nn.Module:
    block = Block(mlp)
    getattr(block.get_submodule(where), register)(lambda *args: None)
    return block


def patched() -> nn.Module:
    block = Block(mlp)
    block.dense.forward = lambda x: F.linear(x, block.dense.weight).tanh()
    return block


NOT_FUSED = {
    "sum": lambda: Block(lambda b, x: b.act(y := b.dense(x)) + y),
    "view": lambda: Block(lambda b, x: b.act(y := b.dense(x)) * y[..., :1]),
    "returned": lambda: Block(both),
    "kept": lambda: Block(kept),
    "in place": lambda: Block(in_place, nn.ReLU(inplace=True)),
    "another layer": lambda: Block(also_out),
    "scaled": lambda: Block(lambda b, x: b.act(2 * b.dense(x))),
    "dropout between": lambda: Block(lambda b, x: b.act(b.drop(b.dense(x)))),
    "twice": lambda: Block(lambda b, x: b.act(b.dense(x)) + b.act(b.dense(-x))),
    "not called": lambda: Block(lambda b, x: b.dense(x)),
    "of 2 dimensions": by_dimensions(2),
    "of 3 dimensions": by_dimensions(3),
    "of 4 dimensions": by_dimensions(4),
    "in training": lambda: Block(in_training),
    "fails in training": lambda: Block(fails_in_training),
    "endless": lambda: Block(endless),
    "endless alone": lambda: Block(endless_alone),
    "two inputs": lambda: TwoInputs(mlp),
    "tanh": lambda: Block(mlp, nn.GELU(approximate="tanh")),
    "SiLU": lambda: Block(mlp, nn.SiLU()),
    "shared": shared,
    "output hook": lambda: hooked("dense", "register_forward_hook"),
    "gradient hook": lambda: hooked("dense", "register_full_backward_hook"),
    "input hook": lambda: hooked("act", "register_forward_pre_hook"),
    "patched": patched,
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_not_fused(case: str) -> None:
    model = NOT_FUSED[case]().eval()
    assert fusion.pairs(model) == {}
    packed = convert(model, Int(8), prefer="size")
    assert not any(isinstance(m, Fused) for m in packed.modules())


def test_layers_that_stay_compute_no_activation() -> None:
    model = FUSED["two"][0]()
    packed = convert(model, {"2": Int(8)}, prefer="size")
    assert [type(m) for m in packed] == [nn.Linear, nn.ReLU, Int8Linear, Fused]
    again = convert(packed, Huffman())
    assert [type(m) for m in again] == [PackedLinear, nn.ReLU, Int8Linear, Fused]
    assert again[2].activation == "gelu"
    assert torch.equal(again(X), packed(X))
    # A dense kernel has no activation of its own.
    assert not any(isinstance(m, Fused) for m in convert(model, Int(6)).modules())


def test_a_layer_that_was_trained_so() -> None:
    model = sequential(nn.ReLU())
    Quantize(Int(8), activations=Int(8), ranges="rows").attach(model)
    packed = convert(model.eval(), prefer="size")
    assert type(packed[1]) is Fused
    assert type(packed[0]) is Int8Linear
    torch.testing.assert_close(packed(X), model(X), atol=2e-3, rtol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_file(inplace: bool, tmp_path: Path) -> None:
    make = FUSED["MLP"][0]
    packed = convert(make().eval(), (Int(8), Huffman()), prefer="size", inplace=inplace)
    save(packed, tmp_path / "net.safetensors")
    for model in (make().eval(), packed):  # a float one, and one that was converted
        again = load(tmp_path / "net.safetensors", model)
        assert type(again.act) is Fused
        assert again.dense.activation == "relu"
        assert torch.equal(again(X), packed(X))
        again.load_state_dict(packed.state_dict())
        assert torch.equal(again(X), packed(X))
    for same in (copy.deepcopy(packed.dense), packed.dense):
        assert same.activation == "relu"
        assert "activation=relu" in repr(same)
    assert pickle.loads(pickle.dumps(packed.act)).activation == "relu"


def test_a_file_without_it_over_a_model_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sequential(nn.GELU()).eval()
    plain = unfused(model, Int(8), monkeypatch)
    save(plain, tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors", convert(model, Int(8), prefer="size"))
    assert type(again[1]) is nn.GELU
    assert again[0].activation is None
    assert torch.equal(again(X), plain(X))


def test_a_file_that_does_not_fit(tmp_path: Path) -> None:
    packed = convert(sequential(nn.GELU()).eval(), Int(8), prefer="size")
    save(packed, tmp_path / "net.safetensors")
    for other, message in (
        (sequential(nn.ReLU()), "'0': the file has it compute a gelu, and .*'1', a relu"),
        (sequential(nn.Tanh()), "'0': the file has it compute a gelu, and .*no activation"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "net.safetensors", other)
    modules = {
        name: {"config": module.get_config(), "packed": getattr(module, "packed_tensors", dict)()}
        for name, module in packed.named_children()
    }
    without = {**modules, "0": {**modules["0"], "config": dict(modules["0"]["config"])}}
    del without["0"]["config"]["activation"]
    with pytest.raises(ValueError, match="'1': the file has no layer that computes its gelu"):
        from_packed(sequential(nn.GELU()), without)
    for config, error in (
        ({"type": "Fused"}, "expected the keys"),
        ({"type": "Fused", "activation": "tanh"}, "must be one of .* got 'tanh'"),
        ({"type": "Fused", "activation": None}, "got None"),
    ):
        with pytest.raises(ValueError, match=f"layer '1'.*{error}"):
            from_packed(sequential(nn.GELU()), {**modules, "1": {"config": config, "packed": {}}})


def test_argument() -> None:
    layer = Int8Linear.from_float(nn.Linear(16, 8), number=Int(8), activation="relu")
    assert (layer(torch.randn(4, 16)) >= 0).all()
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'tanh'"):
        Int8Linear.from_float(nn.Linear(16, 8), number=Int(8), activation="tanh")
    with pytest.raises(ValueError, match="got None"):
        Fused(None)


def test_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    packed = convert(FUSED["MLP"][0]().eval(), Int(8), prefer="size")
    whole = torch.compile(packed, fullgraph=True, backend="eager")
    assert torch.equal(whole(X), packed(X))
