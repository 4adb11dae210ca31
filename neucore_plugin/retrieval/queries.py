"""What is asked of an index, and how a query with several pictures, turns or negatives becomes one score.

With e(r, t) a model's encoding of a reference and a relative caption, and S its score, a query is

    mean over turns t of S(mean over references r of e(r, t), .) - NEGATIVE * mean over negatives n of S(e(n), .)

The mean of encodings is taken entry by entry. The turns of a dialogue are all said of the same references. A query
without a reference or without a text is encoded without it, and so is a negative: a text alone, or a picture alone. A
query is thus a sum of weighted parts, each an encoding like any other, so that whoever computes S (the model, a vector
database) can compute it.

Letters: Q queries, P parts of queries, G gallery images, n of them.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.images import Picture
from neucore_plugin.retrieval import filters
from neucore_plugin.retrieval.encoding import evaluating, fitting
from neucore_plugin.retrieval.qdrant_edge import worth_scoring
from neucore_plugin.retrieval.ranks import topk

NEGATIVE = 0.5  # what negatives count against the query
_BATCH = 64  # pictures, and texts, encoded at a time
_CELLS = 1 << 24  # scores held at a time, 64 MB
_FEW = 65536  # images of a narrow filter scored at a time

Find = Callable[[Any], tuple[Any, int | None]]  # a reference -> the picture, its gallery position where it has one
Encoding = dict[str, Tensor]


@dataclass(frozen=True)
class Ready:
    """A picture that was decoded already: what the model's processor gave, [3,H,W], and its gallery position, if any.

    A `Query` takes it for a reference or a negative: a service decodes in other threads than the model's.
    """

    pixels: Tensor
    position: int | None = None


@dataclass(frozen=True)
class Query:
    """What is asked: the arguments of `GalleryIndex.search`, where each is described.

    Raises DataError where nothing is left to search with, or k is below 1.
    """

    image: Picture | None = None
    text: str | None = None
    k: int | None = 10
    exclude_reference: bool = True
    images: Sequence[Picture | Ready] = ()
    then: Sequence[str] = ()
    exclude: Sequence[str] = ()
    without_texts: Sequence[str] = ()
    without_images: Sequence[Picture | Ready] = ()
    where: str | None = None
    explain: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        for name in ("images", "then", "exclude", "without_texts", "without_images"):
            given = getattr(self, name)  # one value is as good as a list of one
            object.__setattr__(self, name, tuple(given) if isinstance(given, list | tuple) else (given,))
        if self.k is not None and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise DataError(f"k={self.k}: give a whole number of at least 1, or None for all images")
        if not self.references and not self.turns:
            what = "neither image nor text given; give a reference, a caption, or both"
            if self.negatives or self.without_images:
                what = "only what the images should not be was given; give a reference, a caption, or both as well"
            raise DataError(what)

    @property
    def references(self) -> tuple[Picture, ...]:
        """All reference images."""
        return (*(() if self.image is None else (self.image,)), *self.images)

    @property
    def turns(self) -> tuple[str, ...]:
        """The captions of the dialogue, first to last; blank ones say nothing."""
        return tuple(text for text in (self.text, *self.then) if text and text.strip())

    @property
    def negatives(self) -> tuple[str, ...]:
        """The texts that the images should not fit."""
        return tuple(text for text in self.without_texts if text and text.strip())


@dataclass(frozen=True)
class Encoded:
    """A query as a model reads it.

    parts: (weight, encoding of one row, {key: [1,*]}); its score of an image is the sum of weight * score.
    left_out: gallery positions that are no answers: those of its references, unless they may be.
    """

    parts: tuple[tuple[float, Encoding], ...]
    left_out: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    """An image among the answers: its gallery position, its score, and of an explained search the score's terms."""

    position: int
    score: float
    terms: Mapping[str, float] | None = None


