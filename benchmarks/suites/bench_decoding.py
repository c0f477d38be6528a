"""Sampling text with KV caches, against a loop that recomputes the whole prefix for every token.

Both sample 256 tokens from one model, within its context, with the same noise.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastgen.models.transformer_lm import TextOptions, TransformerLM, TransformerLMConfig, choose
from fastgen.testing import interleaved_times, median_ratio

TOKENS = 256
CONTEXT = TOKENS + 1


def make(device: torch.device) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(TransformerLMConfig(context=CONTEXT)).to(device).eval()


@torch.no_grad()
def without_a_cache(model: TransformerLM, prompt: Tensor, options: TextOptions) -> Tensor:
    generator, text = torch.Generator().manual_seed(0), prompt
    for _ in range(TOKENS):
        text = torch.cat((text, choose(model(text)[:, -1], options, generator)), dim=1)
    return text


@pytest.mark.parametrize("batch", [1, 8])
def test_sampling_with_a_cache(benchmark, device: torch.device, batch: int) -> None:
    """extra_info: median over rounds of the time without a cache divided by ours."""
    model, options = make(device), TextOptions(prompt="a", length=TOKENS)
    start = model.config.vocabulary.index("a")
    prompt = torch.full((batch, 1), start, device=device)

    def ours() -> list[str]:
        return model.draw(batch, options, generator=torch.Generator().manual_seed(0)).texts

    def loop() -> Tensor:
        return without_a_cache(model, prompt, options)

    vocabulary = model.config.vocabulary
    same = sum(text == "".join(vocabulary[i] for i in row) for text, row in zip(ours(), loop().tolist(), strict=True))
    assert same >= batch - batch // 8  # rounding may change a sampled token
    times = interleaved_times({"ours": ours, "no cache": loop}, rounds=5, synchronize=device.type == "cuda")
    benchmark.extra_info["shape"] = f"{batch} x {TOKENS} tokens"
    benchmark.extra_info["ratios"] = {"no cache": median_ratio(times["no cache"], times["ours"])}
    benchmark.pedantic(ours, rounds=3)
