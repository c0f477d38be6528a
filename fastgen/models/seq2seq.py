"""An encoder-decoder Transformer that maps one sequence to another.

Vaswani et al., "Attention is all you need" (2017): an encoder reads the source; a decoder generates the target token by
token and attends to the encoder's output, the memory. Blocks are pre-norm (Xiong et al., "On layer normalization in the
Transformer architecture", 2020); tokens have learned position embeddings, and self-attention has rotary embeddings (Su
et al., "RoFormer", 2021):

    source -> embedding -> [x + attention(norm(x)); x + mlp(norm(x))] * depth -> norm -> memory
    target -> embedding -> [x + causal attention(norm(x)); x + attention(norm(x), memory); x + mlp(norm(x))] * depth
           -> norm -> logits

Training uses teacher forcing; the loss is the cross-entropy of the next token, in nats per token. Padding is masked and
ignored by the loss. Targets are decoded greedily, by sampling, or by beam search (``decoding.beam_search``).

In this file: config, blocks, network and loss, decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import functional
from fastgen.batch import (
    END,
    FIRST,
    NEVER_IGNORED,
    PADDING,
    START,
    can_read_values,
    detokenize,
    require_characters,
    require_known,
    require_tokens,
    takes_old_names,
)
from fastgen.checks import (
    require_count,
    require_not_negative,
    require_positive,
    require_positive_number,
    require_probability,
    require_shape,
)
from fastgen.functional._autocast import autocast_dtype
from fastgen.models.base import Batch, GenerativeModel, Phase, Samples, StepContext, Texts, option, upcast
from fastgen.models.decoding import beam_search
from fastgen.models.registry import register_model
from fastgen.nn import KVCache, RotaryEmbedding
from fastgen.nn._sublayers import embed, merge_heads, project_heads

LETTERS = "abcdefghijklmnopqrstuvwxyz"
Tables = tuple[Tensor, Tensor]
"""cos and sin of rotary embeddings."""


@takes_old_names
@dataclass(frozen=True)
class Seq2SeqConfig:
    """Configuration of a ``Seq2Seq``.

    Raises:
        ValueError: an option out of range.
    """

    renamed: ClassVar = {"heads": "num_heads"}

    vocabulary: str = option(LETTERS, "characters; token 3 + i is character i", from_data=True)
    source_length: int = option(14, "number of tokens of the longest source, with start and end", from_data=True)
    target_length: int = option(14, "number of tokens of the longest target, with start and end", from_data=True)
    width: int = option(96, "embedding dimension")
    num_heads: int = option(4, "number of attention heads")
    encoder_depth: int = option(2, "number of encoder blocks")
    decoder_depth: int = option(2, "number of decoder blocks")
    mlp_width: int = option(0, "hidden dimension of the MLP; 0: 4 times the width")
    dropout: float = option(0.0, "dropout probability, in attention and after each branch")
    learning_rate: float = option(2e-3, "AdamW learning rate")
    weight_decay: float = option(0.1, "AdamW weight decay, on all weights")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.98, "AdamW beta2")

    def __post_init__(self) -> None:
        require_characters(self.vocabulary)
        for name in ("source_length", "target_length"):
            require_positive(name, getattr(self, name))
            if getattr(self, name) < 3:
                raise ValueError(f"{name}: expected 3 or more: start, a character, end, got {getattr(self, name)}")
        for name in ("width", "num_heads", "encoder_depth", "decoder_depth"):
            require_positive(name, getattr(self, name))
        if self.width % self.num_heads != 0 or self.width // self.num_heads % 2 != 0:
            raise ValueError(f"width: expected an even multiple of num_heads = {self.num_heads}, got {self.width}")
        require_count("mlp_width", self.mlp_width, 0)
        for name in ("dropout", "beta1", "beta2"):
            require_probability(name, getattr(self, name))
        require_positive_number(learning_rate=self.learning_rate)
        require_not_negative(weight_decay=self.weight_decay)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def tokens(self) -> int:
        """Number of tokens: padding, start, end and the characters."""
        return FIRST + len(self.vocabulary)


@takes_old_names
@dataclass(frozen=True)
class DecodingOptions:
    """Decoding options of a ``Seq2Seq``.

    Raises:
        ValueError: an option out of range, or several beams with a temperature.
    """

    renamed: ClassVar = {"beams": "num_beams"}

    source: str = option("", "source to decode, for every sample; empty: random strings of the vocabulary")
    num_beams: int = option(1, "number of beams of beam search; 1: greedy")
    temperature: float = option(0.0, "sampling temperature; 0: greedy or beam search")

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise ValueError(f"source: expected a string, got {type(self.source).__name__}")
        require_positive("num_beams", self.num_beams)
        require_not_negative(temperature=self.temperature)
        if self.temperature and self.num_beams > 1:
            raise ValueError(f"num_beams: expected 1 with a temperature above 0, got {self.num_beams}")


class DecoderCache:
    """Keys and values of a decoder block: of the target so far, and of the memory once they are projected."""

    def __init__(self, target: KVCache) -> None:
        self.target = target
        self.memory: tuple[Tensor, ...] = ()


class EncoderBlock(nn.Module):
    """Pre-norm Transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: width, heads, head_dim, mlp_width (0: 4 times the width) and dropout.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_width or 4 * config.width
        self.heads, self.head_dim, self.dropout = config.num_heads, config.head_dim, config.dropout
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp_in = nn.Linear(width, hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, rotary: Tables, mask: Tensor) -> Tensor:
        """x (B, S, width) -> (B, S, width). ``mask`` (B, 1, 1, S): False for padding."""
        query, key, value = self._project("qkv", self.attention_norm(x), 3, rotary)
        heads = functional.scaled_dot_product_attention(query, key, value, mask, self._p())
        return self._add_mlp(self._add_heads(x, cast(Tensor, heads), "merge"))

    def _p(self) -> float:
        return self.dropout if self.training else 0.0

    def _project(self, name: str, x: Tensor, count: int, rotary: Tables | None = None) -> tuple[Tensor, ...]:
        """``count`` tensors of heads (B, heads, N, head_dim), the first two with RoPE if there are tables."""
        return project_heads(
            self, (name,), x, heads=(self.heads,) * count, head_dims=(self.head_dim,) * count, rotary=rotary
        )

    def _add_heads(self, x: Tensor, heads: Tensor, merge: str) -> Tensor:
        if self._p():
            return x + F.dropout(merge_heads(self, merge, heads), self._p())
        return merge_heads(self, merge, heads, residual=x)

    def _add_mlp(self, x: Tensor) -> Tensor:
        branch: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + F.dropout(branch, self._p())


