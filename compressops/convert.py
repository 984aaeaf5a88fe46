"""Convert a compressed or plain model, layer by layer, to modules that hold packed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from compressops import fusion, kernels
from compressops import plan as plans
from compressops.calibrate import Calibrate
from compressops.compress.activations import input_quantizer
from compressops.conversion import Conversion
from compressops.measure import as_normal, normal_tensors
from compressops.nn import AttentionQuantizer, attention
from compressops.nn.weight import check_residency
from compressops.plan import Config, naming
from compressops.registry import is_layer, targets


@normal_tensors()
def convert(
    model: nn.Module,
    config: Config | Mapping[str, Config] = None,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    example_inputs: Any = None,
    prefer: str = "speed",
    residency: str = "decoded",
    inplace: bool = False,
    calibration: Calibrate | None = None,
    fuse: bool = True,
) -> nn.Module:
    """Replace layers by drop-in modules that hold their weights packed.

    Without a config the function of the model stays: layers that were compressed (their
    parametrizations are the record) become packed modules which compute the same bits (in other
    order where they run as block-sparse ones), and the rest stays as it is. Layers that share a
    weight share its packed form. With ``example_inputs`` convolutions, plain and packed, are
    measured as Winograd's too, and run so where that is faster and exact enough
    (`kernels.choose`).

    Args:
        model: compressed, plain, or already converted; then packed layers keep their numbers and
            take the residency, and the layout or coding of the config, if any.
        config: post-training conversion. A number quantizes the weights of every supported layer
            (rounded to nearest, not retrained), a layout or coding repacks them without loss; a
            tuple combines up to one of each. Linear layers of some integers then round their
            activations too (`Int8Linear`, `Int4Linear`, `TernaryLinear`): so does a layer that was
            trained with the number, if the config names it again. A ReLU or exact GELU module that
            is called right after a layer that runs on integers or stored blocks is computed by it,
            and `Fused` stands in its place, where nothing else uses what is between them (see
            ``fuse``). A mapping gives one of these per glob on layer names (first match wins;
            ``None`` leaves a layer as it is).
        filter_fn: ``filter_fn(module, name)`` false: the layer stays.
        example_inputs: a tensor, or a tuple or dict of arguments of ``model``, to measure on.
        prefer: ``"speed"``: no layer ends slower than the dense layer that it replaces. With
            decoded weights packed modules run the dense kernel; modules that run another one
            (linear layers of integers, `Int8Conv2d`, `IntEmbedding`, `TernaryEmbedding`,
            block-sparse layers, Winograd) are used only where interleaved medians on
            ``example_inputs`` show them faster, and of several the fastest; for block-sparse ones
            the density and the measured break-even density are reported. Without
            ``example_inputs`` a compiled integer kernel is assumed faster and an eager one slower,
            no embedding stays in integers, and no layer becomes block-sparse or Winograd's.
            ``"size"``: modules that need least memory, without measuring.
        residency: ``"decoded"`` keeps a decoded weight beside the packed one; ``"packed"``
            decodes on every use: least memory, and slower; not for ``torch.compile`` with
            ``fullgraph=True``, because decoding stays out of graphs.
        inplace: change ``model`` itself. On an error nothing was changed. References to its
            layers or their weights that are held outside its tree of modules (a list, an
            optimizer) go on naming the old ones.
        calibration: how integers (`Int`) are fitted to the weights and to data; ``None``: to the
            range of each row or group, activations to each row's.
        fuse: let layers compute the ReLU or GELU after them. What calls what is found by runs of a
            module's ``forward`` on stand-ins of its children and copies of its own attributes: in
            training and in evaluation, on zeros of several shapes. A ``forward`` that uses a
            layer's output otherwise on what none of these shows (values, a switch, a state outside
            the module) needs ``False``. A layer that is called from elsewhere, alone, gives what it
            gave.

    Returns:
        The converted model, with the reasons for `report`. Unless ``inplace``, ``model`` is
        untouched and shares no memory with it.

    Raises:
        ValueError: a glob that matches nothing, a number for a layer that has one, a weight that
            does not fit, calibration without data or layers; the message names the layer and the
            value.
        TypeError: ``config`` or ``calibration`` is none of the above.
    """
    if prefer not in ("speed", "size"):
        raise ValueError(f"prefer must be 'speed' or 'size', got {prefer!r}")
    if calibration is not None and not isinstance(calibration, Calibrate):
        raise TypeError(f"calibration must be a Calibrate or None, got {calibration!r}")
    example_inputs = as_normal(example_inputs)
    if not inplace and any(parameter.is_inference() for parameter in model.parameters()):
        model = copy.deepcopy(model)
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    choices = plans.resolve(config, layers)
    job = Conversion(model, check_residency(residency), prefer)
    for name, module in layers.items():
        if filter_fn is not None and not filter_fn(module, name):
            job.leave(name, module, "filtered out by filter_fn")
        else:
            job.consider(name, module, choices[name])
    job.settle_shared()
    if calibration is not None:
        job.calibrate(calibration, example_inputs)
    job.build(example_inputs)
    if example_inputs is not None and prefer == "speed":
        job.choose_kernels(example_inputs, inplace)
    fused = fusion.fuse(job) if fuse else {}
    result = job.finish(inplace)
    fusion.link(result, fused)
    kernels.prepare(result)
    return result


def from_packed(
    model: nn.Module,
    modules: Mapping[str, Mapping[str, Any]],
    residency: str = "decoded",
    *,
    inplace: bool = False,
    after_each: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Put packed modules into a float model: the second half of `load`.

    Args:
        model: a model of the architecture that was saved.
        modules: layer name to ``{"config": get_config(), "packed": packed_tensors()}``.
        residency, inplace: as in `convert`.
        after_each: called when a module was made.

    Returns:
        The model with packed modules; biases and all else are still those of ``model``.

    Raises:
        ValueError: a layer is missing, of another type, or has other options or shapes; the
            message names the layer and both values.
    """
    job = Conversion(model, check_residency(residency), "speed")
    layers = dict(model.named_modules(remove_duplicate=False))
    known = targets()
    rounding: dict[str, AttentionQuantizer] = {}
    for name, entry in modules.items():
        kind = entry["config"].get("type")
        if kind == AttentionQuantizer.__name__:
            rounding[name] = _attention_quantizer(name, entry, layers)
            continue
        if name not in layers:
            raise ValueError(f"layer {name!r} does not exist in the {type(model).__name__}")
        with naming(name):
            if kind not in known:
                raise ValueError(f"unknown module type {kind!r}; known: {', '.join(sorted(known))}")
            job.load(name, layers[name], known[kind], dict(entry["config"]), dict(entry["packed"]))
        after_each()
    fused = fusion.settle_loaded(job)
    result = job.finish(inplace)
    fusion.link(result, fused)
    for name, quantizer in rounding.items():
        attention.attach(result.get_submodule(name.rpartition(".")[0]), quantizer)
    if rounding:
        attention.switch(result)
    return result


def _attention_quantizer(
    name: str, entry: Mapping[str, Any], layers: Mapping[str, nn.Module]
) -> AttentionQuantizer:
    """The quantizer of this name in a file, to be attached to a layer of the model."""
    owner, _, child = name.rpartition(".")
    if child != "attention_quantizer" or owner not in layers:
        raise ValueError(f"layer {owner!r} for {name!r} does not exist in the model")
    with naming(name):
        specs = AttentionQuantizer.specs(entry["config"])
        return AttentionQuantizer(**{part: input_quantizer(spec) for part, spec in specs.items()})