def encode(model: Any, queries: Sequence[Query], find: Find) -> list[Encoded]:
    """Queries -> their encodings, by batches of pictures and texts; each query as if it were alone.

    find: `GalleryIndex.reference`.
    """
    wanted: list[tuple[Any, str | None]] = []  # a picture, a text, or both, to be encoded by itself
    plans: list[list[tuple[float, list[int]]]] = []  # of a query its parts: weight, and which of `wanted` are averaged
    left_out: list[tuple[int, ...]] = []

    def ask(picture: Any, text: str | None) -> int:
        wanted.append((picture, text))
        return len(wanted) - 1

    for query in queries:
        found = [_reference(model, image, find) for image in query.references]
        turns = query.turns or (None,)
        plan = [(1 / len(turns), [ask(pixels, text) for pixels, _ in found] or [ask(None, text)]) for text in turns]
        negatives = [ask(None, text) for text in query.negatives]
        negatives += [ask(_reference(model, image, find)[0], None) for image in query.without_images]
        plan += [(-NEGATIVE / len(negatives), [number]) for number in negatives]
        plans.append(plan)
        places = [place for _, place in found if place is not None]
        left_out.append(tuple(dict.fromkeys(places)) if query.exclude_reference else ())
    rows = _encode_each(model, wanted)
    return [
        Encoded(tuple((weight, _mean([rows[number] for number in numbers])) for weight, numbers in plan), places)
        for plan, places in zip(plans, left_out, strict=True)
    ]


def _reference(model: Any, image: Any, find: Find) -> tuple[Tensor, int | None]:
    if isinstance(image, Ready):
        return image.pixels, image.position
    picture, place = find(image)
    return model.image_processor(picture), place


def _encode_each(model: Any, wanted: Sequence[tuple[Any, str | None]]) -> list[Encoding]:
    """(pixels or None, text or None) -> encodings of one row each, in order."""
    groups: dict[tuple[bool, bool], list[int]] = {}
    for number, (pixels, text) in enumerate(wanted):
        groups.setdefault((pixels is not None, text is not None), []).append(number)
    rows: list[Encoding] = [{} for _ in wanted]
    for (with_pixels, with_text), numbers in groups.items():
        for start in range(0, len(numbers), _BATCH):
            batch = numbers[start : start + _BATCH]
            pixels = torch.stack([wanted[number][0] for number in batch]).to(model.device) if with_pixels else None
            encoded = model.encode_query(pixels, [wanted[number][1] for number in batch] if with_text else None)
            for row, number in enumerate(batch):
                rows[number] = {key: value[row : row + 1] for key, value in encoded.items()}
    return rows


def _mean(rows: Sequence[Encoding]) -> Encoding:
    if len(rows) == 1:
        return rows[0]
    return {key: torch.cat([row[key] for row in rows]).mean(dim=0, keepdim=True) for key in rows[0]}


