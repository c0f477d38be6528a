"""Decoding: how tokens are chosen from logits, with temperature, top-k and top-p, greedily or by beam search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastgen.checks import require_count, require_floating, require_not_negative, require_tensor
from fastgen.models.base import upcast

Noise: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""One generator, one for each row, or None: torch's global one."""

TINY = torch.finfo(torch.float32).tiny
"""The smallest normal float32. A division by less overflows or, where denormals are flushed, is 0 / 0."""


def require_top_p(top_p: float) -> None:
    """Raises ValueError unless ``top_p`` is in (0, 1]."""
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a probability in (0, 1], got {top_p}")


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """(logits - max) / temperature over the last dim, in float32 at least; the softmax is that of logits / temperature.

    Subtracting the maximum first keeps every temperature finite: the largest value is 0, and the others go to -inf as
    the temperature goes to 0. The maximum is detached, since the softmax does not depend on it.
    """
    logits = upcast(logits)
    return (logits - logits.detach().amax(-1, keepdim=True)) / max(temperature, TINY)


class Chooser:
    """Samples one token per row and step, without synchronizing: invalid logits are recorded until ``check``.

    Args:
        temperature: divisor of the logits. 0: greedy, the first of several maxima. At any temperature above 0, tied
            maxima are equally likely.
        generator: random number generator: one, or one for each row. With a CPU generator every device gets the same
            noise.
        top_k: sample from the k most likely tokens, the first of tied ones; 0: from all tokens.
        top_p: sample from the smallest set of most likely tokens with at least this total probability.

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
        """Logits (B, tokens), floating -> tokens (B,) int64. A token with logit -inf is never chosen."""
        largest, most_likely = logits.max(1)
        self._largest.append(largest)
        if self.temperature == 0:
            return most_likely
        scores = tempered(logits, self.temperature)
        if 0 < self.top_k < scores.size(1):
            scores = _keep_top_k(scores, self.top_k)
        if self.top_p < 1:
            scores = _keep_top_p(scores, self.top_p)
        return (scores - self._uniform(scores).log().neg().log()).argmax(1)  # Gumbel-max

    def watch(self, logits: Tensor) -> None:
        """Records logits (B, tokens) for ``check`` without choosing a token, for callers that choose themselves."""
        self._largest.append(logits.amax(1))

    def check(self) -> None:
        """Validates all logits since the last check. Synchronizes; call it after the last step.

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
        """(B, tokens) in (0, 1). Exactly 0 would give a certain token the score -inf."""
        if isinstance(self.generator, Sequence):
            noise = torch.cat([_rand(1, like, each) for each in self.generator])
        else:
            noise = _rand(len(like), like, self.generator)
        return noise.clamp_(min=TINY).to(like.device)


def _rand(rows: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(rows, like.size(1), generator=generator, device=device)


def _keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Sets all but the k largest scores of each row to -inf; of tied scores the first are kept."""
    least = scores.topk(k).values[:, -1:]
    above, equal = scores > least, scores == least
    room = k - above.sum(1, keepdim=True)
    return scores.masked_fill(~(above | (equal & (equal.cumsum(1) <= room))), -torch.inf)


def _keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Sets all but the most likely tokens of total probability p to -inf; the most likely one is always kept."""
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    share = ordered.softmax(1)
    beyond = share.cumsum(1) - share >= p
    beyond[:, 0] = False
    return scores.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)


def choose(
    logits: Tensor, temperature: float, generator: Noise = None, *, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Samples one token per row, as ``Chooser``: logits (B, tokens) -> (B,) int64. Synchronizes.

    The argmax of logits + Gumbel noise is a sample from their softmax (Gumbel 1954; Maddison et al. 2014).

    Raises:
        TypeError: logits are not a floating-point tensor.
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


def beam_search(
    next_logits: Callable[[Tensor], Tensor],
    reorder: Callable[[Tensor], None],
    batch: int,
    length: int,
    *,
    special: tuple[int, int, int],
    num_beams: int = 1,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Decodes (batch, length) int64 tokens: start, tokens, end, padding; a sequence that is too long has no end.

    Beam search keeps the ``num_beams`` most likely prefixes and returns the most likely finished or cut-off one
    (Sutskever et al., "Sequence to sequence learning with neural networks", 2014); one beam is greedy search, and
    sampling where there is a temperature. Neither padding nor start is ever chosen. Every call takes length - 1 steps
    and does not synchronize until the end, so that distributed processes stay in step.

    Args:
        next_logits: prefixes (batch * num_beams, N) -> logits (batch * num_beams, tokens) of the next token.
        reorder: receives the row that each prefix continues, (batch * num_beams,) int64, if there is more than one
            beam; caches are reordered accordingly.
        special: the tokens padding, start and end.
        num_beams: number of prefixes per item.
        temperature: 0: search; otherwise tokens are sampled, with one beam.
        generator: random number generator for a temperature above 0. A CPU generator serves every device.

    Raises:
        ValueError: logits that are NaN or infinite.
    """
    padding, start, end = special
    chooser = Chooser(temperature, generator)
    text = torch.full((batch * num_beams, 1), start, device=device)
    scores = torch.full((batch, num_beams), -math.inf, device=device)
    scores[:, 0] = 0.0  # all beams are equal at first: expand only one
    ended = torch.zeros(batch * num_beams, 1, dtype=torch.bool, device=device)
    first = num_beams * torch.arange(batch, device=device)[:, None]
    for _ in range(length - 1):
        logits = next_logits(text)
        log_prob = upcast(logits).log_softmax(1)
        log_prob[:, [padding, start]] = -math.inf
        log_prob = log_prob.masked_fill(ended, -math.inf)
        log_prob[:, padding] = log_prob[:, padding].masked_fill(ended[:, 0], 0.0)
        if temperature:
            token = chooser(log_prob)
        else:
            chooser.watch(log_prob)
            totals = scores.to(log_prob.dtype)[:, :, None] + log_prob.unflatten(0, (batch, num_beams))
            scores, best = totals.flatten(1).topk(num_beams)
            rows = (first + best // log_prob.size(1)).flatten()
            token = best.flatten() % log_prob.size(1)
            text, ended = text[rows], ended[rows]
            if num_beams > 1:
                reorder(rows)
        text = torch.cat((text, token[:, None]), 1)
        ended = ended | (token == end)[:, None]
    chooser.check()
    return text.view(batch, num_beams, length)[:, 0]


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no autograd, and no compiled code, which would be recompiled for every length.

    Sharded weights are gathered when needed and kept, which inference mode does not allow: they run under ``no_grad``.
    """
    unsharded = all(type(weight) is nn.Parameter for weight in model.parameters())
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"), torch.inference_mode() if unsharded else torch.no_grad():
            yield
    finally:
        model.train(was_training)
