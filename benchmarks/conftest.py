"""Fixtures: interleaved timing of fastgen and other implementations, with medians, quartiles and ratios."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import pytest
import torch

import fastgen
from benchmarks.roofline import Cost, chip_of
from fastgen.testing import interleaved_times, median_ratio


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def against(benchmark, device) -> Callable[..., dict[str, float]]:
    """Function ``against(ours, peers, ...)`` that returns the ratio of times peer / ours for each peer.

    pytest-benchmark times ``ours``; the ratios are measured in interleaved rounds and stored in ``extra_info``. With
    ``bytes_moved``, ``flops`` or ``cost``, throughput is stored too; with ``cost`` also the fraction of the roofline on
    chips that roofline.py lists. With ``clock=time.process_time`` it is CPU time that is compared.
    """

    def run(
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        bytes_moved: int = 0,
        flops: int = 0,
        cost: Cost | None = None,
        rounds: int = 15,
        clock: Callable[[], float] = time.perf_counter,
    ) -> dict[str, float]:
        synchronize = device.type == "cuda"
        times = interleaved_times({"ours": ours, **peers}, rounds=rounds, synchronize=synchronize, clock=clock)
        ratios = {name: median_ratio(times[name], times["ours"]) for name in peers}
        rows = {}
        for name, seconds in times.items():
            middle = median(seconds)
            low, _, high = quantiles(seconds, n=4)
            rows[name] = {"median_ms": middle * 1e3, "quartiles_ms": [low * 1e3, high * 1e3]}
            if bytes_moved:
                rows[name]["GB/s"] = bytes_moved / middle / 1e9
            if flops:
                rows[name]["TFLOP/s"] = flops / middle / 1e12
            if cost is not None:
                rows[name]["TFLOP/s"] = cost.flops / middle / 1e12
                rows[name]["Texp/s"] = cost.exponentials / middle / 1e12
                chip = chip_of(torch.cuda.get_device_name(device)) if synchronize else None
                if chip is not None:
                    rows[name]["of roofline"] = max(cost.bounds(chip).values()) / middle
        benchmark.extra_info.update(device=str(device), rows=rows, ratios=ratios)

        def timed() -> None:
            ours()
            if synchronize:
                torch.cuda.synchronize()

        benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
        return ratios

    return run


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["fastgen"] = fastgen.info().as_dict()
    machine_info["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
