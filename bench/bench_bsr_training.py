"""Training on weights that were pruned in blocks: dense products under their masks (as torch trains
them, `prune.custom_from_mask`), and Retrain(blocks="sparse").

    python bench/bench_bsr_training.py
    python bench/bench_bsr_training.py --densities 0.2 --threads 1 --merge

Forward and backward, with the gradients of input, weight and bias, of single linear layers; and of
three of MiniLM's encoder layers on 32 sentences of 64 tokens, with all that is in them. Random
weights; no optimizer's step is in any figure.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import interleaved, median_ratio, merged, parser, report
from torch import nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEncoder

import compressops as co
from compressops.train.blocks import sparse_linears


@dataclass(frozen=True)
class Layer:
    inputs: int
    outputs: int
    rows: int
    block: tuple[int, int]

    @property
    def name(self) -> str:
        return f"linear {self.inputs} → {self.outputs}"


LAYERS = [
    Layer(384, 1536, 2048, (16, 1)),
    Layer(768, 768, 2048, (16, 16)),
    Layer(2048, 2048, 512, (32, 32)),
]
SMOKE = [Layer(32, 48, 8, (16, 1))]


def step(model: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        model(x).backward(grad)
        model.zero_grad()
        x.grad = None

    return run


def pruned(model: nn.Module, block: tuple[int, int], density: float) -> nn.Module:
    co.Prune(density=density, granularity="block", block=block).attach(model)
    return model


class Encoder(nn.Module):
    """BERT's, of embeddings that are looked up already."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        config = BertConfig(
            **{"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 12},
            **{"intermediate_size": 4 * width, "attn_implementation": "sdpa"},
            **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        )
        self.encoder = BertEncoder(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x).last_hidden_state


def measured(
    name: str, model: nn.Module, x: torch.Tensor, block: tuple[int, int], arguments, key: dict
) -> dict:
    dense = pruned(model, block, key["density"])
    sparse = copy.deepcopy(dense)
    with sparse_linears(sparse):
        grad = torch.randn_like(sparse(x))
        contestants = {"masked": step(dense, x, grad), "sparse": step(sparse, x, grad)}
        check(dense, sparse, x, grad)
        times = interleaved(contestants, 2 if arguments.smoke else max(15, arguments.rounds))
    medians = {name: statistics.median(seconds) * 1e3 for name, seconds in times.items()}
    return key | {
        "what": name,
        "rows": x.numel() // x.shape[-1],
        "block": "×".join(map(str, block)),
        "masked dense ms": medians["masked"],
        "sparse ms": medians["sparse"],
        "× masked dense": median_ratio(times["masked"], times["sparse"]),
    }


def check(dense: nn.Module, sparse: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
    """That the gradients are the same."""
    # All as one: that of a key's bias is 0 but for rounding.
    found = []
    for model in (dense, sparse):
        model(x).backward(grad)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    error = (found[1] - found[0]).norm() / found[0].norm()
    if not error < 1e-5:
        raise SystemExit(f"the gradients are off by {error:.1e}")
    x.grad = None


def main() -> None:
    command = parser(__doc__, "bsr_training-cpu")
    command.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    command.add_argument("--merge", action="store_true", help="keep the other rows of --out")
    arguments = command.parse_args()
    torch.manual_seed(0)
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for density in arguments.densities:
            key = {"threads": threads, "density": density}
            for layer in SMOKE if arguments.smoke else LAYERS:
                model = nn.Linear(layer.inputs, layer.outputs)
                x = torch.randn(layer.rows, layer.inputs, requires_grad=True)
                rows.append(measured(layer.name, model, x, layer.block, arguments, key))
            model, x = Encoder(3, 384), torch.randn(32, 64, 384)
            if arguments.smoke:
                model, x = Encoder(1, 48), torch.randn(2, 4, 48)
            rows.append(measured("3 layers of MiniLM", model, x, (16, 1), arguments, key))
    rows = merged(rows, arguments, ("threads", "density", "what", "block"))
    report("Training in blocks (CPU), × = times faster than the peer", rows, arguments)


if __name__ == "__main__":
    main()
