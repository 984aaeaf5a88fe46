"""Convolutions that run as Winograd's F(m, r): how they do, and the float layers that do."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops import backends, ops, schema
from compressops.ops.winograd_domain import memory_format, output_size
from compressops.ops.winograd_transform import SUPPORTED

OP = "winograd_conv2d"


class _Kept(NamedTuple):
    """A transformed weight and the weight that it was computed from."""

    state: tuple[Any, ...]
    # An alias: while it holds the memory, no other weight can come to lie at this address.
    source: Tensor
    cast: Tensor
    transformed: Tensor


class Winograd:
    """How a layer runs its convolution as F(tile, r), with the transformed weight that it keeps.

    The transformed weight is computed when it is first needed, and again when the weight is
    another one: of other memory, dtype or device, or written to in place (by an optimizer, by
    ``load_state_dict``). It is neither saved nor copied. A write through ``weight.data`` leaves
    no trace that could be seen; call `clear` after one.

    Args:
        tile: outputs a dimension, 2, 4 or 6, or ``"auto"``: `ops.choose_tile` for each input.
        aware: where the weight needs a gradient, run the composition of the transforms, through
            which it is differentiated (Winograd-aware training, Fernandez-Marques et al. 2020,
            arXiv 2002.10711), instead of the op, whose gradient is the direct convolution's.

    Raises:
        ValueError: an unknown tile.
    """

    def __init__(self, tile: int | str = "auto", aware: bool = False) -> None:
        if tile != "auto" and (isinstance(tile, bool) or tile not in (2, 4, 6)):
            raise ValueError(f"tile must be 'auto', 2, 4 or 6, got {tile!r}")
        if not isinstance(aware, bool):
            raise ValueError(f"aware must be True or False, got {aware!r}")
        self.tile, self.aware = tile, aware
        self._kept: _Kept | None = None
        # The name of this object in compiled graphs.
        self._key = str(next(_counter))
        _live[self._key] = self

    @classmethod
    def from_config(cls, config: Any) -> Winograd:
        """The reverse of `get_config`.

        Raises:
            ValueError: ``config`` is nothing that `get_config` gives.
        """
        if not isinstance(config, dict) or not set(config) <= {"tile", "aware"}:
            raise ValueError(f"winograd must have a tile and maybe aware, got {config!r}")
        return cls(**config)

    def get_config(self) -> dict[str, Any]:
        """JSON values that `from_config` takes."""
        return {"tile": self.tile} | ({"aware": True} if self.aware else {})

    def copy(self) -> Winograd:
        """Another one for another layer."""
        return Winograd(self.tile, self.aware)

    def __getstate__(self) -> dict[str, Any]:
        return self.get_config()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def clear(self) -> None:
        """Forget the transformed weight; the next call computes it anew."""
        self._kept = None

    def kept(self) -> tuple[Tensor, ...]:
        """The tensors that are held beside the layer's own."""
        if self._kept is None:
            return ()
        _, source, cast, transformed = self._kept
        return (transformed,) if cast is source else (cast, transformed)

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: tuple[int, ...],
        groups: int,
        keep: bool = True,
    ) -> Tensor:
        """The convolution, of stride 1.

        Args:
            input: ``[N, C, H, W]`` or ``[N, C, L]``, or without N. Under autocast it is cast, as
                `F.conv2d` casts it. float64 runs `ops.winograd_conv2d_reference`.
            weight: ``[K, C / groups, r, r]``, ``[K, C / groups, 1, r]`` or ``[K, C / groups, r]``.
            bias: ``[K]`` or None.
            padding: zeros on each side, an integer a dimension.
            groups: divides C and K.
            keep: the weight is there to stay, and so is what is computed from it.
        """
        if input.dim() == weight.dim() - 1:
            return self(input.unsqueeze(0), weight, bias, padding, groups, keep).squeeze(0)
        if weight.dim() == 3:
            image, row = input.unsqueeze(2), weight.unsqueeze(2)
            return self(image, row, bias, (0, *padding), groups, keep).squeeze(2)
        kind = input.device.type
        if (
            kind != "meta"
            and torch.is_autocast_enabled(kind)
            and input.is_floating_point()
            and input.dtype != torch.float64
        ):
            input = input.to(torch.get_autocast_dtype(kind))
        trains = torch.is_grad_enabled() and weight.requires_grad
        differentiates = trains or (
            torch.is_grad_enabled()
            and (input.requires_grad or (bias is not None and bias.requires_grad))
        )
        if (trains and self.aware) or input.dtype == torch.float64:
            weight, tile = weight.to(input.dtype), self._tile(input, weight, padding, groups)
            return ops.winograd_conv2d_reference(input, weight, bias, padding, groups, "none", tile)
        if torch.compiler.is_compiling():
            if keep and not differentiates and not torch.compiler.is_exporting():
                return _layer_op(input, weight, bias, padding, groups, self._key)
            keep = False
        return self.run(input, weight, bias, padding, groups, keep, differentiates)

    def run(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: tuple[int, ...],
        groups: int,
        keep: bool = True,
        differentiates: bool = False,
    ) -> Tensor:
        """`ops.winograd_conv2d` on four-dimensional tensors, the input in its final dtype."""
        tile = self._tile(input, weight, padding, groups)
        if keep:
            _, _, cast, transformed = self._transformed(weight, input.dtype, groups, tile)
        else:
            cast, transformed = weight.to(input.dtype), None
        if differentiates:
            cast = weight.to(input.dtype)
        return ops.winograd_conv2d(
            input, cast, bias, padding, groups, "none", tile, transformed=transformed
        )

    def _tile(self, input: Tensor, weight: Tensor, padding: tuple[int, ...], groups: int) -> int:
        if self.tile != "auto":
            return self.tile
        return ops.choose_tile(
            input.shape,
            weight.shape,
            padding,
            groups,
            half=input.dtype in (torch.float16, torch.bfloat16),
            device_type=input.device.type,
        )

    def _transformed(self, weight: Tensor, dtype: torch.dtype, groups: int, tile: int) -> _Kept:
        state = _state(weight, dtype, groups, tile)
        # Read once: another thread may be replacing it.
        kept = self._kept
        if kept is not None and state is not None and kept.state == state:
            return kept
        source = weight.detach()
        cast = source if dtype == source.dtype else source.to(dtype)
        kept = _Kept(state or (), source, cast, ops.winograd_conv2d_pack(cast, groups, tile))
        self._kept = kept if state is not None else None
        return kept


