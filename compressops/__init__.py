"""compressops: chain-compress PyTorch networks and keep every factor in file, memory and time.

``compress`` runs a recipe (prune, quantize, retrain, encode) on a model, ``convert`` turns the
result into drop-in modules on packed weights, ``save`` and ``load`` move it to a file and back.
"""

from . import backends, distill, ops
from .backends import BackendError, backend
from .calibrate import Calibrate
from .compress import (
    Encode,
    Equalize,
    Factorize,
    Prune,
    Quantize,
    QuantizeAttention,
    Recipe,
    Result,
    Retrain,
    Round,
    cached_logits,
    compress,
)
from .convert import convert
from .distill import ActivationKD, AttentionMapKD, AttentionScoreKD, HiddenStateKD, LogitsKD
from .formats import (
    BlockSparse,
    Dense,
    DynamicFixedPoint,
    FixedPoint,
    Float,
    Huffman,
    Int,
    LowRank,
    PackedTensor,
    Raw,
    Sparse,
    Ternary,
)
from .report import report
from .serialize import inspect, load, save, verify

__version__ = "0.1.0"

__all__ = [
    "ActivationKD",
    "AttentionMapKD",
    "AttentionScoreKD",
    "BackendError",
    "BlockSparse",
    "Calibrate",
    "Dense",
    "DynamicFixedPoint",
    "Encode",
    "Equalize",
    "Factorize",
    "FixedPoint",
    "Float",
    "HiddenStateKD",
    "Huffman",
    "Int",
    "LogitsKD",
    "LowRank",
    "PackedTensor",
    "Prune",
    "Quantize",
    "QuantizeAttention",
    "Raw",
    "Recipe",
    "Result",
    "Retrain",
    "Round",
    "Sparse",
    "Ternary",
    "__version__",
    "backend",
    "backends",
    "cached_logits",
    "compress",
    "convert",
    "distill",
    "inspect",
    "load",
    "ops",
    "report",
    "save",
    "verify",
]
