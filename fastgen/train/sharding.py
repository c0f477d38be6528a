"""Several processes: DDP and FSDP, full and sharded tensors."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from fastgen.models import GenerativeModel
from fastgen.train.config import TrainConfig
from fastgen.train.errors import UsageError

SECONDS_TO_LEAVE = 0.5
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def make_accelerator(config: TrainConfig, device: torch.device, **options: Any) -> Accelerator:
    """The accelerator of this process, which joins the others that torchrun or ``accelerate launch`` started."""
    _forget()
    # Each process keeps its own batch norm statistics, averaged when a model is saved (Engine.share_buffers): broadcast
    # buffers would be overwritten between a forward pass and its backward pass.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        mixed_precision=PRECISIONS[config.precision], cpu=device.type == "cpu", kwargs_handlers=[ddp], **options
    )
    if device.type == "cuda" and device.index is not None and accelerator.num_processes == 1:
        torch.cuda.set_device(device)
        accelerator.state.device = device
    if accelerator.device.type != device.type:
        raise UsageError(f"device: expected one that accelerate trains on, {accelerator.device}, got {device}")
    parts = accelerator.num_processes * config.accumulate
    if config.batch_size % parts:
        raise UsageError(
            f"batch_size: expected a multiple of processes x accumulate"
            f" = {accelerator.num_processes} x {config.accumulate}, got {config.batch_size}"
        )
    return accelerator


def leave(accelerator: Accelerator) -> None:
    """Close trackers, the process group, and accelerate's global state.

    gloo's threads need the interpreter lock to release their last work; destroying the process group while holding the
    lock waits for them forever (observed in torch 2.13). The sleep lets them finish first.
    """
    if accelerator.num_processes > 1:
        time.sleep(SECONDS_TO_LEAVE)
    accelerator.end_training()
    _forget()


def _forget() -> None:
    """Reset accelerate's process-wide precision and device for the next run."""
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()


def shard(module: nn.Module, model: GenerativeModel, precision: torch.dtype | None) -> nn.Module:
    """``module``, which calls ``model``, with weights sharded by FSDP: per block, and the rest together."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not model.blocks:
        raise UsageError(f"strategy: expected ddp for {model.name}, which has no Transformer blocks to shard, got fsdp")
    if precision == torch.float16:
        raise UsageError("precision: expected float32 or bfloat16 with strategy fsdp, got float16")
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    for layer in model.modules():
        if type(layer).__name__ in model.blocks:
            fully_shard(layer, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    return module


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded, on every process."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


@torch.no_grad()
def assign(target: Tensor, source: Tensor) -> None:
    """Copy the full ``source`` into a tensor that may be sharded."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)
