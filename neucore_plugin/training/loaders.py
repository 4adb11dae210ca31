"""Batches of map-style data sets in an order that depends on (seed, epoch) alone, from any batch of an epoch on.

Those of streams come in an order that the numbers of processes and workers decide as well: see StreamLoader.

What a sample looks like depends on (seed, epoch, index): its generators are seeded one by one. So the number of workers
and processes changes nothing, and a training can be continued in the middle of an epoch. Knows no host.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import ConfigError, DataError, nearest
from neucore_plugin.common.files import sha256_text
from neucore_plugin.common.randomness import mix, preserved, seed_sample
from neucore_plugin.common.workers import Batches, check_room
from neucore_plugin.config.run import RunSchema

_TOLD = 10  # bad samples of an epoch that are named in the log; all are counted


class _Maker:
    """Makes a whole batch from (epoch, indices); the epoch comes with it, so long-lived workers know it as well."""

    def __init__(self, dataset: Any, collate: Callable[[list], Any], seed: int) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self._epoch: int | None = None

    def __call__(self, plan: tuple[int | None, list[int]]) -> Any:
        epoch, indices = plan
        if epoch is not None and epoch != self._epoch:
            set_epoch(self.dataset, epoch)
            self._epoch = epoch
        with preserved():
            samples = []
            for index in indices:
                seed_sample(self.seed, epoch or 0, index)
                samples.append(self.dataset[index])
            return self.collate(samples)


class _Order:
    """Sampler of (epoch, indices of one batch): of this process's part, from batch `start` of `epoch` on."""

    def __init__(self, size: int, batch_size: int, shuffle: bool, seed: int, rank: int, world: int) -> None:
        self.size, self.batch_size, self.shuffle, self.seed = size, batch_size, shuffle, seed
        self.rank, self.world = rank, world
        self.epoch, self.start = 0, 0
        own = len(range(rank, size, world))
        # Training: all processes need equally many full batches. Evaluation: each index exactly once.
        self.batches = size // (batch_size * world) if shuffle else -(-own // batch_size)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[int | None, list[int]]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
            order = torch.randperm(self.size, generator=generator).tolist()[self.rank :: self.world]
        else:
            order = list(range(self.rank, self.size, self.world))
        for batch in range(self.start, self.batches):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield (self.epoch if self.shuffle else None), indices


