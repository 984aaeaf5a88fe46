"""How a convolution runs as Winograd's F(m, r), and what it keeps of its weight for that."""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressops import ops, schema
from compressops.ops.winograd_domain import memory_format, output_size

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
    ``load_state_dict``). It is neither saved nor copied. A write through ``weight.data`` leaves no
    trace that could be seen; call `clear` after one. Nothing is kept of a weight that was made in
    inference mode, which does not count writes: make the model outside of it.

    Args:
        tile: outputs a dimension, 2, 4 or 6, or ``"auto"``: `ops.choose_tile` for each input.
        aware: where the weight needs a gradient, run the composition of the transforms, through
            which it is differentiated (Winograd-aware training, Fernandez-Marques et al. 2020,
            arXiv 2002.10711), instead of the op, whose gradient is the direct convolution's.

    Raises:
        ValueError: an unknown tile.
    """

    def __init__(self, tile: int | str = "auto", aware: bool = False) -> None:
        if tile != "auto" and (type(tile) is not int or tile not in (2, 4, 6)):
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
        if not isinstance(config, dict) or not {"tile"} <= set(config) <= {"tile", "aware"}:
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

    def prepare(self, weight: Tensor, groups: int) -> None:
        """Transform a weight that stays now, not at the first call, if the tile is known."""
        if self.tile != "auto" and weight.dtype != torch.float64:
            weight = weight.unsqueeze(2) if weight.dim() == 3 else weight
            self._transformed(weight, weight.dtype, groups, self.tile)

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
        # A tracer's sizes may be symbols, which are not hashable.
        choose = _choose_tile.__wrapped__ if torch.compiler.is_compiling() else _choose_tile
        return choose(input.shape, weight.shape, padding, groups, input.dtype, input.is_cpu)

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


# The model behind it takes longer than a small convolution.
@functools.lru_cache(maxsize=4096)
def _choose_tile(
    x_shape: torch.Size,
    weight_shape: torch.Size,
    padding: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    is_cpu: bool,
) -> int:
    name = str(dtype).removeprefix("torch.")
    # On a CPU the Winograd domain is float32.
    return ops.choose_tile(
        x_shape, weight_shape, padding, groups, dtype=name, half_domain=not is_cpu
    )


_counter = itertools.count()
_live: weakref.WeakValueDictionary[str, Winograd] = weakref.WeakValueDictionary()


def _state(weight: Tensor, *how: Any) -> tuple[Any, ...] | None:
    """What changes when the weight does, or None where that cannot be told."""
    try:
        if weight.is_inference():  # these don't count what is written to them
            return None
        version, address = weight._version, weight.data_ptr()
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
    lambda x, weight, bias, padding, groups, key: _live[key].run(
        x, weight, bias, tuple(padding), groups
    ),
    "CompositeExplicitAutograd",
)


@torch.library.register_fake(f"{schema.PUBLIC}::winograd_layer")
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], groups: int, key: str
) -> Tensor:
    size = (x.shape[0], weight.shape[0], *output_size(x.shape, weight.shape, padding))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


_layer_op = torch.ops.compressops.winograd_layer.default
