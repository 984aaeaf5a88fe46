"""The low-rank layout: a weight as the product of two or three small factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressops.formats.layout import Layout
from compressops.formats.number import matrix_shape
from compressops.formats.registry import check_choice, check_int, shown

FORMS = ("matrix", "spatial", "tucker", "cp")
_LARGEST = 2**31 - 1


def low_rank_product(u: Tensor, v: Tensor) -> Tensor:
    """``u @ v`` with one result on every machine: float64 sums, in the order of the rank.

    A product of two float32 is exact in float64, so that fused multiply-adds change nothing, and
    the order of the sum is fixed; a library's matmul promises neither. The sum is rounded to
    float32.

    Args:
        u: float32, bfloat16 or float16 ``[rows, rank]``.
        v: the same ``[rank, columns]``.

    Returns:
        float32 ``[rows, columns]``.
    """
    total = torch.zeros(u.shape[0], v.shape[1], dtype=torch.float64, device=u.device)
    for left, right in zip(u.double().unbind(1), v.double().unbind(0), strict=True):
        total.addcmul_(left[:, None], right[None, :])
    return total.to(torch.float32)


@dataclass(frozen=True)
class LowRank(Layout):
    """Two or three factors, each a packed tensor of its own, whose product is the weight.

    With O output channels, I input channels and kernels of h × w the forms are

    - ``"matrix"``: ``weight.flatten(1)`` = u ``[O, r]`` @ v ``[r, I·h·w]``. A linear layer is two,
      a convolution one of r filters and a 1×1 convolution (Zhang et al. 2016, arXiv 1505.06798).
    - ``"spatial"``: v ``[r, I, h, 1]`` and then u ``[O, r, 1, w]`` (Jaderberg et al. 2014,
      arXiv 1405.3866).
    - ``"tucker"``: v ``[q, I]``, core ``[p, q, h, w]``, u ``[O, p]``; rank (p, q) (Tucker-2: Kim et
      al. 2016, arXiv 1511.06530).
    - ``"cp"``: v ``[r, I]``, core ``[r, 1, h, w]`` depthwise, u ``[O, r]`` (Lebedev et al. 2015,
      arXiv 1412.6553, with both dimensions of the kernel as one mode, as Astrid & Lee 2017,
      arXiv 1701.07148, have it).

    Args:
        rank: 1 or more; of ``"tucker"`` two, those of outputs and inputs.
        form: one of the above; all but ``"matrix"`` need a weight of four dimensions.
    """

    rank: int | tuple[int, int]
    form: str = "matrix"

    def __post_init__(self) -> None:
        check_choice("LowRank", "form", self.form, FORMS)
        if self.form != "tucker":
            check_int("LowRank", "rank", self.rank, 1, _LARGEST)
            return
        if not isinstance(self.rank, (tuple, list)) or len(self.rank) != 2:
            raise ValueError(
                f"LowRank: rank of 'tucker' must be (outputs, inputs), got {shown(self.rank)}"
            )
        for rank in self.rank:
            check_int("LowRank", "rank", rank, 1, _LARGEST)
        object.__setattr__(self, "rank", tuple(self.rank))

    @property
    def names(self) -> tuple[str, ...]:
        """The factors, in the order of the file: last applied first."""
        return ("u", "core", "v") if self.form in ("tucker", "cp") else ("u", "v")

    @property
    def products(self) -> int:
        """Multiplications that an entry of the weight takes, at most."""
        return sum(self.rank) if self.form == "tucker" else self.rank

    def buffer_size(self, shape: tuple[int, ...]) -> int:
        """Entries that multiplying out needs room for."""
        entries = math.prod(shape)
        return max(entries, self.rank * math.prod(shape[1:])) if self.form == "cp" else entries

    @classmethod
    def largest(cls, form: str, shape: tuple[int, ...]) -> tuple[int, int] | int:
        """The rank at which any weight of ``shape`` is exact.

        Raises:
            ValueError: the form has no place for such a weight.
        """
        if form == "matrix":
            return min(matrix_shape(shape))
        if len(shape) != 4:
            raise ValueError(f"LowRank: {form!r} needs a weight [O, I, h, w], got {list(shape)}")
        o, i, h, w = shape
        if form == "tucker":
            return o, i
        # Of "cp": two modes written out one by one.
        return min(o * w, i * h) if form == "spatial" else min(o * i, o * h * w, i * h * w)

    def factor_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape of each factor of a weight of ``shape``.

        Raises:
            ValueError: the form has no place for such a weight, or the rank is more than any can
                have.
        """
        largest = self.largest(self.form, shape)
        if self.form == "matrix":
            rows, columns = matrix_shape(shape)
            if self.rank > largest:
                raise ValueError(f"LowRank: rank {self.rank} of a {rows} × {columns} matrix")
            return {"u": (rows, self.rank), "v": (self.rank, columns)}
        pairs = zip(self.rank, largest, strict=True) if self.form == "tucker" else ()
        if any(r > most for r, most in pairs or [(self.rank, largest)]):
            raise ValueError(
                f"LowRank: rank {self.rank} of form {self.form!r}, a weight {list(shape)} has at "
                f"most {largest}"
            )
        o, i, h, w = shape
        if self.form == "spatial":
            return {"u": (o, self.rank, 1, w), "v": (self.rank, i, h, 1)}
        if self.form == "tucker":
            p, q = self.rank
            return {"u": (o, p), "core": (p, q, h, w), "v": (q, i)}
        return {"u": (o, self.rank), "core": (self.rank, 1, h, w), "v": (self.rank, i)}

    def check_shapes(self, shapes: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> None:
        """Raise a ``ValueError`` unless factors of these shapes, in the order of the names, make a
        weight of ``shape``."""
        expected = list(self.factor_shapes(shape).values())
        if list(shapes) != expected:
            raise ValueError(
                f"factors {list(shapes)} don't make a weight {list(shape)} of {self}: expected "
                f"{expected}"
            )

    def entries(self, shape: tuple[int, ...]) -> int:
        """Entries of all factors."""
        return sum(math.prod(size) for size in self.factor_shapes(shape).values())

    def macs(self, shape: tuple[int, ...], stride: tuple[int, int] = (1, 1)) -> int:
        """Multiply-accumulates for an output position (a row of a linear layer's output), with the
        edges of images left out; the dense weight takes one for each of its entries."""
        sizes = {name: math.prod(size) for name, size in self.factor_shapes(shape).items()}
        if self.form == "spatial":
            # The stride along the other dimension comes later.
            return sizes["v"] * stride[1] + sizes["u"]
        if self.form == "matrix":
            return sizes["v"] + sizes["u"]
        return sizes["v"] * stride[0] * stride[1] + sizes["core"] + sizes["u"]

    def compose(
        self,
        factors: Sequence[Tensor],
        shape: tuple[int, ...],
        multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    ) -> Tensor:
        """The weight of ``shape``, differentiable if ``multiply`` (of two matrices) is.

        Args:
            factors: of `factor_shapes`, in the order of `names`.
        """
        if self.form == "matrix":
            return multiply(*factors).reshape(shape)
        o, i, h, w = shape
        if self.form == "spatial":
            u, v = factors
            left = u.squeeze(2).transpose(1, 2).reshape(o * w, -1)
            product = multiply(left, v.flatten(1)).reshape(o, w, i, h)
            return product.permute(0, 2, 3, 1).contiguous()
        u, core, v = factors
        if self.form == "tucker":
            inner = multiply(core.permute(0, 2, 3, 1).reshape(-1, core.shape[1]), v)
            product = multiply(u, inner.reshape(core.shape[0], -1))
            # In the memory format of a plain weight, on which a convolution's bits depend.
            return product.reshape(o, h, w, i).permute(0, 3, 1, 2).contiguous()
        inner = v[:, :, None] * core.reshape(-1, 1, h * w)
        return multiply(u, inner.flatten(1)).reshape(shape)

    def product(
        self, factors: Sequence[Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """`compose` with one result on every machine: each product is `low_rank_product`, and what
        comes between two is rounded to float32."""
        exact = self.compose([factor.float() for factor in factors], shape, low_rank_product)
        return exact.to(dtype)
