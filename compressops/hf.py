"""Packed models in Hugging Face's form: a folder that ``from_pretrained`` loads.

    import compressops.hf

    compressops.hf.save_pretrained(packed, "folder")
    model = AutoModelForSequenceClassification.from_pretrained("folder")

Importing this module registers the quantizer ``compressops`` with transformers. The folder holds
``config.json``, with the name of the quantizer, and ``model.safetensors``, which is the file that
`compressops.save` writes. No float model is made first; only weights that a module keeps as floats
are decoded. How a folder is loaded stands in its config, which a loader may change::

    config = AutoConfig.from_pretrained("folder")
    config.quantization_config["mmap"] = True
    model = AutoModelForSequenceClassification.from_pretrained("folder", config=config)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from compressops.model_state import packed_modules
from compressops.nn import AttentionQuantizer
from compressops.nn.weight import check_residency
from compressops.serialize import inspect, load, save

try:
    from transformers import PreTrainedModel
    from transformers.quantizers import (
        HfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        "compressops.hf needs transformers 5: pip install 'compressops[nlp]'"
    ) from error

METHOD = "compressops"
FILE = "model.safetensors"


@register_quantization_config(METHOD)
class CompressopsConfig(QuantizationConfigMixin):
    """``quantization_config`` of a ``config.json``: how to hold what the file has.

    Args:
        residency: ``"decoded"`` or ``"packed"``, see `compressops.load`.
        mmap: leave in the file what the modules keep of it, see there, too.

    Raises:
        ValueError: an unknown residency or argument, or an ``mmap`` that is no bool.
    """

    def __init__(
        self,
        residency: str = "decoded",
        mmap: bool = False,
        quant_method: str = METHOD,
        **other: Any,
    ) -> None:
        if other or quant_method != METHOD:
            raise ValueError(
                f"quantization_config of {METHOD} has residency and mmap alone, got "
                f"quant_method={quant_method!r} and {sorted(other)}"
            )
        if not isinstance(mmap, bool):
            raise ValueError(f"mmap must be a bool, got {mmap!r}")
        self.quant_method = METHOD
        self.residency = check_residency(residency)
        self.mmap = mmap


@register_quantizer(METHOD)
class CompressopsQuantizer(HfQuantizer):
    """Loads a packed file into a model of transformers."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Take out the layers that the file has packed, so that transformers makes no weights for
        them; everything else it may fill with anything."""
        if not checkpoint_files or len(checkpoint_files) != 1:
            raise ValueError(f"a packed model is one file, got {checkpoint_files}")
        self.path = checkpoint_files[0]
        self.layers: dict[str, nn.Module] = {}
        present = dict(model.named_modules(remove_duplicate=False))
        for name, config in inspect(self.path).modules.items():
            if config["type"] == AttentionQuantizer.__name__:
                continue
            if name not in present or not name:
                raise ValueError(
                    f"{self.path} does not fit the model: layer {name!r} does not exist in the "
                    f"{type(model).__name__}"
                )
            self.layers[name] = present[name]
        for name in self.layers:
            model.set_submodule(name, nn.Identity())
        # Its report would list every tensor; `load` refuses what is missing or unknown.
        self.kept = {name: getattr(model, name) for name in _EXPECTATIONS}
        model._keys_to_ignore_on_load_missing = model._keys_to_ignore_on_load_unexpected = {r".*"}
        model.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)
        for name, value in self.kept.items():
            setattr(model, name, value)
        training = model.training
        config = self.quantization_config
        load(self.path, model, config.residency, inplace=True, mmap=config.mmap)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for target, source in model.all_tied_weights_keys.items():
            # Those of packed layers are tied by the file.
            if target in parameters and source in parameters:
                owner, _, key = target.rpartition(".")
                setattr(model.get_submodule(owner), key, parameters[source])
        del self.layers, self.kept
        return model.train(training)

    def is_serializable(self) -> bool:
        """``model.save_pretrained`` knows no packed file; `save_pretrained` does."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return self.quantization_config.residency == "decoded"


_EXPECTATIONS = (
    "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected",
    "all_tied_weights_keys",
)


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    residency: str = "decoded",
    mmap: bool = False,
) -> int:
    """Write a packed model of transformers into a folder that ``from_pretrained`` loads.

    Args:
        model: a `transformers.PreTrainedModel` that `compressops.convert` returned.
        folder: is made if it is not there.
        residency, mmap: of the loaded model's weights, see `CompressopsConfig`.

    Returns:
        the bytes of the model's file.

    Raises:
        TypeError: ``model`` is none of transformers'.
        ValueError: nothing in it is packed, as `CompressopsConfig`, or as `compressops.save`.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    if not packed_modules(model):
        raise ValueError("model holds no packed layer; save what compressops.convert returns")
    config = type(model.config).from_dict(model.config.to_dict())
    config.quantization_config = CompressopsConfig(residency, mmap).to_dict()
    # Else it would be guessed from the file, whose tensors are of bytes.
    config.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    config.architectures = [type(model).__name__]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = save(model, folder / FILE)
    config.save_pretrained(folder)
    return size
