"""What is measured in an epoch, and how a person sees it: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import TracebackType

from tqdm import tqdm


@dataclass(frozen=True)
class Metrics:
    """One epoch. Losses in nats per image with the KL's full weight, so train_loss is minus an ELBO.

    The held-out figures are of the averaged weights, from one posterior sample per image with fixed noise.
    images_per_second is of the training alone, seconds of the evaluation too.
    """

    epoch: int
    train_loss: float
    held_out_elbo: float
    held_out_nll: float
    held_out_kl: float
    images_per_second: float
    seconds: float


class Progress:
    """Shows loss, KL, held-out ELBO and images/s on stderr, as they come or once per epoch."""

    def __init__(self, epochs: int, images: int, finished: int = 0) -> None:
        self.epochs = epochs
        self.images = images
        self.held_out = ""
        self.bar = tqdm(
            total=epochs * images,
            initial=finished * images,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self, epoch: int, seen: int, loss: float, kl: float) -> None:
        """``seen`` images of ``epoch`` are done; loss and kl are their means so far."""
        self.bar.set_description(f"epoch {epoch}/{self.epochs}", refresh=False)
        self.bar.set_postfix_str(f"loss {loss:.2f}, KL {kl:.2f}{self.held_out}", refresh=False)
        self.bar.update((epoch - 1) * self.images + seen - self.bar.n)

    def finish_epoch(self, metrics: Metrics) -> None:
        self.held_out = f", held-out ELBO {metrics.held_out_elbo:.2f}"
        if self.bar.disable:
            print(
                f"epoch {metrics.epoch}/{self.epochs}: loss {metrics.train_loss:.2f}{self.held_out}"
                f" (KL {metrics.held_out_kl:.2f}) nats per image, {metrics.images_per_second:.0f} images/s",
                file=sys.stderr,
                flush=True,
            )
