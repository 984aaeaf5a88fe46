"""What the convolutions share: their geometry, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .checks import require

# So that a kernel's reach cannot overflow.
MOST = 2**31 - 1


def pair(value: int | Sequence[int]) -> list[int]:
    """Of rows and columns, where one number may stand for both."""
    return [value, value] if isinstance(value, int | torch.SymInt) else list(value)


def output_size(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Rows and columns of the result; less than 1 where the kernel is larger than ``x``."""
    size = []
    for i, taps in enumerate(kernel_size):
        room = x.shape[2 + i] + 2 * padding[i] - dilation[i] * (taps - 1) - 1
        size.append(room // stride[i] + 1)
    return size


def check_pair(op: str, name: str, values: Sequence[int], least: int, most: int = MOST) -> None:
    """Raise a ``ValueError`` unless ``values`` are two integers in that range."""
    fits = len(values) == 2 and all(
        isinstance(v, int | torch.SymInt) and least <= v <= most for v in values
    )
    upper = "2^31 - 1" if most == MOST else most
    require(fits, op, name, f"one or two integers from {least} to {upper}", list(values))


def check_steps(
    op: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    """Raise a ``ValueError`` unless each is two integers in its range."""
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        check_pair(op, name, values, least)


def check_reach(
    op: str,
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Raise a ``ValueError`` unless the result has a row and a column."""
    sizes = output_size(x, kernel_size, stride, padding, dilation)
    R, S = kernel_size
    form = f"at least as large as {R} × {S} taps, padding included"
    require(all(size >= 1 for size in sizes), op, "x", form, x)
