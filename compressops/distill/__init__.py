"""Knowledge distillation: losses, taps on layers, and `Distiller` to use them in any loop."""

from compressops.distill.capture import Taps
from compressops.distill.distiller import Distiller
from compressops.distill.features import ActivationKD, AttentionMapKD
from compressops.distill.losses import DistillLoss, LogitsKD
from compressops.distill.transformers import AttentionScoreKD, HiddenStateKD

__all__ = [
    "ActivationKD",
    "AttentionMapKD",
    "AttentionScoreKD",
    "DistillLoss",
    "Distiller",
    "HiddenStateKD",
    "LogitsKD",
    "Taps",
]
