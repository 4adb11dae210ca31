"""The images that a training shows, each once: negatives for every query. Knows no host and no model.

G images, n of them at a time, N tokens, Di width of the encoder's features.
"""

from collections.abc import Sequence

import numpy as np
import torch

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.datasets.triplets import TripletDataset


class TrainingGallery:
    """References, right answers and groups of one or more training splits.

    Images that the splits' galleries hold beside these, such as those of a test, are none of it.

    Attributes: keys [G], ascending: the number of each image in the samples' *_key and *_keys.
    Raises: ConfigError for a split that comes as a stream: its images are there only as they pass.
    """

    def __init__(self, datasets: Sequence[TripletDataset]) -> None:
        found: dict[int, tuple[int, str]] = {}
        for number, dataset in enumerate(datasets):
            if dataset.streamed:
                raise ConfigError(
                    f"model.matching.negatives asks for images beyond the batch, but the split {dataset.split!r} of "
                    f"{dataset.name} comes as a stream, whose images are there only as they pass. Set "
                    "model.matching.negatives: batch, or read by place: data_type: shards"
                )
            for triplet in dataset.triplets:
                for name in (triplet.reference, *triplet.targets, *triplet.members):
                    if (key := dataset.key(name)) is not None:
                        found.setdefault(key, (number, name))
        self.keys = torch.tensor(sorted(found), dtype=torch.long)
        self._datasets, self._sources = list(datasets), [found[key] for key in self.keys.tolist()]
        self._split: np.ndarray | None = None  # of each image [G] the number of its data set
        self._place: np.ndarray | None = None  # and its place in that one's cache

    @property
    def cached(self) -> bool:
        """Whether the features of all images lie in caches."""
        return all(dataset.images.cache is not None for dataset in self._datasets)

    def features(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """Of some images, rows [n] of `keys`: tokens [n,N,Di] or pooled [n,Di], float32, from the caches."""
        caches = [dataset.images.cache for dataset in self._datasets]
        if self._place is None:
            self._split = np.array([number for number, _ in self._sources])
            self._place = np.array([caches[number].place(image) for number, image in self._sources])
        split, place = (part[rows.numpy()] for part in (self._split, self._place))
        parts = {number: caches[number].rows(name, place[split == number]) for number in np.unique(split)}
        if len(parts) == 1:
            return next(iter(parts.values()))
        result = torch.empty(len(rows), *next(iter(parts.values())).shape[1:])
        for number, values in parts.items():
            result[torch.from_numpy(split == number)] = values
        return result
