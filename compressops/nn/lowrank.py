"""Layers that run the factors of a low-rank weight one after the other."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressops import backends, ops
from compressops.formats import Layout, LowRank, PackedTensor
from compressops.nn.base import PackedModule
from compressops.nn.conv import PackedConv
from compressops.nn.weight import PackedWeight, outside_graphs
from compressops.nn.winograd_conv import padded

OP = "low_rank"


class LowRankWeight(PackedWeight):
    """A low-rank weight that is never multiplied out: decoded residency holds its factors.

    Raises:
        ValueError: the layout is not `LowRank`.
    """

    def _set_packed(self, packed: PackedTensor) -> None:
        if not isinstance(packed.layout, LowRank):
            raise ValueError(
                f"weight: low-rank layers need the layout LowRank, got {packed.layout}"
            )
        super()._set_packed(packed)
        self.layout = packed.layout

    def run_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each factor as the weight of the layer that it runs as."""
        shape = tuple(self.shape)
        shapes = self.layout.factor_shapes(shape)
        if len(shape) == 4:
            shapes = {n: size if len(size) == 4 else (*size, 1, 1) for n, size in shapes.items()}
            if self.layout.form == "matrix":
                shapes["v"] = (self.layout.rank, *shape[1:])
        return shapes

    def _resident(self) -> tuple[str, ...]:
        return tuple(f"factor_{name}" for name in ("u", "core", "v"))

    def _materialize(self) -> None:
        for name in self._resident():
            self._buffers.pop(name, None)
        if self.residency == "decoded":
            for name, factor in self._decode_factors().items():
                self.register_buffer(f"factor_{name}", factor, persistent=False)

    @outside_graphs
    def _decode_factors(self) -> dict[str, Tensor]:
        shapes, like = self.run_shapes(), {"dtype": self._probe.dtype, "device": self._probe.device}
        if self._probe.device.type == "meta":
            return {name: torch.empty(shape, **like) for name, shape in shapes.items()}
        last = self._probe.dim() == 4 and not self._probe.is_contiguous()
        return {
            name: factor.unpack(ops.DECODER)
            .reshape(shape)
            .to(**like, memory_format=torch.channels_last if last else torch.contiguous_format)
            for (name, shape), factor in zip(shapes.items(), self.packed().factors(), strict=True)
        }

    def forward(self) -> Tensor:
        """The dense weight: multiplied out on each call."""
        return self._decode()

    def factors(self) -> dict[str, Tensor]:
        """The factors by name, of `run_shapes`, in the compute dtype."""
        if self.residency == "decoded":
            return {n: self._buffers[f"factor_{n}"] for n in self.layout.names}
        return self._decode_factors()


class _LowRankModule(PackedModule):
    """What `LowRankLinear` and `LowRankConv2d` share."""

    weight_type = LowRankWeight

    @property
    def op(self) -> str:
        """``"low_rank"``: torch's own kernels, on the factors."""
        return OP

    @classmethod
    def refusal(cls, layout: Layout, shape: tuple[int, ...], groups: int) -> str | None:
        """Why factors cannot take the place of the dense weight, for a message; ``None``: they
        can. ``""``: the layout is another one."""
        if not isinstance(layout, LowRank):
            return ""
        if groups != 1:
            return f"the factors of a convolution of {groups} groups have no groups"
        try:
            dense, ours = torch.Size(shape).numel(), layout.macs(shape)
        except ValueError as error:
            return str(error)
        if ours >= dense:
            return f"{layout} takes {ours} multiply-accumulates, the dense weight {dense}"
        return None

    def macs(self) -> tuple[int, int]:
        """Multiply-accumulates for an output position, and those of the dense weight."""
        held = self.packed_weight
        stride = getattr(self, "stride", (1, 1))
        return held.layout.macs(tuple(held.shape), tuple(stride)), held.shape.numel()

    def assumed_faster(self) -> str | None:
        ours, dense = self.macs()
        return f"{dense / ours:.2f}× fewer multiply-accumulates" if ours < dense else None


class LowRankLinear(_LowRankModule):
    """`torch.nn.Linear` whose weight ``[out_features, in_features]`` is u ``[out_features, r]`` @
    v ``[r, in_features]``: ``(x @ v.T) @ u.T + bias``.

    The result differs from that of the product of the factors by rounding.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Shape: input ``[..., in_features]``, output ``[..., out_features]``.
    """

    source = nn.Linear
    options = ("in_features", "out_features")

    def forward(self, input: Tensor) -> Tensor:
        factors = self.packed_weight.factors()
        inner = F.linear(self.quantize_input(input), factors["v"])
        return F.linear(inner, factors["u"], self.bias)


