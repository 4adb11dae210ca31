"""What a benchmark measures itself against: this machine's own rates, processor time, peak memory; one way to print."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """A line of the table of `python -m benchmarks`.

    ours, theirs: processor seconds, of ours and of the form `other` for the same work. memory: peak of the process in
    bytes. share: what ours reaches of the machine's rate `of` ("products" or "memory"), None where neither bounds it.
    """

    what: str
    ours: float
    other: str
    theirs: float
    memory: int
    share: float | None = None
    of: str = ""

    @property
    def ratio(self) -> float:
        """How many times dearer the other form is."""
        return self.theirs / self.ours

    @property
    def name(self) -> str:
        """What tells it from other rows."""
        return f"{self.what} against {self.other}"


def fastest(run: Callable[[], Any], runs: int = 5) -> tuple[float, float]:
    """Wall and processor seconds, each the least of `runs`."""
    best = (float("inf"), float("inf"))
    for _ in range(runs):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        best = min(best[0], time.perf_counter() - wall), min(best[1], time.process_time() - cpu)
    return best


def product_rate(size: int = 2048) -> tuple[float, float]:
    """Operations a second of a large float32 matrix product: by wall time, by processor time."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    wall, cpu = fastest(lambda: left @ right, 6)
    return 2 * size**3 / wall, 2 * size**3 / cpu


def bandwidth(megabytes: int = 512) -> tuple[float, float]:
    """Bytes a second that a sum reads from memory, far more than the caches hold: by wall time, by processor time."""
    numbers = torch.ones(megabytes << 18)
    wall, cpu = fastest(numbers.sum, 6)
    return numbers.nbytes / wall, numbers.nbytes / cpu


def peak() -> int:
    """Largest resident size of this process so far, bytes; mapped files that were read count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def own_process(script: str, *arguments: str, threads: int | None = None, **environment: str) -> str:
    """What a script prints, run alone; torch has as many threads there as here, unless `threads` says otherwise."""
    command = [sys.executable, "-W", "ignore", script, *arguments]
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads or torch.get_num_threads()), **environment}
    return subprocess.run(command, env=settings, stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first flush left."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
