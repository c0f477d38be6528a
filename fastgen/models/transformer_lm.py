"""A decoder-only Transformer over text.

A text's probability is the product of the probabilities of its tokens, characters or longer strings, each given those
before it, up to a context of fixed length. Blocks normalise before they compute (Radford et al., "Language models are
unsupervised multitask learners", 2019); positions are rotations of queries and keys (Su et al., "RoFormer", 2021):

    tokens -> embedding -> [x + attention(norm(x)); x + mlp(norm(x))] * depth -> norm -> logits

The loss is the cross-entropy of the next token, in nats per token. Two options reach further than the context:

    window: in every block a token sees so many before its own (Beltagy et al., "Longformer", 2020), so that the past
        it depends on, and what is kept of it, are bounded while the text goes on
    segments: the text is read in segments of the context's length, and in every block a token also sees what the
        segment before had there, through which no gradient flows (Dai et al., "Transformer-XL", 2019)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.batch import NEVER_IGNORED, require_tokens
from fastgen.checks import (
    require_choice,
    require_count,
    require_not_negative,
    require_positive,
    require_probability,
)
from fastgen.models import decoding
from fastgen.models._decoder import DecoderBlock, Past, Tables, drawing, initialise_decoder
from fastgen.models.base import Batch, GenerativeModel, Phase, StepContext, Texts, option
from fastgen.models.decoding import Chooser, Noise, require_top_p
from fastgen.nn import RotaryEmbedding
from fastgen.nn._buffers import ComputedBuffers
from fastgen.nn._sublayers import embed
from fastgen.vocabulary import Vocabulary, checked_vocabulary, tokenise

Activation = Literal["gelu", "swiglu"]
Position = TypeVar("Position", int, Tensor)

PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))
LEARNING_RATE = 3e-3
LEAST_ROOM = 64  # slots beyond the reach, so that keys seldom move


@dataclass(frozen=True)
class TransformerLMConfig:
    """Sizes of a TransformerLM and how it learns. ValueError names the field, what was expected and what came."""

    vocabulary: Vocabulary = option(PRINTABLE, "characters, or strings; token i is item i", from_data=True)
    context: int = option(128, "tokens that a prediction may depend on")
    window: int = option(0, "tokens before its own that one sees in a block; 0: all of the context")
    segments: int = option(1, "of an item, each as long as the context; of several, each sees what the last one had")
    width: int = option(160, "channels of a token")
    depth: int = option(4, "blocks")
    heads: int = option(5, "heads of attention")
    mlp_width: int = option(0, "units of a block's mlp; 0: 4 times the width, 8/3 for swiglu")
    activation: Activation = option("gelu", "of the mlp")
    normalise_heads: bool = option(True, "RMS-normalise queries and keys")
    tied: bool = option(True, "one matrix for embedding and logits")
    dropout: float = option(0.0, "probability of dropping, in attention and after each branch")
    weight_decay: float = option(0.1, "of AdamW, on all weights")
    beta1: float = option(0.9, "of AdamW")
    beta2: float = option(0.99, "of AdamW")

    def __post_init__(self) -> None:
        for name in ("context", "segments", "width", "depth", "heads"):
            require_positive(name, getattr(self, name))
        object.__setattr__(self, "vocabulary", checked_vocabulary(self.vocabulary))
        if self.width % self.heads != 0 or self.width // self.heads % 2 != 0:
            raise ValueError(f"width: expected an even multiple of heads = {self.heads}, got {self.width}")
        for name in ("window", "mlp_width"):
            require_count(name, getattr(self, name), 0)
        if self.window and self.segments > 1:
            raise ValueError(f"window: expected 0 with segments = {self.segments}, got {self.window}")
        require_choice("activation", self.activation, get_args(Activation))
        for name in ("dropout", "beta1", "beta2"):
            require_probability(name, getattr(self, name))
        require_not_negative(weight_decay=self.weight_decay)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden_dim(self) -> int:
        """Units of the mlp. With swiglu, whose first layer has two halves, 8/3 of the width costs as much as 4."""
        if self.mlp_width:
            return self.mlp_width
        return 4 * self.width if self.activation == "gelu" else 8 * math.ceil(self.width / 3)

    @property
    def reach(self) -> int | None:
        """How far before its own the keys are that a token may see in a block, in a text that has no end; else None."""
        return self.window or (2 * self.context - 1 if self.segments > 1 else None)

    def first_visible(self, position: Position) -> Position:
        """The position of the first token that one at ``position`` sees in a block."""
        if self.window:
            return position - self.window
        return (position // self.context - 1) * self.context if self.segments > 1 else 0 * position

    def data_options(self) -> dict[str, int]:
        """An item is so many segments of the context's length, and the token after them."""
        return {"length": self.segments * self.context + 1}