class Step(NamedTuple):
    """One convolution of a `LowRankConv2d`, without bias: its factor and the options."""

    factor: str
    stride: tuple[int, int] = (1, 1)
    padding: Any = 0
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class LowRankConv2d(_LowRankModule, PackedConv):
    """`torch.nn.Conv2d` whose weight ``[out_channels, in_channels, kh, kw]`` is a product of
    factors: two or three small convolutions in sequence, see `LowRank`.

    The one that has the whole kernel, of the forms ``"matrix"`` and ``"tucker"``, can run as
    Winograd's. The result differs from that of the product of the factors by rounding.

    Packed residency breaks compiled graphs, see `PackedModule`.

    Shape: input ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``.

    Raises:
        ValueError: the layer has groups.
    """

    source = nn.Conv2d
    dimensions = 2
    # The factor of each form that is a convolution with the whole kernel.
    KERNELS: ClassVar[dict[str, str]] = {"matrix": "v", "tucker": "core"}

    def __init__(self, module: nn.Module, weight: PackedWeight) -> None:
        if module.groups != 1:
            raise ValueError(f"groups: LowRankConv2d needs 1, got {module.groups}")
        super().__init__(module, weight)

    def steps(self, padding: Any) -> list[Step]:
        """The convolutions, in order, of a layer that pads by ``padding``."""
        layout, whole = self.packed_weight.layout, (self.stride, padding, self.dilation)
        if layout.form == "matrix":
            return [Step("v", *whole), Step("u")]
        if layout.form == "spatial":
            (sh, sw), (dh, dw) = self.stride, self.dilation
            ph, pw = padding if isinstance(padding, tuple) else (padding, padding)
            first, second = ((ph, 0), (0, pw)) if ph != "same" else ("same", "same")
            return [Step("v", (sh, 1), first, (dh, 1)), Step("u", (1, sw), second, (1, dw))]
        groups = layout.rank if layout.form == "cp" else 1
        return [Step("v"), Step("core", *whole, groups), Step("u")]

    def forward(self, input: Tensor) -> Tensor:
        x, padding = self.quantize_input(input), self.padding
        if self.padding_mode != "zeros" or padding == "valid":
            x, padding = padded(self, x)
        return self._run(x, self.steps(padding), self.bias)

    def _run(self, x: Tensor, steps: list[Step], bias: Tensor | None = None) -> Tensor:
        held = self.packed_weight
        factors, kernel = held.factors(), self.KERNELS.get(held.layout.form)
        for index, step in enumerate(steps):
            weight, last = factors[step.factor], bias if index == len(steps) - 1 else None
            if self.winograd is not None and step.factor == kernel:
                padding = step.padding
                if padding == "same":
                    padding = tuple((size - 1) // 2 for size in self.kernel_size)
                keep = self.residency == "decoded"
                x = self.winograd(x, weight, last, padding, 1, keep)
            else:
                x = F.conv2d(x, weight, last, *step[1:])
        return x

    def run_winograd(self, runs: Any) -> None:
        form = self.packed_weight.layout.form
        if runs is not None and form not in self.KERNELS:
            raise ValueError(f"LowRankConv2d: no factor of form {form!r} has the whole kernel")
        super().run_winograd(runs)

    def prepare(self) -> None:
        """Transform the weight of the step that runs as Winograd's, before the first call."""
        if self.winograd is not None and self.residency == "decoded":
            kernel = self.KERNELS[self.packed_weight.layout.form]
            self.winograd.prepare(self.packed_weight.factors()[kernel], 1)

    def winograd_step(self, input: Tensor) -> tuple[nn.Conv2d, Tensor]:
        """The convolution that can run as Winograd's, as a float layer, and what it is called
        with where this layer is called with ``input``."""
        kernel = self.KERNELS[self.packed_weight.layout.form]
        weight = self.packed_weight.factors()[kernel]
        step = nn.Conv2d(
            weight.shape[1],
            weight.shape[0],
            self.kernel_size,
            padding=self.padding,
            padding_mode=self.padding_mode,
            bias=False,
            device="meta",
        )
        step.weight = nn.Parameter(weight, requires_grad=False)
        before = self.steps(0)
        names = [one.factor for one in before]
        return step, self._run(self.quantize_input(input), before[: names.index(kernel)])

    def backend(self) -> str:
        device = self.packed_weight.device.type
        return "torch" if self.winograd is None else backends.name("winograd_conv2d", device)
