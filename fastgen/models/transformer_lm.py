"""A decoder-only Transformer language model.

The probability of a text is the product of the probabilities of its tokens (characters or longer strings), each given
the tokens before it, up to a context of fixed length. Pre-norm blocks (Radford et al., "Language models are
unsupervised multitask learners", 2019) with RMSNorm, rotary embeddings (Su et al., "RoFormer", 2021) and QK-norm:

    tokens -> embedding -> [x + attention(norm(x)); x + mlp(norm(x))] * depth -> norm -> logits

The loss is the cross-entropy of the next token, in nats per token. Two options extend the context:

    window: in every block a token attends to so many tokens before its own (Beltagy et al., "Longformer", 2020): a text
        has any length, with a KV cache of bounded size
    segments: training texts are split into segments of the context's length, and in every block a token also attends to
        the hidden states of the previous segment, without a gradient (Dai et al., "Transformer-XL", 2019)

In this file: config, network and loss, sampling. The block and its KV caches: ``lm_blocks.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.batch import NEVER_IGNORED, Vocabulary, check_vocabulary, require_tokens, takes_old_names, tokenize
from fastgen.checks import (
    require_choice,
    require_count,
    require_not_negative,
    require_positive,
    require_positive_number,
    require_probability,
)
from fastgen.models import decoding
from fastgen.models.base import Batch, GenerativeModel, Phase, StepContext, Texts, option, upcast
from fastgen.models.decoding import Chooser, Noise, generating, require_top_p
from fastgen.models.lm_blocks import EPS, RENAMED, CachedBlocks, LMBlock, Tables, init_weights
from fastgen.models.registry import register_model
from fastgen.models.sizes import DataSize, two_digits
from fastgen.nn import RotaryEmbedding
from fastgen.nn._buffers import ComputedBuffers
from fastgen.nn._sublayers import embed

Activation = Literal["gelu", "swiglu"]
PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))
USUAL_TOKENS, MOST_LONGER = 1_000_000, 3.0
MIN_ROOM = 64  # slots of a bounded cache beyond what is attended to, so that its contents seldom move


@takes_old_names
@dataclass(frozen=True)
class TransformerLMConfig:
    """Configuration of a ``TransformerLM``.

    Raises:
        ValueError: an option out of range.
    """

    renamed: ClassVar = {**RENAMED, "tied": "tie_embeddings"}

    vocabulary: Vocabulary = option(PRINTABLE, "characters, or strings; token i is item i", from_data=True)
    context: int = option(128, "number of tokens that a prediction may depend on")
    window: int = option(0, "number of tokens before its own that a token attends to; 0: all of the context")
    segments: int = option(1, "number of segments of a training text, each as long as the context (Transformer-XL)")
    width: int = option(160, "embedding dimension")
    depth: int = option(4, "number of blocks")
    num_heads: int = option(5, "number of attention heads")
    mlp_width: int = option(0, "hidden dimension of the MLP; 0: 4 times the width, 8/3 for swiglu")
    activation: Activation = option("gelu", "activation of the MLP")
    qk_norm: bool = option(True, "apply QK-norm (RMS) to queries and keys")
    tie_embeddings: bool = option(True, "share the weights of embedding and logits")
    dropout: float = option(0.0, "dropout probability, in attention and after each branch")
    learning_rate: float = option(3e-3, "AdamW learning rate")
    weight_decay: float = option(0.1, "AdamW weight decay, on all weights")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.99, "AdamW beta2")

    def __post_init__(self) -> None:
        for name in ("context", "segments", "width", "depth", "num_heads"):
            require_positive(name, getattr(self, name))
        object.__setattr__(self, "vocabulary", check_vocabulary(self.vocabulary))
        if self.width % self.num_heads != 0 or self.width // self.num_heads % 2 != 0:
            raise ValueError(f"width: expected an even multiple of num_heads = {self.num_heads}, got {self.width}")
        for name in ("window", "mlp_width"):
            require_count(name, getattr(self, name), 0)
        if self.window and self.segments > 1:
            raise ValueError(f"window: expected 0 with segments = {self.segments}, got {self.window}")
        require_choice("activation", self.activation, get_args(Activation))
        for name in ("dropout", "beta1", "beta2"):
            require_probability(name, getattr(self, name))
        require_not_negative(weight_decay=self.weight_decay)
        require_positive_number(learning_rate=self.learning_rate)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Hidden dimension of the MLP. A swiglu MLP has two input matrices: 8/3 of the width costs as much as 4."""
        if self.mlp_width:
            return self.mlp_width
        return 4 * self.width if self.activation == "gelu" else 8 * math.ceil(self.width / 3)

    @property
    def reach(self) -> int | None:
        """Largest distance to a token that a block attends to, if texts have any length; otherwise None."""
        return self.window or (2 * self.context - 1 if self.segments > 1 else None)

    def data_options(self) -> dict[str, int]:
        """Length of a training text: all segments, and the token after them."""
        return {"length": self.segments * self.context + 1}


