"""Attention of transformers whose operands are rounded: query, key, probabilities and value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Of transformers' attention implementations, beside "eager" and "sdpa".
IMPLEMENTATION = "compressops"
# Of scores that are computed together where no gradient is taken.
_BYTES_AT_ONCE = 2**21
# Arguments of attention functions that change what is computed, and that this one does not know.
_UNKNOWN = ("position_bias", "s_aux", "sinks", "softcap")


class AttentionQuantizer(nn.Module):
    """What rounds the four operands of an attention's two products, each a module of its own.

    A child of the attention module, `attach`ed there. Values are rounded, and the products are
    of floats: no kernel here multiplies the integers of attention.

    Args:
        query, key, value: of tensors ``[N, heads, L, d]``.
        probabilities: of tensors ``[N, heads, L, L]``, after the softmax and its dropout.
    """

    parts = ("query", "key", "probabilities", "value")

    def __init__(
        self, query: nn.Module, key: nn.Module, probabilities: nn.Module, value: nn.Module
    ) -> None:
        super().__init__()
        self.query, self.key, self.probabilities, self.value = query, key, probabilities, value

    def get_config(self) -> dict[str, Any]:
        """The JSON values that a file keeps of it."""
        specs = {name: getattr(self, name).get_extra_state() for name in self.parts}
        return {"type": type(self).__name__, **specs}

    @classmethod
    def specs(cls, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The parts' own configs, of `get_config()`; raises ``ValueError`` for anything else."""
        specs = {name: value for name, value in config.items() if name != "type"}
        if set(specs) != set(cls.parts) or not all(isinstance(v, dict) for v in specs.values()):
            raise ValueError(
                f"config of {cls.__name__}: expected configs of {list(cls.parts)}, got {specs}"
            )
        return specs


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` that call transformers' attention functions, by name."""
    kinds: set[type] = set()
    for owner in model.modules():
        if getattr(owner, "_supports_attention_backend", False):
            for key, recorded in (getattr(owner, "_can_record_outputs", None) or {}).items():
                if "attention" in key:
                    kinds |= {getattr(kind, "target_class", kind) for kind in _listed(recorded)}
    found = tuple(kind for kind in kinds if isinstance(kind, type))
    return {name: module for name, module in model.named_modules() if isinstance(module, found)}


def attach(module: nn.Module, quantizer: AttentionQuantizer) -> None:
    """Let an attention module round its operands, once `switch` has put the function there that
    does it: ``quantizer`` becomes its child ``attention_quantizer``."""
    if not hasattr(module, "attention_quantizer"):
        module.register_forward_pre_hook(_check_implementation)
    module.attention_quantizer = quantizer.train(module.training)


def switch(model: nn.Module) -> None:
    """Let the models of transformers in ``model`` call `attention`.

    Raises:
        ImportError: transformers is missing.
        ValueError: a model's attention cannot be switched.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
        from transformers.masking_utils import eager_mask
    except ImportError as error:
        raise ImportError(
            "rounded attention needs transformers 5: pip install 'compressops[nlp]'"
        ) from error
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
    for owner in model.modules():
        if isinstance(owner, PreTrainedModel) and _implementation(owner) != IMPLEMENTATION:
            owner.set_attn_implementation(IMPLEMENTATION)
            if _implementation(owner) != IMPLEMENTATION:
                raise ValueError(
                    f"the attention of {type(owner).__name__} cannot be switched: it calls none of "
                    f"transformers' attention functions"
                )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as transformers' eager functions compute it, with its operands rounded by the
    module's `AttentionQuantizer`, if it has one (TernaryBERT, Zhang et al. 2020, arXiv:2009.12812,
    section 3.1).

    Args:
        query, key, value: ``[N, heads, L, d]``; key and value may have fewer (grouped) heads.
        attention_mask: what is added to the scores, ``[N, 1 or heads, L, L]``, or ``None``.
        scaling: of the scores; ``None`` is 1/√d.
        dropout: of the probabilities, in training.

    Returns:
        output ``[N, L, heads, d]`` and probabilities as they were multiplied.

    Raises:
        ValueError: an argument that other attention functions take and this one does not.
    """
    if given := [name for name in _UNKNOWN if kwargs.get(name) is not None]:
        raise ValueError(f"rounded attention does not take {given[0]} of {type(module).__name__}")
    if attention_mask is not None and not attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask must be what is added to scores, got {attention_mask.dtype} of "
            f"{type(module).__name__}"
        )
    if kwargs.get("is_causal") and attention_mask is None and query.shape[2] > 1:
        raise ValueError(
            f"rounded attention takes no is_causal without attention_mask, got it of "
            f"{type(module).__name__}"
        )
    rounds = getattr(module, "attention_quantizer", None)
    if rounds is not None:
        query, key, value = rounds.query(query), rounds.key(key), rounds.value(value)
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # [N, heads, L, d] @ [N, heads, d, L]: one name, so that each is freed after the next.
        p = (query @ key.transpose(2, 3)).mul_(scaling)
        if mask is not None:
            p = p + mask
        p = nn.functional.softmax(p, dim=-1, dtype=_exact(p)).to(query.dtype)
        p = nn.functional.dropout(p, p=dropout, training=module.training)
        if rounds is not None:
            p = rounds.probabilities(p)
        return (p @ value).transpose(1, 2).contiguous(), p

    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return attend(query, key, value, attention_mask)
    # A few sequences at a time, so that what is between the steps stays in the cache.
    N, heads, L, _ = query.shape
    step = max(1, _BYTES_AT_ONCE // max(1, heads * L * key.shape[2] * query.element_size()))
    if step >= N:
        return attend(query, key, value, attention_mask)
    y = query.new_empty(N, L, heads, value.shape[3])
    p = query.new_empty(N, heads, L, key.shape[2])
    mask = None if attention_mask is None else attention_mask.expand(N, -1, -1, -1)
    for first in range(0, N, step):
        some = slice(first, first + step)
        parts = (query[some], key[some], value[some], None if mask is None else mask[some])
        y[some], p[some] = attend(*parts)
    return y, p


def _exact(scores: Tensor) -> torch.dtype:
    return scores.dtype if scores.dtype == torch.float64 else torch.float32


def _check_implementation(module: nn.Module, args: Any) -> None:
    """The forward pre-hook of an attention whose operands are rounded: another function would
    leave that out, and nothing would show it."""
    found = module.config._attn_implementation
    if found != IMPLEMENTATION:
        raise RuntimeError(
            f"the model's attention implementation is {found!r}, which does not round what the "
            f"{type(module).__name__} was trained with; set_attn_implementation({IMPLEMENTATION!r})"
        )


def _implementation(model: Any) -> str | None:
    return model.config._attn_implementation


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]
