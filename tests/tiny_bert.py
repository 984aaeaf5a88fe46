"""The shape of a BERT that runs in milliseconds, and tokens for it."""

import torch

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
IDS = torch.arange(24).view(2, 12)
