"""WGAN-GP with self-attention, in a training loop of its own.

Both networks have a SAGAN block (fastgen.nn.SelfAttention2d). The gradient penalty needs the critic's second
derivative, also through its attention, which PyTorch's fused attention kernels do not support.

    python examples/wgan_gp.py --steps 2000 --out samples.png
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastgen.losses import discriminator_loss, generator_loss, gradient_penalty
from fastgen.nn import SelfAttention2d

LATENT_DIM, CRITIC_STEPS, PENALTY_WEIGHT = 32, 2, 10.0


def generator() -> nn.Module:
    """(B, LATENT_DIM) -> images (B, 1, 8, 8) in [-1, 1]."""
    return nn.Sequential(
        nn.Linear(LATENT_DIM, 64 * 4 * 4),
        nn.Unflatten(1, (64, 4, 4)),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
        SelfAttention2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 1, 3, padding=1),
        nn.Tanh(),
    )


def critic() -> nn.Module:
    """Images (B, 1, 8, 8) -> scores (B, 1). No batch normalization: the penalty is per sample."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        SelfAttention2d(32),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 1),
    )


def digits() -> Tensor:
    """(1797, 1, 8, 8), in [-1, 1]."""
    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="generator updates")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", default="", help="PNG file for 64 samples")
    options = parser.parse_args()
    torch.manual_seed(0)
    data, G, D = digits(), generator(), critic()
    g_optimizer = torch.optim.AdamW(G.parameters(), lr=2e-4, betas=(0.0, 0.9))
    d_optimizer = torch.optim.AdamW(D.parameters(), lr=2e-4, betas=(0.0, 0.9))

    for step in range(1, options.steps + 1):
        for _ in range(CRITIC_STEPS):
            real = data[torch.randint(len(data), (options.batch_size,))]
            fake = G(torch.randn(len(real), LATENT_DIM)).detach()
            penalty = gradient_penalty(D, real, fake)
            d_loss = discriminator_loss(D(real), D(fake), "wasserstein") + PENALTY_WEIGHT * penalty
            d_optimizer.zero_grad()
            d_loss.backward()
            d_optimizer.step()
        g_loss = generator_loss(D(G(torch.randn(options.batch_size, LATENT_DIM))), "wasserstein")
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        if step % 100 == 0 or step == options.steps:
            losses = {"critic": d_loss, "penalty": penalty, "generator": g_loss}
            print(f"step {step}  " + "  ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items()))

    if options.out:
        from PIL import Image

        with torch.no_grad():
            images = G(torch.randn(64, LATENT_DIM)).view(8, 8, 8, 8).transpose(1, 2).reshape(64, 64)
        Image.fromarray((127.5 * images + 127.5).byte().numpy()).resize((512, 512), 0).save(options.out)


if __name__ == "__main__":
    main()
