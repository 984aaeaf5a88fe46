"""Knowledge distillation."""

from compressops.distill.losses import DistillLoss, LogitsKD

__all__ = ["DistillLoss", "LogitsKD"]
