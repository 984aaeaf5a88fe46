"""Who calls a layer with a fused activation, and what looking for that leaves untouched."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_fusion import IMAGES, Block, X, mlp, sequential, unfused
from torch import Tensor, nn

from compressops import fusion
from compressops.convert import convert
from compressops.formats import Huffman, Int
from compressops.nn import Fused
from compressops.serialize import load, save


class Features(nn.Module):
    """Takes the layers of a part one by one, as a feature extractor does."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3)
        self.part = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.GELU())

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.part:
            x = layer(x)
            found.append(x)
        return found


class Outer(nn.Module):
    """Uses a layer of its block without the block, before, between and after its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(lambda b, x: b.act(b.dense(x)))

    def forward(self, x: Tensor) -> list[Tensor]:
        block = self.block
        return [block.dense(x), block(x), block.act(x), block(x), block.dense(x)]


@pytest.mark.parametrize("case", ["features", "outer", "root"])
@pytest.mark.parametrize(
    "again", ["", "copied", "pickled", "loaded", "converted", "over", "failed"]
)
def test_called_from_elsewhere(
    case: str, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = {"features": (Features, IMAGES), "outer": (Outer, X), "root": (Features, IMAGES)}[
        case
    ]
    torch.manual_seed(0)
    model = model()
    model = (model.part if case == "root" else model).eval()
    packed, plain = convert(model, Int(8), prefer="size"), unfused(model, Int(8), monkeypatch)
    assert any(isinstance(m, Fused) for m in packed.modules())
    if again == "copied":
        packed = copy.deepcopy(packed)
    elif again == "pickled" and case != "outer":  # which holds a lambda
        packed = pickle.loads(pickle.dumps(packed))
    elif again in ("loaded", "over"):
        save(packed, tmp_path / "net.safetensors")
        packed = load(tmp_path / "net.safetensors", model if again == "loaded" else packed)
    elif again == "converted":
        packed = convert(packed, Huffman(), prefer="size", residency="packed")
    elif again == "failed":
        # What a call of the module left open would last.
        for module in packed.modules():
            if any(isinstance(m, Fused) for m in module.children()):
                with pytest.raises(ValueError, match=r"features|channels|shape|dimension"):
                    module(torch.zeros(1))
    close = {"atol": 2e-2, "rtol": 0}
    ours, theirs = (
        Features.forward(SimpleNamespace(part=m), x) if case == "root" else m(x)
        for m in (packed, plain)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **close)
    assert ours[0].min() < -0.1
    if case == "root":
        torch.testing.assert_close(packed(x), plain(x), **close)


def test_called_in_a_block_computes_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = convert(Outer().eval(), Int(8), prefer="size")
    monkeypatch.setattr(F, "gelu", lambda x: pytest.fail("the layer computes it"))
    packed.block(X)


def test_parts_from_elsewhere_compile() -> None:
    torch.manual_seed(0)
    for model, x in ((Features(), IMAGES), (Outer(), X)):
        for residency in ("decoded", "packed"):
            packed = convert(model.eval(), Int(8), prefer="size", residency=residency)
            torch._dynamo.reset()
            whole = torch.compile(packed, fullgraph=residency == "decoded", backend="eager")
            for _ in range(2):
                for one, other in zip(whole(x), packed(x), strict=True):
                    assert torch.equal(one, other)
            if residency == "decoded":
                exported = torch.export.export(packed, (x,)).module()
                for one, other in zip(exported(x), packed(x), strict=True):
                    torch.testing.assert_close(one, other)


def test_threads_call_one_model() -> None:
    packed = convert(sequential(nn.GELU()).eval(), Int(8), prefer="size")
    expected = packed(X)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: packed(X), range(400)))
    assert all(torch.equal(result, expected) for result in results)
    assert not packed[0].caller.running


def test_a_forward_that_takes_one_number_of_dimensions() -> None:
    def use(block: Block, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        return block.out(block.act(block.dense(x))).view(batch, length, 32)

    assert fusion.pairs(Block(use)) == {"dense": ("act", "gelu")}


def test_the_option() -> None:
    packed = convert(sequential(nn.GELU()).eval(), Int(8), prefer="size", fuse=False)
    assert type(packed[1]) is nn.GELU
    assert packed[0].activation is None


class Stateful(Block):
    """Writes to what it has."""

    def __init__(self) -> None:
        super().__init__(mlp)
        self.register_buffer("calls", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(1))
        self.log, self.by_name = [], {"calls": [0]}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.scale.mul_(2)
        self.log.append(1)
        self.by_name["calls"][0] += 1
        return self.act(self.dense(x))


def test_state_is_not_written() -> None:
    model = Stateful().eval()
    assert fusion.pairs(model) == {"dense": ("act", "gelu")}
    assert (model.calls, model.scale, model.log, model.by_name) == (0, 1, [], {"calls": [0]})
    model.alone = threading.Lock()  # which nobody can copy
    assert fusion.pairs(model) == {}
