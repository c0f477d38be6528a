"""Everything that changes during training, as one flat set of named tensors."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from fastgen.models import ConvVAE
from fastgen.train.checkpoint import load_checkpoint

AVERAGE_RAMP = 10


class TrainState:
    """A model, the running average of its weights, its optimiser and torch's global random states.

    The average is what is evaluated, sampled from and kept. ``epoch`` and ``step`` count what is finished.
    """

    def __init__(self, model: ConvVAE, learning_rate: float) -> None:
        self.model = model
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)
        self.epoch = 0
        self.step = 0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """One step of the average: decay grows to its value, so that early weights are soon forgotten."""
        self.step += 1
        decay = min(decay, (1 + self.step) / (AVERAGE_RAMP + self.step))
        for average, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name; what ``restore`` takes."""
        named = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        named |= {f"average/{name}": tensor for name, tensor in self.average.state_dict().items()}
        for name, weight in self.model.named_parameters():
            for key, tensor in self.optimizer.state[weight].items():
                named[f"optimizer/{name}/{key}"] = tensor
        named["epoch"] = torch.tensor(self.epoch)
        named["step"] = torch.tensor(self.step)
        named["rng/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            named["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        return named

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue where ``tensors`` were taken: on the CPU, bit for bit.

        Raises:
            ValueError: a tensor is missing, or has another shape than this model's.
        """
        load_weights(self.model, tensors, "model/")
        load_weights(self.average, tensors, "average/")
        moments: dict[int, dict[str, Tensor]] = {}
        for index, (name, _) in enumerate(self.model.named_parameters()):
            prefix = f"optimizer/{name}/"
            found = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
            if found:
                moments[index] = found
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.epoch = int(tensors["epoch"])
        self.step = int(tensors["step"])
        torch.set_rng_state(tensors["rng/cpu"])
        if self.device.type == "cuda" and "rng/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng/cuda"], self.device)


def kept_epoch(checkpoint: Path) -> int:
    """The epoch that a checkpoint file holds, whatever was happening when it was interrupted."""
    return int(load_checkpoint(checkpoint)[1]["epoch"])


def load_weights(model: ConvVAE, tensors: dict[str, Tensor], prefix: str) -> None:
    """Copy the tensors named ``prefix`` + the model's own names into it.

    Raises:
        ValueError: a tensor is missing, or has another shape than the model's.
    """
    for name, weight in model.state_dict().items():
        saved = tensors.get(prefix + name)
        if saved is None or saved.shape != weight.shape:
            came = "none" if saved is None else str(tuple(saved.shape))
            raise ValueError(f"{prefix}{name}: expected a tensor of shape {tuple(weight.shape)}, got {came}")
        weight.copy_(saved)
