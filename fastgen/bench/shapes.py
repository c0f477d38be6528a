"""Shapes of operators in generative models, for benchmarks and tests."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class AttentionShape:
    """Shape of an attention call.

    Attributes:
        name: name of the shape.
        batch: batch size B.
        heads: number of heads H.
        queries: number of queries N.
        keys: number of keys M.
        key_dim: head dimension of queries and keys.
        value_dim: head dimension of values.
        mask: "", "causal", "bias" (a floating mask (H, N, M)) or "padding" (of keys).
    """

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    key_dim: int
    value_dim: int
    mask: str = ""

    def cut(self, batch: int = 2, length: int = 128) -> AttentionShape:
        """Returns a smaller shape of the same kind, for tests and CPUs."""
        return replace(
            self,
            batch=min(self.batch, batch),
            queries=min(self.queries, length),
            keys=min(self.keys, length),
        )


ATTENTION_SHAPES = {
    shape.name: shape
    for shape in (
        AttentionShape("sagan-64", 64, 1, 1024, 1024, 8, 32),
        AttentionShape("sagan-256", 64, 1, 1024, 256, 32, 128),
        AttentionShape("transgan-window", 512, 4, 256, 256, 64, 64),
        AttentionShape("swin-window", 2048, 4, 49, 49, 32, 32, "bias"),
        AttentionShape("dit-xl", 32, 16, 256, 256, 72, 72),
        AttentionShape("vae-mid", 1, 1, 4096, 4096, 512, 512),
        AttentionShape("char-lm", 64, 6, 256, 256, 64, 64, "causal"),
        AttentionShape("image-lm", 16, 8, 1024, 1024, 64, 64, "causal"),
        AttentionShape("seq2seq", 64, 8, 64, 80, 64, 64, "padding"),
        AttentionShape("long", 1, 16, 16384, 16384, 128, 128),
        AttentionShape("long-causal", 1, 16, 16384, 16384, 128, 128, "causal"),
        AttentionShape("decode", 64, 8, 1, 2048, 64, 64),
    )
}

UNEQUAL_HEADS = AttentionShape("unequal heads", 8, 1, 1024, 1024, 8, 64)
EQUAL_HEADS = AttentionShape("equal heads", 8, 1, 1024, 1024, 64, 64)
"""Shapes of ``fastgen bench``: a 32 x 32 feature map with the head dims of a GAN and of a Transformer."""

LATENT_SHAPES = {
    "dense-vae": (128, 32),
    "wide": (4096, 1024),
    "diffusion-autoencoder": (16, 4, 32, 32),
    "one-long-row": (1, 2**20),
    "many-short-rows": (2**18, 4),
    "odd": (7, 1030),
}
"""Shapes (B, *) of mu and logvar."""
