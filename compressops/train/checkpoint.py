"""Checkpoints that a kill at any moment leaves whole: the old one or the new one."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from compressops.formats.container import write_atomically

FORMAT = 2
# The file is this line, the SHA-256 of the rest in hex, a line break, and what torch.save writes.
# The zip archive's own CRC-32 is checked by no reader of torch.
_MAGIC = b"compressops checkpoint\n"
_DIGEST = 64


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` in one step: beside it, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    payload = buffer.getbuffer()
    digest = hashlib.sha256(payload).hexdigest().encode()
    write_atomically(path, [_MAGIC, digest, b"\n", payload])


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU. No code in the file is run.

    Raises:
        ValueError: the file is damaged, or of another format.
    """
    try:
        state = torch.load(io.BytesIO(_payload(path)), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"checkpoint {path} cannot be read ({type(error).__name__}: {error}); "
            "remove it to start its stage anew"
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(f"checkpoint {path} has format {found!r}, this version reads {FORMAT}")
    return state


def _payload(path: Path) -> bytes:
    content = path.read_bytes()
    start = len(_MAGIC) + _DIGEST + 1
    if not content.startswith(_MAGIC) or content[start - 1 : start] != b"\n":
        raise ValueError("it does not begin as a checkpoint of this version")
    digest = hashlib.sha256(payload := memoryview(content)[start:]).hexdigest().encode()
    stored = content[len(_MAGIC) : start - 1]
    if digest != stored:
        raise ValueError(
            f"its SHA-256 is {digest.decode()}, expected {stored.decode(errors='replace')}"
        )
    return payload.tobytes()


def remove_stale(path: Path) -> None:
    """Remove what killed runs left half written beside ``path``. Only for the one process that
    writes it."""
    if not path.parent.is_dir():
        return
    for found in path.parent.iterdir():
        # What `write_atomically` makes up; the random part has no point in it.
        beside = found.name.startswith(f".{path.name}.") and found.suffix == ".tmp"
        if beside and found.name.count(".") == path.name.count(".") + 3:
            found.unlink(missing_ok=True)
