"""Convolution of stride 1 in the Winograd domain: ``Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A`` of each tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .. import backends
from ..backends import register
from . import winograd_domain as domain
from .checks import ACTIVATIONS, bias_gradient, require
from .winograd_conv2d_grad import winograd_conv2d_weight_grad
from .winograd_model import choose_tile
from .winograd_transform import SUPPORTED

OP = "winograd_conv2d"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_TILES_WORTH_A_TRANSFORM = 128


def winograd_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    activation: str = "none",
    tile: int | str = "auto",
    transformed: torch.Tensor | None = None,
) -> torch.Tensor:
    """``activation(conv2d(x, weight, bias, stride=1, padding, groups))`` by Winograd's algorithm.

    F(tile, r) takes alpha² multiplications, alpha = tile + r − 1, for tile² outputs and r² taps:
    2.25, 4 and 5.06 times fewer than the direct sum for r = 3 and tiles 2, 4 and 6. Products are
    summed in float32. Rounding errors grow with alpha (``docs/WINOGRAD.md`` has the figures).

    An Inf or NaN in ``x`` may make any output of the tiles that read it NaN or Inf, where direct
    convolution gives Inf or NaN in the r × r outputs around it.

    Differentiable with respect to ``x``, ``weight`` and ``bias``: ``transformed`` counts as a
    function of ``weight``, and the gradients are those of the convolution. To differentiate through
    the transforms, use :func:`winograd_conv2d_reference`.

    Args:
        x: ``[N, C, H, W]`` float32, float16 or bfloat16, any strides; float64 on the eager backend.
        weight: ``[K, C / groups, r, r]`` or ``[K, C / groups, 1, r]``, dtype of ``x``.
        bias: float ``[K]`` or None; float64 beside float64 alone.
        padding: zeros on each side, one number or ``(height, width)``.
        groups: divides C and K.
        activation: ``"none"``, ``"relu"`` or ``"gelu"`` (exact).
        tile: outputs a tile in each dimension, 2, 4 or 6 with tile + r − 1 of 4, 6 or 8, or
            ``"auto"``: what :func:`choose_tile` takes for the fastest that is exact enough.
        transformed: what :func:`winograd_conv2d_pack` made of ``weight`` for this ``tile``, so that
            it need not be made anew in each call; asks for a ``tile`` in figures.

    Returns:
        ``[N, K, H + 2·padding − r + 1, W + 2·padding − r + 1]`` in the dtype of ``x``; channels
        last where ``x`` is so and not contiguous too, else contiguous.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.

    Sources: Winograd 1980, "Arithmetic Complexity of Computations"; Lavin & Gray 2015,
    arXiv 1509.09308, equation 8.
    """
    padding = _pair(padding)
    if tile == "auto":
        require(transformed is None, OP, "tile", "2, 4 or 6 beside transformed", repr(tile))
        _check_kernel(weight, groups, OP)
        _check_input(x, weight, padding, groups)
        dtype = str(x.dtype).removeprefix("torch.")
        # On a CPU everything is float32 in the Winograd domain.
        tile = choose_tile(
            *(x.shape, weight.shape, padding, groups), dtype=dtype, half_domain=not x.is_cpu
        )
    if transformed is None:
        transformed = winograd_conv2d_pack(weight, groups, tile)
    # The fused gelu keeps no value that its gradient could be taken at.
    if activation == "gelu" and _needs_gradient(x, weight, bias):
        y = _call(x, weight, transformed, bias, padding, groups, "none", tile)
        return F.gelu(y)
    return _call(x, weight, transformed, bias, padding, groups, activation, tile)


def winograd_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    padding: int = 0,
    groups: int = 1,
    activation: str = "none",
    tile: int | str = "auto",
    transformed: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`winograd_conv2d` in one dimension, as an image of one row; no copy is made.

    Args:
        x: ``[N, C, L]``.
        weight: ``[K, C / groups, r]``.
        padding: zeros on each side.
        transformed: ``winograd_conv2d_pack(weight[:, :, None], groups, tile)`` or None.
        bias, groups, activation, tile: as in :func:`winograd_conv2d`.

    Returns:
        ``[N, K, L + 2·padding − r + 1]`` in the dtype of ``x``.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    require(x.dim() == 3, "winograd_conv1d", "x", "of three dimensions [N, C, L]", x)
    form = "of three dimensions [K, C / groups, r]"
    require(weight.dim() == 3, "winograd_conv1d", "weight", form, weight)
    single = isinstance(padding, int) and padding >= 0
    require(single, "winograd_conv1d", "padding", "an integer from 0 on", padding)
    y = winograd_conv2d(
        *(x.unsqueeze(2), weight.unsqueeze(2), bias, (0, padding), groups, activation, tile),
        transformed,
    )
    return y.squeeze(2)


@torch.no_grad()
def winograd_conv2d_pack(weight: torch.Tensor, groups: int = 1, tile: int = 4) -> torch.Tensor:
    """The weights in the Winograd domain, ``G g Gᵀ``, as :func:`winograd_conv2d` takes them.

    Computed in float64 and rounded once. With P = alpha² positions (alpha in one dimension) and
    C = weight.shape[1]:

    - on a CPU float32 ``[groups, ceil(K / groups / 16)·16, P, C]``, a buffer whose floats lie for
      each group in panels of 32 output channels (the last of 16 where that is enough), in a panel
      ``[P][C][32]``, zero padded; the shape says only how many there are.
    - elsewhere, and for float64, ``[P, K, C]`` in the dtype of the weight.

    Args:
        weight: float ``[K, C / groups, r, r]`` or ``[K, C / groups, 1, r]``.
        groups: divides K.
        tile: 2, 4 or 6 with tile + r − 1 of 4, 6 or 8.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    op = "winograd_conv2d_pack"
    _check_weight(weight, groups, tile, op)
    if weight.device.type == "cpu" and weight.dtype != torch.float64:
        return domain.transform_to_panels(weight, groups, tile)
    return domain.transform_weight(weight.double(), tile).to(weight.dtype)


