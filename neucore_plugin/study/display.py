"""What a study shows while it runs: one bar and a line a running trial on a terminal, else a line an event."""

import contextlib
import datetime
import re
import sys
from pathlib import Path

from tqdm import tqdm

from neucore_plugin.common.text import visible


class Display:
    """Progress on standard error. total: trials to do; lines: how many may run at a time."""

    def __init__(self, total: int, lines: int, unit: str = "trial") -> None:
        self.total, self.done, self._terminal = total, 0, sys.stderr.isatty()
        self._bar = self._lines = None
        if self._terminal:
            form = "{desc}{n_fmt}/{total_fmt} |{bar}| {postfix}"
            self._bar = tqdm(total=total, unit=unit, bar_format=form, dynamic_ncols=True, leave=True)
            self._lines = [tqdm(bar_format="{desc}", position=1 + n, leave=False) for n in range(lines)]

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def show(self, running: list[tuple[str, Path]], left: float | None) -> None:
        """(title, log) of the running trials, and the seconds that are left, where they are known."""
        if self._bar is None:
            return
        self._bar.n = self.done
        self._bar.set_postfix_str("" if left is None else f"{duration(left)} left", refresh=True)
        width = max(20, (self._bar.ncols or 80) - 1)
        texts = [f"  {title}: {last_lines(log, 1, plain=True)}" for title, log in running]
        for place, line in enumerate(self._lines):
            line.set_description_str(texts[place][:width] if place < len(texts) else "")

    def finished(self, text: str, left: float | None) -> None:
        """One trial more is done."""
        self.done += 1
        rest = "" if left is None or self.done == self.total else f"  ({duration(left)} left)"
        self.say(f"{self.done}/{self.total}  {text}{rest if not self._terminal else ''}")

    def close(self) -> None:
        """Leave the terminal in order."""
        with contextlib.suppress(OSError):
            for line in [*(self._lines or ()), *([self._bar] if self._bar is not None else [])]:
                line.close()


def duration(seconds: float) -> str:
    """`1:02:03`."""
    return str(datetime.timedelta(seconds=max(0, round(seconds))))


def last_lines(path: Path, count: int, plain: bool = False) -> str:
    """The last lines of a log, printable; `plain`: without time and level, in one line."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - 500 * count))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [visible(line) for line in text.splitlines() if line.strip()][-count:]
    if plain:
        lines = [re.sub(r"^\d\d:\d\d:\d\d \[\w+\] ", "", line) for line in lines]
    return "\n".join(lines)
