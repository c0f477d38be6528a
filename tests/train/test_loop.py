"""Order of the items, schedules, averages, phases: what a step computes."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastgen.data import TensorItems
from fastgen.models import MODELS, Batch, GenerativeModel, NoOptions, Phase, StepContext
from fastgen.train.checkpoint import Header, load_checkpoint, save_checkpoint
from fastgen.train.config import TrainConfig
from fastgen.train.engine import Engine
from fastgen.train.run import load_average
from fastgen.train.sharding import leave, make_accelerator
from fastgen.train.stream import Order, Stream, batches, mirrored, seed_everything

CPU = torch.device("cpu")


def test_every_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    order = Order(50, seed=0)
    first, second = order.slice(0, 50), order.slice(50, 100)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert not torch.equal(first, second)
    again = Order(50, seed=0)
    assert torch.equal(again.slice(45, 60), torch.cat([first[45:], second[:10]]))  # across the border, out of turn
    assert torch.equal(again.slice(3, 4), first[3:4])
    assert not torch.equal(Order(50, seed=1).slice(0, 50), first)


@pytest.mark.parametrize("batches_per_step", [1, 3])
def test_parts_are_the_same_items_for_any_number_of_processes(batches_per_step: int) -> None:
    def parts(accumulate: int, processes: int) -> list[list[int]]:
        found = []
        for process in range(processes):
            stream = Stream(
                30, 0, 8, batches_per_step=batches_per_step, accumulate=accumulate, process=process, processes=processes
            )
            stream.first_step, stream.last_step = 3, 6
            found.append([indices.tolist() for indices in stream])
        return [part for together in zip(*found, strict=True) for part in together]

    assert parts(4, 1) == parts(2, 2) == parts(1, 4)
    whole = [index for part in parts(1, 1) for index in part]
    assert whole == [index for part in parts(1, 4) for index in part]


def test_lazy_items_come_in_the_same_order_from_workers() -> None:
    class Lazy(TensorItems):
        lazy = True

    tensors = {"images": torch.arange(20.0)}
    stream = Stream(20, 0, 4, batches_per_step=1, accumulate=1, process=0, processes=1)
    stream.first_step, stream.last_step = 2, 7
    direct = [batch["images"].tolist() for batch in batches(TensorItems(tensors), stream, CPU, 0)]
    fetched = [batch["images"].tolist() for batch in batches(Lazy(tensors), stream, CPU, 2)]
    assert direct == fetched
    assert len(direct) == 6


def test_images_are_flipped_at_random_and_pairs_together() -> None:
    images = torch.rand(100, 1, 2, 2)
    out = mirrored({"inputs": images, "targets": images.clone(), "labels": torch.arange(100)}, seed=0)
    assert torch.equal(out["inputs"], out["targets"])
    flipped = (out["inputs"] == images.flip(-1)).all(dim=(1, 2, 3))
    assert ((out["inputs"] == images).all(dim=(1, 2, 3)) | flipped).all()
    assert 30 < flipped.sum() < 70
    assert torch.equal(mirrored({"inputs": images}, seed=0)["inputs"], out["inputs"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup": 1}, [0.5, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [1, 0.853553, 0.5, 0.146447]),
    ],
    ids=str,
)
def test_learning_rates_follow_the_schedule(options: dict[str, Any], expected: list[float]) -> None:
    config = TrainConfig(**options)
    assert [config.rate(step, 4) for step in range(1, 5)] == pytest.approx(expected, abs=1e-6)


def test_the_length_of_a_run_comes_from_epochs_or_steps() -> None:
    assert TrainConfig(epochs=2.0, batch_size=8).total_steps(100, 1) == 25
    assert TrainConfig(epochs=2.0, batch_size=8).total_steps(100, 5) == 5
    assert TrainConfig(steps=7).total_steps(100, 1) == 7
    assert TrainConfig(epochs=0.001).total_steps(100, 1) == 1


@dataclass(frozen=True)
class PairConfig:
    pass


class Pair(GenerativeModel):
    """Two networks that pull at one another: what the engine does with phases can be followed by hand."""

    name, summary, kind, default_data, config_class = "pair", "", "images", "digits", PairConfig
    repeats: ClassVar[int] = 1
    seen: list[tuple[str, int, float]]

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.left, self.right = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.seen = []

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("left", ("left",), learning_rate=0.1, repeats=self.repeats),
            Phase("right", ("right",), learning_rate=0.01, betas=(0.5, 0.9), weight_decay=0.1),
        )

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        self.seen.append((phase, context.step, float(batch["images"].sum())))
        out = self.right(self.norm(self.left(batch["images"])))
        noise = torch.rand(())
        sign = 1 if phase == "left" else -1
        return {"loss": sign * (out.square().mean() + out.mean()), "noise": noise}

    def draw(self, n: int, options: NoOptions, *, generator: torch.Generator | None = None) -> Any:
        raise NotImplementedError


@pytest.fixture
def engine_of() -> Iterator[Any]:
    made = []

    def engine_of(model: GenerativeModel, steps: int = 10, **options: Any) -> Engine:
        config = TrainConfig(device="cpu", batch_size=4, **options)
        made.append(make_accelerator(config, CPU))
        return Engine(model, config, steps, made[-1])

    yield engine_of
    if made:
        leave(made[-1])


def fixed_batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield {"images": torch.randn(4, 3, generator=generator)}


def test_phases_update_their_own_weights_by_their_own_optimizers(engine_of: Any) -> None:
    """Against the same by hand, and in the order of the phases, on one batch."""
    torch.manual_seed(0)
    model = Pair()
    twin = copy.deepcopy(model)
    engine = engine_of(model, clip=0.5, average_decay=0.5)
    ours, theirs = fixed_batches(), fixed_batches()
    rates = {"left": (0.1, (0.9, 0.999), 0.0), "right": (0.01, (0.5, 0.9), 0.1)}
    optimizers = {
        name: torch.optim.AdamW(twin.get_submodule(name).parameters(), lr=rate, betas=betas, weight_decay=decay)
        for name, (rate, betas, decay) in rates.items()
    }
    average = {name: tensor.clone() for name, tensor in twin.state_dict().items() if tensor.is_floating_point()}
    for step in range(1, 5):
        engine.advance(ours, 1)
        batch = next(theirs)
        for name, optimizer in optimizers.items():
            twin.zero_grad()
            twin.loss(name, batch, StepContext(step, 10))["loss"].backward()
            nn.utils.clip_grad_norm_(twin.get_submodule(name).parameters(), 0.5)
            optimizer.step()
        decay = min(0.5, (1 + step - 1) / (10 + step - 1))
        for name, tensor in average.items():
            average[name] = tensor.lerp(twin.state_dict()[name], 1 - decay)
    assert [(phase, step) for phase, step, _ in model.seen] == [(p, s) for s in range(1, 5) for p in ("left", "right")]
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    for name, tensor in average.items():
        torch.testing.assert_close(engine.average[name], tensor, rtol=1e-5, atol=1e-6)


def test_repeats_take_batches_of_their_own(engine_of: Any) -> None:
    class Critic(Pair):
        repeats = 3

    model = Critic()
    engine = engine_of(model)
    engine.advance(fixed_batches(), 3)
    sums = [float(next(taken)["images"].sum()) for taken in [fixed_batches()] for _ in range(3)]
    assert [phase for phase, _, _ in model.seen] == ["left", "left", "left", "right"]
    assert [total for _, _, total in model.seen] == pytest.approx([*sums, sums[0]])


def test_noise_depends_on_seed_step_and_part_and_on_nothing_before(engine_of: Any) -> None:
    def noises(start: int, **options: Any) -> list[float]:
        engine = engine_of(Pair(), **options)
        engine.step = start
        found = []
        for _ in range(2):
            seed_everything(123, CPU)
            engine.advance(fixed_batches(), 1)
            found.append(engine.means()["left/noise"])
        return found

    first = noises(0)
    assert noises(0) == first
    assert noises(1)[0] == first[1] != first[0]
    assert noises(0, seed=1)[0] != first[0]


def test_averaged_weights_are_there_for_evaluation_and_gone_after(engine_of: Any) -> None:
    model = Pair()
    engine = engine_of(model, average_decay=0.9)
    stream = fixed_batches()
    for _ in range(3):
        engine.advance(stream, 1)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in engine.average.items()}
    with pytest.raises(RuntimeError, match="stop"), engine.averaged():
        assert not model.training
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in average.items())
        raise RuntimeError("stop")
    assert model.training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in trained.items())
    assert not torch.equal(trained["left.weight"], average["left.weight"])


class Normalized(GenerativeModel):
    """Spectral norms of both kinds, a weight norm and a weight with two names."""

    name, summary, kind, default_data, config_class = "normalized", "", "images", "digits", PairConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.spectral = parametrizations.spectral_norm(nn.Linear(3, 3))
        self.hooked = nn.utils.spectral_norm(nn.Linear(3, 3))
        self.both = parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(3, 3)))
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("all", learning_rate=0.3),)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.spectral, self.hooked, self.both, self.first, self.second):
            x = layer(x)
        return x

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        return {"loss": self(batch["images"]).square().mean()}

    def furthest(self) -> float:
        """How far the largest singular value of a weight is from 1."""
        self(torch.zeros(1, 3))  # a hook computes its weight with a forward pass
        layers = (self.spectral, self.hooked, self.both)
        return max(abs(float(torch.linalg.matrix_norm(layer.weight, 2)) - 1) for layer in layers)


def test_frozen_weights_stay_as_they_are_in_every_phase(engine_of: Any) -> None:
    torch.manual_seed(0)
    model = Pair()
    model.left = nn.Linear(3, 3)
    model.left.weight.requires_grad_(False)
    before = [weight.detach().clone() for weight in model.parameters()]
    engine, stream = engine_of(model), fixed_batches()
    for _ in range(2):
        engine.advance(stream, 1)
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)]
    assert dict(zip([name for name, _ in model.named_parameters()], changed, strict=True)) == {
        "left.weight": False,
        "left.bias": True,
        "right.weight": True,
    }


def test_a_phase_without_a_weight_to_train_is_an_error(engine_of: Any) -> None:
    model = Pair()
    model.left.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^pair: expected a weight to train in phase 'left', got only frozen ones"):
        engine_of(model)


def test_averaged_weights_are_spectrally_normalized_and_evaluation_does_not_affect_training(
    engine_of: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Normalized()
    engine = engine_of(model, average_decay=0.9)
    stream = fixed_batches()
    for _ in range(4):
        engine.advance(stream, 1)
    before = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    loaded = Normalized()
    load_average(loaded, before)
    loaded.eval()
    with engine.averaged():
        assert model.furthest() < 1e-4
        assert loaded.furthest() < 1e-4
        found = loaded.state_dict()
        assert [name for name, value in model.state_dict().items() if not torch.equal(found[name], value)] == []
        average = engine.model.first.weight.clone()
    after = engine.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert torch.equal(average, before["average/first.weight"])
    assert torch.equal(before["average/first.weight"], before["average/second.weight"])
    assert not torch.equal(average, model.first.weight)

    save_checkpoint(tmp_path / "file", Header("normalized", {}, {}, {}, ""), after)
    engine.advance(fixed_batches(), 1)
    other = engine_of(Normalized(), average_decay=0.9)
    other.restore(load_checkpoint(tmp_path / "file")[1])
    other.advance(fixed_batches(), 1)
    first, second = engine.tensors(), other.tensors()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_a_weight_that_no_phase_updates_is_refused(engine_of: Any) -> None:
    class Forgetful(Pair):
        def phases(self) -> tuple[Phase, ...]:
            return super().phases()[:1]

    with pytest.raises(ValueError, match=r"pair: expected phases that update every weight, got none for right\.weight"):
        engine_of(Forgetful())


@pytest.mark.slow
def test_ten_thousand_steps_neither_slow_down_nor_grow(engine_of: Any) -> None:
    model = Pair()
    engine = engine_of(model, steps=10_000)
    stream = fixed_batches()
    process = psutil.Process()
    seconds, memory = [], []
    for _ in range(20):
        model.seen.clear()
        started = time.process_time()
        for _ in range(500):
            engine.advance(stream, 1)
            if engine.step % 10 == 0:
                engine.means()
        seconds.append(time.process_time() - started)
        memory.append(process.memory_info().rss)
    print([f"{value:.2f}" for value in seconds], [f"{value / 2**20:.1f}" for value in memory])
    assert sorted(seconds[10:])[5] < 1.2 * sorted(seconds[2:10])[4]
    assert memory[-1] - memory[4] < 2**21  # two MiB


@pytest.mark.parametrize("name", ["dcgan", "cdcgan", "stylegan", "vq-vae"])
def test_channels_last_weights_give_the_same_losses(name: str, engine_of: Any) -> None:
    """On a CPU the engine changes the memory format of these models, not what they compute."""
    cls = MODELS[name]
    assert cls.channels_last
    options = {"image_size": 8, "channels": 3, "width": 8} | ({"classes": 2} if name == "cdcgan" else {})
    torch.manual_seed(0)
    plain = cls(cls.config_class(**options))
    model = copy.deepcopy(plain)
    engine_of(model)
    formats = [
        weight.is_contiguous(memory_format=torch.channels_last) for weight in model.parameters() if weight.dim() == 4
    ]
    assert all(formats)
    batch = {"images": torch.rand(4, 3, 8, 8), "labels": torch.tensor([0, 1, 0, 1])}
    for phase in model.phases():
        losses = []
        for each in (plain, model):
            torch.manual_seed(1)
            losses.append(each.loss(phase.name, batch, StepContext(1, 2))["loss"])
        torch.testing.assert_close(losses[1], losses[0])