@dataclass(frozen=True)
class TextOptions:
    """Sampling options of a ``TransformerLM``.

    Raises:
        ValueError: an option out of range.
    """

    prompt: str = option("", "beginning of each text")
    length: int = option(400, "number of sampled tokens")
    temperature: float = option(1.0, "sampling temperature; 0: greedy")
    top_k: int = option(0, "number of most likely tokens to sample from; 0: all")
    top_p: float = option(1.0, "total probability of the most likely tokens to sample from")

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt: expected a string, got {type(self.prompt).__name__}")
        require_positive("length", self.length)
        require_not_negative(temperature=self.temperature)
        require_count("top_k", self.top_k, 0)
        require_top_p(self.top_p)


@register_model
class TransformerLM(ComputedBuffers, GenerativeModel):
    """Decoder-only Transformer over characters or tokens, with sampling by KV caches.

    Tokens are (B, N) int64. Without window and segments, N is at most the context.

    Example:
        >>> model = TransformerLM(TransformerLMConfig(vocabulary="abc ", width=16, num_heads=2, depth=1)).eval()
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
    blocks = ("LMBlock",)
    config: TransformerLMConfig
    lengths: Tensor

    @classmethod
    def suggested(cls, data: DataSize, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """More steps for texts of more than a million tokens: as the square root of their length, at most threefold."""
        steps = int(cls.train_defaults["steps"])
        longer = min(MOST_LONGER, math.sqrt(data.items / USUAL_TOKENS))
        return {"steps": two_digits(steps * longer)} if longer > 1 else {}

    def __init__(self, config: TransformerLMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(len(config.vocabulary), config.width)
        self.rotary = RotaryEmbedding(config.head_dim)
        self.decoder = nn.ModuleList(LMBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=EPS)
        self.logits = None if config.tie_embeddings else nn.Linear(config.width, len(config.vocabulary), bias=False)
        init_weights(self, config.width, config.depth)
        self._register_computed()

    def _computed(self) -> dict[str, Tensor]:
        return {"lengths": torch.tensor([len(item) for item in self.config.vocabulary])}

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas = (config.beta1, config.beta2)
        return (Phase("text", (), config.learning_rate, betas, config.weight_decay),)

    def forward(self, tokens: Tensor, past: CachedBlocks | None = None) -> Tensor:
        """Logits (B, N, vocabulary) of the token after each.

        Args:
            tokens: (B, N) int64.
            past: KV caches with the tokens before these, from ``new_cache``; these tokens are appended.

        Raises:
            TypeError: tokens are not an int64 tensor. ValueError: they are not (B, N), or longer than the context.
        """
        self._check(tokens)
        config = self.config
        if self.logits is None:
            x, table = embed(self.embedding, tokens, len(config.vocabulary))
        else:
            x = self.embedding(tokens)
        if self.training and config.dropout:
            x = F.dropout(x, config.dropout)
        if past is not None:
            x = past(x)
        elif config.segments > 1:
            x = self._recur(x)
        else:
            rotary = self._tables(x.size(1), x)
            for block in self.decoder:
                x = block(x, rotary, window=config.window or None)
        x = self.norm(x)
        logits: Tensor = F.linear(x, table) if self.logits is None else self.logits(x)
        return logits

    def _recur(self, x: Tensor) -> Tensor:
        """The blocks, segment by segment; each block attends to its detached input for the previous segment."""
        memory: list[Tensor] = []
        out = []
        for segment in x.split(self.config.context, dim=1):
            inputs: list[Tensor] = []
            before = memory[0].size(1) if memory else 0
            rotary = self._tables(before + segment.size(1), x)
            for i, block in enumerate(self.decoder):
                inputs.append(segment.detach())
                segment = block(segment, rotary, memory=memory[i] if memory else None)
            memory = inputs
            out.append(segment)
        return torch.cat(out, dim=1)

    def _check(self, tokens: Tensor) -> None:
        require_tokens("tokens", tokens, len(self.config.vocabulary))
        bounded = self.config.reach is None
        if tokens.dim() != 2 or not tokens.size(1) or (bounded and tokens.size(1) > self.config.context):
            most = f"from 1 to context = {self.config.context}" if bounded else "at least 1"
            raise ValueError(f"tokens: expected (B, N) with N {most}, got {tuple(tokens.shape)}")

    def _tables(self, length: int, x: Tensor) -> Tables:
        return self.rotary.tables(length, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))

    def _nll(self, batch: Batch) -> Tensor:
        """-log p of each token given the ones before it, (B, N), in float32 at least."""
        tokens = batch["tokens"]
        length = self.config.data_options()["length"]
        shape = (*tokens.shape[:1], length)
        require_tokens("tokens", tokens, len(self.config.vocabulary), shape, "(B, segments * context + 1)")
        logits, target = self(tokens[:, :-1]), tokens[:, 1:]
        logits = upcast(logits)
        nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none", ignore_index=NEVER_IGNORED)
        return nll.view(target.shape)

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """loss: nats per token."""
        return {"loss": self._nll(batch).mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """nll (B,): nats of a text. tokens (B,): number of predicted tokens, all but the first. characters (B,): their
        number of characters, if tokens may be longer than one.
        """
        nll = self._nll(batch)
        scores = {"nll": nll.sum(1), "tokens": torch.full_like(nll[:, 0], nll.size(1))}
        if isinstance(self.config.vocabulary, str):
            return scores
        return {**scores, "characters": self.lengths[batch["tokens"][:, 1:]].sum(1).to(nll.dtype)}

    def draw(self, n: int, options: TextOptions, *, generator: torch.Generator | None = None) -> Texts:
        """Samples n texts: the prompt and ``options.length`` tokens.

        Without a prompt, a text begins after a newline (or the first character of a vocabulary without newline). When
        the text outgrows the context, the model continues from the last half of the context; with window or segments,
        it attends to all that they allow.

        Raises:
            ValueError: n is not positive, or the prompt has characters that the vocabulary lacks.
        """
        require_positive("n", n)
        return self.continue_texts([options.prompt] * n, options, generator=generator)

    def continue_texts(
        self, prompts: Sequence[str], options: TextOptions | None = None, *, generator: Noise = None
    ) -> Texts:
        """Continues a batch of prompts, each as ``draw`` would; ``options.prompt`` is ignored.

        Args:
            prompts: strings of any lengths.
            options: sampling options; default ``TextOptions()``.
            generator: random number generator of the batch; or one for each prompt, whose text then does not depend on
                the other prompts.

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
        with generating(self):
            sampled = self._continue(rows, options, generator).tolist()
        vocabulary = self.config.vocabulary
        return Texts([text + "".join(vocabulary[i] for i in row) for text, row in zip(prompts, sampled, strict=True)])

    def _encode(self, prompt: str) -> list[int]:
        vocabulary = self.config.vocabulary
        return tokenize("prompt", prompt or ("\n" if "\n" in vocabulary else vocabulary[0]), vocabulary)

    def _continue(self, rows: list[list[int]], options: TextOptions, generator: Noise) -> Tensor:
        """The next ``options.length`` tokens of each row, (B, length). Prompts are padded on the left."""
        context, bounded = self.config.context, self.config.reach is None
        kept = [len(row) for row in rows]  # length of the context of each row
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
            else:  # prefill: the prompt, or the last half of a full context
                if bounded:
                    kept = [n if n <= context else max(1, context // 2) for n in kept]
                longest = max(kept)
                slots = context if bounded else begin + options.length
                past = self.new_cache(len(rows), slots, [longest - n for n in kept])
                at = end - longest
                while at < end:
                    part = text[:, at : min(end, at + past.room)]
                    logits, at = self(part, past), at + part.size(1)
            text[:, end] = chooser(logits[:, -1])
            end, kept = end + 1, [n + 1 for n in kept]
        chooser.check()
        return text[:, begin:]

    def new_cache(self, batch: int, length: int, padding: Sequence[int] | None = None) -> CachedBlocks:
        """Empty KV caches of all blocks for ``length`` tokens; with window or segments, for those attended to.

        Args:
            padding: number of padding tokens on the left of each row of the prompt.
        """
        config = self.config
        if config.reach is not None:
            length = min(length, config.reach + max(config.reach, MIN_ROOM))
        return CachedBlocks(
            self.decoder,
            self.rotary,
            batch,
            length,
            next(self.parameters()),
            padding=padding,
            window=config.window or None,
            segment=config.context if config.segments > 1 else None,
        )


def choose(logits: Tensor, options: TextOptions, generator: Noise) -> Tensor:
    """Samples one token per row: logits (B, vocabulary) -> (B, 1).

    Args:
        generator: random number generator: one, or one for each row. A CPU generator serves every device.

    Raises:
        ValueError: logits that are NaN, +inf or all -inf.
    """
    token = decoding.choose(logits, options.temperature, generator, top_k=options.top_k, top_p=options.top_p)
    return token[:, None]
