"""How a decoder writes targets: the likeliest token each time, tokens that are drawn, beam search."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.checks import require_not_negative, require_positive
from fastgen.models._tokens import END, PADDING, START
from fastgen.models.base import option
from fastgen.models.decoding import Chooser


@dataclass(frozen=True)
class DecodingOptions:
    """How targets are written. ValueError names the field, what was expected and what came."""

    source: str = option("", "what is decoded, each time; empty: random strings of the vocabulary")
    beams: int = option(1, "hypotheses that beam search goes on with; 1: greedy")
    temperature: float = option(0.0, "0: the likeliest; else tokens are drawn, from logits divided by this")

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise ValueError(f"source: expected a string, got {type(self.source).__name__}")
        require_positive("beams", self.beams)
        require_not_negative(temperature=self.temperature)
        if self.temperature and self.beams > 1:
            raise ValueError(f"beams: expected 1 with a temperature above 0, got {self.beams}")


def search(
    next_logits: Callable[[Tensor], Tensor],
    reorder: Callable[[Tensor], None],
    batch: int,
    length: int,
    options: DecodingOptions,
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor:
    """A target of each source, (batch, length) int64: start, characters, end, padding; one too long has no end.

    Beam search goes on with the ``beams`` likeliest beginnings and gives the likeliest target it has met (Sutskever et
    al., "Sequence to sequence learning with neural networks", 2014). Neither padding nor start is ever chosen. The same
    number of steps for every source, so that nothing waits for the device or another process.

    Args:
        next_logits: beginnings (batch * beams, N) -> logits (batch * beams, tokens) of the token after each.
        reorder: told which rows the beginnings go on from, where there is more than one beam.
        generator: of the noise where there is a temperature. A CPU generator serves every device.

    Raises:
        ValueError: logits that are NaN or infinite.
    """
    chooser = Chooser(options.temperature, generator)
    beams = options.beams
    text = torch.full((batch * beams, 1), START, device=device)
    scores = torch.full((batch, beams), -math.inf, device=device)
    scores[:, 0] = 0.0  # one beginning, many ways on
    ended = torch.zeros(batch * beams, 1, dtype=torch.bool, device=device)
    first = beams * torch.arange(batch, device=device)[:, None]
    for _ in range(length - 1):
        logits = next_logits(text)
        log_prob = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
        log_prob[:, [PADDING, START]] = -math.inf
        log_prob = log_prob.masked_fill(ended, -math.inf)
        log_prob[:, PADDING] = log_prob[:, PADDING].masked_fill(ended[:, 0], 0.0)
        if options.temperature:
            token = chooser(log_prob)
        else:
            chooser.watch(log_prob)
            totals = scores.to(log_prob.dtype)[:, :, None] + log_prob.unflatten(0, (batch, beams))
            scores, best = totals.flatten(1).topk(beams)
            rows = (first + best // log_prob.size(1)).flatten()
            token = best.flatten() % log_prob.size(1)
            text, ended = text[rows], ended[rows]
            if beams > 1:
                reorder(rows)
        text = torch.cat((text, token[:, None]), 1)
        ended = ended | (token == END)[:, None]
    chooser.check()
    return text.view(batch, beams, length)[:, 0]
