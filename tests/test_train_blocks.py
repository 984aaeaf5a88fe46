"""Training of layers in blocks on their stored blocks: the same gradients, nothing left behind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import compressops as co
from compressops.compress.parametrizations import FakeQuantize, Mask, find, register
from compressops.nn import BlockSparseLinear
from compressops.train import blocks as blocks_module
from compressops.train import checkpoint, make_accelerator, train
from compressops.train.blocks import sparse_linears


def net(block: tuple[int, int] = (16, 1), density: float = 0.3) -> nn.Sequential:
    model = nn.Sequential(
        *(nn.Linear(37, 50), nn.GELU(), nn.Linear(50, 64, bias=False), nn.ReLU()),
        nn.Linear(64, 5),
    )
    co.Prune(density=density, granularity="block", block=block).attach(model)
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    model(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters())]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each product of blocks."""
    seen: list[int] = []
    real = blocks_module.bsr_linear
    monkeypatch.setattr(
        blocks_module, "bsr_linear", lambda *args: (seen.append(len(args[1])), real(*args))[1]
    )
    return seen


def check_against_dense(model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """That all gradients are those of masked dense products, and blocks were multiplied."""
    dense, seen = gradients(model, x), calls(monkeypatch)
    with sparse_linears(model):
        ours = gradients(model, x)
    assert seen
    for ours_, dense_ in zip(ours, dense, strict=True):
        torch.testing.assert_close(ours_, dense_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [(16, 1), (16, 16), (32, 32), (1, 16), (7, 3)])
@pytest.mark.parametrize("shape", [(9, 37), (37,), (2, 3, 37), (0, 37)])
def test_gradients_are_those_of_masked_dense_products(
    block: tuple[int, int], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net(block), torch.randn(shape)
    exact = gradients(copy.deepcopy(model).double(), x.double())
    seen = calls(monkeypatch)
    with sparse_linears(model) as names:
        assert names == ["0", "2", "4"]
        ours = gradients(model, x)
    assert seen
    for ours_, exact_ in zip(ours, exact, strict=True):
        torch.testing.assert_close(ours_.double(), exact_, rtol=1e-5, atol=1e-5)
    for layer, grad in zip((model[0], model[2], model[4]), ours[1::2], strict=False):
        original = layer.parametrizations.weight.original
        assert not original.grad[~find(layer, Mask).mask].any()
        assert grad is not None


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, 40) for _ in range(3))),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    density=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**31),
)
def test_any_sizes_and_blocks(sizes, block, density, seed) -> None:
    M, K, N = sizes
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(K, N))
    co.Prune(density=density, granularity="block", block=block).attach(model)
    x = torch.randn(M, K)
    exact = gradients(copy.deepcopy(model).double(), x.double())
    with sparse_linears(model):
        ours = gradients(model, x)
    for ours_, exact_ in zip(ours, exact, strict=True):
        torch.testing.assert_close(ours_.double(), exact_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "number",
    [
        *(co.DynamicFixedPoint(bits=6), co.Int(bits=8), co.Ternary()),
        co.Int(bits=4, group_size=16, symmetric=False),
    ],
)
@pytest.mark.parametrize("first", ["prune", "quantize"])
def test_quantizers_act(number, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    stages = [
        co.Prune(density=0.25, granularity="block", block=(16, 4)),
        co.Quantize(number),
    ]
    for stage in stages if first == "prune" else reversed(stages):
        stage.attach(model)
    assert find(model[0], FakeQuantize) is not None
    x = torch.randn(6, 32)
    check_against_dense(model, x, monkeypatch)


def test_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    model[0].weight = nn.Parameter(torch.randn(32, 48).t())
    co.Prune(density=0.25, granularity="block", block=(16, 4)).attach(model)
    x = torch.randn(32, 12).t()
    check_against_dense(model, x, monkeypatch)


def test_masks_that_move_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    prune = co.Prune(density=1.0, granularity="block", block=(16, 2))
    prune.attach(model)
    mask, x, seen = find(model[0], Mask), torch.randn(4, 32), calls(monkeypatch)
    with sparse_linears(model):
        counts = []
        for density in (1.0, 0.5, 0.375, 0.25):
            prune.prune([model[0]], density)
            ours = gradients(model, x)
            counts.append(list(seen))
            seen.clear()
            exact = gradients(copy.deepcopy(nn.Sequential(model[0])).double(), x.double())
            for ours_, exact_ in zip(ours, exact, strict=True):
                torch.testing.assert_close(ours_.double(), exact_, rtol=1e-5, atol=1e-5)
            seen.clear()
        # More than two fifths run densely.
        assert counts == [[], [], [12], [8]]
        mask.recover = True
        assert gradients(model, x)[-1][~mask.mask].any()
        assert not seen


def test_a_mask_in_the_place_of_another_is_followed() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(4, 32)
    co.Prune(density=0.25, granularity="block", block=(16, 2)).attach(model)
    mask = find(model[0], Mask)
    with sparse_linears(model):
        model(x)
        mask.mask = mask.mask.roll(16, 0)
        torch.testing.assert_close(model(x), x @ model[0].weight.t() + model[0].bias)
        state = dict(model.state_dict())
        key = next(key for key in state if key.endswith(".mask"))
        model.load_state_dict(state | {key: state[key].roll(2, 1)}, assign=True)
        torch.testing.assert_close(model(x), x @ model[0].weight.t() + model[0].bias)


def test_graphs_and_transforms_run_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(4, 32)
    co.Prune(density=0.25, granularity="block", block=(16, 2)).attach(model)
    expected, seen = model(x), calls(monkeypatch)
    with sparse_linears(model):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        grad = torch.func.grad(lambda x: model(x).sum())(x)
    torch.testing.assert_close(grad, model[0].weight.sum(0).expand(4, -1))
    assert not seen


def test_everything_else_runs_as_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    layers = [nn.Linear(16, 16), nn.Linear(16, 16), Own(16, 16), nn.Conv2d(16, 16, 1)]
    model = nn.ModuleList([*layers, nn.Linear(16, 16)])
    co.Prune(density=0.25, granularity="block", block=(16, 1), exclude=("0", "4")).attach(model)
    co.Prune(density=0.25, granularity="block", block=(4, 1), layers="4").attach(model)
    register(model[0], Mask(torch.rand(16, 16) < 0.2))  # no blocks
    seen = calls(monkeypatch)
    with sparse_linears(model) as names:
        assert names == ["1"]
        model[1](torch.randn(2, 16))
        assert len(seen) == 1
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model[1](torch.randn(2, 15))
        with pytest.raises(RuntimeError, match="dtype"):
            model[1](torch.randn(2, 16, dtype=torch.float64))
        model[1].double()(torch.randn(2, 16, dtype=torch.float64))
        assert len(seen) == 1
        model[1].bfloat16()(torch.randn(2, 16, dtype=torch.bfloat16))
        assert len(seen) == 2
    model[1](torch.randn(2, 16, dtype=torch.bfloat16))
    assert len(seen) == 2


def test_autocast_casts_as_for_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(32, 48)), torch.randn(6, 32)
    co.Prune(density=0.25, granularity="block", block=(16, 4)).attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        dense, expected = gradients(model, x), model(x)
        seen = calls(monkeypatch)
        with sparse_linears(model):
            ours, output = gradients(model, x), model(x)
    assert len(seen) == 2
    assert output.dtype == expected.dtype == torch.bfloat16
    for ours_, dense_ in zip(ours, dense, strict=True):
        assert ours_.dtype == dense_.dtype
        torch.testing.assert_close(ours_, dense_, rtol=0.05, atol=0.2)


