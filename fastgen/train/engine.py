"""One training step: every phase of a model, its gradients, its optimizer, the EMA of the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastgen.models import Batch, GenerativeModel, Phase, StepContext, recomputed_buffers
from fastgen.models.augmentation import augment_batch, parse_augment
from fastgen.train.config import TrainConfig
from fastgen.train.sharding import assign, shard, whole
from fastgen.train.stream import AUGMENT, FLIP, NOISE, mirrored, seed_everything, seed_of, to_device

AVERAGE_RAMP = 10
Values = dict[str, Tensor]


class _Caller(nn.Module):
    """The networks of a phase as one module, for DDP and FSDP."""

    def __init__(self, model: GenerativeModel, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        object.__setattr__(self, "_model", model)  # called, not held

    def forward(self, method: str, *args: Any, **options: Any) -> Any:
        return getattr(self._model, method)(*args, **options)


class _Updater:
    """A phase with its networks and its optimizer."""

    def __init__(self, model: GenerativeModel, phase: Phase, config: TrainConfig, accelerator: Accelerator) -> None:
        self.phase = phase
        networks = [model.get_submodule(name) for name in phase.networks] or [model]
        if config.compile:
            for network in networks:
                network.compile()
        caller = _Caller(model, networks)
        if config.strategy == "fsdp" and accelerator.num_processes > 1:
            precision = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(config.precision)
            self.module = shard(caller, model, precision)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor needs torch 2.13
                self.module = accelerator.prepare_model(caller)
        self.parameters = [weight for network in networks for weight in network.parameters()]
        self.trained = [weight for weight in self.parameters if weight.requires_grad]  # the others stay as they are
        self.rate = config.learning_rate or phase.learning_rate
        options = {"lr": self.rate, "betas": phase.betas, "weight_decay": phase.weight_decay}
        # Not wrapped by accelerate, whose wrapper searches for other packages' optimizers on disk in every step.
        self.optimizer = torch.optim.AdamW(self.parameters, fused=True, **options)  # type: ignore[arg-type]


class Engine:
    """A model in training: phases, optimizers, the EMA of the weights, counters.

    ``step`` counts finished steps, ``skipped`` those in which a phase's gradient was NaN or infinite: that phase then
    changes no weight and no statistic. ``in_a_row`` counts the skipped steps since the last good one.
    """

    def __init__(self, model: GenerativeModel, config: TrainConfig, total: int, accelerator: Accelerator) -> None:
        self.model, self.config, self.total, self.accelerator = model, config, total, accelerator
        self.device = accelerator.device
        model.to(self.device)
        if model.channels_last and self.device.type == "cpu":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.updaters = [_Updater(model, phase, config, accelerator) for phase in model.phases()]
        self.step = 0
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self._sums: Values = {}
        self._summed = 0
        self._statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._good_statistics = [buffer.clone() for buffer in self._statistics]
        state = self._floating_state(model.averaged)
        copies = {tensor: tensor.detach().clone() for tensor in state.values()}
        self.average = {name: copies[tensor] for name, tensor in state.items()}  # tied weights share one
        self._pairs = list(copies.items())
        updated = {weight for updater in self.updaters for weight in updater.parameters}
        for name, weight in model.named_parameters():
            if weight not in updated:
                raise ValueError(f"{model.name}: expected phases that update every weight, got none for {name}")
        for updater in self.updaters:
            if not updater.trained:
                phase = updater.phase.name
                raise ValueError(
                    f"{model.name}: expected a weight to train in phase {phase!r}, got only frozen ones"
                    " (requires_grad is false)"
                )

    def _floating_state(self, networks: Sequence[str]) -> Values:
        """Weights and statistics of the submodules (default: all), by their names in the model."""
        state = self.model.state_dict(keep_vars=True)
        chosen = {
            name: tensor
            for name, tensor in state.items()
            if (tensor.is_floating_point() or tensor.is_complex()) and (not networks or name.split(".")[0] in networks)
        }
        return chosen

    def advance(self, batches: Iterator[Batch], batches_per_step: int) -> None:
        """One step, on the next ``batches_per_step`` batches (of ``accumulate`` parts each)."""
        step = self.step + 1
        parts = self.config.accumulate
        groups = [[to_device(next(batches), self.device) for _ in range(parts)] for _ in range(batches_per_step)]
        if self.config.flip:
            for index, pieces in enumerate(groups):
                for part, batch in enumerate(pieces):
                    pieces[part] = mirrored(batch, self._seed(FLIP, step, 0, index, part))
        if names := parse_augment(self.config.augment):
            for index, pieces in enumerate(groups):
                for part, batch in enumerate(pieces):
                    pieces[part] = augment_batch(batch, names, self._seed(AUGMENT, step, 0, index, part))
        factor = self.config.rate(step, self.total)
        bad = torch.zeros((), dtype=torch.bool, device=self.device)
        for number, updater in enumerate(self.updaters):
            self._enable_gradients(updater)
            for group in updater.optimizer.param_groups:
                group["lr"] = updater.rate * factor
            for repeat in range(updater.phase.repeats):
                bad = bad | self._update(updater, number, groups[repeat], step, repeat)
        self._update_average()
        self.skipped += bad
        self.in_a_row = torch.where(bad, self.in_a_row + 1, 0)
        self._summed += 1
        self.step = step

    def _seed(self, purpose: int, step: int, *where: int) -> int:
        """The seed of a part of a step; the last of ``where`` is the part within this process."""
        accelerator = self.accelerator
        part = where[-1] * accelerator.num_processes + accelerator.process_index
        return seed_of(self.config.seed, purpose, step, *where[:-1], part)

    def _enable_gradients(self, updater: _Updater) -> None:
        """Gradients for this phase's weights only."""
        if len(self.updaters) > 1:
            for other in self.updaters:
                for weight in other.trained:
                    weight.requires_grad_(False)
            for weight in updater.trained:
                weight.requires_grad_(True)

    def _update(self, updater: _Updater, number: int, parts: Sequence[Batch], step: int, repeat: int) -> Tensor:
        """One update of one phase; whether it was skipped, as a tensor, so as not to synchronize."""
        scaler = self.accelerator.scaler
        context = StepContext(step, self.total, scaler)
        updater.optimizer.zero_grad()
        for part, batch in enumerate(parts):
            seed_everything(self._seed(NOISE, step, number, repeat, part), self.device)
            last = part == len(parts) - 1
            with nullcontext() if last else self._without_exchange(updater):
                with self.accelerator.autocast():
                    out: Values = updater.module("loss", updater.phase.name, batch, context)
                loss = out["loss"] / len(parts)
                (loss if scaler is None else scaler.scale(loss)).backward()
            self._record(updater.phase.name, out, len(parts) * updater.phase.repeats)
        if scaler is not None:
            scaler.unscale_(updater.optimizer)
        gradients = [weight.grad for weight in updater.parameters if weight.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(updater.parameters, self.config.clip, norm)
        bad = ~torch.isfinite(norm)
        if scaler is None:
            updater.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            updater.optimizer.step()
        else:
            scaler.step(updater.optimizer)
            scaler.update()
        self._keep_good_statistics(bad)
        return bad

    @contextmanager
    def _without_exchange(self, updater: _Updater) -> Iterator[None]:
        if isinstance(updater.module, FSDPModule):
            updater.module.set_requires_gradient_sync(False)
            yield
            updater.module.set_requires_gradient_sync(True)
        else:
            with self.accelerator.no_sync(updater.module):
                yield

    @torch.no_grad()
    def _keep_good_statistics(self, bad: Tensor) -> None:
        """Restores the statistics of batch norm after a step with a NaN gradient."""
        for now, good in zip(self._statistics, self._good_statistics, strict=True):
            now.copy_(torch.where(bad, good, now))
            good.copy_(now)

    @torch.no_grad()
    def _update_average(self) -> None:
        """One step of the EMA. The decay ramps up to its value, so that early weights soon lose their share."""
        decay = min(self.config.average_decay, (1 + self.step) / (AVERAGE_RAMP + self.step))
        weights, averages = zip(*self._pairs, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def _record(self, phase: str, values: Values, parts: int) -> None:
        for name, value in values.items():
            name = f"{phase}/{name}" if len(self.updaters) > 1 else name
            mean = value.detach().float() / parts
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean

    def means(self) -> dict[str, float]:
        """Means of all values since the last call, over steps and processes."""
        if not self._summed:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names]) / self._summed
        sums = self.accelerator.reduce(sums, "mean")
        self._sums, self._summed = {}, 0
        return dict(zip(names, sums.tolist(), strict=True))

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model in evaluation mode, with averaged weights and ``fastgen.models.recomputed_buffers``.

        Yields a module that calls the model's methods on all processes.
        """
        self._swap()
        self.model.eval()
        try:
            with recomputed_buffers(self.model), torch.no_grad(), self.accelerator.autocast():
                yield self.updaters[0].module
        finally:
            for updater in self.updaters:
                if isinstance(updater.module, FSDPModule):
                    updater.module.reshard()  # the weights gathered for evaluation are stale
            self.model.train()
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in self._pairs:
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Makes buffers and their averages equal in all processes, before a checkpoint.

        Statistics become their means. Row i of a store of items comes from process i modulo the number of processes.
        """
        accelerator = self.accelerator
        if accelerator.num_processes > 1:
            stored = {buffer for name in self.model.stores for buffer in self.model.get_submodule(name).buffers()}
            averages = dict(self._pairs)
            for buffer in self._statistics:
                for each in (buffer, *([averages[buffer]] if buffer in averages else [])):
                    if buffer in stored:
                        own = torch.zeros_like(each)
                        mine = slice(accelerator.process_index, None, accelerator.num_processes)
                        own[mine] = each[mine]
                        each.copy_(accelerator.reduce(own, "sum"))
                    else:
                        each.copy_(accelerator.reduce(each, "mean"))
            for now, good in zip(self._statistics, self._good_statistics, strict=True):
                good.copy_(now)

    def tensors(self) -> Values:
        """The complete state, by name, for ``restore``. Every process has to call it."""
        state = self.model.state_dict(keep_vars=True)
        named = {f"model/{name}": tensor for name, tensor in _unshared(state).items()}
        named |= {f"average/{name}": tensor for name, tensor in _unshared(self.average).items()}
        for updater, name, weight in self._optimized():
            for key, tensor in updater.optimizer.state[weight].items():
                named[f"optimizer/{updater.phase.name}/{name}/{key}"] = whole(tensor)
        named |= {"step": torch.tensor(self.step), "skipped": self.skipped, "in_a_row": self.in_a_row}
        scaler = self.accelerator.scaler
        if scaler is not None:
            state = scaler.state_dict()
            named["scaler"] = torch.tensor([state["scale"], state["_growth_tracker"]], dtype=torch.float64)
        return named

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state; training then continues bit for bit on the same kind of device.

        Raises:
            ValueError: a tensor is missing, or has another shape than this model's.
        """
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            assign(tensor, find(tensors, f"model/{name}", tensor))
        for name, tensor in self.average.items():
            assign(tensor, find(tensors, f"average/{name}", tensor))
        for updater, name, weight in self._optimized():
            prefix = f"optimizer/{updater.phase.name}/{name}/"
            state = updater.optimizer.state[weight]
            for key in sorted(key for key in tensors if key.startswith(prefix)):
                saved = tensors[key]
                if saved.dim():
                    state[key.removeprefix(prefix)] = torch.zeros_like(weight, requires_grad=False)
                    assign(state[key.removeprefix(prefix)], find(tensors, key, weight))
                else:
                    state[key.removeprefix(prefix)] = saved.to(self.device, copy=True)
        self.step = int(find(tensors, "step"))
        self.skipped.copy_(find(tensors, "skipped"))
        self.in_a_row.copy_(find(tensors, "in_a_row"))
        scaler = self.accelerator.scaler
        if scaler is not None:
            scale, tracker = find(tensors, "scaler", torch.empty(2)).tolist()
            scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": int(tracker)})
        for now, good in zip(self._statistics, self._good_statistics, strict=True):
            good.copy_(now)

    def _optimized(self) -> Iterator[tuple[_Updater, str, Tensor]]:
        """Every weight with its phase and its name in the model."""
        names = {weight: name for name, weight in self.model.named_parameters()}
        for updater in self.updaters:
            for weight in updater.parameters:
                yield updater, names[weight], weight


def _unshared(named: Mapping[str, Tensor]) -> Values:
    """Full tensors; tied weights are copied for each of their names, as safetensors can't store shared memory."""
    seen: set[Tensor] = set()
    found = {}
    for name, tensor in named.items():
        full = whole(tensor.detach())
        found[name] = full.clone() if tensor in seen else full
        seen.add(tensor)
    return found


def find(tensors: Mapping[str, Tensor], name: str, like: Tensor | None = None) -> Tensor:
    """Raises ValueError where the tensor is missing, or has another shape than ``like``."""
    saved = tensors.get(name)
    expected = torch.Size() if like is None else like.shape
    if saved is None or saved.shape != expected:
        got = "none" if saved is None else str(tuple(saved.shape))
        raise ValueError(f"{name}: expected a tensor of shape {tuple(expected)}, got {got}")
    return saved
