"""Ranks and the best K images, exactly as the data sets define them.

Q queries, G gallery images, R right answers of a query, M group members of a query; q queries of one chunk.

Everywhere: a higher score is better; equal scores are ordered by gallery position, lower first, so a ranking depends on
nothing but the scores; `excluded` (the reference) takes no place in the ranking, None = it is not in the gallery.
Work is done in chunks of queries with a few temporaries [chunk, G]; the score matrix itself is never copied whole.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from neucore_plugin.common.errors import DataError

_CHUNK_QUERIES = 256
_CHUNK_CELLS = 1 << 24  # elements of one temporary: 64 MB in float32, however large the gallery is

MISS = torch.iinfo(torch.int64).max  # the rank of what takes no place: beyond every K

Positions = Sequence[Sequence[int]]
Excluded = Sequence["int | None"] | None


def target_ranks(
    scores: Tensor, targets: Positions, excluded: Excluded = None, members: Positions | None = None
) -> Tensor:
    """1-based rank [Q] (int64, on the CPU) of each query's best-placed right answer; `MISS` where the only one is the
    image that is excluded.

    scores [Q,G]; targets: gallery positions of the right answers of each query, one or more; excluded: gallery position
    of each query's reference or None; members: rank these alone (CIRR's subset).
    DataError: NaN scores, positions outside the gallery, or a query with no right answer at all. The gallery comes from
    the split file, so a target it lacks is a broken split; counting it as a miss would lower the numbers in silence.
    """
    ranks = image_ranks(scores, targets, excluded, members)  # [Q,R]
    for query in (ranks == 0).all(1).nonzero().flatten().tolist():
        if excluded is None or set(targets[query]) != {excluded[query]}:
            where = "in the gallery" if members is None else "among its group members"
            raise DataError(f"query {query} has no right answer {where}; mend the split or leave the query out")
    return ranks.masked_fill(ranks == 0, MISS).amin(1)


def image_ranks(
    scores: Tensor, images: Positions, excluded: Excluded = None, members: Positions | None = None
) -> Tensor:
    """1-based rank [Q,R] of each of the given images of a query; 0 where a query has fewer than R.

    As `target_ranks`, but an image that is excluded, or no member, has rank 0. For graded answers (soft protocol).
    """
    count, gallery = _check_scores(scores)
    wanted = _padded(images, count, gallery, "targets")
    group = None if members is None else _padded(members, count, gallery, "members")
    left_out = _excluded_tensor(excluded, count, gallery)
    ranks = torch.zeros(wanted.shape, dtype=torch.long)
    for rows in _chunks(count, gallery):
        part, out = _finite_rows(scores, rows), left_out[rows].to(scores.device)
        if group is None:
            values, columns = part, torch.arange(gallery, device=part.device).expand(len(part), -1)
        else:
            columns = group[rows].to(part.device)
            values = part.gather(1, columns.clamp(min=0))
        counted = (columns >= 0) & (columns != out[:, None])
        for slot, place in enumerate(wanted[rows].to(part.device).split(1, dim=1)):  # [q,1]
            score = part.gather(1, place.clamp(min=0))
            ahead = (values > score) | ((values == score) & (columns < place))
            present = ((columns == place) & counted).any(1)
            ranks[rows, slot] = torch.where(present, 1 + (ahead & counted).sum(1), 0).cpu()
    return ranks


def topk(scores: Tensor, k: int, excluded: Excluded = None) -> Tensor:
    """Gallery positions [Q,k] (int64, on the CPU) of the k best images of each query, best first, ties by position.

    scores [Q,G]. DataError: NaN scores, or k below 1 or above what is left of the gallery.
    """
    count, gallery = _check_scores(scores)
    left_out = _excluded_tensor(excluded, count, gallery)
    available = gallery - int(bool((left_out >= 0).any()))
    if not 1 <= k <= available:
        without = " without the reference" if available < gallery else ""
        raise DataError(f"k={k}: the gallery has {available} images{without}; give k from 1 to {available}")
    best = torch.empty(count, k, dtype=torch.long)
    for rows in _chunks(count, gallery):
        part, out = _finite_rows(scores, rows), left_out[rows].to(scores.device)
        known = (out >= 0).nonzero().squeeze(1)
        if len(known):
            part = part.clone()
            part[known, out[known]] = -torch.inf
        # torch.topk settles ties as it likes: take from it the k-th value alone, then fill up with the first equal ones
        threshold = part.topk(k, dim=1, sorted=True).values[:, -1:]
        above, equal = part > threshold, part == threshold
        equal[known, out[known]] = False  # an excluded image must not tie with a true score of -inf
        missing = k - above.sum(1, keepdim=True)
        above |= equal & (equal.cumsum(1, dtype=torch.int32) <= missing)
        places = above.nonzero()[:, 1].view(-1, k)  # ascending in a row
        order = part.gather(1, places).sort(dim=1, descending=True, stable=True).indices
        best[rows] = places.gather(1, order).cpu()
    return best


def _chunks(count: int, gallery: int) -> Iterator[slice]:
    step = max(1, min(_CHUNK_QUERIES, _CHUNK_CELLS // gallery))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _check_scores(scores: Tensor) -> tuple[int, int]:
    if scores.ndim != 2 or not scores.is_floating_point() or 0 in scores.shape:
        given = f"{str(scores.dtype).removeprefix('torch.')} {tuple(scores.shape)}"
        raise DataError(f"scores must be a floating point matrix [queries, gallery], neither side empty; given {given}")
    return scores.shape[0], scores.shape[1]


def _finite_rows(scores: Tensor, rows: slice) -> Tensor:
    part = scores[rows]
    bad = part.isnan().any(1).nonzero()
    if len(bad):
        raise DataError(
            f"the scores of query {rows.start + int(bad[0])} contain NaN, so they have no order; "
            "the weights or the encodings are damaged (overflow in half precision, or a training run that diverged)"
        )
    return part


def _padded(positions: Positions, count: int, gallery: int, what: str) -> Tensor:
    """Lists of gallery positions as one matrix [Q, longest], -1 where a row is shorter."""
    if len(positions) != count:
        raise DataError(f"{what}: {len(positions)} lists for {count} queries; give one for each query")
    matrix = torch.full((count, max((len(row) for row in positions), default=0) or 1), -1, dtype=torch.long)
    for query, row in enumerate(positions):
        for place in row:
            if not 0 <= place < gallery:
                raise DataError(f"query {query}: {what} names gallery position {place}, but the gallery has {gallery}")
        matrix[query, : len(row)] = torch.as_tensor(tuple(row), dtype=torch.long)
    return matrix


def _excluded_tensor(excluded: Excluded, count: int, gallery: int) -> Tensor:
    """Positions [Q], -1 for None."""
    if excluded is None:
        return torch.full((count,), -1, dtype=torch.long)
    rows = [() if place is None else (place,) for place in excluded]
    return _padded(rows, count, gallery, "excluded").squeeze(1)
