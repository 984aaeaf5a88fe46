"""Rounding errors of winograd_conv2d as multiples of those of torch's direct convolution.

    python bench/bench_winograd_error.py

On normally distributed images and filters, against float64. The ratio of maxima is the largest
of three random cases; the other figures are means. u is the unit roundoff of the dtype.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from common import parser, report

import compressops as co
from compressops.ops import winograd_model as model
from compressops.ops.winograd_transform import SUPPORTED, kernel_transform

SEEDS = 3


def errors(y: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Largest and root mean square error."""
    error = (y.double() - exact).abs()
    return error.max().item(), error.square().mean().sqrt().item()


def row(tile: int, r: int, dtype: torch.dtype, channels: int, size: int, seeds: int) -> dict:
    """One line of the table: two dimensions, ``channels`` in, 64 out, size × size pixels."""
    name = str(dtype).removeprefix("torch.")
    largest, nchw, nhwc, relative = [], [], [], []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, channels, size, size, generator=generator).to(dtype)
        weight = torch.randn(64, channels, r, r, generator=generator)
        weight = (weight / (channels * r * r) ** 0.5).to(dtype)
        exact = F.conv2d(x.double(), weight.double(), padding=r // 2)
        ours = errors(co.ops.winograd_conv2d(x, weight, None, r // 2, tile=tile), exact)
        direct = errors(F.conv2d(x, weight, padding=r // 2), exact)
        last = x.contiguous(memory_format=torch.channels_last)
        direct_last = errors(F.conv2d(last, weight, padding=r // 2), exact)
        largest.append(ours[0] / direct[0])
        nchw.append(ours[1] / direct[1])
        nhwc.append(ours[1] / direct_last[1])
        output = exact.square().mean().sqrt().item()
        relative.append(ours[1] / output / model.UNIT_ROUNDOFF[name])
    terms = model.error_terms(kernel_transform(tile, r))
    return {
        "transform": f"F({tile},{r})",
        "dtype": name,
        "channels": channels,
        "× NCHW, max": max(largest),
        "× NCHW, RMS": statistics.mean(nchw),
        "predicted": model.error_growth(terms, terms, channels, name),
        "× channels last, RMS": statistics.mean(nhwc),
        "RMS error, u": statistics.mean(relative),
        "predicted, u": model.relative_error(terms, terms, channels)
        if dtype == torch.float32
        else "–",
    }


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "winograd-error-cpu").parse_args()
    torch.set_num_threads(arguments.threads[-1])
    channels, size, seeds = ((16,), 8, 1) if arguments.smoke else ((16, 64, 256, 512), 28, SEEDS)
    rows = [
        row(tile, r, torch.float32, count, size, seeds)
        for tile, r in SUPPORTED
        for count in channels
    ]
    rows += [
        row(tile, r, dtype, channels[-1], size, seeds)
        for dtype in (torch.float16, torch.bfloat16)
        for tile, r in SUPPORTED
    ]
    report("Errors of winograd_conv2d", rows, arguments)


if __name__ == "__main__":
    main()