_counter = itertools.count()
_live: weakref.WeakValueDictionary[str, Winograd] = weakref.WeakValueDictionary()


def _state(weight: Tensor, *how: Any) -> tuple[Any, ...] | None:
    """What changes when the weight does, or None where that cannot be told."""
    try:
        # Tensors of inference mode don't count what is written to them.
        version = 0 if weight.is_inference() else weight._version
        address = weight.data_ptr()
    except RuntimeError:  # tensors of transforms and tracers have no memory
        return None
    if not address:
        return None
    return (address, version, weight.shape, weight.stride(), weight.dtype, weight.device, *how)


# In a graph the transformed weight can be neither a constant (the weight may change) nor the result
# of an op (which a compiler may overwrite once it was used). So a graph that needs no gradient
# holds this op, which asks the layer's `Winograd` each time. It is no kernel, hence not among
# `schema.SCHEMAS`. Replayed as a CUDA graph it would not ask.
_library = schema.library(schema.PUBLIC)
_library.define(
    "winograd_layer(Tensor x, Tensor weight, Tensor? bias, int[] padding, int groups, str key)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)
_library.impl(
    "winograd_layer",
    lambda x, weight, bias, padding, groups, key: _live[key].run(x, weight, bias, padding, groups),
    "CompositeExplicitAutograd",
)


@torch.library.register_fake(f"{schema.PUBLIC}::winograd_layer")
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], groups: int, key: str
) -> Tensor:
    size = (x.shape[0], weight.shape[0], *output_size(x.shape, weight.shape, padding))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


_layer_op = torch.ops.compressops.winograd_layer.default


# Of layers, by the options that float and packed convolutions have alike.


def tiles_for(layer: nn.Module) -> tuple[int, ...]:
    """The tiles that the op has for a convolution; empty where it has none, see `why_not`."""
    return () if why_not(layer) else _tiles(layer.kernel_size)


def why_not(layer: nn.Module) -> str | None:
    """Why a convolution cannot run as Winograd's; ``None``: it can."""
    for option in ("stride", "dilation"):
        value = getattr(layer, option)
        if any(v != 1 for v in value):
            return f"Winograd needs {option} 1, got {option}={value}"
    size = tuple(layer.kernel_size)
    if not _tiles(size):
        return f"Winograd needs kernels of 3, 5 or 7 in each dimension (or 1×r), got {size}"
    return None


def _tiles(kernel_size: tuple[int, ...]) -> tuple[int, ...]:
    if len(kernel_size) == 2 and kernel_size[0] not in (1, kernel_size[1]):
        return ()
    return tuple(tile for tile, r in SUPPORTED if r == kernel_size[-1])


