"""winograd_conv2d against what computes the same convolution on this machine.

    python bench/bench_winograd.py                                   # torch alone
    python bench/bench_winograd.py --nets vgg16 --batch 1 --threads 2

The 3×3 layers of stride 1 of VGG16 at 224×224, CifarNet at 32×32 and ResNet-18/50 at 224×224, with
bias, float32. Every contestant's result is compared with float64 before it is timed. The peers
beside torch are used where they are installed, and named with the reason where they are not:

    pip install --no-deps onnxruntime onnx openvino openvino-telemetry ncnn
    pip install numpy protobuf flatbuffers packaging ml_dtypes typing_extensions
    apt-get install g++ libdnnl-dev

`winograd_peers.py` says what each one's figure includes. GFLOP/s are those of the direct
convolution, so that Winograd may exceed the FMA peak: by 2.25 with F(2,3), by 4 with F(4,3).
"converted" is what `compressops.convert` makes of "original", a model of one `nn.Conv2d` on NCHW:
Winograd or the layer as it was. On a machine with a GPU it runs there (`winograd_gpu.py`): cuDNN
with benchmark=True.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import winograd_peers
from common import context, interleaved, measured_fp32_peak, median_ratio, merged, parser, report
from peers import MissingError, Peer, fma_peak
from rich.console import Console
from torch import nn
from winograd_peers import Case

import compressops as co

# Threads that spin after their work stop doing so in less.
SETTLE = 0.01
# Of an output's root mean square; float32 convolutions of these sizes are below 3e-6.
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Layer:
    """A 3×3 convolution of stride 1; ``count`` of them are in the network."""

    net: str
    name: str
    C: int
    K: int
    size: int
    count: int = 1
    padding: int = 1

    @property
    def deep(self) -> bool:
        """Among those that the published target is about: VGG16 from 128 channels on."""
        return self.net == "vgg16" and self.C >= 128


LAYERS = [
    Layer("vgg16", "1_1", 3, 64, 224),
    Layer("vgg16", "1_2", 64, 64, 224),
    Layer("vgg16", "2_1", 64, 128, 112),
    Layer("vgg16", "2_2", 128, 128, 112),
    Layer("vgg16", "3_1", 128, 256, 56),
    Layer("vgg16", "3_2", 256, 256, 56, count=2),
    Layer("vgg16", "4_1", 256, 512, 28),
    Layer("vgg16", "4_2", 512, 512, 28, count=2),
    Layer("vgg16", "5_1", 512, 512, 14, count=3),
    Layer("cifarnet", "conv1", 3, 64, 32, padding=0),
    Layer("cifarnet", "conv2", 64, 64, 30),
    Layer("cifarnet", "conv4", 128, 128, 15, count=2),
    Layer("cifarnet", "conv7", 192, 192, 8, count=2),
    # The same shapes in both; counted as in ResNet-18. The first of a stage has stride 2 or, in
    # ResNet-50, stands behind a 1×1 convolution.
    Layer("resnet", "layer1", 64, 64, 56, count=4),
    Layer("resnet", "layer2", 128, 128, 28, count=3),
    Layer("resnet", "layer3", 256, 256, 14, count=3),
    Layer("resnet", "layer4", 512, 512, 7, count=3),
]
SMOKE = [Layer("smoke", "tiny", 16, 32, 9)]


def make_case(layer: Layer, batch: int, threads: int) -> Case:
    x = torch.randn(batch, layer.C, layer.size, layer.size)
    weight = torch.randn(layer.K, layer.C, 3, 3) * (2 / (9 * layer.C)) ** 0.5
    return Case(x, weight, torch.randn(layer.K), layer.padding, threads)


def ours(case: Case, memory_format: torch.memory_format, tile: int | str) -> Peer:
    x = case.x.to(memory_format=memory_format)
    if tile == "auto":
        pair = (case.padding, case.padding)
        tile = co.ops.choose_tile(case.x.shape, case.weight.shape, pair)
    transformed = co.ops.winograd_conv2d_pack(case.weight, 1, tile)

    def run() -> torch.Tensor:
        return co.ops.winograd_conv2d(
            x, case.weight, case.bias, case.padding, tile=tile, transformed=transformed
        )

    return Peer(run, run, f"F({tile},3)")


def model_of(case: Case) -> nn.Module:
    # As models are made: outside of inference mode, where parameters have versions.
    with torch.inference_mode(False):
        layer = nn.Conv2d(case.weight.shape[1], len(case.weight), 3, padding=case.padding)
        layer.weight.data.copy_(case.weight)
        layer.bias.data.copy_(case.bias)
    return nn.Sequential(layer).eval()


def original(case: Case) -> Peer:
    model = model_of(case)
    return Peer(lambda: model(case.x), lambda: model(case.x), "")


def converted(case: Case) -> Peer:
    model = co.convert(model_of(case), example_inputs=case.x)
    winograd = getattr(model[0], "winograd", None)
    note = "direct" if winograd is None else f"F({winograd.tile},3)"
    return Peer(lambda: model(case.x), lambda: model(case.x), note)


def contestants(case: Case, wanted: list[str] | None, tile: int | str) -> dict[str, Callable]:
    makers: dict[str, Callable[[Case], Peer]] = {
        "ours NCHW": lambda case: ours(case, torch.contiguous_format, tile),
        "ours channels_last": lambda case: ours(case, torch.channels_last, tile),
        "original": original,
        "converted": converted,
        **winograd_peers.PEERS,
    }
    return {n: m for n, m in makers.items() if wanted is None or any(w in n for w in wanted)}


def checked(peer: Peer, case: Case) -> Peer:
    """The peer itself, if it computes this convolution.

    Only the first image's is compared: float64 is slow.
    """
    peer.run()
    actual = peer.result()[:1].double()
    expected = torch.nn.functional.conv2d(
        case.x[:1].double(), case.weight.double(), case.bias.double(), padding=case.padding
    )
    error = ((actual - expected).pow(2).mean() / expected.pow(2).mean()).sqrt().item()
    if not error < TOLERANCE:
        raise MissingError(f"its result is off by {error:.1e} of the root mean square")
    return peer


def too_big(case: Case, contestants: int, rounds: int, limits: argparse.Namespace) -> str | None:
    """Why this case is not run, if it is not."""
    # Most contestants hold an input and an output of their own.
    gigabytes = contestants * 4e-9 * (case.x.numel() + torch.Size(case.out_shape).numel())
    if gigabytes > limits.max_gb:
        return f"about {gigabytes:.0f} GB, more than --max-gb {limits.max_gb:g}"
    direct = winograd_peers.torch_conv(case, torch.contiguous_format)
    seconds = min(interleaved({"direct": direct.run}, 2)["direct"])
    seconds = contestants * rounds * (2 * max(0.005, seconds) + SETTLE)
    if seconds > limits.max_seconds:
        return f"about {seconds:.0f} s, more than --max-seconds {limits.max_seconds:g}"
    return None


def run_case(layer: Layer, case: Case, rounds: int, arguments: argparse.Namespace) -> dict:
    entered: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name, make in contestants(case, arguments.peers, arguments.tile).items():
        try:
            entered[name] = checked(make(case), case)
        except MissingError as why:
            missing[name] = str(why)
    seconds = interleaved({n: p.run for n, p in entered.items()}, rounds, settle=SETTLE)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = {
        group: min((n for n in medians if n.startswith(group)), key=medians.get, default=None)
        for group in ("ours", "torch")
    }
    mine = medians.get(best["ours"])
    row = {
        **{"net": layer.net, "layer": layer.name, "N": len(case.x), "threads": case.threads},
        **{"C": layer.C, "K": layer.K, "HW": layer.size, "count": layer.count},
    }
    for name, value in medians.items():
        row[f"{name} µs"] = value * 1e6
    if mine:
        row["best of ours"] = f"{best['ours'].split()[-1]} {entered[best['ours']].note}"
        row["GFLOP/s"] = case.flops / mine / 1e9
        if best["torch"]:
            row["best of torch"] = best["torch"].removeprefix("torch ")
            row["× torch"] = median_ratio(seconds[best["torch"]], seconds[best["ours"]])
        for peer in ("oneDNN Winograd", "ncnn", "OpenVINO", "onnxruntime"):
            if peer in seconds:
                row[f"× {peer}"] = median_ratio(seconds[peer], seconds[best["ours"]])
    if "converted" in seconds and "original" in seconds:
        row["converted to"] = entered["converted"].note
        row["converted × original"] = median_ratio(seconds["original"], seconds["converted"])
    # Beside a busy machine's medians: what each can do.
    row["least µs"] = {name: min(times) * 1e6 for name, times in seconds.items()}
    row["notes"] = {n: p.note for n, p in entered.items() if p.note}
    row["missing"] = missing
    return row


def summaries(rows: list[dict]) -> list[dict]:
    """Geometric means over the layers of a network, and the sum over the network."""
    found = []
    groups = {(row["net"], row["N"], row["threads"]): [] for row in rows}
    for row in rows:
        groups[row["net"], row["N"], row["threads"]].append(row)
    deep = {layer.name for layer in LAYERS if layer.deep}
    for (net, batch, threads), members in groups.items():
        kinds = {net: members}
        if net == "vgg16":
            kinds["vgg16, C ≥ 128"] = [row for row in members if row["layer"] in deep]
        for kind, layers in kinds.items():
            line = {"net": kind, "N": batch, "threads": threads, "layers": len(layers)}
            for key in ("× torch", "× oneDNN Winograd", "× ncnn", "× OpenVINO", "× onnxruntime"):
                ratios = [row[key] for row in layers if key in row]
                if len(ratios) == len(layers) > 0:
                    line[key] = statistics.geometric_mean(ratios)
            for key in ("converted × original",):
                ratios = [row[key] for row in layers if key in row]
                line[f"least {key}"] = min(ratios, default=None)
            found.append(line)
    return found


def peak(threads: int) -> tuple[float, str]:
    try:
        return fma_peak(threads), "FMA on registers"
    except MissingError as why:
        return measured_fp32_peak(), f"matrix product ({why})"


def cases(arguments: argparse.Namespace) -> Iterator[tuple[Layer, int, int]]:
    layers = SMOKE if arguments.smoke else LAYERS
    for threads in arguments.threads:
        for batch in [2] if arguments.smoke else arguments.batch:
            for layer in layers:
                asked = arguments.smoke or layer.net in arguments.nets
                if asked and (not arguments.layers or layer.name in arguments.layers):
                    yield layer, batch, threads


def options() -> argparse.ArgumentParser:
    out = parser(__doc__, "winograd-cpu")
    nets = list(dict.fromkeys(layer.net for layer in LAYERS))
    out.add_argument("--nets", nargs="+", default=nets, choices=nets)
    out.add_argument("--layers", nargs="+", help="names as in the table; all by default")
    out.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    out.add_argument("--peers", nargs="+", help="parts of contestants' names; all by default")
    out.add_argument("--tile", default="auto", choices=["auto", "2", "4", "6"])
    out.add_argument("--max-gb", type=float, default=8, help="skip a layer that takes more")
    out.add_argument("--max-seconds", type=float, default=120, help="skip a slower layer")
    out.add_argument("--merge", action="store_true", help="keep the other rows of --out")
    return out


SHOWN = (
    *("net", "layer", "N", "threads", "C", "K", "HW", "best of ours", "GFLOP/s", "% FMA peak"),
    *("best of torch", "× torch", "× oneDNN Winograd", "× ncnn", "× OpenVINO", "× onnxruntime"),
    *("converted to", "converted × original"),
)


@torch.inference_mode()
def main() -> None:
    arguments = options().parse_args()
    if torch.cuda.is_available():
        import winograd_gpu

        winograd_gpu.main(arguments, SMOKE if arguments.smoke else LAYERS)
        return
    arguments.tile = arguments.tile if arguments.tile == "auto" else int(arguments.tile)
    if arguments.smoke:
        # What runs everywhere; other libraries have no place in a test.
        arguments.peers = ["ours", "original", "converted", "torch"]
    torch.manual_seed(0)
    rounds = 2 if arguments.smoke else max(15, arguments.rounds)
    rows, skipped, peaks = [], [], {}
    for layer, batch, threads in cases(arguments):
        torch.set_num_threads(threads)
        case = make_case(layer, batch, threads)
        count = len(contestants(case, arguments.peers, arguments.tile))
        name = f"{layer.net} {layer.name}, N={batch}, {threads} threads"
        if (why := too_big(case, count, rounds, arguments)) is not None:
            skipped.append(f"{name}: {why}")
            print("skipped", skipped[-1], flush=True)
            continue
        if threads not in peaks and not arguments.smoke:
            peaks[threads], how = peak(threads)
            print(f"peak of {threads} threads: {peaks[threads]:.0f} GFLOP/s, {how}")
        row = run_case(layer, case, rounds, arguments)
        if "GFLOP/s" in row and threads in peaks:
            row["% FMA peak"] = 100 * row["GFLOP/s"] / peaks[threads]
        for peer, why in row["missing"].items():
            print(f"{name}: without {peer}: {why}")
        times = {
            k.removesuffix(" µs"): round(v, 1)
            for k, v in row.items()
            if isinstance(v, float) and k.endswith(" µs")
        }
        Console(width=200).print(name, times)
        rows.append(row)
    if not rows:
        raise SystemExit("nothing was run")
    rows = merged(rows, arguments, ("net", "layer", "N", "threads"))
    shown = [{key: row.get(key, "–") for key in SHOWN} for row in rows]
    quiet = argparse.Namespace(**{**vars(arguments), "smoke": True})
    report("Winograd (CPU), × = times faster than the peer", shown, quiet)
    means = summaries(rows)
    extra = {"summary": means, "skipped": skipped, "fma_peak": peaks}
    report("Geometric means over layers", means, quiet)
    arguments.smoke or write(rows, extra, arguments)


def write(rows: list[dict], extra: dict, arguments: argparse.Namespace) -> None:
    result = {**context(arguments), "title": "Winograd (CPU)", **extra, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