class DecoderBlock(EncoderBlock):
    """Pre-norm block with cross-attention: x + causal attention, x + attention to the memory, then x + mlp(norm(x))."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.width
        self.memory_norm = nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.memory_merge = nn.Linear(width, width, bias=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, rotary: Tables, mask: Tensor, memory: Tensor, cache: DecoderCache | None = None
    ) -> Tensor:
        """x (B, T, width) -> (B, T, width).

        Args:
            mask: (B, 1, 1, S), False for padding of the memory.
            memory: (B, S, width), the encoder's output.
            cache: keys and values of the tokens before x, to which those of x are appended.
        """
        query, key, value = self._project("qkv", self.attention_norm(x), 3, rotary)
        if cache is None:
            heads = functional.scaled_dot_product_attention(query, key, value, None, self._p(), is_causal=True)
        else:
            keys, values, target_mask = cache.target.update(key, value)
            heads = functional.scaled_dot_product_attention(query, keys, values, target_mask)
        x = self._add_heads(x, cast(Tensor, heads), "merge")

        (query,) = self._project("query", self.memory_norm(x), 1)
        key_value = cache.memory if cache is not None else ()
        if not key_value:
            key_value = self._project("key_value", memory, 2)
        if cache is not None:
            cache.memory = key_value
        key, value = key_value
        heads = functional.scaled_dot_product_attention(query, key, value, mask, self._p())
        return self._add_mlp(self._add_heads(x, cast(Tensor, heads), "memory_merge"))


@register_model
class Seq2Seq(GenerativeModel):
    """Encoder-decoder Transformer over characters, with greedy decoding, sampling and beam search.

    Sources are (B, source_length), targets (B, target_length) int64: 1, characters from 3 on, 2, then padding with 0.

    Example:
        >>> model = Seq2Seq(Seq2SeqConfig(vocabulary="abc", source_length=6, target_length=5, width=16, num_heads=2))
        >>> model.decode(torch.tensor([[1, 3, 4, 2, 0, 0]]), DecodingOptions(num_beams=2)).shape
        torch.Size([1, 5])
        >>> model.draw(2, DecodingOptions(source="ab")).texts[0][:5]
        'ab ->'
    """

    name, summary, kind = "seq2seq", "encoder-decoder Transformer over pairs of sequences", "sequences"
    default_data = "reversal"
    config_class, sampling_class = Seq2SeqConfig, DecodingOptions
    train_defaults: ClassVar = {
        "steps": 1500,
        "batch_size": 128,
        "schedule": "cosine",
        "warmup": 100,
        "clip": 1.0,
        "average_decay": 0.998,
    }
    blocks = ("EncoderBlock", "DecoderBlock")
    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.tokens, config.width)
        self.source_positions = nn.Parameter(torch.empty(config.source_length, config.width))
        self.target_positions = nn.Parameter(torch.empty(config.target_length, config.width))
        self.rotary = RotaryEmbedding(config.head_dim)
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_depth))
        self.memory_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self._init_weights()

    def _init_weights(self) -> None:
        """Matrices from N(0, 1 / width); those that end one of n residual branches are scaled by 1 / sqrt(n)."""
        config = self.config
        std = config.width**-0.5
        for name, parameter in self.named_parameters():
            branches = 2 * config.encoder_depth if name.startswith("encoder") else 3 * config.decoder_depth
            if parameter.dim() == 2:
                residual = name.endswith(("merge.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=std * branches**-0.5 if residual else std)

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        return (Phase("target", (), config.learning_rate, (config.beta1, config.beta2), config.weight_decay),)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, N, tokens) of the token after each token of the target.

        Args:
            source: (B, source_length) int64.
            target: (B, N) int64, N at most target_length; begins with the start token.

        Raises:
            TypeError: not int64 tensors. ValueError: other shapes.
        """
        return self._decode(target, *self._encode(source))

    def _encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The memory (B, S, width), and its mask (B, 1, 1, S), False for padding."""
        _require_tokens("source", source, self.config.source_length, self.config.tokens, exact=True)
        mask = (source != PADDING)[:, None, None]
        x, _ = self._embed(source, self.source_positions)
        rotary = self._tables(source.size(1), x)
        for block in self.encoder:
            x = block(x, rotary, mask)
        return self.memory_norm(x), mask

    def _decode(self, target: Tensor, memory: Tensor, mask: Tensor, caches: list[DecoderCache] | None = None) -> Tensor:
        _require_tokens("target", target, self.config.target_length, self.config.tokens)
        if caches is None:
            x, table = self._embed(target, self.target_positions[: target.size(1)])
            rotary = self._tables(target.size(1), x)
        else:
            positions = caches[0].target.positions(target.size(1))
            x, table = self._embed(target, self.target_positions[positions])
            cos, sin = self._tables(self.config.target_length, x)
            rotary = cos[positions], sin[positions]
        for i, block in enumerate(self.decoder):
            x = block(x, rotary, mask, memory, None if caches is None else caches[i])
        return F.linear(self.norm(x), table)

    def _embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded tokens (B, N, width), and the embedding table (tokens, width), which the logits share."""
        x, table = embed(self.embedding, tokens, self.config.tokens)
        x = x + positions
        return F.dropout(x, self.config.dropout) if self.training and self.config.dropout else x, table

    def _tables(self, length: int, x: Tensor) -> Tables:
        return self.rotary.tables(length, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """For each token after the start, (B, T - 1): -log p; whether it is not padding; whether it is the argmax."""
        target = batch["target"]
        _require_tokens("target", target, self.config.target_length, self.config.tokens, exact=True)
        logits, next_token = self(batch["source"], target[:, :-1]), target[:, 1:]
        logits = upcast(logits)
        nll = F.cross_entropy(logits.flatten(0, 1), next_token.flatten(), reduction="none", ignore_index=NEVER_IGNORED)
        counted = next_token != PADDING
        if can_read_values(counted) and not bool(counted.any()):
            raise ValueError("target: expected at least one token after the start, got nothing but padding")
        return nll.view(next_token.shape), counted, logits.argmax(2) == next_token

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss: nats per token. accuracy: share of tokens that are the argmax, with teacher forcing."""
        nll, counted, correct = self._predict(batch)
        total = counted.sum()
        return {"loss": nll.where(counted, 0).sum() / total, "accuracy": (correct & counted).sum() / total}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """nll (B,): nats of a target. tokens (B,): its number of tokens. exact (B,): 1 if greedy decoding returns it,
        otherwise 0.
        """
        nll, counted, _ = self._predict(batch)
        exact = (self.decode(batch["source"]) == batch["target"]).all(1)
        return {
            "nll": nll.where(counted, 0).sum(1),
            "tokens": counted.sum(1).to(nll.dtype),
            "exact": exact.to(nll.dtype),
        }

    @torch.no_grad()
    def decode(
        self, source: Tensor, options: DecodingOptions | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Decodes the target of each source, (B, target_length) int64, padded; one that is too long has no end token.

        Args:
            source: (B, source_length) int64.
            options: num_beams and temperature; default greedy.
            generator: random number generator for a temperature above 0. A CPU generator serves every device.

        Raises:
            TypeError: source is not an int64 tensor. ValueError: it has another shape.
        """
        options = options or DecodingOptions()
        was_training = self.training
        self.eval()
        try:
            return self._search(source, options, generator)
        finally:
            self.train(was_training)

    def _search(self, source: Tensor, options: DecodingOptions, generator: torch.Generator | None) -> Tensor:
        memory, mask = (part.repeat_interleave(options.num_beams, 0) for part in self._encode(source))
        caches = self._caches(len(memory))

        def reorder(rows: Tensor) -> None:  # beams share their source, hence the memory
            for cache in caches:
                cache.target.reorder(rows)

        return beam_search(
            lambda text: self._next_logits(text, memory, mask, caches),
            reorder,
            len(source),
            self.config.target_length,
            special=(PADDING, START, END),
            num_beams=options.num_beams,
            temperature=options.temperature,
            generator=generator,
            device=source.device,
        )

    def _next_logits(self, text: Tensor, memory: Tensor, mask: Tensor, caches: list[DecoderCache]) -> Tensor:
        """Logits (B, tokens) of the token after ``text`` (B, N), whose first N - 1 tokens are in the caches."""
        return self._decode(text[:, -1:], memory, mask, caches)[:, -1]

    def _caches(self, batch: int) -> list[DecoderCache]:
        config, weight = self.config, next(self.parameters())
        device = weight.device
        dtype = autocast_dtype(weight) or weight.dtype
        sizes = (batch, config.num_heads, config.target_length, config.head_dim)
        return [DecoderCache(KVCache(*sizes, device=device, dtype=dtype)) for _ in range(config.decoder_depth)]

    @torch.no_grad()
    def draw(self, n: int, options: DecodingOptions, *, generator: torch.Generator | None = None) -> Texts:
        """Samples n texts "source -> target". Random sources have between a third and all of the longest length.

        Raises:
            ValueError: n is not positive, or the source is too long or has characters that the vocabulary lacks.
        """
        require_positive("n", n)
        config = self.config
        longest = config.source_length - 2
        require_known("source", options.source, config.vocabulary)
        if len(options.source) > longest:
            raise ValueError(
                f"source: expected at most {longest} characters, as in the training data, got {len(options.source)}"
            )
        if options.source:
            characters = torch.tensor([config.vocabulary.index(c) for c in options.source]) + FIRST
            source = F.pad(characters, (1, 1 + longest - len(characters)))[None].repeat(n, 1)
            lengths = torch.full((n, 1), len(characters))
        else:
            device = "cpu" if generator is None else generator.device
            lengths = torch.randint(-(-longest // 3), longest + 1, (n, 1), generator=generator, device=device)
            source = torch.randint(FIRST, config.tokens, (n, longest + 2), generator=generator, device=device)
        column = torch.arange(longest + 2, device=source.device)
        source = source.masked_fill(column > lengths, PADDING).masked_fill(column == lengths + 1, END)
        source[:, 0] = START
        target = self.decode(source.to(self.device), options, generator=generator)
        sides = ([detokenize(tokens, config.vocabulary) for tokens in side] for side in (source, target))
        return Texts([f"{a} -> {b}" for a, b in zip(*sides, strict=True)])

    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Held-out sources, their targets, and the greedily decoded ones."""
        rows = {"source": batch["source"], "expected": batch["target"], "decoded": self.decode(batch["source"])}
        lines = [
            [f"{name:9}{detokenize(tokens, self.config.vocabulary)}" for tokens in side] for name, side in rows.items()
        ]
        return {"decoded": Texts(["\n".join(item) for item in zip(*lines, strict=True)])}


def _require_tokens(name: str, tokens: Tensor, length: int, count: int, *, exact: bool = False) -> None:
    require_tokens(name, tokens, count)
    if exact:
        require_shape(name, tokens, (*tokens.shape[:1], length), f"(B, {name}_length)")
    elif tokens.dim() != 2 or not 1 <= tokens.size(1) <= length:
        raise ValueError(
            f"{name}: expected (B, N) with N from 1 to {name}_length = {length}, got {tuple(tokens.shape)}"
        )
