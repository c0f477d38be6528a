"""The choice of tokens from logits, in every model that draws them one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastgen.checks import require_count, require_floating, require_not_negative, require_tensor

Noise: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""One generator, one for each row, or None: torch's global one."""

TINY = torch.finfo(torch.float32).tiny
"""The smallest normal number: below it a division overflows or, where denormals are flushed, is 0 / 0."""


def require_top_p(top_p: float) -> None:
    """Raises ValueError unless it is a probability above 0."""
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a probability in (0, 1], got {top_p}")


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """(logits - their maximum) / temperature, over the last dim, float32 at least; the softmax is that of logits / T.

    At any temperature the largest is 0; as it goes to 0, the others go to -inf. No gradient passes through the
    maximum, on which the softmax does not depend.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide - wide.detach().amax(-1, keepdim=True)) / max(temperature, TINY)


class Chooser:
    """Chooses a token of each row, step by step. Bad logits are noted without waiting for the device, until ``check``.

    Args:
        temperature: divides the logits; 0: the likeliest token, of several the first. However small it is, likelier
            tokens win; among equal ones the choice is random.
        generator: of the noise: one, or one for each row. A CPU generator gives the same noise to every device.
        top_k: choose among the k likeliest tokens, of equally likely ones the first; 0: all.
        top_p: choose among the likeliest tokens that together have this probability, at least one.

    Raises:
        ValueError: a temperature that is negative, infinite or NaN, a negative top_k, a top_p not in (0, 1].

    Example:
        >>> chooser = Chooser(temperature=1e-30)
        >>> chooser(torch.tensor([[1.0, 3.0, 2.0]]))
        tensor([1])
        >>> chooser.check()
    """

    def __init__(
        self, temperature: float = 1.0, generator: Noise = None, *, top_k: int = 0, top_p: float = 1.0
    ) -> None:
        require_not_negative(temperature=temperature)
        require_count("top_k", top_k, 0)
        require_top_p(top_p)
        self.temperature, self.generator, self.top_k, self.top_p = temperature, generator, top_k, top_p
        self._largest: list[Tensor] = []

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, tokens), floating -> (B,) int64. -inf: never chosen."""
        largest, likeliest = logits.max(1)
        self._largest.append(largest)
        if self.temperature == 0:
            return likeliest
        scores = tempered(logits, self.temperature)
        if 0 < self.top_k < scores.size(1):
            scores = _only_likeliest(scores, self.top_k)
        if self.top_p < 1:
            scores = _only_probable(scores, self.top_p)
        return (scores - self._uniform(scores).log().neg().log()).argmax(1)

    def watch(self, logits: Tensor) -> None:
        """Note bad logits (B, tokens) without choosing, where the caller does that itself."""
        self._largest.append(logits.amax(1))

    def check(self) -> None:
        """To be called after the last choice; waits for the device.

        Raises:
            ValueError: some logits were NaN or +inf, or all those of a row -inf.
        """
        if not self._largest:
            return
        largest = torch.stack(self._largest)
        self._largest = []
        bad = ~largest.isfinite()
        if bool(bad.any()):
            first = float(largest[bad][0])
            got = "only -inf" if first == -torch.inf else "NaN" if first != first else "+inf"
            raise ValueError(
                "logits: expected numbers or -inf, and at least one number for each choice, got"
                f" {got} in {int(bad.sum())} of {bad.numel()} choices"
            )

    def _uniform(self, like: Tensor) -> Tensor:
        """(B, tokens) in (0, 1); at 0 a token that should be certain would have -inf."""
        if isinstance(self.generator, Sequence):
            noise = torch.cat([_drawn(1, like, each) for each in self.generator])
        else:
            noise = _drawn(len(like), like, self.generator)
        return noise.clamp_(min=TINY).to(like.device)


def _drawn(rows: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(rows, like.size(1), generator=generator, device=device)


def _only_likeliest(scores: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest of each row; of equal ones the first stay."""
    least = scores.topk(k).values[:, -1:]
    above, equal = scores > least, scores == least
    room = k - above.sum(1, keepdim=True)
    return scores.masked_fill(~(above | (equal & (equal.cumsum(1) <= room))), -torch.inf)


def _only_probable(scores: Tensor, p: float) -> Tensor:
    """-inf for all but the likeliest of each row that together have the probability p; the first one always stays."""
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    share = ordered.softmax(1)
    beyond = share.cumsum(1) - share >= p
    beyond[:, 0] = False
    return scores.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)


def choose(
    logits: Tensor, temperature: float, generator: Noise = None, *, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """A token of each row, as ``Chooser``: logits (B, tokens) -> (B,) int64. Waits for the device.

    The largest of logits + Gumbel noise is a sample of their softmax (Gumbel 1954; Maddison et al. 2014).

    Raises:
        TypeError: logits that are no floating-point tensor.
        ValueError: logits of another shape, NaN, +inf or all -inf; otherwise as ``Chooser``.
    """
    require_tensor("logits", logits)
    require_floating("logits", logits)
    if logits.dim() != 2 or not logits.size(1):
        raise ValueError(f"logits: expected (B, tokens), got {tuple(logits.shape)}")
    if isinstance(generator, Sequence) and len(generator) != len(logits):
        raise ValueError(f"generator: expected one, or one for each of {len(logits)} rows, got {len(generator)}")
    chooser = Chooser(temperature, generator, top_k=top_k, top_p=top_p)
    token = chooser(logits)
    chooser.check()
    return token