def test_modules_are_as_before_also_after_an_error() -> None:
    model = net()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="mine"), sparse_linears(model, model):
        raise RuntimeError("mine")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    copy.deepcopy(model)


def data(samples: int = 64) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 37, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.arange(samples) % 5)


@pytest.mark.parametrize("schedule", ["one_shot", "cubic", "surgery"])
def test_retrain_takes_it(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with taps of a teacher, and while masks move."""
    seen = calls(monkeypatch)
    torch.manual_seed(0)
    model, results = nn.Sequential(*net(density=1.0)), []
    for blocks in ("dense", "sparse"):
        recipe = co.Recipe(
            [
                co.Prune(0.25, "block", (16, 1), schedule=schedule, updates=3),
                co.Retrain(
                    steps=8,
                    batch_size=16,
                    lr=0.02,
                    blocks=blocks,
                    distill=(co.LogitsKD(2.0), co.ActivationKD("2")),
                ),
            ]
        )
        student = copy.deepcopy(model)
        result = co.compress(student, recipe, train_data=data(), teacher=copy.deepcopy(model))
        assert bool(seen) == (blocks == "sparse")
        results.append(result.model)
    for ours, dense in zip(*(m.state_dict().values() for m in results), strict=True):
        if isinstance(ours, torch.Tensor):
            torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)
    packed = co.convert(results[1], prefer="size")
    assert isinstance(packed[2], BlockSparseLinear)


def test_a_resumed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    options = co.Retrain(
        steps=8, batch_size=16, lr=0.02, checkpoint_seconds=0, blocks="sparse", optimizer="adamw"
    )
    torch.manual_seed(0)
    whole = net()
    resumed = copy.deepcopy(whole)

    class Stops(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.left = 5 * 16

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return data()[index]

    path = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        train(resumed, Stops(), options, accelerator=make_accelerator(), checkpoint=path)
    assert checkpoint.load(path)["step"] >= 3
    again = copy.deepcopy(resumed)
    train(again, data(), options, accelerator=make_accelerator(), checkpoint=path)
    train(whole, data(), options, accelerator=make_accelerator())
    for ours, theirs in zip(again.state_dict().values(), whole.state_dict().values(), strict=True):
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)


def test_an_unknown_choice_is_named() -> None:
    with pytest.raises(ValueError, match=r"blocks.*'auto'"):
        co.Retrain(steps=1, blocks="auto")