@dataclass(frozen=True)
class TextOptions:
    """How texts are drawn. ValueError names the field, what was expected and what came."""

    prompt: str = option("", "what the texts begin with")
    length: int = option(400, "tokens that are drawn")
    temperature: float = option(1.0, "divides the logits; 0: always the likeliest token")
    top_k: int = option(0, "choose among the k likeliest tokens; 0: all")
    top_p: float = option(1.0, "choose among the likeliest tokens that together have this probability")

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt: expected a string, got {type(self.prompt).__name__}")
        require_positive("length", self.length)
        require_not_negative(temperature=self.temperature)
        require_count("top_k", self.top_k, 0)
        require_top_p(self.top_p)


class TransformerLM(ComputedBuffers, GenerativeModel):
    """The model described at the top of this file. Tokens are (B, N) int64; with neither window nor segments, N is at
    most the context.

    Example:
        >>> model = TransformerLM(TransformerLMConfig(vocabulary="abc ", width=16, heads=2, depth=1)).eval()
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 4])
        >>> model.draw(2, TextOptions(prompt="ab", length=3)).texts[0][:2]
        'ab'
    """

    name, summary, kind = "transformer-lm", "decoder-only Transformer over characters or tokens", "text"
    default_data = "prose"
    config_class, sampling_class = TransformerLMConfig, TextOptions
    train_defaults: ClassVar = {
        "steps": 2400,
        "batch_size": 8,
        "schedule": "cosine",
        "warmup": 100,
        "clip": 1.0,
        "average_decay": 0.998,
    }
    blocks = ("DecoderBlock",)
    config: TransformerLMConfig
    lengths: Tensor

    def __init__(self, config: TransformerLMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(len(config.vocabulary), config.width)
        self.rotary = RotaryEmbedding(config.head_dim)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.logits = None if config.tied else nn.Linear(config.width, len(config.vocabulary), bias=False)
        initialise_decoder(self, config)
        self._register_computed()

    def _computed(self) -> dict[str, Tensor]:
        return {"lengths": torch.tensor([len(item) for item in self.config.vocabulary])}

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas = (config.beta1, config.beta2)
        return (Phase("text", (), LEARNING_RATE, betas, config.weight_decay),)

    def forward(self, tokens: Tensor, past: Past | None = None) -> Tensor:
        """Logits (B, N, vocabulary) of the token after each.

        Args:
            tokens: (B, N) int64.
            past: keeps the tokens before these, as ``new_past`` makes it; the logits then go on from there.

        Raises:
            TypeError: tokens are no int64 tensor. ValueError: they are not (B, N), or longer than the context.
        """
        self._check(tokens)
        config, length = self.config, tokens.size(1)
        if self.logits is None:
            x, table = embed(self.embedding, tokens, len(config.vocabulary))
        else:
            x = self.embedding(tokens)
        if self.training and config.dropout:
            x = F.dropout(x, config.dropout)
        if past is not None:
            tables = self._tables_at(past.open(length), past, x)
            for i, block in enumerate(self.decoder):
                x = block(x, tables, past=past, layer=i)
        elif config.segments > 1:
            x = self._recur(x)
        else:
            tables = self._tables(length, x)
            for block in self.decoder:
                x = block(x, tables, window=config.window or None)
        x = self.norm(x)
        logits: Tensor = F.linear(x, table) if self.logits is None else self.logits(x)
        return logits

    def _recur(self, x: Tensor) -> Tensor:
        """Segment by segment, through the blocks."""
        memory: list[Tensor] = []
        out = []
        for segment in x.split(self.config.context, dim=1):
            seen: list[Tensor] = []
            before = memory[0].size(1) if memory else 0
            tables = self._tables(before + segment.size(1), x)
            for i, block in enumerate(self.decoder):
                seen.append(segment.detach())
                segment = block(segment, tables, memory=memory[i] if memory else None)
            memory = seen
            out.append(segment)
        return torch.cat(out, dim=1)

    def _check(self, tokens: Tensor) -> None:
        require_tokens("tokens", tokens, len(self.config.vocabulary))
        bounded = self.config.reach is None
        if tokens.dim() != 2 or not tokens.size(1) or (bounded and tokens.size(1) > self.config.context):
            most = f"from 1 to context = {self.config.context}" if bounded else "at least 1"
            raise ValueError(f"tokens: expected (B, N) with N {most}, got {tuple(tokens.shape)}")

    def _tables(self, length: int, x: Tensor, first: int = 0) -> Tables:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return self.rotary.tables(length, first, device=x.device, dtype=dtype)

    def _tables_at(self, positions: Tensor | int, past: Past, x: Tensor) -> Tables:
        if isinstance(positions, int):
            return self._tables(1, x, positions)
        cos, sin = self._tables(past.forgotten + past.end, x)
        positions = positions.clamp(min=0)
        return cos[positions], sin[positions]

    def _nll(self, batch: Batch) -> Tensor:
        """-log p of each token given those before it, (B, N), float32 whatever autocast chose."""
        tokens = batch["tokens"]
        length = self.config.data_options()["length"]
        shape = (*tokens.shape[:1], length)
        require_tokens("tokens", tokens, len(self.config.vocabulary), shape, "(B, segments * context + 1)")
        logits, wanted = self(tokens[:, :-1]), tokens[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=NEVER_IGNORED)
        return nll.view(wanted.shape)

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss: nats per token."""
        return {"loss": self._nll(batch).mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """nll (B,): nats of an item. tokens (B,): those that it is the sum over, all but the first. characters (B,):
        how many these are, where tokens are longer.
        """
        nll = self._nll(batch)
        figures = {"nll": nll.sum(1), "tokens": torch.full_like(nll[:, 0], nll.size(1))}
        if isinstance(self.config.vocabulary, str):
            return figures
        return {**figures, "characters": self.lengths[batch["tokens"][:, 1:]].sum(1).to(nll.dtype)}

    def draw(self, n: int, options: TextOptions, *, generator: torch.Generator | None = None) -> Texts:
        """n texts: the prompt and ``options.length`` tokens.

        Without a prompt a text begins as a line does (after a newline, or the first character where there is none).
        Where context and text no longer fit together, the model goes on with the last half of the context; with a
        window or segments, it just goes on.

        Raises:
            ValueError: n is not positive, or the prompt has characters that the vocabulary lacks.
        """
        require_positive("n", n)
        return self.continue_texts([options.prompt] * n, options, generator=generator)

    def continue_texts(
        self, prompts: Sequence[str], options: TextOptions | None = None, *, generator: Noise = None
    ) -> Texts:
        """As ``draw``, a text for each prompt, all at once; ``options.prompt`` takes no part.

        Args:
            prompts: of any lengths.
            options: default ``TextOptions()``.
            generator: of all noise; or one for each prompt, whose text is then the one that it gets alone.

        Raises:
            ValueError: no prompts, another number of generators, or characters that the vocabulary lacks.
        """
        options = options or TextOptions()
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts: expected a list of strings, got {prompts!r}")
        if isinstance(generator, Sequence) and len(generator) != len(prompts):
            raise ValueError(
                f"generator: expected one, or one for each of {len(prompts)} prompts, got {len(generator)}"
            )
        rows = [self._encode(prompt) for prompt in prompts]
        with drawing(self):
            drawn = self._continue(rows, options, generator).tolist()
        vocabulary = self.config.vocabulary
        return Texts([text + "".join(vocabulary[i] for i in row) for text, row in zip(prompts, drawn, strict=True)])

    def _encode(self, prompt: str) -> list[int]:
        vocabulary = self.config.vocabulary
        return tokenise("prompt", prompt or ("\n" if "\n" in vocabulary else vocabulary[0]), vocabulary)

    def _continue(self, rows: list[list[int]], options: TextOptions, generator: Noise) -> Tensor:
        """The next ``options.length`` tokens of each row, (B, length). Rows stand against the right of ``text``."""
        context, bounded = self.config.context, self.config.reach is None
        kept = [len(row) for row in rows]  # how many of its last tokens each depends on
        begin = end = max(kept)
        text = torch.zeros(len(rows), begin + options.length, dtype=torch.int64)
        for tokens, row in zip(text, rows, strict=True):
            tokens[begin - len(row) : begin] = torch.tensor(row)
        text = text.to(self.device)
        past = None
        chooser = Chooser(options.temperature, generator, top_k=options.top_k, top_p=options.top_p)
        for _ in range(options.length):
            if past is not None and not (bounded and max(kept) > context):
                logits = self(text[:, end - 1 : end], past)
            else:  # the first time, or the context is full
                if bounded:
                    kept = [n if n <= context else max(1, context // 2) for n in kept]
                longest = max(kept)
                slots = context if bounded else longest + options.length
                past = self.new_past(len(rows), slots, [longest - n for n in kept])
                at = end - longest
                while at < end:
                    part = text[:, at : min(end, at + past.room)]
                    logits, at = self(part, past), at + part.size(1)
            text[:, end] = chooser(logits[:, -1])
            end, kept = end + 1, [n + 1 for n in kept]
        chooser.check()
        return text[:, begin:]

    def new_past(self, batch: int, slots: int, padding: Sequence[int] | None = None) -> Past:
        """Room for ``slots`` tokens, fewer where those further back are never seen. ``padding``: on the rows' left."""
        config = self.config
        if config.reach is None:
            return Past(config, batch, slots, next(self.parameters()), padding=padding)
        slots = min(slots, config.reach + max(config.reach, LEAST_ROOM))
        rule, reach = config.first_visible, config.reach
        like = next(self.parameters())
        return Past(config, batch, slots, like, padding=padding, first_visible=rule, reach=reach)


def choose(logits: Tensor, options: TextOptions, generator: Noise) -> Tensor:
    """A token of each row: logits (B, vocabulary) -> (B, 1). A CPU generator gives the same noise to every device.

    generator: one, or one for each row. ValueError: logits that are NaN, +inf or all -inf.
    """
    token = decoding.choose(logits, options.temperature, generator, top_k=options.top_k, top_p=options.top_p)
    return token[:, None]
