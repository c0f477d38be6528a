"""Seeds of noise and dropout, also under activation checkpointing."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor

_SEEDS = "_fastgen_seeds"


def sample_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A one-element int64 seed on the device: no synchronization, and a CUDA graph can replay it.

    Activation checkpointing restores only the global generators when it recomputes a function. A seed from
    ``generator`` is therefore stored with the checkpoint and reused in the recomputation.

    Raises:
        RuntimeError: ``generator`` is used in a backward pass, where the seed of the forward pass is not available.
    """
    if generator is None:
        return _sample(device, None)
    frame, recomputation = _checkpoint_frame()
    if recomputation is not None:
        return _reused_seed(frame, recomputation, device)
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "generator: expected a call outside of backward passes, got one inside, as activation checkpointing with"
            " use_reentrant=True or checkpoints inside checkpoints make it: the noise of the forward pass cannot be"
            " drawn again from this generator. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False), not"
            " nested, or torch's global generator (generator=None)"
        )
    seed = _sample(device, generator)
    if frame is not None:
        vars(frame).setdefault(_SEEDS, []).append(seed.clone())
    return seed


def _sample(device: torch.device, generator: torch.Generator | None) -> Tensor:
    if generator is None:  # torch.onnx knows no randint with a generator, also if that is None
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device, generator=generator)


def _checkpoint_frame() -> tuple[Any, Any]:
    """The state of the innermost running ``torch.utils.checkpoint`` (use_reentrant=False), and the hook of its
    recomputation if this is one; (None, None) outside.

    PyTorch has no public interface for this: the checkpoint's saved-tensor hooks refer to the state.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return None, None
    pack = inspect.unwrap(hooks[0])
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return None, None
    known = inspect.getclosurevars(pack).nonlocals
    if "frame" in known:
        return known["frame"], None
    target = known.get("target_frame_ref")
    return (None, None) if target is None else (target(), hooks[0])


_reused: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # number of seeds reused, by recomputation


def _reused_seed(frame: Any, recomputation: Any, device: torch.device) -> Tensor:
    seeds = vars(frame).get(_SEEDS, [])
    position = _reused.get(recomputation, 0)
    _reused[recomputation] = position + 1
    if position >= len(seeds):
        raise RuntimeError(
            f"generator: expected {len(seeds)} calls with a generator in the checkpointed function, as in its forward"
            " pass, got more when it was run again"
        )
    seed: Tensor = seeds[position]
    return seed.to(device).clone()
