"""Likelihoods of binarized MNIST: fastgen's autoencoders beside pythae's VAE, on the same digits.

usage: python benchmarks/likelihoods.py [--binarize dynamic static] [--models vae ...] [--epochs 16] [--digits 50]

All models see the same 8,000 digits for the same number of epochs; the held-out ones are the same, too. fastgen's are
trained by ``fastgen train`` with the defaults of the data. pythae (Chadebec et al., "Pythae: unifying generative
autoencoders in Python", 2022) is not a dependency of the project: ``pip install pythae``, best in an environment of its
own. Without it, its rows are left out. Its VAE is trained with Adam, batches of 64 and the cosine schedule of the
others, once with its own networks (one hidden layer of 512 units, ReLU), once with those of fastgen's ``vae``.

A pixel is black or white. -log p(x) is estimated with K = 5,000 importance samples for ``--digits`` of the held-out
digits, and with K = 50 for all of them. The figure is the mean of the latter, less how much more the former gives on
the same digits: 5,000 samples of every digit would take hours. Results are added to
benchmarks/results/likelihoods.json; benchmarks/comparisons.py writes them into docs/comparisons.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "likelihoods.json"
RUNS = ROOT / "runs" / "likelihoods"
DATA = "data/mnist"
OURS = ("vae", "conv-vae", "flow-vae")
THEIRS = ("pythae VAE", "pythae VAE, networks of vae")
FEW, MANY, AT_ONCE = 50, 5_000, 500
EPOCHS, DIGITS = 16, 50
BATCH, LEARNING_RATE = 64, 1e-3
INSTALL = "pythae is not installed: its rows are left out (pip install pythae)"

LogWeights = Callable[[Tensor], Tensor]
"""(B, 1, 28, 28) -> (B,) log p(x, z) - log q(z | x) of one posterior sample each, in nats."""


class OncePerImage(nn.Module):
    """An encoder for batches that hold one image many times: it encodes the first."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        first: Tensor = self.encoder(images[:1])
        return first.expand(len(images), *first.shape[1:])


def binary(name: str) -> tuple:
    """(training, held-out) digits, black and white: ``static`` or ``dynamic``."""
    from fastgen.data import DataConfig, load_data

    return load_data(DataConfig(DATA, binarize=name), "images").splits()  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# Models