class BatchLoader:
    """Loader of one split.

    Training (`shuffle`): a new order every epoch, shared by the processes, full batches only. Evaluation: process r of
    W gets the indices r, r + W, ... in order, each once. `collater` of the data set makes the batch.

    Attributes: dataset (the one given), batch_size, num_workers, timeout (seconds a batch may take, 0: any); len() =
    batches of an epoch in this process.
    Raises: DataError for a data set that is not map-style, or has fewer samples than processes (training).
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        name: str = "data",
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        timeout: float = 0,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if (
            isinstance(dataset, IterableDataset)
            or not hasattr(dataset, "__getitem__")
            or not hasattr(dataset, "__len__")
        ):
            raise DataError(
                f"{name}: a {type(dataset).__name__} has no length or no index; a map-style data set is needed"
            )
        size = len(dataset)
        if shuffle and size < world:
            raise DataError(f"{name} has {size} samples for {world} processes; start at most {size} processes")
        if shuffle and size < batch_size * world:
            smaller = size // world
            logging.warning("%s has %d samples: batches hold %d, not %d", name, size, smaller, batch_size)
            batch_size = smaller
        self.dataset, self.batch_size, self.num_workers, self.timeout = dataset, batch_size, num_workers, timeout
        self._order = _Order(size, batch_size, shuffle, seed, rank, world)
        self._room = False
        collate = getattr(dataset, "collater", None) or default_collate
        self._batches = Batches(
            _Maker(dataset, collate, seed),
            self._order,
            num_workers,
            timeout,
            pin_memory=pin_memory,
            persistent_workers=shuffle and num_workers > 0,
            generator=torch.Generator().manual_seed(0),  # else every epoch would draw from the training's generator
        )

    def __len__(self) -> int:
        return len(self._order)

    def set_position(self, epoch: int, start: int = 0) -> None:
        """The next iteration is over `epoch`, from batch number `start` on."""
        self._order.epoch, self._order.start = epoch, start
        set_epoch(self.dataset, epoch)

    def __iter__(self) -> Iterator[Any]:
        if not self._room:
            self._batches.check_room((None, [0]), self.batch_size)
            self._room = True
        yield from self._batches


class _Streamer:
    """Makes this worker's batches of an epoch: (batch, what was wrong with samples that it lacks).

    What was done before a training was stopped is read again, since the order follows from it, but not decoded: None
    stands in its place. sizes: batches of each worker.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int, rank: int, world: int, sizes: list[int]) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world, self.sizes = rank, world, sizes
        self.place = torch.zeros(2, dtype=torch.int64)  # epoch, and first batch of it, of all workers together

    def __call__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, (epoch, start) = info.id if info else 0, self.place.tolist()
        turns = [w for turn in range(max(self.sizes)) for w, size in enumerate(self.sizes) if turn < size]
        done = turns[:start].count(worker)  # workers take turns
        set_epoch(self.dataset, epoch)
        samples = self.samples(epoch, worker)
        for number in range(self.sizes[worker]):
            raw = list(islice(samples, self.batch_size))
            if len(raw) < self.batch_size:
                raise DataError(f"worker {worker} has fewer samples than its shards are said to hold; write them again")
            yield None if number < done else self._batch(epoch, raw)

    def samples(self, epoch: int, worker: int) -> Iterator[Any]:
        return self.dataset.samples(self.seed, epoch, self.rank, self.world, worker, len(self.sizes))

    def _batch(self, epoch: int, raw: list[Any]) -> tuple[Any, list[str]]:
        made, problems = [], []
        with preserved():
            for index, content in raw:
                seed_sample(self.seed, epoch, index)
                try:
                    made.append(self.dataset.decode(index, content))
                except DataError as error:
                    if not self.dataset.skip:
                        raise
                    problems.append(str(error))
            if not made:
                raise DataError(f"all samples of a batch are bad, such as {problems[0]}")
            return self.dataset.collater(made), problems


class StreamLoader:
    """Training batches of a data set whose samples come in an order of their own (see `datasets/shards/stream.py`).

    Order and batches follow from (seed, epoch, processes, workers, batch size). Every process gets equally many full
    batches in every epoch, whichever shards it is dealt; what is left over changes with the epoch.

    Attributes and len() as of BatchLoader. Raises: DataError where some process may get no whole batch.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        name: str = "data",
        seed: int = 0,
        num_workers: int = 0,
        timeout: float = 0,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self.batch_size, self.num_workers, self.timeout = dataset, batch_size, num_workers, timeout
        self.name, self._room = name, False
        workers = max(1, num_workers)
        sizes = [_least_batches(dataset.sizes, batch_size, other, world, workers) for other in range(world)]
        self._length = min(map(sum, sizes))
        if not self._length:
            raise DataError(
                f"{name} has {len(dataset)} queries in {len(dataset.sizes)} shards, too few for {world} processes with "
                f"{workers} readers each and batches of {batch_size}: a reader gets whole shards. Lower "
                "run.batch_size_train or run.num_workers, start fewer processes, or write smaller shards (--max-mb)"
            )
        self._source = _Streamer(dataset, batch_size, seed, rank, world, sizes[rank])
        if num_workers:
            self._source.place.share_memory_()  # workers live longer than an epoch
        self._batches = Batches(
            self._source,
            None,
            num_workers,
            timeout,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        return self._length

    def set_position(self, epoch: int, start: int = 0) -> None:
        """The next iteration is over `epoch`, from batch number `start` on."""
        self._source.place.copy_(torch.tensor([epoch, start]))
        set_epoch(self.dataset, epoch)

    def __iter__(self) -> Iterator[Any]:
        epoch, bad = int(self._source.place[0]), 0
        if self.num_workers and not self._room:
            self._check_room(epoch)
        for _, found in zip(range(len(self)), self._batches, strict=False):
            if found is None:
                continue
            batch, problems = found
            for text in problems[: max(0, _TOLD - bad)]:
                logging.warning("left out: %s", text)
            bad += len(problems)
            yield batch
        if bad:
            logging.warning(
                "%s, epoch %d: %d bad samples were left out of this process's batches", self.name, epoch, bad
            )

    def _check_room(self, epoch: int) -> None:
        """Once: the size of a batch follows from one sample of this process."""
        for index, raw in self._source.samples(epoch, 0):
            with contextlib.suppress(DataError), preserved():  # a bad one is told where its batch is made
                sample = self.dataset.collater([self.dataset.decode(index, raw)])
                check_room(sample, self.batch_size, len(self), self.num_workers)
                break
        self._room = True


def _least_batches(shards: Sequence[int], batch_size: int, rank: int, world: int, workers: int) -> list[int]:
    """Full batches that each worker of a process has in any epoch. shards: samples of each.

    Shards are dealt in a new order each epoch, but how many a worker gets never changes: at worst the smallest ones.
    """
    counts = [len(range(rank + world * worker, len(shards), world * workers)) for worker in range(workers)]
    return [sum(sorted(shards)[:count]) // batch_size for count in counts]


def set_epoch(dataset: Any, epoch: int) -> None:
    """Call `set_epoch` of a data set, or of the parts of a concatenated one, where there is such a method."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
        return
    for part in getattr(dataset, "datasets", ()):
        set_epoch(part, epoch)


