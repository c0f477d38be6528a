"""Models whose weights and batches are a function of their names: their losses and samples are recorded in ``saved/``.

``python -m tests.models.saved_models FOLDER`` records them again. What lies in ``tests/models/saved`` was recorded at
commit b27fc98, before the models were rewritten as one file each: they still compute the same.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAVED = Path(__file__).with_name("saved")
FACTS: dict[str, dict[str, Any]] = {
    "images": {"image_size": 8, "channels": 1, "levels": 17, "classes": 10},
    "pairs": {"image_size": 16, "channels": 3, "input_channels": 1},
    "domains": {"image_size": 16, "channels": 3},
    "text": {"vocabulary": "abcdefgh"},
    "sequences": {"vocabulary": "abcdefgh", "source_length": 7, "target_length": 6},
    "audio": {"sample_rate": 800, "length": 40},
}
GAN = {"width": 4, "latent_dim": 8}
DENSE = {"width": 8, "depth": 1}
# ruff: noqa: E501
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gan": ("gan", {**DENSE, "latent_dim": 8, "critic_steps": 2}),
    "gan, convolutional": ("gan", {**DENSE, "discriminator": "convolutional", "convolution_width": 4}),
    "cgan": ("cgan", {**DENSE, "latent_dim": 8}),
    "dcgan": ("dcgan", GAN),
    "dcgan, wasserstein": ("dcgan", {**GAN, "loss": "wasserstein", "penalty": "gradient", "discriminator_norm": "none"}),
    "cdcgan": ("cdcgan", GAN),
    "sagan": ("sagan", {"width": 8, "latent_dim": 8}),
    "sagan, no classes": ("sagan", {"width": 8, "latent_dim": 8, "conditional": False}),
    "attention-gan": ("attention-gan", {**GAN, "gate_width": 4}),
    "stylegan": ("stylegan", {"width": 4, "style_dim": 8, "latent_dim": 8}),
    "stylegan, residual": ("stylegan", {"width": 4, "style_dim": 8, "latent_dim": 8, "output": "residual", "path_length_weight": 2.0, "path_length_every": 1}),
    "transgan": ("transgan", {"width": 4, "latent_dim": 8, "penalty_every": 1}),
    "recurrent-gan": ("recurrent-gan", {"generator_width": 8, "critic_width": 8}),
    "recurrent-gan, text": ("recurrent-gan", {"generator_width": 8, "critic_width": 8, "kind": "text", "text_length": 6}),
    "recurrent-gan, sequences": ("recurrent-gan", {"generator_width": 8, "critic_width": 8, "kind": "sequences"}),
    "cyclegan": ("cyclegan", {"width": 4, "blocks": 1, "patch_width": 4, "identity_weight": 0.5, "history": 4}),
    "pix2pix": ("pix2pix", {"width": 4, "patch_width": 4, "num_downsamples": 3}),
    "vae": ("vae", {**DENSE, "latent_dim": 4}),
    "conv-vae": ("conv-vae", {"width": 4, "hidden_dim": 16, "attention": True}),
    "cvae": ("cvae", {**DENSE, "latent_dim": 4}),
    "flow-vae": ("flow-vae", {**DENSE, "flow_width": 8, "flows": 2, "latent_dim": 4}),
    "flow-vae, planar": ("flow-vae", {**DENSE, "flow": "planar", "flows": 2, "latent_dim": 4}),
    "vq-vae": ("vq-vae", {"width": 4, "codebook_size": 16, "prior_width": 16, "code_dim": 4}),
    "transformer-lm": ("transformer-lm", {"width": 16, "depth": 2, "num_heads": 2, "context": 8}),
    "transformer-lm, segments": ("transformer-lm", {"width": 16, "depth": 1, "num_heads": 2, "context": 8, "segments": 2, "activation": "swiglu"}),
    "seq2seq": ("seq2seq", {"width": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1}),
    "image-transformer": ("image-transformer", {"width": 16, "depth": 1, "num_heads": 2, "conditional": True}),
    "image-transformer, codebook": ("image-transformer", {"width": 16, "depth": 1, "num_heads": 2, "codebook_size": 8}),
    "image-transformer, captions": (
        "image-transformer",
        {"width": 16, "depth": 1, "num_heads": 2, "captions": True, "caption_vocabulary": "abc", "caption_length": 4, "caption_examples": ("ab", "c")},
    ),
    "wavenet": ("wavenet", {"channels": 4, "skip_channels": 8, "cycle": 3, "reach": 8, "crop": 20}),
    "wavenet, levels": ("wavenet", {"channels": 4, "skip_channels": 8, "cycle": 3, "reach": 8, "crop": 20, "output": "levels"}),
}  # fmt: skip
SAMPLING: dict[str, dict[str, Any]] = {"transformer-lm": {"length": 6, "prompt": "a"}, "wavenet": {"seconds": 0.02}}


def config_of(name: str, options: dict[str, Any]) -> Any:
    """The config of a model with the options, and with the facts of its kind of data."""
    from fastgen.models import MODELS

    model = MODELS[name]
    known = set(model.config_class.__dataclass_fields__)
    facts = FACTS[options.get("kind", model.kind)]
    return model.config_class(**{**{key: value for key, value in facts.items() if key in known}, **options})


def fill(model: torch.nn.Module) -> None:
    """Weights and statistics that depend on their names and shapes alone, not on the order in which they are made."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                values = torch.randn(tensor.shape, generator=generator)
                fan_in = tensor.shape[1:].numel() if tensor.dim() > 1 else 4
                values = values / math.sqrt(fan_in)
                tensor.copy_(values.abs() + 0.5 if name.endswith(("running_var", "uses")) else values)


