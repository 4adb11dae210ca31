"""Encode the gallery once, rank it for every query, gather what the processes found.

G gallery images, D width. A model here is any object with `title`, `device`, `fingerprint`, `encode_image`,
`encode_query` and `score`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from neucore_plugin.clauses import cached_text
from neucore_plugin.common import distributed
from neucore_plugin.common.errors import DataError
from neucore_plugin.common.workers import Batches
from neucore_plugin.datasets.triplets import GalleryDataset, TripletDataset
from neucore_plugin.evaluation.ranking import Evaluated, QueryRanks, Ranking
from neucore_plugin.retrieval.ranks import topk

PARTIAL_QUERIES = ("text_only", "image_only")  # rows of a result for which the model sees less of each query


class Evaluator:
    """Ranks the gallery of a data set by a model's scores; all processes of a group call it together.

    The gallery is the split's own list; the reference takes no place in the ranking; ties go to the image that comes
    first in the gallery; a query's rank is that of its best-placed right answer; where only the reference is right, the
    query is a miss. The data set's protocol may say otherwise (see `datasets/protocols.py`).

    Args:
        score_chunk: queries scored at a time. batch_size: queries encoded at a time for a submission.
    """

    def __init__(self, score_chunk: int, batch_size: int) -> None:
        self.score_chunk, self.batch_size = score_chunk, batch_size
        self._gallery: tuple[str, dict[str, Tensor]] | None = None

    @torch.inference_mode()
    def evaluate(self, model: Any, loader: DataLoader, partial: bool = False) -> Evaluated:
        """Rank the gallery for this process's queries, then gather: the same result in every process.

        partial: also with the text alone, with the image alone, and in every further wording. DataError where the
        loaders of all processes do not give each query once.
        """
        model.eval()
        dataset = loader.dataset
        gallery = self._encode_gallery(model, dataset, loader)
        rows = list(dict.fromkeys([model.title, *(PARTIAL_QUERIES if partial else ())]))  # a baseline may be text_only
        wordings = range(dataset.rewordings if partial else 0)
        ranking = Ranking(dataset)
        mine: dict[str | int, dict[int, QueryRanks]] = {row: {} for row in (*rows, *wordings)}
        for samples in _progress(loader, f"ranking {dataset.split}"):
            indices = samples["index"].tolist()
            for row in mine:
                asked = dataset.reworded(samples, row) if row in wordings else samples
                scores = model.score(_encode_queries(model, asked, row), gallery, chunk=self.score_chunk)
                shown = row == model.title or row in wordings
                mine[row].update(zip(indices, ranking(scores, indices, shown), strict=True))
        parts = distributed.gather(mine)
        found = {row: _in_order([part[row] for part in parts], len(dataset)) for row in mine}
        return Evaluated(dataset, {row: found[row] for row in rows}, [found[place] for place in wordings])

    @torch.inference_mode()
    def rank_for_submission(
        self, model: Any, dataset: TripletDataset, count: int, in_group: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Gallery positions of the `count` best images of each query, and of the `in_group` best of its group.

        The reference takes a place where the protocol ranks it; in a group never. Groups are empty lists where the data
        set has none. DataError for a gallery that is too small.
        """
        if len(dataset.gallery.ids) <= count:
            raise DataError(f"a gallery of {len(dataset.gallery.ids)} images cannot give {count} images a query")
        loader = DataLoader(dataset, batch_size=self.batch_size, collate_fn=dataset.collater)
        gallery = self._encode_gallery(model, dataset, loader)
        whole: list[list[int]] = []
        groups: list[list[int]] = []
        for samples in _progress(loader, f"ranking {dataset.split}"):
            indices = samples["index"].tolist()
            scores = model.score(_encode_queries(model, samples), gallery, chunk=self.score_chunk).cpu()
            references = [dataset.reference_position(index) for index in indices]
            whole += topk(scores, count, references if dataset.protocol.remove_reference else None).tolist()
            for row, index in enumerate(indices):
                members = sorted(set(dataset.member_positions(index)) - {references[row]})
                order = sorted(members, key=lambda place: (-float(scores[row, place]), place))
                groups.append(order[:in_group])
        return whole, groups

    def _encode_gallery(self, model: Any, dataset: TripletDataset, loader: DataLoader) -> dict[str, Tensor]:
        """Gallery encoding [G,D]; kept until the weights or the gallery change, since splits often share it."""
        key = f"{model.fingerprint()}|{dataset.gallery.fingerprint}"
        if self._gallery is not None and self._gallery[0] == key:
            return self._gallery[1]
        images = GalleryDataset(dataset.gallery, dataset.images)
        first, end = (len(images) * n // distributed.world_size() for n in (distributed.rank(), distributed.rank() + 1))
        plans = [range(start, min(start + loader.batch_size, end)) for start in range(first, end, loader.batch_size)]
        batches = Batches(partial(_gallery_batch, images), plans, loader.num_workers, loader.timeout)
        batches.check_room(range(first, first + 1), loader.batch_size)
        mine = []
        for batch in _progress(batches, "encoding gallery"):
            encoded = model.encode_image(batch.get("image"), tokens=batch.get("tokens"), pooled=batch.get("pooled"))
            mine.append({name: value.cpu() for name, value in encoded.items()})
        parts = [part for process in distributed.gather(mine) for part in process]
        encoding = {name: torch.cat([part[name] for part in parts]).to(model.device) for name in parts[0]}
        self._gallery = (key, encoding)
        return encoding


def _gallery_batch(images: GalleryDataset, places: Iterable[int]) -> dict[str, Any]:
    return images.collater([images[place] for place in places])


def _progress(loader: Any, title: str) -> Any:
    return tqdm(loader, title, unit="batch", leave=False, disable=None if distributed.rank() == 0 else True)


def _encode_queries(model: Any, samples: Mapping[str, Any], row: str | int | None = None) -> dict[str, Tensor]:
    """Encoded queries of a batch; of the rows in PARTIAL_QUERIES the model sees the text, or the image, alone."""
    inputs: dict[str, Any] = {}
    if row != "text_only":
        features = {key: samples.get(f"reference_{key}") for key in ("tokens", "pooled")}
        inputs = {"pixels": samples.get("reference_image"), **features}
    if row != "image_only":
        features = cached_text(samples)
        texts = {"texts": samples["text_input"], "concept_words": samples["concept_words"]}
        inputs |= {**texts, "text_features": features}
    return model.encode_query(**inputs)


def _in_order(parts: Sequence[Mapping[int, QueryRanks]], count: int) -> list[QueryRanks]:
    """The ranks that each process found, by query index -> one list."""
    found = {index: ranks for part in parts for index, ranks in part.items()}
    if sorted(found) != list(range(count)):
        raise DataError(f"evaluation saw {len(found)} of {count} queries; the loader must give each query exactly once")
    return [found[index] for index in range(count)]
