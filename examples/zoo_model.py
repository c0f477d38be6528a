"""Train and sample a model of the zoo from Python, without the command line.

A model names its phases (which networks are updated, in which order, with which optimizer settings) and computes the
loss of each. That is all a training loop needs; `fastgen train` uses the same protocol.

    python examples/zoo_model.py --steps 1000 --out my-dcgan
"""

from __future__ import annotations

import argparse

import torch

from fastgen.data import DataConfig, load_data
from fastgen.models import GenerativeModel, Phase, StepContext, create_model


def optimizer_of(model: GenerativeModel, phase: Phase) -> torch.optim.Optimizer:
    networks = [getattr(model, name) for name in phase.networks] or [model]
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return torch.optim.AdamW(parameters, phase.learning_rate, phase.betas, weight_decay=phase.weight_decay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", default="", help="folder for the trained model")
    options = parser.parse_args()
    torch.manual_seed(0)
    dataset = load_data(DataConfig("digits"), "images")
    train, _ = dataset.splits()
    facts = {name: dataset.facts[name] for name in ("image_size", "channels")}
    model = create_model("dcgan", **facts, width=32)
    optimizers = {phase.name: optimizer_of(model, phase) for phase in model.phases()}

    for step in range(1, options.steps + 1):
        batch = train.batch(torch.randint(len(train), (options.batch_size,)))
        values = {}
        for phase in model.phases():
            for _ in range(phase.repeats):
                values[phase.name] = model.loss(phase.name, batch, StepContext(step=step, steps=options.steps))
                optimizers[phase.name].zero_grad()
                values[phase.name]["loss"].backward()
                optimizers[phase.name].step()
        if step % 100 == 0 or step == options.steps:
            print(f"step {step}  " + "  ".join(f"{name} {value['loss'].item():.3f}" for name, value in values.items()))

    model.eval()
    images = model.sample(16, generator=torch.Generator().manual_seed(0))
    print(f"sampled images {tuple(images.shape)}, from {images.min():.2f} to {images.max():.2f}")
    if options.out:
        model.save_pretrained(options.out)
        restored = GenerativeModel.from_pretrained(options.out)
        again = restored.sample(16, generator=torch.Generator().manual_seed(0))
        print(f"{options.out}: {type(restored).__name__}, the same samples: {torch.equal(again, images)}")


if __name__ == "__main__":
    main()
