"""One thread owns the model: requests wait in a bounded queue, and those that wait together are answered together."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

log = logging.getLogger(__name__)
_PATIENCE = 2.0  # seconds

Handler = Callable[[Sequence[Any]], Sequence[Any]]  # as many answers as items; an exception among them is an error


class Busy(Exception):
    """As many requests wait as may."""


class Worker:
    """Runs handlers in one thread.

    bound: how many items may wait. most: how many are handled together. `seen(n)`: called with the size of each batch.
    """

    def __init__(self, bound: int, most: int, seen: Callable[[int], None] = lambda size: None) -> None:
        self.most, self.seen = most, seen
        self._waiting: queue.Queue = queue.Queue(bound)
        self._thread = threading.Thread(target=self._work, name="neucore-model", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return self._waiting.qsize()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, handler: Handler, item: Any) -> Future:
        """The answer to come; `Busy` where the queue is full. Nothing here waits."""
        answer: Future = Future()
        try:
            self._waiting.put_nowait((handler, item, answer))
        except queue.Full:
            raise Busy from None
        return answer

    def close(self) -> None:
        """Answer what waits, then end the thread; one that is stuck is left after some seconds."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=_PATIENCE)
        self._thread.join(_PATIENCE)

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            jobs = [first]
            while len(jobs) < self.most:  # no window to wait for: what came while the last batch was at work is there
                try:
                    jobs.append(self._waiting.get_nowait())
                except queue.Empty:
                    break
            last = None in jobs
            jobs = [job for job in jobs if job is not None and job[2].set_running_or_notify_cancel()]
            for handler in dict.fromkeys(job[0] for job in jobs):
                self._handle(handler, [job for job in jobs if job[0] == handler])
            if last:
                return

    def _handle(self, handler: Handler, jobs: list) -> None:
        self.seen(len(jobs))
        try:
            answers = handler([item for _, item, _ in jobs])
        except BaseException as error:  # the thread outlives everything
            if len(jobs) > 1:  # one of them is the culprit: the others get their answers
                for job in jobs:
                    self._handle(handler, [job])
                return
            answers = [error]
        for (_, _, answer), value in zip(jobs, answers, strict=True):
            if isinstance(value, BaseException):
                answer.set_exception(value if isinstance(value, Exception) else RuntimeError(repr(value)))
            else:
                answer.set_result(value)
