"""MeanFlow: one-step generation, trained with torch.func.jvp through a Transformer.

Geng et al., "Mean flows for one-step generative modeling" (2025). The network u(z, r, t) learns the average velocity
between times r and t. Its target contains the derivative of u along the flow, a forward-mode derivative (JVP) through
attention, which PyTorch's fused attention kernels do not support.

    python examples/mean_flow.py --steps 3000 --out samples.png
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastgen.nn import TransformerEncoder, TransformerEncoderLayer

TOKENS, CHANNELS, DIM = 16, 4, 64  # an 8x8 image as 16 patches of 2x2


class MeanVelocity(nn.Module):
    """u(z, r, t): z (B, TOKENS, CHANNELS), r and t (B,) -> (B, TOKENS, CHANNELS)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, DIM)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, DIM))
        self.time = nn.Sequential(nn.Linear(2, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        layer = TransformerEncoderLayer(DIM, 4, 4 * DIM, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False)
        self.out = nn.Linear(DIM, CHANNELS)

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        times = self.time(torch.stack([t, t - r], dim=1))
        return self.out(self.blocks(self.embed(z) + self.position + times[:, None]))


def mean_flow_loss(u: nn.Module, x: Tensor) -> Tensor:
    """|| u - stop_gradient(v - (t - r) du/dt) ||^2 on the path z = (1 - t) x + t noise, whose velocity is v."""
    noise = torch.randn_like(x)
    t, r = torch.rand(2, len(x)).sort(dim=0, descending=True).values
    r = torch.where(torch.rand(len(x)) < 0.5, t, r)  # half of the batch is plain flow matching
    z, v = torch.lerp(x, noise, t[:, None, None]), noise - x
    value, derivative = torch.func.jvp(u, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    target = v - (t - r)[:, None, None] * derivative
    return (value - target.detach()).square().mean()


def to_tokens(images: Tensor) -> Tensor:
    """(B, 8, 8) -> (B, TOKENS, CHANNELS)."""
    return images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, TOKENS, CHANNELS)


def to_images(tokens: Tensor) -> Tensor:
    return tokens.view(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 8, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", default="", help="PNG file for 64 samples")
    options = parser.parse_args()
    torch.manual_seed(0)
    data = to_tokens(torch.from_numpy(load_digits().images).float() / 8 - 1)
    u = MeanVelocity()
    optimizer = torch.optim.AdamW(u.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for step in range(1, options.steps + 1):
        loss = mean_flow_loss(u, data[torch.randint(len(data), (options.batch_size,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == options.steps:
            print(f"step {step}  loss {loss.item():.4f}")

    if options.out:
        from PIL import Image

        with torch.no_grad():  # one network evaluation: from t = 1, noise, to r = 0, data
            noise = torch.randn(64, TOKENS, CHANNELS)
            images = to_images(noise - u(noise, torch.zeros(64), torch.ones(64))).clamp(-1, 1)
        grid = images.view(8, 8, 8, 8).transpose(1, 2).reshape(64, 64)
        Image.fromarray((127.5 * grid + 127.5).byte().numpy()).resize((512, 512), 0).save(options.out)


if __name__ == "__main__":
    main()