def checked(layer: nn.Module, winograd: Winograd) -> Winograd:
    """``winograd`` itself, if the layer can run so.

    Raises:
        ValueError: the layer's options, or its kernel size with this tile, are not among those
            of the op.
    """
    reason, tiles = why_not(layer), tiles_for(layer)
    if reason is not None:
        raise ValueError(f"{type(layer).__name__}: {reason}")
    if winograd.tile not in ("auto", *tiles):
        raise ValueError(
            f"{type(layer).__name__}: tile must be one of {tiles} for kernel_size="
            f"{tuple(layer.kernel_size)}, got {winograd.tile}"
        )
    return winograd


def padded(layer: nn.Module, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with what other than zeros goes around it, and the zeros still to be added."""
    if layer.padding_mode != "zeros":
        around = layer._reversed_padding_repeated_twice
        return F.pad(input, around, mode=layer.padding_mode), (0,) * len(layer.kernel_size)
    if layer.padding == "same":
        return input, tuple((size - 1) // 2 for size in layer.kernel_size)
    if layer.padding == "valid":
        return input, (0,) * len(layer.kernel_size)
    return input, tuple(layer.padding)


class WinogradConv(nn.Module):
    """What `WinogradConv1d` and `WinogradConv2d` add to the float layers."""

    op: ClassVar[str] = OP
    options: ClassVar[tuple[str, ...]] = (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding"),
        *("dilation", "groups", "padding_mode"),
    )
    source: ClassVar[type[nn.Module]]

    def __init__(
        self, *args: Any, tile: int | str = "auto", aware: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.winograd = checked(self, Winograd(tile, aware))

    @classmethod
    def from_float(
        cls, module: nn.Module, tile: int | str = "auto", aware: bool = False
    ) -> WinogradConv:
        """A layer with ``module``'s options that shares its weight and bias.

        Args:
            module: a float convolution of as many dimensions, of stride and dilation 1.
            tile, aware: see `Winograd`.

        Raises:
            TypeError: ``module`` is of another type.
            ValueError: the op does not have its options, or not with this tile.
        """
        if not isinstance(module, cls.source):
            raise TypeError(
                f"module: {cls.__name__} replaces a {cls.source.__name__}, got a "
                f"{type(module).__name__}"
            )
        options = {name: getattr(module, name) for name in cls.options}
        new = cls(**options, bias=module.bias is not None, device="meta", tile=tile, aware=aware)
        new.weight, new.bias = module.weight, module.bias
        return new.train(module.training)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = padded(self, input)
        return self.winograd(input, weight, bias, padding, self.groups)

    def train(self, mode: bool = True) -> WinogradConv:
        # Not needed where writes are counted; those through .data are seen here at the latest.
        if mode != self.training:
            self.winograd.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WinogradConv:
        # Frees the old device's memory now, not at the next call.
        self.winograd.clear()
        return super()._apply(fn, recurse)

    def get_config(self) -> dict[str, Any]:
        """The JSON values that a file keeps of this layer beside its state."""
        values = {name: getattr(self, name) for name in self.options}
        return {
            "type": type(self).__name__,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
            "bias": self.bias is not None,
            "winograd": self.winograd.get_config(),
        }

    def backend(self) -> str:
        """The backend that runs it."""
        return backends.name(OP, self.weight.device.type)

    def extra_repr(self) -> str:
        aware = ", aware=True" * self.winograd.aware
        return f"{super().extra_repr()}, tile={self.winograd.tile!r}{aware}"


class WinogradConv1d(WinogradConv, nn.Conv1d):
    """`torch.nn.Conv1d` of stride and dilation 1 that runs `ops.winograd_conv2d` on one row.

    As `WinogradConv2d`, for kernels of 3, 5 and 7.

    Shape: input ``[N, in_channels, L]`` or ``[in_channels, L]``.
    """

    source = nn.Conv1d


class WinogradConv2d(WinogradConv, nn.Conv2d):
    """`torch.nn.Conv2d` of stride and dilation 1 that runs `ops.winograd_conv2d`.

    A drop-in: it has the constructor, parameters, state dict and padding of `Conv2d`, for kernels
    of 3×3, 5×5, 7×7 and 1×3, 1×5, 1×7. The result differs by rounding, more so for larger tiles
    (``docs/WINOGRAD.md``). `Winograd` says what it keeps of the weight; in compiled graphs too,
    where no gradient is asked for.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as for `Conv2d`.
        tile, aware: see `Winograd`.

    Shape: input ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``.

    Raises:
        ValueError: a stride, dilation or kernel size that the op does not have, or not with this
            tile.
    """

    source = nn.Conv2d
