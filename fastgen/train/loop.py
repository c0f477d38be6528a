"""The training loop: steps, and when to log, evaluate, sample and save."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastgen.batch import TRANSLATED
from fastgen.data import Items
from fastgen.models import Images, Samples
from fastgen.train.checkpoint import Header, save_checkpoint
from fastgen.train.curves import read_rows, write_curves
from fastgen.train.distances import Distances
from fastgen.train.engine import Engine
from fastgen.train.errors import StoppedError
from fastgen.train.estimate import STEP, Costs
from fastgen.train.evaluation import VISUALIZED, Thinned, first, mean_scores, scores
from fastgen.train.files import inside
from fastgen.train.folder import STEP_DIGITS, RunFolder
from fastgen.train.lock import check_held
from fastgen.train.progress import Progress
from fastgen.train.report import write_report
from fastgen.train.sample_files import save_samples
from fastgen.train.sample_history import REAL
from fastgen.train.signals import StopRequest
from fastgen.train.stream import Stream, batches, resident

SAMPLES = {"images": 64, "pairs": 16, "domains": 16, "text": 4, "sequences": 8, "audio": 4}
EVALUATED = 2048  # held-out items of an evaluation during training at most; ``fastgen evaluate`` uses all
LEAST_EVALUATED = 64
SHARE, FORWARD_SHARE = 0.05, 1 / 3
"""Share of a run's work that its evaluations may take, and the share that the forward pass has in that of an item's
training: how many items an evaluation takes follows from them, unless the interval of evaluations is given."""
SHARE_OF_SAMPLES, QUICK = 0.1, 1.0
"""Share of the time that samples may take, and seconds below which they are always made."""
REHEARSED, REHEARSAL_SECONDS = 3, 5.0
WORTH_AN_ESTIMATE = 20.0
"""Steps and seconds after which the time of a run is estimated, and seconds of a run that is worth one."""
SECONDS_BETWEEN_PAGES = 300.0  # curves and report take seconds


class Trainer:
    """A run in its folder, from the engine's step to the last one.

    Every process has one; the first writes the files.
    """

    def __init__(self, engine: Engine, splits: tuple[Items, Items], folder: RunFolder, header: Header) -> None:
        config = engine.config
        accelerator = engine.accelerator
        self.engine, self.config, self.folder, self.header = engine, config, folder, header
        self.train = resident(splits[0], engine.device)
        self.first_process = accelerator.is_main_process
        self.batches_per_step = max(phase.repeats for phase in engine.model.phases())
        self.stream = Stream(
            len(self.train),
            config.seed,
            config.batch_size,
            batches_per_step=self.batches_per_step,
            accumulate=config.accumulate,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        self.epoch_steps = len(self.train) / (config.batch_size * self.batches_per_step)
        self.saved = engine.step
        every = {what: config.every(what, engine.total) for what in ("evaluate", "sample", "checkpoint")}
        self._evaluate_every, self._sample_every, self._save_every = every.values()
        self.costs = Costs(engine.total, every)
        self.held_out = Thinned(splits[1], self._items_to_evaluate())
        self.distances: Distances | None = None
        if config.distance_samples:
            self.distances = Distances(engine, header, folder, splits, config.distance_samples)
        self._sampling = 0.0  # seconds spent on samples
        self._began = time.perf_counter() - self._seconds_before()
        self._training = 0.0  # seconds spent in steps since the last line of metrics
        self._steps = 0
        self._pages = time.perf_counter()
        self._speed = 0.0

    def run(self, progress: Progress, stop: StopRequest) -> None:
        """Train to the last step.

        Raises:
            StoppedError: by a signal, or because gradients stay NaN or infinite.
        """
        engine = self.engine
        self.stream.first_step, self.stream.last_step = engine.step + 1, engine.total
        parts = batches(self.train, self.stream, engine.device, self.config.workers)
        engine.model.train()
        begun, entered = engine.step, time.perf_counter()
        while engine.step < engine.total:
            started = time.perf_counter()
            engine.advance(parts, self.batches_per_step)
            self._training += time.perf_counter() - started
            self._steps += 1
            progress.advance()
            step = engine.step
            if step == begun + REHEARSED:
                self._announce(time.perf_counter() - started)
            last = step == engine.total
            if step % self.config.log_every == 0 or last:
                self._log(progress)
            if step % self._evaluate_every == 0 or last:
                self._timed("evaluate", lambda: self._evaluate(progress))
            due = step % self._sample_every == 0 and self._may_sample(time.perf_counter() - entered)
            if due or last:
                self._sampling += self._timed("sample", self.sample)
            if step % self._save_every == 0 or last:
                self._timed("checkpoint", self.save)
            if self._stop_requested(stop, step):
                self.save()
                raise StoppedError("interrupted", self.saved, interrupted=True)

    def rehearse(self) -> None:
        """Time a few steps, an evaluation and samples, and write nothing: the model has changed afterwards."""
        engine = self.engine
        self.stream.first_step, self.stream.last_step = engine.step + 1, engine.total
        parts = batches(self.train, self.stream, engine.device, self.config.workers)
        engine.model.train()
        began, least = time.perf_counter(), float("inf")
        for count in range(1, min(10, engine.total) + 1):
            started = time.perf_counter()
            engine.advance(parts, self.batches_per_step)
            int(engine.skipped)  # synchronizes
            least = min(least, time.perf_counter() - started)
            if count >= REHEARSED and time.perf_counter() - began > REHEARSAL_SECONDS:
                break
        self.costs.seconds[STEP] = least
        self._rehearse_others()

    def _rehearse_others(self) -> None:
        """Time one batch of an evaluation, and samples."""
        engine = self.engine
        size = min(self.config.batch_size, len(self.held_out))
        started = time.perf_counter()
        with engine.averaged() as module:
            scores(module, Thinned(self.held_out, size), size, engine.accelerator)
        seconds = time.perf_counter() - started
        self.costs.seconds["evaluate"] = seconds * len(self.held_out) / size
        self._timed("sample", self._samples)

    def _announce(self, seconds: float) -> None:
        """Print how long the run takes, if it takes long. Several processes would have to agree: they do without."""
        engine = self.engine
        if engine.accelerator.num_processes > 1:
            return
        started = time.perf_counter()
        int(engine.skipped)  # synchronizes
        seconds += time.perf_counter() - started
        self.costs.seconds[STEP] = seconds
        if seconds * (engine.total - engine.step) < WORTH_AN_ESTIMATE:
            return
        self._rehearse_others()
        if self.first_process:
            print(f"fastgen: {self.costs.sentence(engine.step)}", file=sys.stderr, flush=True)

    def _items_to_evaluate(self) -> int:
        """Held-out items of an evaluation: as many as take ``SHARE`` of the run, unless its interval is given."""
        if self.config.evaluate_every:
            return EVALUATED
        trained_on = self.engine.total * self.batches_per_step * self.config.batch_size
        most = SHARE / FORWARD_SHARE * trained_on / self.costs.due("evaluate", 0)
        return max(LEAST_EVALUATED, min(EVALUATED, int(most)))

    def _may_sample(self, seconds: float) -> bool:
        """Whether the next samples keep to their share of the time, unless their interval is given."""
        last = self.costs.seconds.get("sample", 0.0)
        if self.config.sample_every or last < QUICK or self.engine.accelerator.num_processes > 1:
            return True
        return self._sampling + last <= SHARE_OF_SAMPLES * (seconds + last)

    def _timed(self, part: str, work: Callable[[], Any]) -> float:
        """Do a part of the run that is no step; the seconds that it took."""
        started = time.perf_counter()
        work()
        self.costs.seconds[part] = time.perf_counter() - started
        return self.costs.seconds[part]

    def _stop_requested(self, stop: StopRequest, step: int) -> bool:
        """Whether to stop here. Several processes agree on it by a reduction, in steps that are logged."""
        accelerator = self.engine.accelerator
        if accelerator.num_processes == 1:
            return stop.requested
        if step % self.config.log_every:
            return False
        requested = torch.tensor(float(stop.requested), device=self.engine.device)
        return bool(accelerator.reduce(requested, "sum") > 0)

    def _log(self, progress: Progress) -> None:
        engine = self.engine
        started = time.perf_counter()
        progress.losses = engine.means()  # synchronizes
        self._training += time.perf_counter() - started
        self._speed = self._steps * self.config.batch_size * self.batches_per_step / max(self._training, 1e-9)
        seconds = time.perf_counter() - self._began
        row = {"values": progress.losses, "items_per_second": self._speed, "seconds": seconds}
        self._write("train", row | {"skipped": int(engine.skipped)})
        self.costs.seconds[STEP] = self._training / self._steps
        self._training, self._steps = 0.0, 0
        progress.speed = self._speed
        progress.show(engine.step, sum(self.costs.left(engine.step).values()))
        if int(engine.in_a_row) >= self.config.nan_limit:
            raise StoppedError(
                f"step {engine.step}: the gradient was NaN or infinite in the last {int(engine.in_a_row)} steps, which"
                " were skipped; try a smaller learning rate, clip, or float32",
                self.saved,
                interrupted=False,
            )

    def _evaluate(self, progress: Progress) -> None:
        engine = self.engine
        with engine.averaged() as module:
            found = mean_scores(scores(module, self.held_out, self.config.batch_size, engine.accelerator))
            if self.distances is not None:
                found = found | self.distances.measure()
        if found:
            progress.held_out = found
            self._write("held-out", {"values": found, "seconds": time.perf_counter() - self._began})

    def sample(self) -> None:
        """Write samples, always from the same noise, and the model's ``visualize``."""
        for name, each in self._samples().items():
            if self.first_process:
                save_samples(inside(self.folder.path, name), f"{self.engine.step:0{STEP_DIGITS}d}", each)
        if self.first_process and self.engine.model.kind == "images":
            self._save_real_images()

    def _save_real_images(self) -> None:
        """Write training images, once, for comparison."""
        folder, stem = inside(self.folder.path, REAL), "0" * STEP_DIGITS
        if not (folder / f"{stem}.png").exists():
            count = SAMPLES["images"]
            save_samples(folder, stem, Images(first(Thinned(self.train, count), count, torch.device("cpu"))["images"]))

    def _samples(self) -> Mapping[str, Samples]:
        engine, model = self.engine, self.engine.model
        generator = torch.Generator().manual_seed(0)
        count = SAMPLES[model.kind]
        with engine.averaged() as module:
            options = model.sampling_class()
            if model.kind in TRANSLATED:
                given = first(Thinned(self.held_out, count), count, engine.device)
                samples = {"samples": module("translate", given, options, generator=generator)}
            else:
                samples = {"samples": module("draw", count, options, generator=generator)}
            items = Thinned(self.held_out, VISUALIZED)
            samples |= module("visualize", first(items, VISUALIZED, engine.device), generator=generator)
        return samples

    def save(self) -> None:
        """Write the checkpoint of this step and, every few minutes, curves and report."""
        engine = self.engine
        engine.share_buffers()
        tensors = engine.tensors()
        if self.first_process:
            check_held(self.folder.path)
            save_checkpoint(self.folder.checkpoint, self.header, tensors)
            if time.perf_counter() - self._pages > SECONDS_BETWEEN_PAGES:
                self.write_pages()
        engine.accelerator.wait_for_everyone()
        self.saved = engine.step

    def write_pages(self) -> None:
        """Write curves and report, from the files of the folder."""
        write_curves(self.folder.curves, read_rows(self.folder.metrics))
        write_report(self.folder.path)
        self._pages = time.perf_counter()

    def _write(self, part: str, row: dict[str, Any]) -> None:
        step = self.engine.step
        if self.first_process:
            check_held(self.folder.path)
            self.folder.add_metrics({"step": step, "epoch": round(step / self.epoch_steps, 4), "part": part} | row)
        self.engine.accelerator.log({f"{part}/{name}": value for name, value in row["values"].items()}, step)

    def _seconds_before(self) -> float:
        """Seconds that the run trained before it was resumed."""
        seconds = (row.get("seconds") for row in read_rows(self.folder.metrics))
        return max((float(each) for each in seconds if isinstance(each, (int, float))), default=0.0)
