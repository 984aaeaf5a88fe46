"""What a recipe cannot do where every process holds a part of the weights (FSDP)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from compressops.compress.prune import Prune
from compressops.compress.quantize import Quantize, Refit
from compressops.compress.stage import Stage


def check_whole(model: nn.Module, before: Sequence[Stage]) -> None:
    """Refuse a `Retrain` between whose steps something reads whole weights.

    Raises:
        ValueError: of ``model`` and the stages ``before``, one has scales that follow the weights,
            or the last a pruning schedule.
    """
    found = [str(s) for s in before if isinstance(s, Quantize) and s.refits != "never"]
    last = before[-1] if before else None
    if isinstance(last, Prune) and last.controller() is not None:
        found.append(str(last))
    if Refit.concerns(model):
        found.append("the quantized model that was given")
    if found:
        raise ValueError(
            "a pruning schedule, and scales that follow the weights (of Int and Ternary), need "
            f"whole weights and do not go with FSDP, but DDP: got {', '.join(found)}"
        )