def ours(name: str, binarize: str, epochs: int) -> tuple[nn.Module, LogWeights, float]:
    """(model, its log weights, CPU seconds of the training) of a model of fastgen, trained by the command line."""
    from fastgen.models import GenerativeModel

    out = RUNS / binarize / name
    words = ["train", name, "--data", DATA, "--binarize", binarize, "--epochs", str(epochs), "--out", str(out)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "fastgen", *words, "--overwrite"], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    model = GenerativeModel.from_pretrained(out)
    return model, model.log_weight, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def theirs(name: str, binarize: str, epochs: int) -> tuple[nn.Module, LogWeights, float]:
    """The same of a VAE of pythae."""
    from pythae.models import VAE, VAEConfig  # type: ignore[import-not-found]
    from pythae.models.base.base_utils import ModelOutput  # type: ignore[import-not-found]
    from pythae.models.nn import BaseDecoder, BaseEncoder  # type: ignore[import-not-found]

    from fastgen.models import MODELS
    from fastgen.models.sizes import DataSize
    from fastgen.models.vae import mlp

    train, _ = binary(binarize)
    options = MODELS["vae"].suggested(DataSize("images", len(train), 28, 1, 2))
    latent, width, pixels = options["model.latent_dim"], options["model.width"], 28 * 28

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(pixels, width, 2, 2 * latent)

        def forward(self, x: Tensor) -> ModelOutput:
            mu, log_variance = self.layers(2 * x.flatten(1) - 1).chunk(2, 1)
            return ModelOutput(embedding=mu, log_covariance=log_variance)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp(latent, width, 2, pixels)

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z).sigmoid().view(-1, 1, 28, 28))

    torch.manual_seed(0)
    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=latent, reconstruction_loss="bce")
    model = VAE(config, Encoder(), Decoder()) if name == THEIRS[1] else VAE(config)
    steps = epochs * len(train) // BATCH
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    before = resource.getrusage(resource.RUSAGE_SELF)
    step = 0
    for _ in range(epochs):
        for indices in torch.randperm(len(train)).split(BATCH)[: len(train) // BATCH]:
            step += 1
            optimizer.zero_grad()
            model({"data": train.training_batch(indices, step)["images"]}).loss.backward()
            optimizer.step()
            schedule.step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return model.eval(), pythae_log_weights(model), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def pythae_log_weights(model: nn.Module) -> LogWeights:
    """As ``VAE.get_nll`` of pythae computes them, of many images at once."""

    def log_weights(images: Tensor) -> Tensor:
        encoded = model.encoder(images[:1] if same(images) else images)
        mu, log_variance = encoded.embedding, encoded.log_covariance
        noise = torch.randn(len(images), mu.size(1))
        z = mu + noise * torch.exp(0.5 * log_variance)
        log_posterior = -0.5 * (log_variance + noise.square()).sum(1)
        decoded = model.decoder(z)["reconstruction"].flatten(1)
        log_likelihood = -F.binary_cross_entropy(decoded, images.flatten(1), reduction="none").sum(1)
        return log_likelihood - 0.5 * z.square().sum(1) - log_posterior

    return log_weights


def same(images: Tensor) -> bool:
    """Whether this is one image, many times: a view that ``expand`` made."""
    return len(images) > 1 and images.stride(0) == 0


# --------------------------------------------------------------------------------------------------
# Bounds


@torch.no_grad()
def bounds(log_weights: LogWeights, images: Tensor, samples: int) -> Tensor:
    """(N,) importance-weighted bounds of log p(x) with so many samples, in nats; all samples of an image together."""
    found = []
    for image in images:
        parts = [log_weights(image.expand(min(AT_ONCE, samples), -1, -1, -1)) for _ in range(-(-samples // AT_ONCE))]
        weights = torch.cat(parts).double()
        found.append(weights.logsumexp(0) - math.log(len(weights)))
    return torch.stack(found)


def interval(values: Tensor) -> tuple[float, float]:
    """(mean, half of the 95 % interval)."""
    return float(values.mean()), NormalDist().inv_cdf(0.975) * float(values.std()) / math.sqrt(len(values))


def measure(model: nn.Module, log_weights: LogWeights, held: Tensor, digits: int) -> dict[str, object]:
    """Figures of a trained model, in nats per digit."""
    torch.manual_seed(0)
    elbo = torch.cat([log_weights(part) for part in held.split(BATCH)]).detach().double()
    encoder = getattr(model, "encoder", None)
    if log_weights == getattr(model, "log_weight", None):
        model.encoder = OncePerImage(model.encoder)
    few = bounds(log_weights, held, FEW)
    chosen = torch.linspace(0, len(held) - 1, digits).round().long()
    more = bounds(log_weights, held[chosen], MANY) - few[chosen]
    model.encoder = encoder
    (middle, spread), (gain, error) = interval(-few), interval(more)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "negative ELBO": interval(-elbo),
        f"-log p(x), {FEW} samples": (middle, spread),
        f"-log p(x), {MANY} samples": (middle - gain, math.hypot(spread, error)),
        "digits": [len(held), digits],
    }


def rows() -> list[tuple[str, str]]:
    """(model, binarization) of the table, in order."""
    return [(name, way) for way in ("dynamic", "static") for name in (*OURS, *THEIRS)]


def table(records: list[dict]) -> list[str]:
    """Rows of Markdown: each model, on static and dynamic binarization."""
    lines = [
        f"| model | binarization | parameters | -ELBO | -log p(x), {FEW} samples | -log p(x), {MANY:,} samples"
        " | CPU minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        names = ("negative ELBO", f"-log p(x), {FEW} samples", f"-log p(x), {MANY} samples")
        values = " | ".join("{:.1f} ± {:.1f}".format(*record[name]) for name in names)
        lines.append(
            f"| {record['model']} | {record['binarization']} | {record['parameters']:,} | {values}"
            f" | {record['cpu_minutes']:.1f} |"
        )
    return lines


def available(names: list[str]) -> list[str]:
    """The models that can be trained: without pythae, those of fastgen."""
    if set(names) <= set(OURS):
        return names
    try:
        import pythae  # type: ignore[import-not-found] # noqa: F401
    except ImportError:
        print(INSTALL)
        return [name for name in names if name in OURS]
    return names


def main() -> None:
    from zoo import cpu_name, git

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binarize", nargs="+", default=["dynamic", "static"], choices=["dynamic", "static"])
    parser.add_argument("--models", nargs="+", default=[*OURS, *THEIRS], choices=[*OURS, *THEIRS])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--digits", type=int, default=DIGITS, help="held-out digits with 5,000 samples each")
    given = parser.parse_args()
    given.models = available(given.models)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    for binarize in given.binarize:
        held = binary(binarize)[1]
        images = held.batch(torch.arange(len(held)))["images"].float()
        for name in given.models:
            model, log_weights, seconds = (ours if name in OURS else theirs)(name, binarize, given.epochs)
            figures = measure(model, log_weights, images, given.digits)
            about = {"model": name, "binarization": binarize, "epochs": given.epochs, "seed": 0}
            about |= {"cpu_minutes": round(seconds / 60, 2), "machine": f"{os.cpu_count()} cores of {cpu_name()}"}
            about |= {"torch": torch.__version__, "commit": git("rev-parse", "--short", "HEAD")}
            records = json.loads(RECORDS.read_text()) if RECORDS.exists() else []
            records = [each for each in records if (each["model"], each["binarization"]) != (name, binarize)]
            order = rows()
            records = sorted([*records, about | figures], key=lambda r: order.index((r["model"], r["binarization"])))
            RECORDS.write_text(json.dumps(records, indent=1) + "\n")
            print(table([records[-1]])[-1] if len(records) == 1 else "\n".join(table(records)), flush=True)


if __name__ == "__main__":
    main()