def batch_loader(
    dataset: Any, run: RunSchema, split: str, pin_memory: bool, training: bool = False
) -> BatchLoader | StreamLoader:
    """The loader of a training's, or of an evaluated, data set, for this process."""
    shared = training or run.use_dist_eval_sampler
    streamed = any(getattr(part, "streamed", False) for part in getattr(dataset, "datasets", [dataset]))
    if streamed and (not training or hasattr(dataset, "datasets")):
        raise ConfigError(
            f"split {split} comes as a stream (data_type: stream), which is trained on, one split and data set at a "
            "time. Name one in run.train_splits, or read by place: data_type: shards"
        )
    kind = StreamLoader if streamed else partial(BatchLoader, shuffle=training)
    return kind(
        dataset,
        run.batch_size_train if training else run.batch_size_eval,
        name=f"train split {split}" if training else f"split {split}",
        seed=run.seed,
        num_workers=run.num_workers,
        timeout=run.loader_timeout,
        rank=distributed.rank() if shared else 0,
        world=distributed.world_size() if shared else 1,
        pin_memory=pin_memory,
    )


def chosen_datasets(datasets: Mapping[str, Mapping[str, Any]], run: RunSchema) -> tuple[list[Any], dict[str, Any]]:
    """(data sets to train on, {split: data set} to evaluate) of {name: {split: data set}}.

    Without training the test splits are evaluated, or else the validation ones.
    Raises: ConfigError for a split that none or, to be evaluated, several have; DataError for an empty one.
    """
    by_split: dict[str, dict[str, Any]] = {}
    for name, splits in datasets.items():
        for split, dataset in splits.items():
            if hasattr(dataset, "__len__") and len(dataset) == 0:
                raise DataError(
                    f"split {split!r} of the data set {name!r} is empty. Check its annotations and build_info, "
                    "or take the split out of run.train_splits / valid_splits / test_splits"
                )
            by_split.setdefault(split, {})[name] = dataset
    train = [] if run.evaluate else run.train_splits
    evaluated = run.test_splits or run.valid_splits if run.evaluate else [*run.valid_splits, *run.test_splits]
    for split in (*train, *evaluated):
        if split not in by_split:
            raise ConfigError(f"the data sets have no split {split!r}.{nearest(split, by_split)}")
        if split in evaluated and len(by_split[split]) > 1:
            names = ", ".join(by_split[split])
            raise ConfigError(f"split {split!r} is in several data sets ({names}): evaluate them one at a time")
    parts = [dataset for split in train for dataset in by_split[split].values()]
    return parts, {split: next(iter(by_split[split].values())) for split in evaluated}


def data_fingerprint(dataset: Any) -> str | None:
    """A data set's own `fingerprint` (an attribute or a method), of all parts where it is concatenated; else None."""
    value = getattr(dataset, "fingerprint", None)
    if value is None and getattr(dataset, "datasets", None):
        parts = [data_fingerprint(part) for part in dataset.datasets]
        return sha256_text("\n".join(parts)) if all(parts) else None
    value = value() if callable(value) else value
    return None if value is None else str(value)
