"""A Transformer that turns a sequence into another.

Vaswani et al., "Attention is all you need" (2017): an encoder reads the source, a decoder writes the target token by
token and looks at what the encoder made of the source. Branches normalise before they compute (Xiong et al., "On layer
normalization in the Transformer architecture", 2020); tokens carry a learned vector of their position, and in
self-attention queries and keys are turned by it (Su et al., "RoFormer", 2021):

    source -> embedding -> [x + attention(norm(x)); x + mlp(norm(x))] * depth -> norm -> memory
    target -> embedding -> [x + causal attention(norm(x)); x + attention(norm(x), memory); x + mlp(norm(x))] * depth
           -> norm -> logits

It learns with the true target before each token (teacher forcing); the loss is the cross-entropy of the next token, in
nats per token. Padding is seen by nobody and counts for nothing. The blocks are in ``_encoder_decoder.py``, how targets
are written in ``_beams.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.batch import NEVER_IGNORED, readable, require_tokens
from fastgen.checks import (
    require_count,
    require_not_negative,
    require_positive,
    require_positive_number,
    require_probability,
    require_shape,
)
from fastgen.models._beams import DecodingOptions, search
from fastgen.models._encoder_decoder import BlockCache, DecoderBlock, EncoderBlock, Tables
from fastgen.models._tokens import END, FIRST, PADDING, START, require_known, require_vocabulary, spell
from fastgen.models.base import Batch, GenerativeModel, Phase, Samples, StepContext, Texts, option
from fastgen.nn import KVCache, RotaryEmbedding
from fastgen.nn._sublayers import embed

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes of a Seq2Seq and how it learns. ValueError names the field, what was expected and what came."""

    vocabulary: str = option(LETTERS, "the characters; token 3 + i is character i", from_data=True)
    source_length: int = option(14, "tokens of the longest source, start and end included", from_data=True)
    target_length: int = option(14, "tokens of the longest target, start and end included", from_data=True)
    width: int = option(96, "channels of a token")
    heads: int = option(4, "heads of attention")
    encoder_depth: int = option(2, "blocks of the encoder")
    decoder_depth: int = option(2, "blocks of the decoder")
    mlp_width: int = option(0, "units of a block's mlp; 0: 4 times the width")
    dropout: float = option(0.0, "probability of dropping, in attention and after each branch")
    learning_rate: float = option(2e-3, "of AdamW")
    weight_decay: float = option(0.1, "of AdamW, on all weights")
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.98, "of AdamW")

    def __post_init__(self) -> None:
        require_vocabulary(self.vocabulary)
        for name in ("source_length", "target_length"):
            require_positive(name, getattr(self, name))
            if getattr(self, name) < 3:
                raise ValueError(f"{name}: expected 3 or more: start, a character, end, got {getattr(self, name)}")
        for name in ("width", "heads", "encoder_depth", "decoder_depth"):
            require_positive(name, getattr(self, name))
        if self.width % self.heads != 0 or self.width // self.heads % 2 != 0:
            raise ValueError(f"width: expected an even multiple of heads = {self.heads}, got {self.width}")
        require_count("mlp_width", self.mlp_width, 0)
        for name in ("dropout", "beta1", "beta2"):
            require_probability(name, getattr(self, name))
        require_positive_number(learning_rate=self.learning_rate)
        require_not_negative(weight_decay=self.weight_decay)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """Different tokens: padding, start, end and the characters."""
        return FIRST + len(self.vocabulary)


