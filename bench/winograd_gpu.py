"""The GPU part of bench_winograd.py: cuDNN with benchmark=True, in float16, bfloat16 and float32.

Graph replays, as in gpu_verify.py; channels_last; the kernels that cuDNN chose are named.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import merged, report
from gpu_verify import event_seconds

import compressops as co

DEVICE = torch.device("cuda")
# name: dtype, TF32
KINDS = {
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
    "fp32, TF32 on": (torch.float32, True),
    "fp32, TF32 off": (torch.float32, False),
}


@contextlib.contextmanager
def cudnn(tf32: bool) -> Iterator[None]:
    """benchmark=True, and TF32 as asked."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
        yield


def graph_of(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """Names of the kernels that a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return list(dict.fromkeys(event.name for event in profile.events() if event.device_time > 0))


def interleaved_graphs(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a replay for each contestant, ``rounds`` of them, in turns."""
    graphs = {name: graph_of(call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            seconds[name].append(event_seconds(graph.replay, 5))
    return seconds


def cases() -> Iterator[tuple[str, Any, int, int]]:
    """What gpu_verify.py times: kind, layer, batch and tile, those of the published targets first.

    The others are narrower layers, where V and M weigh more, and the smaller tile.
    """
    from bench_winograd import LAYERS

    named = {(layer.net, layer.name): layer for layer in LAYERS}
    wide = [named["vgg16", name] for name in ("3_2", "4_1", "4_2", "5_1")]
    wide += [named["resnet", name] for name in ("layer3", "layer4")]
    narrow = [named["vgg16", "1_2"], named["vgg16", "2_2"], named["resnet", "layer1"]]
    for kind in ("fp16", "fp32, TF32 off", "fp32, TF32 on"):
        for layer, batch in itertools.product(wide, (64, 8, 1)):
            yield kind, layer, batch, 4
    for layer, tile in itertools.product([*narrow, *wide[:3]], (2, 4)):
        if tile == 2 or layer in narrow:
            yield "fp16", layer, 64, tile
    for tile in (2, 4):
        yield "bf16", wide[2], 64, tile
    for tile in (2, 6):
        yield "fp32, TF32 off", wide[0], 64, tile


def run_layer(layer: Any, batch: int, kind: str, rounds: int, tile: int | None = None) -> dict:
    """Times of a layer with a tile, or with the one that ``tile="auto"`` takes."""
    dtype, tf32 = KINDS[kind]
    options = {"device": DEVICE, "dtype": dtype}
    x = torch.randn(batch, layer.C, layer.size, layer.size, **options)
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(layer.K, layer.C, 3, 3, **options) * (2 / (9 * layer.C)) ** 0.5
    last, bias = weight.to(memory_format=torch.channels_last), torch.randn(layer.K, **options)
    if tile is None:
        tile = co.ops.choose_tile(
            *(x.shape, weight.shape, (layer.padding, layer.padding)),
            dtype=str(dtype).removeprefix("torch."),
            half_domain=True,
        )
    transformed = co.ops.winograd_conv2d_pack(weight, 1, tile)

    def ours() -> torch.Tensor:
        return co.ops.winograd_conv2d(
            x, weight, bias, layer.padding, tile=tile, transformed=transformed
        )

    def theirs() -> torch.Tensor:
        return F.conv2d(x, last, bias, padding=layer.padding)

    with cudnn(tf32):
        seconds = interleaved_graphs({"ours": ours, "cuDNN": theirs}, rounds)
        names = kernels_of(theirs)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    height = layer.size + 2 * layer.padding - 2
    flops = 2 * batch * height**2 * layer.K * layer.C * 9
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["cuDNN"], strict=True)]
    return {
        **{"net": layer.net, "layer": layer.name, "N": batch, "kind": kind},
        **{"C": layer.C, "K": layer.K, "HW": layer.size, "tile": tile},
        **{"ours µs": medians["ours"] * 1e6, "cuDNN µs": medians["cuDNN"] * 1e6},
        **{"TFLOP/s": flops / medians["ours"] / 1e12, "× cuDNN": statistics.median(ratios)},
        "cuDNN's kernels": " + ".join(name[:90] for name in names),
    }


def main(arguments: argparse.Namespace, layers: Iterable[Any]) -> None:
    """All layers, batches and dtypes, and the geometric means of the published targets."""
    rounds = 2 if arguments.smoke else max(15, arguments.rounds)
    arguments.out = arguments.out.with_name("winograd-gpu.json")
    rows = [
        run_layer(layer, batch, kind, rounds)
        for batch in ([2] if arguments.smoke else arguments.batch)
        for layer in layers
        if arguments.smoke or layer.net in arguments.nets
        for kind in KINDS
    ]
    rows = merged(rows, arguments, ("net", "layer", "N", "kind"))
    report(f"Winograd on {torch.cuda.get_device_name()}", rows, arguments)
    for kind in KINDS:
        wide = [
            row["× cuDNN"] for row in rows if row["kind"] == kind and min(row["C"], row["K"]) >= 256
        ]
        if wide:
            mean, least, most = statistics.geometric_mean(wide), min(wide), max(wide)
            print(f"{kind}, C and K ≥ 256: geomean {mean:.2f}×, {least:.2f} to {most:.2f}")
