"""Accelerate an existing torch Transformer and train it with an R1 penalty.

The discriminator is written with torch.nn alone. R1 needs the derivative of a gradient through its attention, for which
PyTorch raises; after fastgen.accelerate(model) it works, with the same parameters, optimizer and state dict.

    python examples/accelerate_transformer.py --steps 500
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastgen
from fastgen.losses import discriminator_loss, generator_loss, r1_penalty

LATENT_DIM, TOKENS, CHANNELS, R1_WEIGHT = 32, 8, 8, 0.1  # an 8x8 image as 8 rows


class Discriminator(nn.Module):
    """Rows (B, TOKENS, CHANNELS) -> scores (B,)."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, dim)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.score = nn.Linear(dim, 1)

    def forward(self, rows: Tensor) -> Tensor:
        return self.score(self.encoder(self.embed(rows) + self.position).mean(1)).squeeze(1)


def penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    real = real.detach().requires_grad_()
    return r1_penalty(discriminator(real), real)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = torch.from_numpy(load_digits().images).float() / 8 - 1
    discriminator = Discriminator()
    generator = nn.Sequential(
        nn.Linear(LATENT_DIM, 256), nn.ReLU(), nn.Linear(256, 64), nn.Tanh(), nn.Unflatten(1, (TOKENS, CHANNELS))
    )
    d_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-4, betas=(0.0, 0.99))
    g_optimizer = torch.optim.AdamW(generator.parameters(), lr=2e-4, betas=(0.0, 0.99))

    try:
        penalty(discriminator, data[:8]).backward()
    except RuntimeError as error:
        print(f"torch alone: {str(error).splitlines()[0]}")
    discriminator.zero_grad()
    print(fastgen.accelerate(discriminator))

    for step in range(1, options.steps + 1):
        real = data[torch.randint(len(data), (options.batch_size,))]
        fake = generator(torch.randn(len(real), LATENT_DIM))
        d_loss = discriminator_loss(discriminator(real), discriminator(fake.detach()))
        r1 = penalty(discriminator, real)
        d_optimizer.zero_grad()
        (d_loss + R1_WEIGHT * r1).backward()
        d_optimizer.step()
        g_loss = generator_loss(discriminator(fake))
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        if step % 100 == 0 or step == options.steps:
            print(f"step {step}  discriminator {d_loss.item():.3f}  R1 {r1.item():.4f}  generator {g_loss.item():.3f}")

    fastgen.restore(discriminator)  # torch's classes again, with the trained parameters


if __name__ == "__main__":
    main()
