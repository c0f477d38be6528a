"""Device time of calls: CUDA events around replays of a graph, with operands that are rotated beyond L2."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.gpu.session import REHEARSAL

ROUNDS = 9
MOST_COPIES = 16

Call = Callable[[], Any]


class Timed:
    """Calls of one implementation, captured in a graph where that is possible.

    Args:
        make: gives a call on operands of its own. Called on the stream on which the calls run, so that a backward pass
            runs on it too.
        copies: number of calls per replay, each on its own operands.
        stream: the stream; None in a rehearsal.
    """

    def __init__(self, make: Callable[[], Call], copies: int, stream: Any) -> None:
        self.stream, self.method = stream, "clock"
        if stream is None:
            self.calls = [make()]
            self.calls[0]()
            return
        with torch.cuda.stream(stream):
            self.calls = [make() for _ in range(copies)]
            for _ in range(3):
                for call in self.calls:
                    call()
        stream.synchronize()
        self.method, self.replay = "events", self._eager
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self.kept = [call() for call in self.calls]
        except Exception:  # some implementations cannot be captured
            torch.cuda.synchronize()
        else:
            self.method, self.replay, self.graph = "graph", graph.replay, graph
        self.replay()
        stream.synchronize()

    def _eager(self) -> None:
        for call in self.calls:
            call()

    def once(self) -> Callable[[], float]:
        """Starts one measurement. The function gives its seconds per call, after a synchronization."""
        if self.stream is None:
            start = time.perf_counter()
            self.calls[0]()
            seconds = time.perf_counter() - start
            return lambda: seconds
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self.stream):
            begin.record()
            self.replay()
            end.record()
        return lambda: begin.elapsed_time(end) * 1e-3 / len(self.calls)


def copies_beyond_l2(operand_bytes: int) -> int:
    """How many sets of operands are twice as large as L2."""
    if REHEARSAL:
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_COPIES, -(-2 * cache // max(operand_bytes, 1))))


def measure(
    implementations: dict[str, Callable[[], Call]], operand_bytes: int, rounds: int = ROUNDS
) -> dict[str, dict[str, Any]]:
    """Times of each implementation in seconds: median, quartiles, rounds and method; or why it has none.

    Rounds are interleaved, in reversed order in every other round. An implementation that does not support the operands
    has {"problem": ...}.
    """
    stream = None if REHEARSAL else torch.cuda.Stream()
    copies, timed, rows = copies_beyond_l2(operand_bytes), {}, {}
    for name, make in implementations.items():
        try:
            timed[name] = Timed(make, copies, stream)
        except Exception as error:  # unsupported, or out of memory
            rows[name] = {
                "problem": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            }
            if not REHEARSAL:
                torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in timed}
    for index in range(3 if REHEARSAL else rounds):
        names = list(timed) if index % 2 == 0 else list(reversed(timed))
        for name in names:
            finish = timed[name].once()
            if stream is not None:
                stream.synchronize()
            times[name].append(finish())
    for name, seconds in times.items():
        low, _, high = quantiles(seconds, n=4, method="inclusive")
        rows[name] = {
            "median_us": round(median(seconds) * 1e6, 2),
            "quartiles_us": [round(low * 1e6, 2), round(high * 1e6, 2)],
            "rounds": len(seconds),
            "copies": copies,
            "method": timed[name].method,
        }
    return rows
