"""int8_conv2d, quantization included, against what a PyTorch user can call on this machine.

    python bench/bench_int8_conv2d.py

Layers of ResNet-50, VGG16 and MobileNetV2 (depthwise), float32 in and out, each peer and ours in
its better memory format. Peers: torch's float32 convolution; torch's prepacked int8 convolution
(the quantized engine of the build) with its input as 8 bits and its output left in them ("given"),
and as it is used where activations are floats: quantized with the range of that input, dequantized
after. Where Winograd's convolution is possible, it is a rival too (float32, F(4, 3)). With
``--merge`` a long run can be done in parts.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from common import interleaved, median_ratio, merged, parser, report

import compressops as co


@dataclass(frozen=True)
class Layer:
    name: str
    C: int
    K: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1


LAYERS = [
    Layer("resnet conv1", 3, 64, 224, 7, 2),
    Layer("resnet 2 1×1", 64, 64, 56, 1),
    Layer("resnet 2 3×3", 64, 64, 56),
    Layer("resnet 2 1×1 up", 64, 256, 56, 1),
    Layer("resnet 2 1×1 down", 256, 64, 56, 1),
    Layer("resnet 3 3×3 /2", 128, 128, 56, stride=2),
    Layer("resnet 3 3×3", 128, 128, 28),
    Layer("resnet 3 1×1 up", 128, 512, 28, 1),
    Layer("resnet 4 3×3", 256, 256, 14),
    Layer("resnet 4 1×1 up", 256, 1024, 14, 1),
    Layer("resnet 4 1×1 down", 1024, 256, 14, 1),
    Layer("resnet 5 3×3", 512, 512, 7),
    Layer("resnet 5 1×1 down", 2048, 512, 7, 1),
    Layer("vgg 1_2", 64, 64, 224),
    Layer("vgg 2_2", 128, 128, 112),
    Layer("vgg 3_2", 256, 256, 56),
    Layer("vgg 4_2", 512, 512, 28),
    Layer("vgg 5_2", 512, 512, 14),
    Layer("mobilenet depthwise 2", 144, 144, 56, groups=144),
    Layer("mobilenet depthwise 4", 384, 384, 14, groups=384),
]
SMOKE = [Layer("smoke", 8, 16, 6), Layer("smoke depthwise", 8, 8, 6, groups=8)]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def run_layer(layer: Layer, batch: int, rounds: int, peers: bool) -> dict:
    padding = layer.kernel // 2
    options = (layer.stride, padding, 1, layer.groups)
    x = torch.randn(batch, layer.C, layer.size, layer.size)
    weight = torch.randn(layer.K, layer.C // layer.groups, layer.kernel, layer.kernel)
    scales = weight.abs().amax((1, 2, 3)) / 127
    codes = (weight / scales[:, None, None, None]).round().to(torch.int8)
    packed, sums = co.ops.int8_conv2d_pack(codes, layer.groups)
    inputs = {name: x.contiguous(memory_format=form) for name, form in FORMATS.items()}
    contestants = {
        f"ours {name}": lambda x=x: co.ops.int8_conv2d(x, packed, scales, sums, None, *options)
        for name, x in inputs.items()
    }
    if peers:
        weights = {n: weight.contiguous(memory_format=form) for n, form in FORMATS.items()}
        contestants |= {
            f"fp32 {n}": lambda x=x, n=n: F.conv2d(x, weights[n], None, *options)
            for n, x in inputs.items()
        }
        contestants |= quantized(layer, inputs["nhwc"], weight, scales, padding)
        if layer.kernel == 3 and layer.stride == layer.groups == 1:
            ready = co.ops.winograd_conv2d_pack(weight)
            contestants |= {
                f"winograd {n}": lambda x=x: co.ops.winograd_conv2d(
                    x, weight, None, padding, tile=4, transformed=ready
                )
                for n, x in inputs.items()
            }
    seconds = interleaved(contestants, rounds)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    best = {
        kind: min((f"{kind} {n}" for n in FORMATS), key=median.get)
        for kind in ("ours", "fp32", "winograd")
        if f"{kind} nhwc" in contestants
    }
    ours = best["ours"]
    out = (layer.size + 2 * padding - layer.kernel) // layer.stride + 1
    work = 2 * batch * out**2 * layer.K * weight[0].numel()
    row = {"batch": batch, **asdict(layer)}
    row |= {f"{name} µs": median[f"ours {name}"] * 1e6 for name in FORMATS}
    row["GOP/s"] = work / median[ours] / 1e9
    if peers:
        row["× torch fp32"] = median_ratio(seconds[best["fp32"]], seconds[ours])
        row["× winograd"] = None
        if "winograd" in best:
            row["× winograd"] = median_ratio(seconds[best["winograd"]], seconds[ours])
        for name in ("torch int8", "torch int8, given"):
            row[f"× {name}"] = median_ratio(seconds[name], seconds["ours nhwc"])
    return row


def quantized(layer: Layer, x, weight, scales, padding: int) -> dict:
    """torch's own int8 convolution, on channels last, which is its own format."""
    zeros = torch.zeros(layer.K, dtype=torch.int64)
    by_channel = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    pair = [layer.stride] * 2, [padding] * 2, [1, 1]
    prepacked = torch.ops.quantized.conv2d_prepack(by_channel, None, *pair, layer.groups)
    low, high = x.min().item(), x.max().item()
    scale, zero = (high - low) / 255, round(-low / ((high - low) / 255))
    given = torch.quantize_per_tensor(x, scale, zero, torch.quint8)
    y = F.conv2d(x, weight, None, layer.stride, padding, 1, layer.groups)
    out = y.abs().max().item() / 127, 128

    def included() -> torch.Tensor:
        q = torch.quantize_per_tensor(x, scale, zero, torch.quint8)
        return torch.ops.quantized.conv2d(q, prepacked, *out).dequantize()

    return {
        "torch int8": included,
        "torch int8, given": lambda: torch.ops.quantized.conv2d(given, prepacked, *out),
    }


@torch.no_grad()
def main() -> None:
    command = parser(__doc__, "int8_conv2d-cpu")
    command.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    command.add_argument("--only", default="", help="layers whose name holds this")
    command.add_argument("--no-peers", action="store_true", help="ours alone")
    command.add_argument("--merge", action="store_true", help="keep the other rows of --out")
    arguments = command.parse_args()
    layers = SMOKE if arguments.smoke else [la for la in LAYERS if arguments.only in la.name]
    rounds = 2 if arguments.smoke else max(15, arguments.rounds)
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for batch in arguments.batch:
            for layer in layers:
                row = run_layer(layer, batch, rounds, not arguments.no_peers)
                rows.append({"threads": threads, **row})
    rows = merged(rows, arguments, ("threads", "batch", "name"))
    report("int8_conv2d (CPU), × = times faster than the peer", rows, arguments)


if __name__ == "__main__":
    main()
