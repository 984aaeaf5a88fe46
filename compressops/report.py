"""What became of a model's layers, and what it takes: on paper, packed, in the file, in memory."""

from __future__ import annotations

import io
import os
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressops import page
from compressops.compress import record
from compressops.compress.sizes import entries
from compressops.formats import Raw, pools
from compressops.formats.coding import is_coded
from compressops.model_state import join
from compressops.nn import PackedModule
from compressops.page import axis, nbytes
from compressops.registry import is_layer

STAYS_RAW = "stored raw: {} coding would gain too little"


@dataclass(frozen=True)
class Layer:
    """One layer of the report.

    Attributes:
        name: as in ``named_modules()``.
        was: class name of the float layer.
        became: class name of what it is now.
        why: the reason, as `convert` recorded it.
        shape: of the weight.
        density: stored part of the entries.
        layout, number, coding: the three axes, or ``"–"``.
        dense: bytes of the dense weight in its own dtype.
        ideal: weights × density × bits / 8, the accounting of papers.
        stored: exact bytes of the packed weight, with indices, scales and tables.
        memory: bytes of the weight's buffers now; 0 if another layer, listed before, holds them.
        kernel: ``"dense"``, torch's own, or the op that runs instead.
        backend: whose kernel that is: ``"torch"``, or the backend of the op.
        residency: how the weight is held: ``"decoded"`` or ``"packed"``; ``"parametrized"`` if it
            is compressed and not packed; ``"plain"``.
    """

    name: str
    was: str
    became: str
    why: str
    shape: tuple[int, ...]
    density: float
    layout: str
    number: str
    coding: str
    dense: int
    ideal: float
    stored: int
    memory: int
    kernel: str
    backend: str
    residency: str


@dataclass(frozen=True)
class Totals:
    """Bytes of the whole model: its layers' weights, and all else (biases, normalisations): what
    that takes in memory, and in a file.

    ``file`` is ``None`` where the report was not given a file.
    """

    dense: int
    ideal: float
    stored: int
    memory: int
    other: int
    other_stored: int
    file: int | None


@dataclass(frozen=True)
class Report:
    """Printable with ``print``, with rich, and as a page of HTML."""

    model: str
    layers: tuple[Layer, ...]
    totals: Totals

    def __rich__(self) -> Group:
        # What many layers have in common stands once below the table, which stays narrow.
        notes: dict[str, str] = {}
        table = Table(box=None, pad_edge=False, header_style="bold")
        for header in (*_HEADERS[:6], "note"):
            right = header in _NUMERIC
            table.add_column(header, justify="right" if right else "left", no_wrap=right)
        for layer in self.layers:
            cells = _cells(layer)
            note = "; ".join(cell for cell in cells[6:] if cell not in ("", "–"))
            mark = notes.setdefault(note, f"[{len(notes) + 1}]")
            table.add_row(*cells[:6], Text(mark))
        legend = Table(box=None, pad_edge=False, show_header=False)
        for note, mark in notes.items():
            legend.add_row(Text(mark), Text(note))
        remarks = (Text(remark) for remark in self.remarks())
        return Group(table, Text(), legend, Text(), _totals_table(self.totals), Text(), *remarks)

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=100, color_system=None).print(self)
        # rich pads every line to the console's width.
        return "\n".join(text.rstrip() for text in out.getvalue().splitlines())

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {**asdict(self), "remarks": self.remarks()}

    def remarks(self) -> list[str]:
        """What to expect of run time and memory, a sentence or two each."""
        return [_run_time(self.layers), *_memory(self.totals, self.layers)]

    def to_html(self) -> str:
        """A self-contained page."""
        totals, other = self.totals, self.totals.other
        document = page.Page(f"{self.model}, layer by layer")
        cards = [
            (nbytes(totals.dense + other), "dense"),
            (nbytes(totals.ideal + other), "ideal"),
            (nbytes(totals.stored + totals.other_stored), "stored"),
            (nbytes(totals.memory + other), "in memory"),
        ]
        if totals.file is not None:
            cards.insert(3, (nbytes(totals.file), "file"))
        document.cards(cards)
        document.section(
            "Where the bytes are", page.bars(size_bars(totals)), "Weights of the layers only."
        )
        document.section("Layers", layer_table(self.layers), " ".join(self.remarks()))
        return document.html()


