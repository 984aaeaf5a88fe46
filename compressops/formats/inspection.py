"""What a file holds and where its bytes go, without decoding anything."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from compressops.formats.coding import is_coded
from compressops.formats.container import read_header
from compressops.formats.manifest import naming, opened, read_manifest
from compressops.formats.packed import PackedTensor


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. ``layout``, ``number`` and ``coding`` are None where it is stored as
    it is, and ``coded`` says whether the coding gained enough to be used for any part of it;
    ``ideal_nbytes`` is the accounting of papers, ``stored_nbytes`` what the file spends.
    ``pooled`` are the shapes of the tensors of the model that a pool holds, by name; else empty."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str | None
    number: str | None
    coding: str | None
    density: float
    ideal_nbytes: float
    stored_nbytes: int
    pooled: dict[str, tuple[int, ...]]
    coded: bool


@dataclass(frozen=True)
class FileInfo:
    """``header_bytes``, of the header and the manifest, and the tensors' ``stored_nbytes`` add up
    to ``file_bytes``."""

    path: str
    format_version: int
    min_reader: int
    tensors: tuple[TensorInfo, ...]
    aliases: dict[str, str]
    modules: dict[str, dict[str, Any]]
    header_bytes: int
    file_bytes: int

    def __str__(self) -> str:
        rows = [("tensor", "shape", "dtype", "as", "density", "ideal", "stored")]
        for t in self.tensors:
            coding = t.coding if t.coded or t.coding == "Raw" else f"{t.coding} (raw)"
            how = " × ".join((t.layout, t.number, coding)) if t.layout else "plain"
            dtype = str(t.dtype).removeprefix("torch.")
            # A large tensor that is coded is a pool of its own, under its name.
            alone = t.pooled.get(t.name)
            together = {} if alone else t.pooled
            name = f"{len(together)} small tensors" if together else t.name
            ideal, stored = f"{t.ideal_nbytes:,.0f}", f"{t.stored_nbytes:,}"
            shape = _shape(alone or t.shape)
            rows.append((name, shape, dtype, how, f"{t.density:.4f}", ideal, stored))
            rows += [(f"  {n}", _shape(s), "", "", "", "", "") for n, s in together.items()]
        ideal = sum(t.ideal_nbytes for t in self.tensors)
        rows.append(("header and manifest", "", "", "", "", "", f"{self.header_bytes:,}"))
        rows.append(("file", "", "", "", "", f"{ideal:,.0f}", f"{self.file_bytes:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(
                cell.rjust(width) if i > 3 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )
        return "\n".join(lines)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def inspect(path: str | os.PathLike[str]) -> FileInfo:
    """What a file holds and where its bytes go, from header and manifest alone.

    Raises:
        CorruptFileError: truncated, or a header or manifest that is not what was saved.
        UnsupportedFormatError: of a newer format, or of another program.
    """
    with opened(path) as (file, size):
        header = read_header(file, size)
        manifest = read_manifest(file, header)
        infos = []
        for entry in manifest.entries:
            nbytes = entry.end - entry.begin
            pooled = {n: tuple(s) for n, s in manifest.pools.get(entry.name, {}).items()}
            shape, dtype, axes, density, ideal = entry.shape, entry.dtype, (None,) * 3, 1.0, nbytes
            coded = False
            if (spec := manifest.packed.get(entry.name)) is not None:
                with naming(entry.name):
                    packed = PackedTensor.describe(spec)
                shape, dtype = packed.shape, packed.dtype
                axes = tuple(map(str, (packed.layout, packed.number, packed.coding)))
                density, ideal = packed.density, packed.ideal_nbytes
                coded = is_coded(spec["parts"])
            infos.append(
                TensorInfo(entry.name, shape, dtype, *axes, density, ideal, nbytes, pooled, coded)
            )
    return FileInfo(
        os.fspath(path),
        manifest.format_version,
        manifest.min_reader,
        tuple(infos),
        manifest.aliases,
        manifest.modules,
        header.size + manifest.nbytes,
        size,
    )
