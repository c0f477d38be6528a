"""vmap rules of the attention operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgen.ops._batching import fold, fold_seed, map_slices, unfold


def _fold_mask(mask: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """A mask that every batch entry shares stays shared; any other is folded with the batch."""
    if mask is None or (dim is None and mask.size(0) == 1):
        return mask
    front = mask.unsqueeze(0) if dim is None else mask.movedim(dim, 0)
    return front.expand(size, batch, *front.shape[2:]).flatten(0, 1)


def vmap_rule(query_at: int, mask_at: int, tangent_mask_at: int | None = None, mask_grad: bool = False) -> Any:
    """The vmap rule of an operator, from the positions of its arguments: everything folds into the batch.

    The seed and the sequences follow the mask; packed sequences are mapped slice by slice. With ``mask_grad`` the last
    argument requests the mask's gradient, the last result.
    """

    def rule(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if args[mask_at + 2] is not None:
            return map_slices(operator, info, in_dims, *args)
        size, query_dim = info.batch_size, in_dims[query_at]
        query = args[query_at] if query_dim is None else args[query_at].movedim(query_dim, 0)[0]
        batch = query.size(0)
        folded: list[Any] = []
        for at, (argument, dim) in enumerate(zip(args, in_dims, strict=True)):
            if at in (mask_at, tangent_mask_at):
                folded.append(_fold_mask(argument, dim, size, batch))
            elif at == mask_at + 1:
                folded.append(fold_seed(argument, dim, size))
            else:
                folded.append(fold(argument, dim, size) if isinstance(argument, Tensor) else argument)
        mask = folded[mask_at]
        wanted = mask_grad and mask is not None and args[-1]
        if wanted and mask.size(0) == 1:
            folded[mask_at] = mask.expand(size * batch, *mask.shape[1:])  # each slice has a gradient of its own
        results = list(operator(*folded))
        if mask_grad:
            *results, of_mask = results
            if wanted:
                own = args[mask_at].size(0 if in_dims[mask_at] is None or in_dims[mask_at] > 0 else 1)
                of_mask = of_mask.unflatten(0, (size, batch))
                of_mask = of_mask.sum(1, keepdim=True) if own == 1 else of_mask
            else:
                of_mask = of_mask.reshape(size, 0)
            return (*(unfold(result, size) for result in results), of_mask), (0,) * (len(results) + 1)
        return tuple(unfold(result, size) for result in results), (0,) * len(results)

    return rule
