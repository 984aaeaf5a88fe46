"""How the processes of a training run hold the model: each all of it, or each a part of it."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

    from compressops.compress.retrain import Retrain

# What `accelerate launch` sets for a configuration with distributed_type: FSDP.
FSDP_VARIABLE = "ACCELERATE_USE_FSDP"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the launcher asked for FSDP, and there is more than one process to share with."""
    return os.environ.get(FSDP_VARIABLE, "").lower() == "true" and accelerator.num_processes > 1


def check_sharding(options: Retrain, accelerator: Accelerator) -> None:
    """Refuse what needs whole weights.

    Raises:
        ValueError: ``options`` have Muon, a running mean, or fp16, under FSDP.
    """
    if not is_sharded(accelerator):
        return
    for name, value, refused in (
        ("optimizer", options.optimizer, "muon"),
        ("ema", options.ema, options.ema or None),
        ("mixed_precision", accelerator.mixed_precision, "fp16"),
    ):
        if value == refused:
            raise ValueError(f"{name}={value!r} does not go with FSDP: train with DDP instead")


class Replicated:
    """Every process holds the whole model: one process, or DDP."""

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model.to(accelerator.device), accelerator
        # What else the optimizer trains.
        self.others: nn.Module | None = None

    def settle(self) -> None:
        """After a call without a backward pass: the parameters are those to optimize again."""

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer, made ready; afterwards the model is."""
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        return self.optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Around a part of a batch; gradients are exchanged with the last."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> None:
        self.accelerator.clip_grad_norm_(parameters, limit)

    def agree(self, decision: bool) -> bool:
        """Every process decides for itself whether to write a checkpoint."""
        return decision

    def load(self, model: dict[str, Any]) -> None:
        """Before `prepare`: the model's values."""
        self.model.load_state_dict(model)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Before `prepare`."""
        optimizer.load_state_dict(state)

    def states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of model and optimizer, whole; in the main process."""
        return self.model.state_dict(), self.optimizer.state_dict()

    def finish(self) -> nn.Module:
        """The trained model, the same in every process."""
        model = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        if self.accelerator.num_processes > 1:
            _share_buffers(model)
        return model


class Sharded(Replicated):
    """FSDP: every process holds a part of each weight, its gradient and the optimizer's state.

    A copy of the model is trained; the model itself, whole, gets its values in the end.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(model, accelerator)
        self.whole = model
        self.model = copy.deepcopy(model)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for child in _units(self.model):
            fully_shard(child, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def settle(self) -> None:
        # The outermost unit stays whole, in wait of a backward pass.
        self.model.reshard()

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        self.optimizer = optimizer
        return optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.accelerator.autocast():
            return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.model.set_requires_gradient_sync(last)
        yield

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> None:
        nn.utils.clip_grad_norm_(parameters, limit)

    def agree(self, decision: bool) -> bool:
        """All write a checkpoint, or none: its parts come from all."""
        flag = torch.tensor(decision, dtype=torch.int32, device=self.accelerator.device)
        torch.distributed.broadcast(flag, 0)
        return bool(flag)

    def load(self, model: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(self.model, model, options=_whole())

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        set_optimizer_state_dict(self._trained(), optimizer, state, options=_whole())

    def states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from torch.distributed.checkpoint.state_dict import (
            get_model_state_dict,
            get_optimizer_state_dict,
        )

        return (
            get_model_state_dict(self.model, options=_whole()),
            get_optimizer_state_dict(self._trained(), self.optimizer, options=_whole()),
        )

    def _trained(self) -> nn.Module:
        # The optimizer's state is named by the modules that its tensors are in.
        return nn.ModuleList([self.model, *([self.others] if self.others else [])])

    def finish(self) -> nn.Module:
        self.whole.load_state_dict(self.states()[0])
        _share_buffers(self.whole)
        return self.whole


def _whole() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True)


def _units(model: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the entries of lists of layers. The rest goes with the model."""
    found = []
    for child in model.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            found += [entry for entry in child if any(True for _ in entry.parameters())]
        else:
            found += _units(child)
    return found


def _share_buffers(model: nn.Module) -> None:
    """Each process saw other batches; all go on with the statistics of the first."""
    for buffer in model.buffers():
        if isinstance(buffer, Tensor) and buffer.is_floating_point():
            torch.distributed.broadcast(buffer, 0)
