"""Attention on tensors that are sharded over the batch or over heads (``DTensor``): each process computes its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgen.backend import shard

_BATCH, _HEADS = 0, 1


def _rule(
    query_at: int, mask_at: int, tangent_mask_at: int, outputs: Callable[[Any, Any], list[Any]]
) -> Callable[..., list[tuple[list[Any], list[Any]]]]:
    """``outputs(placement, of_mask)``: placements of the results, where the mask's gradient has ``of_mask``."""

    def rule(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        from torch.distributed.tensor import Partial, Replicate, Shard

        query, key, mask, seed = args[query_at], args[query_at + 1], args[mask_at], args[mask_at + 1]
        if seed is not None:  # PyTorch takes one element for replicated, also where processes drew different ones
            raise NotImplementedError("dropout_p: expected 0 for DTensors, got dropout; give it local tensors")
        if args[mask_at + 2] is not None:
            raise NotImplementedError(
                "cu_seqlens_q: expected local tensors, got DTensors; their sequences are not sharded"
            )
        shardings = []
        for dim in (None, _BATCH, _HEADS):
            processes = query.mesh.size()
            grouped = query.shape[_HEADS] != key.shape[_HEADS]
            if dim == _HEADS and grouped and key.shape[_HEADS] % processes != 0:
                continue  # a group of query heads would be apart from its key
            full = Replicate() if dim is None else Shard(dim)
            own: Any = full
            gradient: Any = full
            if dim is not None and (mask is None or mask.shape[dim] == 1):  # the mask is everyone's
                own, gradient = Replicate(), Partial()
            if mask is None or args[-1] is not True:  # mask_grad: an empty tensor instead
                gradient = Replicate()
            inputs = [
                None if not hasattr(arg, "placements") else own if at in (mask_at, tangent_mask_at) else full
                for at, arg in enumerate(args)
            ]
            shardings.append((outputs(full, gradient), inputs))
        return shardings

    return rule


shard("attention_forward", _rule(0, 3, -1, lambda own, of_mask: [own] * 2))
shard("attention_backward", _rule(2, 7, -1, lambda own, of_mask: [own] * 3 + [of_mask]))
shard("attention_tangent", _rule(0, 5, 11, lambda own, of_mask: [own] * 2))
shard("attention_forward_tangent", _rule(0, 3, 9, lambda own, of_mask: [own] * 4))
shard("attention_second_order", _rule(2, 7, 13, lambda own, of_mask: [own] * 5 + [of_mask]))