def winograd_conv2d_unpack(transformed: torch.Tensor, out_channels: int) -> torch.Tensor:
    """``[P, out_channels, C]`` of either form that :func:`winograd_conv2d_pack` makes."""
    return transformed if transformed.dim() == 3 else domain.from_panels(transformed, out_channels)


def winograd_conv2d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    activation: str = "none",
    tile: int = 4,
) -> torch.Tensor:
    """:func:`winograd_conv2d` in plain PyTorch, differentiable through the transforms.

    For training that knows of Winograd's rounding (Fernandez-Marques et al. 2020, arXiv
    2002.10711), and in float64 the reference of all backends. Arguments, result and errors are
    those of :func:`winograd_conv2d`; half precision is computed in float32 and rounded once.
    """
    padding = _pair(padding)
    _check_input(x, weight, padding, groups)
    _check_weight(weight, groups, tile)
    _check_rest(x, weight, bias, activation)
    transformed = domain.transform_weight(weight.to(domain.accumulator(x.dtype)), tile)
    return domain.convolve(x, weight.shape, transformed, bias, padding, groups, activation, tile)


def _pair(padding: int | Sequence[int]) -> list[int]:
    if isinstance(padding, int):
        return [padding, padding]
    pair = isinstance(padding, list | tuple) and len(padding) == 2
    require(pair, OP, "padding", "one or two integers from 0 to 2^60", padding)
    return list(padding)


def _needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_kernel(weight: torch.Tensor, groups: int, op: str) -> list[int]:
    """The tiles for a weight, after checks of it and of groups."""
    fits = weight.dim() == 4 and weight.dtype in _DTYPES
    fits = fits and weight.shape[2] in (1, weight.shape[3])
    require(fits, op, "weight", "float [K, C / groups, r, r] or [K, C / groups, 1, r]", weight)
    divides = groups >= 1 and weight.shape[0] % groups == 0
    require(divides, op, "groups", f"a divisor of {weight.shape[0]} output channels", groups)
    tiles = [m for m, r in SUPPORTED if r == weight.shape[3]]
    require(bool(tiles), op, "weight", "3, 5 or 7 wide", weight)
    return tiles


