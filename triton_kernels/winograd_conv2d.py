"""winograd_conv2d in Triton: V = Bᵀ d B, the products of all positions, and y = Aᵀ M A.

Semantics and argument forms: :func:`compressops.ops.winograd_conv2d`. V and M go through memory, in
chunks of tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .checks import require
from .rounding import cast
from .tiles import ACTIVATIONS, activate
from .winograd_transforms import input_transform, output_transform

OP = "winograd_conv2d"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SUPPORTED = ((2, 3), (4, 3), (6, 3), (2, 5), (4, 5), (2, 7))
MAX_PADDING = 1 << 60  # so that no size overflows before it is asked for as memory
# V and M of a chunk take about as much as the L2 cache of a large GPU.
CHUNK_BYTES = 2**26


@triton.jit
def tile_origin(tile, tile_rows, tile_columns, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Image, row and column at which tiles of all images begin in y."""
    line = tile // tile_columns
    image = line // tile_rows
    return image, (line - image * tile_rows) * TILE_H, (tile - line * tile_columns) * TILE_W


@triton.jit
def transform_block(tiles, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Tiles and channels of a program of the transforms, a column and a row.

    The grid has one dimension: the others of CUDA's end at 65535.
    """
    down = tl.cdiv(tiles, BLOCK_T)
    t = (tl.program_id(0) % down).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    c = (tl.program_id(0) // down).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return t, c


@triton.jit
def winograd_input_kernel(
    x,
    v,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    H,
    W,
    padding_h,
    padding_w,
    tile_rows,
    tile_columns,
    first_tile,
    tiles,
    C,
    ALPHA_H: tl.constexpr,
    ALPHA_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x [N, C, H, W] -> v [P, tiles, C] for the tiles from ``first_tile`` on; C of all groups."""
    t, c = transform_block(tiles, BLOCK_T, BLOCK_C)
    image, row, column = tile_origin(first_tile + t, tile_rows, tile_columns, TILE_H, TILE_W)
    row, column = row - padding_h, column - padding_w
    valid = (t < tiles) & (c < C)
    channel = x + image * stride_n + c * stride_c
    columns = ()
    for j in tl.static_range(ALPHA_W):
        d = ()
        in_width = valid & (column + j >= 0) & (column + j < W)
        for i in tl.static_range(ALPHA_H):
            inside = in_width & (row + i >= 0) & (row + i < H)
            # Rows and columns have 64 bits. A stride of 32, times i alone, might overflow.
            at = channel + ((row + i) * stride_h + (column + j) * stride_w)
            pixel = tl.load(at, mask=inside, other=0.0)
            d += (pixel.to(tl.float32),)
        columns += (input_transform(d, ALPHA_H),)
    for i in tl.static_range(ALPHA_H):
        d = ()
        for j in tl.static_range(ALPHA_W):
            d += (columns[j][i],)
        transformed = input_transform(d, ALPHA_W)
        for j in tl.static_range(ALPHA_W):
            value = cast(transformed[j], v.dtype.element_ty)
            tl.store(v + ((i * ALPHA_W + j) * tiles + t) * C + c, value, mask=valid)


@triton.jit
def winograd_multiply_kernel(
    v,
    u,
    m,
    tiles,
    C,
    K,
    groups,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """m [P, tiles, groups · K] = v [P, tiles, groups · C] @ u [P, groups · K, C] of each group."""
    blocks_n = tl.cdiv(K, BLOCK_N)
    blocks = tl.cdiv(tiles, BLOCK_M) * blocks_n
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    first_t = (block // blocks_n).to(tl.int64) * BLOCK_M
    first_k = (block % blocks_n).to(tl.int64) * BLOCK_N
    position, group = matrix // groups, matrix % groups
    # 64 bits for where a block begins, 32 in it: half the registers.
    t, k, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    in_t, in_k = first_t + t < tiles, first_k + k < K
    left = v + (position * tiles + first_t) * (groups * C) + group * C
    right = u + ((position * groups + group) * K + first_k) * C
    a_rows, b_rows = t[:, None] * (groups * C), k[None, :] * C
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    folded = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + depth
        a = tl.load(left + (a_rows + c[None, :]), mask=in_t[:, None] & (c[None, :] < C), other=0.0)
        b = tl.load(right + (b_rows + c[:, None]), mask=in_k[None, :] & (c[:, None] < C), other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        if SUM_BLOCK > 0:  # noqa: SIM102 - decided as it compiles
            if start % SUM_BLOCK == SUM_BLOCK - BLOCK_K:
                folded += sums
                sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if SUM_BLOCK > 0:
        sums += folded
    out = m + (position * tiles + first_t) * (groups * K) + group * K + first_k
    tl.store(
        out + (t[:, None] * (groups * K) + k[None, :]), sums, mask=in_t[:, None] & in_k[None, :]
    )


@triton.jit
def winograd_output_kernel(
    m,
    bias,
    y,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    OH,
    OW,
    tile_rows,
    tile_columns,
    first_tile,
    tiles,
    K,
    ALPHA_H: tl.constexpr,
    ALPHA_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """m [P, tiles, K] -> y [N, K, OH, OW] for the tiles from ``first_tile`` on; K of all groups."""
    t, k = transform_block(tiles, BLOCK_T, BLOCK_K)
    image, row, column = tile_origin(first_tile + t, tile_rows, tile_columns, TILE_H, TILE_W)
    valid = (t < tiles) & (k < K)
    columns = ()
    for j in tl.static_range(ALPHA_W):
        products = ()
        for i in tl.static_range(ALPHA_H):
            at = m + ((i * ALPHA_W + j) * tiles + t) * K + k
            products += (tl.load(at, mask=valid, other=0.0),)
        columns += (output_transform(products, ALPHA_H, TILE_H),)
    channel = y + image * stride_n + k * stride_c
    if HAS_BIAS:
        added = tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
    for i in tl.static_range(TILE_H):
        products = ()
        for j in tl.static_range(ALPHA_W):
            products += (columns[j][i],)
        outputs = output_transform(products, ALPHA_W, TILE_W)
        for j in tl.static_range(TILE_W):
            value = outputs[j]
            if HAS_BIAS:
                value = value + added
            inside = valid & (row + i < OH) & (column + j < OW)
            at = channel + ((row + i) * stride_h + (column + j) * stride_w)
            tl.store(at, cast(activate(value, ACTIVATION), y.dtype.element_ty), mask=inside)


def block_sizes(tiles: int, K: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile and launch parameters of the products: ``tl.dot`` wants at least 16 rows.

    Sums of SUM_BLOCK channels are added up apart in float32, for a third of the roundings' error
    at 512 channels. In 16 bits, the roundings of V and U count for more.
    """
    if dtype == torch.float32:  # FFMA: larger tiles would not fit the registers
        sizes = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}
    elif tiles * K < 512 * 512:
        sizes = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    else:
        sizes = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    for name, size in (("BLOCK_M", tiles), ("BLOCK_N", K)):
        sizes[name] = min(sizes[name], max(16, triton.next_power_of_2(size)))
    sizes["SUM_BLOCK"] = 64 if dtype == torch.float32 else 0
    return sizes


def transform_blocks(positions: int, channels: int) -> tuple[int, int]:
    """Tiles and channels of a program of the transforms, of 128 threads: what a thread holds, all
    positions of some tiles and channels, must fit its registers."""
    wide = min(64, triton.next_power_of_2(max(channels, 1)))
    return 128 * max(1, min(8, 64 // positions)) // wide, wide


def canonical(transformed: torch.Tensor, K: int) -> torch.Tensor:
    """``[P, K, C]`` of either form that ``winograd_conv2d_pack`` makes.

    The other is the CPU's, ``[groups, columns, P, C]``: for each group panels ``[P][C][32]``, and
    one ``[P][C][16]`` where that is left.
    """
    if transformed.dim() == 3:
        return transformed
    groups, columns, P, C = transformed.shape
    if C == 0:
        return transformed.new_empty((P, K, C))
    full = columns // 32 * 32
    flat = transformed.reshape(groups, columns * P * C)
    parts = [
        part.reshape(groups, count, P, C, width).permute(2, 0, 1, 4, 3)
        for part, count, width in (
            (flat[:, : full * P * C], full // 32, 32),
            (flat[:, full * P * C :], (columns - full) // 16, 16),
        )
    ]
    rows = torch.cat([part.reshape(P, groups, -1, C) for part in parts if part.numel()], 2)
    return rows[:, :, : K // groups].reshape(P, K, C)


def winograd_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    transformed: torch.Tensor,
    bias: torch.Tensor | None = None,
    padding: Sequence[int] = (0, 0),
    groups: int = 1,
    activation: str = "none",
    tile: int = 4,
) -> torch.Tensor:
    """``activation(conv2d(x, weight, bias, padding, groups))`` with stride 1.

    Args:
        x: ``[N, C, H, W]`` float32, float16 or bfloat16, any strides.
        weight: ``[K, C / groups, r, r]`` or ``[K, C / groups, 1, r]``; its shape alone counts.
        transformed: what :func:`compressops.ops.winograd_conv2d_pack` made of it.
        bias: float ``[K]`` or None.
        padding: zeros above and below, left and right.
        groups: divides C and K.
        activation: ``"none"``, ``"relu"`` or ``"gelu"``.
        tile: outputs a tile in each dimension.

    Returns:
        ``[N, K, OH, OW]`` in the dtype of ``x``; channels last where ``x`` is so and not contiguous
        too, else contiguous.

    Raises:
        ValueError: an argument is not of that form; the message names it and its value.
    """
    floats = "float32, float16 or bfloat16 [N, C, H, W]"
    require(x.dim() == 4 and x.dtype in DTYPES, OP, "x", floats, x)
    N, all_channels, H, W = x.shape
    divides = groups >= 1 and all_channels % groups == 0
    require(divides, OP, "groups", f"a divisor of {all_channels} channels", groups)
    C = all_channels // groups
    fits = weight.dim() == 4 and weight.dtype == x.dtype and weight.shape[1] == C
    fits = fits and weight.shape[0] % groups == 0 and weight.shape[2] in (1, weight.shape[3])
    require(fits, OP, "weight", f"{x.dtype} [K, {C}, r, r] or [K, {C}, 1, r]", weight)
    # Offsets in a block of 128 rows have 32 bits.
    require(all_channels < 2**24, OP, "x", "of fewer than 2^24 channels", x)
    require(weight.shape[0] < 2**24, OP, "weight", "of fewer than 2^24 output channels", weight)
    K, _, rh, r = weight.shape
    listed = ", ".join(f"F({m}, {taps})" for m, taps in SUPPORTED)
    require((tile, r) in SUPPORTED, OP, "tile", f"one of {listed}", f"F({tile}, {r})")
    pair = len(padding) == 2 and all(0 <= p <= MAX_PADDING for p in padding)
    require(pair, OP, "padding", "two integers from 0 to 2^60", padding)
    known = activation in ACTIVATIONS
    require(known, OP, "activation", f"one of {tuple(ACTIVATIONS)}", repr(activation))
    OH, OW = H + 2 * padding[0] - rh + 1, W + 2 * padding[1] - r + 1
    require(OH >= 1 and OW >= 1, OP, "x", f"at least {rh} × {r} large, padding included", x)
    tile_h, alpha_w = (1 if rh == 1 else tile), tile + r - 1
    alpha_h = 1 if rh == 1 else alpha_w
    P = alpha_h * alpha_w
    form, dtype = (P, K, C), x.dtype
    if transformed.dim() == 4 and not x.is_cuda:
        form, dtype = (groups, -(-(K // groups) // 16) * 16, P, C), torch.float32
    fits = tuple(transformed.shape) == form and transformed.dtype == dtype
    require(fits, OP, "transformed", f"{dtype} {list(form)}, as packed for this tile", transformed)
    if bias is not None:
        fits = bias.dtype in DTYPES and tuple(bias.shape) == (K,)
        require(fits, OP, "bias", f"float [{K}] or None", bias)
    for name, tensor in {"weight": weight, "transformed": transformed, "bias": bias}.items():
        here = tensor is None or tensor.device == x.device
        require(here, OP, name, f"on {x.device}, as x is", tensor)

    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    format = torch.channels_last if last else torch.contiguous_format
    y = torch.empty((N, K, OH, OW), dtype=x.dtype, device=x.device, memory_format=format)
    if y.numel() == 0:
        return y
    u = canonical(transformed, K).to(x.dtype).contiguous()
    added = y if bias is None else bias.contiguous()
    tile_rows, tile_columns = triton.cdiv(OH, tile_h), triton.cdiv(OW, tile)
    tiles = N * tile_rows * tile_columns
    chunk = min(tiles, max(128, CHUNK_BYTES // (P * (all_channels * x.element_size() + 4 * K))))
    v = torch.empty((P, chunk, all_channels), dtype=x.dtype, device=x.device)
    m = torch.empty((P, chunk, K), dtype=torch.float32, device=x.device)
    # Triton's interpreter multiplies the bits of bfloat16 numbers as integers.
    interpreted = not isinstance(winograd_multiply_kernel, triton.JITFunction)
    upcast = interpreted and x.dtype == torch.bfloat16
    shape = {"ALPHA_H": alpha_h, "ALPHA_W": alpha_w, "TILE_H": tile_h, "TILE_W": tile}
    block_t, block_c = transform_blocks(P, all_channels)
    out_t, out_k = transform_blocks(P, K)
    if interpreted:  # each program takes as long as any other
        block_t = out_t = triton.next_power_of_2(min(chunk, 256))
    # Launches go to the current device.
    with torch.cuda.device_of(x):
        for first in range(0, tiles, chunk):
            count = min(chunk, tiles - first)
            place = (tile_rows, tile_columns, first, count)
            if C > 0:
                blocks = triton.cdiv(count, block_t) * triton.cdiv(all_channels, block_c)
                winograd_input_kernel[(blocks,)](
                    *(x, v, *x.stride(), H, W, *padding, *place, all_channels),
                    **shape,
                    BLOCK_T=block_t,
                    BLOCK_C=block_c,
                )
            sizes = block_sizes(count, K // groups, x.dtype)
            blocks = triton.cdiv(count, sizes["BLOCK_M"])
            blocks *= triton.cdiv(K // groups, sizes["BLOCK_N"])
            winograd_multiply_kernel[(blocks * P * groups,)](
                *(v, u, m, count, C, K // groups, groups), UPCAST=upcast, **sizes
            )
            blocks = triton.cdiv(count, out_t) * triton.cdiv(K, out_k)
            winograd_output_kernel[(blocks,)](
                *(m, added, y, *y.stride(), OH, OW, *place, K),
                **shape,
                HAS_BIAS=bias is not None,
                ACTIVATION=ACTIVATIONS[activation],
                BLOCK_T=out_t,
                BLOCK_K=out_k,
            )
    return y
