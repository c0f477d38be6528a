"""What variational autoencoders of dense layers share: nets, checks, the loss of a bound, what is scored and shown."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgen._checks import require_floating, require_positive, require_shape, require_tensor
from fastgen.models._base import Batch, Exhibit, GenerativeModel, Images, Moment, Phase
from fastgen.models._likelihoods import check_likelihood, numbers_per_pixel, pixels_log_prob, pixels_mean

PAIRS_IN_A_ROW = 16


class Bound(NamedTuple):
    """loss: scalar. nll, kl: (B,) in nats per image; -(nll + kl) is the ELBO, or an unbiased estimate of it."""

    loss: Tensor
    nll: Tensor
    kl: Tensor


def check_config(config: Any) -> None:
    """Fields that all these models have. ValueError names the field, what was expected and what came."""
    for name in ("image_size", "channels", "latent_dim", "width", "depth"):
        require_positive(name, getattr(config, name))
    check_likelihood(config.likelihood, config.levels)
    for name in ("beta", "weight_decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name}: expected a number >= 0, got {getattr(config, name)}")
    if isinstance(config.kl_warmup, bool) or not isinstance(config.kl_warmup, int) or config.kl_warmup < 0:
        raise ValueError(f"kl_warmup: expected a number of steps >= 0, got {config.kl_warmup!r}")
    if not 0 < config.learning_rate < math.inf:
        raise ValueError(f"learning_rate: expected a positive number, got {config.learning_rate}")


def check_images(images: Tensor, config: Any) -> None:
    """Raises TypeError, ValueError unless images are (B, channels, image_size, image_size), floating."""
    require_tensor("images", images)
    require_floating("images", images)
    expected = (*images.shape[:1], config.channels, config.image_size, config.image_size)
    require_shape("images", images, expected, "(B, C, S, S)")


def dense(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    """``depth`` layers of ``width`` units with LayerNorm and SiLU, and a linear one."""
    sizes = [inputs, *[width] * depth]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def normal_noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """N(0, 1) of ``like``'s dtype and device. A CPU generator gives the same noise to every device."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device).to(like)


def above_each_other(*stacks: Tensor) -> Images:
    """Rows of images (B, C, H, W), each above the row of its counterparts; what does not fill a row is left out."""
    count = len(stacks[0])
    columns = min(PAIRS_IN_A_ROW, count)
    rows = [images[: count // columns * columns].unflatten(0, (-1, columns)) for images in stacks]
    return Images(torch.stack(rows, dim=1).flatten(0, 2), columns)


class DenseVAE(GenerativeModel):
    """A model that has ``bound`` and ``reconstruct``; its config has the fields of ``check_config``."""

    kind = "images"
    default_data = "digits"

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("model", (), self.config.learning_rate, (0.9, 0.99), self.config.weight_decay),)

    def bound(self, batch: Batch, *, beta: float = 1.0, generator: torch.Generator | None = None) -> Bound:
        """The loss, from one posterior sample per image. beta: weight of the KL in the loss; nll and kl don't use it.

        Raises:
            TypeError, ValueError: images (or labels) of another dtype or shape than the config's.
        """
        raise NotImplementedError

    def reconstruct(self, batch: Batch) -> Tensor:
        """The expected pixels (B, C, S, S), in [0, 1], of the images' posterior means: the same on each call."""
        raise NotImplementedError

    def loss(self, phase: str, batch: Batch, moment: Moment) -> dict[str, Tensor]:
        """The loss, whose KL grows to beta in the first ``kl_warmup`` steps; nll and kl in nats per image."""
        warm = min(1.0, moment.step / max(1, self.config.kl_warmup))
        out = self.bound(batch, beta=self.config.beta * warm)
        return {"loss": out.loss, "nll": out.nll.mean(), "kl": out.kl.mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """elbo, nll and kl (B,) in nats, from one posterior sample per image."""
        out = self.bound(batch, generator=generator)
        return {"elbo": -(out.nll + out.kl), "nll": out.nll, "kl": out.kl}

    @torch.no_grad()
    def show(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Exhibit]:
        """Rows of held-out images, each above the row of its reconstructions."""
        return {"reconstructions": above_each_other(batch["images"], self.reconstruct(batch))}

    def _decoder_outputs(self) -> int:
        config = self.config
        count: int = numbers_per_pixel(config.likelihood) * config.channels * config.image_size**2
        return count

    def _as_map(self, parameters: Tensor) -> Tensor:
        """What a dense decoder gave, as a map of pixels, float32 at least whatever autocast chose."""
        wide = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
        size: int = self.config.image_size
        return wide.view(len(wide), -1, size, size)

    def _log_prob(self, parameters: Tensor, images: Tensor) -> Tensor:
        return pixels_log_prob(self._as_map(parameters), images, self.config.likelihood, self.config.levels)

    def _mean(self, parameters: Tensor) -> Tensor:
        return pixels_mean(self._as_map(parameters), self.config.likelihood)
