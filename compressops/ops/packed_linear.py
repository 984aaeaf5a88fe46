"""What the linear ops on packed codes of 2 and 4 bits share: packing, checks, the reference.

Codes are unsigned, the value of a weight is ``(code − zero) · scale``, and activations are
quantized to int8 by rows, as `int8_linear` does (q = x and x_scale = 1 where they are not)::

    y[m, n] = x_scale[m] · Σ_groups scale[n, group] · Σ_k q[m, k] · (code[n, k] − zero[n, group])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .bsr import rows_of
from .checks import ACTIVATIONS, activate, bias_gradient, require
from .int8_linear import MAX_IN_FEATURES, quantize_rows
from .pack_panels import (
    PANEL,
    from_panels,
    joined,
    pack_panels,
    packed_out,
    padded_outputs,
    to_panels,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUP_MULTIPLE = 16  # inputs whose codes share a word of the CPU's packing of 2 bits
_DEPTH = 4
_TILE_K = 64  # inputs of a tile of a GPU's packing


@dataclass(frozen=True)
class Codes:
    """One op's: so many bits, and the code of 0.0 where there are no zero points."""

    op: str
    bits: int
    zero: int

    @property
    def inputs(self) -> int:
        """Inputs whose codes of one output share a word of 32 bits."""
        return 32 // self.bits

    def check_group_size(self, op: str, group_size: int | None) -> None:
        """Raise a ``ValueError`` unless the kernels have this group size."""
        fits = group_size is None or (group_size >= 16 and group_size % GROUP_MULTIPLE == 0)
        form = f"None or a positive multiple of {GROUP_MULTIPLE}"
        require(fits, op, "group_size", form, group_size)

    def groups(self, in_features: int, group_size: int | None) -> int:
        """Scale groups of a row; a row of no inputs has none."""
        return -(-in_features // (group_size or max(1, in_features)))

    def pack(self, codes: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """int8 codes ``[N, K]`` as the kernels of their device read them, without a sign, of
        `packed_shape`: into ``out``, or memory of their own. On a CPU as `pack_panels` writes them,
        flat, elsewhere by `pack_fragments`."""
        packed = packed_out(
            *(f"{self.op}_pack", self.packed_shape(*codes.shape, codes.device)),
            *(codes, torch.uint8, out),
        )
        if codes.device.type != "cpu":
            return packed.copy_(self.pack_fragments((codes + self.zero).view(torch.uint8)))
        pack_panels(packed, codes.contiguous().unsqueeze(2), self.bits, self.zero)
        return packed

    def pack_fragments(self, codes: torch.Tensor) -> torch.Tensor:
        """Unsigned codes as a GPU's kernels read them: ``[ceil(N / rows), ceil(K / 64), 512]``, N
        and K zero padded; rows is 16 of 4 bits, 32 of 2 bits.

        A tile of 512 bytes is what a warp reads at once, 16 bytes a lane. Lane 4g + t has, one
        after the other, the outputs g, 8 + g, … of the tile, and of each the inputs 4t + i, 16 +
        4t + i, 32 + 4t + i, 48 + 4t + i (i < 4) of the tile's 64: 8 bytes of 4 bits, 4 of 2 bits,
        in words as `pack_panels` has them (byte i: its i, the first input in the lowest bits).
        """
        outputs, words, per_byte = self._fragment_shape
        N, K = codes.shape
        padded = F.pad(codes, (0, -K % _TILE_K, 0, -N % (8 * outputs)))
        tiles = len(padded) // (8 * outputs)
        # [tile of N, output of a lane, g, tile of K, word, block of 16 in the word, t, i]
        view = padded.view(tiles, outputs, 8, -(-K // _TILE_K), words, per_byte, 4, _DEPTH)
        parts = view.permute(0, 3, 2, 6, 1, 4, 7, 5)
        return joined(parts, self.bits).flatten(2)

    @property
    def _fragment_shape(self) -> tuple[int, int, int]:
        """Outputs of a lane in a tile, their words each, and codes in a byte."""
        words = _TILE_K // 4 // self.inputs
        return 4 // words, words, 8 // self.bits

    def unpack(self, packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
        """The unsigned codes ``[N, K]`` of either form."""
        if packed.dim() == 3:
            outputs, words, _ = self._fragment_shape
            parts = packed.view(*packed.shape[:2], 8, 4, outputs, words, _DEPTH)
            view = _split(parts, self.bits).permute(0, 4, 2, 1, 5, 7, 3, 6)
            return view.flatten(3).flatten(0, 2)[:N, :K]
        blocks = -(-K // self.inputs)
        words = from_panels(packed, N, blocks, _DEPTH).view(N, blocks, _DEPTH)
        return _split(words, self.bits).transpose(2, 3).flatten(1)[:, :K]

    def unpack_rows(self, packed: torch.Tensor, rows: torch.Tensor, N: int, K: int) -> torch.Tensor:
        """The unsigned codes ``[..., K]`` of the outputs ``rows`` (int64 ``[...]``), and nothing
        else of either form is read."""
        if packed.dim() == 3:
            outputs, count, _ = self._fragment_shape
            parts = packed.view(*packed.shape[:2], 8, 4, outputs, count, _DEPTH)
            inside = rows % (8 * outputs)
            # [..., tile of K, t, word, i, block of 16 in the word]
            found = parts[rows // (8 * outputs), :, inside % 8, :, inside // 8]
            view = _split(found, self.bits).movedim((-3, -1), (-4, -3))
            return view.flatten(-5)[..., :K]
        words = _panel_rows(packed.view(torch.int32), rows, N, -(-K // self.inputs))
        parts = words.view(torch.uint8).unflatten(-1, (-1, _DEPTH))
        return _split(parts, self.bits).transpose(-1, -2).flatten(-3)[..., :K]

    def packed_shape(self, N: int, K: int, device: torch.device) -> tuple[int, ...]:
        """Of `pack`'s result."""
        if device.type != "cpu":
            return (-(-N // (8 * self._fragment_shape[0])), -(-K // _TILE_K), 512)
        return (padded_outputs(N) * -(-K // self.inputs) * 4,)


def _split(bytes_: torch.Tensor, bits: int) -> torch.Tensor:
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=bytes_.device)
    return (bytes_.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)


def _panel_rows(flat: torch.Tensor, rows: torch.Tensor, N: int, columns: int) -> torch.Tensor:
    """Of what `to_panels` made of ``[N, columns]`` the ``rows``: ``[..., columns]``."""
    panel = rows // PANEL
    width = torch.where(panel < padded_outputs(N) // PANEL, PANEL, 16)
    start = panel * (PANEL * columns) + rows % PANEL
    column = torch.arange(columns, device=flat.device)
    return flat[start[..., None] + column * width[..., None]]


def pack_group_values(values: torch.Tensor) -> torch.Tensor:
    """Scales or zero points ``[N, groups]`` as the kernels of their device read them: on a CPU in
    panels, beside the codes'; elsewhere ``[groups, N]``, so that a warp's outputs are side by
    side."""
    return to_panels(values) if values.device.type == "cpu" else values.t().contiguous()


def group_values(packed: torch.Tensor, N: int, groups: int) -> torch.Tensor:
    """``[N, groups]`` of either form."""
    return packed.t() if packed.dim() == 2 else from_panels(packed, N, groups)


def check_codes(op: str, name: str, codes: torch.Tensor, low: int, high: int) -> None:
    """Raise a ``ValueError`` unless ``codes`` is an int8 matrix of values from low to high."""
    fits = codes.dtype == torch.int8 and codes.dim() == 2
    require(fits, op, name, "an int8 tensor of two dimensions", codes)
    if codes.numel() and not codes.is_meta:
        least, most = (int(value) for value in torch.aminmax(codes))
        inside = low <= least and most <= high
        require(inside, op, name, f"from {low} to {high}", f"{least} to {most}")


def check(
    kind: Codes,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    out_features: int,
    group_size: int | None,
    bias: torch.Tensor | None,
    activation: str,
) -> None:
    """Raise a ``ValueError`` that names the argument unless all of them fit."""
    op = kind.op
    require(x.dim() >= 1 and x.dtype in DTYPES, op, "x", "float32, float16 or bfloat16 [..., K]", x)
    N, K = out_features, x.shape[-1]
    require(K <= MAX_IN_FEATURES, op, "x", f"at most {MAX_IN_FEATURES} wide (int32 sums)", x)
    require(N >= 0, op, "out_features", "0 or more", N)
    kind.check_group_size(op, group_size)
    groups = kind.groups(K, group_size)
    flat = x.device.type == "cpu"
    values = (padded_outputs(N) * groups,) if flat else (groups, N)
    forms = {
        "weight": (weight, torch.uint8, kind.packed_shape(N, K, x.device)),
        "scales": (scales, torch.float32, values),
        "zeros": (zeros, torch.uint8, values),
    }
    for name, (tensor, dtype, shape) in forms.items():
        if tensor is None:
            continue
        fits = tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.device == x.device
        form = f"{dtype} {list(shape)} on {x.device}, as {op}_pack makes it"
        require(fits, op, name, form, tensor)
    if bias is not None:
        fits = bias.dtype in DTYPES and tuple(bias.shape) == (N,) and bias.device == x.device
        require(fits, op, "bias", f"float [{N}] on {x.device} or None", bias)
    known = activation in ACTIVATIONS
    require(known, op, "activation", f"one of {ACTIVATIONS}", repr(activation))


def dequantize(
    kind: Codes,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    N: int,
    K: int,
    group_size: int | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight ``[N, K]`` of packed arguments."""
    # Groups longer than the row are the row.
    size, groups = min(group_size or K, max(1, K)) or 1, kind.groups(K, group_size)
    codes = kind.unpack(weight, N, K).to(dtype)
    zero = kind.zero
    if zeros is not None:
        spread = group_values(zeros, N, groups).to(dtype)
        zero = spread.repeat_interleave(size, 1)[:, :K]
    spread = group_values(scales, N, groups).to(dtype).repeat_interleave(size, 1)[:, :K]
    return (codes - zero) * spread


def dequantize_rows(
    kind: Codes,
    weight: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    N: int,
    K: int,
    group_size: int | None,
) -> torch.Tensor:
    """Rows ``[..., K]`` of a symmetric weight, float32, for row numbers ``[...]`` below N.

    Raises:
        IndexError: a row number is negative or not below N (on a GPU an assertion of the device).
    """
    # Panels are padded, so that a row too high would read something. This reads nothing of a table
    # that takes no memory, and checks as any index does.
    checked = torch.zeros(1, dtype=torch.int64, device=rows.device).expand(N)
    rows = rows.long()
    rows = rows + checked.index_select(0, rows.flatten()).view(rows.shape)
    size, groups = min(group_size or K, max(1, K)) or 1, kind.groups(K, group_size)
    codes = kind.unpack_rows(weight, rows, N, K).float() - kind.zero
    spread = scales.t()[rows] if scales.dim() == 2 else _panel_rows(scales, rows, N, groups)
    if groups == 1:
        return codes * spread
    return codes * spread.repeat_interleave(size, -1)[..., :K]


def eager(
    kind: Codes,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    out_features: int,
    group_size: int | None,
    bias: torch.Tensor | None,
    activation: str,
    quantize_x: bool = True,
) -> torch.Tensor:
    """The reference: activations (quantized or not) times the dequantized weight, in float64."""
    q, x_scales = quantize_rows(x) if quantize_x else (x, x.new_ones(()))
    args = (kind, weight, scales, zeros, out_features, x.shape[-1], group_size, torch.float64)
    y = (q.double() @ dequantize(*args).t()) * x_scales.double()
    if bias is not None:
        y = y + bias.double()
    return activate(y.float(), activation).to(x.dtype)


def backward(kind: Codes, ctx, grad: torch.Tensor, call):
    """Gradients of x and bias; the quantization of x counts as the identity."""
    weight, scales, zeros, bias, x, output = ctx.saved_tensors
    if ctx.activation == "relu":
        grad = torch.where(output > 0, grad, 0.0)
    elif ctx.activation == "gelu":
        grad = torch.ops.aten.gelu_backward(grad, call(x, weight, scales, zeros, bias))
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        N, K = grad.shape[-1], ctx.in_features
        dense = dequantize(kind, weight, scales, zeros, N, K, ctx.group_size, torch.float32)
        grad_x = grad @ dense.to(grad.dtype)
    if bias is not None and ctx.needs_bias_grad:
        grad_bias = bias_gradient(rows_of(grad), 0, bias)
    return grad_x, grad_bias


def save(ctx, x, weight, scales, zeros, group_size, bias, activation, output) -> None:
    """What `backward` needs."""
    ctx.activation, ctx.in_features, ctx.group_size = activation, x.shape[-1], group_size
    kept_x = x if activation == "gelu" else None
    ctx.save_for_backward(
        weight, scales, zeros, bias, kept_x, output if activation == "relu" else None
    )
