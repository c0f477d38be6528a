"""TransformerLM: training, cached sampling, errors."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import functional
from fastgen.batch import tokenize
from fastgen.models import transformer_lm
from fastgen.models.base import StepContext, Texts, from_data
from fastgen.models.transformer_lm import TextOptions, TransformerLM, TransformerLMConfig, choose

NOW = StepContext(1, 10)
VOCABULARY = "\n abcde"
VARIANTS = {
    "default": {},
    "swiglu, untied": {"activation": "swiglu", "tie_embeddings": False},
    "plain heads, one block": {"qk_norm": False, "depth": 1, "mlp_width": 12},
    "odd sizes": {"width": 18, "num_heads": 3, "context": 7},
    "window": {"window": 3},
    "segments": {"segments": 3, "context": 4},
    "longer tokens": {"vocabulary": ("\n", " ", "a", "b", "c", "d", "e", "ab", "cde")},
}


def small_model(**options: object) -> TransformerLM:
    torch.manual_seed(0)
    config = {"vocabulary": VOCABULARY, "context": 8, "width": 16, "num_heads": 2, "depth": 2, **options}
    return TransformerLM(TransformerLMConfig(**config))  # type: ignore[arg-type]


def random_tokens(n: int, length: int) -> Tensor:
    return torch.randint(0, len(VOCABULARY), (n, length), generator=seeded(1))


def logits_with_a_mask(model: TransformerLM, tokens: Tensor) -> Tensor:
    """Logits of a text of any length by one pass of the blocks with an explicit mask."""
    config, place = model.config, torch.arange(tokens.size(1))
    first = {
        "window": place - config.window,
        "segments": (place // config.context - 1) * config.context,
    }["window" if config.window else "segments"]
    mask = (place <= place[:, None]) & (place >= first[:, None])
    x = model.embedding(tokens)
    cos, sin = model.rotary.tables(tokens.size(1), dtype=x.dtype)
    for block in model.decoder:
        q, k, v = functional.qkv_projection(
            block.attention_norm(x),
            block.qkv.weight,
            heads=(block.heads,) * 3,
            head_dims=(block.head_dim,) * 3,
            norms=(block.query_norm, block.key_norm),
            rotary=(cos, sin),
        )
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + F.linear(heads, block.merge.weight)
        x = x + block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(x))))
    return F.linear(model.norm(x), model.embedding.weight)


def random_batch(n: int, model: TransformerLM) -> dict[str, Tensor]:
    return {"tokens": random_tokens(n, model.config.data_options()["length"])}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_have_the_shape_of_the_tokens(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    context = model.config.context
    for length in (1, 3, context):
        assert model(random_tokens(2, length)).shape == (2, length, len(model.config.vocabulary))


def test_no_prediction_depends_on_later_tokens() -> None:
    model = small_model().eval()
    tokens = random_tokens(2, 8)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % len(VOCABULARY)
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5], after[:, 5])


def test_loss_and_score_are_the_cross_entropy_of_the_next_character() -> None:
    model = small_model().eval()
    batch = random_batch(5, model)
    tokens = batch["tokens"]
    log_prob = model(tokens[:, :-1]).log_softmax(2).gather(2, tokens[:, 1:, None])[..., 0]
    scores = model.score(batch)
    torch.testing.assert_close(scores["nll"], -log_prob.sum(1))
    assert scores["tokens"].tolist() == [8.0] * 5
    torch.testing.assert_close(model.loss("text", batch, NOW)["loss"], -log_prob.mean())


def test_an_untrained_model_has_the_loss_of_the_uniform_distribution() -> None:
    model = small_model(width=64, depth=4)
    assert abs(model.loss("text", random_batch(64, model), NOW)["loss"].item() - math.log(len(VOCABULARY))) < 1.0


def test_training_steps_lower_the_loss() -> None:
    model = small_model()
    batch = random_batch(4, model)
    (phase,) = model.phases()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, phase.betas, weight_decay=phase.weight_decay)
    values = []
    for _ in range(30):
        loss = model.loss("text", batch, NOW)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]


def test_the_phase_has_the_config_s_optimizer() -> None:
    config = {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9}
    (phase,) = small_model(**config).phases()
    assert (phase.networks, phase.betas, phase.weight_decay) == ((), (0.8, 0.9), 0.3)


def test_dropout_is_active_in_training_only() -> None:
    model = small_model(dropout=0.5)
    batch = random_batch(2, model)
    assert model.loss("text", batch, NOW)["loss"] != model.loss("text", batch, NOW)["loss"]
    model.eval()
    torch.testing.assert_close(model.loss("text", batch, NOW), model.loss("text", batch, NOW), rtol=0, atol=0)


UNBOUNDED = ["window", "segments"]


@pytest.mark.parametrize("variant", UNBOUNDED)
def test_texts_of_any_length_with_a_window_or_segments(variant: str) -> None:
    model = small_model(**VARIANTS[variant]).double().eval()
    tokens = random_tokens(2, 29)
    torch.testing.assert_close(model(tokens), logits_with_a_mask(model, tokens))


@pytest.mark.parametrize("variant", UNBOUNDED)
def test_tokens_beyond_window_or_segments_have_no_effect(variant: str) -> None:
    """With one block; the receptive field grows with depth."""
    model = small_model(depth=1, **VARIANTS[variant]).eval()
    tokens = random_tokens(1, 12)
    before = model(tokens)
    first = {"window": 11 - 3, "segments": 4}[variant]
    for at in range(12):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % len(VOCABULARY)
        assert torch.allclose(model(changed)[:, -1], before[:, -1], atol=1e-6) == (at < first)


def test_no_gradient_flows_to_the_previous_segment() -> None:
    model = small_model(**VARIANTS["segments"])
    x = model.embedding(random_tokens(2, 8)).detach().requires_grad_()
    model._recur(x)[:, 4:].sum().backward()
    assert not x.grad[:, :4].any()
    assert x.grad[:, 4:].any()
    changed = x.detach().clone()
    changed[:, 0] += 1.0
    assert not torch.allclose(model._recur(changed)[:, 4:], model._recur(x)[:, 4:])  # it is attended to


def test_scores_count_the_characters_of_longer_tokens() -> None:
    model = small_model(**VARIANTS["longer tokens"]).eval()
    tokens = torch.tensor([[8, 7, 0, 1, 8, 2, 2, 7, 8], [0] * 9])
    scores = model.score({"tokens": tokens})
    assert scores["tokens"].tolist() == [8.0, 8.0]
    assert scores["characters"].tolist() == [2 + 1 + 1 + 3 + 1 + 1 + 2 + 3, 8]
    assert "characters" not in small_model().eval().score(random_batch(2, small_model()))


# --------------------------------------------------------------------------------------------------
# Sampling


def sampled_by_full_forwards(
    model: TransformerLM, n: int, options: TextOptions, generator: torch.Generator
) -> list[str]:
    """``draw`` without a cache: each token from a full forward of its context."""
    vocabulary, context = model.config.vocabulary, model.config.context
    prompt = tokenize("prompt", options.prompt or "\n", vocabulary)
    text = torch.tensor([prompt] * n)
    bounded = model.config.reach is None
    start = 0 if text.size(1) <= context or not bounded else text.size(1) - context // 2
    begin = text.size(1)
    for _ in range(options.length):
        if bounded and text.size(1) - start > context:
            start = text.size(1) - context // 2
        text = torch.cat((text, choose(model(text[:, start:])[:, -1], options, generator)), 1)
    return [options.prompt + "".join(vocabulary[i] for i in row) for row in text[:, begin:].tolist()]


SAMPLED = {
    "from nothing": TextOptions(length=5),
    "up to the end of the context": TextOptions(prompt="ab", length=7),
    "beyond the context": TextOptions(prompt="abc", length=30),
    "a prompt as long as the context": TextOptions(prompt="abcdeabc", length=3),
    "a prompt longer than the context": TextOptions(prompt="abcde abcde abcde", length=14),
    "greedy": TextOptions(prompt="a", length=20, temperature=0.0),
    "narrow": TextOptions(prompt="a", length=20, temperature=2.0, top_k=3, top_p=0.7),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", SAMPLED)
@torch.no_grad()
def test_cached_sampling_equals_full_forwards(case: str, variant: str) -> None:
    model, options = small_model(**VARIANTS[variant]).eval(), SAMPLED[case]
    samples = model.draw(3, options, generator=seeded(5))
    assert isinstance(samples, Texts)
    assert samples.texts == sampled_by_full_forwards(model, 3, options, seeded(5))
    assert all(text.startswith(options.prompt) for text in samples.texts)
    if isinstance(model.config.vocabulary, str):
        assert all(len(text) == len(options.prompt) + options.length for text in samples.texts)


@pytest.mark.parametrize("variant", ["default", *UNBOUNDED])
@torch.no_grad()
def test_cached_logits_of_parts_equal_one_forward(variant: str) -> None:
    model = small_model(**VARIANTS[variant]).double().eval()
    tokens = random_tokens(2, 8)
    past = model.new_cache(2, 8)
    parts = [model(tokens[:, a:b], past) for a, b in ((0, 3), (3, 4), (4, 5), (5, 8))]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens))


@pytest.mark.parametrize("variant", UNBOUNDED)
@torch.no_grad()
def test_the_caches_of_a_long_text_are_bounded(variant: str) -> None:
    model = small_model(**VARIANTS[variant]).double().eval()
    tokens = random_tokens(2, 300)
    past = model.new_cache(2, 300)
    assert past.caches[0].max_length == past.caches[0].keys.size(2) < 80
    parts = [model(part, past) for part in tokens.split((5, *[1] * 270, 25), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits_with_a_mask(model, tokens))
    with pytest.raises(ValueError, match=r"^length: expected at most \d+ tokens at once, in a cache of \d+, got 79$"):
        model(tokens[:, :79], past)


PROMPTS = ["abcde ab", "", "e", "abc", "abcde abcde abcde"]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 5}], ids=str)
@pytest.mark.parametrize("variant", [*UNBOUNDED, "default", "longer tokens"])
@torch.no_grad()
def test_batched_prompts_of_any_lengths_give_the_texts_of_each_alone(variant: str, options: dict[str, Any]) -> None:
    model = small_model(**VARIANTS[variant]).double().eval()
    wanted = TextOptions(length=25, **options)
    together = model.continue_texts(PROMPTS, wanted, generator=[seeded(i) for i in range(5)]).texts
    alone = [model.continue_texts([p], wanted, generator=[seeded(i)]).texts[0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert all(text.startswith(prompt) for text, prompt in zip(together, PROMPTS, strict=True))


def test_sampling_does_not_run_compiled_code() -> None:
    """Each length of a prompt would be compiled anew."""
    model = small_model().eval()
    wanted = model.draw(2, TextOptions(length=20), generator=seeded(0)).texts
    counted = []

    def backend(graph, inputs):
        counted.append(graph)
        return graph

    model.compile(backend=backend)
    assert model.draw(2, TextOptions(length=20), generator=seeded(0)).texts == wanted
    assert not counted
    model(random_tokens(2, 8))
    assert counted
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 0.0}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0.0, 0.0]),
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0.0, 0.0]),
        ({"top_p": 0.01}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_p": 0.8}, [4 / 9, 3 / 9, 2 / 9, 0.0]),
        ({"top_k": 3, "top_p": 0.4}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_k": 2, "top_p": 0.6}, [4 / 7, 3 / 7, 0.0, 0.0]),
    ],
    ids=str,
)
def test_choices_have_the_probabilities_of_the_options(options: dict[str, float], wanted: list[float]) -> None:
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[order].expand(40000, -1)
    chosen = choose(logits, TextOptions(**options), seeded(0))  # type: ignore[arg-type]
    assert chosen.shape == (40000, 1)
    share = torch.bincount(chosen[:, 0], minlength=4) / 40000
    expected = torch.tensor(wanted)[order]
    assert ((share > 0) == (expected > 0)).all()
    torch.testing.assert_close(share, expected, rtol=0, atol=0.012)


# --------------------------------------------------------------------------------------------------
# Errors and files

CONFIG_ERRORS = {
    "no characters": ({"vocabulary": ""}, "vocabulary: expected characters in a string, or a list of strings, got ''"),
    "a number": ({"vocabulary": [1]}, r"vocabulary: expected characters in a string, .*got \[1\]"),
    "a character twice": ({"vocabulary": "abcab"}, "vocabulary: expected distinct items, got 'a', 'b' more than once"),
    "a character missing": (
        {"vocabulary": ["a", "ab"]},
        "vocabulary: expected every character of its items as an item, got none for 'b'",
    ),
    "a negative window": ({"window": -1}, "window: expected an integer >= 0, got -1"),
    "no segments": ({"segments": 0}, "segments: expected a positive integer, got 0"),
    "a window over segments": ({"segments": 2, "window": 4}, "window: expected 0 with segments = 2, got 4"),
    "no context": ({"context": 0}, "context: expected a positive integer, got 0"),
    "heads that do not divide": (
        {"width": 20, "num_heads": 3},
        "width: expected an even multiple of num_heads = 3, got 20",
    ),
    "heads of odd size": ({"width": 9, "num_heads": 3}, "width: expected an even multiple of num_heads = 3, got 9"),
    "a negative mlp": ({"mlp_width": -1}, "mlp_width: expected an integer >= 0, got -1"),
    "an unknown activation": ({"activation": "relu"}, r"activation: expected one of gelu, swiglu, got 'relu'"),
    "certain dropout": ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    "negative decay": ({"weight_decay": -0.1}, "weight_decay: expected a number >= 0, got -0.1"),
}
OPTION_ERRORS = {
    "a prompt of bytes": ({"prompt": b"a"}, "prompt: expected a string, got bytes"),
    "no length": ({"length": 0}, "length: expected a positive integer, got 0"),
    "negative temperature": ({"temperature": -1.0}, "temperature: expected a number >= 0, got -1.0"),
    "temperature NaN": ({"temperature": math.nan}, "temperature: .*got nan"),
    "negative top_k": ({"top_k": -1}, "top_k: expected an integer >= 0, got -1"),
    "top_p of 0": ({"top_p": 0.0}, r"top_p: expected a probability in \(0, 1\], got 0.0"),
}


@pytest.mark.parametrize("mistake", [*CONFIG_ERRORS, *OPTION_ERRORS])
def test_invalid_configs_and_sampling_options_raise_an_error_that_names_the_option(mistake: str) -> None:
    options, message = {**CONFIG_ERRORS, **OPTION_ERRORS}[mistake]
    with pytest.raises(ValueError, match=f"^{message}"):
        (TransformerLMConfig if mistake in CONFIG_ERRORS else TextOptions)(**options)  # type: ignore[arg-type]


CALL_ERRORS = {
    "unknown characters": (
        lambda model: model.draw(1, TextOptions(prompt="bad zoo!")),
        ValueError,
        "^prompt: expected characters of the vocabulary, got '!', 'o', 'z'$",
    ),
    "one prompt": (
        lambda model: model.continue_texts("ab"),
        ValueError,
        "^prompts: expected a list of strings, got 'ab'",
    ),
    "another number of generators": (
        lambda model: model.continue_texts(["a", "b"], generator=[seeded(0)]),
        ValueError,
        "^generator: expected one, or one for each of 2 prompts, got 1",
    ),
    "floating tokens": (
        lambda model: model(torch.zeros(2, 3)),
        TypeError,
        "^tokens: expected an int64 tensor, got torch.float32",
    ),
    "more tokens than the context": (
        lambda model: model(random_tokens(2, 9)),
        ValueError,
        r"^tokens: expected \(B, N\) with N from 1 to context = 8, got \(2, 9\)",
    ),
    "an item of another length": (
        lambda model: model.loss("text", {"tokens": random_tokens(2, 8)}, NOW),
        ValueError,
        r"^tokens: expected shape \(B, segments \* context \+ 1\) = \(2, 9\), got \(2, 8\)",
    ),
}


@pytest.mark.parametrize("mistake", CALL_ERRORS)
def test_invalid_arguments_raise_an_error_that_names_the_argument(mistake: str) -> None:
    call, error, message = CALL_ERRORS[mistake]
    with pytest.raises(error, match=message):
        call(small_model().eval())


def test_vocabulary_comes_from_the_data_and_length_from_the_model() -> None:
    assert from_data(TransformerLMConfig) == ["vocabulary"]
    assert TransformerLMConfig(context=31).data_options() == {"length": 32}
    assert TransformerLMConfig(context=31, segments=3).data_options() == {"length": 94}


def test_blocks_are_named_for_sharding() -> None:
    (name,) = TransformerLM.blocks
    blocks = [m for m in small_model(depth=3).modules() if type(m).__name__ == name]
    assert len(blocks) == 3


def test_mlp_width() -> None:
    assert [TransformerLMConfig(width=48, num_heads=2, **o).hidden_dim for o in ({}, {"mlp_width": 5})] == [192, 5]
    gated = small_model(width=48, activation="swiglu")
    plain = small_model(width=48)
    sizes = [sum(p.numel() for p in m.decoder[0].parameters()) for m in (gated, plain)]
    assert sizes[0] == sizes[1]


def test_examples_in_docstrings_run() -> None:
    results = doctest.testmod(transformer_lm, extraglobs={"torch": torch})
    assert results.attempted
    assert results.failed == 0


def test_a_block_equals_plain_pytorch() -> None:
    """RoPE by complex numbers, torch's RMSNorm and attention."""
    model = small_model(depth=1).double().eval()
    (block,) = model.decoder
    tokens = random_tokens(3, 8)
    x = model.embedding(tokens)
    parts = F.linear(F.rms_norm(x, (16,), block.attention_norm.weight, 1e-6), block.qkv.weight).chunk(3, -1)
    q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in parts)
    angles = torch.outer(torch.arange(8).double(), 10000.0 ** -(torch.arange(0, 8, 2).double() / 8))

    def normalized_and_rotated(heads: Tensor, weight: Tensor) -> Tensor:
        a, b = F.rms_norm(heads, (8,), weight, 1e-6).chunk(2, -1)
        rotated = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((rotated.real, rotated.imag), -1)

    q, k = normalized_and_rotated(q, block.query_norm), normalized_and_rotated(k, block.key_norm)
    x = x + F.linear(
        F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2), block.merge.weight
    )
    hidden = F.gelu(F.linear(F.rms_norm(x, (16,), block.mlp_norm.weight, 1e-6), block.mlp_in.weight))
    x = F.rms_norm(x + F.linear(hidden, block.mlp_out.weight), (16,), model.norm.weight, 1e-6)
    torch.testing.assert_close(model(tokens), F.linear(x, model.embedding.weight), rtol=1e-6, atol=1e-7)