def batch_of(kind: str, config: Any) -> dict[str, Tensor]:
    """4 items of the kind of data."""
    generator = torch.Generator().manual_seed(7)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    if kind == "images":
        size, levels = config.image_size, getattr(config, "levels", 17)
        batch = {"images": integers(levels, 4, config.channels, size, size) / (levels - 1), "labels": integers(10, 4)}
        if getattr(config, "captions", False):
            batch["caption"] = integers(4, 4, config.caption_length)
        return batch
    if kind == "pairs":
        shapes = {"inputs": config.input_channels, "targets": config.channels}
        return {name: integers(256, 4, c, config.image_size, config.image_size) / 255 for name, c in shapes.items()}
    if kind == "domains":
        return {name: integers(256, 4, config.channels, config.image_size, config.image_size) / 255 for name in "ab"}
    if kind == "text":
        length = config.text_length if hasattr(config, "text_length") else config.context * config.segments + 1
        return {"tokens": integers(len(config.vocabulary), 4, length)}
    if kind == "sequences":
        batch = {}
        for name, length in (("source", config.source_length), ("target", config.target_length)):
            tokens = 3 + integers(len(config.vocabulary), 4, length)
            tokens[:, 0] = 1
            for row, end in enumerate((2 + integers(length - 2, 4)).tolist()):
                tokens[row, end], tokens[row, end + 1 :] = 2, 0
            batch[name] = tokens
        return batch
    return {"audio": 2 * torch.rand(4, config.length, generator=generator) - 1}


def contents(samples: Any) -> Any:
    """What is in a model's samples, as JSON."""
    if hasattr(samples, "texts"):
        return samples.texts
    return (samples.pixels if hasattr(samples, "pixels") else samples.waves).double().flatten().tolist()[:256]


def losses_of(model: Any, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """By phase, in the first step of 100."""
    from fastgen.models import StepContext

    out = {}
    model.train()
    for phase in model.phases():
        torch.manual_seed(3)
        values = model.loss(phase.name, dict(batch), StepContext(1, 100))
        out[phase.name] = {name: float(value) for name, value in values.items()}
    return out


def record(case: str) -> dict[str, Any]:
    """What a model of the zoo computes: its config, its state dict's names and shapes, losses, scores, samples."""
    from fastgen.models import MODELS, recompute_buffers

    config = config_of(*CASES[case])
    model = MODELS[CASES[case][0]](config)
    entry: dict[str, Any] = {"state": {name: list(t.shape) for name, t in model.state_dict().items()}}
    fill(model)
    recompute_buffers(model)
    batch = batch_of(model.kind, config)
    model.eval()
    generator = torch.Generator().manual_seed(5)
    scores = model.score(dict(batch), generator=generator)
    entry["score"] = {name: value.double().tolist() for name, value in scores.items()}
    options = model.sampling_class(**SAMPLING.get(CASES[case][0], {}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        drawn = (
            model.translate(dict(batch), options, generator=generator)
            if model.kind in ("pairs", "domains")
            else model.draw(3, options, generator=generator)
        )
    entry["samples"] = contents(drawn)
    entry["losses"] = losses_of(model, batch)
    return entry


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        entry = record(case)
        file = folder / f"{case.replace(', ', '-').replace(' ', '-')}.json"
        file.write_text(json.dumps(entry, indent=None) + "\n")
        print(case, {phase: values["loss"] for phase, values in entry["losses"].items()}, entry["score"].keys())
