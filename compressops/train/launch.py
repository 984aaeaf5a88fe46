"""Accelerate's view of the processes that a launcher started."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

import torch

from compressops.train.sharding import FSDP_VARIABLE

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(mixed_precision: str | None = None) -> Accelerator:
    """Accelerate's `Accelerator` for this process and precision.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: the launcher started a kind of training that is not supported, or several
            processes of which Accelerate makes none of one training.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise ImportError(
            "retraining needs the package accelerate: pip install 'compressops[train]'"
        ) from error
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        # The state is shared by all accelerators of a process and keeps its first precision.
        AcceleratorState._reset_state(reset_partial_state=False)
    # FSDP is ours (`compressops.train.sharding`): Accelerate's own takes no CPU, and no optimizer
    # that also trains what is not in the model.
    fsdp = os.environ.pop(FSDP_VARIABLE, None)
    # Where nothing but a CPU is, Accelerate has to be told: it would take each of torchrun's
    # processes for the only one.
    try:
        accelerator = Accelerator(
            mixed_precision=precision, cpu=not torch.accelerator.is_available()
        )
    finally:
        if fsdp is not None:
            os.environ[FSDP_VARIABLE] = fsdp
    _check_launch(accelerator)
    if str(accelerator.distributed_type) not in _SUPPORTED:
        raise ValueError(
            f"Retrain runs in one process, under DDP or FSDP, not {accelerator.distributed_type}"
        )
    return accelerator


def _check_launch(accelerator: Accelerator) -> None:
    """Refuse to train the same model in several processes that know nothing of each other, and say
    where a launcher started fewer than it was asked for."""
    launched, world = int(os.environ.get("WORLD_SIZE", 1)), accelerator.num_processes
    if launched > world:
        raise ValueError(
            f"a launcher started {launched} processes, and Accelerate trains in {world} on "
            f"{accelerator.device}"
        )
    if world == 1 and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        warnings.warn(
            "accelerate launch --cpu starts one process, whatever --num_processes says, and leaves "
            "others to MPI; use --config_file recipes/accelerate/ddp.yaml, or torchrun "
            "--nproc_per_node N",
            stacklevel=3,
        )


_SUPPORTED = {f"DistributedType.{name}" for name in ("NO", "MULTI_CPU", "MULTI_GPU")}
