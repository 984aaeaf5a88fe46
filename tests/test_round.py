"""Round: batch norms and biases in 16 bits, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import compressops as co
from compressops.compress.activations import attach_input_quantizer
from compressops.compress.sizes import sizes


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Network(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(4, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3), nn.Bilinear(2, 2, 3)
        )
        self.table = nn.Parameter(torch.randn(2**14 + 1))
        self.wide = nn.Parameter(torch.randn(3).double())
        self.register_buffer("scratch", torch.randn(5), persistent=False)
        with torch.no_grad():
            for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
                if name.startswith("1.") and tensor.is_floating_point():
                    tensor.uniform_(0.5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self[3](self[2](self[1](self[0](x))))


ROUNDED = {"0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "3.bias", "4.bias"}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    tensors = {name: value for name, value in after.items() if isinstance(value, Tensor)}
    return {name for name, tensor in tensors.items() if not torch.equal(before[name], tensor)}


def test_what_is_no_weight_is_rounded_and_nothing_else() -> None:
    model = Network()
    co.Quantize(co.Int(4)).attach(model)
    attach_input_quantizer(model[3], co.Int(8)).observe(torch.randn(9))
    parametrize.register_parametrization(model[0], "bias", Half())
    before, scratch = copy.deepcopy(model.state_dict()), model.scratch.clone()
    co.Round().attach(model)
    after = model.state_dict()
    assert changed(before, after) == ROUNDED - {"0.bias"}
    for name in ROUNDED - {"0.bias"}:
        assert torch.equal(after[name], before[name].bfloat16().float())
        assert after[name].dtype == torch.float32
    assert torch.equal(model.scratch, scratch)


def test_the_file_holds_sixteen_bits(tmp_path) -> None:
    recipe = [co.Prune(0.5), co.Quantize(co.DynamicFixedPoint(6)), co.Encode(co.Huffman())]
    files = []
    for stages in (recipe, [*recipe[:2], co.Round(), recipe[2]]):
        torch.manual_seed(0)
        model = nn.Sequential(*list(Network())[:4])
        result = co.compress(model, co.Recipe(stages), log=False)
        path = tmp_path / "net.safetensors"
        co.save(co.convert(result.model), path)
        files.append(co.inspect(path))
        assert sum(t.stored_nbytes for t in files[-1].tensors) == result.table[-1].stored_bytes
        loaded = co.load(path, model)
        for name in ("1.running_var", "0.bias"):
            assert torch.equal(loaded.state_dict()[name], result.model.state_dict()[name])
    pools = [next(t for t in file.tensors if t.pooled) for file in files]
    floats = 4 * 30 + 30 + 3
    assert pools[0].stored_nbytes > 3 * floats
    assert pools[1].stored_nbytes < 2 * floats
    assert pools[1].number == "Float(dtype='bfloat16')"


def test_sizes_count_it_at_once() -> None:
    model = nn.Sequential(*list(Network())[:4])
    before = sizes(model).stored_bytes
    co.Round().attach(model)
    # The small weights are not rounded, and keep nobody else from being stored in 16 bits.
    assert sizes(model).stored_bytes == before - 2 * (4 * 30 + 30 + 3)


def test_it_must_follow_the_last_retrain() -> None:
    model, data = Network(), [(torch.randn(4), 0)]

    def check(*stages: object) -> None:
        co.Recipe(stages).validate(model, train_data=data, eval_data=None, teacher=None)

    check(co.Retrain(steps=1), co.Round(), co.Encode(co.Huffman()))
    with pytest.raises(ValueError, match=r"stage 1 \(Round\): a Retrain comes later"):
        check(co.Round(), co.Retrain(steps=1))
    with pytest.raises(ValueError, match=r"stage 1 \(Round\): there is nothing to round"):
        co.Recipe([co.Round()]).validate(
            nn.Linear(3, 3, bias=False), train_data=None, eval_data=None, teacher=None
        )


def test_bad_dtypes_and_yaml() -> None:
    with pytest.raises(ValueError, match="dtype must be one of 'bfloat16', got 'float16'"):
        co.Round("float16")
    text = "version: 1\nstages:\n- Round\n- Round: bfloat16\n- Round: {dtype: bfloat16}\n"
    recipe = co.Recipe.from_yaml(text)
    assert recipe.stages == (co.Round(),) * 3
    assert co.Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_kept_stage_is_restored(tmp_path) -> None:
    data = [(torch.randn(4), i % 3) for i in range(12)]
    recipe = co.Recipe([co.Quantize(co.Int(4)), co.Round()])
    torch.manual_seed(1)
    model = Network()
    first = co.compress(model, recipe, data, data, workdir=tmp_path, log=False)
    again = co.compress(model, recipe, data, data, workdir=tmp_path, log=False)
    assert not changed(first.model.state_dict(), again.model.state_dict())
    assert [row.stage for row in again.table] == [row.stage for row in first.table]
