"""What a training shows while it runs: a progress bar on a terminal, else lines on the log. Knows no host."""

import contextlib
import datetime
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from neucore_plugin.common import distributed


@contextlib.contextmanager
def round_display(
    title: str, span: tuple[int, int, int], total: int, log_freq: int
) -> Iterator[Callable[[int, Any], None]]:
    """`show(iteration, meters)` of one round, to be called after each step; it acts on the main process alone.

    span: iteration at which the round begins, at which it goes on now (another one after a kill), at which it ends.
    total: iterations of the whole training. log_freq: iterations between two lines where there is no terminal.
    """
    start, first, end = span
    on_main = distributed.rank() == 0
    on_terminal = on_main and sys.stderr.isatty()
    bar = tqdm(total=end - start, initial=first - start, desc=title, disable=not on_terminal, unit="batch")
    began = shown_at = time.time()
    shown = first

    def show(iteration: int, meters: Any) -> None:
        nonlocal shown, shown_at
        now, at_end = time.time(), iteration == end
        if on_terminal and (now - shown_at > 0.2 or at_end):
            shown_at = now
            bar.set_postfix_str(str(meters), refresh=False)
            bar.update(iteration - start - bar.n)
        elif on_main and not on_terminal and (iteration - shown >= log_freq or at_end):
            shown = iteration
            pace = (now - began) / (iteration - first)
            left = datetime.timedelta(seconds=int(pace * (total - iteration)))
            place = f"[{iteration - start}/{end - start}]"
            logging.info("%s  %s  %s  %.3f s a batch  training ends in %s", title, place, meters, pace, left)

    with bar:
        yield show