def _check_weight(weight: torch.Tensor, groups: int, tile: int, op: str = OP) -> None:
    tiles = _check_kernel(weight, groups, op)
    known = f"one of {tiles} for a kernel {weight.shape[3]} wide"
    require(tile in tiles, op, "tile", known, repr(tile))


def _check_input(x: torch.Tensor, weight: torch.Tensor, padding, groups: int) -> None:
    fits = x.dim() == 4 and x.dtype in _DTYPES
    require(fits, OP, "x", "float32, float16, bfloat16 or (eager) float64 [N, C, H, W]", x)
    divides = groups >= 1 and x.shape[1] % groups == 0
    require(divides, OP, "groups", f"a divisor of {x.shape[1]} input channels", groups)
    channels = x.shape[1] // groups
    fits = weight.dim() == 4 and weight.dtype == x.dtype and weight.shape[1] == channels
    require(fits, OP, "weight", f"{x.dtype} [K, {channels}, r, r] or [.., 1, r]", weight)
    pair = len(padding) == 2 and all(
        isinstance(p, int | torch.SymInt) and 0 <= p <= domain.MAX_PADDING for p in padding
    )
    require(pair, OP, "padding", "one or two integers from 0 to 2^60", padding)
    height, width = domain.output_size(x.shape, weight.shape, padding)
    fits = height >= 1 and width >= 1
    taps = f"{weight.shape[2]} × {weight.shape[3]}"
    require(fits, OP, "x", f"at least {taps} large with padding {list(padding)}", x)


def _check_rest(x, weight, bias, activation) -> None:
    if bias is not None:
        fits = bias.dtype in _DTYPES and (bias.dtype != torch.float64 or x.dtype == torch.float64)
        fits = fits and tuple(bias.shape) == (weight.shape[0],)
        require(fits, OP, "bias", f"float [{weight.shape[0]}] or None", bias)
    known = f"one of {ACTIVATIONS}"
    require(activation in ACTIVATIONS, OP, "activation", known, repr(activation))
    for name, tensor in (("weight", weight), ("bias", bias)):
        here = tensor is None or tensor.device == x.device
        require(here, OP, name, f"on {x.device}, as x is", tensor)


