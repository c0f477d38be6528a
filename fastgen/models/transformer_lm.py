"""A decoder-only Transformer over characters.

A text's probability is the product of the probabilities of its characters, each given those before it, up to a
context of fixed length. Blocks normalise before they compute (Radford et al., "Language models are unsupervised
multitask learners", 2019); positions are rotations of queries and keys (Su et al., "RoFormer", 2021):

    tokens -> embedding -> [x + attention(norm(x)); x + mlp(norm(x))] * depth -> norm -> logits

The loss is the cross-entropy of the next character, in nats per character.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen._checks import require_positive, require_probability, require_shape, require_tensor
from fastgen.models._base import Batch, GenerativeModel, Moment, Phase, Texts, option
from fastgen.models._decoder import DecoderBlock, initialise_decoder, new_caches
from fastgen.nn import KVCache, RotaryEmbedding

Activation = Literal["gelu", "swiglu"]

PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class TransformerLMConfig:
    """Sizes of a TransformerLM and how it learns. ValueError names the field, what was expected and what came."""

    vocabulary: str = option(PRINTABLE, "the characters; token i is character i", from_data=True)
    context: int = option(128, "characters that a prediction may depend on")
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
        for name in ("context", "width", "depth", "heads"):
            require_positive(name, getattr(self, name))
        if not isinstance(self.vocabulary, str) or not self.vocabulary:
            raise ValueError(f"vocabulary: expected a string of at least one character, got {self.vocabulary!r}")
        repeated = sorted({c for c in self.vocabulary if self.vocabulary.count(c) > 1})
        if repeated:
            raise ValueError(f"vocabulary: expected distinct characters, got {''.join(repeated)!r} more than once")
        if self.width % self.heads != 0 or self.width // self.heads % 2 != 0:
            raise ValueError(f"width: expected an even multiple of heads = {self.heads}, got {self.width}")
        if isinstance(self.mlp_width, bool) or not isinstance(self.mlp_width, int) or self.mlp_width < 0:
            raise ValueError(f"mlp_width: expected an integer >= 0, got {self.mlp_width!r}")
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation: expected one of {', '.join(get_args(Activation))}, got {self.activation!r}")
        for name in ("dropout", "beta1", "beta2"):
            require_probability(name, getattr(self, name))
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected a number >= 0, got {self.weight_decay}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden_dim(self) -> int:
        """Units of the mlp. With swiglu, whose first layer has two halves, 8/3 of the width costs as much as 4."""
        if self.mlp_width:
            return self.mlp_width
        return 4 * self.width if self.activation == "gelu" else 8 * math.ceil(self.width / 3)

    def data_options(self) -> dict[str, int]:
        """An item is a context and the character after it."""
        return {"length": self.context + 1}


@dataclass(frozen=True)
class TextOptions:
    """How texts are drawn. ValueError names the field, what was expected and what came."""

    prompt: str = option("", "what the texts begin with")
    length: int = option(400, "characters that are drawn")
    temperature: float = option(1.0, "divides the logits; 0: always the likeliest character")
    top_k: int = option(0, "choose among the k likeliest characters; 0: all")
    top_p: float = option(1.0, "choose among the likeliest characters that together have this probability")

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt: expected a string, got {type(self.prompt).__name__}")
        require_positive("length", self.length)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k: expected an integer >= 0, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a probability in (0, 1], got {self.top_p}")


class TransformerLM(GenerativeModel):
    """The model described at the top of this file. Tokens are (B, N) int64, N at most the context.

    Example:
        >>> model = TransformerLM(TransformerLMConfig(vocabulary="abc ", width=16, heads=2, depth=1)).eval()
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 4])
        >>> model.draw(2, TextOptions(prompt="ab", length=3)).texts[0][:2]
        'ab'
    """

    name, summary, kind = "transformer-lm", "decoder-only Transformer over characters", "text"
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

    def __init__(self, config: TransformerLMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(len(config.vocabulary), config.width)
        self.rotary = RotaryEmbedding(config.head_dim)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.logits = None if config.tied else nn.Linear(config.width, len(config.vocabulary), bias=False)
        initialise_decoder(self, config)

    def phases(self) -> tuple[Phase, ...]:
        config = self.config
        betas = (config.beta1, config.beta2)
        return (Phase("text", (), LEARNING_RATE, betas, config.weight_decay),)

    def forward(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Logits (B, N, vocabulary) of the character after each token.

        Args:
            tokens: (B, N) int64.
            caches: one for each block, which hold the tokens before these; the logits then go on from there.

        Raises:
            TypeError: tokens are no int64 tensor. ValueError: they are not (B, N), or longer than the context.
        """
        require_tensor("tokens", tokens)
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens: expected an int64 tensor, got {tokens.dtype}")
        if tokens.dim() != 2 or not 1 <= tokens.size(1) <= self.config.context:
            raise ValueError(
                f"tokens: expected (B, N) with N from 1 to context = {self.config.context}, got {tuple(tokens.shape)}"
            )
        x = self.embedding(tokens)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if caches is None:
            tables = self.rotary.tables(tokens.size(1), device=x.device, dtype=dtype)
        else:
            tables = self.rotary.tables(self.config.context, device=x.device, dtype=dtype)
            positions = caches[0].positions(tokens.size(1))
            tables = (tables[0][positions], tables[1][positions])
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        for i, block in enumerate(self.decoder):
            x = block(x, tables, None if caches is None else caches[i])
        x = self.norm(x)
        logits: Tensor = F.linear(x, self.embedding.weight) if self.logits is None else self.logits(x)
        return logits

    def _nll(self, batch: Batch) -> Tensor:
        """-log p of each character given those before it, (B, N), float32 whatever autocast chose."""
        tokens = batch["tokens"]
        length = self.config.context + 1
        require_shape("tokens", tokens, (*tokens.shape[:1], length), "(B, context + 1)")
        logits, wanted = self(tokens[:, :-1]), tokens[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)

    def loss(self, phase: str, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """loss: nats per character."""
        return {"loss": self._nll(batch).mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """nll (B,): nats of an item. tokens (B,): characters that is the sum over: all but the first."""
        nll = self._nll(batch)
        return {"nll": nll.sum(1), "tokens": torch.full_like(nll[:, 0], nll.size(1))}

    @torch.no_grad()
    def draw(self, n: int, options: TextOptions, *, generator: torch.Generator | None = None) -> Texts:
        """n texts: the prompt and ``options.length`` characters.

        Without a prompt a text begins as a line does (after a newline, or the first character where there is none).
        Where context and text no longer fit together, the model goes on with the last half of the context.

        Raises:
            ValueError: n is not positive, or the prompt has characters that the vocabulary lacks.
        """
        require_positive("n", n)
        prompt = self._encode(options.prompt).to(self.device)
        tokens = prompt.expand(n, -1)
        was_training = self.training
        self.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled, every length of a prompt would be so anew
                drawn = self._continue(tokens, options, generator).tolist()
        finally:
            self.train(was_training)
        vocabulary = self.config.vocabulary
        return Texts([options.prompt + "".join(vocabulary[i] for i in row) for row in drawn])

    def _encode(self, prompt: str) -> Tensor:
        vocabulary = self.config.vocabulary
        unknown = sorted(set(prompt) - set(vocabulary))
        if unknown:
            raise ValueError(f"prompt: expected characters of the vocabulary, got {', '.join(map(repr, unknown))}")
        start = "\n" if "\n" in vocabulary else vocabulary[0]
        return torch.tensor([[vocabulary.index(c) for c in prompt or start]])

    def _continue(self, tokens: Tensor, options: TextOptions, generator: torch.Generator | None) -> Tensor:
        """The next ``options.length`` tokens, (B, length)."""
        config = self.config
        caches: list[KVCache] = []
        text, room, drawn = tokens, 0, tokens.size(1)
        for _ in range(options.length):
            if room == 0:  # the first time, or the context is full
                kept = text if text.size(1) <= config.context else text[:, -max(1, config.context // 2) :]
                caches = caches or self._caches(kept.size(0))
                for cache in caches:
                    cache.reset()
                logits, room = self(kept, caches), config.context - kept.size(1)
            else:
                logits, room = self(text[:, -1:], caches), room - 1
            text = torch.cat((text, choose(logits[:, -1], options, generator)), dim=1)
        return text[:, drawn:]

    def _caches(self, batch: int) -> list[KVCache]:
        return new_caches(self.config, batch, self.config.context, self.embedding.weight)


def choose(logits: Tensor, options: TextOptions, generator: torch.Generator | None) -> Tensor:
    """A token of each row: logits (B, vocabulary) -> (B, 1). A CPU generator gives the same noise to every device.

    The largest of logits + Gumbel noise is a sample of their softmax (Gumbel 1954; Maddison et al. 2014).
    """
    logits = logits.float()
    if options.temperature == 0:
        return logits.argmax(1, keepdim=True)
    logits = logits / options.temperature
    if 0 < options.top_k < logits.size(1):
        least = logits.topk(options.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if options.top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True, stable=True)
        before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
        logits = logits.masked_fill((before >= options.top_p).scatter(1, order, before >= options.top_p), -math.inf)
    device = logits.device if generator is None else generator.device
    noise = torch.rand(logits.shape, generator=generator, device=device).to(logits.device)
    return (logits - noise.log().neg().log()).argmax(1, keepdim=True)
