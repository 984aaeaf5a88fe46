"""Decoding ahead: results, and the order of what two streams do, by vector clocks."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random

import pytest
import torch
from torch import nn

import compressops as co
from compressops.nn import ahead, scratch
from compressops.nn.weight import PackedWeight


class Clocks:
    """`ahead.Streams` that remember who touched which memory, and what each stream then knew of the
    other. All is done at once; what the order leaves open is a hazard."""

    def __init__(self) -> None:
        self.known = {"compute": {}, "decode": {}}
        self.current = "compute"
        self.touched: dict[int, list[tuple[str, int, bool]]] = {}
        self.hazards: list[str] = []
        self.ahead: list[bool] = []  # of each decode ahead: whether it may overlap a layer
        self.shared: set[int] = set()  # memory that waits for both streams when it is given back
        self.kept: list[torch.Tensor] = []  # addresses stay those of one tensor

    def _record(self, stream: str) -> dict[str, int]:
        self.known[stream][stream] = self.known[stream].get(stream, 0) + 1
        return dict(self.known[stream])

    def _wait(self, stream: str, event: dict[str, int]) -> None:
        for other, tick in event.items():
            self.known[stream][other] = max(tick, self.known[stream].get(other, 0))

    def compute_record(self):
        return self._record("compute")

    def decode_record(self):
        return self._record("decode")

    def compute_wait(self, event) -> None:
        self._wait("compute", event)

    def decode_wait(self, event) -> None:
        self._wait("decode", event)

    @contextlib.contextmanager
    def decoding(self):
        self.current = "decode"
        try:
            yield
        finally:
            self.current = "compute"

    def share(self, tensor: torch.Tensor) -> None:
        self.shared.add(tensor.untyped_storage().data_ptr())

    def touch(self, tensor: torch.Tensor, write: bool) -> None:
        self.kept.append(tensor)
        key, stream = tensor.untyped_storage().data_ptr(), self.current
        tick = self._record(stream)[stream]
        before = self.touched.setdefault(key, [])
        for other, when, wrote in before:
            # An event of the other stream covers what that did before it, not what bears its tick.
            if other != stream and (write or wrote) and self.known[stream].get(other, 0) <= when:
                what = "write" if write else "read"
                self.hazards.append(f"{what} by {stream} beside what {other} does")
        before.append((stream, tick, write))


@pytest.fixture
def clocks(monkeypatch):
    """Decoding ahead on the CPU, as if it had two streams."""
    found = Clocks()
    monkeypatch.setattr(ahead, "enabled", lambda device: True)
    monkeypatch.setattr(ahead, "streams", lambda device: found)
    decode, allocate, run = PackedWeight._decode_into, scratch._allocate, ahead.DecodeAhead.run

    def decoded(weight, buffer):
        for part in weight.part_buffers():
            found.touch(part, write=False)
        if found.current == "decode":
            reads = [t for a in found.touched.values() for s, t, w in a if s == "compute" and not w]
            if buffer.untyped_storage().data_ptr() not in found.shared:
                found.hazards.append("decodes to memory that only the other stream is known to use")
            found.ahead.append(found.known["decode"].get("compute", 0) < max(reads))
        found.touch(buffer, write=True)  # as far as it gets
        return decode(weight, buffer)

    def allocated(device, nbytes):
        # Memory that what computes now may have given back a moment ago.
        buffer = allocate(device, nbytes)
        found.touch(buffer, write=True)
        return buffer

    def ran(turns, weight, function):
        def reading(kernel):
            found.touch(kernel[0], write=False)
            result = function(kernel)
            kernel[0].untyped_storage()  # read until here
            found.touch(kernel[0], write=False)
            return result

        return run(turns, weight, reading)

    monkeypatch.setattr(PackedWeight, "_decode_into", decoded)
    monkeypatch.setattr(scratch, "_allocate", allocated)
    monkeypatch.setattr(ahead.DecodeAhead, "run", ran)
    yield found
    assert found.hazards == []
    found.kept.clear()
    gc.collect()
    assert scratch.held() == 0


def layers(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))).eval()


def packed(model: nn.Module) -> nn.Module:
    return co.convert(model, co.Huffman(), residency="packed")


@torch.no_grad()
def test_layers_decode_while_the_one_before_computes(clocks) -> None:
    model, x = layers(64, 200, 90, 300, 7), torch.randn(5, 64)
    runs = packed(model)
    for _ in range(3):
        assert torch.equal(runs(x), model(x))
    # The first run learns the order; the last layer of it then knows who comes next.
    assert clocks.ahead == [True] * 8
    # Two buffers, each as large as the largest weight that it had.
    assert 300 * 90 * 4 <= scratch.held() <= 2 * 300 * 90 * 4


@torch.no_grad()
@pytest.mark.parametrize("seed", range(8))
def test_any_order_gives_the_same_bits(clocks, seed: int) -> None:
    draw = random.Random(seed)
    model = nn.ModuleList(nn.Linear(32, draw.randint(40, 400)) for _ in range(5)).eval()
    runs, x = packed(model), torch.randn(3, 32)
    for _ in range(40):
        which = draw.randrange(len(model))
        if draw.random() < 0.2:
            # Decoded ahead or not, it is another weight now.
            model[which].weight.copy_(torch.randn_like(model[which].weight))
            runs[which].load_state_dict(packed(model[which]).state_dict())
            for part in runs[which].packed_weight.part_buffers():
                clocks.touch(part, write=True)
        assert torch.equal(runs[which](x), model[which](x))


@torch.no_grad()
def test_a_corrupt_weight_raises_where_its_own_layer_runs(clocks) -> None:
    model, x = layers(64, 200, 90, 7), torch.randn(5, 64)
    runs = packed(model)
    for _ in range(2):
        runs(x)
    parts = runs[1].packed_weight.packed().parts
    (part,) = (part for name, part in parts.items() if f"{name}_lengths" in parts)
    byte = part[100].item()
    part[100] ^= 1
    first = runs[0](x)
    assert torch.equal(first, model[0](x))
    with pytest.raises(ValueError, match="its CRC-32 is not"):
        runs[1](first)
    assert torch.equal(runs[0](x), first)
    part[100] = byte
    for _ in range(2):
        assert torch.equal(runs(x), model(x))


@torch.no_grad()
def test_a_layer_that_fails_leaves_the_others_right(clocks) -> None:
    model, x = layers(64, 200, 90), torch.randn(5, 64)
    runs = packed(model)
    runs(x)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            runs[1](x)
        assert torch.equal(runs(x), model(x))


@torch.no_grad()
def test_layers_that_share_a_weight_or_change_their_dtype(clocks) -> None:
    model, x = layers(50, 50, 50, 50), torch.randn(5, 50)
    model[2].weight = model[0].weight
    runs = packed(model)
    for _ in range(3):
        assert torch.equal(runs(x), model(x))
    runs.double(), model.double()
    for _ in range(2):
        assert torch.equal(runs(x.double()), model(x.double()))
    runs[1].packed_weight.set_residency("decoded")
    assert torch.equal(runs(x.double()), model(x.double()))


@torch.no_grad()
def test_without_memory_for_two_buffers_layers_decode_alone(clocks, monkeypatch) -> None:
    model, x = layers(64, 200, 300, 90), torch.randn(5, 64)
    runs, of_turn = packed(model), ahead.DecodeAhead._buffer

    def one(turns, weight, turn):
        if turn != turns._turn:
            raise torch.OutOfMemoryError
        return of_turn(turns, weight, turn)

    with monkeypatch.context() as patched:
        patched.setattr(ahead.DecodeAhead, "_buffer", one)
        for _ in range(3):
            assert torch.equal(runs(x), model(x))
    assert clocks.ahead == []
    assert torch.equal(runs(x), model(x))
    assert clocks.ahead == [True] * 3


def test_with_gradients_and_inside_another_call_it_waits(clocks) -> None:
    model, x = layers(64, 200, 90), torch.randn(5, 64, requires_grad=True)
    runs = packed(model)
    runs(x).sum().backward()
    assert clocks.ahead == []
    assert scratch._ahead == {}
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.equal(x.grad, grad)
    weight, other = runs[0].packed_weight, runs[1].packed_weight

    def nested(input, weight, bias):
        hidden = nn.functional.linear(input, weight, bias)
        return other.run(nn.functional.linear, hidden, None)

    with torch.no_grad():
        for _ in range(2):
            got = weight.run(nested, x, None)
        hidden = nn.functional.linear(x, model[0].weight)
        assert torch.equal(got, nn.functional.linear(hidden, model[1].weight))


def test_it_has_to_be_asked_for(monkeypatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not ahead.enabled(gpu)
    monkeypatch.setenv("COMPRESSOPS_DECODE_AHEAD", "1")
    assert ahead.enabled(gpu)
    assert not ahead.enabled(cpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not ahead.enabled(gpu)


@torch.no_grad()
def test_a_layer_that_is_gone_is_not_waited_for(clocks) -> None:
    model = [nn.Linear(32, out).eval() for out in (60, 70, 70)]
    first, second, third = map(packed, model)
    x = torch.randn(3, 32)
    for layer in (first, second, first):
        layer(x)
    del first, layer
    gc.collect()
    for layer, dense in ((second, model[1]), (third, model[2]), (second, model[1])):
        assert torch.equal(layer(x), dense(x))
    del layer