def answer(index: Any, queries: Sequence[Query]) -> list[list[Found]]:
    """The best images of each query, best first, equal scores by position; where fewer are left than k, all of these.

    index: a GalleryIndex with its model. DataError: NaN scores, an unknown name, a filter that is wrong.
    """
    model = index.model
    results: list[list[Found]] = [[] for _ in queries]
    filtered: dict[str | None, list[int]] = {}
    for number, query in enumerate(queries):
        filtered.setdefault((query.where or "").strip() or None, []).append(number)
    step = max(1, min(_BATCH, _CELLS // max(1, index.stored)))
    with torch.inference_mode(), evaluating(model), fitting(index):
        for where, numbers in filtered.items():
            places = passing(index, where)
            for start in range(0, len(numbers), step):
                batch = numbers[start : start + step]
                encoded = dict(zip(batch, encode(model, [queries[n] for n in batch], index.reference), strict=True))
                for number in batch:
                    near = worth_scoring(index, queries[number], encoded[number], places)
                    if near is not None:
                        one = encoded.pop(number)
                        results[number] = _found(index, queries[number], one, _scores(index, [one], near), near)
                scores = _scores(index, list(encoded.values()), places) if encoded else None  # [Q,n] of those places
                for row, (number, one) in enumerate(encoded.items()):
                    results[number] = _found(index, queries[number], one, scores[row : row + 1], places)
    return results


def check_named(index: Any, query: Query) -> None:
    """Raise DataError for names that an index does not have: of references, images, attributes. No model is needed."""
    for image in (*query.references, *query.without_images):
        if isinstance(image, str | os.PathLike):
            index.meant_by(image)
    for name in query.exclude:
        index.position(name)
    if query.where and query.where.strip():
        filters.check_attributes(filters.parse(query.where), [part.rows.select for part in index.parts])


def passing(index: Any, where: str | None) -> Tensor | None:
    """Gallery positions [n] of the images that are there and pass a filter; None: all positions."""
    if where is None:
        return None if index.alive is None else index.alive.nonzero().flatten()
    tree = filters.parse(where)
    filters.check_attributes(tree, [part.rows.select for part in index.parts])
    mask = torch.zeros(index.stored, dtype=torch.bool)
    for part in index.parts:
        if rows := filters.rows_passing(tree, part.rows.select):
            mask[part.start + torch.tensor(rows)] = True
    return (mask if index.alive is None else mask & index.alive).nonzero().flatten()


def _scores(index: Any, encoded: Sequence[Encoded], places: Tensor | None) -> Tensor:
    if places is None:
        return combined(encoded, index.scores, index.stored)
    if 4 * len(places) > index.stored:
        return combined(encoded, index.scores, index.stored)[:, places]
    found = [torch.empty(len(encoded), 0)]
    for some in places.split(_FEW):  # nothing else of the gallery is read
        gallery = {key: value.to(index.model.device) for key, value in index.candidates(some).items()}

        def scores(part: Encoding, gallery: Encoding = gallery) -> Tensor:
            return index.model.score(part, gallery).float().cpu()

        found.append(combined(encoded, scores, len(some)))
    return torch.cat(found, dim=1)


def combined(encoded: Sequence[Encoded], scores: Callable[[Encoding], Tensor], count: int) -> Tensor:
    """Scores [Q,n] of queries by a function that gives those [P,n] of encodings [P,*]; count: n.

    Those of images that are not there, which the function says as -inf, have no meaning.
    """
    groups: dict[tuple[str, ...], list[tuple[int, float, Encoding]]] = {}
    for number, query in enumerate(encoded):
        for weight, part in query.parts:
            groups.setdefault(tuple(sorted(part)), []).append((number, weight, part))
    total, step = None, max(1, _CELLS // max(1, count))
    for parts in groups.values():
        for start in range(0, len(parts), step):
            some = parts[start : start + step]
            found = scores({key: torch.cat([part[key] for _, _, part in some]) for key in some[0][2]})
            total = torch.zeros(len(encoded), count, dtype=found.dtype) if total is None else total
            for row, (number, weight, _) in enumerate(some):
                total[number].add_(found[row], alpha=weight)
    return total


def _found(index: Any, query: Query, encoded: Encoded, scores: Tensor, places: Tensor | None) -> list[Found]:
    left_out = {*encoded.left_out, *(index.position(name) for name in query.exclude)}
    count = scores.shape[1]
    if count == 0:
        return []
    best = topk(scores, count if query.k is None else min(count, query.k + len(left_out)))[0]
    values = scores[0, best].tolist()
    positions = (best if places is None else places[best]).tolist()
    kept = [pair for pair in zip(positions, values, strict=True) if pair[0] not in left_out][: query.k]
    if not query.explain or not kept:
        return [Found(*pair) for pair in kept]
    gallery = index.candidates(torch.tensor([place for place, _ in kept]))
    terms = explain(index.model, encoded, {key: value.to(index.model.device) for key, value in gallery.items()})
    return [Found(*pair, {term: of[row] for term, of in terms.items()}) for row, pair in enumerate(kept)]


def explain(model: Any, encoded: Encoded, gallery: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The terms of a query's scores of gallery images [n,*], {term: n values}: their sum is the score."""
    if not hasattr(model, "explain"):
        raise DataError(
            f"{type(model).__name__} does not say what its scores are made of (it has no `explain`); search without it"
        )
    total: dict[str, Tensor] = {}
    for weight, part in encoded.parts:
        for term, values in model.explain(part, gallery).items():
            total[term] = total.get(term, 0) + weight * values[0].float().cpu()
    return {term: values.tolist() for term, values in total.items()}


def concepts(model: Any, query: Query) -> list[tuple[str, tuple[str, ...]]]:
    """(text, the words of it that the model takes as concepts) of a query's turns and of its negatives."""
    texts = [*query.turns, *query.negatives]
    read = getattr(model, "concepts_read", None)
    words = read(texts) if read is not None and texts else [()] * len(texts)
    return [(text, tuple(dict.fromkeys(found))) for text, found in zip(texts, words, strict=True)]
