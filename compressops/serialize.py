"""One safetensors file for a packed model: save, load, verify, inspect (``docs/FORMAT.md``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressops import ops
from compressops.formats import pools
from compressops.formats.coding import Coding, Raw
from compressops.formats.container import (
    DTYPE_NAMES,
    MANIFEST,
    CorruptFileError,
    UnsupportedFormatError,
    build_header,
    digest,
    write_atomically,
)
from compressops.formats.inspection import FileInfo, TensorInfo, inspect
from compressops.formats.manifest import build
from compressops.formats.packed import PackedTensor
from compressops.measure import normal_tensors
from compressops.model_state import (
    check_all_packed,
    check_fit,
    configured_modules,
    join,
    load_plain_state,
    packed_modules,
    plain_state,
    weights_of,
)
from compressops.reading import Contents, Path, VerifyReport, bytes_of, read, verify

__all__ = [
    "Contents",
    "CorruptFileError",
    "FileInfo",
    "TensorInfo",
    "UnsupportedFormatError",
    "VerifyReport",
    "inspect",
    "load",
    "read",
    "save",
    "verify",
    "write",
]


def write(
    path: Path,
    tensors: Mapping[str, Tensor | PackedTensor],
    modules: Mapping[str, Mapping[str, Any]] | None = None,
    coding: Coding | None = None,
) -> int:
    """Write tensors to a file, atomically: an error leaves an existing file as it was.

    Args:
        path: of the file; its folder exists.
        tensors: by name, plain or packed. A tensor that is there under two names is stored once.
        modules: configs to keep beside them, by module name: JSON objects with a ``type``.
        coding: of plain tensors of floats, small ones together, where it saves 5 %. ``None`` is
            ``Raw()``.

    Returns:
        the file's bytes.

    Raises:
        ValueError: a name or dtype that safetensors does not know, modules that are no JSON or
            have no type, a packed tensor that is corrupt.
    """
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    plain: dict[str, Tensor] = {}
    packed: dict[str, PackedTensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name in _RESERVED:
            raise ValueError(f"a tensor cannot be called {name!r}")
        if not isinstance(tensor, PackedTensor) and (
            tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta
        ):
            raise ValueError(
                f"tensor {name!r} cannot be stored: {tensor.dtype}, {tensor.layout}, "
                f"on {tensor.device}"
            )
        key = _identity(tensor)
        if key is not None and first.setdefault(key, name) != name:
            aliases[name] = first[key]
        elif isinstance(tensor, PackedTensor):
            packed[name] = tensor
        else:
            plain[name] = tensor
    members: dict[str, dict[str, list[int]]] = {}
    for pool, (built, names) in pools.build(plain, coding or Raw()).items():
        members[pool] = {name: list(plain.pop(name).shape) for name in names}
        (packed if isinstance(built, PackedTensor) else plain)[pool] = built
    return _write(path, plain, packed, members, aliases, modules or {})


_RESERVED = {"", "__metadata__", MANIFEST, *pools.RESERVED}


def _write(
    path: Path,
    plain: dict[str, Tensor],
    packed: dict[str, PackedTensor],
    members: dict[str, dict[str, list[int]]],
    aliases: dict[str, str],
    modules: Mapping[str, Mapping[str, Any]],
) -> int:
    """Write what goes into the file as tensors of its own; ``members`` are those of the pools."""
    specs = {name: tensor.to_spec() for name, tensor in packed.items()}
    decoded = {name: _decoded_hash(name, tensor) for name, tensor in packed.items()}
    blobs = {name: tensor.to_blob() for name, tensor in packed.items()}
    stored = plain | blobs
    # Widest first, as the safetensors library does it, so that each tensor is aligned.
    names = sorted(stored, key=lambda name: (-stored[name].dtype.itemsize, name in blobs, name))
    modules = {name: dict(config) for name, config in modules.items()}
    for name, config in modules.items():
        if not isinstance(config.get("type"), str):
            raise ValueError(f"module {name!r} has no type: {config}")
    layout = [(name, stored[name].dtype, tuple(stored[name].shape)) for name in names]
    hashes = {name: digest(bytes_of(stored[name])) for name in names}
    data = sum(tensor.nbytes for tensor in stored.values())
    try:
        manifest, metadata = build(
            {name: specs[name] for name in names if name in blobs},
            hashes,
            decoded,
            [hashes[name] for name in names if name in plain],
            members,
            aliases,
            modules,
            data,
        )
    except TypeError as error:
        raise ValueError(f"modules must be JSON values: {error}") from None
    header = build_header([*layout, (MANIFEST, torch.uint8, (len(manifest),))], metadata)
    write_atomically(path, [header, *(bytes_of(stored[name]) for name in names), manifest])
    return len(header) + data + len(manifest)


def _decoded_hash(name: str, packed: PackedTensor) -> str:
    try:
        return digest(bytes_of(packed.unpack(ops.DECODER)))
    except ValueError as error:
        raise ValueError(f"packed tensor {name!r} is corrupt: {error}") from error


def save(model: nn.Module, path: Path) -> int:
    """Save a model, atomically: packed modules packed, everything else of its state bit for bit.

    Small tensors of that (biases, batch norms) stand together in the file. Where a packed weight is
    Huffman-coded, so are floats of everything else, if it saves 5 %.

    Args:
        model: its packed modules have ``packed_tensors()`` and ``get_config()``, as those of
            ``compressops.nn`` do; a `WinogradConv1d` or `WinogradConv2d` is loaded as such.
        path: of the file; its folder exists.

    Returns:
        the file's bytes.

    Raises:
        ValueError: a compressed layer that is not packed, which names it and the reason; a state
            that is no tensor, or that safetensors cannot store. Nothing was written then.
    """
    check_all_packed(model)
    tensors: dict[str, Tensor | PackedTensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    for name, module in configured_modules(model):
        modules[name] = module.get_config()
    for name, module in packed_modules(model):
        for param, packed in module.packed_tensors().items():
            tensors[join(name, param)] = packed
    for name, value in plain_state(model).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"state {name!r} is no tensor: {type(value).__name__}")
        tensors[name] = value.detach()
    coding = pools.common_coding(t.coding for t in tensors.values() if isinstance(t, PackedTensor))
    return write(path, tensors, modules, coding)


@normal_tensors()
def load(
    path: Path,
    model: nn.Module | Callable[[], nn.Module],
    residency: str = "decoded",
    *,
    inplace: bool = False,
    mmap: bool = False,
) -> nn.Module:
    """Load a saved model: ``model``'s architecture with the packed modules and state of the file.

    Args:
        path: of the file.
        model: the float model that the saved one was made of, which stays as it is, or a
            function that makes it. Its weights don't matter, and may be on the meta device;
            buffers that no file holds have to be there.
        residency: of packed weights: ``"decoded"`` decodes them once, ``"packed"`` on each use. Of
            those that are not decoded to floats while loading, because of ``"packed"`` or because
            their module computes with the codes, every stored byte is checked; what the file says
            of their values is left to `verify`.
        inplace: change ``model`` itself.
        mmap: leave in the file what the modules keep of it, mapped, as the safetensors library and
            ``torch.load(mmap=True)`` do: what is not used takes no memory. The file must stay as it
            is for as long as the model lives (`save` and a removal do not touch it; a process that
            shortens it in place would end this one).

    Raises:
        CorruptFileError: the file is not what was saved; lists every tensor that is wrong.
        UnsupportedFormatError: of a newer format, or of another program.
        ValueError: the file does not fit the model; names what is missing, unknown, or of another
            shape or dtype.
    """
    # Only convert knows modules and formats both; it imports most of the package.
    from compressops import kernels
    from compressops.convert import from_packed

    float_model = model if isinstance(model, nn.Module) else model()
    weights = weights_of(float_model)
    limits = {name: weight.numel() for name, weight in weights.items()}
    contents = read(path, limits, decode=residency != "packed" and _needs_floats, mmap=mmap)
    packed = contents.packed | {
        alias: contents.packed[name]
        for alias, name in contents.aliases.items()
        if name in contents.packed
    }
    modules = {name: {"config": c, "packed": {}} for name, c in contents.modules.items()}
    for name, tensor in packed.items():
        owner, _, param = name.rpartition(".")
        if owner not in modules:
            raise ValueError(f"{os.fspath(path)}: packed tensor {name!r} belongs to no module")
        modules[owner]["packed"][param] = tensor
    try:
        for name, tensor in packed.items():
            if name in weights:
                check_fit(name, tensor, weights[name])
        each = contents.release
        loaded = from_packed(float_model, modules, residency, inplace=inplace, after_each=each)
        plain = contents.tensors | {
            alias: contents.tensors[name]
            for alias, name in contents.aliases.items()
            if name in contents.tensors
        }
        load_plain_state(loaded, plain)
        contents.settle()
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} does not fit the model: {error}") from error
    kernels.prepare(loaded)
    return loaded


def _needs_floats(config: dict[str, Any]) -> bool:
    """Whether a module of this config keeps its weight as floats, and not as codes."""
    # The modules of all formats take most of the package along.
    from compressops.registry import targets

    kind = getattr(targets().get(config["type"]), "weight_type", None)
    return kind is None or kind.keeps_floats


def _identity(tensor: Tensor | PackedTensor) -> Any:
    """Equal for two names of one tensor; None for what has no memory to be told by."""
    if isinstance(tensor, PackedTensor):
        parts = tuple(_identity(part) for part in tensor.parts.values())
        return None if all(p is None for p in parts) else (repr(tensor.to_spec()), parts)
    if not tensor.numel():
        return None
    # A conjugate or negative view is at the address of its base, with other values.
    lazy = tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), lazy