class Seq2Seq(GenerativeModel):
    """The model described at the top of this file.

    Sources are (B, source_length), targets (B, target_length) int64: 1, characters from 3 on, 2, then padding with 0.

    Example:
        >>> model = Seq2Seq(Seq2SeqConfig(vocabulary="abc", source_length=6, target_length=5, width=16, heads=2))
        >>> model.decode(torch.tensor([[1, 3, 4, 2, 0, 0]]), DecodingOptions(beams=2)).shape
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
        self._initialise()

    def _initialise(self) -> None:
        """N(0, 1 / width); what is added to the residual stream is smaller by the root of how often that is done."""
        config = self.config
        std = config.width**-0.5
        for name, parameter in self.named_parameters():
            added = 2 * config.encoder_depth if name.startswith("encoder") else 3 * config.decoder_depth
            if parameter.dim() == 2:
                ends = name.endswith(("merge.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=std * added**-0.5 if ends else std)

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        return (Phase("target", (), config.learning_rate, (config.beta1, config.beta2), config.weight_decay),)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (B, N, tokens) of the token after each of the target.

        Args:
            source: (B, source_length) int64. target: (B, N) int64, N at most target_length; begins with the start.

        Raises:
            TypeError: not int64 tensors. ValueError: other shapes.
        """
        return self._decode(target, *self._encode(source))

    def _encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The memory (B, S, width), and which of it is no padding (B, 1, 1, S)."""
        _require_tokens("source", source, self.config.source_length, self.config.tokens, exact=True)
        visible = (source != PADDING)[:, None, None]
        x, _ = self._embed(source, self.source_positions)
        tables = self._tables(source.size(1), x)
        for block in self.encoder:
            x = block(x, tables, visible)
        return self.memory_norm(x), visible

    def _decode(
        self, target: Tensor, memory: Tensor, visible: Tensor, caches: list[BlockCache] | None = None
    ) -> Tensor:
        _require_tokens("target", target, self.config.target_length, self.config.tokens)
        if caches is None:
            x, table = self._embed(target, self.target_positions[: target.size(1)])
            tables = self._tables(target.size(1), x)
        else:
            positions = caches[0].target.positions(target.size(1))
            x, table = self._embed(target, self.target_positions[positions])
            cos, sin = self._tables(self.config.target_length, x)
            tables = cos[positions], sin[positions]
        for i, block in enumerate(self.decoder):
            x = block(x, tables, visible, memory, None if caches is None else caches[i])
        return F.linear(self.norm(x), table)

    def _embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, width) of the tokens, and (tokens, width) of all there are."""
        x, table = embed(self.embedding, tokens, self.config.tokens)
        x = x + positions
        return F.dropout(x, self.config.dropout) if self.training and self.config.dropout else x, table

    def _tables(self, length: int, x: Tensor) -> Tables:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self.rotary.tables(length, device=x.device, dtype=dtype)

    def _judge(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token after the start, (B, T - 1): -log p; whether it is no padding; whether it is the likeliest."""
        target = batch["target"]
        _require_tokens("target", target, self.config.target_length, self.config.tokens, exact=True)
        logits, wanted = self(batch["source"], target[:, :-1]), target[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=NEVER_IGNORED)
        counts = wanted != PADDING
        if readable(counts) and not bool(counts.any()):
            raise ValueError("target: expected at least one token after the start, got nothing but padding")
        return nll.view(wanted.shape), counts, logits.argmax(2) == wanted

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss: nats per token. accuracy: share of tokens that are the likeliest, given the true ones before."""
        nll, counts, right = self._judge(batch)
        total = counts.sum()
        return {"loss": nll.where(counts, 0).sum() / total, "accuracy": (right & counts).sum() / total}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """nll (B,): nats of a target. tokens (B,): its tokens. exact (B,): 1 where greedy decoding gives it, else 0."""
        nll, counts, _ = self._judge(batch)
        exact = (self.decode(batch["source"]) == batch["target"]).all(1)
        return {"nll": nll.where(counts, 0).sum(1), "tokens": counts.sum(1).to(nll.dtype), "exact": exact.to(nll.dtype)}

    @torch.no_grad()
    def decode(
        self, source: Tensor, options: DecodingOptions | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The target of each source, (B, target_length) int64, padded; one too long has no end.

        Args:
            source: (B, source_length) int64.
            options: beams and temperature; default greedy.
            generator: of the noise where there is a temperature. A CPU generator serves every device.

        Raises:
            TypeError: no int64 tensor. ValueError: another shape.
        """
        options = options or DecodingOptions()
        was_training = self.training
        self.eval()
        try:
            return self._search(source, options, generator)
        finally:
            self.train(was_training)

    def _search(self, source: Tensor, options: DecodingOptions, generator: torch.Generator | None) -> Tensor:
        memory, visible = (part.repeat_interleave(options.beams, 0) for part in self._encode(source))
        caches = self._caches(len(memory))

        def next_logits(text: Tensor) -> Tensor:
            return self._next_logits(text, memory, visible, caches)

        def reorder(rows: Tensor) -> None:
            for cache in caches:
                cache.target.reorder(rows)

        sizes = (len(source), self.config.target_length)
        return search(next_logits, reorder, *sizes, options, generator, source.device)

    def _next_logits(self, text: Tensor, memory: Tensor, visible: Tensor, caches: list[BlockCache]) -> Tensor:
        """(B, tokens), of the token after ``text`` (B, N), all but whose last token the caches have seen."""
        return self._decode(text[:, -1:], memory, visible, caches)[:, -1]

    def _caches(self, batch: int) -> list[BlockCache]:
        config, weight = self.config, next(self.parameters())
        device = weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        sizes = (batch, config.heads, config.target_length, config.head_dim)
        return [BlockCache(KVCache(*sizes, device=device, dtype=dtype)) for _ in range(config.decoder_depth)]

    @torch.no_grad()
    def draw(self, n: int, options: DecodingOptions, *, generator: torch.Generator | None = None) -> Texts:
        """n texts "source -> target". Random sources have a third of the longest length up to all of it.

        Raises:
            ValueError: n is not positive, or the source is too long or has characters that the vocabulary lacks.
        """
        require_positive("n", n)
        config = self.config
        longest = config.source_length - 2
        require_known("source", options.source, config.vocabulary)
        if len(options.source) > longest:
            raise ValueError(
                f"source: expected at most {longest} characters, as in the data that the model learnt from, got"
                f" {len(options.source)}"
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
        sides = ([spell(tokens, config.vocabulary) for tokens in side] for side in (source, target))
        return Texts([f"{a} -> {b}" for a, b in zip(*sides, strict=True)])

    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Held-out sources, their targets, and what greedy decoding makes of them."""
        rows = {"source": batch["source"], "expected": batch["target"], "decoded": self.decode(batch["source"])}
        lines = [[f"{name:9}{spell(tokens, self.config.vocabulary)}" for tokens in side] for name, side in rows.items()]
        return {"decoded": Texts(["\n".join(item) for item in zip(*lines, strict=True)])}


def _require_tokens(name: str, tokens: Tensor, length: int, count: int, *, exact: bool = False) -> None:
    require_tokens(name, tokens, count)
    if exact:
        require_shape(name, tokens, (*tokens.shape[:1], length), f"(B, {name}_length)")
    elif tokens.dim() != 2 or not 1 <= tokens.size(1) <= length:
        raise ValueError(
            f"{name}: expected (B, N) with N from 1 to {name}_length = {length}, got {tuple(tokens.shape)}"
        )
