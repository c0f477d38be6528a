"""A VAE of your own with fastgen.nn.GaussianLatent.

The layer takes the encoder's output, samples the latent and returns its KL divergence, in one pass over memory. The
noise is regenerated from a seed in the backward pass instead of being stored.

    python examples/vae.py --steps 2000 --out samples.png
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastgen.nn import GaussianLatent

LATENT_DIM, PIXELS = 8, 64


class VAE(nn.Module):
    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, hidden), nn.SiLU(), nn.Linear(hidden, 2 * LATENT_DIM))
        self.latent = GaussianLatent()
        self.decoder = nn.Sequential(nn.Linear(LATENT_DIM, hidden), nn.SiLU(), nn.Linear(hidden, PIXELS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, PIXELS) in [0, 1] -> negative log-likelihood (B,) and KL divergence (B,), in nats."""
        z, kl = self.latent(self.encoder(2 * images - 1))
        nll = F.binary_cross_entropy_with_logits(self.decoder(z), images, reduction="none").sum(1)
        return nll, kl

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Expected pixels (n, PIXELS) in [0, 1]."""
        return self.decoder(torch.randn(n, LATENT_DIM)).sigmoid()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", default="", help="PNG file for 64 samples")
    options = parser.parse_args()
    torch.manual_seed(0)
    data = torch.from_numpy(load_digits().data).float() / 16
    train, held_out = data[360:], data[:360]
    model = VAE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, options.steps + 1):
        nll, kl = model(train[torch.randint(len(train), (options.batch_size,))])
        beta = min(1.0, step / 500)  # KL warm-up
        loss = (nll + beta * kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == options.steps:
            with torch.no_grad():
                elbo = -sum(model(held_out)).mean()
            print(f"step {step}  loss {loss.item():.2f}  held-out ELBO {elbo.item():.2f} nats")

    if options.out:
        from PIL import Image

        grid = model.sample(64).view(8, 8, 8, 8).transpose(1, 2).reshape(64, 64)
        Image.fromarray((255 * grid).byte().numpy()).resize((512, 512), 0).save(options.out)


if __name__ == "__main__":
    main()
