"""Lossy compression by parametrizations, and the recipes that chain it."""

from compressops.compress.attention import QuantizeAttention
from compressops.compress.encode import Encode
from compressops.compress.equalize import Equalize
from compressops.compress.lowrank import Factorize
from compressops.compress.parametrizations import WeightRecord, record
from compressops.compress.prune import Prune
from compressops.compress.quantize import Quantize
from compressops.compress.recipe import Recipe
from compressops.compress.retrain import Retrain
from compressops.compress.round import Round
from compressops.compress.run import Result, compress, run_recipe
from compressops.compress.table import Row, Table
from compressops.compress.teacher import cached_logits

__all__ = [
    "Encode",
    "Equalize",
    "Factorize",
    "Prune",
    "Quantize",
    "QuantizeAttention",
    "Recipe",
    "Result",
    "Retrain",
    "Round",
    "Row",
    "Table",
    "WeightRecord",
    "cached_logits",
    "compress",
    "record",
    "run_recipe",
]
