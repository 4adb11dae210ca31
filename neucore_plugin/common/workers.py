"""Processes that load data: is there room for their batches in shared memory, and what became of one that died.

torch hands batches over in shared memory; a lack of it is a bus error in the worker, or a batch that never comes.
"""

import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Listener
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from neucore_plugin.common.errors import ConfigError, FileError, NeucoreError, explained

SHARED_MEMORY = "/dev/shm"
_AHEAD = 2  # batches that torch keeps ready a worker


class Batches:
    """Batches that `make` makes of the `plans`, in their order, in `workers` processes (0: in this one). Without plans
    each worker makes its own: `make()` iterates over them, and there is neither a length nor `check_room`.

    timeout: seconds that a batch may take to come; 0: any. options: further ones of torch's DataLoader.
    Iterating raises the errors of ours as they are, and one of ours for a worker that died or gave nothing in time;
    ConfigError at the start where shared memory has no room for what the workers keep ready.
    """

    def __init__(
        self, make: Callable[..., Any], plans: Iterable[Any] | None, workers: int, timeout: float, **options: Any
    ) -> None:
        self._made, self._workers = _Streamed(make) if plans is None else _Made(make), workers
        self._loader = DataLoader(
            self._made,
            batch_size=None,
            sampler=plans,
            collate_fn=_same,
            num_workers=workers,
            timeout=timeout if workers else 0,
            **options,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def check_room(self, one: Any, size: int) -> None:
        """ConfigError where no batch could come from the workers; `one`: the plan of a batch of one of `size` samples.

        They come in shared memory, and are announced through a socket in the folder for temporary files.
        """
        if self._workers and len(self):
            check_room(self._made.make(one), size, len(self), self._workers)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches, _END)
            except RuntimeError as error:
                if (reason := explained(error)) is None:
                    raise
                raise reason from error
            if batch is _END:
                return
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch


def check_room(one: Any, size: int, batches: int, workers: int) -> None:
    """ConfigError where shared memory is too small for what is kept ready; `one`: a batch of one of `size` samples."""
    _check_socket()
    together = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # processes that torchrun has started here
    kept = min(batches, _AHEAD * workers + 1)
    check_shared_memory(sum(tensor.nbytes for tensor in _tensors(one)) * size * kept * together, workers)


def check_shared_memory(needed: int, workers: int) -> None:
    """ConfigError, with the remedy, where fewer than the `needed` bytes are free for the batches of `workers`."""
    if not os.path.isdir(SHARED_MEMORY):  # macOS, Windows: no such limit
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"run.num_workers: {workers} keep batches of {_shown(needed)} in shared memory, but {SHARED_MEMORY} has "
            f"{_shown(free)} left. Use run.num_workers=0, or smaller batches, or give the container more: docker run "
            f"--shm-size={-(-needed // (1 << 30)) + 1}g, or --ipc=host"
        )


def _check_socket() -> None:
    if not hasattr(socket, "AF_UNIX"):
        return
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:  # no such folder, none that can be written, or a path too long for a socket
        raise ConfigError(
            f"run.num_workers: the folder for temporary files, TMPDIR={os.environ.get('TMPDIR', '')}, cannot be used "
            f"({error}). Set TMPDIR to a folder with a short path that can be written, or use run.num_workers=0"
        ) from error


class _Made(Dataset):
    """In a worker an error of ours, or of the system, comes as a value: torch would bury its text in a traceback."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, plan: Any) -> Any:
        return self.make(plan) if get_worker_info() is None else _told(lambda: self.make(plan))


class _Streamed(IterableDataset):
    """The same of batches that come in an order of their own."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        batches = self.make()
        if get_worker_info() is None:
            yield from batches
            return
        while (batch := _told(lambda: next(batches, _END))) is not _END:
            yield batch
            if isinstance(batch, _Failure):
                return


def _told(make: Callable[[], Any]) -> Any:
    """What `make` gives, in shared memory; a _Failure where it raises an error that a user can mend."""
    try:
        batch = make()
        for tensor in _tensors(batch):  # torch would do it later, where a lack of room makes the batch disappear
            tensor.share_memory_()
        return batch
    except (NeucoreError, OSError) as error:
        return _Failure(error if isinstance(error, NeucoreError) else FileError.of(error))
    except RuntimeError as error:
        if (reason := explained(error)) is None:
            raise
        return _Failure(reason)


class _Failure:
    def __init__(self, error: NeucoreError) -> None:
        self.error = error


_END = object()


def _same(batch: Any) -> Any:
    return batch


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a batch."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _shown(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"
