"""PyTorch or an operator: the choice inside the autograd functions of the projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgen.backend import COMPILED, TORCH, call, helper, outside_autocast
from fastgen.ops.autograd import must_be_differentiable
from fastgen.ops.projection.layout import length_first


def backward_operator(
    namespace: str, name: str, formula: Callable[..., Any], grads: Sequence[Tensor]
) -> Callable[..., Any]:
    """The operator, or its PyTorch implementation: where the result is to be differentiated, and for the batch of
    gradients of ``torch.autograd.grad(..., is_grads_batched=True)``, which ignores the vmap rules of operators."""
    if must_be_differentiable() or any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads):
        return outside_autocast(formula)
    return partial(call, namespace, name)


def by_pytorch(name: str, tokens: Tensor, namespace: str) -> bool:
    """Whether PyTorch's linear map serves, with its derivatives: there is no kernel, and it copies no tokens."""
    return not has_kernel(name, namespace, tokens) and copies_nothing(tokens)


def has_kernel(name: str, namespace: str, tensor: Tensor) -> bool:
    """Whether the operator has a kernel for tensors like this one, in a library or in a namespace of its own."""
    return namespace not in (COMPILED, TORCH) or helper(namespace, name, tensor.device) is not None


def copies_nothing(tokens: Tensor) -> bool:
    """Whether PyTorch's linear map reads the tokens where they are."""
    return tokens.is_contiguous() or tokens.size(0) == 1 or length_first(tokens)
