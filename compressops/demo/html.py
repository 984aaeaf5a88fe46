"""The demo's page: where the bytes went, and what that cost."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressops import page
from compressops.page import Bar, nbytes
from compressops.report import Report, layer_table

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


@dataclass(frozen=True)
class Stage:
    """A row of the stage table.

    Attributes:
        top1, top5: in percent.
        ideal_rate: of the layers' weights, as papers count.
        stored_rate, stored_bytes: of the whole model as it would be packed after this stage.
        file_bytes: of its file, where there is one.
    """

    name: str
    top1: float | None
    top5: float | None
    ideal_rate: float
    stored_rate: float
    stored_bytes: int
    file_bytes: int | None = None

    headers = ("stage", "top-1", "top-5", "ideal rate", "stored rate", "stored bytes", "file bytes")


@dataclass(frozen=True)
class Findings:
    """Everything that the page shows.

    Attributes:
        stages: in the order in which they ran, the float network first.
        report: of the converted model.
        before, after: layer name to dense weight of the float and of the packed model.
        images: uint8 ``[N, 3, 32, 32]`` test images.
        labels, predictions: int64 ``[N]``.
        logits: float ``[N, 10]`` of the packed model.
        float_bytes: size of the float model's own safetensors file.
        seconds: wall-clock time of the run.
    """

    stages: Sequence[Stage]
    report: Report
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    images: Tensor
    labels: Tensor
    logits: Tensor
    float_bytes: int
    seconds: float


def render(found: Findings) -> str:
    """The whole page."""
    first, last = found.stages[0], found.stages[-1]
    file = found.report.totals.file
    rate = found.float_bytes / file
    document = page.Page(
        f"CifarNet in {nbytes(file)}",
        f"A CIFAR-10 network of {nbytes(found.float_bytes)} is pruned, quantized, retrained and "
        f"Huffman-coded into one file that is {rate:.1f} times smaller. The file was then loaded "
        f"in a new process, and classified all {len(found.labels):,} test images.",
    )
    document.cards(
        [
            (f"{rate:.1f}×", "smaller, file against file"),
            (nbytes(file), "the whole file"),
            (_percent(last.top1), "top-1 accuracy, from the file"),
            (_points(first.top1, last.top1), "points of top-1 against the float network"),
        ]
    )
    document.section("What each step saves", page.bars(_waterfall(found)), _WATERFALL)
    document.section(
        "Stage by stage",
        page.table(
            Stage.headers,
            [stage_cells(stage) for stage in found.stages],
            numeric=range(1, len(Stage.headers)),
        ),
        "Ideal counts weights × density × bits, as papers do. Stored counts the whole network with "
        "all that decoding needs: indices, exponents, code tables, and what is not compressed. The "
        "file adds its header.",
    )
    known = [(_short(stage.name), stage.top1) for stage in found.stages if stage.top1 is not None]
    if len(known) > 1:
        document.section("Accuracy on the way", page.line(known), "Top-1 on all test images.")
    document.section("Bits per weight", page.bars(_bits(found.report)), _BITS)
    document.section("Weights before and after", page.grid(_histograms(found)), _HISTOGRAMS)
    document.section("What it confuses", _confusion(found), _CONFUSION)
    document.section("Where it is sure, and wrong", _mistakes(found))
    document.section("Layers", layer_table(found.report.layers), " ".join(found.report.remarks()))
    document.footer(f"Made by python -m compressops.demo in {found.seconds / 60:.1f} minutes.")
    return document.html()


_WATERFALL = (
    "Bytes of the eight 3×3 convolutions and the classifier; the file holds all the rest too."
)
_BITS = "Bits in the file for each weight of the layer, with the density of its nonzero weights."
_HISTOGRAMS = (
    "Pale: the trained float weights. Strong: what is left of them; pruned zeros are not drawn. "
    "Heights are square roots of counts, so that the tails are seen."
)
_CONFUSION = "Test images by true class (row) and predicted class (column). Counts."


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} %"


def _points(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{after - before:+.2f}".replace("-", "−")


def _short(stage: str) -> str:
    """``Quantize DynamicFixedPoint(bits=6)`` is ``Quantize``: what fits under a point."""
    return stage.split()[0]


def stage_cells(stage: Stage) -> list[str]:
    """A row of the stage table as text."""
    return [
        stage.name,
        _percent(stage.top1),
        _percent(stage.top5),
        f"{stage.ideal_rate:.2f}×",
        f"{stage.stored_rate:.2f}×",
        f"{stage.stored_bytes:,}",
        "–" if stage.file_bytes is None else f"{stage.file_bytes:,}",
    ]


def _waterfall(found: Findings) -> list[Bar]:
    totals = found.report.totals
    dense = totals.dense
    kept = sum(layer.density * layer.dense for layer in found.report.layers)
    bars = [
        Bar("float32", dense, nbytes(dense), "pale"),
        Bar("pruned (values only)", kept, _sized(kept, dense), "pale"),
        Bar("quantized (ideal)", totals.ideal, _sized(totals.ideal, dense), "pale"),
        Bar("stored, with indices and tables", totals.stored, _sized(totals.stored, dense)),
    ]
    if totals.file:
        bars.append(Bar("the whole file", totals.file, _sized(totals.file, dense)))
    return bars


def _sized(size: float, dense: float) -> str:
    return f"{nbytes(size)}  ({dense / size:.1f}×)"


def _bits(report: Report) -> list[Bar]:
    rows = []
    for layer in report.layers:
        bits = 8 * layer.stored / max(1, layer.dense // 4)
        text = f"{bits:.2f} bits, {100 * layer.density:.1f} % nonzero, {nbytes(layer.stored)}"
        rows.append(Bar(layer.name, bits, text))
    return rows


def _histograms(found: Findings) -> list[str]:
    figures = []
    for name, weight in found.before.items():
        old, new = weight.flatten().float(), found.after[name].flatten().float()
        edge = old.abs().quantile(0.999).item() or 1.0
        counts = [
            torch.histc(values, bins=48, min=-edge, max=edge).tolist()
            for values in (old, new[new != 0])
        ]
        codes = new.unique().numel()
        figures.append(
            page.histogram(*counts, -edge, edge, f"{name}: {codes} different values left")
        )
    return figures


def _confusion(found: Findings) -> str:
    predictions = found.logits.argmax(1)
    n = len(CLASSES)
    counts = torch.bincount(found.labels * n + predictions, minlength=n * n).view(n, n)
    return page.heatmap(CLASSES, counts.tolist())


def _mistakes(found: Findings, count: int = 16) -> str:
    confidence, predictions = found.logits.softmax(1).max(1)
    wrong = (predictions != found.labels).nonzero().flatten()
    picked = wrong[confidence[wrong].argsort(descending=True, stable=True)[:count]]
    figures = []
    for i in picked.tolist():
        caption = f"{CLASSES[predictions[i]]}, not {CLASSES[found.labels[i]]}"
        source = base64.b64encode(png(found.images[i])).decode()
        figures.append(
            f'<figure><img alt="" src="data:image/png;base64,{source}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return f'<div class="thumbs">{"".join(figures)}</div>'


def png(image: Tensor) -> bytes:
    """A uint8 image ``[3, H, W]`` as PNG (RFC 2083)."""
    pixels = image.permute(1, 2, 0).numpy()
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
