"""bsr_conv2d against dense convolutions, on the layers of CifarNet and ResNet-18.

    python bench/bench_bsr_conv2d.py
    python bench/bench_bsr_conv2d.py --only cifarnet --threads 1 --merge

Float32, random blocks. Ours and each peer in its better memory format. η is density × dense time /
ours, with torch's dense convolution: what of the dense efficiency is left. "break-even" is the
density at which ours would take as long, if its time grows evenly from that of no block at all.
Where Winograd's convolution is possible, it is a rival too: ours, F(4, 3), and oneDNN's, where
`winograd_peers.py` finds that library.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import interleaved, median_ratio, merged, parser, report
from peers import MissingError
from winograd_peers import Case, onednn

import compressops as co
from compressops.rivals import break_even


@dataclass(frozen=True)
class Layer:
    name: str
    C: int
    K: int
    size: int
    kernel: int = 3
    stride: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def winograd(self) -> bool:
        return self.kernel == 3 and self.stride == 1


LAYERS = [
    Layer("cifarnet 2", 64, 64, 30),
    Layer("cifarnet 3 /2", 64, 128, 30, stride=2),
    Layer("cifarnet 4", 128, 128, 15),
    Layer("cifarnet 6 /2", 128, 192, 15, stride=2),
    Layer("cifarnet 7", 192, 192, 8),
    Layer("cifarnet 1×1", 192, 192, 8, 1),
    Layer("resnet 2", 64, 64, 56),
    Layer("resnet 3", 128, 128, 28),
    Layer("resnet 3 1×1 /2", 64, 128, 56, 1, 2),
    Layer("resnet 4 /2", 128, 256, 28, stride=2),
    Layer("resnet 4", 256, 256, 14),
    Layer("resnet 5", 512, 512, 7),
]
SMOKE = [Layer("smoke", 8, 32, 6), Layer("smoke 1×1 /2", 8, 32, 6, 1, 2)]
BLOCKS = [(16, 1), (16, 16)]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def run_layer(
    layer: Layer, batch: int, threads: int, cases: list[tuple], rounds: int
) -> list[dict]:
    """A row for each of some cases of block and density, measured in one run."""
    K, C, size = layer.K, layer.C, (layer.kernel, layer.kernel)
    x = torch.randn(batch, C, layer.size, layer.size)
    weight, bias = torch.randn(K, C, *size), torch.randn(K)
    inputs = {name: x.contiguous(memory_format=form) for name, form in FORMATS.items()}
    steps = (layer.stride, layer.padding)
    calls = {}
    for name, form in FORMATS.items():
        dense = weight.contiguous(memory_format=form)
        calls["dense", name] = lambda x=inputs[name], w=dense: F.conv2d(x, w, bias, *steps)
    if layer.winograd:
        ready = co.ops.winograd_conv2d_pack(weight)
        for name, image in inputs.items():
            calls["winograd", name] = lambda x=image: co.ops.winograd_conv2d(
                x, weight, bias, layer.padding, tile=4, transformed=ready
            )
        try:
            peer = onednn(Case(x, weight, bias, layer.padding, threads))
            calls["oneDNN", "blocked"] = peer.run
        except MissingError as why:
            print(f"oneDNN: {why}")
    densities = {}
    for block, asked in [*cases, (BLOCKS[0], 0.0)]:
        rows, columns = -(-K // block[0]), -(-(C * size[0] * size[1]) // block[1])
        keep = torch.rand(rows, columns) < asked
        matrix = weight.permute(0, 2, 3, 1).flatten(1)
        bsr = co.ops.bsr_from_dense(matrix, block, keep)
        densities[block, asked] = len(bsr[0]) / keep.numel()
        packed = co.ops.bsr_linear_pack(*bsr, *matrix.shape)
        for name, image in inputs.items():
            calls[block, asked, name] = lambda x=image, p=packed: co.ops.bsr_conv2d(
                x, *p, K, size, bias, *steps
            )
        check(calls[block, asked, "nchw"](), x, bsr, bias, layer)
    seconds = interleaved(calls, rounds)

    def best(*kind: object) -> list[float] | None:
        names = [name for name in calls if name[: len(kind)] == kind]
        times = {name: statistics.median(seconds[name]) for name in names}
        return seconds[min(times, key=times.get)] if times else None

    dense, empty = best("dense"), statistics.median(best(BLOCKS[0], 0.0))
    found = []
    for block, asked in cases:
        ours, density = best(block, asked), densities[block, asked]
        median, theirs = statistics.median(ours), statistics.median(dense)
        row = {"threads": threads, "batch": batch, "layer": layer.name}
        row |= {"block": "×".join(map(str, block))}
        row |= {"density": asked, "µs": median * 1e6, "dense µs": theirs * 1e6}
        row |= {"× dense": median_ratio(dense, ours)}
        row |= {"η": density * row["× dense"]}
        row |= {"break-even": break_even(density, median, theirs, empty)}
        for name in ("winograd", "oneDNN"):
            peer = best(name)
            row[f"× {name}"] = None if peer is None else median_ratio(peer, ours)
        found.append(row)
    return found


def check(y: torch.Tensor, x: torch.Tensor, bsr: tuple, bias: torch.Tensor, layer: Layer) -> None:
    """That the result is right."""
    matrix = co.ops.bsr_to_dense(*bsr, layer.K, layer.kernel**2 * layer.C)
    weight = matrix.view(layer.K, layer.kernel, layer.kernel, layer.C).permute(0, 3, 1, 2)
    expected = F.conv2d(x, weight, bias, layer.stride, layer.padding)
    error = (y - expected).norm() / expected.norm()
    if not error < 1e-5:
        raise SystemExit(f"{layer.name}: off by {error:.1e}")


@torch.no_grad()
def main() -> None:
    command = parser(__doc__, "bsr_conv2d-cpu")
    command.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    command.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2])
    command.add_argument("--only", default="", help="layers whose name holds this")
    command.add_argument("--merge", action="store_true", help="keep the other rows of --out")
    arguments = command.parse_args()
    torch.manual_seed(0)
    layers = SMOKE if arguments.smoke else [la for la in LAYERS if arguments.only in la.name]
    rounds = 2 if arguments.smoke else max(15, arguments.rounds)
    cases = [(block, density) for block in BLOCKS for density in arguments.densities]
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for batch in [1] if arguments.smoke else arguments.batch:
            for layer in layers:
                rows += run_layer(layer, batch, threads, cases, rounds)
    rows = merged(rows, arguments, ("threads", "batch", "layer", "block", "density"))
    report("bsr_conv2d (CPU), × = times faster than the peer", rows, arguments)


if __name__ == "__main__":
    main()