def report(model: nn.Module, file: str | os.PathLike[str] | None = None) -> Report:
    """What each layer of ``model`` is, why, and what it takes.

    Args:
        model: converted, compressed, or plain.
        file: the file that the model was saved to or loaded from, for its size.

    Raises:
        OSError: ``file`` cannot be read.
    """
    notes = getattr(model, "conversion_notes", {})
    seen: set[int] = set()
    layers, counted = [], set()
    for name, module in model.named_modules():
        if is_layer(module):
            note = notes.get(name)
            layers.append(_layer(name, module, note.why if note else "", note and note.was, seen))
            counted |= {id(t) for t in _weight_tensors(module)}
    named = [*model.named_parameters(), *model.named_buffers()]
    others = {name: t for name, t in named if id(t) not in counted}
    layers, other_stored = _stored(model, layers, others)
    totals = Totals(
        dense=sum(layer.dense for layer in layers),
        ideal=sum(layer.ideal for layer in layers),
        stored=sum(layer.stored for layer in layers),
        memory=sum(layer.memory for layer in layers),
        other=sum(t.nbytes for t in others.values()),
        other_stored=other_stored,
        file=None if file is None else os.stat(file).st_size,
    )
    return Report(type(model).__name__, tuple(layers), totals)


def _stored(
    model: nn.Module, layers: list[Layer], others: dict[str, Tensor]
) -> tuple[list[Layer], int]:
    """The ``layers`` with what the file spends on those that stayed as they are, and the bytes of
    ``others`` there, which may share a pool with small weights of such layers."""
    plain: dict[int, tuple[str, Tensor]] = {}
    codings = []
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            codings.append(module.packed_weight.packed().coding)
        elif is_layer(module) and (done := record(module)) is not None:
            codings.append(done.coding)
        elif is_layer(module):
            plain.setdefault(id(module.weight), (join(name, "weight"), module.weight))
    weights = dict(plain.values())
    kept = set(map(id, model.state_dict(keep_vars=True).values()))
    together = weights | {name: t for name, t in others.items() if id(t) in kept}
    coding = pools.common_coding(codings)
    built = pools.build(together, coding)
    alone = {name: pool.tensor.nbytes for name, pool in built.items() if name in weights}
    spent = sum(alone.get(name, weight.nbytes) for name, weight in weights.items())
    return [
        replace(layer, stored=alone[name], coding=axis(coding))
        if (name := join(layer.name, "weight")) in alone
        else layer
        for layer in layers
    ], pools.stored_nbytes(together, built) - spent


def _layer(name: str, module: nn.Module, why: str, was: str | None, seen: set[int]) -> Layer:
    tensors = _weight_tensors(module)
    storages = {t.untyped_storage().data_ptr() or id(t): t.nbytes for t in tensors}
    shared = bool(storages) and next(iter(storages)) in seen
    memory = sum(size for pointer, size in storages.items() if pointer not in seen)
    seen |= set(storages)
    kind = parametrize.type_before_parametrizations(module).__name__
    if isinstance(module, PackedModule):
        packed = module.packed_weight.packed()
        shape, density = tuple(packed.shape), packed.density
        axes = (axis(packed.layout), axis(packed.number), axis(packed.coding))
        ideal, stored = packed.ideal_nbytes, packed.nbytes
        dense = packed.dtype.itemsize * module.packed_weight.shape.numel()
        kernel, backend = module.op or "dense", module.backend()
        residency = module.residency
        if packed.coding != Raw() and not is_coded(packed.parts):
            why = "; ".join(filter(None, [why, STAYS_RAW.format(axis(packed.coding))]))
    else:
        weight = module.weight.detach()
        shape, dense = tuple(weight.shape), weight.nbytes
        kernel, backend, residency = "dense", "torch", "plain"
        if getattr(module, "op", None):
            kernel, backend = module.op, module.backend()
        density, ideal, stored = 1.0, float(dense), dense
        axes = ("–", "–", "–")
        done = record(module)
        if done is not None:
            axes = (axis(done.layout), axis(done.number), axis(done.coding))
            held = entries(module)
            density = sum(kept for _, kept, _ in held) / max(1, weight.numel())
            ideal = sum(kept * bits for _, kept, bits in held) / 8
            why = why or "compressed; convert() packs it"
            residency = "parametrized"
    if getattr(module, "winograd", None) is not None:
        kernel += f" F({module.winograd.tile}, {module.kernel_size[-1]})"
    if shared:
        dense, ideal, stored = 0, 0.0, 0
        why = "; ".join(filter(None, [why, "its weight is counted with the layer that shares it"]))
    return Layer(
        name or "(the model)",
        was or kind,
        kind,
        why,
        shape,
        density,
        *axes,
        dense,
        ideal,
        stored,
        memory,
        kernel,
        backend,
        residency,
    )


