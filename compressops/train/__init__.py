"""The retraining loop and the evaluation."""

from compressops.train.evaluate import Accuracy, evaluate
from compressops.train.loop import make_accelerator, train

__all__ = ["Accuracy", "evaluate", "make_accelerator", "train"]
