"""The retraining loop and the evaluation."""

from compressops.train.evaluate import Accuracy, evaluate
from compressops.train.launch import make_accelerator
from compressops.train.loop import train
from compressops.train.memory import keep_freed_memory

__all__ = ["Accuracy", "evaluate", "keep_freed_memory", "make_accelerator", "train"]