def _check(
    x, weight, transformed, bias=None, padding=(0, 0), groups=1, activation="none", tile=4
) -> None:
    _check_input(x, weight, padding, groups)
    _check_weight(weight, groups, tile)
    _check_rest(x, weight, bias, activation)
    K, C = weight.shape[:2]
    down, across = domain.transforms(weight.shape, tile)
    P = down.alpha * across.alpha
    form, dtype = (P, K, C), x.dtype
    if x.device.type == "cpu" and x.dtype != torch.float64:
        form, dtype = (groups, domain.padded_channels(K // groups), P, C), torch.float32
    fits = transformed.dtype == dtype and tuple(transformed.shape) == form
    fits = fits and transformed.device == x.device
    packed = f"{dtype} {list(form)} on {x.device}, as winograd_conv2d_pack makes it"
    require(fits, OP, "transformed", packed, transformed)


def _eager(
    x, weight, transformed, bias=None, padding=(0, 0), groups=1, activation="none", tile=4
) -> torch.Tensor:
    canonical = winograd_conv2d_unpack(transformed, weight.shape[0])
    return domain.convolve(x, weight.shape, canonical, bias, padding, groups, activation, tile)


def _fake(
    x, weight, transformed, bias=None, padding=(0, 0), groups=1, activation="none", tile=4
) -> torch.Tensor:
    size = (x.shape[0], weight.shape[0], *domain.output_size(x.shape, weight.shape, padding))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=domain.memory_format(x))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, transformed, bias, ctx.padding, ctx.groups, ctx.activation, ctx.tile = inputs
    saved = output if ctx.activation == "relu" else None
    kept = transformed if ctx.activation == "gelu" else None
    ctx.save_for_backward(x, weight, bias, saved, kept)


def _backward(ctx, grad):
    x, weight, bias, output, transformed = ctx.saved_tensors
    needs_x, needs_weight, needs_transformed = ctx.needs_input_grad[:3]
    if needs_transformed:
        raise NotImplementedError(
            f"{OP}: argument 'transformed' has no gradient of its own, it counts as a function of "
            "weight; winograd_conv2d_reference is differentiable through the transforms"
        )
    if ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    elif ctx.activation == "gelu":
        before = _call(x, weight, transformed, bias, ctx.padding, ctx.groups, "none", ctx.tile)
        grad = torch.ops.aten.gelu_backward(grad, before)
    x_by_winograd = needs_x and _input_gradient_is_winograd(x, weight, ctx.padding, ctx.tile)
    # With create_graph the gradients are differentiated in turn: `winograd_conv2d_grad` is not.
    weight_by_winograd = (
        needs_weight and not torch.is_grad_enabled() and _weight_gradient_is_winograd(x)
    )
    direct = [needs_x and not x_by_winograd, needs_weight and not weight_by_winograd, False]
    grad_x = grad_weight = grad_bias = None
    if any(direct):
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            *(grad, x, weight, None, [1, 1], ctx.padding, [1, 1], False, [0, 0], ctx.groups),
            direct,
        )
    if x_by_winograd:
        grad_x = _input_gradient(grad, weight, ctx.padding, ctx.groups, ctx.tile)
    if weight_by_winograd:
        grad_weight = winograd_conv2d_weight_grad(
            x, grad, weight.shape[2:], ctx.padding, ctx.groups, ctx.tile
        )
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = bias_gradient(grad, (0, 2, 3), bias)
    return grad_x, grad_weight, None, grad_bias, None, None, None, None


def _input_gradient_is_winograd(x, weight, padding, tile: int) -> bool:
    """Whether the gradient of x, a convolution itself, goes through the Winograd domain too."""
    rh, r = weight.shape[2:]
    if padding[0] > rh - 1 or padding[1] > r - 1:
        return False  # its own padding would be negative
    # Scaled losses have gradients near the largest float16; Bᵀ d B of alpha = 8 may be 225 times d.
    if x.dtype in (torch.float16, torch.bfloat16) and tile + r - 1 == 8 and not x.is_cpu:
        return False
    # The turned filters are transformed anew each time, which takes as long as some 100 tiles save.
    tiles = x.shape[0] * -(-x.shape[2] // (tile if rh > 1 else 1)) * -(-x.shape[3] // tile)
    return tiles >= _TILES_WORTH_A_TRANSFORM


def _weight_gradient_is_winograd(x) -> bool:
    """Whether a kernel of `winograd_conv2d_grad` serves; its eager form is slower than direct."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return False
    try:
        return backends.name("winograd_conv2d_grad", "cpu") == "cpu"
    except backends.BackendError:  # one was asked for by name that has the forward pass alone
        return False


def _input_gradient(grad, weight, padding, groups: int, tile: int) -> torch.Tensor:
    """The convolution of ``grad`` with every filter turned by 180°, inputs and outputs swapped."""
    K, C, rh, r = weight.shape
    swapped = weight.view(groups, K // groups, C, rh, r).transpose(1, 2)
    swapped = swapped.reshape(groups * C, K // groups, rh, r).flip(2, 3)
    padding = [rh - 1 - padding[0], r - 1 - padding[1]]
    if grad.dtype == torch.float64:  # on whichever backend the forward pass was
        return winograd_conv2d_reference(grad, swapped, None, padding, groups, tile=tile)
    return winograd_conv2d(grad, swapped, None, padding, groups, tile=tile)


_call = register(
    OP,
    eager=_eager,
    fake=_fake,
    check=_check,
    setup_context=_setup_context,
    backward=_backward,
)
