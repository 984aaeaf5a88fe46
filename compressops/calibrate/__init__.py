"""Integers that are fitted to data: ranges of activations and weights, error compensation."""

from compressops.calibrate.config import Calibrate
from compressops.calibrate.gptq import Hessian, gptq
from compressops.calibrate.ranges import Range
from compressops.calibrate.run import Fitted, Layer, calibrate
from compressops.calibrate.weights import fit_mse

__all__ = ["Calibrate", "Fitted", "Hessian", "Layer", "Range", "calibrate", "fit_mse", "gptq"]
