"""Which convolutions of a model run as Winograd's: those that are faster so, and exact enough."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops import backends
from compressops.measure import observe, times_in_place
from compressops.nn import (
    BlockSparseConv2d,
    Int8Conv2d,
    LowRankConv2d,
    PackedConv1d,
    PackedConv2d,
    PackedModule,
    Winograd,
    WinogradConv1d,
    WinogradConv2d,
)
from compressops.nn.winograd import OP
from compressops.nn.winograd_conv import padded, tiles_for, why_not
from compressops.ops.winograd_model import MAX_ERROR_GROWTH
from compressops.ops.winograd_transform import kernel_transform

FLOAT_LAYERS = {nn.Conv1d: WinogradConv1d, nn.Conv2d: WinogradConv2d}
# How much faster a layer has to be: what noise can feign shall not make a model slower.
MARGIN = 1.05
# Measured errors above this multiple of the direct convolution's are too large.
ERROR_LIMIT = MAX_ERROR_GROWTH
# Activations may become this many times larger than those of the example.
HEADROOM = 4.0
# The tile that is the fastest of most layers.
_TILE = 4
# Rows and columns of one image that errors are measured on.
_SAMPLE = 16


@dataclass(frozen=True)
class Verdict:
    """Of one layer: the tile that it runs with, or None: torch's convolution; and the reason."""

    tile: int | None
    why: str


def is_candidate(layer: nn.Module) -> bool:
    """A convolution of a known type that does not run as Winograd's yet."""
    kinds = (*FLOAT_LAYERS, PackedConv1d, PackedConv2d, BlockSparseConv2d, LowRankConv2d)
    return type(layer) in kinds and getattr(layer, "winograd", None) is None


def with_winograd(layer: nn.Module, tile: int) -> nn.Module:
    """A layer like this one, on the same weight, that runs as F(tile, r)."""
    if not isinstance(layer, PackedModule):
        return FLOAT_LAYERS[type(layer)].from_float(layer, tile)
    if hasattr(layer, "run_winograd"):
        new = type(layer).from_module(layer, layer.packed_weight)
    else:
        new = PackedConv2d.from_module(layer, layer.packed_weight.packed())
    new.input_quantizer = layer.input_quantizer
    new.run_winograd(Winograd(tile))
    return new.train(layer.training)


def rivals(
    new: nn.Module, dense: nn.Module, input: Tensor
) -> tuple[list[nn.Module], dict[str, nn.Module]]:
    """What is to be measured of a packed module, and against what, by name.

    A convolution on integers has Winograd's as a rival, on the same weight, with each tile that is
    safe on ``input``. Of a low-rank one both are measured also as Winograd's, which either may run
    as afterwards. One of blocks meets Winograd's afterwards, in its place (`choose`).
    """
    if not isinstance(new, (Int8Conv2d, LowRankConv2d)):
        return [new], {"dense": dense}
    whole = PackedConv2d.from_module(dense, new.packed_weight.packed())
    able = _no_candidate(whole) is None
    if isinstance(new, Int8Conv2d):
        tiles = [t for t in tiles_for(whole) if able and unsafe(whole, input, t) is None]
        mine = [new]
    else:
        tiles = [_TILE] if able and _TILE in tiles_for(whole) else []
        runs = _no_candidate(new) is None and _TILE in tiles_for(new)
        mine = [new, *([with_winograd(new, _TILE)] if runs else [])]
    return mine, {"dense": dense, **{_label(whole, t): with_winograd(whole, t) for t in tiles}}


def prepare(model: nn.Module) -> None:
    """Compute now what the layers of ``model`` keep, which their first call would do otherwise."""
    for layer in model.modules():
        winograd = getattr(layer, "winograd", None)
        if isinstance(layer, LowRankConv2d):
            layer.prepare()
        elif isinstance(winograd, Winograd) and getattr(layer, "residency", "") != "packed":
            winograd.prepare(layer.weight, layer.groups)


def choose(
    model: nn.Module, layers: Mapping[str, nn.Module], runs: Mapping[str, nn.Module], inputs: Any
) -> dict[str, Verdict]:
    """Measure each layer in place, as it runs now and as Winograd's with each tile.

    A tile that is not safe on these inputs (see `unsafe`) is left out. Of the others the fastest
    is taken if it is faster by `MARGIN` in the median round, and faster in three of four.

    Args:
        model: runs on ``inputs``.
        layers: some of its convolutions, by name.
        runs: what stands for them after conversion: themselves, or packed modules.
        inputs: of ``model``: a tensor, or a tuple or dict of arguments.

    Returns:
        A verdict for each layer.
    """
    safe: dict[str, list[int]] = {}
    notes: dict[str, list[str]] = {name: [] for name in layers}
    verdicts: dict[str, Verdict] = {}
    for name, run in runs.items():
        if (why := _no_candidate(run)) is not None:
            verdicts[name] = Verdict(None, why)
    watched = {name: layer for name, layer in layers.items() if name not in verdicts}

    def see(name: str, args: tuple[Any, ...]) -> None:
        safe[name] = []
        for tile in tiles_for(runs[name]):
            if (why := unsafe(runs[name], args[0], tile)) is None:
                safe[name].append(tile)
            else:
                notes[name].append(f"{_label(runs[name], tile)} is not safe: {why}")

    if watched:
        observe(model, watched, inputs, see)
    best: dict[str, tuple[bool, float, int, str]] = {}
    for tile in sorted({tile for tiles in safe.values() for tile in tiles}):
        # One tile at a time: the transformed weights of all of them are ten times the weights.
        rivals = {
            name: [runs[name].forward, with_winograd(runs[name], tile).forward]
            for name, tiles in safe.items()
            if tile in tiles
        }
        times = times_in_place(model, {name: layers[name] for name in rivals}, rivals, inputs)
        for name, (direct, ours) in times.items():
            entry = _compare(direct, ours, tile, _label(runs[name], tile))
            best[name] = max(best.get(name, entry), entry)
    for name in watched:
        if name in best:
            wins, _, tile, text = best[name]
            said = [text if wins else f"Winograd not used: {text}", *notes[name]]
            verdicts[name] = Verdict(tile if wins else None, "; ".join(said))
        elif name in safe:
            verdicts[name] = Verdict(None, "Winograd not used: " + "; ".join(notes[name]))
        else:
            verdicts[name] = Verdict(None, "Winograd not used: not called with example_inputs")
    return verdicts