def _run_time(layers: tuple[Layer, ...]) -> str:
    """How many layers run what, and what that means for the time of a call."""
    if not layers:
        return "Run time: no layers with a weight."
    held = Counter(layer.residency for layer in layers)
    others = Counter((la.kernel, la.backend) for la in layers if la.kernel != "dense")
    text = f"Run time: {len(layers) - others.total()} of {len(layers)} layers run the dense kernel"
    if others.total() < len(layers) and not held.keys() & _EACH_CALL.keys():
        text += ": same speed as before"
    for (kernel, backend), count in others.items():
        text += f"; {count} run{'s' * (count == 1)} {kernel} ({backend})"
    text += "."
    for residency, what in _EACH_CALL.items():
        if held[residency]:
            text += f" {held[residency]} of {len(layers)} {what} on each call: slower than before."
    if all(backend in ("eager", "torch") and kernel != "low_rank" for kernel, backend in others):
        text += " No layer runs a faster kernel."
    return text


_EACH_CALL = {
    "packed": "decode the weight",
    "parametrized": "compute the weight from what was trained",
}


def _memory(totals: Totals, layers: tuple[Layer, ...]) -> list[str]:
    dense, memory = totals.dense + totals.other, totals.memory + totals.other
    if not dense:
        return []
    figures = f"{nbytes(memory)}, {nbytes(dense)} dense"
    if memory < dense:
        return [f"Memory: {figures}: {dense / memory:.2f}× smaller."]
    text = f"Memory: not smaller than before ({figures})."
    if any(layer.residency == "decoded" for layer in layers):
        text += (
            " Decoded residency keeps the packed parts beside the dense weights; "
            "residency='packed' keeps the parts alone, and is slower."
        )
    return [text]


def _weight_tensors(module: nn.Module) -> list[Tensor]:
    """The tensors that hold a layer's weight now, in whichever form."""
    winograd = getattr(module, "winograd", None)
    transformed = [] if winograd is None else winograd.kept()
    if isinstance(module, PackedModule):
        held = module.packed_weight
        packed = [*held.part_buffers(), *held.resident_buffers(), *held.buffers()]
        return [*packed, *transformed]
    if parametrize.is_parametrized(module, "weight"):
        chain = module.parametrizations.weight
        return [*chain.parameters(), *chain.buffers()]
    return [module.weight, *transformed]


_HEADERS = ("layer", "shape", "density", "ideal", "stored", "memory", "packed as", "runs as", "why")
_NUMERIC = ("density", "ideal", "stored", "memory")


def _cells(layer: Layer) -> list[str]:
    axes = (layer.layout, layer.number, layer.coding)
    runs = layer.kernel if layer.kernel == "dense" else f"{layer.kernel} ({layer.backend})"
    if layer.residency == "packed":
        runs += ", decoded on each call"
    return [
        layer.name,
        "×".join(map(str, layer.shape)),
        f"{100 * layer.density:.1f} %",
        nbytes(layer.ideal),
        nbytes(layer.stored),
        nbytes(layer.memory),
        " · ".join(a for a in axes if a not in ("Dense", "Raw", "–")) or "–",
        f"{layer.became}: {runs}",
        layer.why,
    ]


def layer_table(layers: tuple[Layer, ...]) -> str:
    """The layers as an HTML table."""
    numeric = [_HEADERS.index(header) for header in _NUMERIC]
    return page.table(
        _HEADERS, [_cells(layer) for layer in layers], numeric, muted=[len(_HEADERS) - 1]
    )


def size_bars(totals: Totals) -> list[page.Bar]:
    """Dense, ideal, stored, file and memory as bars."""

    def bar(label: str, size: float, style: str = "") -> page.Bar:
        ratio = f"  ({totals.dense / size:.1f}×)" if size and label != "dense" else ""
        return page.Bar(label, size, nbytes(size) + ratio, style)

    found = [bar("dense", totals.dense, "pale"), bar("ideal", totals.ideal, "pale")]
    found.append(bar("stored", totals.stored))
    if totals.file is not None:
        found.append(bar("file", totals.file))
    return [*found, bar("memory", totals.memory, "warm")]


def _totals_table(totals: Totals) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("bytes")
    columns = ("dense", "ideal", "stored", "file", "memory")
    for column in columns:
        table.add_column(column, justify="right")
    weights = (totals.dense, totals.ideal, totals.stored, None, totals.memory)
    table.add_row("weights", *map(_exact, weights))
    other = totals.other
    rest = (other, other, totals.other_stored, None, other)
    table.add_row("all else", *map(_exact, rest))
    whole = [None if w is None else w + r for w, r in zip(weights, rest, strict=True)]
    whole[3] = totals.file
    table.add_row("model", *map(_exact, whole))
    table.add_row("against dense", *(_ratio(whole[0], size) for size in whole))
    return table


def _exact(size: float | None) -> str:
    return "–" if size is None else f"{round(size):,}"


def _ratio(dense: float | None, size: float | None) -> str:
    return "–" if not dense or not size else f"{dense / size:.2f}×"
