"""Packed residency: how far a forward pass, and loading, raise the peak memory of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
import sys
import torch
from torch import nn
import compressops as co

def peak():
    lines = open("/proc/self/status").read().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
torch.manual_seed(0)
size, layers = 1024, 16
dtype = torch.bfloat16 if sys.argv[1] == "floats" else torch.float32
config = {
    "floats": co.Huffman(),
    "int8": (co.Int(8), co.Huffman()),
    "int4": (co.Int(4, 64), co.Huffman()),
    "ternary": (co.Ternary(), co.Huffman()),
}[sys.argv[1]]
how = {"residency": "packed", "prefer": "size"}
net = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers))).to(dtype)
for layer in net:
    nn.init.normal_(layer.weight)
packed = co.convert(net, config, **how)
stored = sum(layer.packed_weight.packed().nbytes for layer in packed)
del net
x = torch.randn(4, size).to(dtype)
warm = co.convert(nn.Sequential(nn.Linear(64, 64)).to(dtype), config, **how)
with torch.no_grad():
    warm(x[:, :64])
    x @ torch.zeros(size, size, dtype=dtype)
    # What converting freed would hide what a forward takes.
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    packed(x)
print(peak() - before, stored, size * size * dtype.itemsize)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process")
@pytest.mark.parametrize("config", ["floats", "int8", "int4", "ternary"])
def test_a_forward_takes_the_memory_of_one_layer(config: str) -> None:
    """The packed bytes are there before: the peak may grow by one layer and a fifth of them."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, config], capture_output=True, text=True, check=True
    )
    grown, stored, layer = map(int, done.stdout.split())
    assert stored < 0.7 * 16 * layer
    assert grown < 0.2 * stored + layer + (2 << 20)


LOADING = """
import ctypes
import sys
import torch
from torch import nn
import compressops as co

def peak():
    lines = open("/proc/self/status").read().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def net(*sizes):
    return nn.Sequential(*(nn.Linear(size, size, bias=False) for size in sizes)).bfloat16()

path, small = sys.argv[1:]
size = co.save(co.convert(net(2048, 64), co.Huffman(), prefer="size"), path)
co.save(co.convert(net(64, 64), co.Huffman(), prefer="size"), small)
co.load(small, net(64, 64), "packed")
dense = net(2048, 64)
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
co.load(path, dense, "packed")
print(peak() - before, size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of a process")
def test_loading_holds_no_weight_twice(tmp_path) -> None:
    files = [str(tmp_path / name) for name in ("large", "small")]
    command = [sys.executable, "-c", LOADING, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, size = map(int, done.stdout.split())
    assert grown < size + (1 << 20)