def unsafe(layer: nn.Module, input: Tensor, tile: int) -> str | None:
    """Why this layer's convolution had better not run as F(tile, r); ``None``: it may.

    Two reasons: a float16 kernel keeps the transformed tiles and weights in float16, where the
    largest that can come out, ``max|input| · ‖Bᵀ‖∞²`` and ``max|weight| · ‖G‖∞²``, has to stay
    below the largest float16 with some headroom; and the error on a part of ``input``, by root mean
    square against float64, must be at most `ERROR_LIMIT` times that of the direct convolution.

    Args:
        layer: a convolution that has this tile.
        input: what it is called with.
    """
    if isinstance(layer, LowRankConv2d):
        layer, input = layer.winograd_step(input)
    weight = layer.weight.detach()
    if _computes_in_half(input) and input.numel():
        for what, tensor, growth in zip(
            ("inputs", "weights"), (input, weight), _growth(layer, tile), strict=True
        ):
            bound = tensor.abs().max().item() * growth
            if not bound * HEADROOM <= torch.finfo(torch.float16).max:
                return f"transformed {what} may reach {bound:.2g} in float16"
    batched = input.dim() > len(layer.kernel_size) + 1
    sample = input[:1] if batched else input[None]
    for dim in range(2, sample.dim()):
        length = min(_SAMPLE, sample.shape[dim])
        sample = sample.narrow(dim, (sample.shape[dim] - length) // 2, length)
    if not sample.numel():
        return "nothing to measure its error on: an empty input"
    if not sample.any():
        # Zeros are convolved without error, and say nothing of other inputs.
        generator = torch.Generator(sample.device).manual_seed(0)
        sample = torch.randn(
            sample.shape, dtype=sample.dtype, device=sample.device, generator=generator
        )
    around, padding = padded(layer, sample)
    convolve = F.conv1d if len(layer.kernel_size) == 1 else F.conv2d

    def direct(dtype: torch.dtype) -> Tensor:
        return convolve(around.to(dtype), weight.to(dtype), None, 1, padding, 1, layer.groups)

    exact = direct(torch.float64)
    ours = Winograd(tile)(around, weight, None, padding, layer.groups, keep=False)
    rms = [(y.double() - exact).square().mean().sqrt().item() for y in (ours, direct(input.dtype))]
    # Where the direct convolution is exact, as with weights of few bits, that would ask for too
    # much. A quarter of eps is about what rounding the result costs.
    least = torch.finfo(input.dtype).eps / 4 * exact.square().mean().sqrt().item()
    if not rms[0] <= ERROR_LIMIT * max(rms[1], least):
        factor = rms[0] / max(rms[1], least) if least else float("inf")
        return f"its error is {factor:.1f} times the direct convolution's, over {ERROR_LIMIT:g}"
    return None


def _computes_in_half(input: Tensor) -> bool:
    # On a CPU the Winograd domain is float32.
    return input.dtype == torch.float16 and input.device.type != "cpu"


def _growth(layer: nn.Module, tile: int) -> Iterator[float]:
    """By how much the transforms of inputs and weights may magnify the largest entry."""
    transform = kernel_transform(tile, layer.kernel_size[-1])
    dimensions = sum(size > 1 for size in layer.kernel_size)
    for matrix in (transform.bt, transform.g):
        yield float(max(sum(abs(entry) for entry in row) for row in matrix)) ** dimensions


def _no_candidate(layer: nn.Module) -> str | None:
    if (why := why_not(layer)) is not None:
        return why
    if isinstance(layer, LowRankConv2d):
        held = layer.packed_weight
        if held.layout.form not in layer.KERNELS:
            return f"Winograd not used: no factor of form {held.layout.form!r} has the whole kernel"
        weight = next(iter(held.factors().values()))
    else:
        weight = layer.weight
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"Winograd not used: its kernels have no {weight.dtype}"
    if backends.name(OP, weight.device.type) == "eager":
        return "Winograd not used: its op has no compiled kernel here"
    return None


def _label(layer: nn.Module, tile: int) -> str:
    return f"Winograd F({tile}, {layer.kernel_size[-1]})"


def _compare(
    direct: list[float], ours: list[float], tile: int, label: str
) -> tuple[bool, float, int, str]:
    """Whether it is enough faster, how many times, the tile, and the figures as text."""
    # Where a model routes by values, rounding can change how often a layer is called.
    ratios = [theirs / mine for theirs, mine in zip(direct, ours, strict=False)]
    ratio, quarter = statistics.median(ratios), statistics.quantiles(ratios, n=4)[0]
    figures = [statistics.median(seconds) * 1e6 for seconds in (ours, direct)]
    text = f"{label}: measured {figures[0]:.0f} µs, direct {figures[1]:.0f} µs"
    return ratio >= MARGIN and quarter > 1, ratio, tile, text
