"""The training loop: steps, and when to log, evaluate, sample and save."""

from __future__ import annotations

import time
from typing import Any

import torch

from fastgen.batch import TRANSLATED
from fastgen.data import Items
from fastgen.train.checkpoint import Header, save_checkpoint
from fastgen.train.curves import read_rows, write_curves
from fastgen.train.engine import Engine
from fastgen.train.errors import StoppedError
from fastgen.train.evaluation import VISUALIZED, Thinned, first, mean_scores, scores
from fastgen.train.files import inside
from fastgen.train.folder import STEP_DIGITS, RunFolder
from fastgen.train.lock import check_held
from fastgen.train.progress import Progress
from fastgen.train.report import write_report
from fastgen.train.sample_files import save_samples
from fastgen.train.signals import StopRequest
from fastgen.train.stream import Stream, batches, resident

SAMPLES = {"images": 64, "pairs": 16, "domains": 16, "text": 4, "sequences": 8, "audio": 4}
EVALUATED = 2048  # held-out items of an evaluation during training; ``fastgen evaluate`` uses all
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
        self.held_out = Thinned(splits[1], EVALUATED)
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
        self._evaluate_every, self._sample_every, self._save_every = (
            config.every(what, engine.total) for what in ("evaluate", "sample", "checkpoint")
        )
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
        while engine.step < engine.total:
            started = time.perf_counter()
            engine.advance(parts, self.batches_per_step)
            self._training += time.perf_counter() - started
            self._steps += 1
            progress.advance()
            step = engine.step
            last = step == engine.total
            if step % self.config.log_every == 0 or last:
                self._log(progress)
            if step % self._evaluate_every == 0 or last:
                self._evaluate(progress)
            if step % self._sample_every == 0 or last:
                self.sample()
            if step % self._save_every == 0 or last:
                self.save()
            if self._stop_requested(stop, step):
                self.save()
                raise StoppedError("interrupted", self.saved, interrupted=True)

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
        per_step = self._training / self._steps
        self._training, self._steps = 0.0, 0
        progress.speed = self._speed
        progress.show(engine.step, per_step * (engine.total - engine.step))
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
        if found:
            progress.held_out = found
            self._write("held-out", {"values": found, "seconds": time.perf_counter() - self._began})

    def sample(self) -> None:
        """Write samples, always from the same noise, and the model's ``visualize``."""
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
        if self.first_process:
            for name, each in samples.items():
                save_samples(inside(self.folder.path, name), f"{engine.step:0{STEP_DIGITS}d}", each)

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
